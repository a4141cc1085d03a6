// The sweep over a volume's slices: the windows and filters of images within each slice, after or before a pass along z.
#pragma once

#include "multi_loss_rows.h"

namespace lid {
namespace LID_ISA {
namespace {

// Signs of the Sobel responses across slices, smooth along rows and columns, and what they give back: as `Edge` does.
template <typename T>
class SliceEdge {
 public:
  explicit SliceEdge(int64_t width) : width_(width), signs_(width) {
    for (int i = 0; i < 3; ++i) {
      slopes_.emplace_back(width);
      from_signs_.emplace_back(width);
    }
  }

  T* slope(int64_t row) { return slopes_[row % 3].data(); }

  double respond(int64_t row) {
    const T *first = slope(row), *second = slope(row + 1), *third = slope(row + 2);
    T *signs = signs_.data(), *from_signs = from_signs_[row % 3].data();
    Vec<T> sum = Vec<T>::zero();
    for (int64_t c = 0; c < width_; c += Vec<T>::kLanes) {
      const auto smooth = [&](int64_t i) {
        return Vec<T>::load(first + i) + T(2) * Vec<T>::load(second + i) + Vec<T>::load(third + i);
      };
      const Vec<T> response = (smooth(c) + T(2) * smooth(c + 1) + smooth(c + 2)).keep(width_ - 2 - c);
      sum = sum + lid_abs(response);
      lid_sign(response).store(signs + c);
    }
    for (int64_t c = 0; c < width_; c += Vec<T>::kLanes) {
      (Vec<T>::load(signs + c - 2) + T(2) * Vec<T>::load(signs + c - 1) + Vec<T>::load(signs + c))
          .store(from_signs + c);
    }
    return sum.sum();
  }

  void skip(int64_t row) { std::fill_n(from_signs_[(row + 3) % 3].data(), width_, T(0)); }

  void derive(int64_t row, T* result) {
    const auto part = [&](int64_t above) { return from_signs_[(row - above + 3) % 3].data(); };
    const T *first = part(0), *second = part(1), *third = part(2);
    for (int64_t c = 0; c < width_; c += Vec<T>::kLanes) {
      (Vec<T>::load(first + c) + T(2) * Vec<T>::load(second + c) + Vec<T>::load(third + c)).store(result + c);
    }
  }

 private:
  int64_t width_;
  PaddedRow<T> signs_;
  std::vector<PaddedRow<T>> slopes_, from_signs_;
};

// Slices [begin, end) of a volume. What they need of the slices before is worked out again, without being counted.
template <typename S, typename T>
class VolumeSweep {
 public:
  VolumeSweep(const Plane<T>& plane, int64_t begin)
      : plane_(plane),
        begin_(begin),
        width_(plane.width),
        row_stride_(padded_width(plane.width)),
        slice_stride_(strips_of(plane.height, kStrip<T>) * kStrip<T> * row_stride_),
        back_(plane.gradient_count > 0),
        similarity_(plane, plane.similarity && back_),
        maps_(plane.similarity && back_ ? kMaps * kWindow * slice_stride_ : 0),
        edges_(plane.edge && back_ ? 2 * 3 * slice_stride_ : 0),
        edge_(plane.width),
        slice_edge_(plane.width),
        by_similarity_(width_),
        difference_(width_),
        weights_(width_),
        by_edge_(width_),
        by_x_(width_),
        by_y_(width_),
        by_z_(width_),
        repeated_{PaddedRow<T>(width_), PaddedRow<T>(width_), PaddedRow<T>(width_), PaddedRow<T>(width_), PaddedRow<T>(width_)} {}

  void run(int64_t end, double* sums) {
    // A voxel's gradient needs the windows of the ten slices before and the edges of the two slices before.
    std::vector<double> uncounted(kSums);
    if (!plane_.boxes) stage_weights(plane_, 0, 0, weights_.data());
    for (int64_t z = back_ ? std::max<int64_t>(begin_ - kHalo, 0) : begin_; z < end; ++z) {
      double* of_slice = z >= begin_ ? sums + (z - begin_) * kSums : uncounted.data();
      if (plane_.similarity && z < plane_.depth - kHalo) windows(z, of_slice);
      if (plane_.edge && z >= begin_ - 2) edges(z, of_slice);
      for (int64_t row = 0; row < plane_.height && z >= begin_; ++row) {
        sum_row(z, row, of_slice);
        if (back_) write(z, row);
      }
    }
  }

