"""Triton kernels of the ROI perceptual losses: images and volumes, one level or a pyramid, each kernel in one launch.

No atomics, so the same bits every time; nothing is read back to the host, so they can be captured in a CUDA graph.
`_difference_kernel`, a program per (box, block of channels), is RoIAlign of input - target, which is linear. The
forward sums the criterion; the backward writes its derivative per bin to a buffer [boxes, bins, channels], from which
the kernels of `roi_gather` make the features' gradient. Batch indices are clamped into the batch.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .devices import on_device
from .roi_gather import gather_kernel, list_kernel
from .roi_sampling import axis_bins, image_number, sample_corners, sample_count

_CRITERIA = {"mse": 0, "l1": 1, "smooth_l1": 2, "charbonnier": 3}
_LISTED_BOXES = 128
# Left alone, ptxas spills a few registers for the sake of occupancy, in loops that wait for memory anyway.
_COMPILER = {} if torch.version.hip else {"maxnreg": 128}


def roi_perceptual_losses(
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    rois: Tensor,
    box_levels: Tensor | None,
    spatial_scales: Sequence[float],
    output_size: Sequence[int],
    sampling_ratio: int,
    aligned: bool,
    criterion: str,
) -> Tensor:
    """The loss of each box: Tensor[K] in the dtype of `rois`. Arguments as in the op's schema in `lidnet_fast.ops`."""
    call = _Call(inputs, targets, rois, box_levels, spatial_scales, output_size, sampling_ratio, aligned, criterion)
    if call.boxes == 0:
        return rois.new_empty(0)
    partial = rois.new_empty(call.boxes, call.channel_blocks)
    call.difference(partial, None)
    return partial.sum(1)


def roi_perceptual_losses_backward(
    grad_losses: Tensor,
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    rois: Tensor,
    box_levels: Tensor | None,
    spatial_scales: Sequence[float],
    output_size: Sequence[int],
    sampling_ratio: int,
    aligned: bool,
    criterion: str,
) -> list[Tensor]:
    """The gradient of sum(grad_losses * losses) in each input, in its dtype and strides."""
    call = _Call(inputs, targets, rois, box_levels, spatial_scales, output_size, sampling_ratio, aligned, criterion)
    gradients = [torch.empty_like(input) for input in inputs]
    if call.boxes == 0 or call.images == 0:
        return [gradient.zero_() for gradient in gradients]
    derivatives = rois.new_empty(call.boxes, call.bins, call.most_channels)
    call.difference(derivatives, grad_losses.contiguous())
    call.gather(derivatives, gradients)
    return gradients


def block_sizes(channels_last: bool, most_channels: int) -> dict[str, int]:
    """Tiles by layout, no tuning needed. To tune, key on (channels_last, dtype, dimensions, output_size, channels).

    Lanes run along what is adjacent in memory: channels where they come last, else cells of a row.
    """
    channels = triton.next_power_of_2(most_channels)
    if channels_last:
        return {"BLOCK_C": min(channels, 64), "TILE_Y": 4, "TILE_X": 8}
    return {"BLOCK_C": min(channels, 16), "TILE_Y": 4, "TILE_X": 32}


