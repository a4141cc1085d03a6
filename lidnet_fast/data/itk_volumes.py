"""CT volumes in files that SimpleITK reads: MetaImage (.mhd, .mha), NRRD (.nrrd, .nhdr) and NIfTI (.nii, .nii.gz).

Such a file knows neither patient nor series. Its series is named by the file (LUNA16 names its files by
SeriesInstanceUID), or by its path below the source where several files have one name; each is a patient of its own.
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Executor
from pathlib import Path

import numpy as np

from lidnet_fast.data.itk_files import SUFFIXES, check_is_volume, read_header, read_voxels
from lidnet_fast.data.jobs import run
from lidnet_fast.data.series import Rejected, Series, hu_volume
from lidnet_fast.errors import InputError

_FILES_PER_JOB = 16


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
    check_is_volume(reader)
    width, height, depth = reader.GetSize()
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
