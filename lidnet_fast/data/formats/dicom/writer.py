"""CT images in DICOM as a processing step reads and writes them: pixels in HU in, a derived image out.

Attributes of derived images follow DICOM PS3.3, C.7.6.1 (General Image), C.12.1 (SOP Common) and, for enhanced CT,
C.7.6.16 (functional groups); codes are of PS3.16.
"""

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code
from pydicom.uid import (
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    JPEGBaseline8Bit,
    JPEGLSNearLossless,
    generate_uid,
)

from lidnet_fast import __version__
from lidnet_fast.data.formats.dicom.limits import check_copied
from lidnet_fast.data.formats.dicom.pixels import TWELVE_BIT_JPEG, decode
from lidnet_fast.data.formats.dicom.values import one_line, optional_number, texts
from lidnet_fast.data.formats.geometry import LOWEST_HU
from lidnet_fast.errors import InputError
from lidnet_fast.files import whole

_LOSSY = (JPEGBaseline8Bit, *TWELVE_BIT_JPEG, JPEGLSNearLossless)
_SERIES_NUMBER_STEP, _LARGEST_NUMBER = 1000, 2**31 - 1

_NO_LONGER_TRUE = (
    "DigitalSignaturesSequence",
    "MACParametersSequence",
    "IconImageSequence",
    "SmallestImagePixelValue",
    "LargestImagePixelValue",
    "SmallestPixelValueInSeries",
    "LargestPixelValueInSeries",
    "ExtendedOffsetTable",
    "ExtendedOffsetTableLengths",
)


@dataclass(frozen=True)
class Derivation:
    """What was done to images, the same for all of a study.

    Attributes:
        model: the model's name, for people.
        description: what was done, one sentence.
        identity: what distinguishes this processing from any other; UIDs of what it makes depend on it.
        created: when it was begun.
    """

    model: str
    description: str
    identity: str
    created: datetime

    def uid(self, level: Literal["series", "image"], source: str) -> str:
        """The UID of what becomes of the series or image with UID `source`: always the same."""
        return generate_uid(entropy_srcs=[level, source, self.identity])


@dataclass(frozen=True)
class CTImage:
    """One DICOM file of CT, decoded.

    Attributes:
        path: the file.
        dataset: all of it; its pixels as they are stored.
        stored: [F,H,W], as stored, without overlays; F is 1 but for multi-frame CT.
        overlays: [F,H,W], the bits that hold overlays, in their places; None where there are none.
        hu: float32 [F,H,W]; `LOWEST_HU` where nothing was measured.
        outside: bool [F,H,W]: where nothing was measured (padding around the scan field, values below `LOWEST_HU`).
        rescale: [F, 2]: slope and intercept.
    """

    path: Path
    dataset: Dataset
    stored: np.ndarray
    overlays: np.ndarray | None
    hu: np.ndarray
    outside: np.ndarray
    rescale: np.ndarray


def read_image(path: Path) -> CTImage:
    """Decode one file.

    Raises:
        InputError: it can't be decoded, or its values aren't HU.
    """
    pixels = decode(path)
    check_copied(pixels.dataset, path)
    hu, outside = zip(*(pixels.hu(frame) for frame in range(len(pixels.frames))), strict=True)
    return CTImage(
        path=path,
        dataset=pixels.dataset,
        stored=np.stack(pixels.frames),
        overlays=np.stack(pixels.overlays) if pixels.overlays else None,
        hu=np.stack(hu),
        outside=np.stack(outside),
        rescale=pixels.rescale,
    )


