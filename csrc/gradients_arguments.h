// Checks of the arguments of gradient_gramian and combine_gradients: of what would read outside a tensor.
#pragma once

#include "floating.h"

namespace lid {

inline void check_gradients(const torch::stable::Tensor& gradients, int64_t least_dimensions) {
  check_floating(gradients, "gradients");
  STD_TORCH_CHECK(gradients.dim() >= least_dimensions && gradients.size(0) > 0, "gradients must have at least ",
                  least_dimensions, " dimensions and one gradient");
}

inline void check_coefficients(const torch::stable::Tensor& coefficients, const torch::stable::Tensor& gradients) {
  STD_TORCH_CHECK(coefficients.device() == gradients.device(), "coefficients must be on the device of gradients");
  STD_TORCH_CHECK(coefficients.dim() == 1 && coefficients.size(0) == gradients.size(0) &&
                      coefficients.scalar_type() == arithmetic_of(gradients),
                  "coefficients must have one value per gradient, float64 for float64 gradients, else float32");
}

}  // namespace lid
