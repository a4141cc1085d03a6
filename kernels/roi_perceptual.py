"""Triton kernels of the ROI perceptual losses: images and volumes, one level or a pyramid, each kernel in one launch.

No atomics, so the same bits every time; nothing is read back to the host, so they can be captured in a CUDA graph.
`_difference_kernel`, a program per (box, block of channels), is RoIAlign of input - target, which is linear. It sums
the criterion and, where the backward will come, keeps its slope per bin in a buffer [boxes, bins, channels], from which
the kernels of `roi_gather` make the features' gradient. Batch indices are clamped into the batch.
"""

import itertools
import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lidnet_fast._constants import CHARBONNIER_EPS
from lidnet_fast._tensors import empty_maps, empty_slopes

from .devices import on_device
from .roi_gather import gather_kernel, list_kernel, weights_kernel
from .roi_sampling import Boxes, Level, Pooling, axis_bins, image_number, sample_corners, sample_count

_EPS_SQUARED = tl.constexpr(CHARBONNIER_EPS**2)
_LISTED_BOXES = 128
_TILE, _GATHERED_CHANNELS = (4, 8), 16  # of a program of gather_kernel
_CELLS = 128  # whose weights are computed at once
# Left alone, ptxas spills a few registers for the sake of occupancy, in loops that wait for memory anyway.
_COMPILER = {} if torch.version.hip else {"maxnreg": 128}


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
    *,
    slopes: Tensor | None = None,
) -> Tensor:
    """In the dtype of `rois`. Arguments as in the op's schema in `lidnet_fast.ops`; `slopes` are written if given."""
    boxes = Boxes(rois.contiguous(), box_levels, rois.shape[0], inputs[0].shape[0])
    if boxes.count == 0:
        return rois.new_empty(0) if reduction == "none" else rois.new_zeros(())
    pooling = _pooling(spatial_scales, output_size, sampling_ratio, aligned)
    levels = _levels(inputs)
    # Lanes run along what is adjacent in memory: channels where they come last, else the bins of a row.
    channels_last = all(x.stride(1) == 1 and x.shape[1] > 1 for x in inputs)
    block, blocks = _channel_blocks(levels, 64 if channels_last else 16)
    partial = rois.new_empty(boxes.count, blocks)
    with on_device(partial):
        _difference_kernel[(boxes.count * blocks,)](
            levels,
            _levels(targets),
            boxes,
            box_weights,
            partial,
            slopes,
            blocks,
            0 if slopes is None else slopes.shape[1],
            POOLING=pooling,
            CRITERION=criterion,
            REDUCTION=reduction,
            BLOCK_C=block,
            BLOCK_X=triton.next_power_of_2(pooling.bins[2]),
            **_COMPILER,
        )
    return partial.sum(1) if reduction == "none" else partial.sum()


def roi_perceptual_loss_and_slopes(
    inputs: Sequence[Tensor], targets: Sequence[Tensor], rois: Tensor, *options: Any
) -> tuple[Tensor, Tensor]:
    """The same, and the slopes [boxes, channels, bins], whose channels are adjacent in memory."""
    slopes = empty_slopes(inputs, rois, options[2], on_gpu=True)
    return roi_perceptual_loss(inputs, targets, rois, *options, slopes=slopes), slopes


