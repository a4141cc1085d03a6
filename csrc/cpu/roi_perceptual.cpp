// roi_perceptual_losses on the CPU: weight tables per box, then blocks of channels of one image each, in parallel.
//
// A thread owns every cell of the blocks it works on and takes the boxes in their order, so the result is the same, bit by
// bit, for any number of threads.

#include <optional>
#include <string>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "roi_perceptual_block.h"
#include "tensors.h"

namespace lid {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Arguments {
  std::vector<Tensor> inputs, targets;
  Tensor rois;
  std::optional<Tensor> box_levels;
  std::vector<double> spatial_scales;
  std::vector<int64_t> output_size;
  int64_t sampling_ratio;
  bool aligned;
  std::string criterion;
};

Criterion criterion_of(const std::string& name) {
  if (name == "mse") return Criterion::mse;
  if (name == "l1") return Criterion::l1;
  if (name == "smooth_l1") return Criterion::smooth_l1;
  STD_TORCH_CHECK(name == "charbonnier", "criterion must be mse, l1, smooth_l1 or charbonnier, got ", name);
  return Criterion::charbonnier;
}

template <typename T>
BlockFunction<T> block_function(ScalarType dtype, bool channels_last) {
  const bool avx2 = instruction_set() >= InstructionSet::avx2;
  if constexpr (std::is_same_v<T, double>) {
    return avx2 ? avx2::double_block(channels_last) : baseline::double_block(channels_last);
  } else {
    const Storage storage = storage_of(dtype);
    return avx2 ? avx2::float_block(storage, channels_last) : baseline::float_block(storage, channels_last);
  }
}

// Whether dimensions have the strides of a dense tensor in this order, innermost first.
bool is_dense(const Tensor& tensor, const std::vector<int64_t>& order) {
  if (tensor.numel() == 0) return true;  // whatever its strides say
  int64_t expected = 1;
  for (const int64_t d : order) {
    if (tensor.size(d) != 1 && tensor.stride(d) != expected) return false;
    expected *= tensor.size(d);
  }
  return true;
}

FeatureLevel feature_level(const Tensor& input, const Tensor& target) {
  const int64_t dimensions = input.dim();
  STD_TORCH_CHECK(dimensions == 4 || dimensions == 5, "inputs must have 4 or 5 dimensions, got ", dimensions);
  STD_TORCH_CHECK(target.dim() == dimensions && target.scalar_type() == input.scalar_type(),
                  "targets must have the shape and dtype of inputs");
  std::vector<int64_t> planar, channels_last{1};
  for (int64_t d = dimensions - 1; d >= 0; --d) {
    STD_TORCH_CHECK(target.size(d) == input.size(d), "targets must have the shape of inputs, differ in dimension ", d);
    planar.push_back(d);
    if (d != 1) channels_last.push_back(d);
  }
  const bool is_planar = is_dense(input, planar) && is_dense(target, planar);
  STD_TORCH_CHECK(is_planar || (is_dense(input, channels_last) && is_dense(target, channels_last)),
                  "inputs and targets must be contiguous, or both channels_last");
  return {input.const_data_ptr(), target.const_data_ptr(),   nullptr,
          input.size(1),          dimensions == 5 ? input.size(2) : 1, input.size(dimensions - 2),
          input.size(dimensions - 1), !is_planar};
}

// Everything about the boxes that doesn't depend on features: tables, grouped by level and image.
template <typename T>
class Boxes {
 public:
  Boxes(const Arguments& arguments, const std::vector<FeatureLevel>& levels, int64_t images, const T* grad_losses)
      : images_(images) {
    const int64_t count = arguments.rois.size(0), width = arguments.rois.size(1), axes = (width - 1) / 2;
    const Tensor rois_tensor = torch::stable::contiguous(arguments.rois);
    const T* rois = rois_tensor.const_data_ptr<T>();
    std::optional<Tensor> levels_tensor;
    if (arguments.box_levels) levels_tensor = torch::stable::contiguous(*arguments.box_levels);
    const int64_t* box_levels = levels_tensor ? levels_tensor->const_data_ptr<int64_t>() : nullptr;

    groups_.assign(levels.size() * images + 1, 0);
    const auto level_of = [&](int64_t k) { return box_levels ? box_levels[k] : 0; };
    const auto group_of = [&](int64_t k) { return level_of(k) * images + static_cast<int64_t>(rois[k * width]); };
    const auto sampling_of = [&](int64_t k, int64_t axis) {  // 0, 1, 2: z, y, x
      const FeatureLevel& level = levels[level_of(k)];
      const int64_t size = axis == 0 ? level.depth : axis == 1 ? level.height : level.width;
      if (axis == 0 && axes == 2) return AxisSampling<T>(T(0), T(1), T(1), true, 1, 1, 1);
      const T* box = rois + k * width + 1 + (2 - axis);  // coordinates come as x, y, z
      return AxisSampling<T>(box[0], box[axes], static_cast<T>(arguments.spatial_scales[level_of(k)]),
                             arguments.aligned, arguments.sampling_ratio, bins(arguments, axis), size);
    };

    // Where each box's cells and weights start.
    std::vector<int64_t> cell_offsets(count + 1), weight_offsets(count + 1);
    for (int64_t k = 0; k < count; ++k) {
      check_box(rois + k * width, width, k, images);
      STD_TORCH_CHECK(level_of(k) >= 0 && level_of(k) < static_cast<int64_t>(levels.size()), "box_levels[", k,
                      "] must be a level, got ", level_of(k));
      ++groups_[group_of(k) + 1];
      cell_offsets[k + 1] = cell_offsets[k];
      weight_offsets[k + 1] = weight_offsets[k];
      for (int64_t axis = 0; axis < 3; ++axis) {
        const AxisSampling<T> sampling = sampling_of(k, axis);
        cell_offsets[k + 1] += sampling.most_cells();
        weight_offsets[k + 1] += sampling.bins * sampling.most_taps();
      }
    }
    for (size_t g = 1; g < groups_.size(); ++g) groups_[g] += groups_[g - 1];
    std::vector<int64_t> next(groups_.begin(), groups_.end() - 1), places(count);
    for (int64_t k = 0; k < count; ++k) places[k] = next[group_of(k)]++;

    const int64_t bins_z = bins(arguments, 0), bins_y = bins(arguments, 1), bins_x = bins(arguments, 2);
    const int64_t bins_of_axes = bins_z + bins_y + bins_x;
    first_.resize(count * bins_of_axes);
    cells_.resize(cell_offsets[count]);
    weights_.resize(weight_offsets[count]);
    tables_.resize(count);
    torch::stable::parallel_for(0, count, 64, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        int32_t* cells = cells_.data() + cell_offsets[k];
        T* weights = weights_.data() + weight_offsets[k];
        int32_t* first = first_.data() + k * bins_of_axes;
        const auto table = [&](int64_t axis) {
          const AxisSampling<T> sampling = sampling_of(k, axis);
          const AxisTable<T> filled = fill_axis_table(sampling, cells, first, weights);
          cells += sampling.most_cells();
          weights += sampling.bins * sampling.most_taps();
          first += sampling.bins;
          return filled;
        };
        BoxTables<T>& box = tables_[places[k]];
        box.z = table(0);
        box.y = table(1);
        box.x = table(2);
        box.row = k;
        const T values = static_cast<T>(levels[level_of(k)].channels * bins_z * bins_y * bins_x);
        box.gradient_scale = grad_losses ? grad_losses[k] / values : T(1) / values;
      }
    });
    for (const BoxTables<T>& box : tables_) {
      most_x_ = std::max(most_x_, box.x.cell_count);
      most_rows_ = std::max(most_rows_, bins_z * bins_y * box.z.taps * box.y.taps);
    }
  }

  ImageBoxes<T> of(int64_t level, int64_t image) const {
    const int64_t group = level * images_ + image;
    return {tables_.data() + groups_[group], groups_[group + 1] - groups_[group], most_x_, most_rows_};
  }

  const std::vector<BoxTables<T>>& all() const { return tables_; }

 private:
  static int64_t bins(const Arguments& arguments, int64_t axis) {
    const std::vector<int64_t>& size = arguments.output_size;
    return size.size() == 3 ? size[axis] : axis == 0 ? 1 : size[axis - 1];
  }

  static void check_box(const T* box, int64_t width, int64_t row, int64_t images) {
    STD_TORCH_CHECK(box[0] >= T(0) && box[0] < static_cast<T>(images) && box[0] == std::floor(box[0]), "boxes[", row,
                    "] must have an integer batch index in [0, ", images, "), got ", box[0]);
    const int64_t axes = (width - 1) / 2;
    for (int64_t i = 1; i <= axes; ++i) {
      STD_TORCH_CHECK(std::isfinite(box[i]) && std::isfinite(box[i + axes]) && box[i + axes] >= box[i], "boxes[", row,
                      "] must have finite, ordered coordinates, got ", box[i], " to ", box[i + axes]);
    }
  }

  int64_t images_;
  int64_t most_x_ = 0, most_rows_ = 0;
  std::vector<int32_t> cells_, first_;
  std::vector<T> weights_;
  std::vector<BoxTables<T>> tables_;
  std::vector<int64_t> groups_;
};

