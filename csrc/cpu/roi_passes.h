// The order in which boxes are worked on, and what an op has at hand for each of them.
#pragma once

#include "buffer.h"
#include "roi_layouts.h"

namespace lid {
namespace LID_ISA {
namespace {

// The rows of as many boxes as fit, so that they are listed once for all channels of a block.
template <typename T>
class RowLists {
 public:
  RowLists(const ImageBoxes<T>& boxes, int64_t height)
      : boxes_(boxes), height_(height), capacity_(std::max(kRows, boxes.most_rows)), rows_(new Row<T>[capacity_]) {}

  // Makes sure that the box's rows are listed, and returns the first box after it whose rows are not.
  const BoxTables<T>* list_from(const BoxTables<T>* box) {
    if (box == begin_) return end_;
    begin_ = end_ = box;
    const BoxTables<T>* const last = boxes_.boxes + boxes_.count;
    for (Row<T>* row = rows_.get(); end_ != last && row - rows_.get() + count(*end_) <= capacity_; ++end_) {
      row = list(*end_, row);
    }
    return end_;
  }

  const Row<T>* begin() const { return rows_.get(); }

  static int64_t count(const BoxTables<T>& box) { return box.z.bins * box.y.bins * box.z.taps * box.y.taps; }

 private:
  static constexpr int64_t kRows = 16384;

  Row<T>* list(const BoxTables<T>& box, Row<T>* row) const {
    for (int64_t z = 0; z < box.z.bins; ++z) {
      for (int64_t y = 0; y < box.y.bins; ++y) {
        for (int64_t i = 0; i < box.z.taps; ++i) {
          const int32_t slice = box.z.cells[box.z.first[z] + i] * static_cast<int32_t>(height_);
          for (int64_t j = 0; j < box.y.taps; ++j, ++row) {
            row->index = slice + box.y.cells[box.y.first[y] + j];
            row->weight = box.z.weights[z * box.z.taps + i] * box.y.weights[y * box.y.taps + j];
          }
        }
      }
    }
    return row;
  }

  ImageBoxes<T> boxes_;
  int64_t height_, capacity_;
  std::unique_ptr<Row<T>[]> rows_;
  const BoxTables<T>*begin_ = nullptr, *end_ = nullptr;
};

// Sets `count` runs of elements to zero. A run of known length becomes a few stores rather than a call.
template <typename T>
void clear_runs(int64_t count, int64_t length, int64_t stride, T* sums) {
  if (length == kChannelsLastLanes) {
    for (int64_t r = 0; r < count; ++r) std::fill_n(sums + r * stride, kChannelsLastLanes, T(0));
  } else {
    for (int64_t r = 0; r < count; ++r) std::fill_n(sums + r * stride, length, T(0));
  }
}

template <typename S, typename T>
void round_run(const T* sums, int64_t count, S* gradient) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) Vec8<T>::load(sums + i).store(gradient + i);
  for (; i < count; ++i) gradient[i] = static_cast<S>(sums[i]);
}

// What work on a box has at hand: which channels, their memory.
template <typename T, typename Layout>
struct Pass {
  Layout layout;
  int64_t channel, end;  // from which on, and up to which, the block's channels are still to be worked on
  int64_t offset;        // of the first channel's map
  Strides strides;
  Strides sums_strides;
  T* sums;  // of the gradient, null in the forward
  const Scratch<T>& scratch;
  const Row<T>* rows;

  template <typename Source>
  void pool(const BoxTables<T>& box, const Source& source) const {
    layout.pool_box(box.x, rows_of(box), source, strides, scratch);
  }
  void spread(const BoxTables<T>& box) const { layout.spread_box(box.x, rows_of(box), sums_strides, scratch, sums); }

 private:
  Rows<T> rows_of(const BoxTables<T>& box) const { return {rows, box.z.bins * box.y.bins, box.z.taps * box.y.taps}; }
};

// Calls work(pass, box) for the boxes of one image on one block of its channels, in the backward between clearing and
// completing the block's gradient. S is the type of the features, T that of the arithmetic.
template <typename S, typename T, typename Layout, typename Work>
void for_each_box(const FeatureLevel& level, const ImageBoxes<T>& boxes, int64_t image, int64_t block, const Work& work) {
  constexpr int64_t kLanes = Layout::kLanes;
  constexpr bool kPlanar = std::is_same_v<Layout, Planar<T>>;
  // Half-precision gradients are summed in T, in a map of this pass alone, and rounded once.
  constexpr bool kRounded = !std::is_same_v<S, T>;
  const auto strides_of = [&](int64_t cell) { return Strides{level.width * cell, cell}; };
  const int64_t cells = level.depth * level.height * level.width;
  const int64_t first = block * block_channels(!kPlanar);
  const int64_t end = std::min(first + block_channels(!kPlanar), level.channels);
  const Strides strides = strides_of(kPlanar ? 1 : level.channels);
  const Strides sums_strides = kRounded && !kPlanar ? strides_of(kLanes) : strides;
  const bool backward = level.gradient != nullptr;

  const int64_t width = (level.width + 7) / 8 * 8;
  const int64_t bins_x = boxes.count ? boxes.boxes->x.bins : 0;
  const int64_t bins_zy = boxes.count ? boxes.boxes->z.bins * boxes.boxes->y.bins : 0;
  const int64_t lanes_zy = kPlanar ? (bins_zy + kLanes - 1) / kLanes * kLanes : bins_zy * kLanes;
  RowLists<T> lists(boxes, level.height);
  Buffer<T> columns(boxes.most_x * kLanes), pooled(lanes_zy * bins_x + 8 * kLanes);
  Buffer<T> lines(kPlanar ? lanes_zy * (width + 8) : 0);
  Buffer<T> rounded_sums(kRounded && backward ? cells * (kPlanar ? 1 : kLanes) : 0);
  const Scratch<T> scratch{columns.data(), lines.data(), pooled.data(), width + 8};

  for (int64_t channel = first; channel < end; channel += kPlanar ? 1 : kLanes) {
    const int64_t offset = image * level.channels * cells + channel * (kPlanar ? cells : 1);
    // What is contiguous of the map in this pass: a plane, or the channels of a cell.
    const int64_t runs = kPlanar ? 1 : cells, run = kPlanar ? cells : end - channel;
    const Layout layout{kPlanar ? (channel + 1 < end ? cells : 0) : run};
    S* gradient = backward ? static_cast<S*>(level.gradient) + offset : nullptr;
    T* sums = nullptr;
    if (backward) {
      if constexpr (kRounded) {
        sums = rounded_sums.data();
      } else {
        sums = gradient;
      }
      clear_runs(runs, run, sums_strides.cell, sums);
    }

    for (const BoxTables<T>* box = boxes.boxes; box != boxes.boxes + boxes.count;) {
      const BoxTables<T>* const listed = lists.list_from(box);
      for (const Row<T>* row = lists.begin(); box != listed; row += lists.count(*box), ++box) {
        work(Pass<T, Layout>{layout, channel, end, offset, strides, sums_strides, sums, scratch, row}, *box);
      }
    }

    if constexpr (kRounded) {
      for (int64_t r = 0; backward && r < runs; ++r) {
        round_run(sums + r * sums_strides.cell, run, gradient + r * strides.cell);
      }
    }
  }
}

}  // namespace
}  // namespace LID_ISA
}  // namespace lid
