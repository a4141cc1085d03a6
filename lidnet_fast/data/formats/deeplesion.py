"""DeepLesion (Yan et al. 2018): ``DL_info.csv`` and ``Images_png/<patient>_<study>_<series>/<slice>.png`` of 16 bits.

The rule: HU are the PNG's values minus 32768. The slices of a folder that are numbered without a gap make a series,
named as the authors name their volumes (``000001_01_01_103-115``); runs without a key slice are skipped. Boxes are
the column Bounding_boxes of the key slice, as they are (measured diameters and a margin of 5 pixels), clipped to the
image; lines flagged in Possibly_noisy are left out. Splits are the authors' (Train_Val_Test), by patient. Spacing is
Spacing_mm_px_; where the slices lie in space isn't published, so the slice's number gives the position.

Only key slices are annotated: their neighbours show the same lesions without a box.
"""

import csv
import dataclasses
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lidnet_fast.data.annotations.csv import numbers
from lidnet_fast.data.formats.account import Found, Rejected
from lidnet_fast.data.formats.find import files_below
from lidnet_fast.data.formats.geometry import Series, hu_volume
from lidnet_fast.data.store.index import SPLITS
from lidnet_fast.errors import InputError

TABLE = "DL_info.csv"

_OFFSET = 32768
_FOLDER, _NUMBER = re.compile(r"[0-9]{6}_[0-9]{2}_[0-9]{2}"), re.compile(r"[0-9]{1,9}")
_COLUMNS = ("File_name", "Bounding_boxes", "Possibly_noisy", "Spacing_mm_px_", "Train_Val_Test")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PNGSeries(Series):
    """Slices of DeepLesion, one PNG each."""

    def read(self) -> np.ndarray:
        """Decode the slices."""
        from PIL import Image

        volume = np.empty(self.shape, np.int16)
        for index, path in enumerate(self.files):
            try:
                with Image.open(path) as image:
                    values = np.array(image)
                    mode = image.mode
            except Exception as error:  # a damaged PNG has Pillow raise this and that
                raise InputError(f"{path}: can't be read as PNG (truncated?): {error}") from error
            if not mode.startswith("I") or values.shape != self.shape[1:]:
                kind = f"{list(values.shape)} pixels of mode {mode}"
                raise InputError(f"{path}: is {kind}, {list(self.shape[1:])} of 16 bits are needed")
            volume[index] = hu_volume(values.astype(np.int32) - _OFFSET)
        return volume


@dataclasses.dataclass(frozen=True)
class _KeySlice:
    """One line of the table."""

    line: int
    folder: str
    slice: int
    box: tuple[float, ...]
    noisy: bool
    spacing: tuple[float, ...]
    split: str


def is_deeplesion(source: Path) -> bool:
    """Tell whether a source is a folder with DeepLesion in it."""
    return (source / TABLE).is_file()


def scan_deeplesion(root: Path, *, follow_links: bool = False) -> Found[PNGSeries]:
    """Find the series of DeepLesion.

    Args:
        root: the folder with `TABLE`; the images lie somewhere below it, all of them or some.
        follow_links: follow links to outside of it.

    Returns:
        The series, by name.

    Raises:
        InputError: the table is damaged; the message names the line.
    """
    keys = _read_table(root / TABLE)
    images: defaultdict[str, dict[int, Path]] = defaultdict(dict)
    files = files_below([root], follow_links=follow_links)
    for file in files.paths:
        if file.suffix.lower() == ".png" and _NUMBER.fullmatch(file.stem) and _FOLDER.fullmatch(file.parent.name):
            images[file.parent.name][int(file.stem)] = file
    found = Found[PNGSeries](found=len(files.paths))
    found.take(files)
    for folder in sorted(images.keys() & keys.keys()):
        slices = images[folder]
        missing = [key for key in keys[folder] if key.slice not in slices]
        try:
            if missing:
                raise InputError(f"{root / TABLE}, line {missing[0].line}: there is no such image in {folder}")
            found.series += _series(folder, slices, keys[folder])
        except InputError as error:
            paths = slices.values()
            found.reject([Rejected(folder, next(iter(paths)).parent, str(error), paths)])
    if not found.series and not found.rejected:
        raise InputError(f"{root}: has {TABLE} and none of the images that it lists")
    listed = {path for one in found.series for path in one.files}
    listed.update(path for fault in found.rejected for path in fault.files)
    numbered = sum(len(slices) for slices in images.values())
    found.skipped["of DeepLesion's in runs without a key slice"] += numbered - len(listed)
    found.skipped["not DeepLesion's images"] += len(files.paths) - numbered
    found.skipped = +found.skipped
    return found


