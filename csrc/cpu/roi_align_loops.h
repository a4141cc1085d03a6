// The inner loops of roi_align.cpp.
#pragma once

#include "roi_bins.h"

namespace lid {
namespace LID_ISA {
namespace {

// See PoolFunctions. S is the type of the features, T that of the arithmetic.
template <typename S, typename T, typename Layout>
void pool_forward(const FeatureLevel& level, const ImageBoxes<T>& boxes, int64_t image, int64_t block, void* pooled) {
  for_each_box<S, T, Layout>(level, boxes, image, block, [&](const Pass<T, Layout>& pass, const BoxTables<T>& box) {
    pass.pool(box, Map<S>{static_cast<const S*>(level.input) + pass.offset});
    store_bins(pass, box, level.channels, static_cast<S*>(pooled), [](T*, int64_t, int64_t) {});
  });
}

template <typename S, typename T, typename Layout>
void pool_backward(const FeatureLevel& level, const ImageBoxes<T>& boxes, int64_t image, int64_t block,
                   const void* grad_pooled) {
  for_each_box<S, T, Layout>(level, boxes, image, block, [&](const Pass<T, Layout>& pass, const BoxTables<T>& box) {
    load_bins(pass, box, level.channels, static_cast<const S*>(grad_pooled), [](T*, int64_t) {});
    pass.spread(box);
  });
}

}  // namespace

template <typename T>
PoolFunctions<T> pool_functions(Storage storage, bool channels_last) {
  return with_storage_of<T, Half, BFloat16>(storage, [&](auto* stored) -> PoolFunctions<T> {
    using S = std::remove_pointer_t<decltype(stored)>;
    if (channels_last) return {pool_forward<S, T, ChannelsLast<T>>, pool_backward<S, T, ChannelsLast<T>>};
    return {pool_forward<S, T, Planar<T>>, pool_backward<S, T, Planar<T>>};
  });
}
template PoolFunctions<float> pool_functions(Storage storage, bool channels_last);
template PoolFunctions<double> pool_functions(Storage storage, bool channels_last);

}  // namespace LID_ISA
}  // namespace lid
