"""Constants of formulas that more than one module computes."""

CHARBONNIER_EPS = 1e-3  # of "charbonnier", sqrt(d^2 + eps^2)
