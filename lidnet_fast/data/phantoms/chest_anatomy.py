"""The anatomy of the chest phantoms: body wall, bones, mediastinum and lungs with their vessels and airways.

Units are the canvas's: pixels of 0.7 mm at the default size.
"""

import dataclasses
import math

import numpy as np

from lidnet_fast.data.phantoms.canvas import Canvas, Image, soft, texture
from lidnet_fast.data.phantoms.trunk import paint_couch, paint_vertebra

_BINS = 720
"""Directions for which the tables of the body wall hold a value."""


@dataclasses.dataclass(frozen=True)
class Anatomy:
    """What the slices of one patient have in common; ``make`` draws one.

    Attributes:
        centre: of the chest.
        cavity: half axes of the rib cage's inside.
        power: exponent of its superellipse.
        muscle: thickness of the muscle around it.
        fat: thickness of the fat beneath the skin.
        contrast: HU that a contrast agent adds to blood.
        lung: HU of the aerated lung.
        ribs: number of ribs cut by a slice.
        heart: scale of the heart.
        phases: of the small irregularities of outlines.
    """

    centre: tuple[float, float]
    cavity: tuple[float, float]
    power: float
    muscle: float
    fat: float
    contrast: float
    lung: float
    ribs: int
    heart: float
    phases: tuple[float, ...]

    @classmethod
    def make(cls, rng: np.random.Generator) -> "Anatomy":
        """Draw a patient."""
        u = rng.uniform
        return cls(
            centre=(256 + u(-6, 6), 248 + u(-6, 6)),
            cavity=(u(164, 184), u(122, 138)),
            power=u(2.2, 2.5),
            muscle=u(15, 20),
            fat=u(8, 22),
            contrast=float(rng.random() < 0.5) * u(60, 180),
            lung=u(-875, -825),
            ribs=int(rng.integers(11, 15)),
            heart=u(0.9, 1.1),
            phases=tuple(u(0, 2 * math.pi, 8).tolist()),
        )


@dataclasses.dataclass(frozen=True)
class Chest:
    """A slice on which everything but nodules and their mimics is painted.

    Attributes:
        canvas: the slice.
        lung: opacity of the lungs [S, S].
        texture: the slice's unit random field [S, S].
        blood: HU of vessels.
        hila: where vessels and airways enter the right and the left lung (x, y).
    """

    canvas: Canvas
    lung: Image
    texture: Image
    blood: float
    hila: tuple[tuple[float, float], tuple[float, float]]


class Polar:
    """Distance and direction of every pixel from a patient's centre; shared by the patient's slices."""

    def __init__(self, anatomy: Anatomy, size: int) -> None:
        canvas = Canvas(size)
        x, y = canvas.grid((slice(0, size), slice(0, size)))
        dx, dy = x - anatomy.centre[0], y - anatomy.centre[1]
        self.radius: Image = np.hypot(dx, dy)
        turn = np.arctan2(dy, dx) * (_BINS / (2 * math.pi))
        self.bin = turn.astype(np.int32) % _BINS
        self.theta = np.arange(_BINS, dtype=np.float32) * np.float32(2 * math.pi / _BINS)


def make_chest(
    rng: np.random.Generator, anatomy: Anatomy, polar: Polar, size: int, level: float, trees: int, grain: float
) -> Chest:
    """Paint one slice of a patient.

    Args:
        rng: draws what is the slice's own (ribs, vessels, airways, texture).
        anatomy: the patient.
        polar: of the same patient and size.
        size: pixels per side, S.
        level: where the slice lies, from 0 (aortic arch) to 1 (ventricles).
        trees: vessel trees per lung.
        grain: standard deviation of the lung's texture, HU.
    """
    canvas = Canvas(size)
    field = texture(rng, size)
    cavity = _paint_wall(rng, canvas, anatomy, polar, level)
    everything = (slice(0, size), slice(0, size))
    depth = (canvas.grid(everything)[1] - anatomy.centre[1]) / anatomy.cavity[1]
    mediastinum = _mediastinum(canvas, anatomy, level)
    lung = cavity * (1 - mediastinum)
    canvas.image += 5 * field * (canvas.image > -200)
    canvas.paint((everything, cavity * mediastinum), -75)
    canvas.paint((everything, lung), anatomy.lung + 35 * depth + grain * field)
    blood = 45 + anatomy.contrast
    _paint_organs(rng, canvas, anatomy, level)
    spine = anatomy.centre[0], anatomy.centre[1] + anatomy.cavity[1] * 0.80
    paint_vertebra(canvas, *spine, marrow=rng.uniform(140, 210))
    hila = tuple((anatomy.centre[0] + side * 46, anatomy.centre[1] + 6.0) for side in (-1, 1))
    chest = Chest(canvas, lung, field, blood, (hila[0], hila[1]))
    _paint_vessels(rng, chest, trees)
    _paint_airways(rng, chest)
    return chest


