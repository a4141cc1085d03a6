"""Single values of DICOM headers, with errors that name the file and the element."""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from pydicom import Dataset

from lidnet_fast.errors import InputError


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
