"""Files of volumes, opened with SimpleITK: MetaImage (.mhd, .mha), NRRD (.nrrd, .nhdr) and NIfTI (.nii, .nii.gz).

ITK's readers trust these files: some headers crash the process, and what is missing is silently left as it is. So
headers are checked before ITK sees them.
"""

import gzip
import math
import os
import re
import struct
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lidnet_fast.errors import InputError

if TYPE_CHECKING:
    import SimpleITK as sitk  # noqa: N813

_READERS = {
    ".mhd": "MetaImageIO",
    ".mha": "MetaImageIO",
    ".nrrd": "NrrdImageIO",
    ".nhdr": "NrrdImageIO",
    ".nii": "NiftiImageIO",
    ".nii.gz": "NiftiImageIO",
}
SUFFIXES = tuple(_READERS)
DATA_SUFFIXES = (".raw", ".zraw", ".raw.gz")
"""Where .mhd and .nhdr keep their voxels."""

_HEADER_BYTES = 1 << 20
_NRRD_BYTES = 800
_LARGEST_SIDE = 65535
_TOLERANCE = 1e-2


def is_volume(path: Path) -> bool:
    """Tell whether a file's name is that of a volume."""
    return path.name.lower().endswith(SUFFIXES)


def volume_stem(path: Path) -> str:
    """A volume's name without its ending."""
    return path.name[: -len(_suffix(path))]


def read_header(path: Path) -> "sitk.ImageFileReader":
    """Read what a volume's file says of it, without its voxels.

    Raises:
        InputError: it can't be read.
    """
    import SimpleITK as sitk  # noqa: N813

    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.SetImageIO(_reader(path))
    try:
        _check_header(path)
        reader.ReadImageInformation()
    except (RuntimeError, OSError) as error:
        raise InputError(f"{path}: can't be read: {itk_cause(error)}") from error
    return reader


def has_8_bits(header: "sitk.ImageFileReader") -> bool:
    """Whether a volume's values are of 8 bits, as masks' are, which HU don't fit into."""
    import SimpleITK as sitk  # noqa: N813

    return header.GetPixelID() in (sitk.sitkInt8, sitk.sitkUInt8)


def check_is_volume(header: "sitk.ImageFileReader") -> None:
    """Refuse what isn't three dimensions of one value per voxel, or has a size or directions that can't be.

    Raises:
        InputError: names the file and what it has.
    """
    path = header.GetFileName()
    if header.GetDimension() != 3 or header.GetNumberOfComponents() != 1:
        kind = f"{header.GetDimension()} dimensions and {header.GetNumberOfComponents()} values per voxel"
        raise InputError(f"{path}: a CT volume has 3 dimensions and 1 value per voxel, this has {kind}")
    width, height, depth = header.GetSize()
    if not 1 <= min(width, height, depth) <= max(width, height, depth) <= _LARGEST_SIDE:
        raise InputError(f"{path}: says that it has {width} x {height} x {depth} voxels")
    # Of numbers far beyond, ITK's decomposition of the matrix doesn't end.
    if not np.abs(header.GetDirection()).max() < 1 + _TOLERANCE:
        raise InputError(f"{path}: its directions aren't of length 1: {header.GetDirection()}")


def read_image(path: Path) -> "sitk.Image":
    """Read a volume with its voxels.

    Raises:
        InputError: it is truncated or can't be decoded.
    """
    import SimpleITK as sitk  # noqa: N813

    try:
        _check_nifti_complete(path)
        return sitk.ReadImage(str(path), imageIO=_reader(path))
    except (RuntimeError, OSError, EOFError, ValueError, OverflowError, struct.error, zlib.error) as error:
        raise InputError(f"{path}: can't be read (truncated?): {itk_cause(error)}") from error


def read_voxels(path: Path) -> np.ndarray:
    """Read all values of a volume, [Z, H, W], in the file's dtype; as `read_image`."""
    import SimpleITK as sitk  # noqa: N813

    return sitk.GetArrayFromImage(read_image(path))


