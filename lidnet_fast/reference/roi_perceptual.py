"""ROI perceptual loss: features compared inside boxes only (Chen et al., LIDnet, arXiv:2104.08845)."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lidnet_fast._constants import CHARBONNIER_EPS
from lidnet_fast._tensors import reduce_boxes

from .roi_align import roi_align


def _squared(difference: Tensor) -> Tensor:
    return difference.square()


def _absolute(difference: Tensor) -> Tensor:
    return difference.abs()


def _smooth_l1(difference: Tensor) -> Tensor:
    return F.smooth_l1_loss(difference, torch.zeros_like(difference), reduction="none", beta=1.0)


def _charbonnier(difference: Tensor) -> Tensor:
    return (difference.square() + CHARBONNIER_EPS**2).sqrt()


CRITERIA = {"mse": _squared, "l1": _absolute, "smooth_l1": _smooth_l1, "charbonnier": _charbonnier}


def roi_perceptual_loss(
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    rois: Tensor,
    box_levels: Tensor | None,
    spatial_scales: Sequence[float],
    output_size: Sequence[int],
    sampling_ratio: int,
    aligned: bool,
    criterion: str,
    box_weights: Tensor | None = None,
    reduction: str = "none",
) -> Tensor:
    """The definition behind `lidnet_fast.functional.roi_perceptual_loss`: pool both on the box's level and compare.

    Args:
        inputs: Features [N, C_l, H_l, W_l] or [N, C_l, D_l, H_l, W_l] of each level.
        targets: As `inputs`; require no gradient.
        rois: As in `roi_align`, like the five that follow.
        box_levels: Level of each box.
        spatial_scales: Of each level.
        output_size: Bins along each axis.
        sampling_ratio: Samples per bin and axis.
        aligned: Whether boxes are in pixel-edge coordinates.
        criterion: A key of `CRITERIA`.
        box_weights: w, Tensor[K] in the dtype of `rois`, or None for ones.
        reduction: As in `reduce_boxes`, like the result.

    Returns:
        Of l_k, the mean of the criterion over the pooled differences of box k: [w_k l_k], their sum, or that over K;
        in the dtype of `rois`.
    """
    losses = rois.new_zeros(rois.shape[0])
    for number, (input, target, scale) in enumerate(zip(inputs, targets, spatial_scales, strict=True)):
        index = None if box_levels is None else (box_levels == number).nonzero().squeeze(1)
        options = (rois if index is None else rois[index], None, [scale], output_size, sampling_ratio, aligned)
        pooled_input, pooled_target = (roi_align([maps.to(rois.dtype)], *options) for maps in (input, target))
        of_level = CRITERIA[criterion](pooled_input - pooled_target).flatten(1).mean(1)
        losses = of_level if index is None else losses.index_copy(0, index, of_level)
    return reduce_boxes(losses, box_weights, reduction)
