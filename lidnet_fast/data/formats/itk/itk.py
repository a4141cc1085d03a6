"""MetaImage (.mhd, .mha) and NRRD (.nrrd, .nhdr), read and written with SimpleITK.

ITK's readers trust these files: some headers crash the process, others make it read any file that they name. So
headers are checked before ITK sees them.
"""

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lidnet_fast.data.formats.itk.header import VolumeHeader
from lidnet_fast.errors import InputError

_READERS = {
    ".mhd": "MetaImageIO",
    ".mha": "MetaImageIO",
    ".nrrd": "NrrdImageIO",
    ".nhdr": "NrrdImageIO",
}
SUFFIXES = tuple(_READERS)

_HEADER_BYTES = 1 << 20
_NRRD_BYTES = 800
_DESCRIPTION_LENGTH = 79


def read_header(path: Path) -> VolumeHeader:
    """Read a file's header; errors are SimpleITK's."""
    import SimpleITK as sitk  # noqa: N813

    data, packed, skips = _check_header(path)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.SetImageIO(_reader(path))
    reader.ReadImageInformation()
    dimensions, size, values = reader.GetDimension(), reader.GetSize(), reader.GetNumberOfComponents()
    kind = sitk.GetPixelIDValueAsString(reader.GetPixelID())  # such as "16-bit signed integer"
    bits = int("".join(re.findall(r"(\d+)-bit", kind)) or 0)
    values *= 2 if "complex" in kind else 1
    data_bytes = math.prod(size) * values * bits // 8
    if data != path and not packed and not skips and data.stat().st_size > data_bytes:
        raise InputError(
            f"{path}: its voxels take {data_bytes} bytes, and {data.name} has {data.stat().st_size}. "
            "To fix: let it name the file of its voxels"
        )
    return VolumeHeader(
        path=path,
        data=data,
        packed=packed,
        data_bytes=data_bytes,
        size=size,
        values_per_voxel=values,
        bits=bits,
        origin=reader.GetOrigin(),
        spacing=reader.GetSpacing(),
        directions=np.array(reader.GetDirection()).reshape(dimensions, dimensions).T,
    )


def read_voxels(path: Path) -> np.ndarray:
    """Read all values, the slowest axis first; errors are SimpleITK's."""
    import SimpleITK as sitk  # noqa: N813

    return sitk.GetArrayFromImage(sitk.ReadImage(str(path), imageIO=_reader(path)))


def write(path: Path, voxels: np.ndarray, like: VolumeHeader, description: str) -> None:
    """Write int16 voxels, the slowest axis first, with the geometry of another volume; errors are SimpleITK's."""
    import SimpleITK as sitk  # noqa: N813

    image = sitk.GetImageFromArray(voxels)
    image.SetOrigin(like.origin)
    image.SetSpacing(like.spacing)
    image.SetDirection(like.directions.T.ravel().tolist())
    image.SetMetaData("ITK_FileNotes", description[:_DESCRIPTION_LENGTH])
    writer = sitk.ImageFileWriter()
    writer.SetImageIO(_reader(path))
    writer.SetFileName(str(path))
    writer.Execute(image)


def cause(error: Exception) -> str:
    """The telling end of ITK's messages, which begin with the file and line of its source."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].removeprefix("sitk::ERROR:").strip() if lines else type(error).__name__


def _reader(path: Path) -> str:
    return _READERS[path.suffix.lower()]


def _check_header(path: Path) -> tuple[Path, bool, bool]:
    """Refuse what crashes ITK's readers or leads them elsewhere.

    Returns:
        The file of the voxels, whether they are compressed or text there, and whether something comes before them.
    """
    with path.open("rb") as file:
        head, cut = file.read(_HEADER_BYTES), bool(file.read(1))
    if _reader(path) == "MetaImageIO":
        _check_dimensions(path, head)
        named = [name.strip() for name in re.findall(rb"ElementDataFile\b[^=:]{0,500}[=:][\s=:]*(.*)", head)]
        if not re.search(rb"(?m)^ElementDataFile[^\S\n]*[=:]", head):
            raise InputError(f"{path}: can't be read: its header doesn't say where its voxels are (ElementDataFile)")
        named = [name for name in named if name not in (b"LOCAL", b"Local", b"local")]
        packed = re.search(rb"(?m)^\s*(CompressedData\s*[=:]\s*[Tt1]|BinaryData\s*[=:]\s*[Ff0])", head) is not None
    else:
        head, *rest = re.split(rb"\r?\n\r?\n", head, maxsplit=1)
        cut = cut and not rest
        fields = [line for line in head.splitlines() if not re.match(rb"#|[^:]*:=", line)]
        _check_lengths(path, fields)
        matches = (re.match(rb"(?i)\s*data ?file\s*:\s*(.*)", line) for line in fields)
        named = [match[1].strip().removeprefix(b"./") for match in matches if match]
        packed = not any(re.match(rb"(?i)\s*encoding\s*:\s*raw\s*$", line) for line in fields)
    if cut and (named or _reader(path) == "NrrdImageIO"):
        raise InputError(f"{path}: can't be read: its header is longer than {_HEADER_BYTES} bytes")
    skips = re.search(rb"(?im)^\s*(HeaderSize|(byte|line) ?skip)\s*[=:]", head) is not None
    data = [_data_file(path, name) for name in named]
    return data[0] if data else path, packed, skips


def _check_dimensions(path: Path, head: bytes) -> None:
    """MetaIO takes any number for that of dimensions."""
    for dimensions in re.findall(rb"(?m)^[^\S\n]*NDims\b[^=:]{0,500}[=:][\s=:]*(\S*)", head):
        if not re.fullmatch(rb"[1-9]", dimensions):
            raise InputError(f"{path}: says NDims = {_shown(dimensions)}")


def _check_lengths(path: Path, fields: Sequence[bytes]) -> None:
    """Teem writes the path and the line that it can't read into 1024 bytes."""
    longest = max(fields, key=len, default=b"")
    if len(os.fsencode(path)) + len(longest) > _NRRD_BYTES:
        raise InputError(f"{path}: with its path, too long a line is in its header: {_shown(longest)}")


def _data_file(path: Path, name: bytes) -> Path:
    """The file of voxels that a header names: a regular one in the header's folder, by its plain name.

    MetaIO takes a pattern of file names for a format of sprintf.
    """
    if b"%" in name or name.startswith(b"LIST"):
        raise InputError(f"{path}: its voxels lie in several files ({_shown(name)}); only one is read")
    data = path.parent / os.fsdecode(name)
    inside = os.fsencode(data.name) == name and b"\\" not in name and data.resolve().parent == path.parent.resolve()
    if not inside or (data.exists() and not data.is_file()):
        raise InputError(
            f"{path}: says that its voxels are in {_shown(name)}. "
            "To fix: let it give the plain name of a regular file in its own folder"
        )
    return data


def _shown(text: bytes) -> str:
    return repr(text[:40].decode("latin-1"))
