"""How boxes are pooled, on one feature map or on a pyramid, and how their losses become one."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Pooling(NamedTuple):
    """What RoIAlign is told besides features and boxes: the arguments of the ops, in their order.

    Attributes:
        box_levels: int64 [K], the level that each box is pooled on, or None where there is one level.
        spatial_scales: Feature cells per pixel of the image, of each level.
        output_size: Rows and columns, or depth, rows and columns of bins.
        sampling_ratio: Samples per bin and axis; -1 or 0: ceil(bin size in cells).
        aligned: Whether coordinates are shifted by half a cell (pixel-edge coordinates).
    """

    box_levels: Tensor | None
    spatial_scales: list[float]
    output_size: tuple[int, ...]
    sampling_ratio: int
    aligned: bool


def level_scale(level: Tensor, image_height: int) -> float:
    """Cells per pixel of a level: the nearest power of two, from the heights, as torchvision infers it."""
    return 2.0 ** round(math.log2(level.shape[2] / image_height))


def level_areas(
    spatial_scales: Sequence[float], canonical_scale: float, canonical_level: int, eps: float = 1e-6
) -> list[float]:
    """The smallest area, in pixels, of a box on each level of a pyramid but the finest.

    A box w x h belongs to level k = floor(k0 + log2(sqrt(w h) / s0)), clamped to the levels there are (Lin et al.,
    Feature Pyramid Networks, arXiv:1612.03144, eq. 1, with torchvision's eps inside the floor). That is the highest k
    with w h >= (s0 2^(k - k0 - eps))^2.

    Args:
        spatial_scales: Cells per pixel of the levels, 2^-k, finest first.
        canonical_scale: s0, the side of the square that belongs to `canonical_level`.
        canonical_level: k0.
        eps: Keeps a square of just the canonical side on its level in spite of rounding.
    """
    # Beyond 2^500 the squares of sides don't fit into a float64.
    exponents = (-round(math.log2(scale)) - canonical_level - eps for scale in spatial_scales[1:])
    sides = (canonical_scale * 2.0 ** min(max(exponent, -500), 500) for exponent in exponents)
    return [side * side for side in sides]


def assign_levels(rois: Tensor, areas: Sequence[float]) -> Tensor:
    """The level of each box, counted from the finest: int64 Tensor[K] in [0, len(areas)].

    Args:
        rois: [K, 5], (batch index, x1, y1, x2, y2).
        areas: As of `level_areas`.
    """
    area = (rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2])
    level = torch.zeros_like(area, dtype=torch.int64)
    for least in areas:
        level = level + (area >= least)
    return level
