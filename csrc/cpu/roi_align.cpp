// roi_align on the CPU: weight tables per box, then blocks of channels of one image each, in parallel.
//
// A thread owns every cell of the blocks it works on and takes the boxes in their order, so the result is the same, bit by
// bit, for any number of threads.

#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "roi_tables.h"

namespace lid {
namespace {

template <typename T>
PoolFunctions<T> pool_functions(Storage storage, bool channels_last) {
  return instruction_set() == InstructionSet::baseline ? baseline::pool_functions<T>(storage, channels_last)
                                                       : avx2::pool_functions<T>(storage, channels_last);
}

std::vector<int64_t> pooled_shape(const Pooling& pooling, const std::vector<FeatureLevel>& levels) {
  for (const FeatureLevel& level : levels) {
    STD_TORCH_CHECK(level.channels == levels[0].channels, "levels must have as many channels, got ", level.channels,
                    " and ", levels[0].channels);
  }
  std::vector<int64_t> shape{pooling.rois.size(0), levels[0].channels};
  shape.insert(shape.end(), pooling.output_size.begin(), pooling.output_size.end());
  return shape;
}

template <typename T>
void pool(const Pooling& pooling, const std::vector<FeatureLevel>& levels, int64_t images, Tensor& pooled) {
  const Boxes<T> boxes(pooling, levels, images);
  const Storage storage = storage_of(pooled);
  for_each_block<T>(levels, images, [&](size_t l, int64_t image, int64_t block) {
    pool_functions<T>(storage, levels[l].channels_last)
        .forward(levels[l], boxes.of(l, image), image, block, pooled.mutable_data_ptr());
  });
}

template <typename T>
void spread(const Pooling& pooling, const std::vector<FeatureLevel>& levels, int64_t images, const Tensor& grad_pooled) {
  const Boxes<T> boxes(pooling, levels, images);
  const Storage storage = storage_of(grad_pooled);
  for_each_block<T>(levels, images, [&](size_t l, int64_t image, int64_t block) {
    pool_functions<T>(storage, levels[l].channels_last)
        .backward(levels[l], boxes.of(l, image), image, block, grad_pooled.const_data_ptr());
  });
}

Tensor roi_align(std::vector<Tensor> inputs, Tensor rois, std::optional<Tensor> box_levels,
                 std::vector<double> spatial_scales, std::vector<int64_t> output_size, int64_t sampling_ratio,
                 bool aligned) {
  const bool wide = is_double(inputs);
  const Tensor& first = inputs[0];
  const Pooling pooling{rois, box_levels, std::move(spatial_scales), std::move(output_size), sampling_ratio, aligned};
  check_pooling(pooling, inputs.size(), first.dim() - 2, first.scalar_type());
  std::vector<FeatureLevel> levels;
  for (const Tensor& input : inputs) {
    STD_TORCH_CHECK(input.dim() == first.dim() && input.size(0) == first.size(0) &&
                        input.scalar_type() == first.scalar_type(),
                    "levels must share dimensions, batch size and dtype");
    levels.push_back(feature_level(input.sizes().vec(), !is_planar(input)));
    levels.back().input = input.const_data_ptr();
  }
  Tensor pooled = new_result(pooled_shape(pooling, levels), false, first.scalar_type(), first);
  const auto work = wide ? pool<double> : pool<float>;
  work(pooling, levels, first.size(0), pooled);
  return pooled;
}

// `shapes`: those of the levels, one after the other.
std::vector<Tensor> roi_align_backward(Tensor grad_pooled, Tensor rois, std::optional<Tensor> box_levels,
                                       std::vector<double> spatial_scales, std::vector<int64_t> output_size,
                                       int64_t sampling_ratio, bool aligned, std::vector<int64_t> shapes,
                                       bool channels_last) {
  const bool wide = is_double({grad_pooled});
  const ScalarType dtype = grad_pooled.scalar_type();
  const Pooling pooling{rois, box_levels, std::move(spatial_scales), std::move(output_size), sampling_ratio, aligned};
  const size_t dimensions = pooling.output_size.size() + 2, count = pooling.spatial_scales.size();
  check_pooling(pooling, count, dimensions - 2, dtype);
  Gradients gradients = new_gradients(shapes, std::vector<bool>(count, channels_last), dimensions - 2, dtype, grad_pooled);
  STD_TORCH_CHECK(grad_pooled.sizes().vec() == pooled_shape(pooling, gradients.levels),
                  "grad_pooled must have the bins' shape");
  const auto work = wide ? spread<double> : spread<float>;
  work(pooling, gradients.levels, shapes[0], torch::stable::contiguous(grad_pooled));
  return std::move(gradients.tensors);
}

}  // namespace
}  // namespace lid

STABLE_TORCH_LIBRARY_IMPL(lidnet_fast, CPU, m) {
  m.impl("roi_align", TORCH_BOX(&lid::roi_align));
  m.impl("roi_align_backward", TORCH_BOX(&lid::roi_align_backward));
}
