// The criteria that roi_perceptual_losses applies to pooled differences.
#pragma once

#include <cmath>

#include "constants.h"

namespace lid {

enum class Criterion { mse, l1, smooth_l1, charbonnier };

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

}  // namespace lid
