// The inner loops of roi_align.cpp.
#pragma once

#include "roi_passes.h"

namespace lid {
namespace LID_ISA {
namespace {

// Turns [count, kLanes], with room for eight more, into [lanes, count]. Where fewer than eight values make a row, a row is
// stored with some of what comes after it, which overwrites them: the next row, or, within the `room` elements that are the
// caller's to write, what the caller stores next. To store part of a vector is slow.
template <int64_t kLanes, typename S, typename T>
void lanes_to_rows(const T* from, int64_t count, int64_t lanes, S* to, int64_t room) {
  for (int64_t lane = 0; lane < lanes; lane += 8) {
    for (int64_t i = 0; i < count; i += 8) {
      const int64_t start = std::max<int64_t>(std::min(i, count - 8), 0);
      Vec8<T> tile[8];
      LID_UNROLL for (int64_t r = 0; r < 8; ++r) tile[r] = Vec8<T>::load(from + (start + r) * kLanes + lane);
      transpose(tile);
      LID_UNROLL for (int64_t l = 0; l < 8; ++l) {
        const int64_t at = (lane + l) * count + start;
        if (lane + l < lanes) tile[l].store_part(to + at, room - at);
      }
    }
  }
}

// The transpose of `lanes_to_rows`, reading no more than `room` elements; lanes that there aren't become 0.
template <int64_t kLanes, typename S, typename T>
void rows_to_lanes(const S* from, int64_t count, int64_t lanes, int64_t room, T* to) {
  for (int64_t lane = 0; lane < kLanes; lane += 8) {
    for (int64_t i = 0; i < count; i += 8) {
      const int64_t start = std::max<int64_t>(std::min(i, count - 8), 0);
      Vec8<T> tile[8];
      LID_UNROLL for (int64_t l = 0; l < 8; ++l) {
        const int64_t at = (lane + l) * count + start;
        tile[l] = lane + l < lanes ? Vec8<T>::load_part(from + at, room - at) : Vec8<T>::zero();
      }
      transpose(tile);
      LID_UNROLL for (int64_t r = 0; r < 8; ++r) tile[r].store(to + (start + r) * kLanes + lane);
    }
  }
}

// See PoolFunctions. S is the type of the features, T that of the arithmetic.
template <typename S, typename T, typename Layout>
void pool_forward(const FeatureLevel& level, const ImageBoxes<T>& boxes, int64_t image, int64_t block, void* pooled) {
  for_each_box<S, T, Layout>(level, boxes, image, block, [&](const Pass<T, Layout>& pass, const BoxTables<T>& box) {
    pass.pool(box, Map<S>{static_cast<const S*>(level.input) + pass.offset});
    S* values = static_cast<S*>(pooled) + (box.row * level.channels + pass.channel) * box.bins();
    int64_t room = (pass.end - pass.channel) * box.bins();
    pass.layout.for_each_group(box, pass.scratch.pooled, [&](const T* group, int64_t bins, int64_t lanes) {
      lanes_to_rows<Layout::kLanes>(group, bins, lanes, values, room);
      values += bins * lanes;
      room -= bins * lanes;
    });
  });
}

template <typename S, typename T, typename Layout>
void pool_backward(const FeatureLevel& level, const ImageBoxes<T>& boxes, int64_t image, int64_t block,
                   const void* grad_pooled) {
  for_each_box<S, T, Layout>(level, boxes, image, block, [&](const Pass<T, Layout>& pass, const BoxTables<T>& box) {
    const S* values = static_cast<const S*>(grad_pooled) + (box.row * level.channels + pass.channel) * box.bins();
    int64_t room = (pass.end - pass.channel) * box.bins();
    pass.layout.for_each_group(box, pass.scratch.pooled, [&](T* group, int64_t bins, int64_t lanes) {
      rows_to_lanes<Layout::kLanes>(values, bins, lanes, room, group);
      values += bins * lanes;
      room -= bins * lanes;
    });
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