class _Call:
    """What the launches of one call share."""

    def __init__(
        self,
        inputs: Sequence[Tensor],
        targets: Sequence[Tensor],
        rois: Tensor,
        box_levels: Tensor | None,
        spatial_scales: Sequence[float],
        output_size: Sequence[int],
        sampling_ratio: int,
        aligned: bool,
        criterion: str,
    ) -> None:
        volumes = inputs[0].ndim == 5
        self.inputs, self.targets = tuple(inputs), tuple(targets)
        self.rois, self.box_levels = rois.contiguous(), box_levels
        self.scales = tuple(float(scale) for scale in spatial_scales)
        self.boxes, self.images = rois.shape[0], inputs[0].shape[0]
        self.sizes = tuple(tuple(x.shape[2:]) if volumes else (1, *x.shape[2:]) for x in inputs)
        self.channels = tuple(x.shape[1] for x in inputs)
        self.most_channels = max(self.channels)
        self.bins_per_axis = tuple(output_size) if volumes else (1, *output_size)
        self.bins = self.bins_per_axis[0] * self.bins_per_axis[1] * self.bins_per_axis[2]
        channels_last = all(x.stride(1) == 1 and x.shape[1] > 1 for x in inputs)
        self.blocks = block_sizes(channels_last, self.most_channels)
        self.channel_blocks = triton.cdiv(self.most_channels, self.blocks["BLOCK_C"])
        self.options = {
            "VOLUMES": volumes,
            "SAMPLES": max(sampling_ratio, 0),
            "ALIGNED": aligned,
            "BINS_Z": self.bins_per_axis[0],
            "BINS_Y": self.bins_per_axis[1],
            "BINS_X": self.bins_per_axis[2],
        }
        self.criterion = _CRITERIA[criterion]

    def difference(self, output: Tensor, grad_losses: Tensor | None) -> None:
        with on_device(self.rois):
            _difference_kernel[(self.boxes * self.channel_blocks,)](
                self.inputs,
                self.targets,
                tuple(_strides(x) for x in self.inputs),
                tuple(_strides(x) for x in self.targets),
                self.sizes,
                self.channels,
                self.rois,
                self.box_levels,
                grad_losses,
                output,
                self.images,
                self.channel_blocks,
                self.most_channels,
                LEVELS=len(self.inputs),
                SCALES=self.scales,
                CRITERION=self.criterion,
                BLOCK_C=self.blocks["BLOCK_C"],
                BLOCK_X=triton.next_power_of_2(self.bins_per_axis[2]),
                **self.options,
                **_COMPILER,
            )

    def gather(self, derivatives: Tensor, gradients: list[Tensor]) -> None:
        tile_y, tile_x = self.blocks["TILE_Y"], self.blocks["TILE_X"]
        # Tiles of rows, over all levels, images and slices; and how many tiles of columns times blocks each has.
        rows = [self.images * depth * triton.cdiv(height, tile_y) for depth, height, _ in self.sizes]
        columns = [triton.cdiv(width, tile_x) for _, _, width in self.sizes]
        row_ends = tuple(sum(rows[: level + 1]) for level in range(len(rows)))
        programs = [row * column * self.channel_blocks for row, column in zip(rows, columns, strict=True)]
        ends = tuple(sum(programs[: level + 1]) for level in range(len(rows)))
        lists = torch.empty(row_ends[-1], self.boxes, dtype=torch.int32, device=self.rois.device)
        counts = torch.empty(row_ends[-1], dtype=torch.int32, device=self.rois.device)
        with on_device(self.rois):
            list_kernel[(row_ends[-1],)](
                self.sizes,
                row_ends,
                self.rois,
                self.box_levels,
                lists,
                counts,
                self.boxes,
                self.images,
                LEVELS=len(self.inputs),
                SCALES=self.scales,
                VOLUMES=self.options["VOLUMES"],
                ALIGNED=self.options["ALIGNED"],
                TILE_Y=tile_y,
                BLOCK_K=_LISTED_BOXES,
            )
            gather_kernel[(ends[-1],)](
                tuple(gradients),
                tuple(_strides(x) for x in gradients),
                self.sizes,
                self.channels,
                row_ends,
                ends,
                self.rois,
                derivatives,
                lists,
                counts,
                self.boxes,
                self.channel_blocks,
                self.most_channels,
                LEVELS=len(self.inputs),
                SCALES=self.scales,
                **self.blocks,
                **self.options,
                **_COMPILER,
            )


def _strides(features: Tensor) -> tuple[int, ...]:
    """(image, channel, slice, row, cell); images have one slice."""
    strides = features.stride()
    return strides if features.ndim == 5 else (*strides[:2], 0, *strides[2:])


@triton.jit
def _load_difference(input, target, offsets, target_offsets, mask, dtype: tl.constexpr):
    a = tl.load(input + offsets, mask=mask, other=0.0).to(dtype)
    b = tl.load(target + target_offsets, mask=mask, other=0.0).to(dtype)
    return a - b


