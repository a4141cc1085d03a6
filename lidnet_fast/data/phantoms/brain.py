"""The anatomy of the head phantoms: scalp, skull, and a folded brain with its ventricles, in space.

Places and lengths are in mm, places from the middle of the head: x to the patient's left, y to the back, z towards the
feet from the level of the third ventricle. Sources: thickness, length and breadth of the skull, Li et al., Int. J.
Vehicle Safety 2(4), 2007; its inner breadth, Polat et al., Int. J. Morphol. (129 and 135 mm); third ventricle, Open
Journal of Radiology 5(1), 2015, doi:10.4236/ojrad.2015.51003 (5.7 mm); grey matter 37 to 41 HU and white matter
30 to 34 HU, Radiopaedia, "Cerebral haemorrhagic contusion"; their difference of 7 HU, Nakamura et al., Advances in
Computed Tomography 8(2), 2019. All else is our choice.
"""

import dataclasses
import math

import numpy as np

from lidnet_fast.data.phantoms.canvas import Canvas, Image, Shape, Wobble, soft, texture
from lidnet_fast.data.phantoms.solids import Ellipsoid, Part, Point, Solid

SIDE_MM = 230.0
"""Field of view."""

CSF = 7.0
_BLOOD = (50.0, 62.0)
"""HU of flowing blood and of the falx."""

_MIDDLE = SIDE_MM / 2


