"""The pixels of a DICOM file in Hounsfield units: one decoder and one rule for everything that reads CT.

The rule: HU are RescaleSlope times the stored value plus RescaleIntercept, frame by frame. RescaleType says whether
that gives HU. Where it is missing or US (unspecified), the units of a real-world value mapping decide (as in perfusion
maps); where there is none either, the values are HU. PhotometricInterpretation says only whether a viewer shows high
values bright or dark, so that MONOCHROME1 and MONOCHROME2 are read alike (DICOM PS3.3 C.8.2.1, C.11.1, C.7.6.16.2.11).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydicom import Dataset
from pydicom.pixels import iter_pixels
from pydicom.uid import UID, ExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEGExtended12Bit

from lidnet_fast.data.formats.dicom.limits import read_dataset
from lidnet_fast.data.formats.dicom.multiframe import frame_header
from lidnet_fast.data.formats.dicom.values import (
    drop_unusable_numbers,
    number,
    one_line,
    optional_number,
    without_pydicom_warnings,
)
from lidnet_fast.data.formats.geometry import LOWEST_HU
from lidnet_fast.errors import InputError

_HU_UNITS = {"[HNSF'U]", "HNSF'U", "HU"}
_UNSPECIFIED = {"", "US"}
_MONOCHROME = {"MONOCHROME1", "MONOCHROME2"}
_LARGEST_RESCALING = 1e6
"""Slopes and intercepts beyond this are no scanner's, and would leave the range of float32."""
_HIGHEST_SCANNER_HU = 3071
TWELVE_BIT_JPEG = (JPEGExtended12Bit, UID("1.2.840.10008.1.2.4.53"), UID("1.2.840.10008.1.2.4.55"))
"""Lossy JPEG whose 12 bits pydicom leaves to no decoder: sequential, and two retired kinds of progressive."""
_OVERLAY_BIT_POSITION, _OVERLAY_DATA = 0x0102, 0x3000
"""Of groups 6000, 6002 and so on."""


@dataclass(frozen=True)
class StoredPixels:
    """Decoded frames of one DICOM file.

    Attributes:
        path: the file.
        dataset: all of it.
        frames: whole numbers as stored, [H, W] each, without overlays.
        overlays: the bits of each frame that hold overlays, in their places; empty where there are none.
        rescale: float64 [F, 2]: RescaleSlope and RescaleIntercept of each frame.
    """

    path: Path
    dataset: Dataset
    frames: Sequence[np.ndarray]
    overlays: Sequence[np.ndarray]
    rescale: np.ndarray

    def hu(self, frame: int) -> tuple[np.ndarray, np.ndarray]:
        """Return a frame in HU.

        Returns:
            float32 [H, W], `LOWEST_HU` where nothing was measured; bool [H, W], where that is: padding around the
            scanner's field of view, and values below `LOWEST_HU`.
        """
        stored, (slope, intercept) = self.frames[frame], self.rescale[frame]
        hu = (stored * slope + intercept).astype(np.float32)
        outside = _padding(self.dataset, stored, hu) | (hu < LOWEST_HU)
        hu[outside] = LOWEST_HU
        return hu, outside


def hu_rescaling(header: Dataset, path: Path) -> tuple[float, float]:
    """Return the slope and intercept with which stored values become HU, by the rule above.

    Args:
        header: of an image or a frame (`frame_header`).
        path: its file, for the errors.

    Raises:
        InputError: it isn't greyscale, its values aren't HU, or slope and intercept are missing or impossible.
    """
    colours, samples = str(header.get("PhotometricInterpretation") or ""), header.get("SamplesPerPixel")
    if colours not in _MONOCHROME or samples != 1:
        kind = f"{colours or 'without PhotometricInterpretation'} with {samples} samples per pixel"
        raise InputError(f"{path}: CT is MONOCHROME1 or MONOCHROME2 with 1 sample per pixel, this is {kind}")
    kind = str(header.get("RescaleType") or "").strip()
    if kind.upper() not in {"HU", *_UNSPECIFIED}:
        raise InputError(f"{path}: its values are {kind} (RescaleType), not HU")
    units = [str(unit.get("CodeValue")) for unit in header.get("MeasurementUnitsCodeSequence") or ()]
    if kind.upper() in _UNSPECIFIED and units and units[0].upper() not in _HU_UNITS:
        raise InputError(f"{path}: its values are {units[0]} (MeasurementUnitsCodeSequence), not HU")
    slope, intercept = (number(header, keyword, path) for keyword in ("RescaleSlope", "RescaleIntercept"))
    if not 0 < abs(slope) < _LARGEST_RESCALING or abs(intercept) > _LARGEST_RESCALING:
        raise InputError(f"{path}: its RescaleSlope {slope:g} and RescaleIntercept {intercept:g} don't give HU")
    return slope, intercept