 private:
  int64_t place(int64_t z, int64_t row) const { return (z * plane_.height + row) * width_; }
  const S* input(int64_t z, int64_t row) const { return static_cast<const S*>(plane_.input) + place(z, row); }
  const S* target(int64_t z, int64_t row) const { return static_cast<const S*>(plane_.target) + place(z, row); }
  T* map(int m, int64_t z, int64_t row) {
    return maps_.data() + (m * kWindow + z % kWindow) * slice_stride_ + row * row_stride_;
  }
  // 0: of the responses within slices, 1: of those across them.
  T* edge(int which, int64_t z, int64_t row) {
    return edges_.data() + (which * 3 + (z + 3) % 3) * slice_stride_ + row * row_stride_;
  }

  // The four fields of `Similarity`, summed along z over the window that starts at slice z.
  void stage_summed_fields(int64_t z, int64_t row, T* fields) const {
    for (int64_t c = 0; c < width_; c += Vec<T>::kLanes) {
      Vec<T> sum = Vec<T>::zero(), difference = sum, sum_square = sum, difference_square = sum;
      for (int k = 0; k < kWindow; ++k) {
        const Vec<T> a = Vec<T>::load_part(input(z + k, row) + c, width_ - c);
        const Vec<T> b = Vec<T>::load_part(target(z + k, row) + c, width_ - c);
        const Vec<T> s = a + b - plane_.constants.twice_centre, d = a - b;
        const T weight = T(window_weight(k));
        sum = sum + weight * s;
        difference = difference + weight * d;
        sum_square = sum_square + weight * (s * s);
        difference_square = difference_square + weight * (d * d);
      }
      Similarity<T, kFields>::put(fields, c, {sum, difference, sum_square, difference_square});
    }
  }

  void windows(int64_t z, double* sums) {
    similarity_.restart();
    const auto stage = [&](int64_t row, T* fields) { stage_summed_fields(z, row, fields); };
    const auto fetch = [&](int64_t row, int64_t column) {
      __builtin_prefetch(input(z + kHalo, row) + column, 0, 2);
      __builtin_prefetch(target(z + kHalo, row) + column, 0, 2);
    };
    for (int64_t k = 0; k < strips_of(plane_.height, kStrip<T>); ++k) {
      const auto deliver = [&](int64_t row, int64_t column, Vec<T>, Vec<T>, Vec<T> mean, Vec<T> sum_square,
                               Vec<T> difference_square) {
        const int64_t at = row * row_stride_ + column;
        mean.store(map(0, z, k * kStrip<T>) + at);
        sum_square.store(map(1, z, k * kStrip<T>) + at);
        difference_square.store(map(2, z, k * kStrip<T>) + at);
      };
      similarity_.strip(k, k == 0, stage, fetch, sums, deliver);
    }
  }

  // Differences of rows `row` of slices z to z + 2: smooth along z, and their slope.
  void stage_edge_row(int64_t z, int64_t row) {
    T *smooth = edge_.difference(row), *slope = slice_edge_.slope(row);
    for (int64_t c = 0; c < width_; c += Vec<T>::kLanes) {
      const auto difference = [&](int64_t of) {
        return Vec<T>::load_part(input(of, row) + c, width_ - c) - Vec<T>::load_part(target(of, row) + c, width_ - c);
      };
      const Vec<T> first = difference(z), third = difference(z + 2);
      (first + T(2) * difference(z + 1) + third).store(smooth + c);
      (third - first).store(slope + c);
    }
  }

  void edges(int64_t z, double* sums) {
    if (z < 0 || z >= plane_.depth - 2) {
      for (int which = 0; which < 2 && back_; ++which) std::fill_n(edge(which, z, 0), slice_stride_, T(0));
      return;
    }
    for (int64_t row = -2; row < plane_.height; ++row) {
      const bool inside = row >= 0 && row < plane_.height - 2;
      if (row + 2 < plane_.height) stage_edge_row(z, row + 2);
      if (inside) {
        sums[kEdge] += edge_.respond(row) + slice_edge_.respond(row);
      } else {
        edge_.skip(row);
        slice_edge_.skip(row);
      }
      if (back_ && row >= 0) {
        edge_.derive(row, edge(0, z, row));
        slice_edge_.derive(row, edge(1, z, row));
      }
    }
  }

