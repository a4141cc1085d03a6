"""Headers of DICOM files: which are CT images, and what each says of its slices."""

import contextlib
import dataclasses
import warnings
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
    XRayRadiationDoseSRStorage,
)

from lidnet_fast.data.formats.dicom.multiframe import PER_FRAME, SHARED, foreign_unit, frame_header
from lidnet_fast.data.formats.geometry import Directions, Rejected, Triple
from lidnet_fast.errors import InputError

_UNCOMPRESSED = (ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian)
_ENHANCED = {EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage}
_FIRST_ELEMENTS = (b"\x02\x00\x00\x00", b"\x08\x00\x00\x00", b"\x08\x00\x05\x00", b"\x08\x00\x08\x00")
"""How files start that old archives wrote without the DICOM preamble."""

_LARGEST_RESCALING = 1e6
"""Slopes and intercepts beyond this are no scanner's, and would leave the range of float32."""

_HEADER_TAGS = [
    "SOPClassUID",
    "SOPInstanceUID",
    "SeriesInstanceUID",
    "SeriesDescription",
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
    SHARED,
    PER_FRAME,
]


@dataclasses.dataclass(frozen=True)
class SliceHeader:
    """What the header of one CT slice says; `frame` is its place in a multi-frame file, None in a file of its own."""

    path: Path
    frame: int | None
    sop_instance_uid: str
    series_uid: str
    patient_id: str
    description: str
    size: tuple[int, int]
    pixel_spacing: tuple[float, float]
    position: Triple
    orientation: Directions
    thickness: float


HeaderResult = list[SliceHeader] | str | Rejected
"""The slices of one file, or why it isn't one of those wanted, or why it can't be used."""


@contextlib.contextmanager
def without_pydicom_warnings() -> Iterator[None]:
    """Values that break a rule of the standard are common and mostly harmless; what is needed is checked here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="pydicom")
        yield


def one_line(error: Exception) -> str:
    """Return an exception's message on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def read_headers(paths: Sequence[Path]) -> list[HeaderResult]:
    """Read the headers of some files; nothing is raised for what they hold."""
    return [_read_header(path) for path in paths]


@without_pydicom_warnings()
def _read_header(path: Path) -> HeaderResult:
    series_uid = ""
    try:
        parsed = parse_header(path)
        if isinstance(parsed, str):
            return parsed
        header, pixels_start = parsed
        series_uid = str(header.get("SeriesInstanceUID") or "")
        _check_complete(header, path, pixels_start)
        return _slices(header, path)
    except InputError as error:
        return Rejected(series_uid, path, str(error))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        return Rejected(series_uid, path, f"{path}: has a value of the wrong kind in its header: {one_line(error)}")


