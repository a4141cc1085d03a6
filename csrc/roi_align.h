// RoIAlign as weight tables, one per box and axis.
//
// RoIAlign (He et al., Mask R-CNN, arXiv:1703.06870, section 3; torchvision's rules) is linear and separable: the pooled box
// is the feature map multiplied, along each axis, by a small matrix [bins, cells]. The matrix is banded, so a table keeps
// the cells that the box reads and, per bin, one run of weights over them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

namespace lid {

// Where a box's samples lie along one axis: sample s of bin b at start + b * bin + (s + 1/2) * bin / samples, in cells.
template <typename T>
struct AxisSampling {
  T start;
  T bin;
  int64_t samples;  // per bin
  int64_t bins;
  int64_t size;  // cells of the map

  AxisSampling(T low, T high, T scale, bool aligned, int64_t sampling_ratio, int64_t bins, int64_t size)
      : bins(bins), size(size) {
    const T shift = aligned ? T(0.5) : T(0);
    start = low * scale - shift;
    T side = high * scale - shift - start;
    if (!aligned) side = std::max(side, T(1));
    bin = side / static_cast<T>(bins);
    constexpr T kMany = T(int64_t(1) << 40);
    samples = sampling_ratio > 0 ? sampling_ratio : static_cast<int64_t>(std::min(std::ceil(bin), kMany));
  }

  // Bounds on the table: a bin reads two cells per sample, and no cell twice.
  int64_t most_taps() const { return std::min(samples < size ? 2 * samples : size, cells_of(bin)); }
  int64_t most_cells() const { return std::min(bins * most_taps(), cells_of(bin * static_cast<T>(bins))); }

 private:
  int64_t cells_of(T side) const {
    return side < static_cast<T>(size) ? std::min(static_cast<int64_t>(side) + 3, size) : size;
  }
};

// Bin b is the sum over t of weights[b * taps + t] times cell cells[first[b] + t]. Cells ascend, each is listed once. All bins
// have as many taps as the one that needs most, with weights of 0.
template <typename T>
struct AxisTable {
  const int32_t* cells;
  int64_t cell_count;
  const int32_t* first;
  const T* weights;
  int64_t bins;
  int64_t taps;
};

// Fills one table; `cells` and `weights` hold as many elements as `sampling` bounds, `first` one per bin.
template <typename T>
AxisTable<T> fill_axis_table(const AxisSampling<T>& sampling, int32_t* cells, int32_t* first, T* weights) {
  const T size = static_cast<T>(sampling.size), samples = static_cast<T>(sampling.samples);
  const int64_t last = sampling.size - 1, most_taps = sampling.most_taps();
  int64_t cell_count = 0, taps = 0;

  for (int64_t b = 0; b < sampling.bins; ++b) {
    const T edge = sampling.start + static_cast<T>(b) * sampling.bin;
    int64_t count = 0;
    first[b] = 0;

    // Samples ascend, so a cell is the last of the list, the one before it, or new.
    const auto add = [&](int64_t cell, T weight) {
      int64_t index = cell_count;
      while (index > 0 && cells[index - 1] > cell) --index;
      if (index > 0 && cells[index - 1] == cell) {
        --index;
      } else {
        cells[cell_count++] = static_cast<int32_t>(cell);
      }
      if (count == 0) first[b] = static_cast<int32_t>(index);
      for (; count <= index - first[b]; ++count) weights[b * most_taps + count] = T(0);
      weights[b * most_taps + index - first[b]] += weight / samples;
    };

    // Far outside the map there can be very many samples: start and stop a little before and after those that count.
    int64_t first_sample = 0, end_sample = sampling.samples;
    if (sampling.bin > T(0)) {
      const T step = sampling.bin / samples;
      const auto clamped = [&](T s) { return s > T(0) ? static_cast<int64_t>(std::min(s, samples)) : int64_t(0); };
      first_sample = clamped((T(-1) - edge) / step - T(2));
      end_sample = clamped((size - edge) / step + T(2));
    }
    for (int64_t s = first_sample; s < end_sample; ++s) {
      const T position = edge + (static_cast<T>(s) + T(0.5)) * sampling.bin / samples;
      if (!(position >= T(-1) && position <= size)) continue;
      const T inside = std::max(position, T(0));
      const int64_t low = std::min(static_cast<int64_t>(inside), last);
      const T fraction = low == last ? T(0) : inside - static_cast<T>(low);
      add(low, T(1) - fraction);
      if (fraction > T(0)) add(low + 1, fraction);
    }
    std::fill(weights + b * most_taps + count, weights + (b + 1) * most_taps, T(0));
    taps = std::max(taps, count);
  }

  // Close the gaps between bins; near the end of the list the taps start earlier, so as not to leave it.
  for (int64_t b = 0; b < sampling.bins; ++b) {
    const int64_t start = std::min<int64_t>(first[b], cell_count - taps), shift = first[b] - start;
    const T* from = weights + b * most_taps;
    T* to = weights + b * taps;
    if (shift == 0) {
      std::copy(from, from + taps, to);
    } else {
      std::copy_backward(from, from + taps - shift, to + taps);
      std::fill(to, to + shift, T(0));
    }
    first[b] = static_cast<int32_t>(start);
  }
  return {cells, cell_count, first, weights, sampling.bins, taps};
}

}  // namespace lid
