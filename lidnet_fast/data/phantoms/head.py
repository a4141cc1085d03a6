"""Head phantoms: small haemorrhages in grey and white matter behind skull, among calcium, vessels and partial volume.

Why dose matters: brain CT takes high doses since it needs low contrasts (Acta Radiol. 53(4), 2012,
doi:10.1258/ar.2012.110629), and behind bone few photons are left.

Densities: acute haematomas have 61 (3) HU where they go on to bleed and 69 (6) HU where they don't (Gonzalez-Rodriguez
et al., J. Mex. Fed. Radiol. Imaging 2(1), 2023), whole blood 45 to 65 HU (Radiopaedia, "Cerebral haemorrhagic
contusion"). Diameters of 3.5 to 10 mm, the number of haemorrhages and all distractors are our choice.
"""

import dataclasses
import math
from typing import ClassVar

import numpy as np

from lidnet_fast.data.phantoms.brain import SIDE_MM, Head
from lidnet_fast.data.phantoms.phantom import PhantomPatient
from lidnet_fast.data.phantoms.solids import Ellipsoid, Tube
from lidnet_fast.data.phantoms.stack import Lesion, Stack, StackPhantom

DIAMETERS_MM = (3.5, 10.0)
DENSITIES_HU = (44.0, 61.0)
"""Of haemorrhages."""

_LEVELS = (-52.0, 14.0)
"""Between which heights slices lie, mm below the third ventricle."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadPhantom(StackPhantom):
    """A head with haemorrhages; a patient's slices are neighbours, and cut the same lesions.

    Distractors are small calcifications, vessels seen along or across, and the skull's inner bumps, faint where they
    fill a slice in part. Falx, sinus, and calcium of pineal gland and choroid plexus come on top.
    """

    field_of_view_mm: ClassVar[float] = SIDE_MM
    most_hu: ClassVar[float] = 1800.0
    body_part: ClassVar[str] = "HEAD"

    distractors: int = 20
    texture: float = 1.0

    def make_patient(self, rng: np.random.Generator) -> PhantomPatient:
        """Make a patient, a pure function of the generator's state and of these options."""
        head = Head.make(rng)
        thickness = self.slice_spacing_mm
        levels = self._levels(rng, *_LEVELS)
        slices = [head.paint(rng, self.image_size, z, thickness, self.texture) for z in levels]
        stack = Stack([canvas for canvas, _ in slices], [matter for _, matter in slices], levels, thickness)
        for _ in range(self.distractors):
            _paint_distractor(rng, head, stack)
        lesions: list[Lesion] = []
        for diameter, lesion in self._lesions(rng, stack, DIAMETERS_MM):
            lesions.append(lesion)
            rim = _oedema(rng, lesion.body)
            density, rim_density = rng.uniform(*DENSITIES_HU), head.white - rng.uniform(4, 10)
            around = {number: shape for number, shape, _ in stack.sections(rim, 3)} if diameter > 5 else {}
            for number, shape, _ in lesion.sections:
                if number in around:
                    stack.canvases[number].paint(around[number], rim_density)
                stack.canvases[number].paint(shape, density)
        return self._patient(rng, stack, lesions)


def _oedema(rng: np.random.Generator, body: Ellipsoid) -> Ellipsoid:
    """Draw what a haemorrhage and the swollen tissue around it take up together."""
    a, b, c = (axis + rng.uniform(1, 2.5) for axis in body.axes)
    return dataclasses.replace(body, axes=(a, b, c))


def _paint_distractor(rng: np.random.Generator, head: Head, stack: Stack) -> None:
    """Paint what a detector could take for a haemorrhage: as bright, but drawn out, too bright, or at the bone."""
    u = rng.uniform
    kind = rng.choice(3, p=(0.25, 0.5, 0.25))
    point = stack.point(rng)
    if point is None:
        return
    x, y, z = point
    heading = u(0, 2 * math.pi)
    if kind == 0:  # a small calcification
        size = u(0.8, 2.0)
        stack.paint(Ellipsoid(point, (size, size * u(0.7, 1), size * u(1, 2)), heading), u(110, 300))
    elif kind == 1:  # a vessel
        length, rise = u(8, 24), u(-0.5, 0.5)
        end = (x + length * math.cos(heading), y + length * math.sin(heading), z + rise * length)
        stack.paint(Tube(point, end, (u(1.0, 2.6), u(0.6, 1.0))), u(*DENSITIES_HU))
    else:  # a bump of the skull's inside that fills the slice in part
        a, b, c = head.inside
        near = math.sqrt(max(1 - (z / c) ** 2, 0))
        size = u(2, 5)
        place = Ellipsoid((a * near * math.cos(heading), b * near * math.sin(heading), z), (size, size * u(0.5, 1), 4))
        middle = SIDE_MM / 2
        for canvas, level in zip(stack.canvases, stack.levels, strict=True):
            window, opacity = place.moved(middle, middle, head.turn).cut(canvas, level, stack.thickness, 3)
            canvas.image[window] += opacity * u(20, 60)
