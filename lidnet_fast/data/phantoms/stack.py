"""Neighbouring slices of one patient, lesions that go through them, and what the phantoms made so have in common."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from lidnet_fast.data.phantoms.canvas import Canvas, Image, Shape
from lidnet_fast.data.phantoms.phantom import Box, Phantom, PhantomPatient, tight_box
from lidnet_fast.data.phantoms.solids import Ellipsoid, Point, Solid

_ATTEMPTS = 60
_IN_TISSUE = 0.85
"""Share of a lesion that has to lie in its organ."""

_FILLED = 0.7
"""Share of the slice's thickness, at least, that a lesion fills in its middle where it is painted and boxed."""

_GAP = 4
"""Pixels between the boxes of two lesions, at least."""

_LOBES = ((2, 0.06), (3, 0.10), (4, 0.06), (5, 0.05))
"""Harmonics of a lesion's outline and their greatest amplitudes."""


@dataclasses.dataclass(frozen=True)
class Stack:
    """The slices of a patient.

    Attributes:
        canvases: one per slice, all alike.
        tissue: per slice, opacity of what is seen of the organ [S, S].
        levels: z of the slices' middles, mm.
        thickness: of the slices, and the distance of neighbours, mm.
    """

    canvases: Sequence[Canvas]
    tissue: Sequence[Image]
    levels: Sequence[float]
    thickness: float

    def point(self, rng: np.random.Generator, least: float = 0.95, most: float = 1.0) -> Point | None:
        """Draw a point where the tissue's opacity is in a range; None where the slice drawn has none."""
        number = int(rng.integers(len(self.levels)))
        tissue, unit = self.tissue[number], self.canvases[number].unit
        inside = np.flatnonzero((tissue >= least) & (tissue <= most))
        if not len(inside):
            return None
        row, column = divmod(int(inside[rng.integers(len(inside))]), tissue.shape[1])
        z = self.levels[number] + rng.uniform(-0.5, 0.5) * self.thickness
        return (column + 0.5) * unit, (row + 0.5) * unit, z

    def sections(self, solid: Solid, softness: float) -> Iterator[tuple[int, Shape, Image]]:
        """Cut a body: slice, section as far as it is in the tissue, and its opacity regardless of it."""
        for number, (canvas, tissue, z) in enumerate(zip(self.canvases, self.tissue, self.levels, strict=True)):
            window, opacity = solid.cut(canvas, z, self.thickness, softness)
            if opacity.size:
                yield number, (window, opacity * tissue[window]), opacity

    def paint(self, solid: Solid, hu: float, softness: float = 1.2) -> None:
        """Paint a body as far as it is in the tissue."""
        for number, shape, _ in self.sections(solid, softness):
            self.canvases[number].paint(shape, hu)


@dataclasses.dataclass(frozen=True)
class Lesion:
    """A lesion in its place: the slices in which it is large enough to be boxed, its sections and boxes there."""

    body: Ellipsoid
    sections: tuple[tuple[int, Shape, Box], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StackPhantom(Phantom):
    """A phantom whose slices are neighbours, and cut the same lesions.

    Attributes:
        lesions: fewest and most lesions of a patient.
        distractors: per patient.
        texture: standard deviation of the organ's texture, HU.

    Raises:
        InputError: a value is out of its range.
    """

    slice_spacing_mm: ClassVar[float] = 3.0
    most_hu: ClassVar[float]
    """Of the densest bone."""

    slices: int = 6
    lesions: tuple[int, int] = (4, 8)
    texture: float

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_range("lesions")
        self._check_not_negative("texture")

    def _levels(self, rng: np.random.Generator, least: float, most: float) -> list[float]:
        """Draw the heights of the slices' middles between two heights, mm."""
        first = rng.uniform(least, max(most - self.slices * self.slice_spacing_mm, least))
        return [first + z * self.slice_spacing_mm for z in range(self.slices)]

    def _lesions(
        self, rng: np.random.Generator, stack: Stack, diameters: tuple[float, float]
    ) -> Iterator[tuple[float, Lesion]]:
        """Draw diameters, mm, and find a place for each lesion; those that find none are left out."""
        placed: list[Lesion] = []
        for _ in range(rng.integers(self.lesions[0], self.lesions[1] + 1)):
            diameter = rng.uniform(*diameters)
            lesion = place_lesion(rng, stack, diameter, rng.uniform(1.2, 2.5), placed)
            if lesion is not None:
                placed.append(lesion)
                yield diameter, lesion

    def _patient(self, rng: np.random.Generator, stack: Stack, lesions: Sequence[Lesion]) -> PhantomPatient:
        """Make the patient of painted slices."""
        boxes, annotated = boxes_of(lesions, rng.random(len(lesions)) >= self.unannotated_fraction)
        volume = np.stack([canvas.image for canvas in stack.canvases])
        return PhantomPatient(np.clip(volume, -1000, self.most_hu, out=volume), boxes, annotated)


def place_lesion(
    rng: np.random.Generator, stack: Stack, diameter: float, softness: float, placed: Sequence[Lesion]
) -> Lesion | None:
    """Find a free place in the tissue for a lobed body of a mean diameter in mm; None where there is none.

    Sections that are too small or too faint for a box are left out, so that all that is painted can be annotated.
    """
    stretch = rng.uniform(0.8, 1.25)
    axes = diameter / 2 * math.sqrt(stretch), diameter / 2 / math.sqrt(stretch), diameter / 2 * rng.uniform(0.8, 1.2)
    wobble = tuple((k, rng.uniform(0, most), rng.uniform(0, 2 * math.pi)) for k, most in _LOBES)
    angle, twist = rng.uniform(-0.6, 0.6), rng.uniform(-0.8, 0.8)
    for _ in range(_ATTEMPTS):
        centre = stack.point(rng)
        if centre is None:
            continue
        body = Ellipsoid(centre, axes, angle, wobble, twist)
        sections, seen, whole = [], 0.0, 0.0
        for number, shape, opacity in stack.sections(body, softness):
            box = tight_box(*shape)
            if box is not None and shape[1].max() >= _FILLED:
                sections.append((number, shape, box))
                seen += float(shape[1].sum())
                whole += float(opacity.sum())
        if sections and seen >= _IN_TISSUE * whole and not any(_touch(sections, other) for other in placed):
            return Lesion(body, tuple(sections))
    return None


def _touch(sections: Sequence[tuple[int, Shape, Box]], other: Lesion) -> bool:
    """Whether a lesion comes close to another in a slice or in its neighbours."""
    return any(
        abs(number - theirs) <= 1
        and box[0] < taken[2] + _GAP
        and taken[0] < box[2] + _GAP
        and box[1] < taken[3] + _GAP
        and taken[1] < box[3] + _GAP
        for number, _, box in sections
        for theirs, _, taken in other.sections
    )


def boxes_of(lesions: Sequence[Lesion], annotated: NDArray[np.bool_]) -> tuple[Image, NDArray[np.bool_]]:
    """Return the boxes of all lesions, float32 [n, 5] sorted by slice, and for each whether its lesion is annotated."""
    rows = sorted(
        (number, *box, known)
        for lesion, known in zip(lesions, annotated, strict=True)
        for number, _, box in lesion.sections
    )
    table = np.array(rows, dtype=np.float32).reshape(-1, 6)
    return table[:, :5], table[:, 5] > 0
