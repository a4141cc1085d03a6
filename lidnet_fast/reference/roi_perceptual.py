"""ROI perceptual loss: features compared inside boxes only (Chen et al., LIDnet, arXiv:2104.08845)."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .roi_align import roi_align

CHARBONNIER_EPS = 1e-3


def _squared(difference: Tensor) -> Tensor:
    return difference.square()


def _absolute(difference: Tensor) -> Tensor:
    return difference.abs()


def _smooth_l1(difference: Tensor) -> Tensor:
    return F.smooth_l1_loss(difference, torch.zeros_like(difference), reduction="none", beta=1.0)


def _charbonnier(difference: Tensor) -> Tensor:
    return (difference.square() + CHARBONNIER_EPS**2).sqrt()


CRITERIA = {"mse": _squared, "l1": _absolute, "smooth_l1": _smooth_l1, "charbonnier": _charbonnier}


def box_losses(
    input: Tensor,
    target: Tensor,
    rois: Tensor,
    output_size: Sequence[int],
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
    criterion: str,
) -> Tensor:
    """l_k, the mean of the criterion over the pooled differences of box k: Tensor[K] in the dtype of `rois`.

    Args:
        input: Features [N, C, H, W] or [N, C, D, H, W].
        target: As `input`; requires no gradient.
        rois: [K, 5], (batch index, x1, y1, x2, y2), or [K, 7], (batch index, x1, y1, z1, x2, y2, z2), in the dtype of
            the arithmetic.
        output_size: Rows and columns, or depth, rows and columns of bins.
        spatial_scale: Feature cells per unit of the boxes' coordinates.
        sampling_ratio: Samples per bin and axis; -1 or 0: ceil(bin size).
        aligned: Whether coordinates are shifted by half a cell (pixel-edge coordinates).
        criterion: A key of `CRITERIA`.
    """
    pooled_input = roi_align(input.to(rois.dtype), rois, output_size, spatial_scale, sampling_ratio, aligned)
    pooled_target = roi_align(target.to(rois.dtype), rois, output_size, spatial_scale, sampling_ratio, aligned)
    return CRITERIA[criterion](pooled_input - pooled_target).flatten(1).mean(1)


def reduce_boxes(losses: Tensor, box_weights: Tensor | None, reduction: str) -> Tensor:
    """Weights the losses [K] of the boxes and reduces them: "none" [w_k l_k], "sum" their sum, "mean" the sum over K.

    Without boxes the sum and the mean are 0 and stay connected to the graph.
    """
    if box_weights is not None:
        losses = losses * box_weights
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    return losses.sum() / max(losses.shape[0], 1)


def roi_perceptual_loss(
    input: Tensor,
    target: Tensor,
    rois: Tensor,
    output_size: Sequence[int],
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
    *,
    criterion: str,
    box_weights: Tensor | None,
    reduction: str,
) -> Tensor:
    """The definition behind `lidnet_fast.functional.roi_perceptual_loss`: pool both, compare, reduce.

    Args:
        input: Features [N, C, H, W] or [N, C, D, H, W].
        target: As `input`; requires no gradient.
        rois: [K, 5], (batch index, x1, y1, x2, y2), or [K, 7], (batch index, x1, y1, z1, x2, y2, z2), in the dtype of
            the arithmetic and of the result.
        output_size: Rows and columns, or depth, rows and columns of bins.
        spatial_scale: Feature cells per unit of the boxes' coordinates.
        sampling_ratio: Samples per bin and axis; -1 or 0: ceil(bin size).
        aligned: Whether coordinates are shifted by half a cell (pixel-edge coordinates).
        criterion: "mse", "l1", "smooth_l1" (beta 1) or "charbonnier" (eps 1e-3).
        box_weights: [K] in the dtype of `rois`, or None for ones.
        reduction: "none", "sum" or "mean".
    """
    losses = box_losses(input, target, rois, output_size, spatial_scale, sampling_ratio, aligned, criterion)
    return reduce_boxes(losses, box_weights, reduction)
