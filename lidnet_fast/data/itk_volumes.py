"""CT volumes in files that SimpleITK reads: MetaImage (.mhd, .mha), NRRD (.nrrd, .nhdr) and NIfTI (.nii, .nii.gz).

Such a file knows neither patient nor series. Its series is named by the file (LUNA16 names its files by
SeriesInstanceUID), or by its path below the source where several files have one name; each is a patient of its own.
"""

import dataclasses
import gzip
import math
import struct
import zlib
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lidnet_fast.data.jobs import run
from lidnet_fast.data.series import Rejected, Series, hu_volume
from lidnet_fast.errors import InputError

if TYPE_CHECKING:
    import SimpleITK as sitk  # noqa: N813

SUFFIXES = (".mhd", ".mha", ".nrrd", ".nhdr", ".nii", ".nii.gz")
DATA_SUFFIXES = (".raw", ".zraw", ".raw.gz")
"""Where .mhd and .nhdr keep their voxels."""

_FILES_PER_JOB = 16
_LARGEST_SIDE = 65535


@dataclasses.dataclass(frozen=True, kw_only=True)
class VolumeSeries(Series):
    """A CT volume in one file.

    Attributes:
        flipped: the file's slices run against their normal, as in a left-handed coordinate system.
    """

    flipped: bool

    def read(self) -> np.ndarray:
        """Decode the volume; values are HU already."""
        (path,) = self.files
        values = read_voxels(path)
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise InputError(f"{path}: has voxels that aren't finite")
        if values.min() >= 0:
            raise InputError(
                f"{path}: has no value below {values.min():g}, so it isn't HU (labels? raw detector values?)"
            )
        return hu_volume(values[::-1] if self.flipped else values)


def is_volume(path: Path) -> bool:
    """Tell whether a file's name is that of a volume."""
    return path.name.lower().endswith(SUFFIXES)


def scan_volumes(
    files: Sequence[Path], sources: Sequence[Path], executor: Executor | None = None
) -> tuple[list[VolumeSeries], list[Rejected]]:
    """Read the headers of volumes.

    Args:
        files: the volumes; `is_volume` is true of each.
        sources: the folders below which they lie.
        executor: runs the work.

    Returns:
        The series, in the order of the files, and what can't be used.
    """
    jobs = [files[start : start + _FILES_PER_JOB] for start in range(0, len(files), _FILES_PER_JOB)]
    found = [result for batch in run(executor, _read_headers, jobs, "reading volume headers") for result in batch]
    series = [one for one in found if isinstance(one, VolumeSeries)]
    names = Counter(one.series_uid for one in series)
    unique = [one if names[one.series_uid] == 1 else _named_by_path(one, sources) for one in series]
    return unique, [one for one in found if isinstance(one, Rejected)]


def _named_by_path(series: VolumeSeries, sources: Sequence[Path]) -> VolumeSeries:
    path = series.files[0].with_name(series.series_uid)
    name = next((path.relative_to(source).as_posix() for source in sources if path.is_relative_to(source)), path.name)
    return dataclasses.replace(series, series_uid=name, patient_id=name)


def _read_headers(paths: Sequence[Path]) -> list[VolumeSeries | Rejected]:
    return [_read_header(path) for path in paths]


def _read_header(path: Path) -> VolumeSeries | Rejected:
    name = next(path.name[: -len(suffix)] for suffix in SUFFIXES if path.name.lower().endswith(suffix))
    try:
        return _series(path, name)
    except InputError as error:
        return Rejected(name, path, str(error))


def _series(path: Path, name: str) -> VolumeSeries:
    import SimpleITK as sitk  # noqa: N813

    reader = read_header(path)
    check_is_scalar_volume(reader)
    width, height, depth = reader.GetSize()
    if not 1 <= min(width, height, depth) <= max(width, height, depth) <= _LARGEST_SIDE:
        raise InputError(f"{path}: says that it has {width} x {height} x {depth} voxels")
    if reader.GetPixelID() in (sitk.sitkInt8, sitk.sitkUInt8):
        raise InputError(f"{path}: holds 8-bit values, which HU don't fit into (labels?)")
    directions = np.array(reader.GetDirection()).reshape(3, 3).T  # a row per axis of the array
    if not np.allclose(directions[:2] @ directions[:2].T, np.eye(2), atol=1e-2):
        raise InputError(f"{path}: its first two axes aren't at right angles: {directions[:2].tolist()}")
    x_spacing, y_spacing, z_spacing = reader.GetSpacing()
    step = directions[2] * z_spacing
    normal = np.cross(directions[0], directions[1])
    first = np.array(reader.GetOrigin())
    flipped = bool(normal @ step < 0)
    if flipped:
        first, step = first + (depth - 1) * step, -step
    if not normal @ step > 0:
        raise InputError(f"{path}: its slices aren't apart: spacing {reader.GetSpacing()}")
    return VolumeSeries(
        series_uid=name,
        patient_id=name,
        files=(path,),
        positions=tuple(tuple((first + z * step).tolist()) for z in range(depth)),
        shape=(depth, height, width),
        # Of the planes' distance, which is less than the step between them where a tilted gantry shifts them.
        spacing=(float(normal @ step), y_spacing, x_spacing),
        orientation=tuple(directions[:2].ravel().tolist()),
        flipped=flipped,
    )


def read_header(path: Path) -> "sitk.ImageFileReader":
    """Read what a volume's file says of it, without its voxels.

    Raises:
        InputError: it can't be read.
    """
    import SimpleITK as sitk  # noqa: N813

    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise InputError(f"{path}: can't be read: {itk_cause(error)}") from error
    return reader


def check_is_scalar_volume(header: "sitk.ImageFileReader") -> None:
    """Refuse what has other than three dimensions and one value per voxel.

    Raises:
        InputError: names the file and what it has.
    """
    if header.GetDimension() != 3 or header.GetNumberOfComponents() != 1:
        kind = f"{header.GetDimension()} dimensions and {header.GetNumberOfComponents()} values per voxel"
        raise InputError(f"{header.GetFileName()}: a CT volume has 3 dimensions and 1 value per voxel, this has {kind}")


def read_image(path: Path) -> "sitk.Image":
    """Read a volume with its voxels.

    Raises:
        InputError: it is truncated or can't be decoded.
    """
    import SimpleITK as sitk  # noqa: N813

    try:
        _check_nifti_complete(path)
        return sitk.ReadImage(str(path))
    except (RuntimeError, OSError, EOFError, struct.error, zlib.error) as error:
        raise InputError(f"{path}: can't be read (truncated?): {itk_cause(error)}") from error


def read_voxels(path: Path) -> np.ndarray:
    """Read all values of a volume, [Z, H, W], in the file's dtype; as `read_image`."""
    import SimpleITK as sitk  # noqa: N813

    return sitk.GetArrayFromImage(read_image(path))


def _check_nifti_complete(path: Path) -> None:
    """ITK fills what is missing at the end of a NIfTI file with zeros and says nothing.

    Raises:
        EOFError: the file is shorter than its header says.
    """
    if not path.name.lower().endswith((".nii", ".nii.gz")):
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
