"""Triton kernels that cut windows out of images and add their gradients back.

Windows come in kinds, each of one size. A launch takes all kinds, and cuts those of two batches of images at once. A
program of `_cut_kernel` copies a block of one window's pixels. One of `_add_kernel` sums, for a block of an image's
pixels, over the windows that hold them, in their order: no atomics, so the same bits every time, and every pixel is
written once. Nothing is read back to the host. Corners are clamped so that windows lie inside the images: whatever
they hold, reads stay inside.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .devices import on_device

_BLOCK = 1024


def roi_windows(images: Tensor, corners: Tensor, size: Sequence[int]) -> Tensor:
    """Arguments as in the op's schema in `lidnet_fast.ops`."""
    return windows_of_pair(images, None, corners, [len(corners)], size)[0]


def roi_windows_backward(grad_windows: Tensor, corners: Tensor, shape: Sequence[int]) -> Tensor:
    """The gradient of the images, in the dtype of `grad_windows`."""
    return windows_of_pair_backward([grad_windows], corners, [len(corners)], grad_windows.shape[2:], shape)


def windows_of_pair(
    images: Tensor, targets: Tensor | None, corners: Tensor, counts: Sequence[int], sizes: Sequence[int]
) -> list[Tensor]:
    """Arguments as in the op's schema in `lidnet_fast.ops`."""
    sources = [source.contiguous() for source in (images, targets) if source is not None]
    channels, lengths = images.shape[1], _by_kind(counts, sizes)
    windows = [
        [images.new_empty(count, channels, *size) for count, size in zip(counts, lengths, strict=True)] for _ in sources
    ]
    programs = [count * channels * _blocks(size) for count, size in zip(counts, lengths, strict=True)]
    if any(programs):
        begins = _padded(_starts(programs), sum(programs))
        with on_device(images):
            _cut_kernel[(len(sources) * sum(programs),)](
                tuple(sources),
                corners.contiguous(),
                tuple(_padded(of_source, of_source[0]) for of_source in windows),
                _numbers(begins, _starts(counts), lengths),
                images.shape[0],
                channels,
                *_three(images.shape[2:]),
                AXES=images.ndim - 2,
                BLOCK=_BLOCK,
            )
    return [of_kind for of_source in windows for of_kind in of_source]


def windows_of_pair_backward(
    grad_windows: Sequence[Tensor], corners: Tensor, counts: Sequence[int], sizes: Sequence[int], shape: Sequence[int]
) -> Tensor:
    """The gradient of the images, in the dtype of `grad_windows`."""
    gradient = grad_windows[0].new_empty(*shape)
    if not sum(counts):
        return gradient.zero_()
    if gradient.numel():
        grads = [of_kind.contiguous() for of_kind in grad_windows]
        blocks = _blocks(shape[2:])
        with on_device(grad_windows[0]):
            _add_kernel[(shape[0] * shape[1] * blocks,)](
                _padded(grads, grads[0]),
                corners.contiguous(),
                gradient,
                _numbers(_padded(counts, 0), _starts(counts), _by_kind(counts, sizes)),
                shape[0],
                shape[1],
                blocks,
                *_three(shape[2:]),
                AXES=len(shape) - 2,
                BLOCK=_BLOCK,
            )
    return gradient


def _by_kind(counts: Sequence[int], sizes: Sequence[int]) -> list[Sequence[int]]:
    axes = len(sizes) // len(counts)
    return [sizes[first : first + axes] for first in range(0, len(sizes), axes)]


def _starts(counts: Sequence[int]) -> list[int]:
    return list(itertools.accumulate(counts, initial=0))[:-1]


def _blocks(size: Sequence[int]) -> int:
    return triton.cdiv(math.prod(size), _BLOCK)


def _three(size: Sequence[int]) -> tuple[int, ...]:
    return (*[1] * (3 - len(size)), *size)


def _padded(values: Sequence[Any], filling: Any) -> tuple[Any, ...]:
    """As many as a power of two: Triton compiles a kernel for each length."""
    return (*values, *[filling] * (triton.next_power_of_2(len(values)) - len(values)))


def _numbers(
    own: Sequence[int], firsts: Sequence[int], lengths: Sequence[Sequence[int]]
) -> tuple[tuple[int, ...], ...]:
    """(own, first, d, h, w) of each kind, as 2 n + 3: odd and never 1, numbers that Triton compiles no kernel for."""
    kinds = zip(own, _padded(firsts, 0), _padded(lengths, lengths[0]), strict=True)
    return tuple(tuple(2 * n + 3 for n in (number, first, *_three(size))) for number, first, size in kinds)


