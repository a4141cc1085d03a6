"""LUNA16's tables: nodules as spheres in space, seriesuid, coordX, coordY, coordZ (mm), diameter_mm; and candidates.

The rule for boxes of ``annotations.csv``: a nodule is a sphere; on each slice whose plane cuts it, its box is the
bounding square of the circle that the plane cuts out of it, clipped to the image. Circles smaller than
`SMALLEST_CIRCLE` pixels across are left out. A nodule that lies between two slices, or is smaller than that on all of
them, keeps the one slice nearest to its centre, with the box of the whole sphere. Places in space become pixels by
origin, spacing and direction of the image.
"""

from collections.abc import Container, Iterator, Sequence
from pathlib import Path

import numpy as np

from lidnet_fast.data.annotations.csv import number, read_rows
from lidnet_fast.data.formats.geometry import Series
from lidnet_fast.errors import InputError

COLUMNS = ("seriesuid", "coordX", "coordY", "coordZ", "diameter_mm")
CANDIDATE_COLUMNS = (*COLUMNS[:4], "probability")

SMALLEST_CIRCLE = 2.0
"""Diameter, in pixels, of the smallest circle that is given a box."""
LARGEST_SPHERE = 1e4
"""Diameter, in mm, from which on a value can't be meant."""
UNKNOWN_DIAMETER = 10.0
"""In mm, of findings whose diameter is given as -1, as LUNA16's evaluation takes them."""

Row = tuple[float, float, float, float]


def recognises(path: Path) -> bool:
    """Tell whether a CSV file is one of LUNA16's."""
    with path.open("rb") as file:
        return {b"coordX", b"diameter_mm"} <= {name.strip() for name in file.readline().split(b",")}


def read_boxes(path: Path, series: Sequence[Series]) -> dict[str, np.ndarray]:
    """Read the nodules of some series as boxes; lines of other series are passed over.

    Args:
        path: the file.
        series: the series; their UIDs are the file's.

    Returns:
        Boxes by series UID, float32 [n, 5] (slice, x1, y1, x2, y2) in pixels; n may be 0.

    Raises:
        InputError: wrong columns, a value that isn't a number, a nodule outside its image. The message names the file,
            the line and the cause.
    """
    known = {one.series_uid: one for one in series}
    found: dict[str, list[np.ndarray]] = {uid: [] for uid in known}
    for where, uid, (*centre, diameter) in _spheres(path):
        one = known.get(uid)
        if one is not None:
            boxes = sphere_boxes(one, np.array(centre), diameter / 2)
            if not len(boxes):
                raise InputError(f"{where}: the nodule lies outside series {one.series_uid}")
            found[one.series_uid].append(boxes)
    return {uid: np.concatenate([np.empty((0, 5), np.float32), *boxes]) for uid, boxes in found.items()}


def read_spheres(path: Path, *, excluded: bool = False) -> dict[str, list[Row]]:
    """Read the findings of all series.

    Args:
        path: as ``annotations.csv``, or ``annotations_excluded.csv``.
        excluded: take a negative diameter, too, which stands for `UNKNOWN_DIAMETER`.

    Returns:
        (x, y, z, diameter) in mm by series UID.

    Raises:
        InputError: wrong columns, or a value that can't be; the message names the file, the line and the cause.
    """
    found: dict[str, list[Row]] = {}
    for _, uid, row in _spheres(path, excluded=excluded):
        found.setdefault(uid, []).append(row)
    return found


def _spheres(path: Path, *, excluded: bool = False) -> Iterator[tuple[str, str, Row]]:
    """Where each line is, for messages; its series; and its sphere (x, y, z, diameter)."""
    _, rows = read_rows(path, COLUMNS)
    for line, row in rows:
        where = f"{path}, line {line}"
        x, y, z, diameter = (number(row, name, where) for name in COLUMNS[1:])
        if excluded and diameter < 0:
            diameter = UNKNOWN_DIAMETER
        if not 0 < diameter < LARGEST_SPHERE:
            raise InputError(f"{where}: the nodule at {[x, y, z]} of {diameter:g} mm isn't a sphere")
        yield where, row["seriesuid"], (x, y, z, diameter)


def read_candidates(path: Path, series_uids: Container[str], among: str) -> dict[str, list[Row]]:
    """Read what a detector found: seriesuid, coordX, coordY, coordZ (mm), probability.

    Args:
        path: the CSV file.
        series_uids: the series that there are.
        among: what they are, for messages.

    Returns:
        (x, y, z, probability) by series UID, without those that have none.

    Raises:
        InputError: wrong columns, a value that isn't a number, or a series that isn't there; the message names the
            file, the line and the cause.
    """
    _, rows = read_rows(path, CANDIDATE_COLUMNS)
    found: dict[str, list[Row]] = {}
    for line, row in rows:
        where = f"{path}, line {line}"
        if row["seriesuid"] not in series_uids:
            raise InputError(f"{where}: there is no series {row['seriesuid']} among {among}")
        x, y, z, probability = (number(row, name, where) for name in CANDIDATE_COLUMNS[1:])
        found.setdefault(row["seriesuid"], []).append((x, y, z, probability))
    return found


def read_series_uids(path: Path) -> list[str]:
    """Read ``seriesuids.csv``: one SeriesInstanceUID a line, without a heading.

    Raises:
        InputError: it can't be read, a line holds something else, or there is none.
    """
    try:
        uids = path.read_text(encoding="utf-8-sig").split()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: can't be read: {getattr(error, 'strerror', None) or error}") from error
    for uid in uids:
        if "," in uid:
            raise InputError(f"{path}: {uid!r} isn't a series UID; it must have one a line, without a heading")
    if not uids:
        raise InputError(f"{path}: names no series")
    return list(dict.fromkeys(uids))


def sphere_boxes(series: Series, centre: np.ndarray, radius: float) -> np.ndarray:
    """Return the boxes of a sphere on a series' slices by the rule above.

    Args:
        series: the series; its slices needn't lie straight.
        centre: (x, y, z) in mm.
        radius: mm.

    Returns:
        float32 [n, 5] (slice, x1, y1, x2, y2); n is 0 where the sphere lies outside.
    """
    _, height, width = series.shape
    x, y, along = series.to_pixels(centre[None])[0]
    places = series.to_pixels(np.array(series.positions))
    away = np.abs(places[:, 2] - along)
    if away.min() > max(radius, series.spacing[0]):
        return np.empty((0, 5), np.float32)
    circles = np.sqrt(np.maximum(radius**2 - away**2, 0))
    slices = np.flatnonzero(2 * circles / max(series.spacing[1:]) >= SMALLEST_CIRCLE)
    if not len(slices):
        slices = np.array([away.argmin()])
        circles[slices] = radius
    # Half a pixel from the centre of the first pixel to its edge.
    middle = np.array([x, y]) - places[slices, :2] + 0.5
    half = circles[slices, None] / np.array([series.spacing[2], series.spacing[1]])
    edges = np.array([width, height, width, height])
    corners = np.concatenate([middle - half, middle + half], axis=1).clip(0, edges).astype(np.float32)
    inside = (corners[:, 0] < corners[:, 2]) & (corners[:, 1] < corners[:, 3])
    return np.concatenate([slices[:, None], corners], axis=1)[inside].astype(np.float32)
