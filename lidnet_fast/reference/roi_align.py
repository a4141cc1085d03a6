"""RoIAlign: torchvision's, on volumes ours, on one feature map or on a pyramid."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import roi_align as roi_align_2d

from lidnet_fast._tensors import in_forward_mode

from .roi_align_3d import roi_align_3d


def roi_align(
    inputs: Sequence[Tensor],
    rois: Tensor,
    box_levels: Tensor | None,
    spatial_scales: Sequence[float],
    output_size: Sequence[int],
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """The definition behind `lidnet_fast.functional.roi_align`: [K, C, *output_size] in the dtype of the inputs.

    Args:
        inputs: Features [N, C, H_l, W_l] or [N, C, D_l, H_l, W_l] of each level.
        rois: [K, 5], (batch index, x1, y1, x2, y2), or [K, 7], (batch index, x1, y1, z1, x2, y2, z2), in the dtype of
            the arithmetic.
        box_levels: int64 [K], the level that each box is pooled on; None for the only one.
        spatial_scales: Feature cells per unit of the boxes' coordinates, of each level.
        output_size: Rows and columns, or depth, rows and columns of bins.
        sampling_ratio: Samples per bin and axis; -1 or 0: ceil(bin size).
        aligned: Whether coordinates are shifted by half a cell (pixel-edge coordinates).
    """
    if box_levels is None:
        return _pool(inputs[0], rois, output_size, spatial_scales[0], sampling_ratio, aligned)
    pooled = inputs[0].new_zeros(rois.shape[0], inputs[0].shape[1], *output_size)
    for number, (input, scale) in enumerate(zip(inputs, spatial_scales, strict=True)):
        index = (box_levels == number).nonzero().squeeze(1)
        of_level = _pool(input, rois[index], output_size, scale, sampling_ratio, aligned)
        pooled = pooled.index_copy(0, index, of_level)
    return pooled


def _pool(
    input: Tensor, rois: Tensor, output_size: Sequence[int], scale: float, sampling_ratio: int, aligned: bool
) -> Tensor:
    features = input.to(rois.dtype)
    if input.ndim == 5:
        pooled = roi_align_3d(features, rois, output_size, scale, sampling_ratio, aligned)
    elif in_forward_mode() or torch._C._are_functorch_transforms_active():
        # torchvision's op has no tangents. An image is a volume of one slice, which every box holds.
        batch, x1, y1, x2, y2 = rois.unbind(1)
        in_slice = torch.stack((batch, x1, y1, torch.zeros_like(x1), x2, y2, torch.full_like(x1, 1 / scale)), 1)
        bins = (1, *output_size)
        pooled = roi_align_3d(features[:, :, None], in_slice, bins, scale, sampling_ratio, aligned)[:, :, 0]
    else:
        pooled = roi_align_2d(features, rois, output_size, scale, sampling_ratio, aligned)
    return pooled.to(input.dtype)
