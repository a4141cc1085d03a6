// The rows of a plane as the sweep needs them: staged from the images, weights of pixels, and the terms that look at a pixel's
// neighbours. A row lies in memory with a margin on both sides, so that whole vectors and
// neighbours can be read beyond its ends.
#pragma once

#include "multi_loss_similarity.h"

namespace lid {
namespace LID_ISA {
namespace {

constexpr int64_t kMargin = 16;  // columns

inline int64_t padded_width(int64_t width) { return (width + kMargin - 1) / kMargin * kMargin + 2 * kMargin; }

template <typename T>
class PaddedRow {
 public:
  explicit PaddedRow(int64_t width) : values_(padded_width(width)) {}
  T* data() { return values_.data() + kMargin; }

 private:
  Buffer<T> values_;
};

// d = x - y of a row, zeros after its end.
template <typename S, typename T>
inline void stage_difference(const S* x, const S* y, int64_t width, T* row) {
  for (int64_t c = 0; c < width; c += Vec<T>::kLanes) {
    (Vec<T>::load_part(x + c, width - c) - Vec<T>::load_part(y + c, width - c)).store(row + c);
  }
}

// The fields s and d of `Similarity`.
template <typename S, typename T>
inline void stage_fields(const S* x, const S* y, int64_t width, T twice_centre, T* fields) {
  for (int64_t c = 0; c < width; c += Vec<T>::kLanes) {
    const Vec<T> a = Vec<T>::load_part(x + c, width - c), b = Vec<T>::load_part(y + c, width - c);
    Similarity<T, 2>::put(fields, c, {a + b - twice_centre, a - b});
  }
}

// The row with its first and last value repeated beyond its ends, where total variation then finds no difference.
template <typename S, typename T>
inline void stage_repeated(const S* x, int64_t width, T* row) {
  for (int64_t c = 0; c < width; c += Vec<T>::kLanes) Vec<T>::load_part(x + c, width - c).store(row + c);
  row[-1] = row[0];
  std::fill_n(row + width, kMargin, row[width - 1]);
}

// 1, or roi_weight inside the boxes; zeros after the row's end.
template <typename T>
inline void stage_weights(const Plane<T>& plane, int64_t slice, int64_t row, T* weights) {
  std::fill_n(weights, plane.width, T(1));
  for (int64_t k = 0; k < plane.box_count; ++k) {
    const PixelBox& box = plane.boxes[k];
    if (slice >= box.front && slice < box.back && row >= box.top && row < box.bottom) {
      std::fill_n(weights + box.left, std::max<int64_t>(box.right - box.left, 0), plane.roi_weight);
    }
  }
}

template <typename T>
inline void sum_pixels(const Plane<T>& plane, const T* difference, const T* weights, double* sums) {
  Vec<T> l1 = Vec<T>::zero(), mse = l1, charbonnier_sum = l1;
  for (int64_t c = 0; c < plane.width; c += Vec<T>::kLanes) {
    const Vec<T> d = Vec<T>::load(difference + c), w = Vec<T>::load(weights + c);
    l1 = l1 + w * lid_abs(d);
    mse = mse + w * (d * d);
    if (plane.charbonnier) {
      charbonnier_sum = charbonnier_sum + w * charbonnier(d, T(kCharbonnierEps * kCharbonnierEps));
    }
  }
  sums[kL1] += l1.sum();
  sums[kMse] += mse.sum();
  sums[kCharbonnier] += charbonnier_sum.sum();
}

// Signs of the Sobel responses of d, and what they give back to the pixels. A response belongs to the upper left of the nine
// pixels it is made from; both ways the columns are done first, the rows of three are joined after.
template <typename T>
class Edge {
 public:
  explicit Edge(int64_t width) : width_(width), horizontal_(width), vertical_(width) {
    for (int i = 0; i < 3; ++i) {
      differences_.emplace_back(width);
      from_horizontal_.emplace_back(width);
      from_vertical_.emplace_back(width);
    }
  }

  T* difference(int64_t row) { return differences_[row % 3].data(); }

