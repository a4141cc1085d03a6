"""Chest-like CT phantoms: axial slices in HU with lungs, vessels, airways, bones, and nodules of LIDC sizes and places.

Not anatomy to learn medicine from, but a study whose ground truth is known exactly. It is hard in the ways real CT is
hard for a lesion detector: vessels cut across, nodules at the pleura, faint ground glass, textured lungs.
"""

import dataclasses
import math
from typing import ClassVar

import numpy as np

from lidnet_fast.data.phantoms import lidc
from lidnet_fast.data.phantoms.canvas import BASE, Image, Wobble
from lidnet_fast.data.phantoms.chest_anatomy import Anatomy, Chest, Polar, lung_points, make_chest, paint_airway
from lidnet_fast.data.phantoms.phantom import Phantom, PhantomPatient, tight_box
from lidnet_fast.errors import InputError

_IN_LUNG = 0.7
"""Share of a lesion that has to lie in the lung; the rest is hidden by the wall it touches."""

_SPICULATED_FROM = 8
"""Shorter side from which a solid nodule may have spicules; on smaller ones they would be all one sees."""

_ATTEMPTS = 200
"""Places tried for a lesion before it is given up (most of the table's places are in some lung, not in any lung)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChestPhantom(Phantom):
    """A chest with nodules; slices share a body and differ in level, vessels and nodules.

    Sizes and places of nodules follow the LIDC-IDRI table (sections that two readers or more outlined); a slice may
    hold fewer than drawn where no free place in the lung was found. Distractors are vessels and airways cut across,
    pleural tags and small calcifications.

    Attributes:
        lesions_per_slice: fewest and most lesions of a slice.
        distractors: per slice.
        ground_glass_fraction: share of the lesions that are ground-glass or part-solid; the others are solid.
        vessel_trees: vessel trees per lung.
        texture: standard deviation of the lung parenchyma's texture, HU.

    Raises:
        InputError: a value is out of its range.
    """

    field_of_view_mm: ClassVar[float] = 358.4  # 512 pixels of 0.7 mm, the median pixel of LIDC-IDRI
    slice_spacing_mm: ClassVar[float] = 5.0
    body_part: ClassVar[str] = "CHEST"

    lesions_per_slice: tuple[int, int] = (1, 3)
    ground_glass_fraction: float = 0.4
    vessel_trees: int = 5
    texture: float = 18.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vessel_trees < 0:
            raise InputError(f"vessel_trees must be at least 0, got {self.vessel_trees}")
        self._check_fraction("ground_glass_fraction")
        self._check_range("lesions_per_slice")
        self._check_not_negative("texture")

    def make_patient(self, rng: np.random.Generator) -> PhantomPatient:
        """Make a patient, a pure function of the generator's state and of these options."""
        anatomy = Anatomy.make(rng)
        size = self.image_size
        polar = Polar(anatomy, size)
        first, last = rng.uniform(0.0, 0.3), rng.uniform(0.7, 1.0)
        volume = np.empty((self.slices, size, size), dtype=np.float32)
        boxes: list[tuple[float, ...]] = []
        for z in range(self.slices):
            level = first + (last - first) * (z + 0.5) / self.slices
            chest = make_chest(rng, anatomy, polar, size, level, self.vessel_trees, self.texture)
            _paint_distractors(rng, chest, self.distractors)
            fewest, most = self.lesions_per_slice
            placed: list[tuple[float, ...]] = []
            for _ in range(rng.integers(fewest, most + 1)):
                box = _paint_lesion(rng, chest, placed, self.ground_glass_fraction)
                if box is not None:
                    placed.append(box)
            boxes += [(z, *box) for box in placed]
            np.clip(chest.canvas.image, -1000, 1500, out=volume[z])
        annotated = rng.random(len(boxes)) >= self.unannotated_fraction
        return PhantomPatient(volume, np.array(boxes, dtype=np.float32).reshape(-1, 5), annotated)


