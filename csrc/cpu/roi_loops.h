// The inner loops of roi_align.cpp and roi_perceptual.cpp. Included once per instruction set, with LID_ISA naming its
// namespace. The headers it needs come before, from isa_headers.h: what they define inline must not be compiled for one
// instruction set only.

namespace lid {
namespace LID_ISA {
namespace {

using c10::BFloat16;
using c10::Half;

#include "vector.h"

#include "roi_rows.h"

// Multiplies along the leading axis by kTaps taps of a box's matrix, from the `tap`-th on: [cells, kLanes] -> [bins, kLanes].
template <int kTaps, int64_t kLanes, typename T>
inline void pool_taps(const AxisTable<T>& axis, int64_t tap, const T* source, T* destination) {
  for (int64_t b = 0; b < axis.bins; ++b) {
    const T* in = source + (axis.first[b] + tap) * kLanes;
    const T* weights = axis.weights + b * axis.taps + tap;
    T* out = destination + b * kLanes;
    for (int64_t i = 0; i < kLanes; i += 8) {
      Vec8<T> sum = tap ? Vec8<T>::load(out + i) : Vec8<T>::zero();
      LID_UNROLL for (int t = 0; t < kTaps; ++t) sum = sum + weights[t] * Vec8<T>::load(in + t * kLanes + i);
      sum.store(out + i);
    }
  }
}

// The transpose of `pool_taps`, [bins, kLanes] -> [cells, kLanes]; the cells have to be zero before the first taps.
template <int kTaps, int64_t kLanes, typename T>
inline void spread_taps(const AxisTable<T>& axis, int64_t tap, const T* source, T* destination) {
  for (int64_t b = 0; b < axis.bins; ++b) {
    const T* in = source + b * kLanes;
    const T* weights = axis.weights + b * axis.taps + tap;
    T* out = destination + (axis.first[b] + tap) * kLanes;
    for (int64_t i = 0; i < kLanes; i += 8) {
      const Vec8<T> value = Vec8<T>::load(in + i);
      LID_UNROLL for (int t = 0; t < kTaps; ++t) {
        T* at = out + t * kLanes + i;
        (Vec8<T>::load(at) + weights[t] * value).store(at);
      }
    }
  }
}

template <int64_t kLanes, typename T>
inline void pool(const AxisTable<T>& axis, const T* source, T* destination) {
  if (axis.taps == 0) std::fill_n(destination, axis.bins * kLanes, T(0));
  for (int64_t tap = 0; tap < axis.taps; tap += 4) {
    switch (axis.taps - tap) {
      case 1: pool_taps<1, kLanes>(axis, tap, source, destination); break;
      case 2: pool_taps<2, kLanes>(axis, tap, source, destination); break;
      case 3: pool_taps<3, kLanes>(axis, tap, source, destination); break;
      default: pool_taps<4, kLanes>(axis, tap, source, destination);
    }
  }
}

template <int64_t kLanes, typename T>
inline void spread(const AxisTable<T>& axis, const T* source, T* destination) {
  std::fill_n(destination, axis.cell_count * kLanes, T(0));
  for (int64_t tap = 0; tap < axis.taps; tap += 4) {
    switch (axis.taps - tap) {
      case 1: spread_taps<1, kLanes>(axis, tap, source, destination); break;
      case 2: spread_taps<2, kLanes>(axis, tap, source, destination); break;
      case 3: spread_taps<3, kLanes>(axis, tap, source, destination); break;
      default: spread_taps<4, kLanes>(axis, tap, source, destination);
    }
  }
}

// Zeroed scratch memory on whole lines of the cache.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t count) : lines_(new Line[count * sizeof(T) / sizeof(Line) + 1]()) {}
  T* data() const { return reinterpret_cast<T*>(lines_.get()); }

