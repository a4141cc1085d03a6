"""The one place where Hounsfield units become network input and back."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lidnet_fast.errors import InputError
from lidnet_fast.neighbours import stacks_of_channels


@dataclass(frozen=True)
class HUWindow:
    """An affine map between Hounsfield units and the "windowed" values that networks see.

    The window's lower end becomes 0 and its upper end 1. `scale` and `unscale` don't clamp, so that a denoiser sees
    bone as it is; `clamp` cuts to [0, 1] where a fixed range is needed (detectors, metrics, pictures).

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
            raise InputError(f"low and high must be finite, got low={self.low} and high={self.high}")
        if not self.high > self.low:
            raise InputError(f"low must be below high, got low={self.low} and high={self.high}")

    @property
    def denoised_range(self) -> tuple[float, float]:
        """The HU that a denoiser changes: -1500..1500, and the window where that is wider.

        What lies beyond is metal or padding, far from everything that networks were trained on.
        """
        return min(-1500.0, self.low), max(1500.0, self.high)

    def is_denoised(self, hu: Tensor) -> Tensor:
        """Which of the values, HU of any shape, lie in `denoised_range`; a bool for each."""
        low, high = self.denoised_range
        return (hu >= low) & (hu <= high)

    def denoise(self, network: nn.Module, hu: Tensor, context: int = 0) -> Tensor:
        """Denoise images so that metal changes nothing around it by more than the range's end would.

        The network sees values beyond `denoised_range` as the range's end; they themselves pass unchanged, to the bit
        in whatever precision the network computes.

        Args:
            network: windowed [N, 2 context + 1, H, W] -> windowed [N,1,H,W].
            hu: low-dose slices [N,C,H,W], HU; channels are neighbours.
            context: slices that the network sees on each side of the one that it denoises.

        Returns:
            The slices that have as many neighbours on each side, denoised: [N, C - 2 context, H, W], HU, float32.

        Raises:
            ValueError: the network returns something else, or another shape.
        """
        hu = hu.float()
        seen = stacks_of_channels(self.scale(hu.clamp(*self.denoised_range)), context)
        windowed = network(seen)
        if not isinstance(windowed, Tensor) or windowed.shape != seen[:, :1].shape:
            got = list(windowed.shape) if isinstance(windowed, Tensor) else type(windowed).__name__
            raise ValueError(f"the network must return [N,1,H,W], here {list(seen[:, :1].shape)}, got {got}")
        own = hu[:, context : hu.shape[1] - context]
        return torch.where(self.is_denoised(own), self.unscale(windowed.float()).view(own.shape), own)

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