def write_derived(image: CTImage, hu: np.ndarray, derivation: Derivation, series_uid: str, path: Path) -> None:
    """Write what became of an image.

    Everything is kept that still holds (patient, study, geometry, rescale, how pixels are stored, window, overlays,
    also those in bits above the pixels'), and pixels
    where nothing was measured are those of the source. Values that can't be stored become the nearest that can.

    Args:
        image: the source; its dataset is used up.
        hu: [F,H,W].
        derivation: what was done.
        series_uid: of the source's series, as `DicomSeries` has it.
        path: the file to make, in Explicit VR Little Endian.

    Raises:
        InputError: the source's dataset can't be written.
        OSError: the file can't be written.
    """
    dataset = image.dataset
    try:
        for keyword in _NO_LONGER_TRUE:
            if keyword in dataset:
                del dataset[keyword]
        if dataset.file_meta.TransferSyntaxUID in _LOSSY:
            dataset.LossyImageCompression = "01"
        if dataset.file_meta.TransferSyntaxUID == ExplicitVRBigEndian:
            _swap_words(dataset)
        dataset.SeriesInstanceUID = series_uid
        for keyword in ("SOPClassUID", "SOPInstanceUID"):
            if not dataset.get(keyword):
                setattr(dataset, keyword, dataset.file_meta[f"MediaStorage{keyword}"].value)
        _describe(dataset, derivation)
        _set_pixels(image, hu)
        with whole(path) as file:
            pydicom.dcmwrite(file, dataset, enforce_file_format=True)
    except OSError:
        raise
    except Exception as error:  # whatever pydicom makes of values that aren't what their VR says
        raise InputError(f"{image.path}: can't be written again as DICOM: {one_line(error)}") from error


def _swap_words(dataset: Dataset) -> None:
    """Turn strings of 16-bit words, which pydicom writes as they are, from big to little endian."""
    for element in dataset.iterall():
        if element.VR == "OW" and element.value:
            element.value = np.frombuffer(element.value, ">u2").astype("<u2").tobytes()


def _set_pixels(image: CTImage, hu: np.ndarray) -> None:
    dataset, kind = image.dataset, np.iinfo(image.stored.dtype)
    bits = int(dataset.BitsStored) - int(dataset.PixelRepresentation)
    low, high = (-(2**bits), 2**bits - 1) if dataset.PixelRepresentation else (0, 2**bits - 1)
    slope, intercept = image.rescale.T[:, :, None, None]
    values = np.rint((np.maximum(hu, LOWEST_HU) - intercept) / slope).clip(max(low, kind.min), min(high, kind.max))
    stored = np.where(image.outside, image.stored, values.astype(image.stored.dtype))
    if image.overlays is not None:
        words = stored.astype(np.int64) & (2 ** int(dataset.BitsStored) - 1) | image.overlays
        stored = words.astype(f"u{stored.itemsize}")
    data = stored.astype(stored.dtype.newbyteorder("<")).tobytes()
    dataset.PixelData = data + b"\0" * (len(data) % 2)
    dataset["PixelData"].VR = "OW"
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian


def _describe(dataset: Dataset, derivation: Derivation) -> None:
    """Say in a dataset what it is derived from, how and by what, under UIDs of its own."""
    if "SharedFunctionalGroupsSequence" in dataset:
        _describe_frames(dataset, derivation)
    else:
        _describe_image(dataset, derivation)
    dataset.SOPInstanceUID = derivation.uid("image", dataset.SOPInstanceUID)
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.SeriesInstanceUID = derivation.uid("series", dataset.SeriesInstanceUID)
    number = optional_number(dataset, "SeriesNumber")
    if number is None or not number.is_integer():
        dataset.pop("SeriesNumber", None)
        dataset.SeriesNumber = None  # which has to be there, but may be empty
    elif number + _SERIES_NUMBER_STEP <= _LARGEST_NUMBER:
        dataset.SeriesNumber = int(number) + _SERIES_NUMBER_STEP
    dataset.SeriesDescription = _joined(dataset.get("SeriesDescription"), f"denoised {derivation.model}", " | ", 64)
    date, time = derivation.created.strftime("%Y%m%d"), derivation.created.strftime("%H%M%S")
    for event in ("InstanceCreation", "Content", "Series"):
        setattr(dataset, f"{event}Date", date)
        setattr(dataset, f"{event}Time", time)
    _append(dataset, "ContributingEquipmentSequence", _equipment(derivation))


