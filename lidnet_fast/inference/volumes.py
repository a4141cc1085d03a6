"""CT volumes in files that SimpleITK reads and writes: NIfTI, MetaImage, NRRD."""

import gzip
import math
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk  # noqa: N813

from lidnet_fast.data.dicom import LOWEST_HU
from lidnet_fast.errors import InputError

SUFFIXES = (".nii", ".nii.gz", ".mhd", ".mha", ".nrrd")


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


def is_volume(path: Path) -> bool:
    """Whether a file's name is that of a volume."""
    return path.name.lower().endswith(SUFFIXES)


def inspect_volume(path: Path) -> VolumeFile | str:
    """Read a volume's header; a string says why it isn't CT.

    Raises:
        InputError: it can't be read, or isn't an image of three dimensions and one value per voxel.
    """
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise InputError(f"{path}: can't be read: {_cause(error)}") from error
    if reader.GetPixelID() in (sitk.sitkUInt8, sitk.sitkInt8):
        return "of 8 bits, which can't hold HU (masks?)"
    if reader.GetDimension() != 3 or reader.GetNumberOfComponents() != 1:
        raise InputError(
            f"{path}: has {reader.GetDimension()} dimensions and {reader.GetNumberOfComponents()} values per voxel; "
            "a CT volume has 3 dimensions and 1 value"
        )
    lengthwise = np.abs(np.array(reader.GetDirection()).reshape(3, 3)[2])
    axis = 2 - int(lengthwise.argmax())
    return VolumeFile(path, axis, reader.GetSize()[2 - axis])


def read_volume_file(volume: VolumeFile) -> tuple[sitk.Image, np.ndarray]:
    """Read a volume: the image, and its voxels [Z,H,W] as slices.

    Raises:
        InputError: it is damaged, or has values that aren't finite.
    """
    try:
        _check_complete(volume.path)
        image = sitk.ReadImage(str(volume.path))
    except (RuntimeError, OSError, EOFError, struct.error) as error:
        raise InputError(f"{volume.path}: can't be read (truncated?): {_cause(error)}") from error
    slices = np.moveaxis(sitk.GetArrayViewFromImage(image), volume.axis, 0)
    if not np.isfinite(slices).all():
        raise InputError(f"{volume.path}: has voxels that aren't finite")
    return image, slices


def write_volume_file(slices: np.ndarray, axis: int, source: sitk.Image, description: str, path: Path) -> None:
    """Write a volume with the geometry of another, in a folder of a temporary name from which it is then moved.

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
    folder = path.with_name(f".{path.name}.part")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        sitk.WriteImage(image, str(folder / path.name), useCompression=path.name.lower().endswith(".gz"))
    except RuntimeError as error:
        raise OSError(None, _cause(error), str(path)) from error
    # The header comes last, where it has a file of its own.
    for file in sorted(folder.iterdir(), key=lambda file: file.name == path.name):
        file.replace(path.with_name(file.name))
    folder.rmdir()


def rounded_hu(denoised: np.ndarray, original: np.ndarray) -> np.ndarray:
    """Denoised HU as int16; where nothing was measured (below `LOWEST_HU`), what was there."""
    limits = np.iinfo(np.int16)
    values = np.where(original < LOWEST_HU, original, np.maximum(np.rint(denoised), LOWEST_HU))
    return values.clip(limits.min, limits.max).astype(np.int16)


def _check_complete(path: Path) -> None:
    """ITK takes a NIfTI file that is cut off for one that ends in zeros.

    Raises:
        EOFError: voxels are missing.
    """
    if ".nii" not in path.suffixes[-2:]:
        return
    opened = gzip.open if path.suffix.lower() == ".gz" else open
    with opened(path, "rb") as file:
        header = file.read(352)
        order = "<" if struct.unpack_from("<i", header)[0] == 348 else ">"
        rank, *sizes = struct.unpack_from(f"{order}8h", header, 40)
        (bits,), (offset,) = struct.unpack_from(f"{order}h", header, 72), struct.unpack_from(f"{order}f", header, 108)
        needed = int(offset) + math.prod(sizes[:rank]) * bits // 8
        if file.seek(0, 2) < needed if opened is open else file.seek(needed) < needed:
            raise EOFError(f"its voxels take {needed} bytes, fewer are there")


def _cause(error: Exception) -> str:
    """The end of ITK's messages; they begin with a place in its sources."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].removeprefix("sitk::ERROR:").strip() if lines else type(error).__name__