 private:
  struct alignas(64) Line {
    char bytes[64];
  };
  std::unique_ptr<Line[]> lines_;
};

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

// Scratch memory of a block.
template <typename T>
struct Scratch {
  T* columns;  // [cells of x, lanes]
  T* lines;    // [bins of z and y, line_stride], of a planar map
  T* pooled;   // a box's bins, in the layout's order, and room for 8 x lanes more
  int64_t line_stride;
};

// A map whose channels come last, worked on by kLanes channels at a time; `channels` of them exist.
template <typename T>
struct ChannelsLast {
  static constexpr int64_t kLanes = kChannelsLastLanes;
  int64_t channels;

  // pooled: [bins of z and y, bins of x, lanes]
  template <typename Source>
  void pool_box(const AxisTable<T>& x, const Rows<T>& rows, const Source& source, Strides strides,
                const Scratch<T>& scratch) const {
    for (int64_t b = 0; b < rows.bins; ++b) {
      for (int64_t i = 0; i < x.cell_count; ++i) {
        pool_rows(source.at(x.cells[i] * strides.cell), rows.of_bin(b), strides.row, after(b, rows), channels,
                  scratch.columns + i * kLanes, 0);
      }
      pool<kLanes>(x, scratch.columns, scratch.pooled + b * x.bins * kLanes);
    }
  }

  void spread_box(const AxisTable<T>& x, const Rows<T>& rows, Strides strides, const Scratch<T>& scratch, T* sums) const {
    for (int64_t b = 0; b < rows.bins; ++b) {
      spread<kLanes>(x, scratch.pooled + b * x.bins * kLanes, scratch.columns);
      for (int64_t i = 0; i < x.cell_count; ++i) {
        spread_rows(scratch.columns + i * kLanes, 0, rows.of_bin(b), strides.row, channels,
                    sums + x.cells[i] * strides.cell);
      }
    }
  }

  // Calls work(pooled, bins, lanes) for the one group of bins there is.
  template <typename Work>
  void for_each_group(const BoxTables<T>& box, T* pooled, const Work& work) const {
    work(pooled, box.bins(), channels);
  }

 private:
  // Ahead of a bin's rows come the next bin's.
  static Ahead after(int64_t bin, const Rows<T>& rows) { return {bin + 1 < rows.bins ? rows.taps : 0, 0}; }
};

// The map of one channel. Along x the lanes are bins of z and y, eight at a time: their rows are turned, [8, cells] -> [cells, 8].
template <typename T>
struct Planar {
  static constexpr int64_t kLanes = 8;
  int64_t ahead;  // elements from this channel's map to the next that will be read

  // pooled: [bins of z and y / lanes, bins of x, lanes]
  template <typename Source>
  void pool_box(const AxisTable<T>& x, const Rows<T>& rows, const Source& source, Strides strides,
                const Scratch<T>& scratch) const {
    const Window window(x, strides.row);
    pool_rows(source.at(window.start), rows, strides.row, {0, ahead}, window.length, scratch.lines, scratch.line_stride);
    for (int64_t b = 0; b < rows.bins; b += kLanes) {
      lines_to_columns(x, window, scratch.lines + b * scratch.line_stride, scratch.line_stride, scratch.columns);
      pool<kLanes>(x, scratch.columns, scratch.pooled + b * x.bins);
    }
  }

  void spread_box(const AxisTable<T>& x, const Rows<T>& rows, Strides strides, const Scratch<T>& scratch, T* sums) const {
    const Window window(x, strides.row);
    for (int64_t b = 0; b < rows.bins; b += kLanes) {
      spread<kLanes>(x, scratch.pooled + b * x.bins, scratch.columns);
      columns_to_lines(x, window, scratch.columns, scratch.lines + b * scratch.line_stride, scratch.line_stride);
    }
    spread_rows(scratch.lines, scratch.line_stride, rows, strides.row, window.length, sums + window.start);
  }

  // Calls work(pooled, bins of x, bins of z and y) for every eight bins of z and y.
  template <typename Work>
  void for_each_group(const BoxTables<T>& box, T* pooled, const Work& work) const {
    const int64_t bins = box.z.bins * box.y.bins;
    for (int64_t b = 0; b < bins; b += kLanes) work(pooled + b * box.x.bins, box.x.bins, std::min(kLanes, bins - b));
  }

