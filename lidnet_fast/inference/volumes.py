"""CT volumes in files that SimpleITK reads and writes: NIfTI, MetaImage, NRRD."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk  # noqa: N813

from lidnet_fast.data.formats.geometry import LOWEST_HU
from lidnet_fast.data.formats.itk.files import check_hu, check_is_volume, has_8_bits, itk_cause, read_header, read_image
from lidnet_fast.errors import InputError
from lidnet_fast.files import is_temporary, whole_path


@dataclass(frozen=True)
class VolumeFile:
    """A CT volume on disk.

    Attributes:
        path: the file.
        axis: of its array (third, second, first index of the image) that runs closest to the patient's length; slices
            are taken across it.
        slices: how many.
    """

    path: Path
    axis: int
    slices: int


def inspect_volume(path: Path) -> VolumeFile | str:
    """Read a volume's header; a string says why it isn't CT.

    Raises:
        InputError: it can't be read, or isn't an image of three dimensions and one value per voxel.
    """
    header = read_header(path)
    if has_8_bits(header):
        return "of 8 bits, which can't hold HU (masks?)"
    check_is_volume(header)
    lengthwise = np.abs(np.array(header.GetDirection()).reshape(3, 3)[2])
    axis = 2 - int(lengthwise.argmax())
    return VolumeFile(path, axis, header.GetSize()[2 - axis])


def read_volume_file(volume: VolumeFile) -> tuple[sitk.Image, np.ndarray]:
    """Read a volume: the image, and its voxels [Z,H,W] as slices.

    Raises:
        InputError: it is damaged, or its values aren't HU.
    """
    image = read_image(volume.path)
    slices = np.moveaxis(sitk.GetArrayViewFromImage(image), volume.axis, 0)
    check_hu(volume.path, slices)
    return image, slices


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


def write_volume_file(slices: np.ndarray, axis: int, source: sitk.Image, description: str, path: Path) -> None:
    """Write a volume with the geometry of another.

    Args:
        slices: int16 [Z,H,W].
        axis: where Z is in the source's array.
        source: gives origin, spacing and direction.
        description: kept in the header, where the format has a place for it.
        path: the file to make; its name says in which format.

    Raises:
        OSError: it can't be written.
    """
    image = sitk.GetImageFromArray(np.ascontiguousarray(np.moveaxis(slices, 0, axis)))
    image.CopyInformation(source)
    image.SetMetaData("ITK_FileNotes", description[:79])  # NIfTI's "descrip"
    with whole_path(path) as unfinished:
        try:
            sitk.WriteImage(image, str(unfinished), useCompression=path.name.lower().endswith(".gz"))
        except RuntimeError as error:
            raise OSError(None, itk_cause(error), str(path)) from error


def rounded_hu(denoised: np.ndarray, original: np.ndarray) -> np.ndarray:
    """Denoised HU as int16; where nothing was measured (below `LOWEST_HU`), what was there."""
    limits = np.iinfo(np.int16)
    values = np.where(original < LOWEST_HU, original, np.maximum(np.rint(denoised), LOWEST_HU))
    return values.clip(limits.min, limits.max).astype(np.int16)
