// What the C++ and the CUDA kernels of multi_loss agree on; the maths of their pixels is in multi_loss_pixels.h.
#pragma once

#include <cmath>
#include <cstdint>

#include "target.h"

namespace lid {

// The order of the terms in tables of sums and coefficients.
enum class Term { l1, mse, charbonnier, ssim, ms_ssim, edge, tv };
constexpr int kTerms = 7;

// Gaussian window of SSIM (Wang et al., "Image quality assessment: from error visibility to structural similarity", 2004):
// 11 taps per axis, sigma 1.5, normalised; symmetric, so six weights say all.
constexpr int kWindow = 11;
constexpr int kHalo = kWindow - 1;
LID_HOST_DEVICE constexpr double window_weight(int tap) {
  constexpr double kWeights[] = {0.00102838008447911, 0.007598758135239185, 0.03600077212843083,
                                 0.10936068950970002, 0.2130055377112537,   0.26601172486179436};
  return kWeights[tap < kWindow / 2 ? tap : kHalo - tap];
}
constexpr double kK1 = 0.01, kK2 = 0.03;

// Exponents of the five scales (Wang, Simoncelli, Bovik, "Multi-scale structural similarity", 2003, section 3.2).
constexpr int kScales = 5;
LID_HOST_DEVICE constexpr double scale_exponent(int scale) {
  constexpr double kExponents[kScales] = {0.0448, 0.2856, 0.3001, 0.2363, 0.1333};
  return kExponents[scale];
}

// MS-SSIM of a plane, from the means over its windows: of 1 - contrast-structure, at the last scale of SSIM.
LID_HOST_DEVICE double ms_ssim(const double (&means)[kScales]) {
  double product = 1;
  LID_UNROLL for (int j = 0; j < kScales; ++j) product *= std::pow(means[j] <= 0 ? 0 : means[j], scale_exponent(j));
  return product;
}
// What the dissimilarities of a plane's windows at a scale are multiplied by in the gradient of coefficient * (1 - MS-SSIM).
LID_HOST_DEVICE double ms_ssim_weight(int scale, double coefficient, double similarity, double mean, double windows,
                                      double planes) {
  return similarity == 0 ? 0 : coefficient * similarity * scale_exponent(scale) / (mean * windows * planes);
}

// Of a plane's similarity; the centre c is near the images' mean, see multi_loss_pixels.h.
template <typename S>
struct SimilarityConstants {
  S twice_centre;  // 2c
  S c1, c2;
};

// What the derivatives of a pixel's l1, mse and charbonnier are multiplied by.
template <typename S>
struct PixelCoefficients {
  S l1, mse, charbonnier;
};

// Average pooling between two scales of MS-SSIM: two cells per axis, and one row of zeros ahead where a side is odd.
LID_HOST_DEVICE int64_t pooled_side(int64_t side) { return (side + 1) / 2; }
LID_HOST_DEVICE int64_t pooling_start(int64_t index, int64_t side) { return 2 * index - side % 2; }

}  // namespace lid
