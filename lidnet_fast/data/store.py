"""The store: a folder of compressed CT volumes with an index of their series, slices and lesion boxes.

Layout::

    store.json              format name and version, software version, low-dose simulation, split parameters
    series.json             one record per series, in the order of the series indices (`SeriesInfo`)
    boxes.npz               series int32 [n], z int32 [n], box float32 [n, 4], sorted by (series, z)
    volumes/00000.b2nd      normal-dose volume, int16 HU [Z, H, W] (blosc2, zstd)
    volumes/00000.low_dose.b2nd   its measured low-dose twin, where there is one

A chunk is one slice and a block is 128 x 128 of its pixels, so that a window is read by decoding only the blocks it
touches. Opening a store reads the three index files and no volume.
"""

import dataclasses
import json
import shutil
import uuid
import zipfile
from collections import OrderedDict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import blosc2
import numpy as np

import lidnet_fast
from lidnet_fast.errors import InputError

STORE_FORMAT = "lidnet_fast-store"
STORE_VERSION = 1
SPLITS = ("train", "val", "test")

_BLOCK = 128
_OPEN_VOLUMES = 64


@dataclasses.dataclass(frozen=True)
class SeriesInfo:
    """What the store knows of one CT series apart from its pixels.

    Attributes:
        series_id: DICOM SeriesInstanceUID, or any other name that is unique in the store.
        patient_id: the patient; all series of one patient are in one split.
        split: "train", "val" or "test".
        shape: (Z, H, W), slices sorted by their position along the slice normal.
        spacing: (z, y, x) in mm; z is 0 where it is unknown (one slice without a stated thickness).
        origin: (x, y, z) in mm, the centre of the first slice's first pixel (DICOM ImagePositionPatient).
        orientation: six direction cosines of the rows and the columns (DICOM ImageOrientationPatient).
        has_low_dose: whether a measured low-dose volume is stored beside the normal-dose one.
    """

    series_id: str
    patient_id: str
    split: str
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    origin: tuple[float, float, float]
    orientation: tuple[float, float, float, float, float, float]
    has_low_dose: bool = False


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


def _series_info(record: dict[str, Any]) -> SeriesInfo:
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in record.items()}
    return SeriesInfo(**values)


def _volume_name(index: int, low_dose: bool) -> str:
    return f"{index:05d}.low_dose.b2nd" if low_dose else f"{index:05d}.b2nd"


