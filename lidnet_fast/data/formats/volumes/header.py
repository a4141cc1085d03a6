"""What the header of a volume's file says, whatever its format."""

import dataclasses
import math
from pathlib import Path

import numpy as np

from lidnet_fast.data.formats.geometry import Triple
from lidnet_fast.errors import InputError

_LARGEST_SIDE = 65535
_LENGTHS = 0.5, 2.0
_MAX_BYTES = 8 << 30
"""That a compressed volume may unpack to: 2,000 slices of 1024 x 1024 in float32."""
_MAX_RATIO = 100
"""Of what it unpacks to and its size, where the former is more than the bytes below; CT's is 2 to 20."""
_SMALL_BYTES = 64 << 20


@dataclasses.dataclass(frozen=True, eq=False)
class VolumeHeader:
    """A volume's header.

    Attributes:
        path: the file.
        data: the file of its voxels, which may be another.
        packed: whether they are compressed there, or written as text.
        data_bytes: what that file has to hold, unpacked.
        size: how many voxels it has along each of its axes, from the one that varies fastest.
        values_per_voxel: 1 of CT.
        bits: of a value.
        origin: (x, y, z) in mm, the centre of the first voxel in DICOM's coordinates (to the left, the back, the head).
        spacing: between voxels along each of the axes, in mm.
        directions: [3, 3], one row per axis: its direction in DICOM's coordinates.
    """

    path: Path
    data: Path
    packed: bool
    data_bytes: int
    size: tuple[int, ...]
    values_per_voxel: int
    bits: int
    origin: Triple
    spacing: Triple
    directions: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """[3]: of the directions; 1 but where files round or state sheared axes."""
        with np.errstate(all="ignore"):
            return np.asarray(np.linalg.norm(self.directions, axis=1))

    @property
    def files(self) -> tuple[Path, ...]:
        """All files that the volume is read from."""
        return (self.path,) if self.data == self.path else (self.path, self.data)

    def check_unpacked(self, max_gib: float | None = None) -> None:
        """Refuse a compressed file that unpacks to more than a volume of CT would.

        Args:
            max_gib: up to how many GiB it may unpack; None for the usual limits of size and ratio.

        Raises:
            InputError: names the file, its sizes and the option.
        """
        stored = self.data.stat().st_size
        limit = min(_MAX_BYTES, max(_SMALL_BYTES, _MAX_RATIO * stored)) if max_gib is None else max_gib * 2**30
        if self.packed and self.data_bytes > limit:
            raise InputError(
                f"{self.path}: would unpack from {stored / 2**20:.1f} to {self.data_bytes / 2**20:.1f} MiB. To fix: "
                f"if that is what it should be, --max-volume-gib {math.ceil(self.data_bytes / 2**30)} allows it"
            )

    def check_is_volume(self) -> None:
        """Refuse what isn't three dimensions of one value per voxel, or has a size or directions that can't be.

        Raises:
            InputError: names the file and what it has.
        """
        if len(self.size) != 3 or self.values_per_voxel != 1:
            kind = f"{len(self.size)} dimensions and {self.values_per_voxel} values per voxel"
            raise InputError(f"{self.path}: a CT volume has 3 dimensions and 1 value per voxel, this has {kind}")
        if not 1 <= min(self.size) <= max(self.size) <= _LARGEST_SIDE:
            raise InputError(f"{self.path}: says that it has {' x '.join(map(str, self.size))} voxels")
        if not ((self.lengths > _LENGTHS[0]) & (self.lengths < _LENGTHS[1])).all():
            raise InputError(f"{self.path}: its directions aren't of length 1: {self.directions.ravel().tolist()}")
