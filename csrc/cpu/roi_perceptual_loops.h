// The inner loops of roi_perceptual.cpp.
#pragma once

#include "roi_passes.h"

namespace lid {
namespace LID_ISA {
namespace {

template <int64_t kLanes, Criterion kCriterion, typename T>
T sum_of_criterion(const T* pooled, int64_t bins, int64_t lanes) {
  T sums[kLanes] = {};
  for (int64_t b = 0; b < bins; ++b) {
    for (int64_t c = 0; c < kLanes; ++c) sums[c] += criterion_value<kCriterion>(pooled[b * kLanes + c]);
  }
  T total = 0;
  for (int64_t c = 0; c < lanes; ++c) total += sums[c];
  return total;
}

template <Criterion kCriterion, typename T>
void to_derivative(T* pooled, int64_t count, T scale) {
  for (int64_t i = 0; i < count; ++i) pooled[i] = scale * criterion_derivative<kCriterion>(pooled[i]);
}

template <int64_t kLanes, typename T>
T sum_of_criterion(Criterion criterion, const T* pooled, int64_t bins, int64_t lanes) {
  switch (criterion) {
    case Criterion::mse: return sum_of_criterion<kLanes, Criterion::mse>(pooled, bins, lanes);
    case Criterion::l1: return sum_of_criterion<kLanes, Criterion::l1>(pooled, bins, lanes);
    case Criterion::smooth_l1: return sum_of_criterion<kLanes, Criterion::smooth_l1>(pooled, bins, lanes);
    default: return sum_of_criterion<kLanes, Criterion::charbonnier>(pooled, bins, lanes);
  }
}

template <typename T>
void to_derivative(Criterion criterion, T* pooled, int64_t count, T scale) {
  switch (criterion) {
    case Criterion::mse: return to_derivative<Criterion::mse>(pooled, count, scale);
    case Criterion::l1: return to_derivative<Criterion::l1>(pooled, count, scale);
    case Criterion::smooth_l1: return to_derivative<Criterion::smooth_l1>(pooled, count, scale);
    default: return to_derivative<Criterion::charbonnier>(pooled, count, scale);
  }
}

// What the losses pool. S is the type of the features.
template <typename S>
Difference<S> difference(const FeatureLevel& level, int64_t offset) {
  return {{static_cast<const S*>(level.input) + offset}, {static_cast<const S*>(level.target) + offset}};
}

// See LossesFunctions. T is the type of the arithmetic.
template <typename S, typename T, typename Layout>
void losses_forward(const FeatureLevel& level, const ImageBoxes<T>& boxes, int64_t image, int64_t block, Criterion criterion,
                    T* losses, int64_t stride) {
  for_each_box<S, T, Layout>(level, boxes, image, block, [&](const Pass<T, Layout>& pass, const BoxTables<T>& box) {
    pass.pool(box, difference<S>(level, pass.offset));
    pass.layout.for_each_group(box, pass.scratch.pooled, [&](const T* pooled, int64_t bins, int64_t lanes) {
      losses[box.row * stride] += sum_of_criterion<Layout::kLanes>(criterion, pooled, bins, lanes);
    });
  });
}

template <typename S, typename T, typename Layout>
void losses_backward(const FeatureLevel& level, const ImageBoxes<T>& boxes, int64_t image, int64_t block, Criterion criterion,
                     const T* scales) {
  for_each_box<S, T, Layout>(level, boxes, image, block, [&](const Pass<T, Layout>& pass, const BoxTables<T>& box) {
    pass.pool(box, difference<S>(level, pass.offset));
    pass.layout.for_each_group(box, pass.scratch.pooled, [&](T* pooled, int64_t bins, int64_t) {
      to_derivative(criterion, pooled, bins * Layout::kLanes, scales[box.row]);
    });
    pass.spread(box);
  });
}

}  // namespace

template <typename T>
LossesFunctions<T> losses_functions(Storage storage, bool channels_last) {
  return with_storage_of<T, Half, BFloat16>(storage, [&](auto* stored) -> LossesFunctions<T> {
    using S = std::remove_pointer_t<decltype(stored)>;
    if (channels_last) return {losses_forward<S, T, ChannelsLast<T>>, losses_backward<S, T, ChannelsLast<T>>};
    return {losses_forward<S, T, Planar<T>>, losses_backward<S, T, Planar<T>>};
  });
}
template LossesFunctions<float> losses_functions(Storage storage, bool channels_last);
template LossesFunctions<double> losses_functions(Storage storage, bool channels_last);

}  // namespace LID_ISA
}  // namespace lid
