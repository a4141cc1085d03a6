"""RoIAlign, the ROI perceptual losses and windows around lesions."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._library import define, library, refuse_double_backward

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
_POOLING = (
    "Tensor rois, Tensor? box_levels, float[] spatial_scales, SymInt[] output_size, int sampling_ratio, bool aligned"
)
_ARGUMENTS = f"Tensor[] inputs, Tensor[] targets, {_POOLING}, str criterion"

define(f"roi_align(Tensor[] inputs, {_POOLING}) -> Tensor")
# It needs the inputs' shapes (all levels', one after the other), but not the inputs, which may be freed before.
define(f"roi_align_backward(Tensor grad_pooled, {_POOLING}, SymInt[] shapes, bool channels_last) -> Tensor[]")
# Of the loss per box, before weights and reduction: those are a few plain operations on K values, and leave
# every upstream gradient to autograd.
define(f"roi_perceptual_losses({_ARGUMENTS}) -> Tensor")
define(f"roi_perceptual_losses_backward(Tensor grad_losses, {_ARGUMENTS}) -> Tensor[]")
define("roi_windows(Tensor images, Tensor corners, SymInt[] size) -> Tensor")
define("roi_windows_backward(Tensor grad_windows, Tensor corners, SymInt[] shape) -> Tensor")


def roi_align(
    input: Tensor, rois: Tensor, output_size: tuple[int, ...], spatial_scale: float, sampling_ratio: int, aligned: bool
) -> Tensor:
    """`lidnet_fast.reference.roi_align`, each box's samples summed up in one small matrix per axis."""
    return torch.ops.lidnet_fast.roi_align(
        _dense([input]), rois, None, [spatial_scale], output_size, sampling_ratio, aligned
    )


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
    """`lidnet_fast.reference.multiscale_roi_align`, fused: all levels in one call."""
    levels, scales = _assign_levels(inputs, rois, image_height, canonical_scale, canonical_level)
    return torch.ops.lidnet_fast.roi_align(_dense(inputs), rois, levels, scales, output_size, sampling_ratio, False)


def roi_perceptual_loss(
    input: Tensor,
    target: Tensor,
    rois: Tensor,
    output_size: tuple[int, ...],
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
    *,
    criterion: str,
    box_weights: Tensor | None,
    reduction: str,
) -> Tensor:
    """`lidnet_fast.reference.roi_perceptual_loss`, fused."""
    from lidnet_fast.reference.roi_perceptual import reduce_boxes

    losses = torch.ops.lidnet_fast.roi_perceptual_losses(
        *_dense_pairs([input], [target]), rois, None, [spatial_scale], output_size, sampling_ratio, aligned, criterion
    )
    return reduce_boxes(losses, box_weights, reduction)


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
    """`lidnet_fast.reference.multiscale_roi_perceptual_loss`, fused: all levels in one call."""
    from lidnet_fast.reference.roi_perceptual import reduce_boxes

    losses = torch.ops.lidnet_fast.roi_perceptual_losses(
        *_dense_pairs(inputs, targets),
        rois,
        *_assign_levels(inputs, rois, image_height, canonical_scale, canonical_level),
        output_size,
        sampling_ratio,
        aligned,
        criterion,
    )
    return reduce_boxes(losses, box_weights, reduction)


def roi_windows(images: Tensor, corners: Tensor, size: Sequence[int]) -> Tensor:
    """`lidnet_fast.reference.roi_windows`, in one pass, and with a gradient that is the same every time."""
    return torch.ops.lidnet_fast.roi_windows(images, corners, size)


def _assign_levels(
    inputs: Sequence[Tensor], rois: Tensor, image_height: int, canonical_scale: float, canonical_level: int
) -> tuple[Tensor, list[float]]:
    """The level of each box, int64 [K], and the spatial scale of each level."""
    from lidnet_fast.reference.pyramid import assign_levels, pyramid_exponents

    exponents = pyramid_exponents([level.shape[2] for level in inputs], image_height)
    levels = assign_levels(rois, exponents[0], exponents[-1], canonical_scale, canonical_level)
    return levels, [2.0**-exponent for exponent in exponents]


def _memory_format(input: Tensor) -> torch.memory_format:
    """What the kernels on the CPU read: channels_last where the input is about that, else contiguous."""
    if input.is_contiguous() or input.stride(1) != 1:
        return torch.contiguous_format
    return _CHANNELS_LAST[input.ndim]


def _dense(inputs: Sequence[Tensor]) -> list[Tensor]:
    return [input.contiguous(memory_format=_memory_format(input)) for input in inputs]