def roi_perceptual_loss_backward(
    grad_loss: Tensor,
    slopes: Tensor,
    rois: Tensor,
    box_levels: Tensor | None,
    spatial_scales: Sequence[float],
    output_size: Sequence[int],
    sampling_ratio: int,
    aligned: bool,
    box_weights: Tensor | None,
    reduction: str,
    shapes: Sequence[int],
    channels_last: Sequence[bool],
    dtype: torch.dtype,
) -> list[Tensor]:
    """The gradient of the loss, or of sum(grad_loss * losses), in the inputs of these shapes, dtype and layouts."""
    gradients = empty_maps(slopes, shapes, channels_last, dtype)
    boxes = Boxes(rois.contiguous(), box_levels, rois.shape[0], shapes[0])
    if boxes.count == 0 or boxes.images == 0:
        return [gradient.zero_() for gradient in gradients]
    slopes = slopes.movedim(1, -1).contiguous()
    pooling = _pooling(spatial_scales, output_size, sampling_ratio, aligned)
    levels, tiles = _levels(gradients), (1, *_TILE)
    block, blocks = _channel_blocks(levels, _GATHERED_CHANNELS)
    # Whole tiles along z, y and x, of the largest map on each axis.
    extent = tuple(
        max(triton.cdiv(level.size[axis], tile) for level in levels) * tile for axis, tile in enumerate(tiles)
    )
    ends = tuple(
        itertools.accumulate(
            boxes.images * math.prod(triton.cdiv(side, tile) for side, tile in zip(level.size, tiles, strict=True))
            for level in levels
        )
    )
    weights = slopes.new_empty(boxes.count, sum(map(operator.mul, pooling.bins, extent)))
    reached = weights.new_empty(boxes.count, sum(map(operator.floordiv, extent, tiles)), dtype=torch.int32)
    lists, counts = reached.new_empty(ends[-1], boxes.count), reached.new_empty(ends[-1])
    shared = {"POOLING": pooling, "EXTENT": extent, "TILE_Y": tiles[1], "TILE_X": tiles[2]}
    with on_device(slopes):
        weights_kernel[(boxes.count,)](
            levels,
            boxes,
            grad_loss.contiguous(),
            box_weights,
            weights,
            reached,
            REDUCTION=reduction,
            BLOCK=_CELLS,
            **shared,
        )
        list_kernel[(ends[-1],)](levels, boxes, reached, lists, counts, ends, BLOCK_K=_LISTED_BOXES, **shared)
        gather_kernel[(ends[-1] * blocks,)](
            levels,
            slopes,
            weights,
            reached,
            boxes,
            lists,
            counts,
            ends,
            slopes.shape[-1],
            BLOCK_C=block,
            num_warps=_TILE[0] * _TILE[1] // 32,  # a thread per cell
            **shared,
            **_COMPILER,
        )
    return gradients


def _pooling(
    spatial_scales: Sequence[float], output_size: Sequence[int], sampling_ratio: int, aligned: bool
) -> Pooling:
    volumes = len(output_size) == 3
    bins = tuple(output_size) if volumes else (1, *output_size)
    return Pooling(tuple(float(scale) for scale in spatial_scales), bins, max(sampling_ratio, 0), aligned, volumes)


def _channel_blocks(levels: Sequence[Level], most: int) -> tuple[int, int]:
    """Channels of a block, and how many blocks the level with most channels has."""
    channels = max(level.channels for level in levels)
    block = min(triton.next_power_of_2(channels), most)
    return block, triton.cdiv(channels, block)


def _levels(maps: Sequence[Tensor]) -> tuple[Level, ...]:
    levels = []
    for x in maps:
        stride, size = tuple(x.stride()), tuple(x.shape[2:])
        if x.ndim == 4:
            stride, size = (*stride[:2], 0, *stride[2:]), (1, *size)
        levels.append(Level(x, stride, size, x.shape[1]))
    return tuple(levels)


@triton.jit
def _load_difference(input, target, offsets, target_offsets, mask, dtype: tl.constexpr):
    a = tl.load(input + offsets, mask=mask, other=0.0).to(dtype)
    b = tl.load(target + target_offsets, mask=mask, other=0.0).to(dtype)
    return a - b


