"""Reading DICOM within limits: what a file may ask for in memory, whatever it says."""

import zlib
from pathlib import Path

import pydicom
from pydicom import Dataset
from pydicom.tag import Tag
from pydicom.uid import DeflatedExplicitVRLittleEndian

from lidnet_fast.errors import InputError

_LARGEST_ELEMENT = 64 << 20
_LARGEST_INFLATED = 1 << 30
_LARGEST_RATIO = 200
"""Of a deflated file's size to what it unpacks to; above 64 MiB, images are far from it."""
_PIXELS = {Tag("PixelData"), Tag("FloatPixelData"), Tag("DoubleFloatPixelData")}
_HEAD_BYTES = 1 << 10


def read_dataset(path: Path) -> Dataset:
    """Read all of a file but large elements, which stay on the disk until they are asked for.

    Raises:
        InputError: it unpacks to more than is read.
        Exception: whatever pydicom stumbles over.
    """
    deflated = check_inflated(path)
    return pydicom.dcmread(path, force=True, defer_size=None if deflated else _LARGEST_ELEMENT)


def check_copied(dataset: Dataset, path: Path) -> None:
    """Refuse to copy a dataset with an element, other than its pixels, that is too large to be held several times.

    Raises:
        InputError: names the file and the element.
    """
    for tag in dataset.keys() - _PIXELS:
        element = dataset.get_item(tag, keep_deferred=True)
        length = getattr(element, "length", 0)
        if element.value is None and length > _LARGEST_ELEMENT:
            raise InputError(
                f"{path}: its element {tag} has {length} bytes, of which at most {_LARGEST_ELEMENT} are copied. "
                "To fix: denoise a copy of the file without it"
            )


def check_inflated(path: Path) -> bool:
    """Refuse a deflated file that unpacks to more than any image; return whether it is deflated.

    Raises:
        InputError: names the file.
        zlib.error: it can't be unpacked.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
        start = 144 + int.from_bytes(head[140:144], "little")  # after the file's own elements, whose length comes first
        if head[128:132] != b"DICM" or DeflatedExplicitVRLittleEndian.encode() not in head[:start]:
            return False
        file.seek(start)
        most = min(_LARGEST_INFLATED, max(_LARGEST_ELEMENT, _LARGEST_RATIO * path.stat().st_size))
        inflate, size = zlib.decompressobj(-zlib.MAX_WBITS), 0
        while packed := inflate.unconsumed_tail or file.read(1 << 16):
            size += len(inflate.decompress(packed, 1 << 20))
            if size > most:
                raise InputError(f"{path}: unpacks to more than {most} bytes, which isn't read")
    return True
