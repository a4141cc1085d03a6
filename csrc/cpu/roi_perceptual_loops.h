// The inner loops of roi_perceptual.cpp.
#pragma once

#include "roi_bins.h"

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
void to_slopes(T* pooled, int64_t count) {
  for (int64_t i = 0; i < count; ++i) pooled[i] = criterion_derivative<kCriterion>(pooled[i]);
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
void to_slopes(Criterion criterion, T* pooled, int64_t count) {
  switch (criterion) {
    case Criterion::mse: return to_slopes<Criterion::mse>(pooled, count);
    case Criterion::l1: return to_slopes<Criterion::l1>(pooled, count);
    case Criterion::smooth_l1: return to_slopes<Criterion::smooth_l1>(pooled, count);
    default: return to_slopes<Criterion::charbonnier>(pooled, count);
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
                    T* losses, int64_t stride, Slopes<T*> slopes) {
  for_each_box<S, T, Layout>(level, boxes, image, block, [&](const Pass<T, Layout>& pass, const BoxTables<T>& box) {
    pass.pool(box, difference<S>(level, pass.offset));
    const auto add = [&](const T* pooled, int64_t bins, int64_t lanes) {
      losses[box.row * stride] += sum_of_criterion<Layout::kLanes>(criterion, pooled, bins, lanes);
    };
    if (!slopes.values) return pass.layout.for_each_group(box, pass.scratch.pooled, add);
    store_bins(pass, box, slopes.channels, slopes.values, [&](T* pooled, int64_t bins, int64_t lanes) {
      add(pooled, bins, lanes);
      to_slopes(criterion, pooled, bins * Layout::kLanes);
    });
  });
}

template <typename S, typename T, typename Layout>
void losses_backward(const FeatureLevel& level, const ImageBoxes<T>& boxes, int64_t image, int64_t block,
                     Slopes<const T*> slopes, const T* scales) {
  for_each_box<S, T, Layout>(level, boxes, image, block, [&](const Pass<T, Layout>& pass, const BoxTables<T>& box) {
    load_bins(pass, box, slopes.channels, slopes.values, [&](T* group, int64_t count) {
      for (int64_t i = 0; i < count; ++i) group[i] *= scales[box.row];
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
