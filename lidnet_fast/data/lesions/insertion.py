"""Lesions put into a user's own CT: training data where there are no annotations, and ground truth on real anatomy."""

import dataclasses
import hashlib
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from lidnet_fast.data.lesions.places import TissueDepth
from lidnet_fast.data.lesions.signal import Lesion, add_lesion, lesion_box, lesion_slices
from lidnet_fast.errors import InputError

CONTRASTS: Mapping[str, tuple[float, float]] = MappingProxyType({"lung": (150.0, 850.0), "soft tissue": (25.0, 100.0)})
"""Least and greatest contrast of a lesion by its tissue, HU. In soft tissue, half of them are darker."""

DIAMETERS = (4.0, 20.0)
"""Of inserted lesions, mm; small ones are more frequent."""

_ELONGATION = 1.5
_ATTEMPTS = 40
_SMALLEST_SIDE = 3.0


@dataclasses.dataclass(frozen=True)
class Insertion:
    """Which lesions are inserted into each series.

    Attributes:
        lesions: how many per series; fewer where there is no room.
        seed: another one draws other lesions.

    Raises:
        InputError: a value can't work.
    """

    lesions: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.lesions < 1:
            raise InputError(f"insert_lesions must be at least 1, got {self.lesions}")

    def record(self) -> dict[str, Any]:
        """What a store says of its lesions."""
        contrasts = {tissue: list(ends) for tissue, ends in CONTRASTS.items()}
        return {
            "lesions_per_series": self.lesions,
            "seed": self.seed,
            "diameters_mm": list(DIAMETERS),
            "contrasts_hu": contrasts,
        }


def draw_lesions(
    volume: np.ndarray, spacing: tuple[float, float, float], insertion: Insertion, series_uid: str
) -> list[Lesion]:
    """Draw the lesions of one series, a pure function of the arguments.

    Args:
        volume: int16 [Z, H, W], HU.
        spacing: mm between slices, rows and columns.
        insertion: how many.
        series_uid: of the series.
    """
    digest = hashlib.sha256(f"{insertion.seed}:{series_uid}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8], "big"))
    depths: dict[int, TissueDepth] = {}
    lesions: list[Lesion] = []
    for _ in range(_ATTEMPTS * insertion.lesions):
        if len(lesions) == insertion.lesions:
            break
        z = int(rng.integers(len(volume)))
        if z not in depths:
            depths = {z: TissueDepth(volume[z], spacing[1:])} if len(depths) > 8 else depths
            depths.setdefault(z, TissueDepth(volume[z], spacing[1:]))
        lesion = _draw(rng, volume, spacing, z, depths[z], lesions)
        if lesion is not None:
            lesions.append(lesion)
    return lesions


def insert_lesions(
    volumes: list[np.ndarray], spacing: tuple[float, float, float], insertion: Insertion, series_uid: str
) -> np.ndarray:
    """Insert lesions into the volumes of one scan, in place.

    Args:
        volumes: int16 [Z, H, W], HU: of normal dose and, where there is one, of low dose.
        spacing: mm between slices, rows and columns.
        insertion: how many.
        series_uid: of the series.

    Returns:
        The lesions' boxes [n, 5]: (slice, x1, y1, x2, y2) in pixels, on slices where both sides have three or more.
    """
    spacing = (spacing[0] or spacing[1], spacing[1], spacing[2])  # a series of one slice has no distance of slices
    boxes = []
    for lesion in draw_lesions(volumes[0], spacing, insertion, series_uid):
        for volume in volumes:
            add_lesion(volume, lesion, spacing)
        for z in lesion_slices(lesion, len(volumes[0]), spacing[0]):
            box = lesion_box(lesion, z, spacing)
            if box is not None and min(box[2] - box[0], box[3] - box[1]) >= _SMALLEST_SIDE:
                boxes.append((z, *box))
    return np.array(boxes, np.float32).reshape(-1, 5)


def _draw(
    rng: np.random.Generator,
    volume: np.ndarray,
    spacing: tuple[float, float, float],
    z: int,
    depth: TissueDepth,
    others: list[Lesion],
) -> Lesion | None:
    """Draw a lesion around a slice, or None where that slice has no room for one of the size drawn."""
    largest = min(DIAMETERS[1], max(DIAMETERS[0], 2 * max(float(d.max()) for d in depth.depth.values())))
    diameter = math.exp(rng.uniform(math.log(DIAMETERS[0]), math.log(largest)))
    elongation, angle = rng.uniform(1, _ELONGATION), rng.uniform(0, math.pi)
    near = [
        (one.centre[1], one.centre[2], one.diameter)
        for one in others
        if abs(one.centre[0] - z) * spacing[0] < one.diameter + diameter
    ]
    long = diameter * math.sqrt(elongation)
    place = depth.place(rng, long, list(CONTRASTS), near, border=long / 2 / min(spacing[1:]) + 1)
    if place is None:
        return None
    y, x, tissue = place
    low, high = CONTRASTS[tissue]
    contrast = math.exp(rng.uniform(math.log(low), math.log(high)))
    if tissue == "soft tissue" and rng.random() < 0.5:
        contrast = -contrast
    return Lesion((float(z), y, x), diameter, contrast, elongation, angle, tissue)
