"""Single values of DICOM headers, with errors that name the file and the element."""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from pydicom import Dataset

from lidnet_fast.data.formats.dicom.multiframe import PER_FRAME
from lidnet_fast.errors import InputError

_OPTIONAL_NUMBERS = ("AcquisitionNumber", "SliceThickness", "PixelPaddingValue", "PixelPaddingRangeLimit")


@contextlib.contextmanager
def without_pydicom_warnings() -> Iterator[None]:
    """Values that break a rule of the standard are common and mostly harmless; what is needed is checked here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="pydicom")
        yield


def one_line(error: Exception) -> str:
    """Return an exception's message on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def number(header: Dataset, keyword: str, path: Path) -> float:
    """Return an element's value as a finite number.

    Raises:
        InputError: it is missing or isn't one.
    """
    try:
        value = float(header[keyword].value)
    except (KeyError, TypeError, ValueError, OverflowError):
        value = np.nan
    if not np.isfinite(value):
        raise InputError(f"{path}: has no usable {keyword}")
    return value


def optional_number(header: Dataset, keyword: str) -> float | None:
    """Return the value of an element that nobody needs as a finite number; None where it is missing or isn't one."""
    try:
        value = float(header[keyword].value)
    except Exception:  # elements are converted when they are asked for, each kind with exceptions of its own
        return None
    return value if np.isfinite(value) else None


def drop_unusable_numbers(dataset: Dataset) -> None:
    """Remove the elements that nobody needs and that should be numbers, where they aren't."""
    optional = _OPTIONAL_NUMBERS if dataset.get(PER_FRAME) else (*_OPTIONAL_NUMBERS, "NumberOfFrames")
    for keyword in optional:
        if keyword in dataset and dataset.get_item(keyword).value and optional_number(dataset, keyword) is None:
            del dataset[keyword]


def numbers(header: Dataset, keyword: str, count: int, path: Path) -> tuple[float, ...]:
    """Return an element's `count` values as finite numbers.

    Raises:
        InputError: it is missing, or has other values or another number of them.
    """
    try:
        values = tuple(float(value) for value in header[keyword].value)
    except (KeyError, TypeError, ValueError, OverflowError):
        values = ()
    if len(values) != count or not np.isfinite(values).all():
        raise InputError(f"{path}: has no usable {keyword}")
    return values


def text(header: Dataset, keyword: str, path: Path) -> str:
    """Return an element's value as text.

    Raises:
        InputError: it is missing or empty.
    """
    value = str(header.get(keyword) or "").strip()
    if not value:
        raise InputError(f"{path}: has no {keyword}")
    return value


def texts(header: Dataset, keyword: str) -> list[str]:
    """Return the values of an element, be it one, several or none."""
    value = header.get(keyword)
    return [value] if isinstance(value, str) else [str(part) for part in value or ()]
