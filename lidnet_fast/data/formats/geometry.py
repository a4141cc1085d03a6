"""The geometry of scans, and what every source of CT yields: series that have one before their pixels are read."""

import abc
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lidnet_fast.data.formats.account import Rejected
from lidnet_fast.errors import InputError

LOWEST_HU = -1024
"""Where volumes are cut off below: what scanners pad with and store as the darkest air."""

_SMALLEST_TILT = 0.02
"""Slices are tilted where they move sideways by more than this fraction of what they move along their normal ..."""
_STRAIGHT = 0.5
"""... and by more than this in all, in pixels; nor may one lie further than this from the line of the others."""
_UNEVEN = 0.1
"""Slice distances are uneven where one differs from their median by more than this fraction of it ..."""
_ROUNDED_MM = 0.1
"""... and by more than this, as some archives round positions."""
_SMALLEST_MM, _LARGEST_MM = 1e-6, 1e6
"""Pixels below and lengths above this are no scanner's, and would overflow what is computed from them."""

_SAME_PLACE_MM = 0.1
"""Slices whose first pixels are no further apart than this are at the same place."""
_SAME_SPACING = 1e-3
"""Pixel spacings (mm) and direction cosines closer than this are the same."""
_SAME_SLICE_DISTANCE_MM = 1e-2

