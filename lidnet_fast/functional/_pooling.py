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


def pool_pyramid(
    inputs: Sequence[Tensor],
    rois: Tensor,
    image_height: int,
    output_size: tuple[int, ...],
    sampling_ratio: int,
    aligned: bool,
    canonical_scale: float,
    canonical_level: int,
) -> Pooling:
    """Each box on the level that suits its size.

    Args:
        inputs: Levels [N, C_l, H_l, W_l], finest first, each of twice the stride of the one before.
        rois: [K, 5], (batch index, x1, y1, x2, y2).
        image_height: Height of the (padded) images that the boxes' coordinates refer to.
        output_size: As in `Pooling`.
        sampling_ratio: As in `Pooling`.
        aligned: As in `Pooling`.
        canonical_scale: s0 of `assign_levels`.
        canonical_level: k0 of `assign_levels`.
    """
    scales = [level_scale(level, image_height) for level in inputs]
    finest, coarsest = (-round(math.log2(scale)) for scale in (scales[0], scales[-1]))
    levels = assign_levels(rois, finest, coarsest, canonical_scale, canonical_level)
    return Pooling(levels, scales, output_size, sampling_ratio, aligned)


def level_scale(level: Tensor, image_height: int) -> float:
    """Cells per pixel of a level: the nearest power of two, from the heights, as torchvision infers it."""
    return 2.0 ** round(math.log2(level.shape[2] / image_height))


def assign_levels(
    rois: Tensor, k_min: int, k_max: int, canonical_scale: float, canonical_level: int, eps: float = 1e-6
) -> Tensor:
    """The level of each box, counted from the finest: int64 Tensor[K] in [0, k_max - k_min].

    k = floor(k0 + log2(sqrt(w h) / s0)), clamped to the levels there are (Lin et al., Feature Pyramid Networks,
    arXiv:1612.03144, eq. 1, with torchvision's eps inside the floor).

    Args:
        rois: [K, 5], (batch index, x1, y1, x2, y2).
        k_min: log2 of the finest level's stride.
        k_max: log2 of the coarsest level's stride.
        canonical_scale: s0, the side of the square that belongs to `canonical_level`.
        canonical_level: k0.
        eps: Keeps a square of just the canonical side on its level in spite of rounding.
    """
    side = ((rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2])).sqrt()
    level = torch.floor(canonical_level + torch.log2(side / canonical_scale) + eps)
    return level.clamp(k_min, k_max).to(torch.int64) - k_min


def reduce_boxes(losses: Tensor, box_weights: Tensor | None, reduction: str, counted: Tensor | None = None) -> Tensor:
    """Weights the losses [K] of the boxes and reduces them: "none" [w_k l_k], "sum" their sum, "mean" the sum over K.

    Boxes that aren't `counted`, bool [K], have a loss of 0 and no part in K. Without boxes the sum and the mean are 0
    and stay connected to the graph.
    """
    if counted is not None:
        losses = torch.where(counted, losses, 0)
    if box_weights is not None:
        losses = losses * box_weights
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    return losses.sum() / (max(losses.shape[0], 1) if counted is None else counted.sum().clamp(min=1))
