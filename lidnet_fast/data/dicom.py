"""CT series from folders of DICOM files: found by their headers, put into order, decoded to Hounsfield units.

Two passes: `scan` reads headers only and checks everything that headers can tell, so that a study with a missing slice
is refused before anything is decoded; `read_volume` decodes one series. Compressed transfer syntaxes are decoded by
pydicom with GDCM and OpenJPEG.
"""

import contextlib
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
    EnhancedCTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    LegacyConvertedEnhancedCTImageStorage,
    MediaStorageDirectoryStorage,
)

from lidnet_fast.errors import InputError
from lidnet_fast.progress import progress

LOWEST_HU = -1024
"""Where volumes are cut off below: what scanners pad with and store as the darkest air."""

_HIGHEST_SCANNER_HU = 3071
_SAME_POSITION = 1e-3
"""Slices closer than this, in mm, are at the same position."""
_SAME_GEOMETRY = 1e-3
"""Pixel spacings (mm) and direction cosines closer than this are the same."""
_LARGEST_GAP = 1.5
"""Slices are missing where two neighbours are further apart than this many times the series' median distance."""

_UNCOMPRESSED = (ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian)
_FIRST_ELEMENTS = (b"\x02\x00\x00\x00", b"\x08\x00\x00\x00", b"\x08\x00\x05\x00", b"\x08\x00\x08\x00")
"""How files start that old archives wrote without the DICOM preamble."""

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


