"""RoIAlign, the ROI perceptual loss, checks of boxes and windows around lesions."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lidnet_fast._constants import CHARBONNIER_EPS
from lidnet_fast._tensors import empty_maps, empty_slopes, reduce_boxes

from ._library import define, differentiate, differentiate_by, keep, library, refuse_second_derivative, refuse_tangents

_REMEDY = "compare lidnet_fast.roi_align of input and target"
_POOLING = (
    "Tensor rois, Tensor? box_levels, float[] spatial_scales, SymInt[] output_size, int sampling_ratio, bool aligned"
)
_OF_BOXES = f"Tensor[] inputs, Tensor[] targets, {_POOLING}, str criterion"
_OF_LOSS = f"{_OF_BOXES}, Tensor? box_weights, str reduction"
_OF_GRADIENTS = "SymInt[] shapes, bool[] channels_last, ScalarType dtype"  # shapes of all levels, one after the other

# What `functional.check_boxes` asks of boxes and weights, asserted on the device; `rules` are what is said where they
# don't hold. Boxes are of all images, with a batch index, or of each image. Levels are empty without `level_areas`.
define(
    "check_boxes(Tensor[] boxes, Tensor? box_weights, SymInt images, float largest, float[] level_areas, str[] rules, "
    "ScalarType dtype) -> (Tensor rois, Tensor box_levels)"
)

define(f"roi_align(Tensor[] inputs, {_POOLING}) -> Tensor")
# It needs the inputs' shapes (all levels', one after the other), but not the inputs, which may be freed before.
define(f"roi_align_backward(Tensor grad_pooled, {_POOLING}, SymInt[] shapes, bool channels_last) -> Tensor[]")
# Where it may be differentiated, the second op computes the loss. Slopes, the criterion's derivatives at the pooled
# differences [boxes, channels, bins], are all that the backward needs; they may have more channels than features have.
define(f"roi_perceptual_loss({_OF_LOSS}) -> Tensor")
define(f"roi_perceptual_loss_and_slopes({_OF_LOSS}) -> (Tensor loss, Tensor slopes)")
define(
    f"roi_perceptual_loss_backward(Tensor grad_loss, Tensor slopes, {_POOLING}, Tensor? box_weights, str reduction, "
    f"{_OF_GRADIENTS}) -> Tensor[]"
)
# The loss of each box on the CPU; weights and reductions are a few plain operations there.
define(f"roi_perceptual_losses({_OF_BOXES}, bool with_slopes) -> (Tensor losses, Tensor slopes)")
define(f"roi_perceptual_losses_backward(Tensor grad_losses, Tensor slopes, {_POOLING}, {_OF_GRADIENTS}) -> Tensor[]")
define("roi_windows(Tensor images, Tensor corners, SymInt[] size) -> Tensor")
define("roi_windows_backward(Tensor grad_windows, Tensor corners, SymInt[] shape) -> Tensor")

# Windows of several kinds, the first so many corners of the first and so on, each kind of a size of its own: of the
# images, and then of the targets, which get no gradient.
define("windows_of_pair(Tensor images, Tensor? targets, Tensor corners, SymInt[] counts, SymInt[] sizes) -> Tensor[]")
define(
    "windows_of_pair_backward(Tensor[] grad_windows, Tensor corners, SymInt[] counts, SymInt[] sizes, SymInt[] shape) "
    "-> Tensor"
)


@torch.library.register_fake("lidnet_fast::roi_align")
def _(inputs: list[Tensor], rois: Tensor, *options: Any) -> Tensor:
    output_size = options[2]
    return inputs[0].new_empty((rois.shape[0], inputs[0].shape[1], *output_size))


@torch.library.register_fake("lidnet_fast::roi_align_backward")
def _(grad_pooled: Tensor, *arguments: Any) -> list[Tensor]:
    *_, shapes, channels_last = arguments
    levels = len(shapes) // grad_pooled.ndim
    return empty_maps(grad_pooled, shapes, [channels_last] * levels)


def _by_level(shapes: Sequence[int], axes: int) -> list[Sequence[int]]:
    return [shapes[first : first + axes] for first in range(0, len(shapes), axes)]


def _save_shapes(ctx: Any, arguments: tuple[Any, ...], output: Tensor) -> None:
    features, rois, box_levels, *options = arguments
    keep(ctx, rois, box_levels)
    channels_last = not all(level.is_contiguous() for level in features)
    ctx.pooling = options
    ctx.shapes = [side for level in features for side in level.shape]
    ctx.options = (*options, ctx.shapes, channels_last)


def _spread(ctx: Any, grad_pooled: Tensor) -> tuple[Any, ...]:
    gradients = torch.ops.lidnet_fast.roi_align_backward(grad_pooled, *ctx.saved_tensors, *ctx.options)
    return (gradients, *(None for _ in range(6)))


def _pooled_tangent(ctx: Any, tangents: Sequence[Tensor | None], rois: Tensor | None, *_: Any) -> Tensor:
    refuse_tangents("roi_align", boxes=rois)
    axes = len(ctx.pooling[1]) + 2
    inputs = _filled(tangents, _by_level(ctx.shapes, axes))
    return torch.ops.lidnet_fast.roi_align(inputs, *ctx.saved_tensors, *ctx.pooling)


def _save_pooling(ctx: Any, arguments: tuple[Any, ...], output: list[Tensor]) -> None:
    _, rois, box_levels, *ctx.options = arguments
    keep(ctx, rois, box_levels)


def _pool(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
    """Both directions are linear: each is the other's derivative."""
    *pooling, shapes, _ = ctx.options
    inputs = _filled(gradients, _by_level(shapes, len(pooling[1]) + 2))
    pooled = torch.ops.lidnet_fast.roi_align(inputs, *ctx.saved_tensors, *pooling)
    return (pooled, *(None for _ in range(8)))


