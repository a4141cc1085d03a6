"""Sizes and places of real lung nodules: the LIDC-IDRI lesion boxes that the package ships (``tables/README.md``)."""

import functools
import gzip
from importlib import resources

import numpy as np

IMAGE_SIZE = 512
"""Height and width, in pixels, of the images the table's boxes refer to."""

MIN_TIGHT_SIDE = 3.0
"""Smallest side, in pixels, that a tight box is given."""

_DTYPE = np.dtype(
    [("scan", "i4"), ("z", "f4"), ("x1", "f4"), ("y1", "f4"), ("x2", "f4"), ("y2", "f4"), ("readers", "i4")]
)


@functools.cache
def _table() -> np.ndarray:
    source = resources.files("lidnet_fast.data.phantoms") / "tables" / "lidc_boxes.csv.gz"
    with source.open("rb") as raw, gzip.open(raw, "rt") as text:
        table = np.loadtxt(text, dtype=_DTYPE, delimiter=",", skiprows=1)
    table.setflags(write=False)
    return table


def load_lidc_boxes(min_readers: int = 1) -> np.ndarray:
    """Load the LIDC-IDRI lesion boxes (Armato et al. 2011), one row per nodule and axial slice.

    Args:
        min_readers: keep the rows that at least this many of the four radiologists outlined, 1 to 4.

    Returns:
        Read-only structured array with the fields ``scan`` (int32), ``z`` (float32, mm), ``x1, y1, x2, y2`` (float32,
        pixels of a 512x512 image; the contours run through the first pixel outside the nodule) and ``readers`` (int32).

    Raises:
        ValueError: ``min_readers`` is not in 1..4.
    """
    if not 1 <= min_readers <= 4:
        raise ValueError(f"min_readers must be 1 to 4, got {min_readers}")
    table = _table()
    if min_readers > 1:
        table = table[table["readers"] >= min_readers]
        table.setflags(write=False)
    return table


@functools.cache
def lesion_geometry(min_readers: int = 2) -> np.ndarray:
    """Return width, height and centre of every nodule section, from boxes made tight (one pixel less on each side).

    Args:
        min_readers: as for :func:`load_lidc_boxes`.

    Returns:
        Read-only float32 [n, 4]: (w, h, cx, cy) in pixels of a 512x512 image; sides are at least ``MIN_TIGHT_SIDE``.

    Raises:
        ValueError: ``min_readers`` is not in 1..4.
    """
    table = load_lidc_boxes(min_readers)
    width, height = table["x2"] - table["x1"] - 2, table["y2"] - table["y1"] - 2
    centre_x, centre_y = (table["x1"] + table["x2"]) / 2, (table["y1"] + table["y2"]) / 2
    sides = np.maximum(np.stack([width, height], axis=1), np.float32(MIN_TIGHT_SIDE))
    geometry = np.concatenate([sides, np.stack([centre_x, centre_y], axis=1)], axis=1)
    geometry.setflags(write=False)
    return geometry


def boxes_of_slices(min_readers: int = 2) -> list[np.ndarray]:
    """Return the boxes of every slice that has some, float64 [n, 4]: (x1, y1, x2, y2) in pixels of a 512x512 image.

    Args:
        min_readers: as for :func:`load_lidc_boxes`.

    Raises:
        ValueError: ``min_readers`` is not in 1..4.
    """
    table = load_lidc_boxes(min_readers)
    _, slice_of_box, counts = np.unique(table[["scan", "z"]], return_inverse=True, return_counts=True)
    corners = np.stack([table[name] for name in ("x1", "y1", "x2", "y2")], axis=1).astype(np.float64)
    return np.split(corners[np.argsort(slice_of_box, kind="stable")], np.cumsum(counts)[:-1])
