"""CT volumes in files, to be denoised: NIfTI, MetaImage, NRRD."""

from pathlib import Path

import numpy as np

from lidnet_fast.data.formats.geometry import LOWEST_HU
from lidnet_fast.errors import InputError
from lidnet_fast.files import is_temporary


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


def rounded_hu(denoised: np.ndarray, original: np.ndarray) -> np.ndarray:
    """Denoised HU as int16; where nothing was measured (below `LOWEST_HU`), what was there."""
    limits = np.iinfo(np.int16)
    values = np.where(original < LOWEST_HU, original, np.maximum(np.rint(denoised), LOWEST_HU))
    return values.clip(limits.min, limits.max).astype(np.int16)
