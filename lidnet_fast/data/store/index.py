"""The index of a store: a few arrays that say everything of its series and boxes and open in milliseconds."""

import dataclasses
import io
import math
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from lidnet_fast.data.formats.geometry import Geometry
from lidnet_fast.files import whole

_PAIRS_AT_ONCE = 2**18

SPLITS = ("train", "val", "test")

_COLUMNS: dict[str, tuple[str, tuple[int, ...]]] = {
    "series_uid": ("U", ()),
    "patient_id": ("U", ()),
    "split": ("u", ()),
    "shape": ("i", (3,)),
    "spacing": ("f", (3,)),
    "origin": ("f", (3,)),
    "orientation": ("f", (6,)),
    "has_low_dose": ("b", ()),
    "slice_thickness": ("f", ()),
    "kernel": ("U", ()),
    "body_part": ("U", ()),
    "volume": ("i", ()),
    "box_series": ("i", ()),
    "box_z": ("i", ()),
    "box": ("f", (4,)),
    "lesion": ("i", ()),
}
"""Kind of NumPy's dtype and further dimensions of every array of the index."""
_FILE_NAMES = {"series_uid": "series_id"}
"""Arrays that have another name in the file."""

_UNKNOWN = {"slice_thickness": np.nan, "kernel": "", "body_part": ""}
"""Arrays that older stores don't have, with what says that a value is unknown."""