@contextlib.contextmanager
def _without_pydicom_warnings() -> Iterator[None]:
    """Values that break a rule of the standard are common and mostly harmless; what is needed is checked here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="pydicom")
        yield


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


@_without_pydicom_warnings()
def _read_header(path: Path) -> _Slice | str:
    """Read one file's header; a string says why the file isn't one of those wanted.

    Raises:
        InputError: it is CT that can't be used, or too damaged to tell.
    """
    try:
        with path.open("rb") as file:
            head = file.read(132)
    except OSError as error:
        raise InputError(f"{path}: can't be read: {error.strerror}") from error
    preamble = head[128:] == b"DICM"
    if not preamble and head[:4] not in _FIRST_ELEMENTS:
        if path.suffix.lower() == ".dcm":
            raise InputError(f"{path}: isn't a DICOM file, whatever its name says (empty or truncated?)")
        return "not DICOM"
    try:
        with path.open("rb") as file:
            header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=list(_HEADER_TAGS), force=True)
            pixels_start = file.tell()
        for _ in header:  # converts the values, which is where many damaged ones are noticed
            pass
    except Exception as error:  # whatever the parser stumbles over
        if not preamble:
            return "not DICOM"
        raise InputError(f"{path}: can't be read as DICOM (truncated?): {_one_line(error)}") from error
    if not preamble and "SOPClassUID" not in header:
        return "not DICOM"
    # A file that is cut off early has lost the second of these two, or even the end of the first.
    kinds = {header.file_meta.get("MediaStorageSOPClassUID"), header.get("SOPClassUID")}
    if "SOPClassUID" not in header and MediaStorageDirectoryStorage not in kinds:
        raise InputError(f"{path}: can't be read as DICOM (truncated?): it doesn't say what it holds")
    if kinds & {EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage}:
        raise InputError(f"{path}: is multi-frame (enhanced) CT; convert it to one file per slice first")
    if CTImageStorage not in kinds or not "CT".startswith(header.get("Modality") or ""):
        return "not CT"
    if "LOCALIZER" in (header.get("ImageType") or ()):
        return "localiser"
    return _ct_slice(header, path, pixels_start)


def _ct_slice(header: pydicom.Dataset, path: Path, pixels_start: int) -> _Slice:
    """Check the header of a CT image and keep what is needed of it."""
    rows, columns = int(_number(header, "Rows", path)), int(_number(header, "Columns", path))
    syntax = header.file_meta.get("TransferSyntaxUID")
    if syntax in _UNCOMPRESSED:
        needed = rows * columns * int(_number(header, "BitsAllocated", path)) // 8
        element_header = 8 if syntax == ImplicitVRLittleEndian else 12
        if path.stat().st_size - pixels_start - element_header < needed:
            raise InputError(f"{path}: is truncated: its {columns} x {rows} pixels take {needed} bytes, fewer are left")
    if header.get("PhotometricInterpretation") != "MONOCHROME2" or header.get("SamplesPerPixel") != 1:
        kind = f"{header.get('PhotometricInterpretation')} with {header.get('SamplesPerPixel')} samples per pixel"
        raise InputError(f"{path}: CT is MONOCHROME2 with 1 sample per pixel, this is {kind}")
    if int(header.get("NumberOfFrames") or 1) != 1:
        raise InputError(f"{path}: holds {header.NumberOfFrames} frames; convert it to one file per slice first")
    _number(header, "RescaleSlope", path)
    _number(header, "RescaleIntercept", path)
    rescale_type = str(header.get("RescaleType") or "HU")
    if rescale_type not in ("HU", "US"):  # "US" stands for unspecified
        raise InputError(f"{path}: its values are {rescale_type} (RescaleType), not HU")
    y_spacing, x_spacing = _numbers(header, "PixelSpacing", 2, path)
    if min(y_spacing, x_spacing) <= 0:
        raise InputError(f"{path}: has no usable PixelSpacing")
    orientation = np.array(_numbers(header, "ImageOrientationPatient", 6, path)).reshape(2, 3)
    if not np.allclose(orientation @ orientation.T, np.eye(2), atol=1e-2):
        raise InputError(f"{path}: has no usable ImageOrientationPatient")
    x, y, z = _numbers(header, "ImagePositionPatient", 3, path)
    thickness = header.get("SliceThickness")
    return _Slice(
        path=path,
        sop_instance_uid=_text(header, "SOPInstanceUID", path),
        series_uid=_text(header, "SeriesInstanceUID", path),
        patient_id=str(header.get("PatientID") or "").strip() or _text(header, "StudyInstanceUID", path),
        size=(rows, columns),
        pixel_spacing=(y_spacing, x_spacing),
        position=(x, y, z),
        orientation=tuple(orientation.ravel().tolist()),
        thickness=0.0 if thickness is None else max(0.0, float(thickness)),
    )


def _check_alike(slices: Sequence[_Slice]) -> None:
    """Refuse a series whose slices differ in what they must share."""
    first = slices[0]
    for other in slices[1:]:
        for what, one, two in (
            ("patient", first.patient_id, other.patient_id),
            ("size (rows, columns)", first.size, other.size),
            ("pixel spacing", first.pixel_spacing, other.pixel_spacing),
            ("orientation", first.orientation, other.orientation),
        ):
            same = one == two or (what != "patient" and np.allclose(one, two, rtol=0, atol=_SAME_GEOMETRY))
            if not same:
                raise InputError(
                    f"series {first.series_uid}: its files {first.path} and {other.path} differ in {what}: {one}, {two}"
                )


def _assemble(slices: list[_Slice]) -> CTSeries:
    """Sort one series' slices by their position along the normal and check that none is missing or twice there."""
    _check_alike(slices)
    first = slices[0]
    directions = np.array(first.orientation).reshape(2, 3)
    normal = np.cross(directions[0], directions[1])
    distance = {part.path: float(normal @ np.array(part.position)) for part in slices}
    slices = sorted(slices, key=lambda part: distance[part.path])
    distances = np.array([distance[part.path] for part in slices])
    gaps = np.diff(distances)
    twice = np.flatnonzero(gaps < _SAME_POSITION)
    if len(twice):
        one, two = slices[twice[0]], slices[twice[0] + 1]
        raise InputError(
            f"series {first.series_uid}: two slices at the same position, {distances[twice[0]]:g} mm: "
            f"{one.path} and {two.path}"
        )
    usual = float(np.median(gaps)) if len(gaps) else first.thickness
    wide = np.flatnonzero(gaps > _LARGEST_GAP * usual)
    if len(wide):
        places = ", ".join(f"{distances[i]:g} and {distances[i + 1]:g} mm" for i in wide[:3])
        more = f" and at {len(wide) - 3} more places" if len(wide) > 3 else ""
        raise InputError(
            f"series {first.series_uid} in {first.path.parent}: slices are missing between {places}{more}; "
            f"its slices are {usual:g} mm apart"
        )
    return CTSeries(
        series_uid=first.series_uid,
        patient_id=first.patient_id,
        files=tuple(part.path for part in slices),
        sop_instance_uids=tuple(part.sop_instance_uid for part in slices),
        positions=tuple(part.position for part in slices),
        distances=tuple(distances.tolist()),
        shape=(len(slices), *first.size),
        spacing=(usual, *first.pixel_spacing),
        orientation=first.orientation,
    )