@dataclasses.dataclass(frozen=True)
class Folds:
    """The brain's sulci: where a random field of waves of one length vanishes, near the surface.

    Such a field's zeros are winding sheets, about half a wave apart: banks of grey matter with fluid in between.

    Attributes:
        waves: wave vectors [n, 3], 1/mm.
        phases: [n].
        width: of the fluid at the surface, mm.
        depth: to which sulci reach, mm.
    """

    waves: Image
    phases: Image
    width: float
    depth: float

    @classmethod
    def make(cls, rng: np.random.Generator) -> "Folds":
        """Draw a brain's folds."""
        directions = rng.normal(size=(20, 3)) * (1, 1, 0.7)
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        waves = directions * (2 * math.pi / rng.uniform(19, 24))
        phases = rng.uniform(0, 2 * math.pi, 20)
        return cls(waves.astype(np.float32), phases.astype(np.float32), rng.uniform(0.8, 2.2), rng.uniform(13, 19))

    def distance(self, x: Image, y: Image, z: float) -> Image:
        """Return about how far points are from the middle of a sulcus, mm: the field over its slope."""
        field, slope_x, slope_y = (np.zeros(np.broadcast_shapes(x.shape, y.shape), np.float32) for _ in range(3))
        for (kx, ky, kz), phase in zip(self.waves.tolist(), self.phases.tolist(), strict=True):
            angle = kx * x + ky * y + (kz * z + phase)
            field += np.sin(angle)
            cosine = np.cos(angle)
            slope_x += kx * cosine
            slope_y += ky * cosine
        return (np.abs(field) / np.maximum(np.hypot(slope_x, slope_y), 0.15)).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Head:
    """One patient; `make` draws one.

    Attributes:
        inside: half axes of the skull's inside.
        turn: by which the head is turned, radians.
        grey: HU of grey matter.
        white: HU of white matter.
        skull: scalp, bone and the fluid beneath, from the outside to the inside.
        brain: the cerebrum's outline.
        folds: its sulci.
        parts: what lies in the skull, in the order in which it is painted over the cerebrum.
    """

    inside: Point
    turn: float
    grey: float
    white: float
    skull: tuple[Part, ...]
    brain: Ellipsoid
    folds: Folds
    parts: tuple[Part, ...]

    @classmethod
    def make(cls, rng: np.random.Generator) -> "Head":
        """Draw a patient."""
        u = rng.uniform
        inside = (u(64, 68), u(78, 84), u(70, 76))
        grey, white = u(37, 41), u(30, 33)
        wobble = ((2, 0.01, u(0, 2 * math.pi)), (3, 0.015, -math.pi / 2), (4, 0.012, u(0, 2 * math.pi)))
        gap = u(1.0, 2.2)
        return cls(
            inside,
            u(-0.12, 0.12),
            grey,
            white,
            tuple(_skull(rng, inside, wobble)),
            Ellipsoid((0, 0, 0), (inside[0] - gap, inside[1] - gap, inside[2] - gap), 0, wobble),
            Folds.make(rng),
            (*_midline(rng, inside, grey), *_deep_brain(rng, grey), *_calcifications(rng)),
        )

    def paint(
        self, rng: np.random.Generator, size: int, z: float, thickness: float, grain: float
    ) -> tuple[Canvas, Image]:
        """Paint a slice.

        Args:
            rng: draws the texture.
            size: pixels per side, S.
            z: middle of the slice, mm.
            thickness: of the slice, mm.
            grain: standard deviation of the brain's texture, HU.

        Returns:
            The slice, in mm, and the opacity [S, S] of the grey and white matter.
        """
        canvas = Canvas(size, SIDE_MM)
        inside = np.zeros_like(canvas.image)
        for part in self.skull:
            window, opacity = self._cut(part.solid, canvas, z, thickness, part.softness)
            canvas.paint((window, opacity), part.hu)
        inside[window] = opacity
        matter = self._paint_cerebrum(canvas, z, thickness)
        for part in self.parts:
            window, opacity = self._cut(part.solid, canvas, z, thickness, part.softness)
            opacity = opacity * inside[window]
            canvas.paint((window, opacity), part.hu)
            matter[window] += opacity * (part.hosts - matter[window])
        field = texture(rng, size)
        canvas.image += field * (grain * (canvas.image > -50) + 60 * (canvas.image > 300))
        return canvas, matter

    def _cut(self, solid: Solid, canvas: Canvas, z: float, thickness: float, softness: float) -> Shape:
        return solid.moved(_MIDDLE, _MIDDLE, self.turn).cut(canvas, z, thickness, softness)

    def _paint_cerebrum(self, canvas: Canvas, z: float, thickness: float) -> Image:
        """Paint grey and white matter and the fluid in the sulci; return the matter's opacity."""
        window, brain = self._cut(self.brain, canvas, z, thickness, 1.4)
        gx, gy = canvas.grid(window)
        a, b, c = self.brain.axes
        cos, sin = math.cos(self.turn), math.sin(self.turn)
        x, y = (gx - _MIDDLE) * cos + (gy - _MIDDLE) * sin, (gy - _MIDDLE) * cos - (gx - _MIDDLE) * sin
        depth = (1 - np.sqrt((x / a) ** 2 + (y / b) ** 2 + (z / c) ** 2)) * np.float32(0.5 * (a + b))
        away = self.folds.distance(x, y, z)
        reach = np.clip(1 - depth / self.folds.depth, 0, 1)
        white = soft(depth - 4, 1.8) * (1 - soft(3.2 - away, 1.8) * soft(self.folds.depth + 3 - depth, 3))
        fluid = soft(self.folds.width / 2 * reach - away, 1.4) * soft(self.folds.depth - depth, 4)
        canvas.paint((window, brain), np.float32(self.grey) + np.float32(self.white - self.grey) * white)
        canvas.paint((window, brain * fluid), CSF + 4)
        matter = np.zeros_like(canvas.image)
        matter[window] = brain * (1 - fluid)
        return matter


def _skull(rng: np.random.Generator, inside: Point, wobble: Wobble) -> list[Part]:
    """Scalp, and a skull of two tables with spongy bone between them."""
    a, b, c = inside
    side, end = rng.uniform(4.6, 6.4), rng.uniform(6.0, 8.4)

    def shell(share: float, scalp: float, hu: float, softness: float = 1.2) -> Part:
        axes = (a + share * side + scalp, b + share * end + scalp, c + share * side + scalp)
        return Part(Ellipsoid((0, 0, 0), axes, 0, wobble), hu, softness)

    fat = rng.uniform(2.5, 5)
    return [
        shell(1, fat + 4, 25),
        shell(1, fat + 1.5, -75),
        shell(1, 1.2, 45),
        shell(1, 0, 1150),
        shell(0.72, 0, rng.uniform(450, 700), 2),
        shell(0.28, 0, 1150, 1.5),
        shell(0, 0, CSF),
    ]


