"""What a scanner makes of a lesion: discs, rods and ellipsoids, exact in frequency, with slice thickness and blur.

An ellipse of half axes a, b has the transform a b J1(2 pi r) / r with r = |(a u, b v)|. It is multiplied by the
scanner's transfer function (`reconstruction_transfer`, which is band-limited) and sampled, so that nothing aliases.
A slice of an ellipsoid is the mean of its sections over the slice's thickness.
"""

import math
from dataclasses import dataclass

import numpy as np
import scipy.fft
from numpy.typing import NDArray
from scipy.special import j1

from lidnet_fast.data.simulation.projection import reconstruction_transfer

_MARGIN = 12
"""Pixels around a lesion that its blur may reach."""

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(8)


@dataclass(frozen=True)
class Lesion:
    """An ellipsoid of one contrast, added to what is there.

    Attributes:
        centre: (slice, row, column), in slices and pixels; whole numbers are the centres of pixels.
        diameter: mean of the axes within the slice, and the axis across slices, mm.
        contrast: HU above its surroundings; may be negative.
        elongation: long over short axis within the slice.
        angle: of the long axis from the rows' direction towards the columns', radians.
        tissue: where it lies, for the record.
    """

    centre: tuple[float, float, float]
    diameter: float
    contrast: float
    elongation: float = 1.0
    angle: float = 0.0
    tissue: str = ""

    @property
    def half_axes(self) -> tuple[float, float]:
        """Long and short half axis within the slice, mm."""
        root = math.sqrt(self.elongation)
        return self.diameter / 2 * root, self.diameter / 2 / root

    def half_sides(self, scale: float = 1.0) -> tuple[float, float]:
        """Half height and half width of the box around a section scaled by `scale`, mm."""
        (a, b), cos, sin = self.half_axes, math.cos(self.angle), math.sin(self.angle)
        return scale * math.hypot(a * sin, b * cos), scale * math.hypot(a * cos, b * sin)


Window = tuple[slice, slice]


def lesion_signal(
    lesion: Lesion, size: tuple[int, int], spacing: tuple[float, float, float], z: int | None = None
) -> tuple[Window, NDArray[np.float32]]:
    """What a lesion adds to one slice.

    Args:
        lesion: the lesion.
        size: (H, W) of the slice.
        spacing: mm between slices, rows and columns; slices are as thick as they are apart.
        z: the slice; None for a rod along the slices, whose every slice shows its full section.

    Returns:
        The rows and columns that it touches, and HU to be added there.
    """
    thickness, dy, dx = spacing
    _, y, x = lesion.centre
    reach = [math.ceil(half / d) + _MARGIN for half, d in zip(lesion.half_sides(), (dy, dx), strict=True)]
    first = [round(centre) - r for centre, r in zip((y, x), reach, strict=True)]
    height, width = (scipy.fft.next_fast_len(2 * r + 1, real=True) for r in reach)
    v, u = scipy.fft.fftfreq(height)[:, None], scipy.fft.rfftfreq(width)
    transform = np.zeros((height, width // 2 + 1))
    for scale, weight in _sections(lesion, thickness, z):
        transform += weight * scale**2 * _ellipse(lesion, scale, v / dy, u / dx)
    transform *= reconstruction_transfer(np.hypot(v, u)) * (lesion.contrast / (dy * dx))
    phase = np.exp(-2j * math.pi * (v * (y - first[0]) + u * (x - first[1])))
    patch = scipy.fft.irfft2(transform * phase, s=(height, width)).astype(np.float32)
    rows, columns = (slice(max(f, 0), min(f + n, side)) for f, n, side in zip(first, patch.shape, size, strict=True))
    inner = tuple(slice(part.start - f, part.stop - f) for part, f in zip((rows, columns), first, strict=True))
    return (rows, columns), patch[inner]


def lesion_slices(lesion: Lesion, depth: int, thickness: float) -> range:
    """The slices that a lesion touches, of a volume of `depth`."""
    reach = lesion.diameter / 2 / thickness + 0.5
    low, high = math.floor(lesion.centre[0] - reach) + 1, math.ceil(lesion.centre[0] + reach)
    return range(max(low, 0), min(high, depth))


def lesion_box(lesion: Lesion, z: int, spacing: tuple[float, float, float]) -> tuple[float, float, float, float] | None:
    """A lesion's box in one slice, (x1, y1, x2, y2) in pixels with pixel-edge coordinates; None beyond its ends."""
    thickness, dy, dx = spacing
    height = 2 * abs(z - lesion.centre[0]) * thickness / lesion.diameter
    if height >= 1:
        return None
    half_y, half_x = lesion.half_sides(math.sqrt(1 - height**2))
    y, x = lesion.centre[1] + 0.5, lesion.centre[2] + 0.5
    return x - half_x / dx, y - half_y / dy, x + half_x / dx, y + half_y / dy


def add_lesion(volume: NDArray, lesion: Lesion, spacing: tuple[float, float, float]) -> None:
    """Add a lesion to a volume [Z, H, W] of HU, integers or not, in place."""
    for z in lesion_slices(lesion, len(volume), spacing[0]):
        window, patch = lesion_signal(lesion, volume.shape[1:], spacing, z)
        changed = volume[z][window] + patch
        volume[z][window] = np.rint(changed) if volume.dtype.kind == "i" else changed


def _sections(lesion: Lesion, thickness: float, z: int | None) -> list[tuple[float, float]]:
    """The sections that a slice averages: their size over that of the largest, and their weight."""
    if z is None:
        return [(1.0, 1.0)]
    radius, offset = lesion.diameter / 2, (z - lesion.centre[0]) * thickness
    low, high = max(offset - thickness / 2, -radius), min(offset + thickness / 2, radius)
    if high <= low:
        return []
    heights = (low + high) / 2 + (high - low) / 2 * _NODES
    scales = np.sqrt(1 - (heights / radius) ** 2)
    return list(zip(scales.tolist(), ((high - low) / thickness / 2 * _WEIGHTS).tolist(), strict=True))


def _ellipse(lesion: Lesion, scale: float, v: NDArray, u: NDArray) -> NDArray:
    """Transform of an ellipse of height 1 and of the largest section's area, at cycles per mm."""
    (a, b), cos, sin = lesion.half_axes, math.cos(lesion.angle), math.sin(lesion.angle)
    argument = 2 * math.pi * scale * np.hypot(a * (u * cos + v * sin), b * (v * cos - u * sin))
    with np.errstate(invalid="ignore", divide="ignore"):
        return math.pi * a * b * np.where(argument > 0, 2 * j1(argument) / argument, 1.0)