def scan(sources: Sequence[Path], what: str = "reading headers") -> Scan:
    """Find the CT series below some folders.

    Files are recognised by their content, whatever their names; series by their SeriesInstanceUID, wherever their
    files lie. What isn't a CT image (other modalities, localisers, reports, DICOMDIR, other files) is left aside.

    Args:
        sources: folders, searched with everything below them, or single files.
        what: what the progress bar says.

    Raises:
        InputError: a source doesn't exist or no source has CT; a file is truncated, multi-frame or lacks a needed
            value; a series has slices missing, twice at one position or of different size, spacing or orientation.
            The message names the file or the series.
    """
    by_series: dict[str, list[_Slice]] = {}
    skipped: Counter[str] = Counter()
    for path in progress(list(_files(sources)), what):
        found = _read_header(path)
        if isinstance(found, str):
            skipped[found] += 1
        else:
            by_series.setdefault(found.series_uid, []).append(found)
    if not by_series:
        looked = ", ".join(str(source) for source in sources)
        others = "; ".join(f"{count} files {reason}" for reason, count in sorted(skipped.items())) or "no files at all"
        raise InputError(f"{looked}: no CT images found ({others})")
    return Scan([_assemble(by_series[uid]) for uid in sorted(by_series)], dict(sorted(skipped.items())))


def read_volume(series: CTSeries) -> np.ndarray:
    """Decode a series.

    Rescale slope and intercept are applied slice by slice. Padding outside the scanner's field of view
    (PixelPaddingValue) and everything below `LOWEST_HU` become `LOWEST_HU`. A padding value that means an ordinary CT
    number can't be told from tissue and is left as it is.

    Returns:
        int16 [Z, H, W], HU.

    Raises:
        InputError: a file is truncated or can't be decoded; the message names it.
    """
    volume = np.empty(series.shape, np.int16)
    for index, path in enumerate(series.files):
        volume[index] = _read_slice(path, series.shape[1:])
    return volume


@_without_pydicom_warnings()
def _read_slice(path: Path, size: tuple[int, int]) -> np.ndarray:
    """Decode one file to int16 [H, W], HU."""
    try:
        image = pydicom.dcmread(path, force=True)
        if "TransferSyntaxUID" not in image.file_meta:
            implicit = image.original_encoding[0]
            image.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
        stored = image.pixel_array
    except Exception as error:  # every decoder has exceptions of its own
        raise InputError(f"{path}: its pixels can't be decoded (truncated?): {_one_line(error)}") from error
    if stored.shape != size:
        raise InputError(f"{path}: decodes to {list(stored.shape)} pixels, its header says {list(size)}")
    slope, intercept = float(image.RescaleSlope), float(image.RescaleIntercept)
    hu = stored.astype(np.float32) * slope + intercept
    padding = image.get("PixelPaddingValue")
    if padding is not None:
        # Often stored as unsigned though the pixels are signed.
        value = int(np.array(int(padding)).astype(stored.dtype))
        if not LOWEST_HU <= value * slope + intercept <= _HIGHEST_SCANNER_HU:
            hu[stored == value] = LOWEST_HU
    return np.clip(np.rint(hu), LOWEST_HU, np.iinfo(np.int16).max).astype(np.int16)