@triton.jit
def _first(corner, axis: tl.constexpr, most, AXES: tl.constexpr):
    """A window's image (axis 0), or its first cell along z, y or x (1, 2, 3), inside [0, most]."""
    if AXES == 3 or axis == 0:
        return tl.minimum(tl.maximum(tl.load(corner + axis), 0), most)
    if axis == 1:  # images have one slice
        return tl.load(corner) * 0
    return tl.minimum(tl.maximum(tl.load(corner + axis - 1), 0), most)


@triton.jit
def _number(kinds, kind: tl.constexpr, place: tl.constexpr):
    return (kinds[kind][place] - 3) // 2


@triton.jit
def _cut_kernel(
    sources,
    corners,
    windows,
    kinds,
    count,
    channels,
    depth,
    height,
    width,
    AXES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Programs of a kind begin at its first number; those of the second source follow all of the first's."""
    programs = tl.num_programs(0) // len(sources)
    source, program = tl.program_id(0) // programs, tl.program_id(0) % programs
    images, result = sources[0], windows[0][0]
    begin, first = 0, _number(kinds, 0, 1)
    d, h, w = _number(kinds, 0, 2), _number(kinds, 0, 3), _number(kinds, 0, 4)
    for side in tl.static_range(len(sources)):
        own = source == side
        images = tl.where(own, sources[side], images)
        result = tl.where(own, windows[side][0], result)
    for kind in tl.static_range(1, len(kinds)):
        own = program >= _number(kinds, kind, 0)
        for side in tl.static_range(len(sources)):
            result = tl.where(own & (source == side), windows[side][kind], result)
        begin = tl.where(own, _number(kinds, kind, 0), begin)
        first = tl.where(own, _number(kinds, kind, 1), first)
        d = tl.where(own, _number(kinds, kind, 2), d)
        h = tl.where(own, _number(kinds, kind, 3), h)
        w = tl.where(own, _number(kinds, kind, 4), w)
    program -= begin
    blocks = tl.cdiv(d * h * w, BLOCK)
    block, channel, window = program % blocks, program // blocks % channels, program // blocks // channels
    cell = block * BLOCK + tl.arange(0, BLOCK)
    corner = corners + (first + window).to(tl.int64) * (1 + AXES)
    image = _first(corner, 0, count - 1, AXES)
    z = _first(corner, 1, depth - d, AXES) + cell // (h * w)
    y = _first(corner, 2, height - h, AXES) + cell // w % h
    x = _first(corner, 3, width - w, AXES) + cell % w
    mask = cell < d * h * w
    plane = images + (image * channels + channel) * depth * height * width
    pixels = tl.load(plane + (z * height + y) * width + x, mask=mask)
    tl.store(result + (program // blocks).to(tl.int64) * (d * h * w) + cell, pixels, mask=mask)


@triton.jit
def _add_kernel(
    grads,
    corners,
    gradient,
    kinds,
    count,
    channels,
    blocks,
    depth,
    height,
    width,
    AXES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    block, channel, image = program % blocks, program // blocks % channels, program // blocks // channels
    pixel = block * BLOCK + tl.arange(0, BLOCK)
    z, y, x = pixel // (height * width), pixel // width % height, pixel % width
    inside = pixel < depth * height * width
    compute = tl.float64 if gradient.dtype.element_ty == tl.float64 else tl.float32
    total = tl.zeros([BLOCK], dtype=compute)
    # Of the window at hand; int64 through the pointers' own arithmetic.
    corner = corners
    for kind in tl.static_range(len(kinds)):
        d, h, w = _number(kinds, kind, 2), _number(kinds, kind, 3), _number(kinds, kind, 4)
        plane = grads[kind] + channel.to(tl.int64) * (d * h * w)
        for _ in range(_number(kinds, kind, 0)):
            if _first(corner, 0, count - 1, AXES) == image:
                in_z = z - _first(corner, 1, depth - d, AXES)
                in_y = y - _first(corner, 2, height - h, AXES)
                in_x = x - _first(corner, 3, width - w, AXES)
                held = inside & (in_z >= 0) & (in_z < d) & (in_y >= 0) & (in_y < h) & (in_x >= 0) & (in_x < w)
                total += tl.load(plane + (in_z * h + in_y) * w + in_x, mask=held, other=0.0).to(compute)
            corner += 1 + AXES
            plane += channels * d * h * w
    plane = gradient + (program // blocks).to(tl.int64) * (depth * height * width)
    tl.store(plane + pixel, total.to(gradient.dtype.element_ty), mask=inside)