  void sum_row(int64_t z, int64_t row, double* sums) {
    if (plane_.pixel) {
      if (plane_.boxes) stage_weights(plane_, z, row, weights_.data());
      stage_difference(input(z, row), target(z, row), width_, difference_.data());
      sum_pixels(plane_, difference_.data(), weights_.data(), sums);
    }
    if (plane_.tv) {
      const auto stage = [&](int which, int64_t slice, int64_t of) {
        slice = std::clamp<int64_t>(slice, 0, plane_.depth - 1);
        of = std::clamp<int64_t>(of, 0, plane_.height - 1);
        stage_repeated(input(slice, of), width_, repeated_[which].data());
        return repeated_[which].data();
      };
      const T *here = stage(0, z, row), *above = stage(1, z, row - 1), *below = stage(2, z, row + 1);
      const T *before = stage(3, z - 1, row), *after = stage(4, z + 1, row);
      total_variation(above, here, below, width_, by_x_.data(), by_y_.data(), sums);
      Vec<T> sum = Vec<T>::zero();
      for (int64_t c = 0; c < width_; c += Vec<T>::kLanes) {
        const Vec<T> value = Vec<T>::load(here + c), next = (Vec<T>::load(after + c) - value).keep(width_ - c);
        sum = sum + lid_abs(next);
        (lid_sign(value - Vec<T>::load(before + c)) - lid_sign(next)).store(by_z_.data() + c);
      }
      sums[kTvZ] += sum.sum();
    }
  }

  // The maps summed back along z, over the windows that hold slice z.
  void derive_similarity(int64_t z, int64_t row) {
    const int64_t first = std::max<int64_t>(z - kHalo, 0), last = std::min(z, plane_.depth - kWindow);
    for (int64_t c = 0; c < width_; c += Vec<T>::kLanes) {
      Vec<T> sums[kMaps] = {Vec<T>::zero(), Vec<T>::zero(), Vec<T>::zero()};
      for (int64_t of = first; of <= last; ++of) {
        const T weight = T(window_weight(static_cast<int>(z - of)));
        for (int m = 0; m < kMaps; ++m) sums[m] = sums[m] + weight * Vec<T>::load(map(m, of, row) + c);
      }
      const Vec<T> a = Vec<T>::load_part(input(z, row) + c, width_ - c), b = Vec<T>::load_part(target(z, row) + c, width_ - c);
      const Vec<T> s = a + b - plane_.constants.twice_centre, d = a - b;
      (sums[0] + T(2) * (s * sums[1] + d * sums[2])).store(by_similarity_.data() + c);
    }
  }

  void write(int64_t z, int64_t row) {
    if (plane_.similarity) derive_similarity(z, row);
    for (int64_t c = 0; c < width_ && plane_.edge; c += Vec<T>::kLanes) {
      const auto at = [&](int which, int64_t of) { return Vec<T>::load(edge(which, of, row) + c); };
      (at(0, z) + T(2) * at(0, z - 1) + at(0, z - 2) + (at(1, z - 2) - at(1, z))).store(by_edge_.data() + c);
    }
    const RowParts<T> parts{by_similarity_.data(), difference_.data(), weights_.data(), by_edge_.data(),
                            by_x_.data(),          by_y_.data(),       by_z_.data()};
    for (int64_t g = 0; g < plane_.gradient_count; ++g) {
      write_row(plane_, plane_.gradients[g], parts, plane_.gradients[g].data + place(z, row));
    }
  }

  const Plane<T>& plane_;
  const int64_t begin_, width_, row_stride_, slice_stride_;
  const bool back_;
  Similarity<T, kFields> similarity_;
  Buffer<T> maps_, edges_;  // rings of slices
  Edge<T> edge_;
  SliceEdge<T> slice_edge_;
  PaddedRow<T> by_similarity_, difference_, weights_, by_edge_, by_x_, by_y_, by_z_;
  PaddedRow<T> repeated_[5];
};

}  // namespace
}  // namespace LID_ISA
}  // namespace lid
