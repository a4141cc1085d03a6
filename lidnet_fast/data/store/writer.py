"""Writing a store: in a hidden folder next to it, by one process or many, resumed after an interruption.

What is unfinished lies in the sibling folder ``.{name}.partial``::

    lock                         held by the one writer of this store
    {digest of the key}/         what is being written
        records/00000.json       one series, whole: its SeriesInfo and its boxes, written after its volumes
        store/                   becomes the store by one rename
"""

import dataclasses
import hashlib
import json
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

import lidnet_fast
from lidnet_fast.data.annotations.boxes import box_fault
from lidnet_fast.data.store.backends import FORMATS
from lidnet_fast.data.store.index import SPLITS, Index, SeriesInfo
from lidnet_fast.data.store.reader import STORE_FORMAT, STORE_VERSION, volume_name
from lidnet_fast.errors import InputError
from lidnet_fast.files import lock, make_folder, move_whole, own_folder, remove, whole_path, write_text


@dataclasses.dataclass(frozen=True)
class SeriesWriter:
    """Writes single series of an unfinished store; pickles, so that worker processes can write side by side.

    Attributes:
        folder: the unfinished store's working folder.
        volume_format: of `lidnet_fast.data.store.backends.FORMATS`.
    """

    folder: Path
    volume_format: str

    def write(
        self, index: int, info: SeriesInfo, volume: np.ndarray, boxes: np.ndarray, low_dose: np.ndarray | None = None
    ) -> None:
        """Write one series. Killed at any moment, it leaves the whole series or none.

        Args:
            index: the series' place among those of the store; no two series have the same, and gaps close up.
            info: the series; `shape` and `has_low_dose` must agree with the arrays.
            volume: int16 [Z, H, W], HU at normal dose.
            boxes: float [n, 5] (slice, x1, y1, x2, y2) in pixels; n may be 0.
            low_dose: int16 [Z, H, W], the same scan at low dose, or None.

        Raises:
            InputError: naming the series (and the row of `boxes`) and what is wrong; nothing is written.
        """
        boxes = np.asarray(boxes, dtype=np.float32)
        _check_series(info, volume, boxes, low_dose)
        self._write_volume(volume_name(index, low_dose=False), volume)
        if low_dose is not None:
            self._write_volume(volume_name(index, low_dose=True), low_dose)
        record = {"series": dataclasses.asdict(info), "boxes": boxes.tolist()}
        write_text(self.folder / "records" / f"{index:05d}.json", json.dumps(record))

    def _write_volume(self, name: str, volume: np.ndarray) -> None:
        of_format = FORMATS[self.volume_format]
        path = self.folder / "store" / "volumes" / (name + of_format.suffix)
        remove(path)  # without a record, it is what an interrupted writer left
        with whole_path(path) as unfinished:
            of_format.write(unfinished, volume)


