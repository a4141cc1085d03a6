// What the ops on boxes share outside their inner loops: their arguments checked, the boxes' tables, and the order in which
// blocks are worked on.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <vector>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "roi_block.h"
#include "tensors.h"

namespace lid {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// How boxes are pooled.
struct Pooling {
  Tensor rois;
  std::optional<Tensor> box_levels;
  std::vector<double> spatial_scales;
  std::vector<int64_t> output_size;
  int64_t sampling_ratio;
  bool aligned;
};

// Checks them against `levels` maps of `dtype` with so many axes beside images and channels.
inline void check_pooling(const Pooling& p, size_t levels, int64_t axes, ScalarType dtype) {
  STD_TORCH_CHECK(axes == 2 || axes == 3, "inputs must have 4 or 5 dimensions, got ", axes + 2);
  STD_TORCH_CHECK(levels > 0 && p.spatial_scales.size() == levels, "inputs and spatial_scales must have one entry per level");
  STD_TORCH_CHECK(p.box_levels || levels == 1, "box_levels is needed for more than one level");
  STD_TORCH_CHECK(p.rois.dim() == 2 && p.rois.size(1) == 1 + 2 * axes, "rois must have shape [K, ", 1 + 2 * axes, "]");
  STD_TORCH_CHECK(static_cast<int64_t>(p.output_size.size()) == axes, "output_size must have ", axes, " entries");
  const ScalarType expected = dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(p.rois.scalar_type() == expected, "rois must be float64 for float64 features, else float32");
}

// Whether dimensions have the strides of a dense tensor in this order, innermost first.
inline bool is_dense(const Tensor& tensor, const std::vector<int64_t>& order) {
  if (tensor.numel() == 0) return true;  // whatever its strides say
  int64_t expected = 1;
  for (const int64_t d : order) {
    if (tensor.size(d) != 1 && tensor.stride(d) != expected) return false;
    expected *= tensor.size(d);
  }
  return true;
}

// Whether a map is planar rather than channels_last, which it has to be otherwise.
inline bool is_planar(const Tensor& map) {
  std::vector<int64_t> planar, channels_last{1};
  for (int64_t d = map.dim() - 1; d >= 0; --d) {
    planar.push_back(d);
    if (d != 1) channels_last.push_back(d);
  }
  const bool result = is_dense(map, planar);
  STD_TORCH_CHECK(result || is_dense(map, channels_last), "features must be contiguous or channels_last");
  return result;
}

// Whether the arithmetic is in double.
inline bool is_double(const std::vector<Tensor>& inputs) {
  STD_TORCH_CHECK(!inputs.empty(), "inputs must hold at least one level");
  check_floating(inputs[0], "inputs");
  return inputs[0].scalar_type() == ScalarType::Double;
}

inline FeatureLevel feature_level(const std::vector<int64_t>& shape, bool channels_last) {
  const size_t dimensions = shape.size();
  return {nullptr,  nullptr, nullptr, shape[1], dimensions == 5 ? shape[2] : 1, shape[dimensions - 2],
          shape[dimensions - 1], channels_last};
}

// Gradients to be written, of maps whose shapes are given one after the other, each with images, channels and so many axes.
struct Gradients {
  std::vector<Tensor> tensors;
  std::vector<FeatureLevel> levels;
};

inline Gradients new_gradients(const std::vector<int64_t>& shapes, const std::vector<bool>& channels_last, size_t axes,
                               ScalarType dtype, const Tensor& like) {
  STD_TORCH_CHECK(shapes.size() == channels_last.size() * (axes + 2), "shapes must have ", axes + 2, " numbers per level");
  Gradients result;
  for (size_t l = 0; l < channels_last.size(); ++l) {
    const auto from = shapes.begin() + l * (axes + 2);
    const std::vector<int64_t> shape(from, from + axes + 2);
    STD_TORCH_CHECK(shape[0] == shapes[0], "levels must share the batch size");
    result.tensors.push_back(new_result(shape, channels_last[l], dtype, like));
    result.levels.push_back(feature_level(shape, channels_last[l]));
    result.levels.back().gradient = result.tensors.back().mutable_data_ptr();
  }
  return result;
}

// Everything about the boxes that doesn't depend on features: tables, grouped by level and image.
template <typename T>
class Boxes {
 public:
  Boxes(const Pooling& pooling, const std::vector<FeatureLevel>& levels, int64_t images) : images_(images) {
    const int64_t count = pooling.rois.size(0), width = pooling.rois.size(1), axes = (width - 1) / 2;
    const Tensor rois_tensor = torch::stable::contiguous(pooling.rois);
    const T* rois = rois_tensor.const_data_ptr<T>();
    std::optional<Tensor> levels_tensor;
    if (pooling.box_levels) levels_tensor = torch::stable::contiguous(*pooling.box_levels);
    const int64_t* box_levels = levels_tensor ? levels_tensor->const_data_ptr<int64_t>() : nullptr;

    groups_.assign(levels.size() * images + 1, 0);
    const auto level_of = [&](int64_t k) { return box_levels ? box_levels[k] : 0; };
    const auto group_of = [&](int64_t k) { return level_of(k) * images + static_cast<int64_t>(rois[k * width]); };
    const auto sampling_of = [&](int64_t k, int64_t axis) {  // 0, 1, 2: z, y, x
      const FeatureLevel& level = levels[level_of(k)];
      const int64_t size = axis == 0 ? level.depth : axis == 1 ? level.height : level.width;
      if (axis == 0 && axes == 2) return AxisSampling<T>(T(0), T(1), T(1), true, 1, 1, 1);
      const T* box = rois + k * width + 1 + (2 - axis);  // coordinates come as x, y, z
      return AxisSampling<T>(box[0], box[axes], static_cast<T>(pooling.spatial_scales[level_of(k)]),
                             pooling.aligned, pooling.sampling_ratio, bins(pooling, axis), size);
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

    const int64_t bins_z = bins(pooling, 0), bins_y = bins(pooling, 1), bins_x = bins(pooling, 2);
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

  size_t count() const { return tables_.size(); }

  // Calls work(box, level) for all of them.
  template <typename Work>
  void for_each(const Work& work) const {
    for (size_t g = 0; g + 1 < groups_.size(); ++g) {
      for (int64_t i = groups_[g]; i < groups_[g + 1]; ++i) work(tables_[i], g / images_);
    }
  }

 private:
  static int64_t bins(const Pooling& pooling, int64_t axis) {
    const std::vector<int64_t>& size = pooling.output_size;
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

}  // namespace lid