class StoreWriter:
    """Writes a store: all of it appears at `path` when the ``with`` block ends well, and nothing when it doesn't.

    Args:
        path: the store's folder; must not exist yet.
        simulation: parameters of the low-dose simulation to be used with this store (JSON-able), or None.
        split: how the patients were split (JSON-able), for the record.

    Raises:
        InputError: `path` exists already, or (from `add_series` and at the end) what was added is inconsistent.
    """

    def __init__(
        self, path: str | Path, *, simulation: dict[str, Any] | None = None, split: dict[str, Any] | None = None
    ):
        self.path = Path(path)
        self._simulation = simulation
        self._split = split
        self._infos: list[SeriesInfo] = []
        self._boxes: list[np.ndarray] = []
        self._series_ids: set[str] = set()
        self._patient_splits: dict[str, str] = {}
        # A sibling, so that the final rename stays within one file system.
        self._work = self.path.with_name(f".{self.path.name}.partial-{uuid.uuid4().hex[:8]}")

    def __enter__(self) -> Self:
        if self.path.exists():
            raise InputError(f"{self.path}: exists already; a store is written to a new folder")
        (self._work / "volumes").mkdir(parents=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            shutil.rmtree(self._work, ignore_errors=True)

    def add_series(
        self, info: SeriesInfo, volume: np.ndarray, boxes: np.ndarray, low_dose: np.ndarray | None = None
    ) -> int:
        """Write one series and return its index.

        Args:
            info: the series; `shape` and `has_low_dose` must agree with the arrays.
            volume: int16 [Z, H, W], HU at normal dose.
            boxes: float [n, 5] (slice, x1, y1, x2, y2) in pixels; n may be 0.
            low_dose: int16 [Z, H, W], the same scan at low dose, or None.

        Raises:
            InputError: naming the series (and the row of `boxes`) and what is wrong; nothing is added.
        """
        boxes = np.asarray(boxes, dtype=np.float32)
        self._check(info, volume, boxes, low_dose)
        index = len(self._infos)
        self._write_volume(index, volume, low_dose=False)
        if low_dose is not None:
            self._write_volume(index, low_dose, low_dose=True)
        self._infos.append(info)
        self._boxes.append(boxes[np.argsort(boxes[:, 0], kind="stable")])
        self._series_ids.add(info.series_id)
        self._patient_splits[info.patient_id] = info.split
        return index

    def _check(self, info: SeriesInfo, volume: np.ndarray, boxes: np.ndarray, low_dose: np.ndarray | None) -> None:
        name = f"series {info.series_id}"
        if info.series_id in self._series_ids:
            raise InputError(f"{name}: is in the store already")
        if info.split not in SPLITS:
            raise InputError(f"{name}: split {info.split!r} isn't one of {', '.join(SPLITS)}")
        other = self._patient_splits.get(info.patient_id, info.split)
        if other != info.split:
            raise InputError(f"{name}: patient {info.patient_id} would be in two splits, {other} and {info.split}")
        if volume.dtype != np.int16 or volume.ndim != 3 or 0 in volume.shape:
            raise InputError(f"{name}: int16 [Z, H, W] is needed, got {volume.dtype} {list(volume.shape)}")
        if tuple(info.shape) != volume.shape:
            raise InputError(f"{name}: its shape is given as {list(info.shape)}, its volume is {list(volume.shape)}")
        depth, height, width = info.spacing
        if (
            not np.isfinite([*info.spacing, *info.origin, *info.orientation]).all()
            or min(height, width) <= 0
            or depth < 0
        ):
            raise InputError(f"{name}: unusable geometry: spacing {info.spacing}, origin {info.origin}")
        if info.has_low_dose != (low_dose is not None):
            raise InputError(f"{name}: has_low_dose is {info.has_low_dose}, which the given volumes contradict")
        if low_dose is not None and (low_dose.dtype != np.int16 or low_dose.shape != volume.shape):
            raise InputError(
                f"{name}: the low-dose volume is {low_dose.dtype} {list(low_dose.shape)}, "
                f"the normal-dose one int16 {list(volume.shape)}"
            )
        if boxes.ndim != 2 or boxes.shape[1] != 5:
            raise InputError(f"{name}: boxes must be [n, 5] (slice, x1, y1, x2, y2), got {list(boxes.shape)}")
        for row, (z, *box) in enumerate(boxes):
            fault = box_fault(float(z), np.array(box), volume.shape)
            if fault:
                raise InputError(f"{name}, row {row} of its boxes: {fault}")

    def _write_volume(self, index: int, volume: np.ndarray, low_dose: bool) -> None:
        _, height, width = volume.shape
        blosc2.asarray(
            np.ascontiguousarray(volume),
            urlpath=str(self._work / "volumes" / _volume_name(index, low_dose)),
            mode="w",
            chunks=(1, height, width),
            blocks=(1, min(_BLOCK, height), min(_BLOCK, width)),
            cparams=blosc2.CParams(codec=blosc2.Codec.ZSTD, clevel=3, filters=[blosc2.Filter.BITSHUFFLE]),
        )

    def _finish(self) -> None:
        if not self._infos:
            raise InputError(f"{self.path}: no series to write")
        counts = [len(rows) for rows in self._boxes]
        rows = np.concatenate(self._boxes)
        np.savez(
            self._work / "boxes.npz",
            series=np.repeat(np.arange(len(counts), dtype=np.int32), counts),
            z=rows[:, 0].astype(np.int32),
            box=np.ascontiguousarray(rows[:, 1:]),
        )
        (self._work / "series.json").write_text(
            json.dumps([dataclasses.asdict(info) for info in self._infos], indent=1)
        )
        header = {
            "format": STORE_FORMAT,
            "version": STORE_VERSION,
            "software": f"lidnet_fast {lidnet_fast.__version__}",
            "simulation": self._simulation,
            "split": self._split,
        }
        (self._work / "store.json").write_text(json.dumps(header, indent=1))
        if self.path.exists():
            raise InputError(f"{self.path}: was made by somebody else meanwhile")
        self._work.rename(self.path)


class Store:
    """A store opened for reading; volumes are opened when first read, and at most `_OPEN_VOLUMES` are kept open.

    It pickles without its open volumes, so that it can be handed to data-loading workers.

    Args:
        path: the store's folder.

    Attributes:
        path: the store's folder.
        series: the series, by index.
        simulation: parameters of the low-dose simulation to be used with this store, or None.
        split: how the patients were split, as `StoreWriter` was told.

    Raises:
        InputError: there is no store at `path`, it is of another version, or its index is damaged.
    """

    path: Path
    series: list[SeriesInfo]
    simulation: dict[str, Any] | None
    split: dict[str, Any] | None

    def __init__(self, path: str | Path):
        self.path = Path(path)
        header = self._read_header()
        self.simulation = header.get("simulation")
        self.split = header.get("split")
        try:
            records = json.loads((self.path / "series.json").read_text())
            self.series = [_series_info(record) for record in records]
            with np.load(self.path / "boxes.npz") as arrays:
                series, z, self._box = arrays["series"], arrays["z"], arrays["box"]
        except (OSError, ValueError, TypeError, KeyError, AttributeError, zipfile.BadZipFile) as error:
            raise InputError(f"{self.path}: the store's index is damaged: {error}") from error
        self._key = self._keys(series, z)
        self._volumes: OrderedDict[tuple[int, bool], blosc2.NDArray] = OrderedDict()

    def _read_header(self) -> dict[str, Any]:
        path = self.path / "store.json"
        try:
            header = json.loads(path.read_text())
        except FileNotFoundError as error:
            raise InputError(f"{self.path}: isn't a store (there is no {path.name} in it)") from error
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: can't be read: {error}") from error
        found = (header.get("format"), header.get("version")) if isinstance(header, dict) else (None, None)
        if found != (STORE_FORMAT, STORE_VERSION):
            raise InputError(
                f"{self.path}: is a store of format {found[0]} version {found[1]}, "
                f"this software reads {STORE_FORMAT} version {STORE_VERSION}; prepare it again"
            )
        return header

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_volumes": OrderedDict()}

    @staticmethod
    def _keys(series: np.ndarray, z: np.ndarray) -> np.ndarray:
        """One sortable int64 per (series, z)."""
        return (series.astype(np.int64) << 32) | z.astype(np.int64)

    def _volume(self, series_index: int, low_dose: bool) -> blosc2.NDArray:
        key = (series_index, low_dose)
        volume = self._volumes.get(key)
        if volume is None:
            path = self.path / "volumes" / _volume_name(series_index, low_dose)
            try:
                # One thread: readers run in parallel in the workers, and a slice is too small to share out.
                volume = blosc2.open(str(path), mode="r", dparams=blosc2.DParams(nthreads=1))
            except (OSError, RuntimeError, ValueError) as error:
                raise InputError(f"{path}: can't be opened: {error}") from error
            if volume.shape != self.series[series_index].shape or volume.dtype != np.int16:
                raise InputError(
                    f"{path}: holds {volume.dtype} {list(volume.shape)}, "
                    f"the index says int16 {list(self.series[series_index].shape)}"
                )
            self._volumes[key] = volume
            if len(self._volumes) > _OPEN_VOLUMES:
                self._volumes.popitem(last=False)
        self._volumes.move_to_end(key)
        return volume

    def read(
        self, series_index: int, z: int, window: tuple[int, int, int, int] | None = None, low_dose: bool = False
    ) -> np.ndarray:
        """Read one slice or a window of it.

        Args:
            series_index: which series.
            z: which slice.
            window: (y0, x0, h, w) in pixels, inside the image; None reads the whole slice.
            low_dose: read the measured low-dose volume instead of the normal-dose one.

        Returns:
            int16 [h, w], HU.

        Raises:
            IndexError: no such series or slice.
            ValueError: the window leaves the image, or the series has no low-dose volume.
            InputError: the volume's file is missing or damaged.
        """
        if not 0 <= series_index < len(self.series):
            raise IndexError(f"series_index {series_index} isn't one of 0..{len(self.series) - 1}")
        info = self.series[series_index]
        depth, height, width = info.shape
        if not 0 <= z < depth:
            raise IndexError(f"z {z} isn't one of 0..{depth - 1} (series {info.series_id})")
        if low_dose and not info.has_low_dose:
            raise ValueError(f"series {info.series_id} has no low-dose volume")
        y0, x0, h, w = window if window is not None else (0, 0, height, width)
        if y0 < 0 or x0 < 0 or h <= 0 or w <= 0 or y0 + h > height or x0 + w > width:
            raise ValueError(f"window (y0={y0}, x0={x0}, h={h}, w={w}) leaves the {height} x {width} image")
        volume = self._volume(int(series_index), bool(low_dose))
        try:
            return volume[int(z), int(y0) : int(y0 + h), int(x0) : int(x0 + w)]
        except RuntimeError as error:
            path = self.path / "volumes" / _volume_name(series_index, low_dose)
            raise InputError(f"{path}: slice {z} can't be decoded: {error}") from error

    def boxes(self, series_index: int, z: int) -> np.ndarray:
        """Return the lesion boxes of one slice, float32 [L, 4] (x1, y1, x2, y2) in pixels; L may be 0."""
        key = (int(series_index) << 32) | int(z)
        first, last = np.searchsorted(self._key, [key, key + 1])
        return self._box[first:last].copy()

    def slices(self, split: str, with_boxes: bool | None = None) -> np.ndarray:
        """List the slices of a split.

        Args:
            split: "train", "val" or "test".
            with_boxes: True for slices that have a lesion box, False for those that have none, None for all.

        Returns:
            int32 [M, 2] (series index, z), sorted.
        """
        if split not in SPLITS:
            raise ValueError(f"split {split!r} isn't one of {', '.join(SPLITS)}")
        chosen = [index for index, info in enumerate(self.series) if info.split == split]
        depths = np.array([self.series[index].shape[0] for index in chosen], dtype=np.int64)
        series = np.repeat(np.array(chosen, dtype=np.int32), depths)
        # Counts 0, 1, ... anew within each series.
        z = (np.arange(depths.sum()) - np.repeat(np.cumsum(depths) - depths, depths)).astype(np.int32)
        if with_boxes is not None:
            keep = np.isin(self._keys(series, z), self._key, invert=not with_boxes)
            series, z = series[keep], z[keep]
        return np.stack([series, z], axis=1)
