"""RoIAlign: torchvision's, on volumes ours, on one feature map and on a pyramid."""

from collections.abc import Sequence

from torch import Tensor
from torchvision.ops import roi_align as roi_align_2d

from .pyramid import assign_levels, pyramid_exponents
from .roi_align_3d import roi_align_3d


def roi_align(
    input: Tensor,
    rois: Tensor,
    output_size: Sequence[int],
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """The definition behind `lidnet_fast.functional.roi_align`: [K, C, *output_size] in the dtype of `input`.

    Args:
        input: Features [N, C, H, W] or [N, C, D, H, W].
        rois: [K, 5], (batch index, x1, y1, x2, y2), or [K, 7], (batch index, x1, y1, z1, x2, y2, z2), in the dtype of
            the arithmetic.
        output_size: Rows and columns, or depth, rows and columns of bins.
        spatial_scale: Feature cells per unit of the boxes' coordinates.
        sampling_ratio: Samples per bin and axis; -1 or 0: ceil(bin size).
        aligned: Whether coordinates are shifted by half a cell (pixel-edge coordinates).
    """
    pool = roi_align_2d if input.ndim == 4 else roi_align_3d
    return pool(input.to(rois.dtype), rois, output_size, spatial_scale, sampling_ratio, aligned).to(input.dtype)


def multiscale_roi_align(
    inputs: Sequence[Tensor],
    rois: Tensor,
    image_height: int,
    output_size: tuple[int, int],
    sampling_ratio: int,
    *,
    canonical_scale: float,
    canonical_level: int,
) -> Tensor:
    """The definition behind `lidnet_fast.functional.multiscale_roi_align`: one RoIAlign per level.

    Args:
        inputs: Levels [N, C, H_l, W_l], finest first, each of twice the stride of the one before.
        rois: [K, 5], (batch index, x1, y1, x2, y2), in the dtype of the arithmetic.
        image_height: Height of the (padded) images that the boxes' coordinates refer to.
        output_size: Rows and columns of bins.
        sampling_ratio: Samples per bin and axis; -1 or 0: ceil(bin size).
        canonical_scale: s0 of `assign_levels`.
        canonical_level: k0 of `assign_levels`.
    """
    exponents = pyramid_exponents([level.shape[2] for level in inputs], image_height)
    levels = assign_levels(rois, exponents[0], exponents[-1], canonical_scale, canonical_level)
    pooled = inputs[0].new_zeros(rois.shape[0], inputs[0].shape[1], *output_size)
    for number, (input, exponent) in enumerate(zip(inputs, exponents, strict=True)):
        index = (levels == number).nonzero().squeeze(1)
        of_level = roi_align(input, rois[index], output_size, 2.0**-exponent, sampling_ratio, False)
        pooled = pooled.index_copy(0, index, of_level)
    return pooled
