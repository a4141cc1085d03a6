"""What all kinds of phantoms have in common: their options, and the patients that they make."""

import abc
import dataclasses
import math
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from lidnet_fast.data.phantoms.canvas import Image, Window
from lidnet_fast.errors import InputError

Box = tuple[float, float, float, float]
"""(x1, y1, x2, y2) in pixel-edge coordinates."""

_VISIBLE = 0.4
"""Opacity from which a pixel belongs to a lesion's box."""

_MIN_SIDE = 3
"""Smallest side of a box, pixels."""


@dataclasses.dataclass(frozen=True)
class PhantomPatient:
    """A phantom patient.

    Attributes:
        volume: noise-free float32 [Z, S, S], HU.
        boxes: float32 [n, 5], rows (slice, x1, y1, x2, y2): each lesion's tight box in pixel-edge coordinates.
        annotated: bool [n]; False where the readers are taken to have missed or rejected the lesion.
    """

    volume: Image
    boxes: Image
    annotated: NDArray[np.bool_]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phantom(abc.ABC):
    """What patients of a kind consist of.

    Attributes:
        image_size: pixels per side; the field of view stays `field_of_view_mm`.
        slices: slices per patient.
        unannotated_fraction: share of the lesions that carry no annotation, as where readers disagree.
        distractors: structures like lesions that are none, per slice or per patient.

    Raises:
        InputError: a value is out of its range.
    """

    field_of_view_mm: ClassVar[float]
    slice_spacing_mm: ClassVar[float]
    body_part: ClassVar[str]
    """As DICOM's Body Part Examined has it."""

    image_size: int = 512
    slices: int = 4
    unannotated_fraction: float = 0.0
    distractors: int = 12

    def __post_init__(self) -> None:
        for name, smallest in (("image_size", 64), ("slices", 1), ("distractors", 0)):
            if getattr(self, name) < smallest:
                raise InputError(f"{name} must be at least {smallest}, got {getattr(self, name)}")
        self._check_fraction("unannotated_fraction")

    def _check_fraction(self, name: str) -> None:
        if not 0 <= getattr(self, name) <= 1:
            raise InputError(f"{name} must be in [0, 1], got {getattr(self, name)}")

    def _check_range(self, name: str) -> None:
        value = getattr(self, name)
        if len(value) != 2 or not 0 <= value[0] <= value[1]:
            raise InputError(f"{name} must be (fewest, most), got {value}")

    def _check_not_negative(self, name: str) -> None:
        if not 0 <= getattr(self, name) < math.inf:
            raise InputError(f"{name} must be finite and not negative, got {getattr(self, name)}")

    @property
    def pixel_spacing(self) -> float:
        """Side of a pixel in mm."""
        return self.field_of_view_mm / self.image_size

    @abc.abstractmethod
    def make_patient(self, rng: np.random.Generator) -> PhantomPatient:
        """Make a patient, a pure function of the generator's state and of these options."""


def tight_box(window: Window, opacity: Image) -> Box | None:
    """Return the box around the visible pixels of a window, or None if they are too few for a box."""
    seen = opacity > _VISIBLE
    rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
    if not len(rows) or min(rows[-1] - rows[0], columns[-1] - columns[0]) + 1 < _MIN_SIDE:
        return None
    y0, x0 = window[0].start, window[1].start
    return float(x0 + columns[0]), float(y0 + rows[0]), float(x0 + columns[-1] + 1), float(y0 + rows[-1] + 1)
