"""The anatomy of the liver phantoms: an upper abdomen in the portal venous phase, in space.

Places and lengths are in mm, places from the middle of the trunk: x to the patient's left, y to the back, z towards
the feet from about the top of the liver. Livers enhance by 56 (14) HU in the portal venous phase (Naruo et al., Radiat.
Med. 25, 2007), from 50 to 70 HU before it. All else is our choice: the other densities and the forms of organs.
"""

import dataclasses
import math

import numpy as np

from lidnet_fast.data.phantoms.canvas import Canvas, Image, texture
from lidnet_fast.data.phantoms.solids import Ellipsoid, Part, Point, Tube
from lidnet_fast.data.phantoms.trunk import paint_couch, paint_vertebra

SIDE_MM = 384.0
"""Field of view."""

_MIDDLE = SIDE_MM / 2

_FAT = -105.0
_THINNEST = 0.7
"""Radius below which vessels aren't followed, mm."""


@dataclasses.dataclass(frozen=True)
class Abdomen:
    """One patient; `make` draws one.

    Attributes:
        cavity: half axes of the abdominal wall's inside.
        fat: thickness of the fat beneath the skin.
        ribs: directions in which ribs are cut, at z = 0; they descend to the front.
        liver_hu: of the parenchyma.
        vessel_hu: of veins and aorta.
        lobes: what the liver consists of.
        diaphragm: what lies outside of it, within the cavity, is lung.
        vessels: of the liver: portal and hepatic veins.
        organs: all others, in the order in which they are painted over the liver.
        phases: of the small irregularities of outlines.
    """

    cavity: tuple[float, float]
    fat: float
    ribs: tuple[float, ...]
    liver_hu: float
    vessel_hu: float
    lobes: tuple[Ellipsoid, ...]
    diaphragm: Ellipsoid
    vessels: tuple[Tube, ...]
    organs: tuple[Part, ...]
    phases: tuple[float, ...]

    @classmethod
    def make(cls, rng: np.random.Generator) -> "Abdomen":
        """Draw a patient."""
        u = rng.uniform
        a, b = cavity = (u(132, 148), u(88, 100))
        phases = tuple(u(0, 2 * math.pi, 6).tolist())
        wavy = ((2, 0.02, phases[0]), (3, 0.03, phases[1]), (5, 0.015, phases[2]))
        top = u(-6, 6)
        lobes = (
            Ellipsoid((-0.46 * a, -0.04 * b, 85 + top), (0.62 * a, 0.98 * b, 88), u(-0.1, 0.1), wavy, 0.5),
            Ellipsoid((0.06 * a, -0.56 * b, 68 + top), (u(0.48, 0.6) * a, 0.46 * b, 58), u(-0.3, -0.1), wavy, 0.5),
        )
        vessel_hu = u(150, 180)
        return cls(
            cavity=cavity,
            fat=u(10, 26),
            ribs=tuple((np.arange(13) * (2 * math.pi / 13) + u(-0.15, 0.15, 13)).tolist()),
            liver_hu=u(100, 122),
            vessel_hu=vessel_hu,
            lobes=lobes,
            diaphragm=Ellipsoid((0, -0.08 * b, 112), (1.07 * a, 1.09 * b, 112)),
            vessels=_liver_vessels(rng),
            organs=_organs(rng, a, b, vessel_hu),
            phases=phases,
        )


@dataclasses.dataclass(frozen=True)
class AbdomenSlice:
    """A slice on which everything but lesions and their mimics is painted.

    Attributes:
        canvas: the slice, in mm.
        liver: opacity of what is seen of the liver [S, S].
        texture: the slice's unit random field [S, S].
    """

    canvas: Canvas
    liver: Image
    texture: Image


