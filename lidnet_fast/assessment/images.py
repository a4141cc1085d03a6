"""Scans written down for other tools to denoise, and read again as arms."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lidnet_fast.assessment.arms import Arm
from lidnet_fast.assessment.scanner import Scan
from lidnet_fast.data.formats.find import files_below
from lidnet_fast.data.formats.volumes.files import is_volume, read_header, volume_stem
from lidnet_fast.data.formats.volumes.series import volume_series
from lidnet_fast.errors import InputError

_LARGEST_SHIFT_HU = 200.0
"""A denoiser doesn't move the mean by more than this; an offset or another scale does."""


class ImagesArm(Arm):
    """Shows the scans that a tool denoised: volumes named as `ScanWriter` names them, one slice per realisation.

    Args:
        name: of the arm.
        folder: searched with everything below it.

    Raises:
        InputError: there is no such folder.
    """

    def __init__(self, name: str, folder: Path) -> None:
        super().__init__(name, lambda images: images, str(folder))
        if not folder.is_dir():
            raise InputError(f"--images {name}={folder}: there is no such folder")
        self._folder = folder
        self._files = {volume_stem(path): path for path in files_below([folder]).paths if is_volume(path)}
        self._open: dict[str, np.ndarray] = {}

    def __call__(self, images: Tensor, scan: Scan) -> Tensor:
        """The same realisations as the images [N, H, W], denoised.

        Raises:
            InputError: the scan's volume is missing, has another size, or its values aren't HU of it.
        """
        shape = (scan.realisations, *images.shape[1:])
        if scan.name not in self._open:
            self._open = {**dict(list(self._open.items())[-1:]), scan.name: self._read(scan.name, shape)}
        shown = torch.from_numpy(self._open[scan.name][scan.first : scan.first + len(images)].astype(np.float32))
        shift = float((shown.mean() - images.mean()).abs())
        if not shift <= _LARGEST_SHIFT_HU:
            raise InputError(
                f"{self._files[scan.name]}: its mean is {shift:.0f} HU off that of the scan: its values aren't HU, or "
                "it's another scan"
            )
        return shown

    def _read(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        path = self._files.get(name)
        if path is None:
            raise InputError(
                f"{self._folder}: has no volume {name}. To fix: denoise every volume of `assess --export`, made with "
                "the same options, and keep the names"
            )
        series = volume_series(read_header(path), name)
        if series.shape != shape:
            raise InputError(f"{path}: its size is {list(series.shape)}, that of the scan {list(shape)}")
        return series.read_values()


class ScanWriter(Arm):
    """Restores nothing, but writes every scan as a volume when all its realisations have come.

    Args:
        folder: gets `<scan>.nii.gz`, int16 HU, one slice per realisation.
        spacing: mm between rows and columns.
    """

    def __init__(self, folder: Path, spacing: tuple[float, float]) -> None:
        super().__init__("export", lambda images: images)
        self._folder, self.spacing = folder, spacing
        self._waiting: dict[str, list[np.ndarray]] = {}
        self.written = 0

    def __call__(self, images: Tensor, scan: Scan) -> Tensor:
        """Keep images [N, H, W]; write the scan if these were its last."""
        import SimpleITK as sitk  # noqa: N813

        parts = self._waiting.setdefault(scan.name, [])
        parts.append(images.round().clamp(-32768, 32767).short().numpy())
        if scan.first + len(images) == scan.realisations:
            volume = sitk.GetImageFromArray(np.concatenate(self._waiting.pop(scan.name)))
            volume.SetSpacing((self.spacing[1], self.spacing[0], 1.0))
            sitk.WriteImage(volume, str(self._folder / f"{scan.name}.nii.gz"), useCompression=True)
            self.written += 1
        return images