def check_hu(path: Path, values: np.ndarray) -> None:
    """Refuse voxels that can't be HU.

    Raises:
        InputError: some aren't finite, or all are above those of air and fat.
    """
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise InputError(f"{path}: has voxels that aren't finite")
    if values.min() >= 0:
        raise InputError(f"{path}: has no value below {values.min():g}, so it isn't HU (labels? raw detector values?)")


def _reader(path: Path) -> str:
    return _READERS[_suffix(path)]


def _suffix(path: Path) -> str:
    return next(suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix))


def _check_header(path: Path) -> None:
    """Refuse what crashes ITK's readers of text headers."""
    reader = _reader(path)
    if reader == "NiftiImageIO":
        return
    with path.open("rb") as file:
        head = file.read(_HEADER_BYTES)
    if reader == "MetaImageIO":
        _check_metaimage(path, head)
    else:
        _check_nrrd(path, re.split(rb"\r?\n\r?\n", head, maxsplit=1)[0])


def _check_metaimage(path: Path, head: bytes) -> None:
    """MetaIO takes any number for that of dimensions, and a pattern of file names for a format of sprintf."""
    for dimensions in re.findall(rb"(?m)^[^\S\n]*NDims\b[^=:]{0,500}[=:][\s=:]*(\S*)", head):
        if not re.fullmatch(rb"[1-9]", dimensions):
            raise InputError(f"{path}: says NDims = {_shown(dimensions)}")
    _check_one_file(path, re.findall(rb"(?m)^[^\S\n]*ElementDataFile\b[^=:]{0,500}[=:][\s=:]*(.*)", head))


def _check_nrrd(path: Path, head: bytes) -> None:
    """Teem writes the path and the line that it can't read into 1024 bytes."""
    fields = [line for line in head.splitlines() if not re.match(rb"#|[^:]*:=", line)]
    longest = max(fields, key=len, default=b"")
    if len(os.fsencode(path)) + len(longest) > _NRRD_BYTES:
        raise InputError(f"{path}: with its path, too long a line is in its header: {_shown(longest)}")
    _check_one_file(path, re.findall(rb"(?im)^data ?file:\s*(.*)", head))


def _check_one_file(path: Path, named: list[bytes]) -> None:
    for name in named:
        if b"%" in name or name.startswith(b"LIST"):
            raise InputError(f"{path}: its voxels lie in several files ({_shown(name)}); only one is read")


def _shown(text: bytes) -> str:
    return repr(text[:40].decode("latin-1"))


def _check_nifti_complete(path: Path) -> None:
    """ITK fills what is missing at the end of a NIfTI file with zeros and says nothing.

    Raises:
        EOFError: the file is shorter than its header says.
    """
    if _reader(path) != "NiftiImageIO":
        return
    compressed = path.suffix.lower() == ".gz"
    with gzip.open(path) if compressed else path.open("rb") as file:
        head = file.read(352)
        order = "<" if struct.unpack_from("<i", head)[0] in (348, 540) else ">"
        dimensions = struct.unpack_from(f"{order}8h", head, 40)
        bits, offset = struct.unpack_from(f"{order}h", head, 72)[0], struct.unpack_from(f"{order}f", head, 108)[0]
        needed = int(offset) + math.prod(dimensions[1 : 1 + dimensions[0]]) * bits // 8
    if compressed and _stated_size(path) == needed % 2**32:
        return
    if (_unpacked_size(path) if compressed else path.stat().st_size) < needed:
        raise EOFError(f"its header and voxels take {needed} bytes, fewer are there")


def _stated_size(path: Path) -> int:
    """What a gzip file says of its unpacked size, modulo 4 GiB, in its last bytes; wrong where it has several parts."""
    with path.open("rb") as file:
        file.seek(-4, 2)
        return int(struct.unpack("<I", file.read(4))[0])


def _unpacked_size(path: Path) -> int:
    with gzip.open(path) as file:
        return sum(map(len, iter(lambda: file.read(1 << 20), b"")))


def itk_cause(error: Exception) -> str:
    """The telling end of ITK's messages, which begin with the file and line of its source."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].removeprefix("sitk::ERROR:").strip() if lines else type(error).__name__