class StoreWriter:
    """Writes a store: all of it appears at `path` when the ``with`` block ends well, and nothing when it doesn't.

    With a `key`, what an interrupted writer of the same key has finished is kept and found in `done`.

    Args:
        path: the store's folder; must not exist yet.
        simulation: parameters of the low-dose simulation to be used with this store (JSON-able), or None.
        split: how the patients were split (JSON-able), for the record.
        inserted_lesions: how the lesions were made that aren't the patients' own (JSON-able), or None.
        pseudonyms: the `Pseudonyms.fingerprint` of the key that made the ids, or None where they are the sources'.
        volume_format: how the volumes are kept: "blosc2" for a local disk, or "zarr", which can also be read from
            object storage. Either is written to a local folder; copy a finished store of zarr to where it belongs.
        key: whatever distinguishes this store's content from another's (JSON-able), or None to always start again
            and to leave nothing behind on an error.

    Attributes:
        done: series that are written already, their index by their id.

    Raises:
        InputError: `path` exists already, another process is writing it, or (from `add_series` and at the end) what
            was added is inconsistent.
    """

    done: dict[str, int]

    def __init__(
        self,
        path: str | Path,
        *,
        simulation: dict[str, Any] | None = None,
        split: dict[str, Any] | None = None,
        inserted_lesions: dict[str, Any] | None = None,
        pseudonyms: str | None = None,
        volume_format: str = "blosc2",
        key: Any = None,
    ):
        self.path = Path(path)
        self._simulation = simulation
        self._split = split
        self._inserted_lesions = inserted_lesions
        self._pseudonyms = pseudonyms
        self._format = volume_format
        self._resumes = key is not None
        # A sibling, so that the final rename stays within one file system.
        self._partial = self.path.with_name(f".{self.path.name}.partial")
        content = (
            uuid.uuid4().hex if key is None else json.dumps([STORE_VERSION, volume_format, split, key], sort_keys=True)
        )
        self._work = self._partial / hashlib.sha256(content.encode()).hexdigest()[:16]
        self._patient_splits: dict[str, str] = {}
        self.done = {}

    def __enter__(self) -> Self:
        if self._format not in FORMATS:
            raise InputError(f"volume_format {self._format!r} isn't one of {', '.join(FORMATS)}")
        self._refuse_existing()
        own_folder(self._partial, 0o700)
        if any(self._partial.iterdir()) and not (self._partial / "lock").exists():
            raise InputError(
                f"{self._partial}: is the place of an unfinished store, and holds other files. "
                "To fix: rename it, or choose another name for the store"
            )
        self._lock = lock(self._partial / "lock", f"{self.path}: is being written by another process")
        # Records without a store are what is left of one that was finished; other folders are of other keys.
        if not (self._work / "store").is_dir():
            shutil.rmtree(self._work, ignore_errors=True)
        for folder in self._partial.iterdir():
            if folder.is_dir() and folder != self._work:
                shutil.rmtree(folder)
        for folder in (self._work / "store" / "volumes", self._work / "records"):
            make_folder(folder)
        for index, info, _ in self._records():
            self._note(index, info)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Input that can't be used won't become usable: only an interruption leaves something to go on with.
        keep = self._resumes and not isinstance(error, InputError)
        try:
            if kind is None:
                self._finish()
                keep = False
        finally:
            if not keep or not any((self._work / "records").iterdir()):
                shutil.rmtree(self._partial, ignore_errors=True)
            self._lock.release()

    def add_series(
        self, info: SeriesInfo, volume: np.ndarray, boxes: np.ndarray, low_dose: np.ndarray | None = None
    ) -> int:
        """Write one series after those that are there and return its index; for the rest see `SeriesWriter.write`."""
        self._check_together(info)
        index = max(self.done.values(), default=-1) + 1
        self.series_writer().write(index, info, volume, boxes, low_dose)
        self._note(index, info)
        return index

    def series_writer(self) -> SeriesWriter:
        """What worker processes write their series with; the checks across series are made when the store ends."""
        return SeriesWriter(self._work, self._format)

    def _refuse_existing(self) -> None:
        if self.path.exists():
            raise InputError(f"{self.path}: exists already; a store is written to a new folder")

    def _records(self) -> list[tuple[int, SeriesInfo, np.ndarray]]:
        """Every finished series by index: its info and boxes [n, 5]."""
        files = sorted((self._work / "records").glob("*.json"), key=lambda file: int(file.stem))
        records = [(int(file.stem), json.loads(file.read_text(encoding="utf-8"))) for file in files]
        return [
            (index, SeriesInfo.from_dict(record["series"]), np.array(record["boxes"], np.float32).reshape(-1, 5))
            for index, record in records
        ]

    def _note(self, index: int, info: SeriesInfo) -> None:
        self.done[info.series_uid] = index
        self._patient_splits[info.patient_id] = info.split

    def _check_together(self, info: SeriesInfo) -> None:
        name = f"series {info.series_uid}"
        if info.series_uid in self.done:
            raise InputError(f"{name}: is in the store already")
        other = self._patient_splits.get(info.patient_id, info.split)
        if other != info.split:
            raise InputError(f"{name}: patient {info.patient_id} would be in two splits, {other} and {info.split}")

    def _finish(self) -> None:
        records = self._records()
        if not records:
            raise InputError(f"{self.path}: no series to write")
        self.done, self._patient_splits = {}, {}
        for index, info, _ in records:
            self._check_together(info)
            self._note(index, info)
        store = self._work / "store"
        numbers, infos, boxes = zip(*records, strict=True)
        _remove_leftovers(store / "volumes", numbers, infos, FORMATS[self._format].suffix)
        Index.of(infos, numbers, boxes).save(store / "index.npz")
        header = {
            "format": STORE_FORMAT,
            "version": STORE_VERSION,
            "software": f"lidnet_fast {lidnet_fast.__version__}",
            "volumes": self._format,
            "simulation": self._simulation,
            "split": self._split,
            "inserted_lesions": self._inserted_lesions,
            "pseudonyms": self._pseudonyms,
        }
        write_text(store / "store.json", json.dumps(header, indent=1))
        self._refuse_existing()
        move_whole(store, self.path)


def _check_series(info: SeriesInfo, volume: np.ndarray, boxes: np.ndarray, low_dose: np.ndarray | None) -> None:
    name = f"series {info.series_uid}"
    if "\0" in info.series_uid + info.patient_id:  # which NumPy drops at the end of a text, so that two become one
        raise InputError(f"{name} of patient {info.patient_id}: an id can't have the character NUL")
    if info.split not in SPLITS:
        raise InputError(f"{name}: split {info.split!r} isn't one of {', '.join(SPLITS)}")
    if volume.dtype != np.int16 or volume.ndim != 3 or 0 in volume.shape:
        raise InputError(f"{name}: int16 [Z, H, W] is needed, got {volume.dtype} {list(volume.shape)}")
    if tuple(info.shape) != volume.shape:
        raise InputError(f"{name}: its shape is given as {list(info.shape)}, its volume is {list(volume.shape)}")
    if fault := info.fault():
        raise InputError(f"{name}: {fault}")
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


def _remove_leftovers(volumes: Path, numbers: Sequence[int], infos: Sequence[SeriesInfo], suffix: str) -> None:
    """Remove what was begun of series that were left out in the end."""
    wanted = {
        volume_name(number, low_dose) + suffix
        for number, info in zip(numbers, infos, strict=True)
        for low_dose in {False, info.has_low_dose}
    }
    for path in volumes.iterdir():
        if path.name not in wanted:
            remove(path)
