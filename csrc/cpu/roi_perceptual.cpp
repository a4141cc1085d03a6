// roi_perceptual_losses on the CPU: weight tables per box, then blocks of channels of one image each, in parallel.
//
// A thread owns every cell of the blocks it works on and takes the boxes in their order, so the result is the same, bit by
// bit, for any number of threads.

#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "roi_tables.h"

namespace lid {
namespace {

struct Arguments {
  std::vector<Tensor> inputs, targets;
  Pooling pooling;
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
LossesFunctions<T> losses_functions(Storage storage, bool channels_last) {
  return instruction_set() == InstructionSet::baseline ? baseline::losses_functions<T>(storage, channels_last)
                                                       : avx2::losses_functions<T>(storage, channels_last);
}

std::vector<FeatureLevel> checked_levels(const Arguments& a) {
  STD_TORCH_CHECK(a.targets.size() == a.inputs.size(), "inputs and targets must have one entry per level");
  check_pooling(a.pooling, a.inputs.size(), a.inputs[0].dim() - 2, a.inputs[0].scalar_type());
  std::vector<FeatureLevel> levels;
  for (size_t i = 0; i < a.inputs.size(); ++i) {
    const Tensor &first = a.inputs[0], &input = a.inputs[i], &target = a.targets[i];
    STD_TORCH_CHECK(input.dim() == first.dim() && input.size(0) == first.size(0) &&
                        input.scalar_type() == first.scalar_type(),
                    "levels must share dimensions, batch size and dtype");
    STD_TORCH_CHECK(target.sizes().vec() == input.sizes().vec() && target.scalar_type() == input.scalar_type(),
                    "targets must have the shape and dtype of inputs");
    const bool planar = is_planar(input);
    STD_TORCH_CHECK(planar == is_planar(target), "inputs and targets must be contiguous, or both channels_last");
    levels.push_back(feature_level(input.sizes().vec(), !planar));
    levels[i].input = input.const_data_ptr();
    levels[i].target = target.const_data_ptr();
  }
  return levels;
}

// Per row what multiplies a criterion's sum, or with the losses' gradients its derivatives: of a mean over all bins.
template <typename T>
std::vector<T> scales_of(const Boxes<T>& boxes, const std::vector<FeatureLevel>& levels, const T* grad_losses) {
  std::vector<T> scales(boxes.count());
  boxes.for_each([&](const BoxTables<T>& box, size_t level) {
    const T values = static_cast<T>(levels[level].channels * box.bins());
    scales[box.row] = (grad_losses ? grad_losses[box.row] : T(1)) / values;
  });
  return scales;
}

// The losses, and the slopes if they are kept.
template <typename T>
std::tuple<Tensor, Tensor> losses(const Arguments& a, bool with_slopes) {
  const std::vector<FeatureLevel> levels = checked_levels(a);
  const Criterion criterion = criterion_of(a.criterion);
  const int64_t images = a.inputs[0].size(0), count = a.pooling.rois.size(0);
  const Boxes<T> boxes(a.pooling, levels, images);
  int64_t stride = 1, channels = 0;
  for (const FeatureLevel& level : levels) {
    stride = std::max(stride, (level.channels + kPlanarBlock - 1) / kPlanarBlock);
    channels = std::max(channels, level.channels);
  }
  Tensor kept = torch::stable::new_empty(a.pooling.rois, {0});
  if (with_slopes) {
    std::vector<int64_t> shape{count, channels};
    shape.insert(shape.end(), a.pooling.output_size.begin(), a.pooling.output_size.end());
    kept = new_result(shape, false, a.pooling.rois.scalar_type(), a.pooling.rois);
  }
  const Slopes<T*> slopes{with_slopes ? kept.mutable_data_ptr<T>() : nullptr, channels};
  std::vector<T> sums(count * stride);
  for_each_block<T>(levels, images, [&](size_t l, int64_t image, int64_t block) {
    losses_functions<T>(storage_of(a.inputs[l]), levels[l].channels_last)
        .forward(levels[l], boxes.of(l, image), image, block, criterion, sums.data() + block, stride, slopes);
  });
  Tensor result = torch::stable::new_empty(a.pooling.rois, {count});
  T* values = result.mutable_data_ptr<T>();
  const std::vector<T> scales = scales_of<T>(boxes, levels, nullptr);
  for (int64_t k = 0; k < count; ++k) {
    double sum = 0;
    for (int64_t b = 0; b < stride; ++b) sum += sums[k * stride + b];
    values[k] = static_cast<T>(sum * scales[k]);
  }
  return {result, kept};
}

template <typename T>
void gradients(const Tensor& grad_losses, const Tensor& slopes, const Pooling& pooling,
               const std::vector<FeatureLevel>& levels, int64_t images, Storage storage) {
  const Boxes<T> boxes(pooling, levels, images);
  const std::vector<T> scales = scales_of(boxes, levels, grad_losses.const_data_ptr<T>());
  const Slopes<const T*> kept{slopes.const_data_ptr<T>(), slopes.size(1)};
  for_each_block<T>(levels, images, [&](size_t l, int64_t image, int64_t block) {
    losses_functions<T>(storage, levels[l].channels_last)
        .backward(levels[l], boxes.of(l, image), image, block, kept, scales.data());
  });
}

std::tuple<Tensor, Tensor> roi_perceptual_losses(std::vector<Tensor> inputs, std::vector<Tensor> targets, Tensor rois,
                                                 std::optional<Tensor> box_levels, std::vector<double> spatial_scales,
                                                 std::vector<int64_t> output_size, int64_t sampling_ratio,
                                                 bool aligned, std::string criterion, bool with_slopes) {
  const bool wide = is_double(inputs);
  const Arguments arguments{
      std::move(inputs),
      std::move(targets),
      {rois, box_levels, std::move(spatial_scales), std::move(output_size), sampling_ratio, aligned},
      std::move(criterion)};
  return wide ? losses<double>(arguments, with_slopes) : losses<float>(arguments, with_slopes);
}

// `shapes` and `channels_last` are those of the levels, `dtype` that of their gradients.
std::vector<Tensor> roi_perceptual_losses_backward(Tensor grad_losses, Tensor slopes, Tensor rois,
                                                   std::optional<Tensor> box_levels,
                                                   std::vector<double> spatial_scales,
                                                   std::vector<int64_t> output_size, int64_t sampling_ratio,
                                                   bool aligned, std::vector<int64_t> shapes,
                                                   std::vector<bool> channels_last, ScalarType dtype) {
  const Pooling pooling{rois, box_levels, std::move(spatial_scales), std::move(output_size), sampling_ratio, aligned};
  const size_t axes = pooling.output_size.size();
  check_pooling(pooling, channels_last.size(), axes, dtype);
  Gradients result = new_gradients(shapes, channels_last, axes, dtype, rois);
  std::vector<int64_t> kept{rois.size(0), 0};
  for (const FeatureLevel& level : result.levels) kept[1] = std::max(kept[1], level.channels);
  kept.insert(kept.end(), pooling.output_size.begin(), pooling.output_size.end());
  STD_TORCH_CHECK(slopes.sizes().vec() == kept && slopes.scalar_type() == rois.scalar_type(),
                  "slopes must have a value per box, channel and bin, in the dtype of rois");
  STD_TORCH_CHECK(grad_losses.dim() == 1 && grad_losses.size(0) == rois.size(0) &&
                      grad_losses.scalar_type() == rois.scalar_type(),
                  "grad_losses must have one value per box, in the dtype of rois");
  const auto work = dtype == ScalarType::Double ? gradients<double> : gradients<float>;
  work(torch::stable::contiguous(grad_losses), torch::stable::contiguous(slopes), pooling, result.levels, shapes[0],
       storage_of(result.tensors[0]));
  return std::move(result.tensors);
}

}  // namespace
}  // namespace lid

STABLE_TORCH_LIBRARY_IMPL(lidnet_fast, CPU, m) {
  m.impl("roi_perceptual_losses", TORCH_BOX(&lid::roi_perceptual_losses));
  m.impl("roi_perceptual_losses_backward", TORCH_BOX(&lid::roi_perceptual_losses_backward));
}
