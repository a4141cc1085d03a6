"""What reading and writing DICOM pixels have in common."""

from pathlib import Path

import numpy as np
import pydicom
from pydicom import Dataset
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

from lidnet_fast.data.formats.geometry import LOWEST_HU

_HIGHEST_SCANNER_HU = 3071


def read_dataset(path: Path) -> Dataset:
    """Read all of a file; where it doesn't name its transfer syntax, that which it is parsed by is noted."""
    dataset = pydicom.dcmread(path, force=True)
    if "TransferSyntaxUID" not in dataset.file_meta:
        implicit = dataset.original_encoding[0]
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
    return dataset


def padding(dataset: Dataset, stored: np.ndarray, hu: np.ndarray) -> np.ndarray:
    """Where pixels lie outside the scanner's field of view, by what the file names as padding.

    A padding value that means an ordinary CT number can't be told from tissue and pads nothing.

    Args:
        dataset: has PixelPaddingValue and perhaps PixelPaddingRangeLimit.
        stored: whole numbers, as stored.
        hu: the same pixels in HU.

    Returns:
        bool, of the shape of `stored`.
    """
    value = dataset.get("PixelPaddingValue")
    try:
        ends = [np.int64(int(end)) for end in (value, dataset.get("PixelPaddingRangeLimit", value))]
    except (TypeError, ValueError, OverflowError):  # none, or damaged
        return np.zeros(stored.shape, bool)
    # Often stored as unsigned though the pixels are signed.
    low, high = sorted(end.astype(stored.dtype) for end in ends)
    return (stored >= low) & (stored <= high) & ((hu <= LOWEST_HU) | (hu > _HIGHEST_SCANNER_HU))
