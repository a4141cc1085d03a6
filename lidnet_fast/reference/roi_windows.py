"""Windows cut out of images."""

from collections.abc import Sequence

import torch
from torch import Tensor


def roi_windows(images: Tensor, corners: Tensor, size: Sequence[int]) -> Tensor:
    """Windows [K, C, *size] of images [N, C, H, W], or [N, C, D, H, W].

    Args:
        images: The images.
        corners: int64 [K, 3] (image, first row, first column), or [K, 4] (image, first slice, row, column).
        size: Rows and columns, or slices, rows and columns.
    """
    windows = [
        images[(image, slice(None), *(slice(first, first + length) for first, length in zip(place, size, strict=True)))]
        for image, *place in corners.tolist()
    ]
    return torch.stack(windows) if windows else images[:0, :, *(slice(0, length) for length in size)]