 private:
  // Of a row, the cells from the first to the last that the box reads, and others to fill whole vectors if the row has them.
  struct Window {
    int64_t start = 0, length = 0;

    Window(const AxisTable<T>& x, int64_t width) {
      if (x.cell_count == 0) return;
      const int64_t whole = (x.cells[x.cell_count - 1] - x.cells[0] + kLanes) / kLanes * kLanes;
      start = std::max<int64_t>(std::min<int64_t>(x.cells[0], width - whole), 0);
      length = std::min(whole, width - start);
    }
  };

  // Whether the box reads the eight cells from `cell` on, the first of which is the i-th of its cells.
  static bool reads_eight(const AxisTable<T>& x, int64_t i, int64_t cell) {
    return i + kLanes <= x.cell_count && x.cells[i] == cell && x.cells[i + kLanes - 1] == cell + kLanes - 1;
  }

  static void lines_to_columns(const AxisTable<T>& x, Window window, const T* lines, int64_t line_stride, T* columns) {
    for (int64_t at = 0, i = 0; i < x.cell_count; at += kLanes) {
      const int64_t cell = window.start + at;
      if (x.cells[i] >= cell + kLanes) continue;
      Vec8<T> tile[kLanes];
      LID_UNROLL for (int64_t l = 0; l < kLanes; ++l) tile[l] = Vec8<T>::load(lines + l * line_stride + at);
      transpose(tile);
      if (reads_eight(x, i, cell)) {
        LID_UNROLL for (int64_t j = 0; j < kLanes; ++j) tile[j].store(columns + (i + j) * kLanes);
        i += kLanes;
      } else {
        LID_UNROLL for (int64_t j = 0; j < kLanes; ++j) {
          if (i < x.cell_count && x.cells[i] == cell + j) tile[j].store(columns + i++ * kLanes);
        }
      }
    }
  }

  static void columns_to_lines(const AxisTable<T>& x, Window window, const T* columns, T* lines, int64_t line_stride) {
    for (int64_t at = 0, i = 0; at < window.length; at += kLanes) {
      const int64_t cell = window.start + at;
      Vec8<T> tile[kLanes];
      if (reads_eight(x, i, cell)) {
        LID_UNROLL for (int64_t j = 0; j < kLanes; ++j) tile[j] = Vec8<T>::load(columns + (i + j) * kLanes);
        i += kLanes;
      } else {
        LID_UNROLL for (int64_t j = 0; j < kLanes; ++j) {
          const bool read = i < x.cell_count && x.cells[i] == cell + j;
          tile[j] = read ? Vec8<T>::load(columns + i * kLanes) : Vec8<T>::zero();
          i += read;
        }
      }
      transpose(tile);
      LID_UNROLL for (int64_t l = 0; l < kLanes; ++l) tile[l].store(lines + l * line_stride + at);
    }
  }
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
  const Buffer<T> columns(boxes.most_x * kLanes), pooled(lanes_zy * bins_x + 8 * kLanes);
  const Buffer<T> lines(kPlanar ? lanes_zy * (width + 8) : 0);
  const Buffer<T> rounded_sums(kRounded && backward ? cells * (kPlanar ? 1 : kLanes) : 0);
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

#include "roi_align_loops.h"

#include "roi_perceptual_loops.h"

}  // namespace

LossesFunction<float> float_losses(Storage storage, bool channels_last) {
  switch (storage) {
    case Storage::float32: return losses_of<float, float>(channels_last);
    case Storage::float16: return losses_of<Half, float>(channels_last);
    default: return losses_of<BFloat16, float>(channels_last);
  }
}

LossesFunction<double> double_losses(bool channels_last) { return losses_of<double, double>(channels_last); }

PoolFunction<float> float_pool(Storage storage, bool channels_last) {
  switch (storage) {
    case Storage::float32: return pool_of<float, float>(channels_last);
    case Storage::float16: return pool_of<Half, float>(channels_last);
    default: return pool_of<BFloat16, float>(channels_last);
  }
}

PoolFunction<double> double_pool(bool channels_last) { return pool_of<double, double>(channels_last); }

}  // namespace LID_ISA
}  // namespace lid
