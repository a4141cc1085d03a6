"""Where a lesion can be: surrounded by one tissue, and apart from others."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from lidnet_fast._constants import TISSUES

_SMOOTH_MM = 4.0
"""Structures thinner than about this, such as small vessels, are part of the tissue that they run through."""

_GAP_MM = 2.0
"""Tissue, at least, between a lesion and what isn't its tissue, and between lesions' surroundings."""


class TissueDepth:
    """How far every pixel of a slice lies inside its tissue.

    Args:
        hu: [H, W].
        spacing: mm between rows and columns.
    """

    def __init__(self, hu: NDArray, spacing: tuple[float, float]) -> None:
        smooth = ndimage.uniform_filter(hu.astype(np.float32), [max(1, round(_SMOOTH_MM / d)) for d in spacing])
        self.spacing = spacing
        self.depth = {
            tissue: ndimage.distance_transform_edt((smooth > low) & (smooth < high), sampling=spacing)
            for tissue, (low, high) in TISSUES.items()
        }

    def place(
        self,
        rng: np.random.Generator,
        diameter: float,
        tissues: Sequence[str],
        taken: Sequence[tuple[float, float, float]] = (),
        border: float = 0.0,
    ) -> tuple[float, float, str] | None:
        """Draw a place for a lesion.

        Args:
            rng: draws it.
            diameter: of the lesion, mm.
            tissues: where it may lie; each tissue that has room is as likely as the others.
            taken: (row, column, diameter in mm) of lesions that are there.
            border: pixels at the slice's edges to be left out.

        Returns:
            Row, column and tissue; None where there is no room.
        """
        height, width = next(iter(self.depth.values())).shape
        y, x = np.arange(height)[:, None], np.arange(width)
        free = (np.minimum(y, height - 1 - y) >= border) & (np.minimum(x, width - 1 - x) >= border)
        for row, column, other in taken:
            distance = np.hypot((y - row) * self.spacing[0], (x - column) * self.spacing[1])
            free &= distance > diameter + other + 2 * _GAP_MM
        room = {tissue: np.flatnonzero(free & (self.depth[tissue] >= diameter / 2 + _GAP_MM)) for tissue in tissues}
        room = {tissue: places for tissue, places in room.items() if len(places)}
        if not room:
            return None
        tissue = list(room)[rng.integers(len(room))]
        row, column = divmod(int(rng.choice(room[tissue])), width)
        return float(row), float(column), tissue
