"""Headers of DICOM files: which are CT images, and what each says of its slices."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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

from lidnet_fast.data.formats.account import Rejected
from lidnet_fast.data.formats.dicom.limits import check_inflated
from lidnet_fast.data.formats.dicom.multiframe import MACROS, PER_FRAME, SHARED, frame_header
from lidnet_fast.data.formats.dicom.pixels import hu_rescaling
from lidnet_fast.data.formats.dicom.values import (
    drop_unusable_numbers,
    number,
    numbers,
    one_line,
    optional_number,
    text,
    texts,
    without_pydicom_warnings,
)
from lidnet_fast.data.formats.geometry import Geometry
from lidnet_fast.errors import InputError

_UNCOMPRESSED = (ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian)
_ENHANCED = {EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage}
_FIRST_ELEMENTS = (b"\x02\x00\x00\x00", b"\x08\x00\x00\x00", b"\x08\x00\x05\x00", b"\x08\x00\x08\x00")
"""How files start that old archives wrote without the DICOM preamble."""

_REFORMAT = re.compile(
    r"(?<![A-Z])(MPR|MPVR|MIP|MINIP|MIN[ _]IP|MAX[ _]IP|MAXIMUM|MINIMUM|REFORMATTED|RESAMPLED|"
    r"(VOLUME|SURFACE)[ _]RENDER(ED|ING)?)(?![A-Z])"
)
"""In the ImageTypes of GE (MIN IP), Siemens (CSA MPR), Philips and enhanced CT (MAXIMUM, MAX_IP)."""
_REFORMATS = "reformats, which --reformats takes"
_AXIAL = float(np.cos(np.radians(45)))
"""Slices are axial where the cosine between their normal and the patient's length is at least this."""

_PACKED = {
    b"PK\x03\x04": "zip",
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"7z\xbc\xaf\x27\x1c": "7z",
    b"Rar!\x1a\x07": "rar",
    b"\x28\xb5\x2f\xfd": "zstd",
}
"""How archives and compressed files start."""
_OF_IMAGES = {".dcm", ".ima", ".nii", ".mha", ".mhd", ".nrrd", ".nhdr"}
"""In a packed file's name, that it is one image."""

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
    "AcquisitionNumber",
    "ConvolutionKernel",
    "BodyPartExamined",
    "RescaleSlope",
    "RescaleIntercept",
    "RescaleType",
    *MACROS,
    SHARED,
    PER_FRAME,
]


@dataclasses.dataclass(frozen=True)
class SliceHeader:
    """What the header of one CT slice says.

    Attributes:
        path: its file.
        frame: its place in a multi-frame file, from 0; None in a file of its own.
        sop_instance_uid: of the slice; frames are numbered from 1 behind the UID of their file.
        acquisition: AcquisitionNumber, where there is one.
        kernel: ConvolutionKernel, or empty.
        body_part: BodyPartExamined, or empty.
        geometry: of the slice alone; the first spacing is its thickness, 0 where that is unknown.
    """

    path: Path
    frame: int | None
    sop_instance_uid: str
    acquisition: float | None
    kernel: str
    body_part: str
    geometry: Geometry


@dataclasses.dataclass(frozen=True)
class ImageHeader:
    """What the header of one CT file says.

    Attributes:
        path: the file.
        sop_instance_uid: SOPInstanceUID, or that of the file meta information.
        series_uid: SeriesInstanceUID, or empty.
        patient_id: PatientID, or StudyInstanceUID where there is none, or empty.
        description: SeriesDescription, or empty.
        frames: how many slices it holds.
        slices: what of them can be part of a volume.
        fault: why it can't be part of a volume, if so.
    """

    path: Path
    sop_instance_uid: str
    series_uid: str
    patient_id: str
    description: str
    frames: int
    slices: tuple[SliceHeader, ...] = ()
    fault: str | None = None


HeaderResult = ImageHeader | str | Rejected
"""A CT image, or why the file isn't one of those wanted, or why nobody can say which image it is."""


def read_headers(paths: Sequence[Path], *, reformats: bool = False) -> list[HeaderResult]:
    """Read the headers of some files; nothing is raised for what they hold.

    Args:
        paths: the files.
        reformats: reformats are wanted, too; see `_is_reformat`.
    """
    return [_read_header(path, reformats) for path in paths]


@without_pydicom_warnings()
def _read_header(path: Path, reformats: bool) -> HeaderResult:
    try:
        parsed = _parse(path)
        if isinstance(parsed, str):
            return parsed
        header, pixels_start = parsed
        if not _is_enhanced(header) and not reformats and _is_reformat(header):
            return _REFORMATS
        image = _identify(header, path)
    except InputError as error:
        return Rejected("", path, str(error))
    try:
        _check_complete(header, path, pixels_start)
        slices = _slices(header, image, reformats)
    except InputError as error:
        return dataclasses.replace(image, fault=str(error))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        fault = f"{path}: has a value of the wrong kind in its header: {one_line(error)}"
        return dataclasses.replace(image, fault=fault)
    return slices if isinstance(slices, str) else dataclasses.replace(image, slices=slices)