def _describe_image(dataset: Dataset, derivation: Derivation) -> None:
    values = texts(dataset, "ImageType")
    dataset.ImageType = ["DERIVED", "SECONDARY", *(values[2:] or ["AXIAL"])]
    before = dataset.get("DerivationDescription")
    dataset.DerivationDescription = _joined(before, derivation.description, "; ", 1024)
    _append(dataset, "DerivationCodeSequence", _code(codes.DCM.Smoothing))
    dataset.SourceImageSequence = [_source(dataset)]


def _describe_frames(dataset: Dataset, derivation: Derivation) -> None:
    """The same for multi-frame CT: in a functional group of all frames, and with the evidence that it asks for."""
    shared = dataset.SharedFunctionalGroupsSequence[0]
    per_frame = list(dataset.get("PerFrameFunctionalGroupsSequence") or ())
    types = [kind for group in (shared, *per_frame) for kind in group.get("CTImageFrameTypeSequence") or ()]
    # Their second value is always PRIMARY (PS3.3, C.8.16.1).
    dataset.ImageType = ["DERIVED", *texts(dataset, "ImageType")[1:]]
    for kind in types:
        kind.FrameType = ["DERIVED", *texts(kind, "FrameType")[1:]]
    for group in per_frame:
        if "DerivationImageSequence" in group:
            del group.DerivationImageSequence
    derived, evidence, series = Dataset(), Dataset(), Dataset()
    derived.DerivationDescription = _joined(None, derivation.description, "; ", 1024)
    derived.DerivationCodeSequence = [_code(codes.DCM.Smoothing)]
    derived.SourceImageSequence = [_source(dataset)]
    shared.DerivationImageSequence = [derived]
    series.SeriesInstanceUID, series.ReferencedSOPSequence = dataset.SeriesInstanceUID, [_reference(dataset)]
    evidence.StudyInstanceUID = dataset.get("StudyInstanceUID")
    evidence.ReferencedSeriesSequence = [series]
    dataset.SourceImageEvidenceSequence = [evidence]


def _reference(dataset: Dataset) -> Dataset:
    reference = Dataset()
    reference.ReferencedSOPClassUID = dataset.SOPClassUID
    reference.ReferencedSOPInstanceUID = dataset.SOPInstanceUID
    return reference


def _source(dataset: Dataset) -> Dataset:
    source = _reference(dataset)
    source.SpatialLocationsPreserved = "YES"
    source.PurposeOfReferenceCodeSequence = [_code(codes.DCM.SourceImageForImageProcessingOperation)]
    return source


def _equipment(derivation: Derivation) -> Dataset:
    equipment = Dataset()
    equipment.PurposeOfReferenceCodeSequence = [_code(codes.DCM.ProcessingEquipment)]
    equipment.Manufacturer = "lidnet_fast"
    equipment.ManufacturerModelName = "lidnet-fast denoise"
    equipment.SoftwareVersions = __version__
    equipment.ContributionDateTime = derivation.created.strftime("%Y%m%d%H%M%S")
    equipment.ContributionDescription = _joined(None, derivation.description, "; ", 1024)
    return equipment


def _joined(original: Any, added: str, separator: str, length: int) -> str:
    """`added` behind `original`, which is cut to what leaves room; ASCII, which every character set has."""
    added = added.encode("ascii", "replace").decode().replace("\\", "/")[:length]
    kept = str(original or "").strip()[: max(length - len(added) - len(separator), 0)]
    return f"{kept}{separator}{added}" if kept else added


def _append(dataset: Dataset, keyword: str, item: Dataset) -> None:
    setattr(dataset, keyword, [*(dataset.get(keyword) or ()), item])


def _code(code: Code) -> Dataset:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = code.value, code.scheme_designator, code.meaning
    return item
