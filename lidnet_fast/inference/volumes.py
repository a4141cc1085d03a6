"""CT volumes in files, to be denoised: NIfTI, MetaImage, NRRD."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lidnet_fast.data.formats.geometry import LOWEST_HU
from lidnet_fast.data.formats.itk.files import check_hu, measured, read_header, read_voxels, write_voxels
from lidnet_fast.data.formats.itk.header import VolumeHeader
from lidnet_fast.errors import InputError
from lidnet_fast.files import is_temporary, whole_path


@dataclass(frozen=True)
class VolumeFile:
    """A CT volume on disk.

    Attributes:
        header: what the file says of it.
        axis: of its array (third, second, first index of the image) that runs closest to the patient's length; slices
            are taken across it.
        slices: how many.
    """

    header: VolumeHeader
    axis: int
    slices: int

    @property
    def path(self) -> Path:
        """The file."""
        return self.header.path


def inspect_volume(path: Path) -> VolumeFile | str:
    """Read a volume's header; a string says why it isn't CT.

    Raises:
        InputError: it can't be read, or isn't an image of three dimensions and one value per voxel.
    """
    header = read_header(path)
    if header.bits == 8:
        return "of 8 bits, which can't hold HU (masks?)"
    header.check_is_volume()
    axis = 2 - int(np.abs(header.directions[:, 2]).argmax())
    return VolumeFile(header, axis, header.size[2 - axis])


def read_volume_file(volume: VolumeFile) -> np.ndarray:
    """Read a volume's voxels [Z,H,W] as slices.

    Raises:
        InputError: it is damaged, or its values aren't HU.
    """
    slices = measured(volume.path, np.moveaxis(read_voxels(volume.path), volume.axis, 0))
    check_hu(volume.path, slices)
    return slices


def check_free(path: Path) -> None:
    """Refuse to make a volume whose file of voxels, which some formats put next to the header, exists already.

    Raises:
        InputError: names that file; unless a call left it that was interrupted before it moved the header.
    """
    voxels = path.with_suffix(".raw")
    if path.suffix.lower() in (".mhd", ".nhdr") and voxels.exists():
        unfinished = [folder for folder in path.parent.iterdir() if is_temporary(folder)]
        if not any((folder / path.name).exists() and not (folder / voxels.name).exists() for folder in unfinished):
            raise InputError(
                f"{voxels}: exists already, and would be overwritten by the voxels of {path.name}. "
                "To fix: choose another name, or remove the file"
            )


def write_volume_file(slices: np.ndarray, volume: VolumeFile, description: str, path: Path) -> None:
    """Write a volume with the geometry of another.

    Args:
        slices: int16 [Z,H,W].
        volume: gives origin, spacing and directions.
        description: kept in the header, where the format has a place for it.
        path: the file to make; its name says in which format.

    Raises:
        OSError: it can't be written.
    """
    voxels = np.ascontiguousarray(np.moveaxis(slices, 0, volume.axis))
    with whole_path(path) as unfinished:
        write_voxels(unfinished, voxels, volume.header, description)


def rounded_hu(denoised: np.ndarray, original: np.ndarray) -> np.ndarray:
    """Denoised HU as int16; where nothing was measured (below `LOWEST_HU`), what was there."""
    limits = np.iinfo(np.int16)
    values = np.where(original < LOWEST_HU, original, np.maximum(np.rint(denoised), LOWEST_HU))
    return values.clip(limits.min, limits.max).astype(np.int16)
