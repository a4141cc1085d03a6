"""Making a series regular: slices of a tilted gantry moved above each other, uneven distances made even.

Denoising learns from the noise, so slices of a tilted gantry are moved by whole pixels. That leaves every pixel as it
was and every slice within half a pixel of its place; boxes move with their slices. Uneven distances can be evened only
by interpolating between neighbours, which smooths the noise and leaves no slice for a box to be on.
"""

import dataclasses

import numpy as np

from lidnet_fast.data.formats.geometry import LOWEST_HU, Series, Triple, sideways, spacing_fault, tilt_fault
from lidnet_fast.errors import InputError


@dataclasses.dataclass(frozen=True)
class Resampling:
    """How a volume becomes regular.

    Attributes:
        corners: (row, column) of every slice's first pixel in the larger image that holds them all.
        size: (H, W) of that image.
        sources: the place of every new slice among the old ones, between two where it isn't whole; None where the old
            slices stay.
        origin: centre of the first pixel of the new first slice, (x, y, z) in mm.
    """

    corners: tuple[tuple[int, int], ...]
    size: tuple[int, int]
    sources: tuple[float, ...] | None
    origin: Triple

    @property
    def shape(self) -> tuple[int, int, int]:
        """(Z, H, W) of the result."""
        return len(self.sources or self.corners), *self.size

    def volume(self, volume: np.ndarray) -> np.ndarray:
        """Resample int16 [Z, H, W], HU; what no slice covers becomes `LOWEST_HU`."""
        _, height, width = volume.shape
        moved = np.full((len(volume), *self.size), LOWEST_HU, np.int16)
        for target, image, (row, column) in zip(moved, volume, self.corners, strict=True):
            target[row : row + height, column : column + width] = image
        if self.sources is None:
            return moved
        result = np.empty(self.shape, np.int16)
        for target, source in zip(result, self.sources, strict=True):
            below = min(int(source), len(moved) - 2)
            weight = np.float32(source - below)
            target[:] = np.rint((1 - weight) * moved[below] + weight * moved[below + 1])
        return result

    def boxes(self, rows: np.ndarray) -> np.ndarray:
        """Move boxes [n, 5] (slice, x1, y1, x2, y2) with their slices."""
        corners = np.array(self.corners, np.float32)[rows[:, 0].astype(int)]
        return rows + np.concatenate([np.zeros_like(corners[:, :1]), corners[:, ::-1], corners[:, ::-1]], axis=1)


def resampling(series: Series, rows: np.ndarray) -> Resampling | None:
    """Return what makes a series regular, or None where it is.

    Args:
        series: the series.
        rows: its boxes, [n, 5].

    Raises:
        InputError: it is unevenly spaced and has boxes.
    """
    uneven = spacing_fault(series)
    if uneven and len(rows):
        raise InputError(
            f"series {series.series_uid}: {uneven}, and its boxes would be on no slice once that is mended"
        )
    if not uneven and not tilt_fault(series):
        return None
    # A slice whose first pixel lies further along the rows belongs further right.
    shifts = np.rint(sideways(series)[:, ::-1]).astype(int)
    corners = shifts - shifts.min(axis=0)
    z_step, y_step, x_step = series.spacing
    rows_axis, columns_axis, _ = series.axes
    first = corners[0] * [y_step, x_step]
    distances = np.array(series.distances)
    even = distances[0] + z_step * np.arange(int((distances[-1] - distances[0]) / z_step + 1e-3) + 1)
    return Resampling(
        corners=tuple((int(row), int(column)) for row, column in corners),
        size=(series.shape[1] + int(corners[:, 0].max()), series.shape[2] + int(corners[:, 1].max())),
        sources=tuple(np.interp(even, distances, np.arange(len(distances))).tolist()) if uneven else None,
        origin=tuple((np.array(series.positions[0]) - first[0] * columns_axis - first[1] * rows_axis).tolist()),
    )