@dataclasses.dataclass(frozen=True)
class SeriesInfo(Geometry):
    """What the store knows of one CT series apart from its pixels; its geometry is given by keywords.

    Attributes:
        series_uid: DICOM SeriesInstanceUID, or any other name that is unique in the store.
        patient_id: the patient; all series of one patient are in one split.
        split: "train", "val" or "test".
        has_low_dose: whether a measured low-dose volume is stored next to the normal-dose one.
        slice_thickness: in mm; None where it is unknown.
        kernel: name of the reconstruction kernel; empty where it is unknown.
        body_part: DICOM BodyPartExamined; empty where it is unknown.
    """

    series_uid: str
    patient_id: str
    split: str
    has_low_dose: bool = False
    slice_thickness: float | None = None
    kernel: str = ""
    body_part: str = ""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Make one from its fields as JSON gives them back, with lists for tuples."""
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**fields)


@dataclasses.dataclass(frozen=True)
class Index:
    """The arrays, one row per series (n) or per box (m); boxes are sorted by series, then by slice.

    Attributes:
        series_uid, patient_id: str [n].
        split: uint8 [n], the place in `SPLITS`.
        shape: int32 [n, 3].
        spacing, origin: float64 [n, 3].
        orientation: float64 [n, 6].
        has_low_dose: bool [n].
        slice_thickness: float64 [n], NaN where it is unknown.
        kernel, body_part: str [n], empty where it is unknown.
        volume: int32 [n], the number in the name of the series' volumes.
        box_series, box_z: int32 [m].
        box: float32 [m, 4], (x1, y1, x2, y2) in pixels.
        lesion: int32 [m], the lesion that a box is part of; see `lesion_numbers`.
    """

    series_uid: np.ndarray
    patient_id: np.ndarray
    split: np.ndarray
    shape: np.ndarray
    spacing: np.ndarray
    origin: np.ndarray
    orientation: np.ndarray
    has_low_dose: np.ndarray
    slice_thickness: np.ndarray
    kernel: np.ndarray
    body_part: np.ndarray
    volume: np.ndarray
    box_series: np.ndarray
    box_z: np.ndarray
    box: np.ndarray
    lesion: np.ndarray

    def __post_init__(self) -> None:
        for name, (kind, columns) in _COLUMNS.items():
            array = getattr(self, name)
            rows = self.box.shape[:1] if name in ("box_series", "box_z", "box", "lesion") else self.series_uid.shape[:1]
            if array.dtype.kind != kind or array.shape != rows + columns:
                raise ValueError(f"{name} is {array.dtype} {list(array.shape)}")
        self._check_values()

    def _check_values(self) -> None:
        """Refuse values that nothing could be looked up with."""
        keys = box_keys(self.box_series, self.box_z)
        series = self.box_series.clip(0, max(len(self.shape) - 1, 0))
        sound = {
            "split": self.split < len(SPLITS),
            "shape": self.shape > 0,
            "spacing": np.isfinite(self.spacing) & (self.spacing >= 0),
            "pixel spacing": self.spacing[:, 1:] > 0,
            "origin": np.isfinite(self.origin),
            "orientation": np.isfinite(self.orientation),
            "slice_thickness": np.isnan(self.slice_thickness) | (self.slice_thickness > 0),
            "volume": self.volume >= 0,
            "box_series": self.box_series == series,
            "box_z": (self.box_z >= 0) & (self.box_z < self.shape[series, 0]) if len(self.shape) else self.box_z < 0,
            "box": np.isfinite(self.box),
            "lesion": self.lesion >= 0,
            "the boxes' order": keys[1:] >= keys[:-1],
        }
        for name, values in sound.items():
            if not values.all():
                raise ValueError(f"{name} has impossible values")

    @classmethod
    def of(cls, series: Sequence[SeriesInfo], volume: Sequence[int], boxes: Sequence[np.ndarray]) -> Self:
        """Make the index of series, the numbers of their volumes and their boxes [n, 5] (slice, x1, y1, x2, y2)."""
        rows = np.concatenate(boxes)
        box_series = np.repeat(np.arange(len(boxes), dtype=np.int32), [len(of_series) for of_series in boxes])
        order = np.lexsort((rows[:, 0], box_series))
        z, box = rows[order, 0].astype(np.int32), np.ascontiguousarray(rows[order, 1:], dtype=np.float32)
        return cls(
            series_uid=np.array([info.series_uid for info in series]),
            patient_id=np.array([info.patient_id for info in series]),
            split=np.array([SPLITS.index(info.split) for info in series], np.uint8),
            shape=np.array([info.shape for info in series], np.int32),
            spacing=np.array([info.spacing for info in series], np.float64),
            origin=np.array([info.origin for info in series], np.float64),
            orientation=np.array([info.orientation for info in series], np.float64),
            has_low_dose=np.array([info.has_low_dose for info in series], bool),
            slice_thickness=np.array([info.slice_thickness for info in series], np.float64),
            kernel=np.array([info.kernel for info in series]),
            body_part=np.array([info.body_part for info in series]),
            volume=np.array(volume, np.int32),
            box_series=box_series,
            box_z=z,
            box=box,
            lesion=lesion_numbers(box_series, z, box),
        )

    def infos(self) -> list[SeriesInfo]:
        """Return the series as objects, in their order."""
        columns = (
            self.series_uid,
            self.patient_id,
            self.split,
            self.has_low_dose,
            self.slice_thickness,
            self.kernel,
            self.body_part,
            self.shape,
            self.spacing,
            self.origin,
            self.orientation,
        )
        return [
            SeriesInfo(
                series_uid,
                patient_id,
                SPLITS[split],
                has_low_dose,
                None if math.isnan(slice_thickness) else slice_thickness,
                kernel,
                body_part,
                shape=tuple(shape),
                spacing=tuple(spacing),
                origin=tuple(origin),
                orientation=tuple(orientation),
            )
            for (
                series_uid,
                patient_id,
                split,
                has_low_dose,
                slice_thickness,
                kernel,
                body_part,
                shape,
                spacing,
                origin,
                orientation,
            ) in zip(*(column.tolist() for column in columns), strict=True)
        ]

    def save(self, path: Path) -> None:
        """Write the arrays to an .npz file."""
        with whole(path) as file:
            np.savez(file, **{_FILE_NAMES.get(name, name): getattr(self, name) for name in _COLUMNS})

    @classmethod
    def load(cls, content: bytes) -> Self:
        """Read the arrays from the content of an .npz file.

        Raises:
            ValueError: this is not what `save` wrote.
        """
        try:
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                _check_members(archive.infolist(), len(content))
            with np.load(io.BytesIO(content)) as arrays:
                older = {name: value for name, value in _UNKNOWN.items() if name not in arrays}
                columns = {name: arrays[_FILE_NAMES.get(name, name)] for name in _COLUMNS if name not in older}
            series = columns["series_uid"].shape[:1]
            return cls(**columns, **{name: np.full(series, value) for name, value in older.items()})
        except Exception as error:  # a damaged archive has zipfile and NumPy raise this and that
            raise ValueError(str(error) or type(error).__name__) from error


def _check_members(members: Sequence[zipfile.ZipInfo], size: int) -> None:
    """Refuse an archive that could unpack to more than it has: `save` compresses nothing."""
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise ValueError("its arrays are compressed, which those of an index aren't")
    if sum(member.file_size for member in members) > size:
        raise ValueError("its arrays are larger than the file")


def box_keys(series: np.ndarray, z: np.ndarray) -> np.ndarray:
    """One sortable int64 per (series, z)."""
    return (series.astype(np.int64) << 32) | z.astype(np.int64)


def lesion_numbers(series: np.ndarray, z: np.ndarray, box: np.ndarray) -> np.ndarray:
    """Number the lesions: boxes on neighbouring slices of a series that share area are the same lesion's.

    What a chain of such boxes connects is one lesion; boxes on one slice are joined only through their neighbours.

    Args:
        series: int [m], the boxes' series.
        z: int [m], their slices; boxes are sorted by (series, z).
        box: float [m, 4], (x1, y1, x2, y2).

    Returns:
        int32 [m], numbers from 0 on.
    """
    keys = box_keys(series, z)
    first, last = np.searchsorted(keys, [keys + 1, keys + 2])
    pairs = np.concatenate([[0], np.cumsum(last - first)])
    numbers = np.arange(len(keys))
    begin = 0
    x1, y1, x2, y2 = np.ascontiguousarray(box.T)
    # Pairs of a box and one on the slice after it, in blocks: together, those of crowded slices wouldn't fit in memory.
    while begin < len(keys):
        end = max(begin + 1, int(np.searchsorted(pairs, pairs[begin] + _PAIRS_AT_ONCE, "right")) - 1)
        lower = np.repeat(np.arange(begin, end), (last - first)[begin:end])
        upper = np.repeat((first - pairs[:-1])[begin:end], (last - first)[begin:end])
        upper += np.arange(pairs[begin], pairs[end])
        apart = numbers[lower] != numbers[upper]
        lower, upper = lower[apart], upper[apart]
        touching = np.minimum(x2[lower], x2[upper]) > np.maximum(x1[lower], x1[upper])
        touching &= np.minimum(y2[lower], y2[upper]) > np.maximum(y1[lower], y1[upper])
        if touching.any():
            linked = np.stack([numbers[lower[touching]], numbers[upper[touching]]])
            links = coo_array((np.ones(linked.shape[1], bool), linked), shape=(len(keys), len(keys)))
            numbers = connected_components(links, directed=False)[1][numbers]
        begin = end
    return np.unique(numbers, return_inverse=True)[1].astype(np.int32)
