// The maths of multi_loss that C++ and CUDA share: what a pixel contributes to each term and to each term's gradient.
//
// Written for any type with arithmetic: float and double, in CUDA one pixel per thread, or a vector of pixels on the CPU.
// Such a type brings lid_abs, lid_sign, lid_sqrt and lid_max beside its operators.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define LID_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define LID_HOST_DEVICE inline
#endif

namespace lid {

// The order of the terms in tables of sums and coefficients.
enum class Term { l1, mse, charbonnier, ssim, ms_ssim, edge, tv };
constexpr int kTerms = 7;

constexpr double kPixelCharbonnierEps = 1e-3;

// Gaussian window of SSIM (Wang et al., "Image quality assessment: from error visibility to structural similarity", 2004):
// 11 taps per axis, sigma 1.5, normalised; symmetric, so six weights say all.
constexpr int kWindow = 11;
constexpr int kHalo = kWindow - 1;
constexpr double kGaussian[kWindow] = {
    0.00102838008447911, 0.007598758135239185, 0.03600077212843083,  0.10936068950970002,
    0.2130055377112537,  0.26601172486179436,  0.2130055377112537,   0.10936068950970002,
    0.03600077212843083, 0.007598758135239185, 0.00102838008447911};
constexpr double kK1 = 0.01, kK2 = 0.03;

// Exponents of the five scales (Wang, Simoncelli, Bovik, "Multi-scale structural similarity", 2003, section 3.2).
constexpr int kScales = 5;
constexpr double kScaleExponents[kScales] = {0.0448, 0.2856, 0.3001, 0.2363, 0.1333};

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

template <typename S>
struct SimilarityConstants {
  S twice_centre;  // 2c
  S c1, c2;
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

template <typename S>
struct PixelCoefficients {
  S l1, mse, charbonnier;
};

template <bool kCharbonnier, typename V, typename S>
LID_HOST_DEVICE V pixel_derivative(V d, const PixelCoefficients<S>& by) {
  V result = by.l1 * lid_sign(d) + (S(2) * by.mse) * d;
  if constexpr (kCharbonnier) {
    result = result + by.charbonnier * (d / charbonnier(d, S(kPixelCharbonnierEps * kPixelCharbonnierEps)));
  }
  return result;
}

// Average pooling between two scales of MS-SSIM: two cells per axis, and one row of zeros ahead where a side is odd.
LID_HOST_DEVICE int64_t pooled_side(int64_t side) { return (side + 1) / 2; }
LID_HOST_DEVICE int64_t pooling_start(int64_t index, int64_t side) { return 2 * index - side % 2; }

}  // namespace lid
