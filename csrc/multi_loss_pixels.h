// What a pixel contributes to each term of multi_loss and to each term's gradient, for C++ and CUDA alike.
//
// Written for any type with arithmetic: float and double, in CUDA one pixel per thread, or a vector of pixels on the CPU.
// Such a type brings lid_abs, lid_sign, lid_sqrt and lid_max beside its operators.
#pragma once

#include <cmath>

#include "constants.h"
#include "multi_loss.h"
#include "target.h"

namespace lid {
namespace LID_ISA {
namespace {

template <typename T>
LID_HOST_DEVICE T lid_max(T a, T b) {
  return a > b ? a : b;
}
template <typename T>
LID_HOST_DEVICE T lid_abs(T a) {
  return a < T(0) ? -a : a;
}
// -1, 0 or 1; NaN of NaN.
template <typename T>
LID_HOST_DEVICE T lid_sign(T a) {
  return a > T(0) ? T(1) : a < T(0) ? T(-1) : a;
}
LID_HOST_DEVICE float lid_sqrt(float a) { return sqrtf(a); }
LID_HOST_DEVICE double lid_sqrt(double a) { return sqrt(a); }

// SSIM is computed from s = x + y - 2c and d = x - y, with c near the images' mean, instead of from x and y. With means m,
// variances V and A = m_d^2 / (m_x^2 + m_y^2 + C1), B = V_d / (V_x + V_y + C2):
//   luminance = 1 - A,  contrast-structure = 1 - B,  1 - SSIM = A + B - AB.
// The window's means of s, d, s^2 and d^2 are enough (four filters instead of five), and in single precision nothing cancels
// where x and y are nearly alike, as they are late in training.
template <typename V>
struct WindowMeans {
  V sum, difference, sum_square, difference_square;
};

template <typename V>
struct Dissimilarity {
  V luminance, contrast;                   // A, B
  V luminance_reciprocal, contrast_reciprocal;  // 1 / (m_x^2 + m_y^2 + C1), 1 / (V_x + V_y + C2)
  V mean_sum;                              // of x + y

  LID_HOST_DEVICE V structural() const { return luminance + contrast - luminance * contrast; }  // 1 - SSIM
};

template <typename V, typename S>
LID_HOST_DEVICE Dissimilarity<V> dissimilarity(const WindowMeans<V>& means, const SimilarityConstants<S>& constants) {
  const V mean_sum = means.sum + constants.twice_centre;
  const V square = means.difference * means.difference;
  const V luminance = S(0.5) * (mean_sum * mean_sum + square) + constants.c1;
  const V variance_difference = means.difference_square - square;
  // Rounding may leave a variance just below 0.
  const V variances = S(0.5) * (means.sum_square - means.sum * means.sum + variance_difference);
  const V contrast = lid_max(variances, V(variances - variances)) + constants.c2;
  const V reciprocal = S(1) / (luminance * contrast);
  const V luminance_reciprocal = reciprocal * contrast, contrast_reciprocal = reciprocal * luminance;
  return {square * luminance_reciprocal, variance_difference * contrast_reciprocal, luminance_reciprocal,
          contrast_reciprocal, mean_sum};
}

// Derivatives of f = structural_weight * (1 - SSIM) + contrast_weight * B in the window's means. The gradient of the sum of f
// over all windows is, with ^ for the transposed filter, mean^ + 2 s sum_square^ + 2 d difference_square^.
template <typename V>
struct WindowDerivatives {
  V mean, sum_square, difference_square;
};

template <typename V, typename S>
LID_HOST_DEVICE WindowDerivatives<V> derivatives(const WindowMeans<V>& means, const Dissimilarity<V>& at,
                                                 S structural_weight, S contrast_weight) {
  const V by_luminance = structural_weight * (S(1) - at.contrast);
  const V by_contrast = structural_weight * (S(1) - at.luminance) + contrast_weight;
  const V scaled = by_contrast * at.contrast_reciprocal;
  const V sum_square = S(-0.5) * (scaled * at.contrast);
  const V difference_square = scaled + sum_square;
  const V mean = by_luminance * at.luminance_reciprocal *
                     (means.difference * (S(2) - at.luminance) - at.mean_sum * at.luminance) -
                 S(2) * (means.difference * difference_square + means.sum * sum_square);
  return {mean, sum_square, difference_square};
}

// The terms of single pixels, of d = x - y, and their derivatives.
template <typename V, typename S>
LID_HOST_DEVICE V charbonnier(V d, S epsilon_square) {
  return lid_sqrt(d * d + epsilon_square);
}

template <bool kCharbonnier, typename V, typename S>
LID_HOST_DEVICE V pixel_derivative(V d, const PixelCoefficients<S>& by) {
  V result = by.l1 * lid_sign(d) + (S(2) * by.mse) * d;
  if constexpr (kCharbonnier) {
    result = result + by.charbonnier * (d / charbonnier(d, S(kCharbonnierEps * kCharbonnierEps)));
  }
  return result;
}

// Neighbouring window sums: sums[i] = sum over k of window_weight(k) at(i + k). The window is symmetric, so the transposed
// filter is the same sum. LID_UNROLL, a pragma, keeps the sums in registers.
template <typename T, typename V, int kCount, typename At>
LID_HOST_DEVICE __attribute__((always_inline)) void window_sums(const At& at, V (&sums)[kCount]) {
  LID_UNROLL for (int n = 0; n < kCount + kHalo; ++n) {
    const V value = at(n);
    LID_UNROLL for (int i = 0; i < kCount; ++i) {
      if (n == i) {
        sums[i] = T(window_weight(0)) * value;
      } else if (n > i && n - i <= kHalo) {
        sums[i] = sums[i] + T(window_weight(n - i)) * value;
      }
    }
  }
}

}  // namespace
}  // namespace LID_ISA
}  // namespace lid
