"""Files of volumes: MetaImage (.mhd, .mha), NRRD (.nrrd, .nhdr) and NIfTI (.nii, .nii.gz)."""

import struct
from pathlib import Path
from types import ModuleType
from typing import cast

import numpy as np
from isal.igzip_lib import IsalError
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError
from scipy import ndimage

from lidnet_fast.data.formats.geometry import LOWEST_HU
from lidnet_fast.data.formats.volumes import itk, nifti
from lidnet_fast.data.formats.volumes.header import VolumeHeader
from lidnet_fast.errors import InputError
from lidnet_fast.files import whole_path

SUFFIXES = (*itk.SUFFIXES, *nifti.SUFFIXES)

OUTSIDE_HU = np.nextafter(np.float32(LOWEST_HU), np.float32(-np.inf))
"""Stands for a voxel without a number, outside the field of view: below `LOWEST_HU`, which it is rounded to."""

_HIGHEST_FAT_HU = -50

_UNREADABLE: tuple[type[Exception], ...] = (
    *(RuntimeError, OSError, EOFError, ValueError, OverflowError, struct.error, HeaderDataError, WrapStructError),
    cast(type[Exception], IsalError),  # declared as an instance
)


def is_volume(path: Path) -> bool:
    """Tell whether a file's name is that of a volume."""
    return path.name.lower().endswith(SUFFIXES)


def volume_stem(path: Path) -> str:
    """A volume's name without its ending."""
    return path.name[: -len(next(suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)))]


def read_header(path: Path) -> VolumeHeader:
    """Read what a volume's file says of it, without its voxels.

    Raises:
        InputError: it can't be read.
    """
    try:
        header: VolumeHeader = _format(path).read_header(path)
        stored = header.data.stat().st_size
    except InputError:
        raise
    except _UNREADABLE as error:
        raise InputError(f"{path}: can't be read (truncated?): {itk.cause(error)}") from error
    if not header.packed and stored < header.data_bytes:
        raise InputError(
            f"{path}: can't be read (truncated?): its voxels take {header.data_bytes} bytes, "
            f"and {header.data.name} has {stored}"
        )
    return header


def read_voxels(path: Path) -> np.ndarray:
    """Read all values of a volume, the file's slowest axis first.

    Raises:
        InputError: it is truncated or can't be decoded.
    """
    try:
        return _format(path).read_voxels(path)
    except _UNREADABLE as error:
        raise InputError(f"{path}: can't be read (truncated?): {itk.cause(error)}") from error


def write_voxels(path: Path, voxels: np.ndarray, like: VolumeHeader, description: str) -> None:
    """Write a volume with the geometry of another; it appears whole or not at all.

    Args:
        path: the file to make; its name says in which format.
        voxels: int16, the file's slowest axis first.
        like: gives origin, spacing and directions.
        description: kept in the header, where the format has a place for it.

    Raises:
        InputError: the format can't take it.
        OSError: it can't be written.
    """
    with whole_path(path) as unfinished:
        try:
            _format(path).write(unfinished, voxels, like, description)
            read_header(unfinished)  # ITK says nothing of a disk that is full
        except OSError:
            raise
        except _UNREADABLE as error:
            raise InputError(f"{path}: can't be written: {itk.cause(error)}") from error


def measured(path: Path, slices: np.ndarray) -> np.ndarray:
    """Slices in which every voxel is a number: what isn't one outside the field of view becomes `OUTSIDE_HU`.

    Outside are regions that reach the edge of their slice, and whole slices at either end of the volume.

    Args:
        path: the file that they are read from.
        slices: [Z, H, W].

    Raises:
        InputError: other voxels aren't finite.
    """
    if slices.dtype.kind != "f":
        return slices
    missing = ~np.isfinite(slices)
    if not missing.any():
        return slices
    known = np.flatnonzero(~missing.all(axis=(1, 2)))
    inside = missing[known[0] : known[-1] + 1] if len(known) else missing
    if not all(_reaches_edge(of_slice) for of_slice in inside):
        raise InputError(
            f"{path}: has voxels that aren't finite inside the field of view. "
            "To fix: give them a value; only regions that reach the edge of their slice count as outside"
        )
    return np.where(missing, OUTSIDE_HU, slices)


def _reaches_edge(missing: np.ndarray) -> bool:
    """Whether each region of a slice's missing pixels reaches its edge, and some pixels aren't missing."""
    if missing.all():
        return False
    regions, count = ndimage.label(missing)
    edges = np.concatenate([regions[0], regions[-1], regions[:, 0], regions[:, -1]])
    return len(np.unique(edges[edges > 0])) == count


def check_hu(path: Path, values: np.ndarray) -> None:
    """Refuse voxels that can't be HU: those of CT are -1000 in air and -100 in fat.

    Raises:
        InputError: all are above those of air and fat.
    """
    if (lowest := values.min()) > _HIGHEST_FAT_HU:
        raise InputError(
            f"{path}: has no value below {lowest:g}, so it isn't HU (MR? labels? raw detector values?). "
            "To fix: if it is HU, of a part without air and fat, --any-values takes it"
        )


def _format(path: Path) -> ModuleType:
    return nifti if nifti.is_nifti(path) else itk
