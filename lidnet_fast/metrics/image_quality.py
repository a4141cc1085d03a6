"""How close images come to the normal-dose reference: over the whole image and inside lesion boxes.

Conventions, the same for every number:

- Images and references are HU. PSNR, SSIM and RMSE are taken after windowing and clamping both to [0, 1], so the data
  range is 1 and what lies beyond the window doesn't count.
- PSNR is -10 log10 of an image's mean square error, averaged over images in dB. Errors below 1e-10 count as 1e-10, so
  that a perfect image scores 100 dB and averages stay finite.
- SSIM is Wang et al. 2004 with an 11x11 Gaussian of sigma 1.5, K1 0.01, K2 0.03 (torchmetrics); an image's value is the
  mean over the positions where the whole Gaussian fits, as in pytorch-msssim.
- RMSE is in HU (windowed error times the window's width), averaged over images.
- A lesion's region is its box grown by 2 pixels on each side, rounded outwards to whole pixels and cut at the edge of
  the image. Lesion values are computed per lesion and averaged over all lesions, not over images. PSNR and RMSE are
  from the region's mean square error. SSIM is the mean over the region of the image's SSIM map, which is continued to
  the edge by reflection.
- The lesion bias is the mean of image minus reference in HU inside the box itself (rounded outwards, not grown),
  without clamping: negative where lesions were smoothed into darker surroundings.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from lidnet_fast.models.windowing import HUWindow

GROW = 2.0
MIN_MSE = 1e-10
_SSIM_WINDOW = 11
_SSIM_MARGIN = _SSIM_WINDOW // 2


@dataclass(frozen=True)
class LesionQuality:
    """Quality inside one lesion; the module's docstring defines each value."""

    psnr: float
    ssim: float
    rmse_hu: float
    bias_hu: float


@dataclass(frozen=True)
class ImageScores:
    """Quality of one image; the module's docstring defines each value."""

    psnr: float
    ssim: float
    rmse_hu: float
    lesions: tuple[LesionQuality, ...]


@torch.no_grad()
def image_quality(images: Tensor, references: Tensor, window: HUWindow, boxes: Sequence[Tensor]) -> list[ImageScores]:
    """Score images one by one.

    Args:
        images: [N, 1, H, W], HU; H and W at least 11.
        references: the normal-dose images, [N, 1, H, W], HU.
        window: the range that counts.
        boxes: per image the lesions' boxes [L, 4] (x1, y1, x2, y2) in pixels; L may be 0.

    Returns:
        One entry per image, its lesions in the order of the boxes.

    Raises:
        ValueError: shapes that don't fit, or a box that isn't within the image.
    """
    _check(images, references, boxes)
    image, reference = images.float(), references.float()
    x, y = window.clamp(window.scale(image)), window.clamp(window.scale(reference))
    square = (x - y).square()
    mse = square.mean(dim=(1, 2, 3), dtype=torch.float64).tolist()
    _, ssim_map = structural_similarity_index_measure(
        x, y, kernel_size=_SSIM_WINDOW, data_range=1.0, reduction="none", return_full_image=True
    )
    # torchmetrics' own mean includes the reflected borders, which the usual definition leaves out.
    inner = ssim_map[..., _SSIM_MARGIN:-_SSIM_MARGIN, _SSIM_MARGIN:-_SSIM_MARGIN]
    ssim = inner.mean(dim=(1, 2, 3), dtype=torch.float64).tolist()
    difference = image - reference
    return [
        ImageScores(
            psnr=_psnr(mse[i]),
            ssim=ssim[i],
            rmse_hu=math.sqrt(mse[i]) * window.width,
            lesions=tuple(
                LesionQuality(
                    psnr=_psnr(_mean(square[i, 0], box, GROW)),
                    rmse_hu=math.sqrt(_mean(square[i, 0], box, GROW)) * window.width,
                    ssim=_mean(ssim_map[i, 0], box, GROW),
                    bias_hu=_mean(difference[i, 0], box, 0.0),
                )
                for box in boxes[i].tolist()
            ),
        )
        for i in range(len(images))
    ]


class ImageQuality:
    """Averages of `image_quality` over a test set.

    Args:
        window: the range that counts.
    """

    def __init__(self, window: HUWindow) -> None:
        self.window = window
        self.scores: list[ImageScores] = []

    @property
    def count(self) -> int:
        """Number of images so far."""
        return len(self.scores)

    def reset(self) -> None:
        """Forget all images."""
        self.scores = []

    def update(self, images: Tensor, references: Tensor, boxes: Sequence[Tensor]) -> None:
        """Add a batch; the arguments are those of `image_quality`."""
        self.scores += image_quality(images, references, self.window, boxes)

    def compute(self) -> dict[str, float | None]:
        """The averages: psnr (dB), ssim, rmse_hu, lesion_psnr (dB), lesion_ssim, lesion_rmse_hu,
        lesion_bias_hu.

        Lesion values are None without a lesion.

        Raises:
            ValueError: there was no image.
        """
        if not self.scores:
            raise ValueError("image quality of no images: call update() before compute()")
        lesions = [lesion for image in self.scores for lesion in image.lesions]
        return {
            "psnr": _average([image.psnr for image in self.scores]),
            "ssim": _average([image.ssim for image in self.scores]),
            "rmse_hu": _average([image.rmse_hu for image in self.scores]),
            "lesion_psnr": _average([lesion.psnr for lesion in lesions]),
            "lesion_ssim": _average([lesion.ssim for lesion in lesions]),
            "lesion_rmse_hu": _average([lesion.rmse_hu for lesion in lesions]),
            "lesion_bias_hu": _average([lesion.bias_hu for lesion in lesions]),
        }


def _check(images: Tensor, references: Tensor, boxes: Sequence[Tensor]) -> None:
    if images.dim() != 4 or images.shape[1] != 1:
        raise ValueError(f"images must have shape [N, 1, H, W], got {list(images.shape)}")
    if references.shape != images.shape:
        raise ValueError(f"references must have the images' shape {list(images.shape)}, got {list(references.shape)}")
    height, width = images.shape[-2:]
    if min(height, width) < _SSIM_WINDOW:
        raise ValueError(f"images must be at least {_SSIM_WINDOW} pixels wide and high for SSIM, got {height}x{width}")
    if len(boxes) != len(images):
        raise ValueError(f"boxes must have one tensor per image: got {len(boxes)} for {len(images)} images")
    for index, one in enumerate(boxes):
        for row, (x1, y1, x2, y2) in enumerate(one.tolist()):
            if not (0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height):
                raise ValueError(f"boxes[{index}][{row}] isn't within {width}x{height} pixels: {[x1, y1, x2, y2]}")


def _mean(values: Tensor, box: Sequence[float], grow: float) -> float:
    """Mean of [H, W] values over the pixels that the grown box touches."""
    height, width = values.shape
    x1, y1 = max(math.floor(box[0] - grow), 0), max(math.floor(box[1] - grow), 0)
    x2, y2 = min(math.ceil(box[2] + grow), width), min(math.ceil(box[3] + grow), height)
    return float(values[y1:y2, x1:x2].mean(dtype=torch.float64))


def _psnr(mse: float) -> float:
    return -10 * math.log10(max(mse, MIN_MSE))


def _average(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None