class AbdomenPainter:
    """Paints the slices of a patient; all that they share is painted once."""

    def __init__(self, abdomen: Abdomen, size: int) -> None:
        self.abdomen = abdomen
        self.size = size
        self._wall, self._cavity = _paint_wall(abdomen, size)

    def paint(self, rng: np.random.Generator, z: float, thickness: float, grain: float) -> AbdomenSlice:
        """Paint a slice.

        Args:
            rng: draws the texture and the spine's density.
            z: middle of the slice, mm.
            thickness: of the slice, mm.
            grain: standard deviation of the liver's texture, HU.
        """
        abdomen = self.abdomen
        canvas = Canvas(self.size, SIDE_MM)
        canvas.image[:] = self._wall
        self._paint_ribs(canvas, z)
        everything = (slice(0, self.size), slice(0, self.size))
        field = texture(rng, self.size)
        within = self._cavity.copy()
        part, below_lung = abdomen.diaphragm.moved(_MIDDLE, _MIDDLE).cut(canvas, z, thickness, 2)
        lung = within.copy()
        lung[part] *= 1 - below_lung
        within -= lung
        liver = np.zeros_like(canvas.image)
        for lobe in abdomen.lobes:
            part, opacity = lobe.moved(_MIDDLE, _MIDDLE).cut(canvas, z, thickness)
            np.maximum(liver[part], opacity, out=liver[part])
        liver *= within
        vessels = np.zeros_like(canvas.image)
        for tube in abdomen.vessels:
            part, opacity = tube.moved(_MIDDLE, _MIDDLE).cut(canvas, z, thickness)
            np.maximum(vessels[part], opacity, out=vessels[part])
        canvas.paint((everything, liver), abdomen.liver_hu + grain * field)
        canvas.paint((everything, liver * vessels), abdomen.vessel_hu)
        for organ in abdomen.organs:
            part, opacity = organ.solid.moved(_MIDDLE, _MIDDLE).cut(canvas, z, thickness, organ.softness)
            opacity = opacity * within[part]
            canvas.paint((part, opacity), organ.hu)
            liver[part] *= 1 - opacity
        canvas.paint((everything, lung), -850 + 20 * field)
        x, y = _MIDDLE, _MIDDLE + 0.66 * abdomen.cavity[1]
        part, opacity = canvas.ellipse(x, y + 8, 31, 30, softness=4)
        canvas.paint((part, opacity), 58)
        liver[part] *= 1 - opacity
        paint_vertebra(canvas, x, y, marrow=rng.uniform(150, 220))
        canvas.image += 4 * field * (1 - liver) * (canvas.image > -200)
        return AbdomenSlice(canvas, liver, field)

    def _paint_ribs(self, canvas: Canvas, z: float) -> None:
        a, b = (axis + 6 for axis in self.abdomen.cavity)
        for start in self.abdomen.ribs:
            # Ribs run down from the back (a quarter turn) to the front on either side, and none cross the front.
            direction = start + 0.006 * z * (1 if math.cos(start) > 0 else -1) * -1
            x, y = math.cos(direction), math.sin(direction)
            if y < -0.75:
                continue
            along = math.atan2(b * x, -a * y)
            place = (_MIDDLE + a * x, _MIDDLE + b * y)
            canvas.paint(canvas.ellipse(*place, 11, 4.2, along), 480)
            canvas.paint(canvas.ellipse(*place, 9.5, 2.6, along), 200)


def _paint_wall(abdomen: Abdomen, size: int) -> tuple[Image, Image]:
    """Paint couch, skin, fat and muscle; return them and the opacity of the cavity."""
    canvas = Canvas(size, SIDE_MM)
    middle, (a, b), phases = _MIDDLE, abdomen.cavity, abdomen.phases
    wobble = ((3, 0.012, phases[3]), (4, 0.02, math.pi), (5, 0.008, phases[4]))
    muscle, fat = 13.0, abdomen.fat
    paint_couch(canvas, middle + b + muscle + 1.1 * fat + 3)
    for grow, hu in ((muscle + fat + 2, 20), (muscle + fat, _FAT), (muscle, 60)):
        wide = 1.15 * grow if grow > muscle else grow
        canvas.paint(canvas.ellipse(middle, middle, a + wide, b + grow, wobble=wobble), hu)
    for sign in (-1, 1):  # the muscles beside the spine
        canvas.paint(canvas.ellipse(middle + sign * 34, middle + b + 4, 30, 19, softness=3), 58)
    window, opacity = canvas.ellipse(middle, middle, a, b, wobble=wobble)
    cavity = np.zeros_like(canvas.image)
    cavity[window] = opacity
    canvas.paint((window, opacity), _FAT)
    return canvas.image, cavity


