"""ROI perceptual loss over a feature pyramid: each box is compared on the one level that suits its size."""

from collections.abc import Sequence

from torch import Tensor

from .pyramid import assign_levels, pyramid_exponents
from .roi_perceptual import box_losses, reduce_boxes


def multiscale_roi_perceptual_loss(
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    rois: Tensor,
    image_height: int,
    output_size: tuple[int, int],
    sampling_ratio: int,
    aligned: bool,
    *,
    canonical_scale: float,
    canonical_level: int,
    criterion: str,
    box_weights: Tensor | None,
    reduction: str,
) -> Tensor:
    """The definition behind `lidnet_fast.functional.multiscale_roi_perceptual_loss`: one ROI loss per level.

    Args:
        inputs: Levels [N, C_l, H_l, W_l], finest first, each of twice the stride of the one before.
        targets: As `inputs`; require no gradient.
        rois: [K, 5], (batch index, x1, y1, x2, y2), in the dtype of the arithmetic and of the result.
        image_height: Height of the (padded) images that the boxes' coordinates refer to.
        output_size: Rows and columns of bins.
        sampling_ratio: Samples per bin and axis; -1 or 0: ceil(bin size).
        aligned: Whether coordinates are shifted by half a cell (pixel-edge coordinates).
        canonical_scale: s0 of `assign_levels`.
        canonical_level: k0 of `assign_levels`.
        criterion: "mse", "l1", "smooth_l1" (beta 1) or "charbonnier" (eps 1e-3).
        box_weights: [K] in the dtype of `rois`, or None for ones.
        reduction: "none" (in the order of the boxes), "sum" or "mean".
    """
    exponents = pyramid_exponents([level.shape[2] for level in inputs], image_height)
    levels = assign_levels(rois, exponents[0], exponents[-1], canonical_scale, canonical_level)
    losses = rois.new_zeros(rois.shape[0])
    for number, (input, target, exponent) in enumerate(zip(inputs, targets, exponents, strict=True)):
        index = (levels == number).nonzero().squeeze(1)
        of_level = box_losses(
            input, target, rois[index], output_size, 2.0**-exponent, sampling_ratio, aligned, criterion
        )
        losses = losses.index_copy(0, index, of_level)
    return reduce_boxes(losses, box_weights, reduction)
