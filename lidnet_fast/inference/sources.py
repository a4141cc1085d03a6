"""What there is to denoise in a folder: CT series in DICOM, volumes, and what is left aside."""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lidnet_fast.data.formats.dicom.headers import frame_count, parse_header
from lidnet_fast.data.formats.dicom.values import without_pydicom_warnings
from lidnet_fast.data.formats.find import files_below
from lidnet_fast.data.formats.itk.files import is_volume
from lidnet_fast.errors import InputError
from lidnet_fast.inference.volumes import VolumeFile, inspect_volume
from lidnet_fast.progress import progress


@dataclass
class DicomSeries:
    """The files of one series, by SOPInstanceUID, and whether one of them holds several slices."""

    uid: str
    files: dict[str, Path] = field(default_factory=dict)
    multiframe: bool = False

    @property
    def folder(self) -> Path:
        """The innermost folder that holds all of them."""
        return Path(os.path.commonpath([file.parent for file in self.files.values()]))


@dataclass(frozen=True)
class Sources:
    """What `find` found.

    Attributes:
        series: CT series, in the order of their first files.
        volumes: volume files.
        left_aside: how many files for which reason.
        failures: one sentence for each file that can't be used and that can't be told to belong to a series.
    """

    series: list[DicomSeries]
    volumes: list[VolumeFile]
    left_aside: Counter[str]
    failures: list[str]


@dataclass(frozen=True)
class _Image:
    series_uid: str
    uid: str
    frames: int


def find(source: Path, out: Path) -> Sources:
    """Look through a file, or a folder with everything below it.

    Files are recognised by their content, whatever their names; volumes by their names. Nothing is asked of a series
    but its UID: slices may be missing, tilted or unevenly spaced.

    Args:
        source: the file or folder.
        out: a folder to leave out, wherever it lies.

    Raises:
        InputError: `source` doesn't exist, or holds no CT.
    """
    series: dict[str, DicomSeries] = {}
    found = Sources([], [], Counter(), [])
    for path in progress(list(_files_outside(source, out)), "reading headers"):
        try:
            what = inspect_volume(path) if is_volume(path) else _identify(path)
        except InputError as error:
            found.failures.append(str(error))
            continue
        if isinstance(what, VolumeFile):
            found.volumes.append(what)
        elif isinstance(what, _Image):
            one = series.setdefault(what.series_uid, DicomSeries(what.series_uid))
            if what.uid in one.files:
                found.left_aside["copies of another"] += 1
            else:
                one.files[what.uid] = path
                one.multiframe |= what.frames > 1
        else:
            found.left_aside[what] += 1
    found.series.extend(series.values())
    if not (found.series or found.volumes or found.failures):
        raise InputError(f"{source}: no CT found ({counted(found.left_aside) or 'no files at all'})")
    return found


def counted(left_aside: Counter[str]) -> str:
    """In words: "3 files not CT, 1 files localiser"."""
    return ", ".join(f"{count} files {why}" for why, count in sorted(left_aside.items()))


def _files_outside(source: Path, out: Path) -> Iterator[Path]:
    out = out.resolve()
    return (path for path in files_below([source]) if out not in path.resolve().parents)


@without_pydicom_warnings()
def _identify(path: Path) -> _Image | str:
    """Read as much of a file as tells which image it is; a string says why it isn't a CT image.

    Raises:
        InputError: it is too damaged to tell.
    """
    parsed = parse_header(path)
    if isinstance(parsed, str):
        return parsed
    header, _ = parsed
    series_uid, uid = (str(header.get(name) or "").strip() for name in ("SeriesInstanceUID", "SOPInstanceUID"))
    if not (series_uid and uid):
        raise InputError(f"{path}: has no SeriesInstanceUID or no SOPInstanceUID")
    return _Image(series_uid, uid, frame_count(header, path))
