// A box's pooling along x, for maps whose channels come last and for planar ones, and the transpose.
#pragma once

#include "roi_rows.h"

namespace lid {
namespace LID_ISA {
namespace {

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

}  // namespace
}  // namespace LID_ISA
}  // namespace lid
