"""NIfTI files (.nii, .nii.gz), read and written with nibabel.

ITK reads values that aren't numbers as 0, which is water, and zeros for what is missing at the end of a file.
"""

import logging
import math
from pathlib import Path
from typing import BinaryIO, cast

import nibabel
import numpy as np
from isal import igzip
from nibabel.arrayproxy import ArrayProxy

from lidnet_fast.data.formats.volumes.header import VolumeHeader

SUFFIXES = (".nii", ".nii.gz")

_TO_DICOM = np.array([-1.0, -1.0, 1.0])
"""NIfTI's coordinates run to the right, the front and the head."""
_MM = {1: 1e3, 3: 1e-3}
"""Of the units of length that aren't mm."""
_DESCRIPTION_BYTES = 79
_MAX_MORE_BYTES = 1 << 20
_SILENT = logging.Logger(__name__)
_SILENT.addHandler(logging.NullHandler())


def read_header(path: Path) -> VolumeHeader:
    """Read a file's header; errors are nibabel's."""
    header = _header(path)
    voxel = header.get_data_dtype()
    size = _size(header)
    matrix = _affine(header)
    with np.errstate(invalid="ignore", divide="ignore"):
        spacing = np.linalg.norm(matrix[:, :3], axis=0)
        directions = (matrix[:, :3] / spacing).T
    return VolumeHeader(
        path=path,
        data=path,
        packed=is_compressed(path),
        data_bytes=header.get_data_offset() + math.prod(size) * voxel.itemsize,
        size=size,
        values_per_voxel=len(voxel.fields or "1") * (2 if voxel.kind == "c" else 1),
        bits=32 if _scaling(header) else 8 * voxel.itemsize,
        origin=tuple(matrix[:, 3].tolist()),
        spacing=tuple(spacing.tolist()),
        directions=directions,
    )


def read_voxels(path: Path) -> np.ndarray:
    """Read all values, the slowest axis first; errors are nibabel's."""
    header = _header(path)
    scaling = _scaling(header)
    with _opened(path) as file:
        voxels = np.asarray(ArrayProxy(file, header, mmap=False).get_unscaled())
        if is_compressed(path):
            _to_end(file)
    voxels = voxels.reshape(_size(header)).T
    if scaling is not None:
        slope, intercept = scaling
        return voxels * np.float32(slope) + np.float32(intercept)
    return voxels.astype(voxels.dtype.newbyteorder("="), copy=False)


def write(path: Path, voxels: np.ndarray, like: VolumeHeader, description: str) -> None:
    """Write int16 voxels, the slowest axis first, with the geometry of another volume; that of NIfTI to the bit."""
    if is_nifti(like.path):
        header = _header(like.path)
    else:
        header = nibabel.Nifti1Header()
        matrix = np.eye(4)
        matrix[:3, :3] = (like.directions * np.array(like.spacing)[:, None] * _TO_DICOM).T
        matrix[:3, 3] = like.origin * _TO_DICOM
        header.set_sform(matrix, "scanner")
        header.set_qform(matrix, "scanner")
        header.set_xyzt_units("mm", "sec")
    header.set_data_dtype(np.int16)
    header["descrip"] = description.encode()[:_DESCRIPTION_BYTES]
    two = isinstance(header, nibabel.Nifti2Header)
    image = (nibabel.Nifti2Image if two else nibabel.Nifti1Image)(voxels.T, None, header)
    with path.open("wb") as file:
        if is_compressed(path):
            with igzip.IGzipFile("", "wb", fileobj=file, mtime=0) as packed:
                image.to_stream(packed)
        else:
            image.to_stream(file)


def is_nifti(path: Path) -> bool:
    """Tell whether a file's name is one of NIfTI's."""
    return path.name.lower().endswith(SUFFIXES)


def is_compressed(path: Path) -> bool:
    """Tell whether a file's name is one of compressed NIfTI's."""
    return path.suffix.lower() == ".gz"


def _opened(path: Path) -> BinaryIO:
    return cast(BinaryIO, igzip.open(path)) if is_compressed(path) else path.open("rb")


def _to_end(file: BinaryIO) -> None:
    """Read what follows the voxels, a little at most: gzip compares its checksum at the end."""
    more = 0
    while chunk := file.read(1 << 16):
        more += len(chunk)
        if more > _MAX_MORE_BYTES:
            raise ValueError("more than its voxels unpacks (damaged?)")


def _header(path: Path) -> "nibabel.Nifti1Header":
    with _opened(path) as file:
        head = file.read(nibabel.Nifti2Header.sizeof_hdr)
    kind = nibabel.Nifti2Header if nibabel.Nifti2Header.may_contain_header(head) else nibabel.Nifti1Header
    header = kind(head[: kind.sizeof_hdr], check=False)
    header.check_fix(_SILENT)
    return header


def _size(header: "nibabel.Nifti1Header") -> tuple[int, ...]:
    """The size, without further axes that are of one voxel."""
    size = [int(side) for side in header.get_data_shape()]
    while len(size) > 3 and size[-1] == 1:
        size.pop()
    return tuple(size)


def _scaling(header: "nibabel.Nifti1Header") -> tuple[float, float] | None:
    """Slope and intercept of the values; None where they stay as they are, as they do at slope 0."""
    slope, intercept = header.get_slope_inter()
    return None if slope is None or (slope, intercept) == (1, 0) else (slope, intercept)


def _affine(header: "nibabel.Nifti1Header") -> np.ndarray:
    """[3, 4]: from voxels to DICOM's coordinates in mm.

    Of the two that a file may have, that of the scanner counts, as it does in ITK: the first (sform) where it says that
    it is the scanner's or is alone, otherwise the second (qform).
    """
    qform, sform = int(header["qform_code"]), int(header["sform_code"])
    if sform == 1 or (sform and not qform):
        matrix = header.get_sform()[:3]
    elif qform:
        matrix = header.get_qform()[:3]
    else:
        matrix = np.diag([*header.get_zooms(), 1, 1, 1][:3]) @ np.eye(3, 4) * _TO_DICOM[:, None]
    return matrix * _TO_DICOM[:, None] * _MM.get(int(header["xyzt_units"]) & 7, 1.0)
