// A box's pooling along z and y: bins as weighted sums of rows of the map, and the transpose.
// The maps are read here and nowhere else, whole vectors at a time; what comes next is fetched ahead, because boxes jump
// about more than a processor foresees.
#pragma once

#include "vector.h"

namespace lid {
namespace LID_ISA {
namespace {

// One row of cells that a bin of z and y reads: which of the map's rows, and its weight.
template <typename T>
struct Row {
  int32_t index;
  T weight;
};

// Elements from one row of the map to the next, and from one cell to the next.
struct Strides {
  int64_t row, cell;
};

// [bins of z and y, taps of z and y]: the rows of a box.
template <typename T>
struct Rows {
  const Row<T>* rows;
  int64_t bins, taps;

  Rows of_bin(int64_t bin) const { return {rows + bin * taps, 1, taps}; }
};

// Vectors of eight elements that a line of the cache holds.
template <typename T>
constexpr int kVectorsOfLine = std::max<int>(64 / (8 * sizeof(T)), 1);

// What to fetch into the cache while a row is worked on: of the row that comes so many later, the place so many elements
// further on.
struct Ahead {
  int64_t rows, elements;
};

// What is pooled: a map, ...
template <typename S>
struct Map {
  using Storage = S;
  const S* cells;

  Map at(int64_t offset) const { return {cells + offset}; }
  template <typename T>
  inline Vec8<T> load(int64_t i) const { return Vec8<T>::load(cells + i); }
  template <typename T>
  inline T value(int64_t i) const { return static_cast<T>(cells[i]); }
  inline void prefetch(int64_t i) const { __builtin_prefetch(cells + i, 0, 2); }
};

// ... or the difference of two.
template <typename S>
struct Difference {
  using Storage = S;
  Map<S> input, target;

  Difference at(int64_t offset) const { return {input.at(offset), target.at(offset)}; }
  template <typename T>
  inline Vec8<T> load(int64_t i) const { return input.template load<T>(i) - target.template load<T>(i); }
  template <typename T>
  inline T value(int64_t i) const { return input.template value<T>(i) - target.template value<T>(i); }
  inline void prefetch(int64_t i) const {
    input.prefetch(i);
    target.prefetch(i);
  }
};

// lines[bin, i] = the sum over the bin's rows of weight * source, at the row's i-th element
template <int kVectors, typename Source, typename T>
inline void pool_vectors(const Source& source, const Rows<T>& rows, int64_t row_stride, Ahead ahead, T* lines,
                         int64_t line_stride) {
  const Row<T>* row = rows.rows;
  for (int64_t b = 0; b < rows.bins; ++b) {
    Vec8<T> sums[kVectors];
    LID_UNROLL for (int v = 0; v < kVectors; ++v) sums[v] = Vec8<T>::zero();
    for (int64_t t = 0; t < rows.taps; ++t, ++row) {
      const int64_t at = row->index * row_stride, next = row[ahead.rows].index * row_stride + ahead.elements;
      LID_UNROLL for (int v = 0; v < kVectors; v += kVectorsOfLine<typename Source::Storage>) {
        source.prefetch(next + v * 8);
      }
      LID_UNROLL for (int v = 0; v < kVectors; ++v) {
        sums[v] = sums[v] + row->weight * source.template load<T>(at + v * 8);
      }
    }
    LID_UNROLL for (int v = 0; v < kVectors; ++v) sums[v].store(lines + b * line_stride + v * 8);
  }
}

template <typename Source, typename T>
void pool_rows(const Source& source, const Rows<T>& rows, int64_t row_stride, Ahead ahead, int64_t length, T* lines,
               int64_t line_stride) {
  int64_t i = 0;
  for (; i + 32 <= length; i += 32) pool_vectors<4>(source.at(i), rows, row_stride, ahead, lines + i, line_stride);
  for (; i + 16 <= length; i += 16) pool_vectors<2>(source.at(i), rows, row_stride, ahead, lines + i, line_stride);
  for (; i + 8 <= length; i += 8) pool_vectors<1>(source.at(i), rows, row_stride, ahead, lines + i, line_stride);
  for (; i < length; ++i) {
    for (int64_t b = 0; b < rows.bins; ++b) {
      T sum = 0;
      for (int64_t t = 0; t < rows.taps; ++t) {
        const Row<T>& row = rows.rows[b * rows.taps + t];
        sum += row.weight * source.template value<T>(row.index * row_stride + i);
      }
      lines[b * line_stride + i] = sum;
    }
  }
}

// The transpose of `pool_rows`: sums at the row's i-th element += weight * lines[bin, i], for every row of every bin
template <int kVectors, typename T>
inline void spread_vectors(const T* lines, int64_t line_stride, const Rows<T>& rows, int64_t row_stride, T* sums) {
  const Row<T>* row = rows.rows;
  for (int64_t b = 0; b < rows.bins; ++b) {
    Vec8<T> values[kVectors];
    LID_UNROLL for (int v = 0; v < kVectors; ++v) values[v] = Vec8<T>::load(lines + b * line_stride + v * 8);
    for (int64_t t = 0; t < rows.taps; ++t, ++row) {
      T* at = sums + row->index * row_stride;
      LID_UNROLL for (int v = 0; v < kVectors; ++v) {
        (Vec8<T>::load(at + v * 8) + row->weight * values[v]).store(at + v * 8);
      }
    }
  }
}

template <typename T>
void spread_rows(const T* lines, int64_t line_stride, const Rows<T>& rows, int64_t row_stride, int64_t length, T* sums) {
  int64_t i = 0;
  for (; i + 32 <= length; i += 32) spread_vectors<4>(lines + i, line_stride, rows, row_stride, sums + i);
  for (; i + 16 <= length; i += 16) spread_vectors<2>(lines + i, line_stride, rows, row_stride, sums + i);
  for (; i + 8 <= length; i += 8) spread_vectors<1>(lines + i, line_stride, rows, row_stride, sums + i);
  for (; i < length; ++i) {
    for (int64_t r = 0; r < rows.bins * rows.taps; ++r) {
      sums[rows.rows[r].index * row_stride + i] += rows.rows[r].weight * lines[r / rows.taps * line_stride + i];
    }
  }
}

}  // namespace
}  // namespace LID_ISA
}  // namespace lid