def _spread_tangent(ctx: Any, tangent: Tensor | None, rois: Tensor | None, *_: Any) -> tuple[Tensor, ...]:
    refuse_tangents("roi_align", boxes=rois)
    return tuple(torch.ops.lidnet_fast.roi_align_backward(tangent, *ctx.saved_tensors, *ctx.options))


def _filled(tensors: Sequence[Tensor | None], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """Contiguous, and zeros for those that are None."""
    known = next(tensor for tensor in tensors if tensor is not None)
    pairs = zip(tensors, shapes, strict=True)
    return [known.new_zeros(tuple(shape)) if tensor is None else tensor.contiguous() for tensor, shape in pairs]


differentiate("roi_align", _save_shapes, _spread, _pooled_tangent)
differentiate("roi_align_backward", _save_pooling, _pool, _spread_tangent)


@torch.library.register_fake("lidnet_fast::check_boxes")
def _(boxes: list[Tensor], *options: Any) -> tuple[Tensor, Tensor]:
    *_, level_areas, _, dtype = options
    count = sum(of_image.shape[0] for of_image in boxes)
    rois = boxes[0].new_empty((count, boxes[0].shape[1] | 1), dtype=dtype)
    return rois, rois.new_empty(count if level_areas else 0, dtype=torch.int64)


def _save_nothing(ctx: Any, arguments: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(*output)


def _constant(ctx: Any, *_: Any) -> tuple[None, ...]:
    return (None,) * 7


def _constant_tangent(ctx: Any, boxes: Sequence[Tensor | None], box_weights: Tensor | None, *_: Any) -> Any:
    refuse_tangents("check_boxes", boxes=boxes, box_weights=box_weights)


differentiate("check_boxes", _save_nothing, _constant, _constant_tangent)


@torch.library.impl(library, "check_boxes", "CUDA")
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    from lidnet_fast.kernels.check_boxes import check_boxes

    return check_boxes(*arguments)


@torch.library.register_fake("lidnet_fast::roi_perceptual_loss")
def _(inputs: list[Tensor], targets: list[Tensor], rois: Tensor, *options: Any) -> Tensor:
    return rois.new_empty(rois.shape[0] if options[-1] == "none" else ())


@torch.library.register_fake("lidnet_fast::roi_perceptual_loss_and_slopes")
def _(inputs: list[Tensor], targets: list[Tensor], rois: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    _, _, output_size, *_, reduction = options
    loss = rois.new_empty(rois.shape[0] if reduction == "none" else ())
    return loss, empty_slopes(inputs, rois, output_size, on_gpu=rois.device.type == "cuda")


@torch.library.register_fake("lidnet_fast::roi_perceptual_loss_backward")
def _(grad_loss: Tensor, slopes: Tensor, *arguments: Any) -> list[Tensor]:
    *_, shapes, channels_last, dtype = arguments
    return empty_maps(slopes, shapes, channels_last, dtype)


def _save_slopes(ctx: Any, arguments: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    inputs, targets, rois, box_levels, *pooling, ctx.criterion, box_weights, ctx.reduction = arguments
    ctx.pooling, ctx.gradients = pooling, _gradients_of(inputs)
    features = (*inputs, *targets)
    # A tangent is computed from the features, so that it can be differentiated itself.
    ctx.save_for_forward(output[1], rois, box_levels, box_weights, *features)
    # torch.export sees the loss' op alone, and would take slopes for constants: they are computed again there.
    known = features if torch.compiler.is_exporting() else ()
    ctx.save_for_backward(output[1], rois, box_levels, box_weights, *known)


def _gradients_of(inputs: Sequence[Tensor]) -> tuple[list[int], list[bool], torch.dtype]:
    shapes = [side for level in inputs for side in level.shape]
    return shapes, [not level.is_contiguous() for level in inputs], inputs[0].dtype


def _loss_backward(ctx: Any, grad_loss: Tensor | None, of_slopes: Tensor | None) -> tuple[Any, ...]:
    if of_slopes is not None:
        refuse_second_derivative(_REMEDY)
    slopes, rois, box_levels, box_weights, *features = ctx.saved_tensors
    if features:
        of_loss = (rois, box_levels, *ctx.pooling, ctx.criterion, box_weights, ctx.reduction)
        levels = len(features) // 2
        _, slopes = torch.ops.lidnet_fast.roi_perceptual_loss_and_slopes(features[:levels], features[levels:], *of_loss)
    gradients = torch.ops.lidnet_fast.roi_perceptual_loss_backward(
        grad_loss, slopes, rois, box_levels, *ctx.pooling, box_weights, ctx.reduction, *ctx.gradients
    )
    return (gradients, *(None for _ in range(10)))


def _loss_tangent(
    ctx: Any, of_inputs: Sequence[Tensor | None], of_targets: Sequence[Tensor | None], rois: Tensor | None, *others: Any
) -> tuple[Tensor, Tensor]:
    refuse_tangents("roi_perceptual_loss", target=of_targets, boxes=rois, box_weights=others[-2])
    slopes, rois, box_levels, box_weights, *features = ctx.saved_tensors
    inputs, targets = features[: len(features) // 2], features[len(features) // 2 :]

    def slopes_of(level: int) -> Tensor:
        difference = inputs[level].to(rois.dtype) - targets[level].to(rois.dtype)
        return _slope(_pool_level(difference, level, rois, ctx.pooling), ctx.criterion)

    of_loss = _along(of_inputs, slopes_of, rois, box_levels, ctx.pooling, box_weights, ctx.reduction)
    # There is one, but all that may be done with it is to refuse it.
    return of_loss, torch.zeros_like(slopes)


def _along(
    directions: Sequence[Tensor | None],
    slopes_of: Callable[[int], Tensor],
    rois: Tensor,
    box_levels: Tensor | None,
    pooling: Sequence[Any],
    box_weights: Tensor | None,
    reduction: str,
) -> Tensor:
    """The derivative of the loss when the inputs move in these directions.

    Pooling is linear, so each box's is the mean of the criterion's slope at the pooled difference times the pooled
    direction. `slopes_of` a level are those of all boxes, whatever their level.
    """
    losses = torch.zeros_like(rois[:, 0])
    for level, direction in enumerate(directions):
        if direction is not None:
            moved = _pool_level(direction.to(rois.dtype), level, rois, pooling)
            of_level = (slopes_of(level) * moved).flatten(1).mean(1)
            losses = losses + (of_level if box_levels is None else torch.where(box_levels == level, of_level, 0.0))
    return reduce_boxes(losses, box_weights, reduction)


def _pool_level(maps: Tensor, level: int, rois: Tensor, pooling: Sequence[Any]) -> Tensor:
    from lidnet_fast import backend

    scales, *options = pooling
    pool = backend.implementation("roi_align", maps.device)
    return pool([maps.contiguous()], rois, None, [scales[level]], *options)


def _slope(difference: Tensor, criterion: str) -> Tensor:
    """The derivative of a criterion (`lidnet_fast.reference.roi_perceptual.CRITERIA`)."""
    if criterion == "mse":
        return 2 * difference
    if criterion == "l1":
        return difference.sign()
    if criterion == "smooth_l1":
        return difference.clamp(-1, 1)
    return difference / (difference.square() + CHARBONNIER_EPS**2).sqrt()


def _save_upstream(ctx: Any, arguments: tuple[Any, ...], output: list[Tensor]) -> None:
    _, slopes, rois, box_levels, *ctx.pooling, box_weights, ctx.reduction, shapes, channels_last, dtype = arguments
    keep(ctx, slopes, rois, box_levels, box_weights)
    ctx.gradients = shapes, channels_last, dtype


def _unspread(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
    if ctx.needs[1]:
        refuse_second_derivative(_REMEDY)
    slopes, rois, box_levels, box_weights = ctx.saved_tensors
    shapes = _by_level(ctx.gradients[0], slopes.ndim)

    def slopes_of(level: int) -> Tensor:
        of_level = slopes[:, : shapes[level][1]]
        if box_levels is None:
            return of_level
        # There may be none for some channels where a box is on a level of fewer.
        return torch.where((box_levels == level).view(-1, *(1,) * (slopes.ndim - 1)), of_level, 0.0)

    along = _along(gradients, slopes_of, rois, box_levels, ctx.pooling, box_weights, ctx.reduction)
    return (along, *(None for _ in range(12)))


def _loss_backward_tangent(
    ctx: Any, of_grad_loss: Tensor | None, of_slopes: Tensor | None, *_: Any
) -> tuple[Tensor, ...]:
    if of_slopes is not None:
        refuse_second_derivative(_REMEDY)
    slopes, rois, box_levels, box_weights = ctx.saved_tensors
    arguments = (slopes, rois, box_levels, *ctx.pooling, box_weights, ctx.reduction, *ctx.gradients)
    return tuple(torch.ops.lidnet_fast.roi_perceptual_loss_backward(of_grad_loss, *arguments))


differentiate_by("roi_perceptual_loss", "roi_perceptual_loss_and_slopes")
differentiate("roi_perceptual_loss_and_slopes", _save_slopes, _loss_backward, _loss_tangent)
differentiate("roi_perceptual_loss_backward", _save_upstream, _unspread, _loss_backward_tangent)


@torch.library.impl(library, "roi_perceptual_loss", "CPU")
def _(*arguments: Any) -> Tensor:
    return _losses_and_slopes(arguments, with_slopes=False)[0]


@torch.library.impl(library, "roi_perceptual_loss_and_slopes", "CPU")
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    return _losses_and_slopes(arguments, with_slopes=True)


def _losses_and_slopes(arguments: tuple[Any, ...], *, with_slopes: bool) -> tuple[Tensor, Tensor]:
    *of_boxes, box_weights, reduction = arguments
    losses, slopes = torch.ops.lidnet_fast.roi_perceptual_losses.default(*of_boxes, with_slopes)
    return reduce_boxes(losses, box_weights, reduction), slopes


@torch.library.impl(library, "roi_perceptual_loss_backward", "CPU")
def _(grad_loss: Tensor, slopes: Tensor, rois: Tensor, *arguments: Any) -> list[Tensor]:
    *pooling, box_weights, reduction, shapes, channels_last, dtype = arguments
    boxes = rois.shape[0]
    if reduction == "mean":
        grad_loss = grad_loss / max(boxes, 1)
    grad_losses = grad_loss.expand(boxes) if box_weights is None else grad_loss * box_weights
    return torch.ops.lidnet_fast.roi_perceptual_losses_backward.default(
        grad_losses, slopes, rois, *pooling, shapes, channels_last, dtype
    )


@torch.library.impl(library, "roi_perceptual_loss", "CUDA")
def _(*arguments: Any) -> Tensor:
    from lidnet_fast.kernels.roi_perceptual import roi_perceptual_loss

    return roi_perceptual_loss(*arguments)


@torch.library.impl(library, "roi_perceptual_loss_and_slopes", "CUDA")
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    from lidnet_fast.kernels.roi_perceptual import roi_perceptual_loss_and_slopes

    return roi_perceptual_loss_and_slopes(*arguments)


@torch.library.impl(library, "roi_perceptual_loss_backward", "CUDA")
def _(*arguments: Any) -> list[Tensor]:
    from lidnet_fast.kernels.roi_perceptual import roi_perceptual_loss_backward

    return roi_perceptual_loss_backward(*arguments)


@torch.library.register_fake("lidnet_fast::roi_windows")
def _(images: Tensor, corners: Tensor, size: Sequence[int]) -> Tensor:
    return images.new_empty((corners.shape[0], images.shape[1], *size))


@torch.library.register_fake("lidnet_fast::roi_windows_backward")
def _(grad_windows: Tensor, corners: Tensor, shape: Sequence[int]) -> Tensor:
    return grad_windows.new_empty(tuple(shape))


def _save_corners(ctx: Any, arguments: tuple[Any, ...], output: Tensor) -> None:
    images, corners, ctx.size = arguments
    keep(ctx, corners)
    ctx.shape = images.shape


def _add_windows(ctx: Any, grad_windows: Tensor) -> tuple[Any, ...]:
    return torch.ops.lidnet_fast.roi_windows_backward(grad_windows, *ctx.saved_tensors, ctx.shape), None, None


def _cut_windows(ctx: Any, grad_images: Tensor) -> tuple[Any, ...]:
    return torch.ops.lidnet_fast.roi_windows(grad_images, *ctx.saved_tensors, ctx.shape[2:]), None, None


def _cut_tangent(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
    return torch.ops.lidnet_fast.roi_windows(tangent, *ctx.saved_tensors, ctx.size)


def _added_tangent(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
    return torch.ops.lidnet_fast.roi_windows_backward(tangent, *ctx.saved_tensors, ctx.size)


differentiate("roi_windows", _save_corners, _add_windows, _cut_tangent)
differentiate("roi_windows_backward", _save_corners, _cut_windows, _added_tangent)


@torch.library.impl(library, "roi_windows", "CUDA")
def _(*arguments: Any) -> Tensor:
    from lidnet_fast.kernels.roi_windows import roi_windows

    return roi_windows(*arguments)


@torch.library.impl(library, "roi_windows_backward", "CUDA")
def _(*arguments: Any) -> Tensor:
    from lidnet_fast.kernels.roi_windows import roi_windows_backward

    return roi_windows_backward(*arguments)


@torch.library.register_fake("lidnet_fast::windows_of_pair")
def _(
    images: Tensor, targets: Tensor | None, corners: Tensor, counts: Sequence[int], sizes: Sequence[int]
) -> list[Tensor]:
    kinds = zip(counts, _by_level(sizes, images.ndim - 2), strict=True)
    shapes = [(count, images.shape[1], *size) for count, size in kinds]
    return [images.new_empty(shape) for shape in (shapes if targets is None else shapes * 2)]


@torch.library.register_fake("lidnet_fast::windows_of_pair_backward")
def _(grad_windows: Sequence[Tensor], *arguments: Any) -> Tensor:
    return grad_windows[0].new_empty(tuple(arguments[-1]))


def _save_kinds(ctx: Any, arguments: tuple[Any, ...], output: Sequence[Tensor]) -> None:
    images, _, corners, *ctx.kinds = arguments
    keep(ctx, corners)
    ctx.shape = images.shape
    ctx.constant = len(output) - len(ctx.kinds[0])
    ctx.mark_non_differentiable(*output[len(ctx.kinds[0]) :])


def _add_kinds(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
    return _added(ctx, gradients), None, None, None, None


def _added(ctx: Any, windows: Sequence[Tensor | None]) -> Tensor:
    """The first windows, one of each kind, added up; None stands for zeros."""
    counts, sizes = ctx.kinds
    lengths = _by_level(sizes, len(ctx.shape) - 2)
    shapes = [(count, ctx.shape[1], *size) for count, size in zip(counts, lengths, strict=True)]
    filled = _filled(windows[: len(counts)], shapes)
    return torch.ops.lidnet_fast.windows_of_pair_backward(filled, *ctx.saved_tensors, *ctx.kinds, ctx.shape)


def _cut_kinds_tangent(ctx: Any, tangent: Tensor | None, of_targets: Tensor | None, *_: Any) -> tuple[Any, ...]:
    refuse_tangents("windows_of_pair", targets=of_targets)
    cut = torch.ops.lidnet_fast.windows_of_pair(tangent, None, *ctx.saved_tensors, *ctx.kinds)
    return (*cut, *(None for _ in range(ctx.constant)))


def _save_added(ctx: Any, arguments: tuple[Any, ...], output: Tensor) -> None:
    _, corners, *ctx.kinds, ctx.shape = arguments
    keep(ctx, corners)


def _cut_kinds(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    cut = torch.ops.lidnet_fast.windows_of_pair(gradient, None, *ctx.saved_tensors, *ctx.kinds)
    return cut, None, None, None, None


def _added_kinds_tangent(ctx: Any, tangents: Sequence[Tensor | None], *_: Any) -> Tensor:
    return _added(ctx, tangents)


differentiate("windows_of_pair", _save_kinds, _add_kinds, _cut_kinds_tangent)
differentiate("windows_of_pair_backward", _save_added, _cut_kinds, _added_kinds_tangent)


@torch.library.impl(library, "windows_of_pair", "CUDA")
def _(*arguments: Any) -> list[Tensor]:
    from lidnet_fast.kernels.roi_windows import windows_of_pair

    return windows_of_pair(*arguments)


@torch.library.impl(library, "windows_of_pair_backward", "CUDA")
def _(*arguments: Any) -> Tensor:
    from lidnet_fast.kernels.roi_windows import windows_of_pair_backward

    return windows_of_pair_backward(*arguments)