def _organs(rng: np.random.Generator, a: float, b: float, vessel_hu: float) -> tuple[Part, ...]:
    """Draw what lies beside the liver and in its clefts."""
    u = rng.uniform
    organs: list[Part] = []

    def add(
        hu: float, centre: Point, axes: Point, angle: float = 0.0, softness: float = 1.2, wavy: float = 0.0
    ) -> None:
        wobble = tuple((k, wavy / k, u(0, 2 * math.pi)) for k in (2, 3, 5)) if wavy else ()
        organs.append(Part(Ellipsoid(centre, axes, angle, wobble, 1.0), hu, softness))

    # The cleft of the ligament between the lobes, and fat around the porta.
    cleft = (-0.16 * a + u(-6, 6), -0.5 * b, u(80, 95))
    add(_FAT, cleft, (2.6, 0.36 * b, 34), u(-0.25, 0.05), 2)
    add(_FAT, (-0.10 * a, -0.02 * b, 94), (19, 11, 13), -0.4, 6, 0.4)
    add(130, (-0.17 * a, 0.02 * b, 96), (7, 6, 30), 0.2)
    # Stomach with its wall, what was drunk, and a bubble; patients lie on their backs.
    belly = (0.44 * a + u(-6, 6), -0.30 * b, 70 + u(-12, 12))
    add(_FAT, belly, (55, 44, 62), 0.3, 3, 0.1)
    add(85, belly, (49, 38, 56), 0.3, 1.2, 0.1)
    add(u(5, 35), belly, (45, 34, 52), 0.3, 1.2, 0.1)
    add(-950, (belly[0], belly[1] - 17, belly[2]), (u(18, 28), u(8, 12), 28))
    spleen = (0.74 * a, 0.30 * b, 72 + u(-10, 10))
    add(_FAT, spleen, (31, 50, 54), -0.35, 3)
    add(u(115, 135), spleen, (27, 46, 50), -0.35, 1.2, 0.05)
    for side in (-1, 1):
        kidney = (side * 0.47 * a, 0.52 * b, 158 + 12 * (side < 0) + u(-8, 8))
        add(_FAT, kidney, (32, 36, 60), 0, 3)
        add(185, kidney, (27, 31, 56), -side * 0.5)
        add(150, kidney, (17, 20, 42), -side * 0.5, 4)
        add(_FAT + 30, (kidney[0] - side * 8, kidney[1] - 4, kidney[2]), (9, 9, 18), 0, 4)
    bowel = (0.66 * a, -0.44 * b, 118 + u(-8, 8))
    add(70, bowel, (24, 20, 34), 0, 1.2, 0.1)
    add(-900, (bowel[0], bowel[1] - 3, bowel[2]), (20, 14, 30), 0, 1.2, 0.1)
    for step in range(7):  # the pancreas, lobulated
        share = step / 6
        place = ((-0.12 + 0.75 * share) * a, (0.10 + 0.10 * share - 0.3 * share * (1 - share)) * b, 112 - 22 * share)
        add(95, place, (12, 8, 11), u(-0.5, 0.5), 1.5, 0.3)
    add(8, (-0.36 * a, -0.46 * b, 128 + u(-8, 8)), (15, 21, 32), 0.3)
    # The diaphragm's crura, aorta and the lower vena cava with a moat of fat.
    for side in (-1, 1):
        add(60, (6 + side * 15, 0.42 * b, 90), (5, 13, 120), -side * 0.4)
    add(vessel_hu, (9, 0.40 * b, 100), (10.5, 10.5, 1000))
    add(vessel_hu - 10, (-19, 0.26 * b, 100), (12.5, 9, 1000), 0.2)
    return tuple(organs)


def _liver_vessels(rng: np.random.Generator) -> tuple[Tube, ...]:
    """Grow portal vein branches from the porta, and hepatic veins from the vena cava near the dome."""
    u = rng.uniform
    porta, cava = (-14.0, 0.0, 88.0), (-18.0, 22.0, 36.0)
    portal = ((-74, -22, 62), (-70, 22, 84), (-66, -28, 112), (-54, 26, 118), (16, -48, 62), (30, -42, 88))
    hepatic = ((-82, 14, 72), (-52, -40, 74), (-30, -52, 92), (14, -50, 60), (-66, 36, 58))
    tubes: list[Tube] = []
    for root, goals, radius in ((porta, portal, 5.0), (cava, hepatic, 4.6)):
        for x, y, z in goals:
            goal = (x + u(-10, 10), y + u(-10, 10), z + u(-10, 10))
            tubes += grow_vessels(rng, root, goal, radius * u(0.75, 1.15))
    return tuple(tubes)


def grow_vessels(rng: np.random.Generator, start: Point, goal: Point, radius: float) -> list[Tube]:
    """Grow a tree of tapering tubes that sets out towards a point and parts in two again and again."""
    way = np.subtract(goal, start)
    length = float(np.linalg.norm(way)) * 0.6
    tubes: list[Tube] = []
    tips = [(np.array(start), way / np.linalg.norm(way), radius, length)]
    while tips:
        point, heading, radius, length = tips.pop()
        for _ in range(2):  # a bend on the way
            heading = heading + rng.normal(0, 0.13, 3)
            heading /= np.linalg.norm(heading)
            end = point + heading * (length / 2)
            tubes.append(Tube(tuple(point.tolist()), tuple(end.tolist()), (radius, 0.92 * radius)))
            point, radius = end, 0.92 * radius
        if radius < _THINNEST:
            continue
        across = np.cross(heading, rng.normal(size=3))
        across /= np.linalg.norm(across)
        turn = rng.uniform(0.3, 0.7)
        for bend, share in ((turn, rng.uniform(0.55, 0.8)), (-turn * rng.uniform(0.4, 1), rng.uniform(0.7, 0.9))):
            tips.append((point, heading + bend * across, radius * share, max(length * rng.uniform(0.65, 0.9), 6.0)))
    return tubes