std::vector<FeatureLevel> checked_levels(const Arguments& a) {
  STD_TORCH_CHECK(!a.inputs.empty() && a.targets.size() == a.inputs.size() &&
                      a.spatial_scales.size() == a.inputs.size(),
                  "inputs, targets and spatial_scales must have one entry per level");
  STD_TORCH_CHECK(a.box_levels || a.inputs.size() == 1, "box_levels is needed for more than one level");
  std::vector<FeatureLevel> levels;
  for (size_t i = 0; i < a.inputs.size(); ++i) {
    levels.push_back(feature_level(a.inputs[i], a.targets[i]));
    STD_TORCH_CHECK(a.inputs[i].dim() == a.inputs[0].dim() && a.inputs[i].size(0) == a.inputs[0].size(0) &&
                        a.inputs[i].scalar_type() == a.inputs[0].scalar_type(),
                    "levels must share dimensions, batch size and dtype");
  }
  const int64_t axes = a.inputs[0].dim() - 2;
  STD_TORCH_CHECK(a.rois.dim() == 2 && a.rois.size(1) == 1 + 2 * axes, "rois must have shape [K, ", 1 + 2 * axes, "]");
  STD_TORCH_CHECK(static_cast<int64_t>(a.output_size.size()) == axes, "output_size must have ", axes, " entries");
  const ScalarType expected = a.inputs[0].scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(a.rois.scalar_type() == expected, "rois must be float64 for float64 features, else float32");
  return levels;
}