def _read_table(path: Path) -> dict[str, list[_KeySlice]]:
    """Read the key slices by folder."""
    keys: defaultdict[str, list[_KeySlice]] = defaultdict(list)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            missing = [name for name in _COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                raise InputError(f"{path}, line 1: column {missing[0]} is missing")
            for row in reader:
                key = _key_slice(row, f"{path}, line {reader.line_num}", reader.line_num)
                keys[key.folder].append(key)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: can't be read as CSV: {error}") from error
    return keys


def _key_slice(row: dict[str, str], where: str, line: int) -> _KeySlice:
    name = (row["File_name"] or "").strip()
    folder, _, number = name.removesuffix(".png").rpartition("_")
    if not _FOLDER.fullmatch(folder) or not _NUMBER.fullmatch(number):
        raise InputError(f"{where}: File_name {name!r} isn't like 000001_01_01_109.png")
    box, spacing = (numbers(row, name, count, where) for name, count in (("Bounding_boxes", 4), ("Spacing_mm_px_", 3)))
    if min(spacing) <= 0:
        raise InputError(f"{where}: Spacing_mm_px_ {row['Spacing_mm_px_']!r} isn't positive")
    split = (row["Train_Val_Test"] or "").strip()
    if split not in ("1", "2", "3"):
        raise InputError(f"{where}: Train_Val_Test {split!r} isn't 1, 2 or 3")
    noisy = (row["Possibly_noisy"] or "").strip() != "0"
    return _KeySlice(line, folder, int(number), box, noisy, spacing, SPLITS[int(split) - 1])


def _series(folder: str, slices: dict[int, Path], keys: Sequence[_KeySlice]) -> list[PNGSeries]:
    """Make a folder's slices into series."""
    numbers = np.array(sorted(slices))
    series = []
    for run in np.split(numbers, np.flatnonzero(np.diff(numbers) > 1) + 1):
        own = [key for key in keys if run[0] <= key.slice <= run[-1]]
        if own:
            series.append(_run(f"{folder}_{run[0]:03d}-{run[-1]:03d}", [slices[number] for number in run], run[0], own))
    return series


def _run(name: str, files: Sequence[Path], first: int, keys: Sequence[_KeySlice]) -> PNGSeries:
    height, width = _size(files[0])
    x_spacing, y_spacing, z_spacing = keys[0].spacing
    boxes = []
    for key in keys:
        if key.noisy:
            continue
        x1, y1, x2, y2 = np.clip(np.array(key.box, np.float32), 0, [width, height, width, height]).tolist()
        if x1 >= x2 or y1 >= y2:
            raise InputError(f"{TABLE}, line {key.line}: the box {list(key.box)} lies outside its image")
        boxes.append((float(key.slice - first), x1, y1, x2, y2))
    return PNGSeries(
        series_uid=name,
        patient_id=name.partition("_")[0],
        files=tuple(files),
        positions=tuple((0.0, 0.0, (int(first) + z) * z_spacing) for z in range(len(files))),
        shape=(len(files), height, width),
        spacing=(z_spacing, y_spacing, x_spacing),
        orientation=(1, 0, 0, 0, 1, 0),
        split=keys[0].split,
        boxes=tuple(boxes),
    )


def _size(path: Path) -> tuple[int, int]:
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.height, image.width
    except Exception as error:  # as above
        raise InputError(f"{path}: can't be read as PNG: {error}") from error