def _parse(path: Path) -> tuple[pydicom.Dataset, int] | str:
    """Parse one file's header, and say where its pixels start; a string says why the file isn't one of those wanted.

    Raises:
        InputError: it is too damaged to know.
    """
    try:
        with path.open("rb") as file:
            head = file.read(132)
    except OSError as error:
        raise InputError(f"{path}: can't be read: {error.strerror}") from error
    preamble = head[128:] == b"DICM"
    if not preamble and head[:4] not in _FIRST_ELEMENTS:
        packed = next((name for start, name in _PACKED.items() if head.startswith(start)), None)
        if packed := packed or ("tar" if path.suffix.lower() == ".tar" else None):
            if _OF_IMAGES.intersection(map(str.lower, path.suffixes)):
                raise InputError(f"{path}: is packed ({packed}). To fix: unpack it")
            return f"packed ({packed}), to be unpacked first"
        if path.suffix.lower() == ".dcm":
            raise InputError(f"{path}: isn't a DICOM file, whatever its name says (empty or truncated?)")
        return "not DICOM"
    try:
        check_inflated(path)
        with path.open("rb") as file:
            header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=list(_HEADER_TAGS), force=True)
            pixels_start = file.tell()
        drop_unusable_numbers(header)
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
    if "SOPClassUID" not in header and "Rows" not in header and MediaStorageDirectoryStorage not in kinds:
        raise InputError(f"{path}: can't be read as DICOM (truncated?): it doesn't say what it holds")
    return _unwanted(header, kinds) or (header, pixels_start)


def _unwanted(header: pydicom.Dataset, kinds: set[str]) -> str | None:
    """Say why a file isn't one of those wanted, if it isn't."""
    if XRayRadiationDoseSRStorage in kinds:
        return "dose report"
    if not kinds & {CTImageStorage, *_ENHANCED} or not "CT".startswith(str(header.get("Modality") or "")):
        return "not CT"
    image_type = [value.upper() for value in texts(header, "ImageType")]
    if "LOCALIZER" in image_type:
        return "localiser"
    # Screens of text that scanners file among the images: GE names them SCREEN SAVE, Siemens CT_SOM5 PROT and the like.
    if any(value in ("SCREEN SAVE", "DOSE_INFO") or value.endswith(" PROT") for value in image_type):
        return "dose report"
    if "projections" in str(header.get("SeriesDescription") or "").lower():  # TCIA's LDCT-and-Projection-data
        return "CT projections"
    return None


def _is_reformat(header: pydicom.Dataset) -> bool:
    """Whether a slice was computed from slices: a coronal or sagittal section, a maximum intensity projection.

    ImageType says so, or the description of what isn't original; or it isn't original and not axial, which scanners
    don't acquire. That ImageType says AXIAL means nothing: coronal and sagittal sections are "axial" there.
    """
    image_type = [value.upper() for value in texts(header, "ImageType")]
    original = image_type[:1] == ["ORIGINAL"]
    said = [*image_type, str(header.get("VolumeBasedCalculationTechnique") or "")]
    if not original:
        said.append(str(header.get("SeriesDescription") or "").upper())
    if _REFORMAT.search("\\".join(said)):
        return True
    try:
        rows, columns = np.array(numbers(header, "ImageOrientationPatient", 6, Path())).reshape(2, 3)
    except InputError:
        return False
    return not original and abs(np.cross(rows, columns)[2]) < _AXIAL


def _identify(header: pydicom.Dataset, path: Path) -> ImageHeader:
    uid, series_uid, patient_id, study_uid = (
        str(header.get(keyword) or "").strip()
        for keyword in ("SOPInstanceUID", "SeriesInstanceUID", "PatientID", "StudyInstanceUID")
    )
    return ImageHeader(
        path=path,
        sop_instance_uid=uid or text(header.file_meta, "MediaStorageSOPInstanceUID", path),
        series_uid=series_uid,
        patient_id=patient_id or study_uid,
        description=str(header.get("SeriesDescription") or "").strip(),
        frames=_frame_count(header, path),
    )


