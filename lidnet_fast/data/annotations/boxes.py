"""Lesion boxes from a CSV file; docs/box_csv.md describes it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lidnet_fast.data.annotations.csv import number, read_rows, whole_number
from lidnet_fast.data.formats.geometry import Series
from lidnet_fast.errors import InputError

COLUMNS = ("series_uid", "x1", "y1", "x2", "y2")
SLICE_COLUMNS = ("slice", "z_mm", "sop_instance_uid")


def read_boxes(path: Path, series: Sequence[Series], rejected: frozenset[str] = frozenset()) -> dict[str, np.ndarray]:
    """Read a box file and find the slices it names.

    Args:
        path: CSV file with the columns series_uid, x1, y1, x2, y2 and one of slice, z_mm, sop_instance_uid.
        series: the series it may speak of.
        rejected: series whose lines are passed over.

    Returns:
        For every series UID of `series` its boxes, float32 [n, 5] (slice, x1, y1, x2, y2) in pixels, in the file's
        order; n is 0 for series that the file doesn't mention.

    Raises:
        InputError: wrong columns, a value that isn't a number, a series or slice that doesn't exist, a box that is
            empty or reaches outside its image. The message names the file, the line and the cause.
    """
    slice_column, rows = read_rows(path, COLUMNS, SLICE_COLUMNS)
    known = {one.series_uid: one for one in series}
    slices_of_sop: dict[tuple[str, str], list[int]] = {}
    for scan in series:
        for place, uid in enumerate(scan.sop_instance_uids):
            slices_of_sop.setdefault((scan.series_uid, uid), []).append(place)
    found: dict[str, list[list[float]]] = {uid: [] for uid in known}
    for line, row in rows:
        where = f"{path}, line {line}"
        one = known.get(row["series_uid"])
        if one is None:
            if row["series_uid"] in rejected:
                continue
            raise InputError(f"{where}: there is no series {row['series_uid']} among the {len(known)} CT series found")
        if slice_column == "sop_instance_uid":
            slices = slices_of_sop.get((one.series_uid, row["sop_instance_uid"]), [])
            if len(slices) != 1:
                count = f"{len(slices)} images" if slices else "no image"
                raise InputError(f"{where}: series {one.series_uid} has {count} {row['sop_instance_uid']}")
            z = slices[0]
        elif slice_column == "z_mm":
            z = slice_at(one, number(row, "z_mm", where), where)
        else:
            z = whole_number(row, "slice", where)
        box = np.array([number(row, name, where) for name in COLUMNS[1:]]).astype(np.float32)
        fault = box_fault(z, box, one.source_shape)
        if fault:
            raise InputError(f"{where}: {fault} (series {one.series_uid})")
        placed = one.from_source(np.array([z, *box]))
        found[one.series_uid].append([placed[0] if slice_column == "slice" else z, *placed[1:]])
    return {uid: np.array(boxes, np.float32).reshape(-1, 5) for uid, boxes in found.items()}


def box_fault(z: float, box: np.ndarray, shape: tuple[int, int, int]) -> str | None:
    """Say what is wrong with one lesion box, or None when it is sound.

    Args:
        z: slice index of the box.
        box: [4] (x1, y1, x2, y2), pixel-edge coordinates.
        shape: (Z, H, W) of the series.
    """
    depth, height, width = shape
    x1, y1, x2, y2 = (float(value) for value in box)
    text = f"box ({x1:g}, {y1:g}, {x2:g}, {y2:g})"
    if not np.isfinite([z, x1, y1, x2, y2]).all():
        return f"{text} on slice {z:g} isn't finite"
    if z != int(z) or not 0 <= z < depth:
        return f"{text}: slice {z:g} isn't one of 0..{depth - 1}"
    if x2 <= x1 or y2 <= y1:
        return f"{text} is empty: x1 < x2 and y1 < y2 are needed"
    if x1 < 0 or y1 < 0 or x2 > width or y2 > height:
        return f"{text} reaches outside its {width} x {height} image"
    return None


def slice_at(series: Series, z_mm: float, where: str) -> int:
    """Return the one slice whose ImagePositionPatient has this z, to within half the distance to the next slice."""
    z = np.array([position[2] for position in series.positions])
    away = np.abs(z - z_mm)
    nearest = int(np.argmin(away)) if np.isfinite(z_mm) else 0
    others = np.abs(np.delete(z, nearest) - z[nearest])
    step = float(others.min()) if len(others) else series.spacing[0] or 1.0
    if step < 1e-3:
        raise InputError(
            f"{where}: slices of series {series.series_uid} share their z_mm. To fix: use the column slice"
        )
    if not away[nearest] <= step / 2:
        raise InputError(
            f"{where}: series {series.series_uid} has no slice at z_mm {z_mm:g}; "
            f"it reaches from {z.min():g} to {z.max():g}"
        )
    return nearest
