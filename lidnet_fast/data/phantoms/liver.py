"""Liver phantoms: hypodense metastases among vessels, ducts and clefts, in an abdomen in the portal venous phase.

Why dose matters: contrast is low. Sensitivity for metastases of 2 to 15 mm fell from 94 to 79 % when the dose was
halved, and iterative reconstruction didn't make up for it (Jensen et al., Radiology 290(2), 2019).

Sizes and contrasts: diameters of 5 to 18 mm and 20 to 60 HU below the liver. Readers need about 70, 35 and 30 HU at 5,
10 and 15 mm at regular dose (Yan et al., Acad. Radiol. 2025); poorly contrasted lesions of routine scans had 40 HU on
average (Oppenheimer et al., Acta Radiol. 64(1), 2022). Forms, number and distractors are our choice.
"""

import dataclasses
import math
from typing import ClassVar

import numpy as np

from lidnet_fast.data.phantoms.abdomen import SIDE_MM, Abdomen, AbdomenPainter
from lidnet_fast.data.phantoms.phantom import PhantomPatient
from lidnet_fast.data.phantoms.solids import Ellipsoid, Tube
from lidnet_fast.data.phantoms.stack import Lesion, Stack, StackPhantom

DIAMETERS_MM = (5.0, 18.0)
CONTRASTS_HU = (20.0, 60.0)
"""How much darker than the liver lesions are."""

_LEAST_CONTRAST = 200.0
"""HU mm: a lesion's contrast times its diameter, at least; fainter ones would escape a reader at full dose."""

_LEVELS = (48.0, 118.0)
"""Between which heights slices lie, mm below the liver's dome."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LiverPhantom(StackPhantom):
    """An abdomen with liver metastases; a patient's slices are neighbours, and cut the same lesions.

    Distractors are unenhanced veins and bile ducts, seen along or across, and clefts of the surface filled with fat.
    """

    field_of_view_mm: ClassVar[float] = SIDE_MM
    most_hu: ClassVar[float] = 1500.0
    body_part: ClassVar[str] = "LIVER"

    distractors: int = 12
    texture: float = 3.0

    def make_patient(self, rng: np.random.Generator) -> PhantomPatient:
        """Make a patient, a pure function of the generator's state and of these options."""
        abdomen = Abdomen.make(rng)
        painter = AbdomenPainter(abdomen, self.image_size)
        thickness = self.slice_spacing_mm
        levels = self._levels(rng, *_LEVELS)
        slices = [painter.paint(rng, z, thickness, self.texture) for z in levels]
        stack = Stack([s.canvas for s in slices], [s.liver for s in slices], levels, thickness)
        for _ in range(self.distractors):
            _paint_distractor(rng, abdomen, stack)
        lesions: list[Lesion] = []
        for diameter, lesion in self._lesions(rng, stack, DIAMETERS_MM):
            lesions.append(lesion)
            hu = abdomen.liver_hu - rng.uniform(max(CONTRASTS_HU[0], _LEAST_CONTRAST / diameter), CONTRASTS_HU[1])
            for number, (window, opacity), _ in lesion.sections:
                stack.canvases[number].paint((window, opacity), hu + self.texture * slices[number].texture[window])
        return self._patient(rng, stack, lesions)


def _paint_distractor(rng: np.random.Generator, abdomen: Abdomen, stack: Stack) -> None:
    """Paint what a detector could take for a metastasis: as dark and as wide, but drawn out."""
    u = rng.uniform
    kind = rng.choice(3, p=(0.5, 0.3, 0.2))
    heading, rise = u(0, 2 * math.pi), u(-0.5, 0.5)
    if kind == 0:  # a vein that isn't enhanced yet, tapering
        point = stack.point(rng)
        if point is not None:
            x, y, z = point
            length, radius = u(12, 30), u(1.4, 3.2)
            end = (x + length * math.cos(heading), y + length * math.sin(heading), z + rise * length)
            stack.paint(Tube(point, end, (radius, 0.4 * radius)), abdomen.liver_hu - u(*CONTRASTS_HU))
    elif kind == 1:  # a bile duct that runs along a vein
        vein = abdomen.vessels[rng.integers(len(abdomen.vessels))]
        away, middle = max(vein.radii) + u(0.8, 1.6), SIDE_MM / 2
        beside = vein.moved(middle + away * math.cos(heading), middle + away * math.sin(heading))
        stack.paint(dataclasses.replace(beside, radii=(u(0.9, 1.8), u(0.7, 1.4))), u(10, 30))
    else:  # a cleft of the surface, filled with fat
        point = stack.point(rng, 0.3, 0.7)
        if point is not None:
            plate = Ellipsoid(point, (u(9, 18), u(0.8, 1.6), u(5, 12)), heading)
            stack.paint(plate, abdomen.liver_hu - u(60, 150), 1.8)
