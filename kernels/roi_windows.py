"""Triton kernels that cut windows out of images and add their gradients back.

A program of `_cut_kernel` copies a block of one window's pixels. One of `_add_kernel` sums, for a block of an image's
pixels, over the windows that hold them, in their order: no atomics, so the same bits every time, and every pixel is
written once. Nothing is read back to the host. Corners are clamped so that windows lie inside the images: whatever
they hold, reads stay inside.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .devices import on_device

_BLOCK = 1024


def roi_windows(images: Tensor, corners: Tensor, size: Sequence[int]) -> Tensor:
    """Arguments as in the op's schema in `lidnet_fast.ops`."""
    windows = images.new_empty(len(corners), images.shape[1], *size)
    if windows.numel():
        _launch(_cut_kernel, images.contiguous(), corners, windows, images.shape, size, windows.shape[0])
    return windows


def roi_windows_backward(grad_windows: Tensor, corners: Tensor, shape: Sequence[int]) -> Tensor:
    """The gradient of the images, in the dtype of `grad_windows`."""
    gradient = grad_windows.new_empty(*shape)
    if len(corners) == 0:
        return gradient.zero_()
    if gradient.numel():
        _launch(_add_kernel, grad_windows.contiguous(), corners, gradient, shape, grad_windows.shape[2:], shape[0])
    return gradient


def _launch(
    kernel: triton.JITFunction,
    source: Tensor,
    corners: Tensor,
    result: Tensor,
    shape: Sequence[int],
    size: Sequence[int],
    planes: int,
) -> None:
    images, channels, *sides = shape
    axes = len(sides)
    sides, lengths = ([1] * (3 - axes) + list(of_axes) for of_axes in (sides, size))
    blocks = triton.cdiv(result[0, 0].numel(), _BLOCK)
    arguments = (images, channels, len(corners), blocks, *sides, *lengths)
    with on_device(source):
        kernel[(planes * channels * blocks,)](source, corners.contiguous(), result, *arguments, AXES=axes, BLOCK=_BLOCK)


@triton.jit
def _first(corner, axis: tl.constexpr, most, AXES: tl.constexpr):
    """A window's image (axis 0), or its first cell along z, y or x (1, 2, 3), inside [0, most]."""
    if AXES == 3 or axis == 0:
        return tl.minimum(tl.maximum(tl.load(corner + axis), 0), most)
    if axis == 1:  # images have one slice
        return tl.load(corner) * 0
    return tl.minimum(tl.maximum(tl.load(corner + axis - 1), 0), most)


@triton.jit
def _cut_kernel(
    images,
    corners,
    windows,
    count,
    channels,
    number,
    blocks,
    depth,
    height,
    width,
    d,
    h,
    w,
    AXES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    block, channel, window = program % blocks, program // blocks % channels, program // blocks // channels
    cell = block * BLOCK + tl.arange(0, BLOCK)
    corner = corners + window.to(tl.int64) * (1 + AXES)
    image = _first(corner, 0, count - 1, AXES)
    z = _first(corner, 1, depth - d, AXES) + cell // (h * w)
    y = _first(corner, 2, height - h, AXES) + cell // w % h
    x = _first(corner, 3, width - w, AXES) + cell % w
    mask = cell < d * h * w
    plane = images + (image * channels + channel) * depth * height * width
    pixels = tl.load(plane + (z * height + y) * width + x, mask=mask)
    tl.store(windows + (program // blocks).to(tl.int64) * (d * h * w) + cell, pixels, mask=mask)


@triton.jit
def _add_kernel(
    grads,
    corners,
    gradient,
    count,
    channels,
    number,
    blocks,
    depth,
    height,
    width,
    d,
    h,
    w,
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
    corner, plane = corners, grads + channel.to(tl.int64) * (d * h * w)
    for _ in range(number):
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
