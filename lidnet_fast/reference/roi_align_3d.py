"""RoIAlign on volumes: torchvision's rule (He et al., Mask R-CNN, arXiv:1703.06870, section 3) on a third axis.

RoIAlign is linear and separable: a box's bins are its cells times one small matrix of weights per axis.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def axis_weights(start: Tensor, side: Tensor, bins: int, cells: int, sampling_ratio: int) -> Tensor:
    """How much each cell along one axis counts in each bin: Tensor[bins, cells].

    A bin is the mean of S samples, evenly spaced in it. A sample at position p takes the tent max(0, 1 - |x - p|) of
    cell x: linear interpolation between its two neighbours. Up to one cell outside it reads the border's cell, beyond
    that nothing.

    Args:
        start: Where the box starts, in cells; a scalar.
        side: The box's extent, in cells; a scalar.
        bins: Number of bins that divide it.
        cells: Number of cells along the axis.
        sampling_ratio: S; -1 or 0: ceil(side / bins).
    """
    width = side / bins
    samples = sampling_ratio if sampling_ratio > 0 else int(width.ceil())
    bin_starts = start + torch.arange(bins, device=start.device, dtype=start.dtype) * width
    offsets = (torch.arange(samples, device=start.device, dtype=start.dtype) + 0.5) * width / max(samples, 1)
    positions = (bin_starts[:, None] + offsets)[:, :, None]
    read = (positions >= -1) & (positions <= cells)
    distances = torch.arange(cells, device=start.device, dtype=start.dtype) - positions.clamp(0, cells - 1)
    return ((1 - distances.abs()).clamp(min=0) * read).sum(1) / max(samples, 1)


def roi_align_3d(
    input: Tensor,
    rois: Tensor,
    output_size: Sequence[int],
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """The boxes' bins, [K, C, *output_size]; differentiable in `input`.

    Which cells a box reads is looked up in `rois`: an accelerator is synchronised, and torch.compile breaks its graph.

    Args:
        input: [N, C, D, H, W] features.
        rois: [K, 7], (batch index, x1, y1, z1, x2, y2, z2), in the dtype of `input`.
        output_size: Depth, rows and columns of bins.
        spatial_scale: Feature cells per unit of the boxes' coordinates.
        sampling_ratio: Samples per bin and axis; -1 or 0: ceil(bin size).
        aligned: Whether coordinates are shifted by half a cell (pixel-edge coordinates); without, sides are at least
            one cell.
    """
    shift = 0.5 if aligned else 0.0
    starts = rois[:, [3, 2, 1]] * spatial_scale - shift
    sides = rois[:, [6, 5, 4]] * spatial_scale - shift - starts
    if not aligned:
        sides = sides.clamp(min=1)
    _, channels, depth, height, width = input.shape
    weights, cells = [], []
    for index, start, side in zip(rois[:, 0].int().tolist(), starts, sides, strict=True):
        axes = zip(start, side, output_size, (depth, height, width), strict=True)
        matrices = [axis_weights(*axis, sampling_ratio) for axis in axes]
        # Cells without a weight are left out, or they would count where they are infinite or NaN: 0 * inf is NaN.
        z, y, x = (matrix.any(0).nonzero().flatten() for matrix in matrices)
        weights.append([matrix[:, read] for matrix, read in zip(matrices, (z, y, x), strict=True)])
        cells.append(((index * depth + z[:, None, None]) * height + y[:, None]) * width + x)

    # One gather for all boxes: the gradient of each is as large as the input. Both lists start with an empty tensor, so
    # that without boxes there is a result as well, and a graph.
    numbers = torch.cat([rois.new_empty(0, dtype=torch.int64), *(of_box.flatten() for of_box in cells)])
    values = input.movedim(1, -1).flatten(0, 3).index_select(0, numbers)
    pooled = [values[:0, :, None, None, None].expand(-1, -1, *output_size)]
    patches = values.split([of_box.numel() for of_box in cells])
    for (a_z, a_y, a_x), of_box, patch in zip(weights, cells, patches, strict=True):
        patch = patch.view(*of_box.shape, channels)
        pooled.append(torch.einsum("dhwc,zd,yh,xw->czyx", patch, a_z, a_y, a_x)[None])
    return torch.cat(pooled)