@triton.jit
def _box_difference(
    input,
    target,
    stride,
    target_stride,
    size,
    channels,
    SCALE: tl.constexpr,
    rois,
    grad_losses,
    output,
    box,
    block,
    images,
    channel_blocks,
    most_channels,
    VOLUMES: tl.constexpr,
    SAMPLES: tl.constexpr,
    ALIGNED: tl.constexpr,
    BINS_Z: tl.constexpr,
    BINS_Y: tl.constexpr,
    BINS_X: tl.constexpr,
    CRITERION: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    dtype: tl.constexpr = rois.dtype.element_ty
    axes: tl.constexpr = 3 if VOLUMES else 2
    image = image_number(tl.load(rois + box * (1 + 2 * axes)), images).to(tl.int64)
    start_x, bin_x = axis_bins(rois, box, 0, SCALE, BINS_X, VOLUMES, ALIGNED)
    start_y, bin_y = axis_bins(rois, box, 1, SCALE, BINS_Y, VOLUMES, ALIGNED)
    samples_x, samples_y = sample_count(bin_x, SAMPLES), sample_count(bin_y, SAMPLES)
    if VOLUMES:
        start_z, bin_z = axis_bins(rois, box, 2, SCALE, BINS_Z, VOLUMES, ALIGNED)
        samples_z = sample_count(bin_z, SAMPLES)
    else:
        start_z, bin_z, samples_z = start_x * 0.0, bin_x * 0.0, 1
    count = tl.maximum(samples_x * samples_y * samples_z, 1)

    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    x = tl.arange(0, BLOCK_X)
    mask = (c < channels)[:, None] & (x < BINS_X)[None, :]
    base = image * stride[0] + (c.to(tl.int64) * stride[1])[:, None]
    target_base = image * target_stride[0] + (c.to(tl.int64) * target_stride[1])[:, None]
    # In `dtype`: a plain 1.0 over a number would be float32.
    values = tl.full((), 1.0, dtype) / (channels * BINS_Z * BINS_Y * BINS_X)
    total = tl.zeros((BLOCK_C, BLOCK_X), dtype)
    if grad_losses is not None:
        factor = tl.load(grad_losses + box) * values

    for z in range(BINS_Z):
        for y in range(BINS_Y):
            pooled = tl.zeros((BLOCK_C, BLOCK_X), dtype)
            for sample_z in range(samples_z):
                z0, z1, wz0, wz1 = sample_corners(start_z, bin_z, z, sample_z, samples_z, size[0])
                for sample_y in range(samples_y):
                    y0, y1, wy0, wy1 = sample_corners(start_y, bin_y, y, sample_y, samples_y, size[1])
                    for sample_x in range(samples_x):
                        x0, x1, wx0, wx1 = sample_corners(start_x, bin_x, x, sample_x, samples_x, size[2])
                        for corner in tl.static_range(8 if VOLUMES else 4):
                            at_x = (x1 if corner % 2 else x0).to(tl.int64)
                            at_y = (y1 if corner // 2 % 2 else y0).to(tl.int64)
                            weight = (wx1 if corner % 2 else wx0) * (wy1 if corner // 2 % 2 else wy0)
                            at = (at_x * stride[4] + at_y * stride[3])[None, :]
                            target_at = (at_x * target_stride[4] + at_y * target_stride[3])[None, :]
                            if VOLUMES:
                                at_z = (z1 if corner // 4 else z0).to(tl.int64)
                                weight *= wz1 if corner // 4 else wz0
                                at += at_z * stride[2]
                                target_at += at_z * target_stride[2]
                            read = mask & (weight != 0.0)[None, :]
                            pooled += weight[None, :] * _load_difference(
                                input, target, base + at, target_base + target_at, read, dtype
                            )
            d = pooled / count
            if grad_losses is None:
                if CRITERION == 0:
                    value = d * d
                elif CRITERION == 1:
                    value = tl.abs(d)
                elif CRITERION == 2:
                    value = tl.where(tl.abs(d) < 1.0, 0.5 * d * d, tl.abs(d) - 0.5)
                else:
                    value = tl.sqrt(d * d + 1e-6)
                total += tl.where(mask, value, 0.0)
            else:
                if CRITERION == 0:
                    derivative = 2.0 * d
                elif CRITERION == 1:
                    derivative = tl.where(d > 0.0, 1.0, tl.where(d < 0.0, -1.0, d))
                elif CRITERION == 2:
                    derivative = tl.where(d > 1.0, 1.0, tl.where(d < -1.0, -1.0, d))
                else:
                    derivative = d / tl.sqrt(d * d + 1e-6)
                bins = (z * BINS_Y + y) * BINS_X + x
                row = box.to(tl.int64) * (BINS_Z * BINS_Y * BINS_X) + bins
                tl.store(output + (row * most_channels)[None, :] + c[:, None], factor * derivative, mask=mask)
    if grad_losses is None:
        tl.store(output + box * channel_blocks + block, tl.sum(total) * values)


@triton.jit
def _difference_kernel(
    inputs,
    targets,
    strides,
    target_strides,
    sizes,
    channels,
    rois,
    box_levels,
    grad_losses,
    output,
    images,
    channel_blocks,
    most_channels,
    LEVELS: tl.constexpr,
    SCALES: tl.constexpr,
    VOLUMES: tl.constexpr,
    SAMPLES: tl.constexpr,
    ALIGNED: tl.constexpr,
    BINS_Z: tl.constexpr,
    BINS_Y: tl.constexpr,
    BINS_X: tl.constexpr,
    CRITERION: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    box, block = tl.program_id(0) // channel_blocks, tl.program_id(0) % channel_blocks
    level = 0
    if box_levels is not None:
        level = tl.load(box_levels + box).to(tl.int32)
    for number in tl.static_range(LEVELS):
        if level == number:
            _box_difference(
                inputs[number],
                targets[number],
                strides[number],
                target_strides[number],
                sizes[number],
                channels[number],
                SCALES[number],
                rois,
                grad_losses,
                output,
                box,
                block,
                images,
                channel_blocks,
                most_channels,
                VOLUMES,
                SAMPLES,
                ALIGNED,
                BINS_Z,
                BINS_Y,
                BINS_X,
                CRITERION,
                BLOCK_C,
                BLOCK_X,
            )
