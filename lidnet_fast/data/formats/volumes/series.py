"""CT volumes in files: MetaImage (.mhd, .mha), NRRD (.nrrd, .nhdr) and NIfTI (.nii, .nii.gz).

Such a file knows neither patient nor series. Its series is named by the file (LUNA16 names its files by
SeriesInstanceUID), or by its path below the source where several files have one name; each is a patient of its own.
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import numpy as np

from lidnet_fast.data.formats.account import Found, Rejected
from lidnet_fast.data.formats.geometry import Series, hu_volume
from lidnet_fast.data.formats.volumes.files import (
    check_hu,
    is_volume,
    measured,
    read_header,
    read_voxels,
    volume_stem,
)
from lidnet_fast.data.formats.volumes.header import VolumeHeader
from lidnet_fast.data.prepare.jobs import run
from lidnet_fast.errors import InputError

_FILES_PER_JOB = 16
_RIGHT_ANGLE = 1e-2
"""Cosine of the angle between two axes that are at right angles but for rounding."""
_LARGEST_ANGLE = 30.0
"""Between slices and the axial plane, in degrees: gantries tilt no further."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class VolumeSeries(Series):
    """A CT volume in one file, as axial slices, whichever of the file's axes runs along the patient.

    The rows of a slice run along the axis that is nearer to left and right.

    Attributes:
        header: what the file says.
        file_axes: the file's axes, from 0 for the one that varies fastest: along the rows, the columns and the slices.
        flipped: the file's slices run against their normal, as in a left-handed coordinate system.
        any_values: take values for HU that don't look like it.
    """

    header: VolumeHeader
    file_axes: tuple[int, int, int]
    flipped: bool
    any_values: bool = False

    def read(self) -> np.ndarray:
        """Decode the volume; values are HU already."""
        return hu_volume(self.read_hu())

    def read_hu(self) -> np.ndarray:
        """As `read_values`, of a volume whose values can be HU.

        Raises:
            InputError: they can't.
        """
        values = self.read_values()
        if not self.any_values:
            check_hu(self.header.path, values)
        return values.astype(np.float32) if values.dtype.kind == "u" else values

    def read_values(self) -> np.ndarray:
        """Decode the volume to [Z, H, W] in the file's own numbers.

        Raises:
            InputError: the file is damaged, or has voxels inside the field of view that aren't finite.
        """
        slices = np.transpose(read_voxels(self.header.path), self._order)
        return measured(self.header.path, slices[::-1] if self.flipped else slices)

    def to_file(self, slices: np.ndarray) -> np.ndarray:
        """Turn slices [Z, H, W] into voxels in the file's order, its slowest axis first."""
        return np.ascontiguousarray(np.transpose(slices[::-1] if self.flipped else slices, np.argsort(self._order)))

    @property
    def _order(self) -> list[int]:
        """Axes of the file's array, whose first is its slowest, in the order of [Z, H, W]."""
        return [2 - axis for axis in reversed(self.file_axes)]

    @property
    def _transposed(self) -> bool:
        return self.file_axes[0] > self.file_axes[1]

    @property
    def source_shape(self) -> tuple[int, int, int]:
        """See `Series`."""
        depth, height, width = self.shape
        return (depth, width, height) if self._transposed else self.shape

    def from_source(self, row: np.ndarray) -> np.ndarray:
        """See `Series`."""
        z, x1, y1, x2, y2 = row
        z = self.shape[0] - 1 - z if self.flipped else z
        return np.array([z, y1, x1, y2, x2] if self._transposed else [z, x1, y1, x2, y2])


