// RoIAlign as weight tables, one per box and axis, and the criteria on pooled differences.
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

enum class Criterion { mse, l1, smooth_l1, charbonnier };

constexpr double kCharbonnierEps = 1e-3;

template <Criterion kCriterion, typename T>
inline T criterion_value(T d) {
  switch (kCriterion) {
    case Criterion::mse: return d * d;
    case Criterion::l1: return std::abs(d);
    case Criterion::smooth_l1: return std::abs(d) < T(1) ? T(0.5) * d * d : std::abs(d) - T(0.5);
    case Criterion::charbonnier: return std::sqrt(d * d + T(kCharbonnierEps * kCharbonnierEps));
  }
}

template <Criterion kCriterion, typename T>
inline T criterion_derivative(T d) {
  switch (kCriterion) {
    case Criterion::mse: return T(2) * d;
    case Criterion::l1: return d > T(0) ? T(1) : d < T(0) ? T(-1) : d;
    case Criterion::smooth_l1: return d > T(1) ? T(1) : d < T(-1) ? T(-1) : d;
    case Criterion::charbonnier: return d / std::sqrt(d * d + T(kCharbonnierEps * kCharbonnierEps));
  }
}

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
  int64_t most_cells() const { return std::min(most_weights(), cells_of(bin * static_cast<T>(bins))); }
  int64_t most_weights() const { return bins * std::min(samples < size ? 2 * samples : size, cells_of(bin)); }

 private:
  int64_t cells_of(T side) const {
    return side < static_cast<T>(size) ? std::min(static_cast<int64_t>(side) + 3, size) : size;
  }
};

struct BinRun {
  int32_t first;    // index into the table's cells
  int32_t count;    // of cells in a row
  int32_t weights;  // index of the first weight
};

// Bin b reads cells[first .. first + count) of its run with as many weights. Cells ascend, each is listed once.
template <typename T>
struct AxisTable {
  const int32_t* cells;
  int64_t cell_count;
  const BinRun* runs;
  int64_t bins;
  const T* weights;
};

// Fills one table; `cells` and `weights` hold as many elements as `sampling` bounds, `runs` one per bin.
template <typename T>
AxisTable<T> fill_axis_table(const AxisSampling<T>& sampling, int32_t* cells, BinRun* runs, T* weights) {
  const T size = static_cast<T>(sampling.size), count = static_cast<T>(sampling.samples);
  const int64_t last = sampling.size - 1;
  int64_t cell_count = 0;
  int32_t weight_count = 0;

  for (int64_t b = 0; b < sampling.bins; ++b) {
    BinRun& run = runs[b];
    run = {0, 0, weight_count};
    const T edge = sampling.start + static_cast<T>(b) * sampling.bin;

    // Samples ascend, so a cell is the last of the list, the one before it, or new.
    const auto add = [&](int64_t cell, T weight) {
      int64_t index = cell_count;
      while (index > 0 && cells[index - 1] > cell) --index;
      if (index > 0 && cells[index - 1] == cell) {
        --index;
      } else {
        cells[cell_count++] = static_cast<int32_t>(cell);
      }
      if (run.count == 0) run.first = static_cast<int32_t>(index);
      const int64_t offset = index - run.first;
      for (; run.count <= offset; ++run.count) weights[weight_count++] = T(0);
      weights[run.weights + offset] += weight / count;
    };

    // Far outside the map there can be very many samples: start and stop a little before and after those that count.
    int64_t first_sample = 0, last_sample = sampling.samples;
    if (sampling.bin > T(0)) {
      const T step = sampling.bin / count;
      const auto clamped = [&](T s) { return s > T(0) ? static_cast<int64_t>(std::min(s, count)) : int64_t(0); };
      first_sample = clamped((T(-1) - edge) / step - T(2));
      last_sample = clamped((size - edge) / step + T(2));
    }
    for (int64_t s = first_sample; s < last_sample; ++s) {
      const T position = edge + (static_cast<T>(s) + T(0.5)) * sampling.bin / count;
      if (!(position >= T(-1) && position <= size)) continue;
      const T inside = std::max(position, T(0));
      const int64_t low = std::min(static_cast<int64_t>(inside), last);
      const T fraction = low == last ? T(0) : inside - static_cast<T>(low);
      add(low, T(1) - fraction);
      if (fraction > T(0)) add(low + 1, fraction);
    }
  }
  return {cells, cell_count, runs, sampling.bins, weights};
}

}  // namespace lid
