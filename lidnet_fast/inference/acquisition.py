"""What a series was acquired with, from its header and a few of its slices, to be held against a model's envelope."""

from collections.abc import Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import TypeVar

import numpy as np

from lidnet_fast.data.formats.dicom.headers import acquired_with
from lidnet_fast.data.formats.dicom.images import SAME_POSITION, DicomSeries
from lidnet_fast.data.formats.dicom.pixels import decode
from lidnet_fast.data.formats.geometry import LOWEST_HU, slice_distance
from lidnet_fast.data.formats.volumes.series import VolumeSeries
from lidnet_fast.models.envelope import Acquisition

_SLICES = 8
"""Measured of each series: enough for the median of their noise, and little beside the cost of denoising them."""

T = TypeVar("T")


def acquisition_of_series(series: DicomSeries, pool: Executor) -> Acquisition:
    """Measure a DICOM series on slices from its first to its last.

    Raises:
        InputError: one of them can't be decoded, or its values aren't HU.
    """
    frames = [(image.path, frame) for image in series.images for frame in range(image.frames)]
    slices = list(pool.map(_decode, _spread(frames)))
    headers = [part for image in series.images for part in image.slices]
    spacing = max((max(part.geometry.spacing[1:]) for part in headers), default=None)
    positions = sorted(float(part.geometry.axes[2] @ part.geometry.origin) for part in headers)
    steps = [step for step in np.diff(positions) if step >= SAME_POSITION]
    distance = float(np.median(steps)) if steps else None
    return Acquisition.measured(slices, pixel_spacing=spacing, slice_distance=distance, **acquired_with(headers))


def acquisition_of_volume(volume: VolumeSeries, slices: np.ndarray) -> Acquisition:
    """Measure a volume; `slices` are what it holds, [Z,H,W] in HU."""
    measured = [np.maximum(slices[z], LOWEST_HU) for z in _spread(range(len(slices)))]
    return Acquisition.measured(measured, pixel_spacing=max(volume.spacing[1:]), slice_distance=slice_distance(volume))


def _spread(items: Sequence[T]) -> list[T]:
    """At most `_SLICES` of the items, evenly from the first to the last."""
    count = min(_SLICES, len(items))
    return [items[place] for place in np.linspace(0, len(items) - 1, count).round().astype(int)]


def _decode(place: tuple[Path, int]) -> np.ndarray:
    path, frame = place
    return decode(path, [frame]).hu(0)[0]