@without_pydicom_warnings()
def decode(path: Path, frames: Sequence[int] | None = None) -> StoredPixels:
    """Decode a file, or some frames of it.

    Args:
        path: the file.
        frames: which, from 0, in this order; None is all.

    Raises:
        InputError: the file is truncated or can't be decoded, or its values aren't HU.
    """
    try:
        dataset = _read_dataset(path)
        overlaid = _has_overlays(dataset)
        if overlaid:
            dataset.pixel_array_options(correct_unused_bits=False)
        if dataset.file_meta.TransferSyntaxUID in TWELVE_BIT_JPEG and dataset.BitsStored > 8:
            stored = [_decode_with_gdcm(path, dataset)]
        elif frames is None:
            pixels = dataset.pixel_array
            stored = list(pixels.reshape(-1, *pixels.shape[-2:]))
        else:
            stored = list(iter_pixels(dataset, indices=list(frames), correct_unused_bits=not overlaid))
    except Exception as error:  # every decoder has exceptions of its own
        raise InputError(f"{path}: its pixels can't be decoded (truncated?): {one_line(error)}") from error
    try:
        numbers = range(len(stored)) if frames is None else frames
        rescale = np.array([hu_rescaling(frame_header(dataset, frame), path) for frame in numbers])
    except InputError:
        raise
    except Exception as error:  # elements are converted when they are asked for, and then found to be damaged
        raise InputError(f"{path}: its header can't be read: {one_line(error)}") from error
    if stored[0].dtype.kind not in "iu":
        raise InputError(f"{path}: its pixels are {stored[0].dtype}, those of CT are whole numbers")
    overlays = []
    if overlaid:
        stored, overlays = zip(*(_split_overlays(frame, dataset) for frame in stored), strict=True)
    return StoredPixels(path, dataset, stored, overlays, rescale)


def _decode_with_gdcm(path: Path, dataset: Dataset) -> np.ndarray:
    import gdcm

    reader = gdcm.ImageReader()
    reader.SetFileName(str(path))
    if not reader.Read():
        raise InputError("GDCM can't read it")
    values = reader.GetImage().GetBuffer().encode("utf-8", "surrogateescape")
    kind = f"{'i' if dataset.PixelRepresentation else 'u'}{dataset.BitsAllocated // 8}"
    return np.frombuffer(values, kind).reshape(dataset.Rows, dataset.Columns)


def _has_overlays(dataset: Dataset) -> bool:
    """Whether bits above those of the pixels hold overlays, as was usual before 2004 (DICOM PS3.5, 8.1.2)."""
    positions = (
        dataset[group, _OVERLAY_BIT_POSITION].value
        for group in range(0x6000, 0x6020, 2)
        if (group, _OVERLAY_BIT_POSITION) in dataset and (group, _OVERLAY_DATA) not in dataset
    )
    return any(isinstance(position, int) and position >= dataset.BitsStored for position in positions)


def _split_overlays(frame: np.ndarray, dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Split words into pixels and the bits above them."""
    bits = int(dataset.BitsStored)
    words = frame.astype(np.int64) & (2 ** (8 * frame.itemsize) - 1)
    pixels = words & (2**bits - 1)
    if dataset.PixelRepresentation:
        pixels -= (pixels >> (bits - 1)) << bits
    return pixels.astype(frame.dtype), words >> bits << bits


def _read_dataset(path: Path) -> Dataset:
    """Read all of a file; where it doesn't name its transfer syntax, that which it is parsed by is noted."""
    dataset = read_dataset(path)
    drop_unusable_numbers(dataset)
    if "TransferSyntaxUID" not in dataset.file_meta:
        implicit = dataset.original_encoding[0]
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
    return dataset


def _padding(dataset: Dataset, stored: np.ndarray, hu: np.ndarray) -> np.ndarray:
    """Where pixels lie outside the scanner's field of view, by what the file names as padding.

    A padding value that means an ordinary CT number can't be told from tissue and pads nothing.

    Args:
        dataset: has PixelPaddingValue and perhaps PixelPaddingRangeLimit.
        stored: whole numbers, as stored.
        hu: the same pixels in HU.

    Returns:
        bool, of the shape of `stored`.
    """
    value, limit = (optional_number(dataset, name) for name in ("PixelPaddingValue", "PixelPaddingRangeLimit"))
    if value is None:
        return np.zeros(stored.shape, bool)
    ends = np.array([value, value if limit is None else limit])
    if np.abs(ends).max() >= 2**32:
        return np.zeros(stored.shape, bool)
    # Often stored as unsigned though the pixels are signed.
    low, high = sorted(ends.astype(np.int64).astype(stored.dtype))
    return (stored >= low) & (stored <= high) & ((hu <= LOWEST_HU) | (hu > _HIGHEST_SCANNER_HU))
