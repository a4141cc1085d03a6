// The inner loops of multi_loss.cpp.
#pragma once

#include "multi_loss_volume.h"

namespace lid {
namespace LID_ISA {
namespace {

// Strips [begin, end) of a plane. What they need of the rows above is worked out again, without being counted.
template <typename S, typename T>
class Sweep {
 public:
  Sweep(const Plane<T>& plane, int64_t begin)
      : plane_(plane),
        begin_(begin),
        width_(plane.width),
        row_stride_(padded_width(plane.width)),
        similarity_(plane, plane.similarity && plane.gradient_count > 0),
        edge_(plane.width),
        by_similarity_(plane.similarity && plane.gradient_count ? kStrip<T> * row_stride_ : 0),
        difference_(width_),
        weights_(width_),
        by_edge_(width_),
        by_x_(width_),
        by_y_(width_),
        repeated_{PaddedRow<T>(width_), PaddedRow<T>(width_), PaddedRow<T>(width_)} {}

  void run(int64_t end, double* sums) {
    const bool back = plane_.gradient_count > 0;
    // A pixel's gradient needs the windows of the ten rows above and the edges of the two rows above.
    const int64_t windows_from = back ? std::max<int64_t>(begin_ - (kHalo - 1) / kStrip<T> - 1, 0) : begin_;
    std::vector<double> uncounted(kSums);
    if (plane_.similarity) {
      for (int64_t k = windows_from; k < begin_; ++k) windows(k, k == windows_from, uncounted.data());
    }
    if (plane_.edge) start_edges(begin_ * kStrip<T>);
    if (plane_.tv) start_variation(begin_ * kStrip<T>);
    if (!plane_.boxes) stage_weights(plane_, 0, 0, weights_.data());
    for (int64_t k = begin_; k < end; ++k) {
      double* of_strip = sums + (k - begin_) * kSums;
      if (plane_.similarity) windows(k, k == windows_from, of_strip);
      for (int64_t row = k * kStrip<T>; row < std::min((k + 1) * kStrip<T>, plane_.height); ++row) {
        sum_row(row, of_strip);
        for (int64_t g = 0; g < plane_.gradient_count; ++g) write(plane_.gradients[g], row);
      }
    }
  }

 private:
  const S* input(int64_t row) const { return static_cast<const S*>(plane_.input) + row * width_; }
  const S* target(int64_t row) const { return static_cast<const S*>(plane_.target) + row * width_; }

  void windows(int64_t k, bool fresh, double* sums) {
    const auto stage = [&](int64_t row, T* fields) {
      stage_fields(input(row), target(row), width_, plane_.constants.twice_centre, fields);
    };
    const auto fetch = [&](int64_t row, int64_t column) {
      __builtin_prefetch(input(row) + column, 0, 2);
      __builtin_prefetch(target(row) + column, 0, 2);
    };
    T* const to = by_similarity_.data();
    const auto deliver = [&](int64_t row, int64_t column, Vec<T> s, Vec<T> d, Vec<T> mean, Vec<T> sum_square,
                             Vec<T> difference_square) {
      (mean + T(2) * (s * sum_square + d * difference_square)).store(to + row * row_stride_ + column);
    };
    similarity_.strip(k, fresh, stage, fetch, sums, deliver);
  }

  void stage_edge_row(int64_t row) { stage_difference(input(row), target(row), width_, edge_.difference(row)); }

  double edges(int64_t row) {
    stage_edge_row(row + 2);
    return edge_.respond(row);
  }

  void start_edges(int64_t top) {
    const int64_t first = std::max<int64_t>(top - 2, 0);
    for (int64_t row = first; row < std::min(first + 2, plane_.height); ++row) stage_edge_row(row);
    for (int64_t row = top - 2; row < top; ++row) {
      if (row < 0 || row >= plane_.height - 2) {
        edge_.skip(row);
      } else {
        edges(row);
      }
    }
  }

  T* repeated(int64_t row) { return repeated_[(row + 3) % 3].data(); }

  // The rows around the first: `sum_row` stages one more each time.
  void start_variation(int64_t top) {
    stage_repeated(input(std::max<int64_t>(top - 1, 0)), width_, repeated(top - 1));
    stage_repeated(input(top), width_, repeated(top));
  }

  // Everything about a row but its windows: sums, and the derivatives that all gradients share.
  void sum_row(int64_t row, double* sums) {
    if (plane_.pixel) {
      if (plane_.boxes) stage_weights(plane_, 0, row, weights_.data());
      stage_difference(input(row), target(row), width_, difference_.data());
      sum_pixels(plane_, difference_.data(), weights_.data(), sums);
    }
    if (plane_.edge) {
      if (row < plane_.height - 2) {
        sums[kEdge] += edges(row);
      } else {
        edge_.skip(row);
      }
      if (plane_.gradient_count > 0) edge_.derive(row, by_edge_.data());
    }
    if (plane_.tv) {
      stage_repeated(input(std::min(row + 1, plane_.height - 1)), width_, repeated(row + 1));
      total_variation(repeated(row - 1), repeated(row), repeated(row + 1), width_, by_x_.data(), by_y_.data(), sums);
    }
  }

  void write(const Gradient<T>& gradient, int64_t row) {
    const RowParts<T> parts{by_similarity_.data() + row % kStrip<T> * row_stride_,
                            difference_.data(), weights_.data(), by_edge_.data(), by_x_.data(), by_y_.data(), nullptr};
    write_row(plane_, gradient, parts, gradient.data + row * width_);
  }

  const Plane<T>& plane_;
  const int64_t begin_, width_, row_stride_;
  Similarity<T, 2> similarity_;
  Edge<T> edge_;
  Buffer<T> by_similarity_;
  PaddedRow<T> difference_, weights_, by_edge_, by_x_, by_y_;
  PaddedRow<T> repeated_[3];
};

template <typename S, typename T>
void sweep(const Plane<T>& plane, int64_t begin, int64_t end, double* sums) {
  if (plane.volume) {
    VolumeSweep<S, T>(plane, begin).run(end, sums);
  } else {
    Sweep<S, T>(plane, begin).run(end, sums);
  }
}

}  // namespace

template <typename T>
SweepFunction<T> sweep_function(Storage storage) {
  return with_storage_of<T, Half, BFloat16>(storage, [](auto* stored) -> SweepFunction<T> {
    return {kStrip<T>, sweep<std::remove_pointer_t<decltype(stored)>, T>};
  });
}
template SweepFunction<float> sweep_function(Storage storage);
template SweepFunction<double> sweep_function(Storage storage);

}  // namespace LID_ISA
}  // namespace lid