def _paint_distractors(rng: np.random.Generator, chest: Chest, count: int) -> None:
    """Paint what a detector could take for a nodule: in its size and density, but not in its company or shape."""
    canvas = chest.canvas
    kinds = rng.choice(4, size=count, p=(0.55, 0.2, 0.15, 0.1))
    for kind, (x, y) in zip(kinds, lung_points(rng, chest, count), strict=False):
        angle = rng.uniform(0, 2 * math.pi)
        cos, sin = math.cos(angle), math.sin(angle)
        if kind == 0:  # a vessel cut across; it leaves the slice as a thinner stretch
            radius = rng.uniform(1.4, 3.4)
            window, mask = canvas.ellipse(x, y, radius * rng.uniform(1.2, 1.9), radius, angle)
            canvas.paint((window, mask * chest.lung[window]), chest.blood - 15)
            length = rng.uniform(3, 9) + radius
            window, mask = canvas.segment((x, y), (x + length * cos, y + length * sin), (radius * 0.75, 0.6))
            canvas.paint((window, mask * chest.lung[window]), chest.blood - 15)
        elif kind == 1:  # an artery next to its bronchus
            radius = rng.uniform(1.6, 3.2)
            paint_airway(rng, chest, (x + 2.1 * radius * cos, y + 2.1 * radius * sin), radius * 0.8)
            canvas.paint(canvas.ellipse(x, y, radius, radius), chest.blood - 15)
        elif kind == 2:  # a pleural tag or a scar: a thin line with a knot
            length = rng.uniform(8, 20)
            window, mask = canvas.segment((x, y), (x + length * cos, y + length * sin), (1.2, 0.6))
            canvas.paint((window, mask * chest.lung[window]), -120)
        else:  # a calcified granuloma
            radius = rng.uniform(1.2, 2.4)
            canvas.paint(canvas.ellipse(x, y, radius, radius * rng.uniform(0.8, 1)), rng.uniform(350, 900))


def _paint_lesion(
    rng: np.random.Generator, chest: Chest, placed: list[tuple[float, ...]], ground_glass_fraction: float
) -> tuple[float, ...] | None:
    """Paint a nodule where there is room for it; return its box in pixels, or None if no place was found."""
    canvas, geometry = chest.canvas, lidc.lesion_geometry()
    width, height = geometry[rng.integers(len(geometry)), :2].tolist()
    kind = (
        "solid" if rng.random() >= ground_glass_fraction else rng.choice(("ground glass", "part solid"), p=(0.7, 0.3))
    )
    lobes: Wobble = tuple((k, rng.uniform(0, most), rng.uniform(0, 2 * math.pi)) for k, most in _LOBES)
    softness = rng.uniform(1.2, 2.2) if kind == "solid" else rng.uniform(2, 4)
    # A turned ellipse fills less of its box than an upright one: only nearly round ones are turned.
    angle = rng.uniform(-0.6, 0.6) if 0.77 < width / height < 1.3 else 0.0
    for _ in range(_ATTEMPTS):
        place = geometry[rng.integers(len(geometry)), 2:] * (BASE / lidc.IMAGE_SIZE)
        x, y = (place + rng.uniform(-4, 4, 2)).tolist()
        window, mask = canvas.ellipse(x, y, width / 2, height / 2, angle, wobble=lobes, softness=softness)
        visible = mask * chest.lung[window]
        if not mask.size or visible.sum() < _IN_LUNG * mask.sum():
            continue
        box = tight_box(window, visible)
        if box is not None and not any(_near(box, other) for other in placed):
            break
    else:
        return None
    if kind == "solid":
        _paint_dense(canvas.image[window], visible, rng.uniform(-80, 70))
        if min(width, height) >= _SPICULATED_FROM and rng.random() < 0.35:
            _paint_spicules(rng, chest, (x, y), (width, height))
    else:
        grain = 40 * chest.texture[window]
        _paint_dense(canvas.image[window], visible, rng.uniform(-680, -480) + grain)
        if kind == "part solid":
            part, core = canvas.ellipse(x, y, width * 0.22, height * 0.22, wobble=lobes)
            _paint_dense(canvas.image[part], core * chest.lung[part], rng.uniform(-120, 40))
    return box


_LOBES = ((2, 0.05), (3, 0.09), (4, 0.05), (5, 0.05), (7, 0.03))
"""Harmonics of a nodule's outline and their greatest amplitudes."""


def _paint_dense(part: Image, opacity: Image, hu: float | Image) -> None:
    """Paint ``hu`` where it is denser than what is there: vessels show through ground glass."""
    part += opacity * np.maximum(hu - part, 0)


def _paint_spicules(
    rng: np.random.Generator, chest: Chest, centre: tuple[float, float], sides: tuple[float, float]
) -> None:
    """Paint fine strands that radiate from a nodule; they don't count for its box, as readers leave them out."""
    for _ in range(rng.integers(4, 9)):
        angle = rng.uniform(0, 2 * math.pi)
        cos, sin = math.cos(angle), math.sin(angle)
        x, y = centre[0] + 0.45 * sides[0] * cos, centre[1] + 0.45 * sides[1] * sin
        length = rng.uniform(0.15, 0.4) * max(sides)
        window, mask = chest.canvas.segment((x, y), (x + length * cos, y + length * sin), (1.1, 0.5))
        _paint_dense(chest.canvas.image[window], mask * chest.lung[window], -150)


def _near(box: tuple[float, ...], other: tuple[float, ...]) -> bool:
    """Whether two boxes come closer than four pixels."""
    gap = 4
    return box[0] < other[2] + gap and other[0] < box[2] + gap and box[1] < other[3] + gap and other[1] < box[3] + gap
