"""The one place where Hounsfield units become network input and back."""

import math
from dataclasses import dataclass

from torch import Tensor

from lidnet_fast.errors import InputError


@dataclass(frozen=True)
class HUWindow:
    """An affine map between Hounsfield units and the "windowed" values that networks see.

    The window's lower end becomes 0 and its upper end 1. `scale` and `unscale` don't clamp, so that nothing is lost on
    the way through a denoiser; `clamp` cuts to [0, 1] where a fixed range is needed (detectors, metrics, pictures).

    Args:
        low: lower end of the window, HU.
        high: upper end of the window, HU; above `low`.

    Raises:
        InputError: an end isn't finite, or `high` isn't above `low`.
    """

    low: float = -1000.0
    high: float = 400.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high)):
            raise InputError(f"HU window: its ends must be finite, got low={self.low} and high={self.high}")
        if not self.high > self.low:
            raise InputError(f"HU window: high must be above low, got low={self.low} and high={self.high}")

    @property
    def width(self) -> float:
        """The window's width in HU: one unit of windowed value."""
        return self.high - self.low

    def scale(self, hu: Tensor) -> Tensor:
        """Map HU (any shape; integers become float32) to windowed values, without clamping."""
        return (hu - float(self.low)) / self.width

    def unscale(self, windowed: Tensor) -> Tensor:
        """Map windowed values back to HU, the inverse of `scale`."""
        return windowed * self.width + float(self.low)

    def clamp(self, windowed: Tensor) -> Tensor:
        """Clamp windowed values to [0, 1], passing the gradient straight through.

        The gradient is the identity everywhere: a denoised pixel beyond the window still learns from losses that only
        see the window (an ordinary clamp would silence it).
        """
        clamped = windowed.detach().clamp(0, 1)
        if not windowed.requires_grad:
            return clamped
        # The difference is exactly zero, so that the values stay exactly within [0, 1].
        return clamped + (windowed - windowed.detach())
