"""Constants of formulas that more than one module computes."""

CHARBONNIER_EPS = 1e-3  # of "charbonnier", sqrt(d^2 + eps^2)

#: HU of the tissues in which noise is measured and lesions are put, by name.
TISSUES: dict[str, tuple[float, float]] = {"lung": (-950.0, -600.0), "soft tissue": (-150.0, 150.0)}
