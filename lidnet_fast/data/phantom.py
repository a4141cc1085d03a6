"""Chest-like CT phantoms: axial slices in HU with lungs, vessels, airways, bones, and nodules of LIDC sizes and places.

Not anatomy to learn medicine from: a study whose ground truth is known exactly, hard in the ways real CT is hard for a
lesion detector (vessels cut across, nodules at the pleura, faint ground glass, textured lungs).
"""

import dataclasses
import math

import numpy as np
import scipy.fft
from numpy.typing import NDArray

from lidnet_fast.data import lidc

FIELD_OF_VIEW_MM = 358.4
"""Side of the phantom's slices: 512 pixels of 0.7 mm, the median pixel of LIDC-IDRI."""

_BASE = 512
"""Anatomy is laid out in units of 1/512 of the slice's side; they are pixels at the default image size."""

_VISIBLE = 0.4
"""Opacity from which a pixel belongs to a lesion's box."""

Image = NDArray[np.float32]
Wobble = tuple[tuple[int, float, float], ...]


@dataclasses.dataclass(frozen=True)
class PhantomOptions:
    """What a phantom patient consists of.

    Attributes:
        image_size: pixels per side; the field of view stays ``FIELD_OF_VIEW_MM``.
        slices: slices per patient.
        lesions_per_slice: fewest and most lesions of a slice.
        ground_glass_fraction: share of the lesions that are ground-glass or part-solid, the others are solid.
        unannotated_fraction: share of the lesions that carry no annotation, as where readers disagree.
        vessel_trees: vessel trees per lung.
        distractors: nodule-like structures per slice that are not lesions (vessels and airways cut across, pleural
            tags, small calcifications).
        texture: standard deviation of the lung parenchyma's texture, HU.

    Raises:
        ValueError: a value is out of its range.
    """

    image_size: int = 512
    slices: int = 4
    lesions_per_slice: tuple[int, int] = (1, 3)
    ground_glass_fraction: float = 0.4
    unannotated_fraction: float = 0.0
    vessel_trees: int = 5
    distractors: int = 12
    texture: float = 18.0

    def __post_init__(self) -> None:
        for name, smallest in (("image_size", 64), ("slices", 1), ("vessel_trees", 0), ("distractors", 0)):
            if getattr(self, name) < smallest:
                raise ValueError(f"{name} must be at least {smallest}, got {getattr(self, name)}")
        for name in ("ground_glass_fraction", "unannotated_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if len(self.lesions_per_slice) != 2 or not 0 <= self.lesions_per_slice[0] <= self.lesions_per_slice[1]:
            raise ValueError(f"lesions_per_slice must be (fewest, most), got {self.lesions_per_slice}")
        if not (math.isfinite(self.texture) and self.texture >= 0):
            raise ValueError(f"texture must be finite and not negative, got {self.texture}")

    @property
    def pixel_spacing(self) -> float:
        """Side of a pixel in mm."""
        return FIELD_OF_VIEW_MM / self.image_size


@dataclasses.dataclass(frozen=True)
class PhantomPatient:
    """A phantom patient.

    Attributes:
        volume: noise-free float32 [Z, S, S], HU.
        boxes: float32 [n, 5], rows (slice, x1, y1, x2, y2): every lesion's tight box in pixel-edge coordinates.
        annotated: bool [n]; False where the readers are taken to have missed or rejected the lesion.
    """

    volume: Image
    boxes: Image
    annotated: NDArray[np.bool_]


class _Canvas:
    """A square slice on which soft-edged shapes are drawn; coordinates and lengths in 1/512 of its side."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.unit = _BASE / size
        self.image: Image = np.full((size, size), -1000, dtype=np.float32)

    def window(self, x: float, y: float, reach_x: float, reach_y: float) -> tuple[slice, slice]:
        """Return the rows and columns within the given reach of a point, clipped to the slice (maybe empty)."""

        def span(centre: float, reach: float) -> slice:
            low = math.floor((centre - reach) / self.unit)
            high = math.ceil((centre + reach) / self.unit) + 1
            return slice(min(max(low, 0), self.size), min(max(high, 0), self.size))

        return span(y, reach_y), span(x, reach_x)

    def grid(self, window: tuple[slice, slice]) -> tuple[Image, Image]:
        """Return the x [1, w] and y [h, 1] of the window's pixel centres."""
        rows, columns = window
        x = (np.arange(columns.start, columns.stop, dtype=np.float32) + 0.5) * np.float32(self.unit)
        y = (np.arange(rows.start, rows.stop, dtype=np.float32) + 0.5) * np.float32(self.unit)
        return x[None, :], y[:, None]

    def blend(self, window: tuple[slice, slice], mask: Image, hu: float | Image) -> None:
        """Paint ``hu`` over the window with opacity ``mask``."""
        part = self.image[window]
        part += mask * (hu - part)


def _soft(inside: Image, softness: float) -> Image:
    """Opacity of an edge: 1 well inside, 0 well outside, linear over ``softness`` around distance 0."""
    return np.clip(inside / np.float32(softness) + np.float32(0.5), 0, 1)


def _ellipse(
    canvas: _Canvas,
    x: float,
    y: float,
    a: float,
    b: float,
    angle: float = 0.0,
    *,
    wobble: Wobble = (),
    softness: float = 1.4,
    power: float = 2.0,
) -> tuple[tuple[slice, slice], Image]:
    """Return window and opacity of a (super)ellipse with half axes a, b whose radius varies by ``wobble``.

    ``wobble`` holds (k, amplitude, phase): the radius is multiplied by 1 + sum amplitude * cos(k * theta + phase).
    """
    cos, sin = math.cos(angle), math.sin(angle)
    grow = 1 + sum(abs(amplitude) for _, amplitude, _ in wobble)
    pad = softness + 2 * canvas.unit
    window = canvas.window(
        x, y, (abs(a * cos) + abs(b * sin)) * grow + pad, (abs(a * sin) + abs(b * cos)) * grow + pad
    )
    gx, gy = canvas.grid(window)
    u = ((gx - x) * cos + (gy - y) * sin) * np.float32(1 / a)
    v = ((gy - y) * cos - (gx - x) * sin) * np.float32(1 / b)
    radius = np.sqrt(u * u + v * v) if power == 2 else (np.abs(u) ** power + np.abs(v) ** power) ** (1 / power)
    if wobble:
        theta = np.arctan2(v, u)
        radius = radius / (1 + sum(amplitude * np.cos(k * theta + phase) for k, amplitude, phase in wobble))
    return window, _soft((1 - radius) * np.float32(min(a, b)), softness).astype(np.float32, copy=False)