def _dense_pairs(inputs: Sequence[Tensor], targets: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Each target laid out as its input."""
    pairs = zip(inputs, targets, strict=True)
    return _dense(inputs), [target.contiguous(memory_format=_memory_format(input)) for input, target in pairs]


@torch.library.register_fake("lidnet_fast::roi_align")
def _(inputs: list[Tensor], rois: Tensor, *options: Any) -> Tensor:
    output_size = options[2]
    return inputs[0].new_empty((rois.shape[0], inputs[0].shape[1], *output_size))


@torch.library.register_fake("lidnet_fast::roi_align_backward")
def _(grad_pooled: Tensor, *arguments: Any) -> list[Tensor]:
    *_, shapes, channels_last = arguments
    axes = grad_pooled.ndim
    form = _CHANNELS_LAST[axes] if channels_last else torch.contiguous_format
    of_levels = [shapes[first : first + axes] for first in range(0, len(shapes), axes)]
    return [torch.empty_like(grad_pooled.new_empty(shape), memory_format=form) for shape in of_levels]


def _save_shapes(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    features, rois, box_levels, *options = inputs
    ctx.save_for_backward(rois, box_levels)
    channels_last = not all(level.is_contiguous() for level in features)
    ctx.options = (*options, [side for level in features for side in level.shape], channels_last)


def _spread(ctx: Any, grad_pooled: Tensor) -> tuple[Any, ...]:
    gradients = torch.ops.lidnet_fast.roi_align_backward(grad_pooled, *ctx.saved_tensors, *ctx.options)
    return (gradients, *(None for _ in range(6)))


def _save_pooling(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    _, rois, box_levels, *options, _, _ = inputs
    ctx.save_for_backward(rois, box_levels)
    ctx.options = options


def _pool(ctx: Any, gradients: list[Tensor]) -> tuple[Any, ...]:
    """Both directions are linear: each is the other's derivative."""
    pooled = torch.ops.lidnet_fast.roi_align(_dense(gradients), *ctx.saved_tensors, *ctx.options)
    return (pooled, *(None for _ in range(8)))


torch.library.register_autograd("lidnet_fast::roi_align", _spread, setup_context=_save_shapes)
torch.library.register_autograd("lidnet_fast::roi_align_backward", _pool, setup_context=_save_pooling)


@torch.library.register_fake("lidnet_fast::roi_perceptual_losses")
def _(inputs: list[Tensor], targets: list[Tensor], rois: Tensor, *options: Any) -> Tensor:
    return rois.new_empty(rois.shape[0])


@torch.library.register_fake("lidnet_fast::roi_perceptual_losses_backward")
def _(grad_losses: Tensor, inputs: list[Tensor], *arguments: Any) -> list[Tensor]:
    return [torch.empty_like(input) for input in inputs]


def _save_features(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    features, targets, rois, box_levels, *ctx.options = inputs
    ctx.levels = len(features)
    ctx.has_box_levels = box_levels is not None
    ctx.save_for_backward(*features, *targets, rois, *([box_levels] if ctx.has_box_levels else []))


def _losses_backward(ctx: Any, grad_losses: Tensor) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    inputs, targets, rois = saved[: ctx.levels], saved[ctx.levels : 2 * ctx.levels], saved[2 * ctx.levels]
    box_levels = saved[-1] if ctx.has_box_levels else None
    gradients = torch.ops.lidnet_fast.roi_perceptual_losses_backward(
        grad_losses, inputs, targets, rois, box_levels, *ctx.options
    )
    return (gradients, [None] * ctx.levels, None, None, *(None for _ in ctx.options))


torch.library.register_autograd("lidnet_fast::roi_perceptual_losses", _losses_backward, setup_context=_save_features)
torch.library.register_autograd("lidnet_fast::roi_perceptual_losses_backward", refuse_double_backward)


@torch.library.impl(library, "roi_perceptual_losses", "CUDA")
def _(*arguments: Any) -> Tensor:
    from lidnet_fast.kernels.roi_perceptual import roi_perceptual_losses

    return roi_perceptual_losses(*arguments)


@torch.library.impl(library, "roi_perceptual_losses_backward", "CUDA")
def _(*arguments: Any) -> list[Tensor]:
    from lidnet_fast.kernels.roi_perceptual import roi_perceptual_losses_backward

    return roi_perceptual_losses_backward(*arguments)


@torch.library.register_fake("lidnet_fast::roi_windows")
def _(images: Tensor, corners: Tensor, size: Sequence[int]) -> Tensor:
    return images.new_empty((corners.shape[0], images.shape[1], *size))


@torch.library.register_fake("lidnet_fast::roi_windows_backward")
def _(grad_windows: Tensor, corners: Tensor, shape: Sequence[int]) -> Tensor:
    return grad_windows.new_empty(tuple(shape))


def _save_corners(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, corners, _ = inputs
    ctx.save_for_backward(corners)
    ctx.shape = inputs[0].shape


def _add_windows(ctx: Any, grad_windows: Tensor) -> tuple[Any, ...]:
    return torch.ops.lidnet_fast.roi_windows_backward(grad_windows, *ctx.saved_tensors, ctx.shape), None, None


def _cut_windows(ctx: Any, grad_images: Tensor) -> tuple[Any, ...]:
    return torch.ops.lidnet_fast.roi_windows(grad_images, *ctx.saved_tensors, ctx.shape[2:]), None, None


torch.library.register_autograd("lidnet_fast::roi_windows", _add_windows, setup_context=_save_corners)
torch.library.register_autograd("lidnet_fast::roi_windows_backward", _cut_windows, setup_context=_save_corners)


@torch.library.impl(library, "roi_windows", "CUDA")
def _(*arguments: Any) -> Tensor:
    from lidnet_fast.kernels.roi_windows import roi_windows

    return roi_windows(*arguments)


@torch.library.impl(library, "roi_windows_backward", "CUDA")
def _(*arguments: Any) -> Tensor:
    from lidnet_fast.kernels.roi_windows import roi_windows_backward

    return roi_windows_backward(*arguments)


def _refuse_vmap(info: Any, in_dims: Any, *arguments: Any) -> None:
    raise NotImplementedError(
        "the fused ops on boxes don't run under torch.vmap: make the mapped dimension part of the batch, "
        "with each box's batch index pointing at its image"
    )


for _op in ("roi_align", "roi_align_backward", "roi_perceptual_losses", "roi_perceptual_losses_backward"):
    torch.library.register_vmap(f"lidnet_fast::{_op}", _refuse_vmap)
