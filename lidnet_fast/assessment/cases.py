"""Backgrounds with known lesions: chest phantoms, or slices of a user's own store."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lidnet_fast.assessment.options import AssessOptions
from lidnet_fast.assessment.scanner import Scene
from lidnet_fast.data.lesions.insertion import CONTRASTS
from lidnet_fast.data.lesions.places import TissueDepth
from lidnet_fast.data.lesions.signal import Lesion, lesion_box, lesion_signal
from lidnet_fast.data.phantoms.chest import ChestPhantom
from lidnet_fast.data.store.reader import Store
from lidnet_fast.errors import InputError
from lidnet_fast.urls import without_secrets

FIELD = 256
"""Most pixels of the side of a field of view."""

LEVELS = 4
"""Contrasts of lesions in a tissue, evenly spaced in their logarithm."""

_FAINTER = 3.0
"""The faintest lesion's contrast is so much lower than that of lesions to train on: some should be hard to keep."""

_SOFT = "soft tissue"

_BORDER = 20
"""Pixels at the edge of a field without lesions."""

_CASE_STREAM = 10**6
_ATTEMPTS = 20


@dataclass(frozen=True, eq=False)
class Case:
    """A field of view without lesions, and the lesions that are put into it.

    Attributes:
        name: for the reader.
        scene: the slice and the field.
        lesions: with their centres in pixels of the field.
        signals: of each lesion, its rows and columns and what it adds there, HU.
    """

    name: str
    scene: Scene
    lesions: tuple[Lesion, ...]
    signals: tuple[tuple[tuple[slice, slice], np.ndarray], ...]

    @property
    def signal(self) -> np.ndarray:
        """[H, W] what all lesions add, HU."""
        image = np.zeros_like(self.scene.view)
        for window, patch in self.signals:
            image[window] += patch
        return image

    def boxes(self) -> np.ndarray:
        """The lesions' boxes [n, 4] in the field."""
        spacing = (1.0, *self.scene.spacing)
        return np.array([lesion_box(lesion, round(lesion.centre[0]), spacing) for lesion in self.lesions], np.float32)


def phantom_cases(options: AssessOptions) -> Iterator[Case]:
    """Chest phantoms without lesions, one slice each, with lesions in the lung."""
    phantom = ChestPhantom(slices=1, lesions_per_slice=(0, 0))
    spacing = (phantom.pixel_spacing, phantom.pixel_spacing)
    for number in range(options.cases):
        rng = np.random.default_rng([options.seed, 1, number])
        hu = phantom.make_patient(rng).volume[0]
        yield _case(rng, f"phantom {number + 1}", hu, spacing, ["lung"], options, number)


def store_cases(store: Store, options: AssessOptions) -> Iterator[Case]:
    """Slices of a store's test split, or of all of it where that is empty, with lesions in lung and soft tissue.

    Lesions that are there belong to the truth.

    Raises:
        InputError: no slice that was tried has room for a lesion.
    """
    chosen = [n for n, info in enumerate(store.series) if info.split == "test"] or list(range(len(store.series)))
    for number in range(options.cases):
        rng = np.random.default_rng([options.seed, 2, number])
        index = chosen[number % len(chosen)]
        info = store.series[index]
        for _ in range(_ATTEMPTS):
            z = int(rng.integers(info.shape[0]))
            case = _case(
                rng,
                f"series {info.series_uid}, slice {z}",
                store.read(index, z),
                (info.spacing[1], info.spacing[2]),
                list(CONTRASTS),
                options,
                number,
            )
            if case.lesions:
                yield case
                break
        else:
            raise InputError(
                f"{without_secrets(store.path)}: {_ATTEMPTS} slices of series {info.series_uid} have no room for a "
                f"lesion of {min(options.diameters):g} mm. To fix: give smaller diameters, or --cases 0"
            )


def _case(
    rng: np.random.Generator,
    name: str,
    hu: np.ndarray,
    spacing: tuple[float, float],
    tissues: Sequence[str],
    options: AssessOptions,
    number: int,
) -> Case:
    """Choose a field of view with room for lesions, and the lesions: all sizes and contrasts in turn."""
    height, width = (min(FIELD, side) for side in hu.shape)
    own = options.lesion_contrasts
    contrasts = {tissue: _levels(tissue) for tissue in tissues} if own is None else {_SOFT: own}
    middle = TissueDepth(hu, spacing).place(rng, min(options.diameters), list(contrasts))
    row, column = (side // 2 for side in hu.shape) if middle is None else middle[:2]
    corner = [
        int(np.clip(place - size // 2, 0, side - size))
        for place, size, side in zip((row, column), (height, width), hu.shape, strict=True)
    ]
    scene = Scene(hu, spacing, (corner[0], corner[1], height, width), (options.seed, _CASE_STREAM + number))
    depth = TissueDepth(scene.view, spacing)
    kinds = list(itertools.product(range(len(options.diameters)), range(LEVELS if own is None else len(own))))
    step = next(step for step in itertools.count(5) if math.gcd(step, len(kinds)) == 1)
    lesions: list[Lesion] = []
    for turn in range(len(kinds)):
        if len(lesions) == options.lesions_per_case:
            break
        # A step that shares no factor with the number of kinds visits sizes and contrasts evenly over cases.
        size, level = kinds[(number * options.lesions_per_case + turn) * step % len(kinds)]
        diameter = options.diameters[size]
        taken = [(lesion.centre[1], lesion.centre[2], lesion.diameter) for lesion in lesions]
        place = depth.place(rng, diameter, list(contrasts), taken, min(_BORDER, height // 8, width // 8))
        if place is not None:
            y, x, tissue = place
            lesions.append(Lesion((0.0, y, x), diameter, contrasts[tissue][level], tissue=tissue))
    signals = tuple(lesion_signal(lesion, scene.view.shape, (1.0, *spacing)) for lesion in lesions)
    return Case(name, scene, tuple(lesions), signals)


def _levels(tissue: str) -> tuple[float, ...]:
    """Contrasts of the lesions in a tissue, HU."""
    low, high = CONTRASTS[tissue]
    return tuple(np.geomspace(low / _FAINTER, high, LEVELS).tolist())
