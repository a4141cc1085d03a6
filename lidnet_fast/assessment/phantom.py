"""The uniform phantom: a cylinder of water with signals to be detected, or discs whose edges show the resolution."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lidnet_fast.assessment.options import AssessOptions
from lidnet_fast.assessment.scanner import Scene
from lidnet_fast.data.lesions.signal import Lesion, lesion_signal
from lidnet_fast.errors import InputError

SIDE, FIELD = 512, 256
"""Pixels of the slice, and of the field of view in its middle."""

_CYLINDER = 370
"""Diameter of the water, pixels: it holds the whole field of view."""

SIGNAL_CELL, DISC_CELL = 64, 128
"""Sides of the squares that each hold one signal or one disc, pixels."""

_DISC = 40
"""Diameter of the discs, pixels."""

_SURROUND = 8
"""Pixels of water, at least, between a signal and the edge of its cell."""


@dataclass(frozen=True)
class Placed:
    """A signal or disc, and its cell.

    Attributes:
        lesion: with its centre in pixels of its cell.
        object: number of the object that it is part of.
        cell: its rows and columns in the field of view.
        signal: [h, w] what it adds to its cell, HU.
    """

    lesion: Lesion
    object: int
    cell: tuple[slice, slice]
    signal: np.ndarray


def place_signals(options: AssessOptions) -> list[Placed]:
    """Every diameter at every contrast, cell by cell, over as many objects as that takes.

    Raises:
        InputError: a signal is larger than its cell.
    """
    largest = (SIGNAL_CELL - 2 * _SURROUND) * options.pixel_spacing
    if max(options.diameters) > largest:
        raise InputError(
            f"diameters: {max(options.diameters):g} mm is larger than the signals' field of {largest:g} mm. "
            "To fix: give smaller diameters or a larger pixel_spacing"
        )
    pairs = list(itertools.product(options.diameters, options.contrasts))
    return _placed(pairs, SIGNAL_CELL, options.pixel_spacing)


def place_discs(options: AssessOptions) -> list[Placed]:
    """A disc of every contrast."""
    diameter = 2 * disc_radius(options)
    return _placed([(diameter, contrast) for contrast in options.edges], DISC_CELL, options.pixel_spacing)


def disc_radius(options: AssessOptions) -> float:
    """Radius of the discs, mm."""
    return _DISC * options.pixel_spacing / 2


def scene(placed: Sequence[Placed], options: AssessOptions, stream: int) -> Scene:
    """The scene that shows the signals or discs of one object; none for uniform water.

    Args:
        placed: of one object.
        options: pixel spacing and seed.
        stream: number of the scene's noise.
    """
    centre = (SIDE - 1) / 2
    rows, columns = np.mgrid[:SIDE, :SIDE] - centre
    # The edge of the cylinder is far outside of the field: its blur doesn't matter.
    hu = np.where(np.hypot(rows, columns) < _CYLINDER / 2, 0.0, -1000.0).astype(np.float32)
    corner = (SIDE - FIELD) // 2
    view = hu[corner : corner + FIELD, corner : corner + FIELD]
    for one in placed:
        view[one.cell] += one.signal
    spacing = (options.pixel_spacing, options.pixel_spacing)
    return Scene(hu, spacing, (corner, corner, FIELD, FIELD), (options.seed, stream))


def _placed(pairs: Sequence[tuple[float, float]], cell: int, spacing: float) -> list[Placed]:
    per_row = FIELD // cell
    placed = []
    for number, (diameter, contrast) in enumerate(pairs):
        member, place = divmod(number, per_row**2)
        row, column = (part * cell for part in divmod(place, per_row))
        middle = (cell - 1) / 2
        lesion = Lesion((0.0, middle, middle), diameter, contrast)
        window, patch = lesion_signal(lesion, (cell, cell), (1.0, spacing, spacing))
        signal = np.zeros((cell, cell), np.float32)
        signal[window] = patch
        placed.append(Placed(lesion, member, (slice(row, row + cell), slice(column, column + cell)), signal))
    return placed


def core(one: Placed, spacing: float) -> np.ndarray:
    """The mean over a signal's inside, a pixel away from its edge, as weights [h, w]."""
    side = len(one.signal)
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    inside = np.hypot(y, x) <= max(one.lesion.diameter / 2 / spacing - 1, math.sqrt(0.5))
    return inside / inside.sum()