def _check_complete(header: pydicom.Dataset, path: Path, pixels_start: int) -> None:
    """Refuse a file that ends before its pixels do, where that can be told without decoding."""
    syntax = header.file_meta.get("TransferSyntaxUID")
    if syntax in _UNCOMPRESSED:
        rows, columns = (int(number(header, keyword, path)) for keyword in ("Rows", "Columns"))
        frames = _frame_count(header, path) if _is_enhanced(header) else 1
        needed = frames * rows * columns * int(number(header, "BitsAllocated", path)) // 8
        element_header = 8 if syntax == ImplicitVRLittleEndian else 12
        if path.stat().st_size - pixels_start - element_header < needed:
            pixels = f"{columns} x {rows} pixels" + (f" of {frames} frames" if frames > 1 else "")
            raise InputError(f"{path}: is truncated: its {pixels} take {needed} bytes, fewer are left")


def _is_enhanced(header: pydicom.Dataset) -> bool:
    return str(header.get("SOPClassUID") or header.file_meta.get("MediaStorageSOPClassUID")) in _ENHANCED


def _frame_count(header: pydicom.Dataset, path: Path) -> int:
    return int(number(header, "NumberOfFrames", path)) if header.get("NumberOfFrames") else 1


def _slices(header: pydicom.Dataset, image: ImageHeader, reformats: bool) -> tuple[SliceHeader, ...] | str:
    if not _is_enhanced(header):
        if image.frames != 1:
            raise InputError(f"{image.path}: holds {image.frames} frames, but a CT Image Storage file has one")
        return (_ct_slice(frame_header(header), image, None),)
    if not header.get(SHARED) or len(header.get(PER_FRAME) or ()) < image.frames:
        raise InputError(f"{image.path}: is multi-frame (enhanced) CT without the functional groups of its frames")
    frames = [frame_header(header, frame) for frame in range(image.frames)]
    wanted = [(n, frame) for n, frame in enumerate(frames) if "LOCALIZER" not in texts(frame, "ImageType")]
    if not wanted:
        return "localiser"
    if not reformats:
        wanted = [(n, frame) for n, frame in wanted if not _is_reformat(frame)]
    return tuple(_ct_slice(frame, image, n) for n, frame in wanted) or _REFORMATS


def _ct_slice(header: pydicom.Dataset, image: ImageHeader, frame: int | None) -> SliceHeader:
    """Check the header of a CT slice and keep what is needed of it."""
    path = image.path
    rows, columns = int(number(header, "Rows", path)), int(number(header, "Columns", path))
    if min(rows, columns) < 1:
        raise InputError(f"{path}: says that it has {columns} x {rows} pixels")
    hu_rescaling(header, path)
    y_spacing, x_spacing = numbers(header, "PixelSpacing", 2, path)
    if min(y_spacing, x_spacing) <= 0:
        raise InputError(f"{path}: has no usable PixelSpacing")
    orientation = np.array(numbers(header, "ImageOrientationPatient", 6, path)).reshape(2, 3)
    if not np.allclose(orientation @ orientation.T, np.eye(2), atol=1e-2):
        raise InputError(f"{path}: has no usable ImageOrientationPatient")
    x, y, z = numbers(header, "ImagePositionPatient", 3, path)
    return SliceHeader(
        path=path,
        frame=frame,
        sop_instance_uid=image.sop_instance_uid if frame is None else f"{image.sop_instance_uid}#{frame + 1}",
        acquisition=optional_number(
            header, "FrameAcquisitionNumber" if "FrameAcquisitionNumber" in header else "AcquisitionNumber"
        ),
        kernel=_kernel(header),
        body_part=_body_part(header),
        geometry=Geometry(
            shape=(1, rows, columns),
            spacing=(_thickness(header) or 0.0, y_spacing, x_spacing),
            origin=(x, y, z),
            orientation=tuple(orientation.ravel().tolist()),
        ),
    )


def _thickness(header: pydicom.Dataset) -> float | None:
    """In mm; None where it isn't known."""
    thickness = optional_number(header, "SliceThickness")
    return thickness if thickness is not None and thickness > 0 else None


def _kernel(header: pydicom.Dataset) -> str:
    """The name of the reconstruction kernel, or empty; Siemens' iterative ones have a second value (I30f, 3)."""
    return "\\".join(part.strip() for part in texts(header, "ConvolutionKernel"))


def _body_part(header: pydicom.Dataset) -> str:
    """The body part as DICOM spells it (CHEST), or empty."""
    return str(header.get("BodyPartExamined") or "").strip().upper()


def acquired_with(slices: Sequence[SliceHeader]) -> dict[str, Any]:
    """Slice thickness (the median), kernel and body part of a series, by the names that `Series` has for them.

    What isn't known, or in which slices differ by name, is None or empty.
    """
    thicknesses = [part.geometry.spacing[0] for part in slices if part.geometry.spacing[0] > 0]
    kernels, body_parts = {part.kernel for part in slices}, {part.body_part for part in slices}
    return {
        "slice_thickness": float(np.median(thicknesses)) if thicknesses else None,
        "kernel": kernels.pop() if len(kernels) == 1 else "",
        "body_part": body_parts.pop() if len(body_parts) == 1 else "",
    }