  // Responses of rows `row` to `row` + 2 of the differences, which must be there.
  double respond(int64_t row) {
    const T *first = difference(row), *second = difference(row + 1), *third = difference(row + 2);
    T *horizontal = horizontal_.data(), *vertical = vertical_.data();
    Vec<T> sum = Vec<T>::zero();
    for (int64_t c = 0; c < width_; c += Vec<T>::kLanes) {
      const auto smooth = [&](int64_t i) {
        return Vec<T>::load(first + i) + T(2) * Vec<T>::load(second + i) + Vec<T>::load(third + i);
      };
      const auto slope = [&](int64_t i) { return Vec<T>::load(third + i) - Vec<T>::load(first + i); };
      const int64_t count = width_ - 2 - c;
      const Vec<T> h = (smooth(c + 2) - smooth(c)).keep(count);
      const Vec<T> v = (slope(c) + T(2) * slope(c + 1) + slope(c + 2)).keep(count);
      sum = sum + (lid_abs(h) + lid_abs(v));
      lid_sign(h).store(horizontal + c);
      lid_sign(v).store(vertical + c);
    }
    T *from_horizontal = from_horizontal_[row % 3].data(), *from_vertical = from_vertical_[row % 3].data();
    for (int64_t c = 0; c < width_; c += Vec<T>::kLanes) {
      (Vec<T>::load(horizontal + c - 2) - Vec<T>::load(horizontal + c)).store(from_horizontal + c);
      (Vec<T>::load(vertical + c - 2) + T(2) * Vec<T>::load(vertical + c - 1) + Vec<T>::load(vertical + c))
          .store(from_vertical + c);
    }
    return sum.sum();
  }

  // Where there are no responses: beyond the image.
  void skip(int64_t row) {
    std::fill_n(from_horizontal_[(row + 3) % 3].data(), width_, T(0));
    std::fill_n(from_vertical_[(row + 3) % 3].data(), width_, T(0));
  }

  // The derivative of the sum of absolute responses in a row's pixels.
  void derive(int64_t row, T* result) {
    const auto part = [row](std::vector<PaddedRow<T>>& rows, int64_t above) { return rows[(row - above + 3) % 3].data(); };
    const T *h0 = part(from_horizontal_, 0), *h1 = part(from_horizontal_, 1), *h2 = part(from_horizontal_, 2);
    const T *v0 = part(from_vertical_, 0), *v2 = part(from_vertical_, 2);
    for (int64_t c = 0; c < width_; c += Vec<T>::kLanes) {
      const auto at = [c](const T* from) { return Vec<T>::load(from + c); };
      (at(h0) + T(2) * at(h1) + at(h2) + (at(v2) - at(v0))).store(result + c);
    }
  }

 private:
  int64_t width_;
  PaddedRow<T> horizontal_, vertical_;
  std::vector<PaddedRow<T>> differences_, from_horizontal_, from_vertical_;
};

// Sums of |differences| between a pixel and the next one across and down, and their derivatives. Rows come by `stage_repeated`;
// at the image's first and last row the row itself stands in for the one beyond.
template <typename T>
inline void total_variation(const T* above, const T* row, const T* below, int64_t width, T* by_x, T* by_y, double* sums) {
  Vec<T> across = Vec<T>::zero(), down = across;
  for (int64_t c = 0; c < width; c += Vec<T>::kLanes) {
    const Vec<T> value = Vec<T>::load(row + c);
    const Vec<T> right = Vec<T>::load(row + c + 1) - value, under = (Vec<T>::load(below + c) - value).keep(width - c);
    across = across + lid_abs(right);
    down = down + lid_abs(under);
    (lid_sign(value - Vec<T>::load(row + c - 1)) - lid_sign(right)).store(by_x + c);
    (lid_sign(value - Vec<T>::load(above + c)) - lid_sign(under)).store(by_y + c);
  }
  sums[kTvX] += across.sum();
  sums[kTvY] += down.sum();
}

// What the gradients in a row are made from; null where no term needs it.
template <typename T>
struct RowParts {
  const T *by_similarity, *difference, *weights;
  const T *by_edge, *by_x, *by_y, *by_z;
};

template <typename T>
inline void write_row(const Plane<T>& plane, const Gradient<T>& gradient, const RowParts<T>& parts, T* to) {
  const bool pixel = gradient.pixel.l1 != 0 || gradient.pixel.mse != 0, charbonnier = gradient.pixel.charbonnier != 0;
  const bool edge = gradient.edge != 0, tv = gradient.tv_x != 0, tv_z = gradient.tv_z != 0;
  for (int64_t c = 0; c < plane.width; c += Vec<T>::kLanes) {
    const auto at = [c](const T* from) { return Vec<T>::load(from + c); };
    const int64_t count = plane.width - c;
    Vec<T> value = gradient.similarity ? at(parts.by_similarity) : Vec<T>::zero();
    if (charbonnier) {
      value = value + at(parts.weights) * pixel_derivative<true>(at(parts.difference), gradient.pixel);
    } else if (pixel) {
      value = value + at(parts.weights) * pixel_derivative<false>(at(parts.difference), gradient.pixel);
    }
    if (edge) value = value + gradient.edge * at(parts.by_edge);
    if (tv) value = value + (gradient.tv_x * at(parts.by_x) + gradient.tv_y * at(parts.by_y));
    if (tv_z) value = value + gradient.tv_z * at(parts.by_z);
    value.store_part(to + c, count);
  }
}

}  // namespace
}  // namespace LID_ISA
}  // namespace lid