def parse_header(path: Path) -> tuple[pydicom.Dataset, int] | str:
    """Parse one file's header, and say where its pixels start; a string says why the file isn't one of those wanted.

    Raises:
        InputError: it is too damaged to tell.
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
        for _ in (*header.file_meta, *header.iterall()):  # converts the values: many damaged ones are noticed there
            pass
    except Exception as error:  # whatever the parser stumbles over
        if not preamble:
            return "not DICOM"
        raise InputError(f"{path}: can't be read as DICOM (truncated?): {one_line(error)}") from error
    if not preamble and "SOPClassUID" not in header:
        return "not DICOM"
    # A file that is cut off early has lost the second of these two, or even the end of the first.
    kinds = {str(kind) for kind in (header.file_meta.get("MediaStorageSOPClassUID"), header.get("SOPClassUID"))}
    if "SOPClassUID" not in header and MediaStorageDirectoryStorage not in kinds:
        raise InputError(f"{path}: can't be read as DICOM (truncated?): it doesn't say what it holds")
    return _unwanted(header, kinds) or (header, pixels_start)


def _unwanted(header: pydicom.Dataset, kinds: set[str]) -> str | None:
    """Say why a file isn't one of those wanted, if it isn't."""
    if XRayRadiationDoseSRStorage in kinds:
        return "dose report"
    if not kinds & {CTImageStorage, *_ENHANCED} or not "CT".startswith(str(header.get("Modality") or "")):
        return "not CT"
    image_type = [str(value).upper() for value in header.get("ImageType") or ()]
    if "LOCALIZER" in image_type:
        return "localiser"
    # Screens of text that scanners file among the images: GE names them SCREEN SAVE, Siemens CT_SOM5 PROT and the like.
    if any(value in ("SCREEN SAVE", "DOSE_INFO") or value.endswith(" PROT") for value in image_type):
        return "dose report"
    if "projections" in str(header.get("SeriesDescription") or "").lower():  # TCIA's LDCT-and-Projection-data
        return "CT projections"
    return None


def _check_complete(header: pydicom.Dataset, path: Path, pixels_start: int) -> None:
    """Refuse a file that ends before its pixels do, where that can be told without decoding."""
    syntax = header.file_meta.get("TransferSyntaxUID")
    if syntax in _UNCOMPRESSED:
        rows, columns = (int(_number(header, keyword, path)) for keyword in ("Rows", "Columns"))
        frames = frame_count(header, path) if _is_enhanced(header) else 1
        needed = frames * rows * columns * int(_number(header, "BitsAllocated", path)) // 8
        element_header = 8 if syntax == ImplicitVRLittleEndian else 12
        if path.stat().st_size - pixels_start - element_header < needed:
            pixels = f"{columns} x {rows} pixels" + (f" of {frames} frames" if frames > 1 else "")
            raise InputError(f"{path}: is truncated: its {pixels} take {needed} bytes, fewer are left")


def _is_enhanced(header: pydicom.Dataset) -> bool:
    return str(header.get("SOPClassUID")) in _ENHANCED


def frame_count(header: pydicom.Dataset, path: Path) -> int:
    """How many frames a file holds.

    Raises:
        InputError: it names no whole number.
    """
    return int(_number(header, "NumberOfFrames", path)) if header.get("NumberOfFrames") else 1


def _slices(header: pydicom.Dataset, path: Path) -> list[SliceHeader] | str:
    if not _is_enhanced(header):
        if frame_count(header, path) != 1:
            raise InputError(f"{path}: holds {header.NumberOfFrames} frames, which CT Image Storage has one of")
        return [_ct_slice(header, path, None)]
    try:
        frames = [frame_header(header, frame) for frame in range(int(header.NumberOfFrames))]
    except (KeyError, IndexError, AttributeError, TypeError, ValueError) as error:
        raise InputError(f"{path}: is multi-frame (enhanced) CT without the functional groups of its frames") from error
    wanted = [(n, frame) for n, frame in enumerate(frames) if "LOCALIZER" not in (frame.get("ImageType") or ())]
    return [_ct_slice(frame, path, n) for n, frame in wanted] or "localiser"


def _ct_slice(header: pydicom.Dataset, path: Path, frame: int | None) -> SliceHeader:
    """Check the header of a CT image and keep what is needed of it."""
    rows, columns = int(_number(header, "Rows", path)), int(_number(header, "Columns", path))
    if min(rows, columns) < 1:
        raise InputError(f"{path}: says that it has {columns} x {rows} pixels")
    if header.get("PhotometricInterpretation") != "MONOCHROME2" or header.get("SamplesPerPixel") != 1:
        kind = f"{header.get('PhotometricInterpretation')} with {header.get('SamplesPerPixel')} samples per pixel"
        raise InputError(f"{path}: CT is MONOCHROME2 with 1 sample per pixel, this is {kind}")
    slope, intercept = _number(header, "RescaleSlope", path), _number(header, "RescaleIntercept", path)
    if not 0 < abs(slope) < _LARGEST_RESCALING or abs(intercept) > _LARGEST_RESCALING:
        raise InputError(f"{path}: its RescaleSlope {slope:g} and RescaleIntercept {intercept:g} don't give HU")
    rescale_type = str(header.get("RescaleType") or "HU")
    if rescale_type not in ("HU", "US"):  # "US" stands for unspecified
        raise InputError(f"{path}: its values are {rescale_type} (RescaleType), not HU")
    if unit := foreign_unit(header):
        raise InputError(f"{path}: its values are {unit} (MeasurementUnitsCodeSequence), not HU")
    y_spacing, x_spacing = _numbers(header, "PixelSpacing", 2, path)
    if min(y_spacing, x_spacing) <= 0:
        raise InputError(f"{path}: has no usable PixelSpacing")
    orientation = np.array(_numbers(header, "ImageOrientationPatient", 6, path)).reshape(2, 3)
    if not np.allclose(orientation @ orientation.T, np.eye(2), atol=1e-2):
        raise InputError(f"{path}: has no usable ImageOrientationPatient")
    x, y, z = _numbers(header, "ImagePositionPatient", 3, path)
    sop_instance_uid = _text(header, "SOPInstanceUID", path)
    return SliceHeader(
        path=path,
        frame=frame,
        sop_instance_uid=sop_instance_uid if frame is None else f"{sop_instance_uid}#{frame + 1}",
        series_uid=_text(header, "SeriesInstanceUID", path),
        patient_id=str(header.get("PatientID") or "").strip() or _text(header, "StudyInstanceUID", path),
        description=str(header.get("SeriesDescription") or "").strip(),
        size=(rows, columns),
        pixel_spacing=(y_spacing, x_spacing),
        position=(x, y, z),
        orientation=tuple(orientation.ravel().tolist()),
        thickness=_thickness(header, path),
    )


def _thickness(header: pydicom.Dataset, path: Path) -> float:
    """0 where it isn't known: only a series of one slice needs it."""
    try:
        return max(0.0, _number(header, "SliceThickness", path))
    except InputError:
        return 0.0


def _number(header: pydicom.Dataset, keyword: str, path: Path) -> float:
    try:
        value = float(header[keyword].value)
    except (KeyError, TypeError, ValueError, OverflowError):
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