def _cavity_radius(anatomy: Anatomy, theta: Image, level: float) -> Image:
    """Inner radius of the rib cage in each direction."""
    scale = 0.94 + 0.06 * level
    a, b = anatomy.cavity[0] * scale, anatomy.cavity[1] * (0.95 + 0.05 * level)
    p = anatomy.power
    radius = ((np.abs(np.cos(theta)) / a) ** p + (np.abs(np.sin(theta)) / b) ** p) ** (-1 / p)
    phases = anatomy.phases
    wave = 0.012 * np.cos(3 * theta + phases[0]) + 0.01 * np.cos(5 * theta + phases[1] + level)
    # The breast bone and the vertebrae indent the cage.
    dent = 0.10 * np.exp(-(((theta - 1.5 * math.pi) / 0.22) ** 2))
    return (radius * (1 + wave - dent)).astype(np.float32)


def _paint_wall(rng: np.random.Generator, canvas: Canvas, anatomy: Anatomy, polar: Polar, level: float) -> Image:
    """Paint couch, skin, fat, muscle and ribs; return the opacity of the rib cage's inside."""
    theta, bins = polar.theta, polar.bin
    everything = (slice(0, canvas.size), slice(0, canvas.size))
    inner = _cavity_radius(anatomy, theta, level)
    back, side = np.sin(theta), np.abs(np.cos(theta))
    phases = anatomy.phases
    muscle = anatomy.muscle * (1 + 0.45 * np.clip(back, 0, 1) + 0.5 * side * np.exp(-((back - 0.35) ** 2) / 0.1))
    muscle += 2.5 * np.cos(4 * theta + phases[2]) + (10 - 8 * level) * np.exp(
        -((np.abs(np.cos(theta)) - 0.7) ** 2) / 0.05
    )
    fat = anatomy.fat * (1 + 0.3 * math.cos(phases[3]) * np.cos(2 * theta) + 0.08 * np.cos(3 * theta + phases[4]))
    outside = polar.radius - inner[bins]
    skin = (muscle + fat + 3).astype(np.float32)[bins] - outside
    bottom = anatomy.centre[1] + float((inner + muscle + fat + 3)[_BINS // 4]) + 4
    paint_couch(canvas, bottom)
    canvas.paint((everything, soft(skin, 1.4)), 20)
    canvas.paint((everything, soft(skin - 2.2, 1.4)), -105)
    within = muscle.astype(np.float32)[bins] - outside
    canvas.paint((everything, soft(within, 1.6)), 52)
    # Fat between the muscles of the wall, wherever a slow wave of the direction is high.
    plane = np.clip(np.cos(5 * theta + phases[5]) + 0.6 * np.cos(9 * theta + phases[6]), 0, 1).astype(np.float32)[bins]
    canvas.paint((everything, plane * soft(1.6 - np.abs(outside - 13), 1.6)), -85)
    outline = np.zeros(_BINS, dtype=np.float32)
    marrow = np.zeros(_BINS, dtype=np.float32)
    for rib in range(anatomy.ribs):
        middle = (rib + 0.5 + rng.uniform(-0.2, 0.2)) * 2 * math.pi / anatomy.ribs
        half = rng.uniform(0.05, 0.14)
        away = np.abs((theta - middle + math.pi) % (2 * math.pi) - math.pi)
        outline = np.maximum(outline, np.sqrt(np.clip(1 - (away / half) ** 2, 0, 1)))
        marrow = np.maximum(marrow, np.sqrt(np.clip(1 - (away / (half * 0.8)) ** 2, 0, 1)))
    from_rib = np.abs(outside - 6.5)
    canvas.paint((everything, soft(4.6 * outline.astype(np.float32)[bins] - from_rib - 0.5, 1.4)), 620)
    canvas.paint((everything, soft(2.9 * marrow.astype(np.float32)[bins] - from_rib - 0.5, 1.4)), 230)
    x, y = anatomy.centre
    front = y - float(inner[_BINS * 3 // 4])
    canvas.paint(canvas.ellipse(x, front - 7, 24, 6.5), 450)
    canvas.paint(canvas.ellipse(x, front - 7, 22, 4.5), 170)
    if level < 0.6:
        for sign in (-1, 1):
            angle = sign * rng.uniform(0.9, 1.1)
            blade = (x + sign * anatomy.cavity[0] * 0.86, y + anatomy.cavity[1] * 0.86)
            canvas.paint(canvas.ellipse(*blade, 30 * (1 - level), 3.4, -angle + sign * 0.15), 560)
    return soft(-outside, 1.6)


def _mediastinum(canvas: Canvas, anatomy: Anatomy, level: float) -> Image:
    """Opacity of all that lies between the lungs."""
    (x, y), (_, b) = anatomy.centre, anatomy.cavity
    opacity = np.zeros_like(canvas.image)
    wobble = ((3, 0.05, anatomy.phases[7]), (4, 0.03, anatomy.phases[6]))
    upper = max(0.0, 1 - 2 * level)
    shapes = [
        canvas.ellipse(x + 2, y + 0.30 * b, 34 + 6 * upper, 0.62 * b, wobble=wobble, softness=2),
        # Above, fat and great vessels part the lungs; lower down they nearly meet before the heart.
        canvas.ellipse(x + 1, y - 0.40 * b, 9 + 24 * upper, 0.62 * b, wobble=wobble, softness=2),
        canvas.ellipse(x + 1, y - 0.95 * b, 34, 0.20 * b, softness=2),
        canvas.ellipse(x, y + 0.10 * b, 48, 24, wobble=wobble, softness=2),
        canvas.ellipse(x, y + 0.80 * b, 36, 30, softness=2),
        canvas.ellipse(*_aorta(anatomy, level), 20, 20, softness=2),
    ]
    if level > 0.35:
        hx, hy, ha, hb = _heart(anatomy, level)
        shapes.append(canvas.ellipse(hx, hy, ha + 4, hb + 4, -0.6, wobble=((3, 0.05, anatomy.phases[5]),), softness=2))
    for window, mask in shapes:
        np.maximum(opacity[window], mask, out=opacity[window])
    return opacity


def _aorta(anatomy: Anatomy, level: float) -> tuple[float, float]:
    """Centre of the descending aorta."""
    return anatomy.centre[0] + 30 - 6 * level, anatomy.centre[1] + anatomy.cavity[1] * 0.50


def _heart(anatomy: Anatomy, level: float) -> tuple[float, float, float, float]:
    """Centre and half axes of the heart."""
    scale = anatomy.heart * min(1.0, 0.55 + 0.6 * (level - 0.35))
    x, y = anatomy.centre
    return x + 26 * scale, y - 0.22 * anatomy.cavity[1], 78 * scale, 58 * scale


def _paint_organs(rng: np.random.Generator, canvas: Canvas, anatomy: Anatomy, level: float) -> None:
    """Paint heart, great vessels, trachea or main bronchi, and oesophagus."""
    (x, y), (_, b) = anatomy.centre, anatomy.cavity
    blood = 45 + anatomy.contrast
    if level > 0.35:
        hx, hy, ha, hb = _heart(anatomy, level)
        wobble = ((3, 0.05, anatomy.phases[5]),)
        canvas.paint(canvas.ellipse(hx, hy, ha, hb, -0.6, wobble=wobble, softness=2), 48 + 0.25 * anatomy.contrast)
        for along, across, size in ((0.33, 0.2, 0.38), (-0.38, -0.1, 0.42), (0.1, -0.52, 0.3), (-0.35, 0.5, 0.3)):
            cx = hx + math.cos(0.6) * along * ha + math.sin(0.6) * across * hb
            cy = hy - math.sin(0.6) * along * ha + math.cos(0.6) * across * hb
            canvas.paint(canvas.ellipse(cx, cy, size * ha, size * hb, -0.6, softness=6), blood)
    if level < 0.65:
        canvas.paint(canvas.ellipse(x - 3, y - 0.34 * b, 18, 17), blood)
        canvas.paint(canvas.ellipse(x - 27, y - 0.26 * b, 9.5, 11), blood + 0.4 * anatomy.contrast)
    if 0.2 < level < 0.65:
        canvas.paint(canvas.ellipse(x + 24, y - 0.36 * b, 16, 14, -0.5), blood)
        for sign in (-1, 1):
            canvas.paint(canvas.ellipse(x + sign * 32, y + 2, 17, 8.5, -sign * 0.35), blood)
    if level < 0.25:
        canvas.paint(canvas.ellipse(x + 14, y - 4, 17, 42, -0.45), blood)
    canvas.paint(canvas.ellipse(*_aorta(anatomy, level), 17, 17), blood)
    gullet = (x + 8 + rng.uniform(-2, 2), y + 0.40 * b)
    canvas.paint(canvas.ellipse(*gullet, 9, 6.5, 0.3), 38)
    canvas.paint(canvas.ellipse(*gullet, 2.2, 1.4), -600)
    tubes = (
        [(x - 2, y + 0.2 * b, 12.0, 11.0)] if level < 0.3 else [(x - 21, y + 17, 8.5, 8.0), (x + 22, y + 17, 8.0, 7.5)]
    )
    for tx, ty, ta, tb in tubes:
        canvas.paint(canvas.ellipse(tx, ty, ta + 2, tb + 2), 20)
        canvas.paint(canvas.ellipse(tx, ty, ta, tb), -985)


def _paint_vessels(rng: np.random.Generator, chest: Chest, trees: int) -> None:
    """Paint branching, tapering vessels from each hilum and the many short stretches that cross the slice."""
    canvas = chest.canvas
    opacity = np.zeros_like(canvas.image)

    def tube(start: tuple[float, float], end: tuple[float, float], radii: tuple[float, float]) -> None:
        window, mask = canvas.segment(start, end, radii)
        np.maximum(opacity[window], mask, out=opacity[window])

    for side, hilum in zip((-1, 1), chest.hila, strict=True):
        for tree in range(trees):
            spread = (tree + rng.uniform(0.1, 0.9)) / trees - 0.5
            heading = (math.pi if side < 0 else 0.0) + spread * 2.7
            start = (hilum[0] + rng.uniform(-6, 6), hilum[1] + spread * 50 * -side + rng.uniform(-6, 6))
            branches = [(start, heading, rng.uniform(2.6, 4.6), rng.uniform(22, 36))]
            entered = False
            while branches:
                point, heading, radius, length = branches.pop()
                for _ in range(2):
                    heading += rng.normal(0, 0.14)
                    end = (point[0] + math.cos(heading) * length / 2, point[1] + math.sin(heading) * length / 2)
                    tube(point, end, (radius, radius * 0.9))
                    point, radius = end, radius * 0.9
                # Branches end at the pleura, when too thin to see, and where they leave the slice; a trunk still
                # behind the heart goes on.
                inside = _is_lung(chest, point)
                entered |= inside
                if radius < 0.75 or (inside and rng.random() < 0.18) or (entered and not inside):
                    continue
                turn = rng.uniform(0.25, 0.65)
                for bend in (turn, -turn * rng.uniform(0.4, 1)):
                    branches.append(
                        (point, heading + bend, radius * rng.uniform(0.6, 0.92), length * rng.uniform(0.7, 0.95))
                    )
    for x, y in lung_points(rng, chest, 50):
        heading, length = rng.uniform(0, 2 * math.pi), rng.exponential(5)
        radius = rng.uniform(0.5, 1.3)
        tube((x, y), (x + length * math.cos(heading), y + length * math.sin(heading)), (radius, radius * 0.7))
    canvas.paint(((slice(None), slice(None)), opacity * chest.lung), chest.blood - 15)


def _paint_airways(rng: np.random.Generator, chest: Chest) -> None:
    """Paint a few bronchi near each hilum, cut across or along, each with its wall."""
    for side, hilum in zip((-1, 1), chest.hila, strict=True):
        for _ in range(rng.integers(3, 6)):
            x, y = hilum[0] + side * rng.uniform(4, 45), hilum[1] + rng.uniform(-40, 45)
            if _is_lung(chest, (x, y)):
                paint_airway(rng, chest, (x, y), rng.uniform(2.2, 4.5))


def paint_airway(rng: np.random.Generator, chest: Chest, at: tuple[float, float], radius: float) -> None:
    """Paint one airway, dark with a bright wall, as far as it lies in the lung."""
    canvas = chest.canvas
    stretch, angle = rng.uniform(1, 2.2), rng.uniform(0, math.pi)
    for wall, hu in ((1.5, -180), (0.0, -960)):
        window, mask = canvas.ellipse(*at, radius * stretch + wall, radius + wall, angle)
        canvas.paint((window, mask * chest.lung[window]), hu)


def _is_lung(chest: Chest, point: tuple[float, float]) -> bool:
    column, row = (int(value / chest.canvas.unit) for value in point)
    inside = 0 <= column < chest.canvas.size and 0 <= row < chest.canvas.size
    return inside and chest.lung[row, column] > 0.5


def lung_points(rng: np.random.Generator, chest: Chest, count: int) -> list[tuple[float, float]]:
    """Draw points (x, y) spread evenly over the lungs; none where the slice shows no lung."""
    inside = np.flatnonzero(chest.lung.ravel() > 0.9)
    if not len(inside):
        return []
    rows, columns = np.divmod(inside[rng.integers(len(inside), size=count)], chest.canvas.size)
    return [
        (float(c + 0.5) * chest.canvas.unit, float(r + 0.5) * chest.canvas.unit)
        for r, c in zip(rows, columns, strict=True)
    ]