Triple = tuple[float, float, float]
Directions = tuple[float, float, float, float, float, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Geometry:
    """The size of a scan, and where it lies in space.

    Attributes:
        shape: (Z, H, W), slices sorted by their position along the slice normal.
        spacing: (z, y, x) in mm; z is 0 where it is unknown (one slice without a stated thickness).
        origin: (x, y, z) in mm, the centre of the first slice's first pixel (DICOM ImagePositionPatient).
        orientation: six direction cosines of the rows and the columns (DICOM ImageOrientationPatient).
    """

    shape: tuple[int, int, int]
    spacing: Triple
    origin: Triple
    orientation: Directions

    @property
    def axes(self) -> np.ndarray:
        """[3, 3]: the direction of the rows, of the columns and of the slice normal."""
        rows = np.array(self.orientation[:3])
        columns = np.array(self.orientation[3:])
        return np.stack([rows, columns, np.cross(rows, columns)])

    @property
    def known_places(self) -> np.ndarray | None:
        """[Z, 3]: the centre of each slice's first pixel in mm, or None where only the first slice's is known."""
        return None

    def to_patient(self, slices: np.ndarray, points: np.ndarray) -> np.ndarray:
        """Turn places on slices into points in space.

        Args:
            slices: int [n], from 0.
            points: [n, 2], x and y in pixels from the outer corner of the first pixel, as boxes have them.

        Returns:
            float64 [n, 3]: (x, y, z) in mm, in DICOM's patient coordinates (LPS).
        """
        places = self.known_places
        if places is None:
            places = self.origin + np.arange(self.shape[0])[:, None] * self.spacing[0] * self.axes[2]
        in_plane = (np.asarray(points, np.float64) - 0.5) * [self.spacing[2], self.spacing[1]]
        return places[slices] + in_plane @ self.axes[:2]

    def fault(self) -> str | None:
        """Say what no scanner's geometry is like, or None where it is usable."""
        places = self.known_places
        lengths = np.abs([*self.spacing, *self.orientation, *self.origin, *np.ravel([] if places is None else places)])
        if (lengths <= _LARGEST_MM).all() and self.spacing[0] >= 0 and min(self.spacing[1:]) >= _SMALLEST_MM:
            return None
        return f"has no usable geometry: spacing (z, y, x) {self.spacing}, first slice at {self.origin}"

    def difference(self, other: "Geometry", *, places: bool = True) -> "Difference | None":
        """Compare with the geometry of another scan.

        Args:
            other: the other one.
            places: compare where the slices lie, too: each of them where both sides know, otherwise the first one and
                the distance between slices.

        Returns:
            The first of size, pixel spacing, orientation and place that differs by more than archives and file formats
            round, or None where both are the same.
        """
        spacings, mine, others = "spacing (z, y, x)", self.known_places, other.known_places
        if not places and self.shape[1:] != other.shape[1:]:
            return Difference("size (rows, columns)", self.shape[1:], other.shape[1:])
        if places and self.shape != other.shape:
            return Difference("shape", self.shape, other.shape)
        if not _near(self.spacing[1:], other.spacing[1:], _SAME_SPACING):
            return Difference(spacings, self.spacing, other.spacing)
        if not _near(self.orientation, other.orientation, _SAME_SPACING):
            return Difference("orientation", self.orientation, other.orientation)
        if places and mine is not None and others is not None:
            for one, two in zip(mine, others, strict=True):
                if not _near(one, two, _SAME_PLACE_MM):
                    return Difference("place of a slice", one, two)
        elif places:
            known = self.shape[0] > 1 and min(self.spacing[0], other.spacing[0]) > 0
            if known and not _near(self.spacing[:1], other.spacing[:1], _SAME_SLICE_DISTANCE_MM):
                return Difference(spacings, self.spacing, other.spacing)
            if not _near(self.origin, other.origin, _SAME_PLACE_MM):
                return Difference("origin", self.origin, other.origin)
        return None


def slice_distance(scan: Geometry) -> float | None:
    """The distance between neighbouring slices in mm; None where there is one slice, or where it is unknown."""
    return scan.spacing[0] if scan.shape[0] > 1 and scan.spacing[0] > 0 else None


@dataclasses.dataclass(frozen=True)
class Difference:
    """In what two geometries differ.

    Attributes:
        what: shape, spacing, orientation or place.
        mine: of the first.
        other: of the second.
    """

    what: str
    mine: Sequence[float]
    other: Sequence[float]

    def __str__(self) -> str:
        mine, other = (f"({', '.join(f'{value:g}' for value in values)})" for values in (self.mine, self.other))
        return f"its {self.what} is {mine}, not {other}"


def _near(one: Sequence[float] | np.ndarray, two: Sequence[float] | np.ndarray, tolerance: float) -> bool:
    return bool(np.allclose(one, two, rtol=0, atol=tolerance))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Series(Geometry, abc.ABC):
    """One CT series, its slices sorted by their position along the slice normal.

    Attributes:
        series_uid: DICOM SeriesInstanceUID, or another name that is unique among the sources.
        patient_id: the patient, or a name that is as good as one where the source has none.
        files: what it is read from.
        positions: centres of the slices' first pixels, (x, y, z) in mm; the first one is the origin.
        sop_instance_uids: of the slices, where the source has them.
        description: DICOM SeriesDescription, where the source has one.
        slice_thickness: in mm; None where it is unknown.
        kernel: name of the reconstruction kernel; empty where it is unknown.
        body_part: DICOM BodyPartExamined; empty where it is unknown.
        split: the split that the data set's authors put it in, if they did.
        boxes: lesion boxes (slice, x1, y1, x2, y2) that come with the images, in pixels.
    """

    origin: Triple = dataclasses.field(init=False)
    series_uid: str
    patient_id: str
    files: tuple[Path, ...]
    positions: tuple[Triple, ...]
    sop_instance_uids: tuple[str, ...] = ()
    description: str = ""
    slice_thickness: float | None = None
    kernel: str = ""
    body_part: str = ""
    split: str | None = None
    boxes: tuple[tuple[float, float, float, float, float], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "origin", self.positions[0])
        if fault := self.fault():
            raise InputError(f"{self.files[0]}: {fault}")

    @property
    def known_places(self) -> np.ndarray:
        """See `Geometry`."""
        return np.array(self.positions)

    @abc.abstractmethod
    def read(self) -> np.ndarray:
        """Decode the series to int16 [Z, H, W], HU, nothing below `LOWEST_HU`.

        Raises:
            InputError: a file is damaged or doesn't hold HU; the message names it.
        """

    def rejected(self, reason: str) -> Rejected:
        """What an account says of the series when it can't be used."""
        return Rejected(self.series_uid, self.files[0].parent, reason, self.files)

    @property
    def distances(self) -> tuple[float, ...]:
        """Positions of the slices along their normal: ascending, mm."""
        return tuple((np.array(self.positions) @ self.axes[2]).tolist())

    @property
    def source_shape(self) -> tuple[int, int, int]:
        """The shape in the source's own order of axes."""
        return self.shape

    def from_source(self, row: np.ndarray) -> np.ndarray:
        """Turn a box (slice, x1, y1, x2, y2) as the source counts into one on the slices here."""
        return row

    def to_pixels(self, points: np.ndarray) -> np.ndarray:
        """Turn points in space into places on the slices.

        Args:
            points: [n, 3] (x, y, z) in mm.

        Returns:
            [n, 3]: x and y on the first slice in pixels, counted from the centre of its first pixel, and the distance
            along the normal in mm, comparable with `distances`.
        """
        axes = self.axes
        x, y = ((points - np.array(self.positions[0])) @ axes[:2].T / [self.spacing[2], self.spacing[1]]).T
        return np.stack([x, y, points @ axes[2]], axis=1)


def hu_volume(values: np.ndarray) -> np.ndarray:
    """Round signed numbers, which are overwritten, to int16; what is below `LOWEST_HU` or above int16 is cut off."""
    np.clip(values, LOWEST_HU, np.iinfo(np.int16).max, out=values)
    if values.dtype.kind == "f":
        np.rint(values, out=values)
    return values.astype(np.int16)


def tilt_fault(series: Series) -> str | None:
    """Say how the slices are shifted against each other (a tilted gantry), or None where they lie straight."""
    shifts = sideways(series)
    along = series.distances[-1] - series.distances[0]
    across = float(np.linalg.norm(shifts[-1] * [series.spacing[2], series.spacing[1]]))
    if np.abs(shifts[-1]).max() > _STRAIGHT and across > _SMALLEST_TILT * along:
        return f"its slices are tilted by {np.degrees(np.arctan2(across, along)):.1f} degrees (gantry tilt)"
    line = np.subtract(series.distances, series.distances[0])[:, None] * shifts[-1] / max(along, 1e-9)
    return "its slices are shifted sideways" if np.abs(shifts - line).max() > _STRAIGHT else None


def spacing_fault(series: Series) -> str | None:
    """Say how uneven the slice distances are, or None where they are even."""
    gaps = np.diff(series.distances)
    usual = series.spacing[0]
    if not len(gaps) or np.abs(gaps - usual).max() <= max(_UNEVEN * usual, _ROUNDED_MM):
        return None
    return f"its slices are unevenly spaced, {gaps.min():g} to {gaps.max():g} mm apart"


def sideways(series: Series) -> np.ndarray:
    """Return how far each slice lies from the normal through the first one, [Z, 2] (x, y) in pixels."""
    return series.to_pixels(np.array(series.positions))[:, :2]
