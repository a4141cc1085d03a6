"""CT volumes in files: MetaImage (.mhd, .mha), NRRD (.nrrd, .nhdr) and NIfTI (.nii, .nii.gz).

Such a file knows neither patient nor series. Its series is named by the file (LUNA16 names its files by
SeriesInstanceUID), or by its path below the source where several files have one name; each is a patient of its own.
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Executor
from pathlib import Path

import numpy as np

from lidnet_fast.data.formats.geometry import Rejected, Series, hu_volume
from lidnet_fast.data.formats.itk.files import check_hu, measured, read_header, read_voxels, volume_stem
from lidnet_fast.data.formats.itk.header import VolumeHeader
from lidnet_fast.data.prepare.jobs import run
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
        values = self.read_values()
        check_hu(self.files[0], values)
        return hu_volume(values)

    def read_values(self) -> np.ndarray:
        """Decode the volume to [Z, H, W] in the file's own numbers.

        Raises:
            InputError: the file is damaged, or has voxels inside the field of view that aren't finite.
        """
        (path,) = self.files
        voxels = read_voxels(path)
        return measured(path, voxels[::-1] if self.flipped else voxels)

    def slice_of_index(self, index: int) -> int:
        """The slice that is number `index` of the file."""
        return self.shape[0] - 1 - index if self.flipped else index


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
    named = list(zip(files, _names(files, sources), strict=True))
    jobs = [named[start : start + _FILES_PER_JOB] for start in range(0, len(named), _FILES_PER_JOB)]
    found = [result for batch in run(executor, _read_headers, jobs, "reading volume headers") for result in batch]
    return [one for one in found if isinstance(one, VolumeSeries)], [one for one in found if isinstance(one, Rejected)]


def _names(files: Sequence[Path], sources: Sequence[Path]) -> list[str]:
    """Each file's name without its ending, or where several have one name, its path below the source."""
    stems = [volume_stem(path) for path in files]
    counts = Counter(stems)
    return [
        stem if counts[stem] == 1 else _below(path.with_name(stem), sources)
        for path, stem in zip(files, stems, strict=True)
    ]


def _below(path: Path, sources: Sequence[Path]) -> str:
    return next((path.relative_to(source).as_posix() for source in sources if path.is_relative_to(source)), path.name)


def _read_headers(named: Sequence[tuple[Path, str]]) -> list[VolumeSeries | Rejected]:
    return [_read_header(path, name) for path, name in named]


def _read_header(path: Path, name: str) -> VolumeSeries | Rejected:
    try:
        header = read_header(path)
        if header.bits == 8:
            raise InputError(f"{path}: holds 8-bit values, which HU don't fit into (labels?)")
        return volume_series(header, name)
    except InputError as error:
        return Rejected(name, path, str(error))


def volume_series(header: VolumeHeader, name: str) -> VolumeSeries:
    """A series of what a volume's header says.

    Raises:
        InputError: it isn't of a volume with the geometry of CT.
    """
    header.check_is_volume()
    path, directions = header.path, header.directions
    width, height, depth = header.size
    if not np.allclose(directions[:2] @ directions[:2].T, np.eye(2), atol=1e-2):
        raise InputError(f"{path}: its first two axes aren't at right angles: {directions[:2].tolist()}")
    x_spacing, y_spacing, z_spacing = header.spacing
    step = directions[2] * z_spacing
    normal = np.cross(directions[0], directions[1])
    first = np.array(header.origin)
    flipped = bool(normal @ step < 0)
    if flipped:
        first, step = first + (depth - 1) * step, -step
    if not normal @ step > 0:
        raise InputError(f"{path}: its slices aren't apart: spacing {header.spacing}")
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
