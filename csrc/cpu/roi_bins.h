// Bins of boxes in memory, [boxes, channels, bins], from and to the order in which a layout pools them.
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

// Calls work(group, bins, lanes) for what the pass pooled of the box, and stores it among the bins of maps with so many
// channels.
template <typename S, typename T, typename Layout, typename Work>
void store_bins(const Pass<T, Layout>& pass, const BoxTables<T>& box, int64_t channels, S* bins, const Work& work) {
  S* values = bins + (box.row * channels + pass.channel) * box.bins();
  int64_t room = (pass.end - pass.channel) * box.bins();
  pass.layout.for_each_group(box, pass.scratch.pooled, [&](T* group, int64_t count, int64_t lanes) {
    work(group, count, lanes);
    lanes_to_rows<Layout::kLanes>(group, count, lanes, values, room);
    values += count * lanes;
    room -= count * lanes;
  });
}

// Loads what `store_bins` stores, and calls work(group, number of its elements).
template <typename S, typename T, typename Layout, typename Work>
void load_bins(const Pass<T, Layout>& pass, const BoxTables<T>& box, int64_t channels, const S* bins, const Work& work) {
  const S* values = bins + (box.row * channels + pass.channel) * box.bins();
  int64_t room = (pass.end - pass.channel) * box.bins();
  pass.layout.for_each_group(box, pass.scratch.pooled, [&](T* group, int64_t count, int64_t lanes) {
    rows_to_lanes<Layout::kLanes>(values, count, lanes, room, group);
    work(group, count * Layout::kLanes);
    values += count * lanes;
    room -= count * lanes;
  });
}

}  // namespace
}  // namespace LID_ISA
}  // namespace lid
