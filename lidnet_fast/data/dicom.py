"""CT series from folders of DICOM files: found by their headers, put into order, decoded to Hounsfield units.

Two passes: `scan` reads headers only and checks everything that headers can tell, so that a study with a missing slice
is refused before anything is decoded; `read_volume` decodes one series. Compressed transfer syntaxes are decoded by
pydicom with GDCM and OpenJPEG.
"""

import dataclasses
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pydicom
from pydicom.uid import (
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    EnhancedCTImageStorage,
    LegacyConvertedEnhancedCTImageStorage,
)

from lidnet_fast.errors import InputError
from lidnet_fast.progress import progress

LOWEST_HU = -1024
"""Where volumes are cut off below: what scanners pad with and store as the darkest air."""

_HIGHEST_SCANNER_HU = 3071
_POSITION_TOLERANCE = 1e-3
_DIRECTION_TOLERANCE = 1e-3
_SPACING_TOLERANCE = 1e-3
_LARGEST_GAP = 1.5

_HEADER_TAGS = [
    "SOPClassUID",
    "SOPInstanceUID",
    "SeriesInstanceUID",
    "StudyInstanceUID",
    "PatientID",
    "Modality",
    "ImageType",
    "Rows",
    "Columns",
    "BitsAllocated",
    "NumberOfFrames",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "PixelSpacing",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "SliceThickness",
    "RescaleSlope",
    "RescaleIntercept",
    "RescaleType",
]

Triple = tuple[float, float, float]
Directions = tuple[float, float, float, float, float, float]


@dataclasses.dataclass(frozen=True)
class CTSeries:
    """One CT series on disk, its slices sorted by their position along the slice normal.

    Attributes:
        series_uid: SeriesInstanceUID.
        patient_id: PatientID, or the StudyInstanceUID where that is empty.
        files: one file per slice.
        sop_instance_uids: of the slices.
        positions: ImagePositionPatient of the slices, (x, y, z) in mm.
        distances: the same, projected on the slice normal: ascending, mm.
        shape: (Z, H, W).
        spacing: (z, y, x) in mm; z is 0 where a single slice states no thickness.
        orientation: ImageOrientationPatient.
    """

    series_uid: str
    patient_id: str
    files: tuple[Path, ...]
    sop_instance_uids: tuple[str, ...]
    positions: tuple[Triple, ...]
    distances: tuple[float, ...]
    shape: tuple[int, int, int]
    spacing: Triple
    orientation: Directions


@dataclasses.dataclass(frozen=True)
class Scan:
    """What `scan` found: the CT series, sorted by UID, and how many files were left aside for which reason."""

    series: list[CTSeries]
    skipped: dict[str, int]


@dataclasses.dataclass(frozen=True)
class _Slice:
    path: Path
    sop_instance_uid: str
    series_uid: str
    patient_id: str
    size: tuple[int, int]
    pixel_spacing: tuple[float, float]
    position: Triple
    orientation: Directions
    thickness: float


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _files(sources: Sequence[Path]) -> Iterator[Path]:
    """Every file below the sources once, in a stable order; links are followed."""
    seen: set[str] = set()

    def new(path: str | Path) -> bool:
        real = os.path.realpath(path)
        known = real in seen
        seen.add(real)
        return not known

    for source in sources:
        if source.is_file():
            if new(source):
                yield source
        elif not source.is_dir():
            raise InputError(f"{source}: there is no such file or folder")
        for folder, folders, names in os.walk(source, followlinks=True):
            folders[:] = sorted(name for name in folders if new(Path(folder, name)))
            yield from (Path(folder, name) for name in sorted(names) if new(Path(folder, name)))


def _looks_like_dicom(path: Path) -> bool:
    """Whether it has the DICOM preamble, or none but starts as the data sets do that old archives wrote without it."""
    with path.open("rb") as file:
        head = file.read(132)
    return head[128:] == b"DICM" or head[:4] in (b"\x08\x00\x00\x00", b"\x08\x00\x05\x00", b"\x08\x00\x08\x00")


