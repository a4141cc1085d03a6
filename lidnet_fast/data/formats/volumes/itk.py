"""MetaImage (.mhd, .mha) and NRRD (.nrrd, .nhdr), read and written with SimpleITK.

ITK's readers trust these files: some headers crash the process, others make it read any file that they name. So
headers are checked before ITK sees them.
"""

import dataclasses
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from isal import igzip, isal_zlib

from lidnet_fast.data.formats.volumes.header import VolumeHeader
from lidnet_fast.errors import InputError

if TYPE_CHECKING:
    import SimpleITK as sitk  # noqa: N813

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
    layout = _layout(path)
    return _header(path, layout, _information(path))


def _information(path: Path) -> "sitk.ImageFileReader":
    import SimpleITK as sitk  # noqa: N813

    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.SetImageIO(_reader(path))
    reader.ReadImageInformation()
    return reader


def _header(path: Path, layout: "_Layout", reader: "sitk.ImageFileReader") -> VolumeHeader:
    import SimpleITK as sitk  # noqa: N813

    dimensions, size, values = reader.GetDimension(), reader.GetSize(), reader.GetNumberOfComponents()
    kind = sitk.GetPixelIDValueAsString(reader.GetPixelID())  # such as "16-bit signed integer"
    bits = int("".join(re.findall(r"(\d+)-bit", kind)) or 0)
    values *= 2 if "complex" in kind else 1
    data_bytes = math.prod(size) * values * bits // 8
    exact = layout.data != path and layout.encoding == "raw" and not layout.skips
    if exact and layout.data.stat().st_size > data_bytes:
        raise InputError(
            f"{path}: its voxels take {data_bytes} bytes, and {layout.data.name} has {layout.data.stat().st_size}. "
            "To fix: let it name the file of its voxels"
        )
    return VolumeHeader(
        path=path,
        data=layout.data,
        packed=layout.encoding != "raw",
        data_bytes=data_bytes,
        size=size,
        values_per_voxel=values,
        bits=bits,
        origin=reader.GetOrigin(),
        spacing=reader.GetSpacing(),
        directions=np.array(reader.GetDirection()).reshape(dimensions, dimensions).T,
    )


def read_voxels(path: Path) -> np.ndarray:
    """Read all values, the slowest axis first; errors are SimpleITK's and zlib's."""
    import SimpleITK as sitk  # noqa: N813

    layout = _layout(path)
    if layout.encoding != "deflated":
        return sitk.GetArrayFromImage(sitk.ReadImage(str(path), imageIO=_reader(path)))
    reader = _information(path)
    header = _header(path, layout, reader)
    header.check_is_volume()
    kind = sitk.GetArrayViewFromImage(sitk.Image([1, 1, 1], reader.GetPixelID())).dtype
    stored = np.frombuffer(_inflated(path, layout, header.data_bytes), kind.newbyteorder(layout.byte_order))
    return stored.reshape(header.size[::-1]).astype(kind)


def _inflated(path: Path, layout: "_Layout", size: int) -> bytes:
    """Unpack the voxels, which have a checksum. ITK leaves memory as it is where they are damaged, and says nothing."""
    if layout.skips:
        raise InputError(f"{path}: can't be read: a part of its packed voxels is to be skipped. To fix: write it anew")
    with layout.data.open("rb") as file:
        file.seek(layout.start)
        if _reader(path) == "MetaImageIO":
            stream = isal_zlib.decompressobj(isal_zlib.MAX_WBITS + 32)  # of zlib or gzip
            content, whole = stream.decompress(file.read(), size + 1), stream.eof
        else:
            with igzip.IGzipFile(fileobj=file) as unpacked:
                content, whole = unpacked.read(size + 1), True
    if len(content) != size or not whole:
        raise EOFError(f"its voxels take {size} bytes, which isn't what they unpack to")
    return content


def write(path: Path, voxels: np.ndarray, like: VolumeHeader, description: str) -> None:
    """Write int16 voxels, the slowest axis first, with the geometry of another volume; errors are SimpleITK's."""
    import SimpleITK as sitk  # noqa: N813

    image = sitk.GetImageFromArray(voxels)
    image.SetOrigin(like.origin)
    image.SetSpacing(like.spacing)
    image.SetDirection(like.directions.T.ravel().tolist())
    image.SetMetaData("ITK_FileNotes", description[:_DESCRIPTION_LENGTH])
    plain = path.with_suffix(path.suffix.lower())  # ITK gives files with other endings another name, or another format
    sitk.WriteImage(image, str(plain), imageIO=_reader(path))
    plain.rename(path)


def cause(error: Exception) -> str:
    """The telling end of ITK's messages, which begin with the file and line of its source."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].removeprefix("sitk::ERROR:").strip() if lines else type(error).__name__


def _reader(path: Path) -> str:
    return _READERS[path.suffix.lower()]


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Where and how a file's voxels are kept.

    Attributes:
        data: the file of the voxels.
        start: where they begin in it.
        encoding: "raw", "deflated" or another.
        byte_order: "<" or ">".
        skips: whether the header says that something else comes before them.
    """

    data: Path
    start: int
    encoding: str
    byte_order: Literal["<", ">"]
    skips: bool


def _layout(path: Path) -> _Layout:
    """Find the voxels; refuse what crashes ITK's readers or leads them elsewhere."""
    with path.open("rb") as file:
        head, cut = file.read(_HEADER_BYTES), bool(file.read(1))
    meta = _reader(path) == "MetaImageIO"
    if meta:
        _check_dimensions(path, head)
        named = [name.strip() for name in re.findall(rb"ElementDataFile\b[^=:]{0,500}[=:][\s=:]*(.*)", head)]
        named = [name for name in named if name not in (b"LOCAL", b"Local", b"local")]
        end = re.search(rb"(?m)^ElementDataFile[^\S\n]*[=:].*\n?", head)
        if end is None:
            raise InputError(f"{path}: can't be read: its header doesn't say where its voxels are (ElementDataFile)")
        head = head[: end.end()]
        flags = {name: value in b"Tt1" for name, value in re.findall(rb"(?m)^\s*(\w+)\s*[=:]\s*([TtFf01])", head)}
        deflated, text = flags.get(b"CompressedData"), not flags.get(b"BinaryData", True)
        big = flags.get(b"BinaryDataByteOrderMSB") or flags.get(b"ElementByteOrderMSB")
        encoding = "text" if text else "deflated" if deflated else "raw"
    else:
        blank = re.search(rb"\r?\n\r?\n", head)
        cut = cut and not blank
        head = head[: blank.end()] if blank else head
        lines = [line for line in head.splitlines() if not re.match(rb"#|[^:]*:=", line)]
        _check_lengths(path, lines)
        pairs = [line.split(b":", 1) for line in lines if b":" in line]
        named = [
            value.strip().removeprefix(b"./")
            for name, value in pairs
            if name.strip().lower() in (b"data file", b"datafile")
        ]
        fields = {name.strip().lower(): value.strip().lower().decode("latin-1") for name, value in pairs}
        encoding = fields.get(b"encoding", "")
        encoding = "deflated" if encoding in ("gz", "gzip") else encoding
        big = fields.get(b"endian") == "big"
    if cut and (named or not meta):
        raise InputError(f"{path}: can't be read: its header is longer than {_HEADER_BYTES} bytes")
    skips = re.search(rb"(?im)^\s*(HeaderSize|(byte|line) ?skip)\s*[=:]", head) is not None
    data = [_data_file(path, name) for name in named]
    return _Layout(data[0] if data else path, 0 if data else len(head), encoding, ">" if big else "<", skips)


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
