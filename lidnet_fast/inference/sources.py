"""What there is to denoise in a folder: CT series in DICOM and volumes, however irregular."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from lidnet_fast.data.formats.dicom.headers import frame_count, parse_header
from lidnet_fast.data.formats.dicom.values import without_pydicom_warnings
from lidnet_fast.data.formats.find import Found, files_below
from lidnet_fast.data.formats.geometry import Rejected
from lidnet_fast.data.formats.itk.files import is_volume
from lidnet_fast.errors import InputError
from lidnet_fast.inference.volumes import VolumeFile, inspect_volume
from lidnet_fast.progress import progress


@dataclass
class DicomSeries:
    """The files of one series.

    Attributes:
        uid: SeriesInstanceUID.
        files: by SOPInstanceUID.
        multiframe: whether one of them holds several slices.
    """

    uid: str
    files: dict[str, Path] = field(default_factory=dict)
    multiframe: bool = False

    @property
    def folder(self) -> Path:
        """The innermost folder that holds all of them."""
        return Path(os.path.commonpath([file.parent for file in self.files.values()]))


@dataclass(frozen=True)
class _Image:
    series_uid: str
    uid: str
    frames: int


def find(source: Path, out: Path) -> Found[DicomSeries | VolumeFile]:
    """Look through a file, or a folder with everything below it.

    Files are recognised by their content, whatever their names; volumes by their names. Nothing is asked of a series
    but its UID: slices may be missing, tilted or unevenly spaced.

    Args:
        source: the file or folder.
        out: a folder to leave out, wherever it lies.

    Returns:
        DICOM series in the order of their first files, then volumes. What was rejected are files that can't be used and
        of which nobody can say to which series they belong.

    Raises:
        InputError: `source` doesn't exist, or holds no CT.
    """
    series: dict[str, DicomSeries] = {}
    volumes: list[DicomSeries | VolumeFile] = []
    rejected: list[Rejected] = []
    files = files_below([source], without=out)
    for path in progress(files.paths, "reading headers"):
        try:
            what = inspect_volume(path) if is_volume(path) else _identify(path)
        except InputError as error:
            rejected.append(Rejected("", path, str(error)))
            continue
        if isinstance(what, VolumeFile):
            volumes.append(what)
        elif isinstance(what, _Image):
            one = series.setdefault(what.series_uid, DicomSeries(what.series_uid))
            if what.uid in one.files:
                files.skipped["copies of another"] += 1
            else:
                one.files[what.uid] = path
                one.multiframe |= what.frames > 1
        else:
            files.skipped[what] += 1
    found = Found([*series.values(), *volumes], files.skipped, rejected)
    found.check_any([source])
    return found


@without_pydicom_warnings()
def _identify(path: Path) -> _Image | str:
    """Read as much of a file as shows which image it is; a string says why it isn't a CT image.

    Raises:
        InputError: it is too damaged to know.
    """
    parsed = parse_header(path)
    if isinstance(parsed, str):
        return parsed
    header, _ = parsed
    series_uid, uid = (str(header.get(name) or "").strip() for name in ("SeriesInstanceUID", "SOPInstanceUID"))
    if not (series_uid and uid):
        raise InputError(f"{path}: has no SeriesInstanceUID or no SOPInstanceUID")
    return _Image(series_uid, uid, frame_count(header, path))
