// The interface between the op (multi_loss.cpp) and its inner loops, which are compiled once per instruction set.
#pragma once

#include <cstdint>

#include "../multi_loss.h"
#include "instruction_sets.h"

namespace lid {

// Sums over pixels that the terms' values are made of. Total variation has one per axis, as their means are over unlike counts.
enum Sum { kL1, kMse, kCharbonnier, kStructural, kContrast, kEdge, kTvX, kTvY, kTvZ, kSums };

// A gradient of a weighted sum of the sums above: what their derivatives are multiplied by. The similarity's factors are in
// `Plane`, as one pass makes the maps of one pair of them.
template <typename T>
struct Gradient {
  T* data;  // the plane's first pixel
  PixelCoefficients<T> pixel;
  T edge, tv_x, tv_y, tv_z;
  bool similarity;
};

// The pixels whose centres lie in a box: slices [front, back), rows [top, bottom), columns [left, right), inside the image.
struct PixelBox {
  int64_t front, back, top, bottom, left, right;
};

// One channel of one image or of one volume, and what is asked of it.
template <typename T>
struct Plane {
  const void* input;
  const void* target;
  bool volume;
  int64_t depth, height, width;  // an image's depth is 1

  bool pixel, charbonnier, similarity, edge, tv;  // which sums are wanted

  const PixelBox* boxes;  // of this image
  int64_t box_count;
  T roi_weight;

  SimilarityConstants<T> constants;
  T structural_weight, contrast_weight;

  const Gradient<T>* gradients;
  int64_t gradient_count;
};

// A plane is swept in units: strips of so many rows, or the slices of a volume. Each unit's sums are kept apart, and added in
// order by the caller, so that no bit of a result depends on how many threads share a plane.
template <typename T>
struct SweepFunction {
  int64_t strip;  // rows
  // Writes the gradients' rows of units [begin, end), and their sums to sums[(unit - begin) * kSums].
  void (*run)(const Plane<T>& plane, int64_t begin, int64_t end, double* sums);
};

inline int64_t strips_of(int64_t height, int64_t strip) { return (height + strip - 1) / strip; }

#define LID_DECLARE_SWEEPS(isa)                     \
  namespace isa {                                   \
  template <typename T>                             \
  SweepFunction<T> sweep_function(Storage storage); \
  }
LID_DECLARE_SWEEPS(baseline)
LID_DECLARE_SWEEPS(avx2)
LID_DECLARE_SWEEPS(avx512)
#undef LID_DECLARE_SWEEPS

}  // namespace lid