def scan_volumes(
    files: Sequence[Path],
    sources: Sequence[Path],
    executor: Executor | None = None,
    *,
    max_volume_gib: float | None = None,
    any_values: bool = False,
) -> tuple[Found[VolumeSeries], list[Path]]:
    """Read the headers of volumes; those of 8 bits, which masks have, are skipped.

    Args:
        files: some files, volumes among them.
        sources: the folders below which they lie.
        executor: runs the work.
        max_volume_gib: see `VolumeHeader.check_unpacked`.
        any_values: see `VolumeSeries`.

    Returns:
        The series, in the order of the files; and the files that aren't of volumes.
    """
    volumes = list(filter(is_volume, files))
    named = list(zip(volumes, _names(volumes, sources), strict=True))
    jobs = [named[start : start + _FILES_PER_JOB] for start in range(0, len(named), _FILES_PER_JOB)]
    read = functools.partial(_read_headers, max_volume_gib=max_volume_gib, any_values=any_values)
    results = [result for batch in run(executor, read, jobs, "reading volume headers") for result in batch]
    found = Found(
        skipped=Counter(result for result in results if isinstance(result, str)),
        rejected=[result for result in results if isinstance(result, Rejected)],
        series=[result for result in results if isinstance(result, VolumeSeries)],
    )
    headers_and_voxels = {*volumes, *(path for one in found.series for path in one.files)}
    found.found = len(headers_and_voxels)
    return found, [path for path in files if path not in headers_and_voxels]


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


def _read_headers(named: Sequence[tuple[Path, str]], **rules: Any) -> list[VolumeSeries | Rejected | str]:
    return [_read_header(path, name, **rules) for path, name in named]


def _read_header(path: Path, name: str, **rules: Any) -> VolumeSeries | Rejected | str:
    try:
        header = read_header(path)
        if header.bits == 8:
            return "of 8 bits, which can't hold HU (masks?)"
        return volume_series(header, name, **rules)
    except InputError as error:
        return Rejected(name, path, str(error))


def volume_series(
    header: VolumeHeader, name: str, *, max_volume_gib: float | None = None, any_values: bool = False
) -> VolumeSeries:
    """A series of what a volume's header says.

    Args:
        header: the header.
        name: of the series.
        max_volume_gib: see `VolumeHeader.check_unpacked`.
        any_values: see `VolumeSeries`.

    Raises:
        InputError: it isn't of a volume with the geometry of CT, its slices aren't axial, or it unpacks to too much.
    """
    header.check_is_volume()
    header.check_unpacked(max_volume_gib)
    path = header.path
    directions = header.directions / header.lengths[:, None]
    file_axes = _axial(directions)
    directions = directions[list(file_axes)]
    if abs(directions[0] @ directions[1]) > _RIGHT_ANGLE:
        raise InputError(
            f"{path}: the rows and columns of its slices aren't at right angles: {directions[:2].tolist()}. "
            "To fix: resample it to a grid of right angles"
        )
    columns = directions[1] - directions[0] * (directions[0] @ directions[1])  # without what files round
    directions[1] = columns / np.linalg.norm(columns)
    normal = np.cross(directions[0], directions[1])
    oblique = np.degrees(np.arccos(min(1.0, abs(normal[2]))))
    if not oblique <= _LARGEST_ANGLE:
        raise InputError(
            f"{path}: its slices are oblique, {oblique:.0f} degrees from axial; up to {_LARGEST_ANGLE:g} are taken. "
            "To fix: resample it to axial slices"
        )
    width, height, depth = (header.size[axis] for axis in file_axes)
    x_spacing, y_spacing, z_spacing = (float(header.spacing[axis] * header.lengths[axis]) for axis in file_axes)
    step = directions[2] * z_spacing
    first = np.array(header.origin)
    flipped = bool(normal @ step < 0)
    if flipped:
        first, step = first + (depth - 1) * step, -step
    if not normal @ step > 0:
        raise InputError(f"{path}: its slices aren't apart: spacing {header.spacing}")
    return VolumeSeries(
        series_uid=name,
        patient_id=name,
        files=header.files,
        positions=tuple(tuple((first + z * step).tolist()) for z in range(depth)),
        shape=(depth, height, width),
        # Of the planes' distance, which is less than the step between them where a tilted gantry shifts them.
        spacing=(float(normal @ step), y_spacing, x_spacing),
        orientation=tuple(directions[:2].ravel().tolist()),
        header=header,
        file_axes=file_axes,
        flipped=flipped,
        any_values=any_values,
    )


def _axial(directions: np.ndarray) -> tuple[int, int, int]:
    """The axes that are nearest to left and right, front and back, and the patient's length."""
    along = int(np.abs(directions[:, 2]).argmax())
    one, other = (axis for axis in range(3) if axis != along)
    # At 45 degrees between the two, the file's order stays, whatever is rounded.
    if abs(directions[other, 0]) > abs(directions[one, 0]) + _RIGHT_ANGLE:
        one, other = other, one
    return one, other, along