// Calls work(level number, image, block of channels) for all of them, blocks of one level in parallel. Consecutive calls
// take one block of every image, so that the threads' shares are alike when the boxes crowd in some images.
template <typename T, typename Work>
void for_each_block(const std::vector<FeatureLevel>& levels, int64_t images, const Work& work) {
  for (size_t l = 0; l < levels.size(); ++l) {
    const int64_t of_block = block_channels(levels[l].channels_last);
    const int64_t blocks = (levels[l].channels + of_block - 1) / of_block;
    torch::stable::parallel_for(0, blocks * images, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) work(l, i % images, i / images);
    });
  }
}

template <typename T>
Tensor losses(const Arguments& a) {
  const std::vector<FeatureLevel> levels = checked_levels(a);
  const Criterion criterion = criterion_of(a.criterion);
  const int64_t images = a.inputs[0].size(0), count = a.rois.size(0);
  const Boxes<T> boxes(a, levels, images, nullptr);
  int64_t stride = 1;
  for (const FeatureLevel& level : levels) stride = std::max(stride, (level.channels + kPlanarBlock - 1) / kPlanarBlock);
  std::vector<T> sums(count * stride);
  for_each_block<T>(levels, images, [&](size_t l, int64_t image, int64_t block) {
    block_function<T>(a.inputs[l].scalar_type(), levels[l].channels_last)(
        levels[l], boxes.of(l, image), image, block, criterion, sums.data() + block, stride);
  });
  Tensor result = torch::stable::new_empty(a.rois, {count});
  T* values = result.mutable_data_ptr<T>();
  for (const BoxTables<T>& box : boxes.all()) {
    double sum = 0;
    for (int64_t b = 0; b < stride; ++b) sum += sums[box.row * stride + b];
    values[box.row] = static_cast<T>(sum * box.gradient_scale);
  }
  return result;
}

