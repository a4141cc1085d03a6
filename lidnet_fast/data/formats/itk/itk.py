"""MetaImage (.mhd, .mha) and NRRD (.nrrd, .nhdr), read and written with SimpleITK.

ITK's readers trust these files: some headers crash the process. So headers are checked before ITK sees them.
"""

import os
import re
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

    _check_header(path)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.SetImageIO(_reader(path))
    reader.ReadImageInformation()
    dimensions = reader.GetDimension()
    kind = sitk.GetPixelIDValueAsString(reader.GetPixelID())  # such as "16-bit signed integer"
    bits = re.search(r"(\d+)-bit", kind)
    return VolumeHeader(
        path=path,
        size=reader.GetSize(),
        values_per_voxel=reader.GetNumberOfComponents() * (2 if "complex" in kind else 1),
        bits=int(bits[1]) if bits else 0,
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


def _check_header(path: Path) -> None:
    """Refuse what crashes ITK's readers."""
    reader = _reader(path)
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
