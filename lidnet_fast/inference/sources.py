"""What there is to denoise in a folder: CT series in DICOM and volumes, however irregular."""

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lidnet_fast.data.formats.dicom.headers import frame_count, parse_header
from lidnet_fast.data.formats.dicom.pixels import decode
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
        patient_id: PatientID.
        files: by SOPInstanceUID.
        multiframe: whether one of them holds several slices.
        fault: why the files can't be one series; None where they can.
    """

    uid: str
    patient_id: str
    files: dict[str, Path] = field(default_factory=dict)
    multiframe: bool = False
    fault: str | None = None

    def add(self, image: "_Image", path: Path) -> bool:
        """Add a file; False for a copy of one that is there.

        Identifiers that should be unique may not be: a file with the identifiers of another is a copy only if position
        and pixels agree. Otherwise, and where two patients share a series, nobody can say what belongs together.
        """
        earlier = self.files.setdefault(image.uid, path)
        if image.patient_id != self.patient_id:
            self._refuse(next(iter(self.files.values())), path, "its SeriesInstanceUID, but not the patient")
        elif earlier is not path:
            if _is_copy(earlier, path):
                return False
            self._refuse(earlier, path, "a SOPInstanceUID, but are different images")
        self.multiframe |= image.frames > 1
        return True

    def _refuse(self, one: Path, other: Path, shared: str) -> None:
        self.fault = self.fault or (
            f"series {self.uid}: {one} and {other} share {shared}. To fix: give every image identifiers of its own"
        )

    @property
    def folder(self) -> Path:
        """The innermost folder that holds all of them."""
        return Path(os.path.commonpath([file.parent for file in self.files.values()]))


@dataclass(frozen=True)
class _Image:
    series_uid: str
    uid: str
    patient_id: str
    frames: int


def find(source: Path, out: Path) -> Found[DicomSeries | VolumeFile]:
    """Look through a file, or a folder with everything below it.

    Files are recognised by their content, whatever their names; volumes by their names. Nothing is asked of a series
    but its UID: slices may be missing, tilted or unevenly spaced.

    Args:
        source: the file or folder.
        out: a folder to leave out, wherever it lies.

    Returns:
        DICOM series in the order of their first files, then volumes. What was rejected are series whose identifiers
        aren't unique, and files of which nobody can say to which series they belong.

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
            one = series.setdefault(what.series_uid, DicomSeries(what.series_uid, what.patient_id))
            if not one.add(what, path):
                files.skipped["copies of another"] += 1
        else:
            files.skipped[what] += 1
    for one in series.values():
        if one.fault is not None:
            rejected.append(Rejected(one.uid, one.folder, one.fault))
    sound: list[DicomSeries | VolumeFile] = [one for one in series.values() if one.fault is None]
    found = Found([*sound, *volumes], files.skipped, rejected)
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
    names = ("SeriesInstanceUID", "SOPInstanceUID", "PatientID")
    series_uid, uid, patient_id = (str(header.get(name) or "").strip() for name in names)
    if not (series_uid and uid):
        raise InputError(f"{path}: has no SeriesInstanceUID or no SOPInstanceUID")
    return _Image(series_uid, uid, patient_id, frame_count(header, path))


_PLACE = (
    *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
)


@without_pydicom_warnings()
def _is_copy(one: Path, other: Path) -> bool:
    """Whether two files hold the same image: position and decoded pixels agree, whatever their transfer syntax."""
    try:
        first, second = decode(one), decode(other)
    except InputError:
        return one.read_bytes() == other.read_bytes()
    return all(first.dataset.get(name) == second.dataset.get(name) for name in _PLACE) and np.array_equal(
        np.stack(first.frames), np.stack(second.frames)
    )
