// Constants of formulas that more than one op computes.
#pragma once

namespace lid {

constexpr double kCharbonnierEps = 1e-3;  // of "charbonnier", sqrt(d^2 + eps^2)

}  // namespace lid
