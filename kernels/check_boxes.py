"""Triton kernel that brings boxes to one form and asserts on the device that they and their weights are sound."""

import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .devices import on_device

_BLOCK = 128
_MOST_IMAGES = 64  # whose boxes a launch takes: their addresses are its arguments


def check_boxes(
    boxes: Sequence[Tensor],
    box_weights: Tensor | None,
    images: int,
    largest: float,
    level_areas: Sequence[float],
    rules: Sequence[str],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Arguments as in the op's schema in `lidnet_fast.ops`."""
    counts, width = [len(of_image) for of_image in boxes], boxes[0].shape[1]
    rois = boxes[0].new_empty(sum(counts), width | 1, dtype=dtype)
    levels = rois.new_empty(len(rois) if level_areas else 0, dtype=torch.int64)
    if len({of_image.dtype for of_image in boxes}) > 1:
        boxes = [of_image.to(dtype) for of_image in boxes]
    boxes = [_aligned(of_image) for of_image in boxes]
    row = 0
    for first in range(0, len(boxes), _MOST_IMAGES):
        part = slice(first, first + _MOST_IMAGES)
        ends = list(itertools.accumulate(counts[part], initial=row))
        if ends[-1] == row:
            continue
        with on_device(rois):
            _check_kernel[(triton.cdiv(ends[-1] - row, _BLOCK),)](
                tuple(boxes[part]),
                tuple(2 * end + 3 for end in ends),
                box_weights,
                rois,
                levels,
                first,
                images,
                LARGEST=largest,
                LEVEL_AREAS=tuple(level_areas),
                RULES=tuple(rules),
                WIDTH=width,
                BLOCK=_BLOCK,
                sanitize_overflow=False,  # which comes with assertions
            )
        row = ends[-1]
    return rois, levels


def _aligned(tensor: Tensor) -> Tensor:
    """Contiguous, and where every allocation may begin: Triton compiles a kernel for each alignment."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


@triton.jit(debug=True)
def _check_kernel(
    boxes,
    ends,
    box_weights,
    rois,
    levels,
    first_image,
    images,
    LARGEST: tl.constexpr,
    LEVEL_AREAS: tl.constexpr,
    RULES: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program per block of rows. `ends` are 2 n + 3, odd and never 1: numbers that Triton compiles no kernel for."""
    dtype: tl.constexpr = rois.dtype.element_ty
    axes: tl.constexpr = WIDTH // 2
    indexed: tl.constexpr = WIDTH % 2
    row = (ends[0] - 3) // 2 + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    end = (ends[len(boxes)] - 3) // 2
    mask = row < end
    box = boxes[0] + row.to(tl.int64) * WIDTH
    image = row * 0 + first_image
    for number in tl.static_range(len(boxes)):
        begin = (ends[number] - 3) // 2
        own = row >= begin
        box = tl.where(own, boxes[number] + (row - begin).to(tl.int64) * WIDTH, box)
        image = tl.where(own, first_image + number, image)
    index = image.to(dtype)
    if indexed:
        index = tl.load(box, mask=mask, other=0.0).to(dtype)
    sound = (index >= 0.0) & (index < images) & (index == tl.floor(index))
    out = rois + row.to(tl.int64) * (1 + 2 * axes)
    tl.store(out, index, mask=mask)
    largest = tl.full((), LARGEST, dtype)
    area = tl.full((BLOCK,), 1.0, dtype)
    for axis in tl.static_range(axes):
        lower = tl.load(box + indexed + axis, mask=mask, other=0.0).to(dtype)
        upper = tl.load(box + indexed + axes + axis, mask=mask, other=0.0).to(dtype)
        sound &= (upper >= lower) & (tl.abs(lower) < largest) & (tl.abs(upper) < largest)
        tl.store(out + 1 + axis, lower, mask=mask)
        tl.store(out + 1 + axes + axis, upper, mask=mask)
        area *= upper - lower
    tl.device_assert(sound | (row >= end), RULES[0])
    if box_weights is not None:
        wide: tl.constexpr = tl.float64 if box_weights.dtype.element_ty == tl.float64 else tl.float32
        weight = tl.load(box_weights + row, mask=mask, other=0.0).to(wide)
        tl.device_assert(tl.abs(weight) < float("inf"), RULES[1])
    if len(LEVEL_AREAS) > 0:
        level = row * 0
        for number in tl.static_range(len(LEVEL_AREAS)):
            level += (area >= tl.full((), LEVEL_AREAS[number], dtype)).to(tl.int32)
        tl.store(levels + row, level.to(tl.int64), mask=mask)