def _number(header: pydicom.Dataset, keyword: str, path: Path) -> float:
    try:
        value = float(header[keyword].value)
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{path}: has no usable {keyword}") from None
    if not np.isfinite(value):
        raise InputError(f"{path}: has no usable {keyword}")
    return value


def _numbers(header: pydicom.Dataset, keyword: str, count: int, path: Path) -> tuple[float, ...]:
    try:
        values = tuple(float(value) for value in header[keyword].value)
    except (KeyError, TypeError, ValueError):
        values = ()
    if len(values) != count or not np.isfinite(values).all():
        raise InputError(f"{path}: has no usable {keyword}")
    return values


def _text(header: pydicom.Dataset, keyword: str, path: Path) -> str:
    value = str(header.get(keyword) or "").strip()
    if not value:
        raise InputError(f"{path}: has no {keyword}")
    return value


def _read_header(path: Path) -> _Slice | str:
    """Read one file's header; a string says why the file isn't one of those wanted.

    Raises:
        InputError: it is CT, or damaged so that this can't be told, and can't be used.
    """
    if not _looks_like_dicom(path):
        if path.suffix.lower() in (".dcm", ".dicom"):
            raise InputError(f"{path}: isn't a DICOM file, whatever its name says (empty or truncated?)")
        return "not DICOM"
    try:
        with warnings.catch_warnings(), path.open("rb") as file:
            # Values that break some rule of the standard are common and harmless; what is needed is checked below.
            warnings.simplefilter("ignore")
            header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=list(_HEADER_TAGS), force=True)
            pixels_start = file.tell()
    except Exception as error:  # whatever the parser stumbles over
        raise InputError(f"{path}: can't be read as DICOM (truncated?): {_one_line(error)}") from error
    sop_class = header.get("SOPClassUID") or header.file_meta.get("MediaStorageSOPClassUID")
    if sop_class is None:
        raise InputError(f"{path}: can't be read as DICOM (truncated?): it doesn't say what it holds")
    if sop_class in (EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage):
        raise InputError(f"{path}: is multi-frame (enhanced) CT; convert it to one file per slice first")
    if sop_class != CTImageStorage or header.get("Modality", "CT") != "CT":
        return "not CT"
    if "LOCALIZER" in (header.get("ImageType") or ()):
        return "localiser"
    _check_pixels(header, path)
    rows, columns = int(_number(header, "Rows", path)), int(_number(header, "Columns", path))
    syntax = header.file_meta.get("TransferSyntaxUID")
    if syntax is not None and not syntax.is_compressed and syntax != DeflatedExplicitVRLittleEndian:
        needed = rows * columns * int(_number(header, "BitsAllocated", path)) // 8
        if path.stat().st_size - pixels_start < needed:
            raise InputError(f"{path}: is truncated: its {columns} x {rows} pixels take {needed} bytes, fewer are left")
    spacing = _numbers(header, "PixelSpacing", 2, path)
    if min(spacing) <= 0:
        raise InputError(f"{path}: has no usable PixelSpacing")
    orientation = _numbers(header, "ImageOrientationPatient", 6, path)
    along_rows, along_columns = np.array(orientation[:3]), np.array(orientation[3:])
    gram = [along_rows @ along_rows, along_columns @ along_columns, along_rows @ along_columns]
    if not np.allclose(gram, [1, 1, 0], atol=1e-2):
        raise InputError(f"{path}: has no usable ImageOrientationPatient")
    return _Slice(
        path=path,
        sop_instance_uid=_text(header, "SOPInstanceUID", path),
        series_uid=_text(header, "SeriesInstanceUID", path),
        patient_id=str(header.get("PatientID") or "").strip() or _text(header, "StudyInstanceUID", path),
        size=(rows, columns),
        pixel_spacing=(spacing[0], spacing[1]),
        position=Triple_(_numbers(header, "ImagePositionPatient", 3, path)),
        orientation=orientation,
        thickness=float(header.get("SliceThickness") or 0.0),
    )