def _midline(rng: np.random.Generator, inside: Point, grey: float) -> list[Part]:
    """The cleft between the hemispheres with the falx in it, and the sinus behind it."""
    _, b, c = inside
    parts = []
    sheets = (
        ((0.0, -0.62 * b, -12.0), (0.34 * b, 66.0)),
        ((0.0, 0.66 * b, -18.0), (0.32 * b, 56.0)),
        ((0.0, 0.0, -58.0), (b, 36.0)),
    )
    for centre, (along, high) in sheets:
        parts.append(Part(Ellipsoid(centre, (4.6, along + 2, high)), grey, 1.8, hosts=True))
    for centre, (along, high) in sheets:
        parts.append(Part(Ellipsoid(centre, (rng.uniform(1.0, 1.8), along, high)), CSF + 4, 1.4))
    falx = rng.uniform(*_BLOOD)
    for centre, (along, high) in sheets:
        parts.append(Part(Ellipsoid(centre, (0.6, along, high)), falx, 1.0))
    parts.append(Part(Ellipsoid((0, b - 2.5, 0), (4.5, 3.0, c)), falx))
    return parts


def _deep_brain(rng: np.random.Generator, grey: float) -> list[Part]:
    """Basal ganglia, thalamus and insula; ventricles, cisterns and the lateral fissure."""
    u = rng.uniform
    wide = u(0.8, 1.35)
    parts: list[Part] = []

    def pair(
        hu: float, centre: Point, axes: Point, angle: float = 0, softness: float = 1.4, hosts: bool = False
    ) -> None:
        for side in (-1, 1):
            x, y, z = centre
            body = Ellipsoid((side * x + u(-0.7, 0.7), y + u(-1, 1), z + u(-1, 1)), axes, side * angle)
            parts.append(Part(body, hu, softness, hosts))

    def single(hu: float, centre: Point, axes: Point, softness: float = 1.4) -> None:
        parts.append(Part(Ellipsoid(centre, axes), hu, softness))

    pair(grey, (15, -22, -3), (5.5, 11, 15), 0.3, 2, hosts=True)  # caudate
    pair(grey, (11, 5, 3), (9, 14, 11), -0.4, 2, hosts=True)  # thalamus
    pair(grey, (26, -7, 3), (6, 16, 11), -0.25, 2, hosts=True)  # lentiform nucleus
    pair(grey, (38, -6, 4), (3.4, 22, 18), -0.1, 2, hosts=True)  # insula
    pair(CSF + 5, (41, -7, 5), (1.2 * wide, 17, 16), -0.12, 2.4)  # the fissure around it
    pair(CSF + 5, (51, -13, 7), (12, 1.5 * wide, 13), 0.25, 2.4)
    pair(CSF, (9, -26, -6), (3.6 * wide, 14, 15), 0.35)  # frontal horns
    pair(CSF, (11, 0, -21), (4.8 * wide, 30, 9), 0.16)  # bodies
    pair(CSF, (23, 31, -6), (6 * wide, 14, 13), -0.5)  # atria
    single(CSF, (0, 3, 5), (2.6 * wide, 13, 14))  # third ventricle
    single(CSF, (0, 29, 9), (7.5, 4.5, 8))  # cistern behind it
    return parts


def _calcifications(rng: np.random.Generator) -> list[Part]:
    """Calcium that is no disease: pineal gland in 71 % of adults, choroid plexus in 66 %.

    Daghighi et al., Folia Morphologica 66(2), 2007.
    """
    u = rng.uniform
    parts = []
    if rng.random() < 0.71:
        parts.append(Part(Ellipsoid((u(-1, 1), 23 + u(-2, 2), 5), (u(1.4, 2.8), u(1.4, 3), u(2, 4))), u(120, 400)))
    if rng.random() < 0.66:
        for side in (-1, 1):
            centre = (side * 23 + u(-2, 2), 33 + u(-4, 4), -5 + u(-3, 3))
            parts.append(Part(Ellipsoid(centre, (u(1.5, 3.5), u(2, 5), u(2, 6)), side * 0.5), u(90, 300), 2))
    return parts