@triton.jit
def _box_difference(
    input,
    target,
    boxes,
    box_weights,
    partial,
    slopes,
    box,
    block,
    channel_blocks,
    slope_channels,
    number: tl.constexpr,
    POOLING: tl.constexpr,
    CRITERION: tl.constexpr,
    REDUCTION: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    rois, size, channels = boxes.rois, input.size, input.channels
    stride, target_stride = input.stride, target.stride
    dtype: tl.constexpr = rois.dtype.element_ty
    axes: tl.constexpr = 3 if POOLING.volumes else 2
    bins: tl.constexpr = POOLING.bins
    image = image_number(tl.load(rois + box * (1 + 2 * axes)), boxes.images).to(tl.int64)
    start_x, bin_x = axis_bins(rois, box, 0, number, POOLING)
    start_y, bin_y = axis_bins(rois, box, 1, number, POOLING)
    samples_x, samples_y = sample_count(bin_x, POOLING), sample_count(bin_y, POOLING)
    if POOLING.volumes:
        start_z, bin_z = axis_bins(rois, box, 2, number, POOLING)
        samples_z = sample_count(bin_z, POOLING)
    else:
        start_z, bin_z, samples_z = start_x * 0.0, bin_x * 0.0, 1
    count = tl.maximum(samples_x * samples_y * samples_z, 1)

    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    x = tl.arange(0, BLOCK_X)
    mask = (c < channels)[:, None] & (x < bins[2])[None, :]
    base = image * stride[0] + (c.to(tl.int64) * stride[1])[:, None]
    target_base = image * target_stride[0] + (c.to(tl.int64) * target_stride[1])[:, None]
    # In `dtype`: a plain 1.0 over a number would be float32.
    factor = tl.full((), 1.0, dtype) / (channels * bins[0] * bins[1] * bins[2])
    if box_weights is not None:
        factor *= tl.load(box_weights + box)
    if REDUCTION == "mean":
        factor /= boxes.count
    total = tl.zeros((BLOCK_C, BLOCK_X), dtype)

    for z in range(bins[0]):
        for y in range(bins[1]):
            pooled = tl.zeros((BLOCK_C, BLOCK_X), dtype)
            for sample_z in range(samples_z):
                z0, z1, wz0, wz1 = sample_corners(start_z, bin_z, z, sample_z, samples_z, size[0])
                for sample_y in range(samples_y):
                    y0, y1, wy0, wy1 = sample_corners(start_y, bin_y, y, sample_y, samples_y, size[1])
                    for sample_x in range(samples_x):
                        x0, x1, wx0, wx1 = sample_corners(start_x, bin_x, x, sample_x, samples_x, size[2])
                        for corner in tl.static_range(8 if POOLING.volumes else 4):
                            at_x = (x1 if corner % 2 else x0).to(tl.int64)
                            at_y = (y1 if corner // 2 % 2 else y0).to(tl.int64)
                            weight = (wx1 if corner % 2 else wx0) * (wy1 if corner // 2 % 2 else wy0)
                            at = (at_x * stride[4] + at_y * stride[3])[None, :]
                            target_at = (at_x * target_stride[4] + at_y * target_stride[3])[None, :]
                            if POOLING.volumes:
                                at_z = (z1 if corner // 4 else z0).to(tl.int64)
                                weight *= wz1 if corner // 4 else wz0
                                at += at_z * stride[2]
                                target_at += at_z * target_stride[2]
                            read = mask & (weight != 0.0)[None, :]
                            pooled += weight[None, :] * _load_difference(
                                input.maps, target.maps, base + at, target_base + target_at, read, dtype
                            )
            d = pooled / count
            if CRITERION == "mse":
                value = d * d
            elif CRITERION == "l1":
                value = tl.abs(d)
            elif CRITERION == "smooth_l1":
                value = tl.where(tl.abs(d) < 1.0, 0.5 * d * d, tl.abs(d) - 0.5)
            else:
                value = tl.sqrt(d * d + _EPS_SQUARED)
            total += tl.where(mask, value, 0.0)
            if slopes is not None:
                if CRITERION == "mse":
                    slope = 2.0 * d
                elif CRITERION == "l1":
                    slope = tl.where(d > 0.0, 1.0, tl.where(d < 0.0, -1.0, d))
                elif CRITERION == "smooth_l1":
                    slope = tl.where(d > 1.0, 1.0, tl.where(d < -1.0, -1.0, d))
                else:
                    slope = d / tl.sqrt(d * d + _EPS_SQUARED)
                bin = (z * bins[1] + y) * bins[2] + x
                row = box.to(tl.int64) * (bins[0] * bins[1] * bins[2]) + bin
                # In channels that there aren't, too, as far as they are read: 0.
                place = (row * slope_channels)[None, :] + c[:, None]
                tl.store(slopes + place, slope, mask=(c < slope_channels)[:, None] & (x < bins[2])[None, :])
    tl.store(partial + box * channel_blocks + block, tl.sum(total) * factor)


@triton.jit
def _difference_kernel(
    inputs,
    targets,
    boxes,
    box_weights,
    partial,
    slopes,
    channel_blocks,
    slope_channels,
    POOLING: tl.constexpr,
    CRITERION: tl.constexpr,
    REDUCTION: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    box, block = tl.program_id(0) // channel_blocks, tl.program_id(0) % channel_blocks
    level = 0
    if boxes.levels is not None:
        level = tl.load(boxes.levels + box).to(tl.int32)
    for number in tl.static_range(len(POOLING.scales)):
        if level == number:
            _box_difference(
                inputs[number],
                targets[number],
                boxes,
                box_weights,
                partial,
                slopes,
                box,
                block,
                channel_blocks,
                slope_channels,
                number,
                POOLING,
                CRITERION,
                REDUCTION,
                BLOCK_C,
                BLOCK_X,
            )