template <typename T>
std::vector<Tensor> gradients(const Tensor& grad_losses, const Arguments& a) {
  std::vector<FeatureLevel> levels = checked_levels(a);
  const Criterion criterion = criterion_of(a.criterion);
  const int64_t images = a.inputs[0].size(0);
  STD_TORCH_CHECK(grad_losses.dim() == 1 && grad_losses.size(0) == a.rois.size(0) &&
                      grad_losses.scalar_type() == a.rois.scalar_type(),
                  "grad_losses must have one value per box, in the dtype of rois");
  const Tensor upstream = torch::stable::contiguous(grad_losses);
  std::vector<Tensor> results;
  for (size_t l = 0; l < levels.size(); ++l) {
    results.push_back(torch::stable::empty_like(a.inputs[l]));
    levels[l].gradient = results[l].mutable_data_ptr();
    ask_for_huge_pages(results[l]);
  }
  const Boxes<T> boxes(a, levels, images, upstream.const_data_ptr<T>());
  for_each_block<T>(levels, images, [&](size_t l, int64_t image, int64_t block) {
    block_function<T>(a.inputs[l].scalar_type(), levels[l].channels_last)(levels[l], boxes.of(l, image), image, block,
                                                                          criterion, nullptr, 0);
  });
  return results;
}

bool is_double(const std::vector<Tensor>& inputs) {
  STD_TORCH_CHECK(!inputs.empty(), "inputs must hold at least one level");
  check_floating(inputs[0], "inputs");
  return inputs[0].scalar_type() == ScalarType::Double;
}

Tensor roi_perceptual_losses(std::vector<Tensor> inputs, std::vector<Tensor> targets, Tensor rois,
                             std::optional<Tensor> box_levels, std::vector<double> spatial_scales,
                             std::vector<int64_t> output_size, int64_t sampling_ratio, bool aligned,
                             std::string criterion) {
  const bool wide = is_double(inputs);
  const Arguments arguments{std::move(inputs),      std::move(targets),     rois,    box_levels,
                            std::move(spatial_scales), std::move(output_size), sampling_ratio, aligned,
                            std::move(criterion)};
  return wide ? losses<double>(arguments) : losses<float>(arguments);
}

std::vector<Tensor> roi_perceptual_losses_backward(Tensor grad_losses, std::vector<Tensor> inputs,
                                                   std::vector<Tensor> targets, Tensor rois,
                                                   std::optional<Tensor> box_levels,
                                                   std::vector<double> spatial_scales,
                                                   std::vector<int64_t> output_size, int64_t sampling_ratio,
                                                   bool aligned, std::string criterion) {
  const bool wide = is_double(inputs);
  const Arguments arguments{std::move(inputs),      std::move(targets),     rois,    box_levels,
                            std::move(spatial_scales), std::move(output_size), sampling_ratio, aligned,
                            std::move(criterion)};
  return wide ? gradients<double>(grad_losses, arguments) : gradients<float>(grad_losses, arguments);
}

}  // namespace
}  // namespace lid

STABLE_TORCH_LIBRARY_IMPL(lidnet_fast, CPU, m) {
  m.impl("roi_perceptual_losses", TORCH_BOX(&lid::roi_perceptual_losses));
  m.impl("roi_perceptual_losses_backward", TORCH_BOX(&lid::roi_perceptual_losses_backward));
}
