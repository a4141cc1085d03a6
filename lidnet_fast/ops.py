"""The fused ops as PyTorch sees them: schemas, fakes, autograd, vmap, and which kernel runs on which device.

Each public function here has the signature of its definition in `lidnet_fast.reference`, and is reached through
`lidnet_fast.functional`, which checks the arguments. Kernels in C++ and CUDA register themselves when
`lidnet_fast.backend` loads their libraries; Triton's are imported at the first call with a CUDA tensor.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ._checks import compute_dtype

__all__ = [
    "combine_gradients",
    "gradient_gramian",
    "multi_loss",
    "multi_loss_jacobian",
    "multiscale_roi_align",
    "multiscale_roi_perceptual_loss",
    "roi_align",
    "roi_perceptual_loss",
    "roi_windows",
]

# Which of them the kernels of each kind compute, by the names of `backend.missing_kernels`.
KERNELS = {
    "cpu": frozenset(__all__),
    "cuda, Triton": frozenset({"multiscale_roi_perceptual_loss", "roi_perceptual_loss", "roi_windows"}),
    "cuda, C++": frozenset({"combine_gradients", "gradient_gramian", "multi_loss", "multi_loss_jacobian"}),
}

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}

_library = torch.library.Library("lidnet_fast", "DEF")

_POOLING = (
    "Tensor rois, Tensor? box_levels, float[] spatial_scales, SymInt[] output_size, int sampling_ratio, bool aligned"
)
_ARGUMENTS = f"Tensor[] inputs, Tensor[] targets, {_POOLING}, str criterion"
# Both are of the loss per box, before weights and reduction: those are a few plain operations on K values, and leave
# every upstream gradient to autograd.
_library.define(f"roi_perceptual_losses({_ARGUMENTS}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_library.define(
    f"roi_perceptual_losses_backward(Tensor grad_losses, {_ARGUMENTS}) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(f"roi_align(Tensor[] inputs, {_POOLING}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
# It needs the inputs' shapes (all levels', one after the other), but not the inputs, which may be freed before.
_library.define(
    f"roi_align_backward(Tensor grad_pooled, {_POOLING}, SymInt[] shapes, bool channels_last) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)
# The gradient comes with the value, in the dtype of the arithmetic: one sweep over the images gives both.
_library.define(
    "multi_loss(Tensor input, Tensor target, str[] terms, float[] weights, Tensor? rois, float roi_weight, "
    "float data_range, bool with_gradient) -> (Tensor total, Tensor values, Tensor gradient)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "multi_loss_backward(Tensor grad_total, Tensor gradient, Tensor input) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "multi_loss_jacobian(Tensor input, Tensor target, str[] terms, Tensor? rois, float roi_weight, float data_range) "
    "-> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define("gradient_gramian(Tensor gradients, bool per_sample) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_library.define(
    "combine_gradients(Tensor gradients, Tensor coefficients) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
)

_library.define(
    "roi_windows(Tensor images, Tensor corners, SymInt[] size) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
)
_library.define(
    "roi_windows_backward(Tensor grad_windows, Tensor corners, SymInt[] shape) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


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
    from .reference.roi_perceptual import reduce_boxes

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
    from .reference.roi_perceptual import reduce_boxes

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


def multi_loss(
    input: Tensor,
    target: Tensor,
    weights: Mapping[str, float],
    *,
    rois: Tensor | None,
    roi_weight: float,
    data_range: float,
    dtype: torch.dtype,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`lidnet_fast.reference.multi_loss`, fused: values and gradient in one sweep over the images.

    ms_ssim of volumes, which wants 161 slices, has no kernel: it runs on the definition.
    """
    if input.ndim == 5 and "ms_ssim" in weights:
        from . import reference

        return reference.multi_loss(
            input, target, weights, rois=rois, roi_weight=roi_weight, data_range=data_range, dtype=dtype
        )
    with_gradient = torch.is_grad_enabled() and input.requires_grad
    op = torch.ops.lidnet_fast.multi_loss if _is_transformed() else _MultiLoss.apply
    total, values, _ = op(
        input, target, list(weights), list(weights.values()), rois, roi_weight, data_range, with_gradient
    )
    return total, dict(zip(weights, values.detach().unbind(), strict=True))


def multi_loss_jacobian(
    input: Tensor,
    target: Tensor,
    terms: Sequence[str],
    *,
    rois: Tensor | None,
    roi_weight: float,
    data_range: float,
    dtype: torch.dtype,
) -> Tensor:
    """`lidnet_fast.reference.multi_loss_jacobian`, fused as `multi_loss` is."""
    if input.ndim == 5 and "ms_ssim" in terms:
        from . import reference

        return reference.multi_loss_jacobian(
            input, target, terms, rois=rois, roi_weight=roi_weight, data_range=data_range, dtype=dtype
        )
    return torch.ops.lidnet_fast.multi_loss_jacobian(input.detach(), target, list(terms), rois, roi_weight, data_range)


def gradient_gramian(gradients: Tensor, dtype: torch.dtype, per_sample: bool) -> Tensor:
    """`lidnet_fast.reference.gradient_gramian`, each gradient read once."""
    return torch.ops.lidnet_fast.gradient_gramian(gradients, per_sample)


def combine_gradients(gradients: Tensor, coefficients: Tensor, dtype: torch.dtype) -> Tensor:
    """`lidnet_fast.reference.combine_gradients`, each gradient read once."""
    return torch.ops.lidnet_fast.combine_gradients(gradients, coefficients.to(dtype))


def roi_windows(images: Tensor, corners: Tensor, size: Sequence[int]) -> Tensor:
    """`lidnet_fast.reference.roi_windows`, in one pass, and with a gradient that is the same every time."""
    return torch.ops.lidnet_fast.roi_windows(images, corners, size)


def _assign_levels(
    inputs: Sequence[Tensor], rois: Tensor, image_height: int, canonical_scale: float, canonical_level: int
) -> tuple[Tensor, list[float]]:
    """The level of each box, int64 [K], and the spatial scale of each level."""
    from .reference.pyramid import assign_levels, pyramid_exponents

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


@torch.library.register_fake("lidnet_fast::roi_perceptual_losses")
def _(inputs: list[Tensor], targets: list[Tensor], rois: Tensor, *options: Any) -> Tensor:
    return rois.new_empty(rois.shape[0])


@torch.library.register_fake("lidnet_fast::roi_perceptual_losses_backward")
def _(grad_losses: Tensor, inputs: list[Tensor], *arguments: Any) -> list[Tensor]:
    return [torch.empty_like(input) for input in inputs]


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


@torch.library.register_fake("lidnet_fast::multi_loss")
def _(
    input: Tensor, target: Tensor, terms: list[str], weights: list[float], *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(input.dtype)
    gradient = input.new_empty(input.shape if options[-1] else (0,), dtype=dtype)
    return input.new_empty((), dtype=dtype), input.new_empty(len(terms), dtype=dtype), gradient


@torch.library.register_fake("lidnet_fast::multi_loss_backward")
def _(grad_total: Tensor, gradient: Tensor, input: Tensor) -> Tensor:
    return torch.empty_like(gradient, dtype=input.dtype)


@torch.library.register_fake("lidnet_fast::multi_loss_jacobian")
def _(input: Tensor, target: Tensor, terms: list[str], *options: Any) -> Tensor:
    return input.new_empty((len(terms), *input.shape), dtype=compute_dtype(input.dtype))


@torch.library.register_fake("lidnet_fast::gradient_gramian")
def _(gradients: Tensor, per_sample: bool) -> Tensor:
    count = gradients.shape[0]
    shape = (gradients.shape[1], count, count) if per_sample else (count, count)
    return gradients.new_empty(shape, dtype=compute_dtype(gradients.dtype))


@torch.library.register_fake("lidnet_fast::combine_gradients")
def _(gradients: Tensor, coefficients: Tensor) -> Tensor:
    return gradients.new_empty(gradients.shape[1:])


@torch.library.register_fake("lidnet_fast::roi_windows")
def _(images: Tensor, corners: Tensor, size: Sequence[int]) -> Tensor:
    return images.new_empty((corners.shape[0], images.shape[1], *size))


@torch.library.register_fake("lidnet_fast::roi_windows_backward")
def _(grad_windows: Tensor, corners: Tensor, shape: Sequence[int]) -> Tensor:
    return grad_windows.new_empty(tuple(shape))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    features, targets, rois, box_levels, *ctx.options = inputs
    ctx.levels = len(features)
    ctx.has_box_levels = box_levels is not None
    ctx.save_for_backward(*features, *targets, rois, *([box_levels] if ctx.has_box_levels else []))


def _backward(ctx: Any, grad_losses: Tensor) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    inputs, targets, rois = saved[: ctx.levels], saved[ctx.levels : 2 * ctx.levels], saved[2 * ctx.levels]
    box_levels = saved[-1] if ctx.has_box_levels else None
    gradients = torch.ops.lidnet_fast.roi_perceptual_losses_backward(
        grad_losses, inputs, targets, rois, box_levels, *ctx.options
    )
    return (gradients, [None] * ctx.levels, None, None, *(None for _ in ctx.options))


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


def _save_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    input, target, ctx.terms, ctx.weights, rois, *ctx.options = inputs
    _, values, gradient = output
    ctx.mark_non_differentiable(values, gradient)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(input, target, rois)
    ctx.gradient = gradient


def _scale_gradient(ctx: Any, grad_total: Tensor | None, *_: Any) -> tuple[Any, ...]:
    nothing = (None,) * (4 + len(ctx.options))
    if grad_total is None:
        return (None, *nothing)
    input, target, rois = ctx.saved_tensors
    # The gradient, as large as the images, is handed over rather than copied. Who walks the graph once more, which is
    # rare, pays with another sweep.
    gradient, ctx.gradient = ctx.gradient, None
    if gradient is None:
        arguments = (target, ctx.terms, ctx.weights, rois, *ctx.options)
        _, _, gradient = torch.ops.lidnet_fast.multi_loss(input.detach(), *arguments)
    if torch.is_grad_enabled() or type(gradient) is not Tensor:  # a second derivative is meant, or a graph traced
        return (torch.ops.lidnet_fast.multi_loss_backward(grad_total, gradient, input), *nothing)
    # Most upstream gradients of a loss are 1. Asking costs less than a pass over the gradient, but on CUDA would wait.
    if _is_transformed() or gradient.device.type != "cpu" or grad_total.item() != 1:
        gradient.mul_(grad_total)
    return (gradient.to(input.dtype), *nothing)


class _MultiLoss(torch.autograd.Function):
    """What is registered for `multi_loss`, without the dispatcher's detour by Python: half the time of a small call."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            output = torch.ops.lidnet_fast.multi_loss.default(*arguments)
        _save_gradient(ctx, arguments, output)
        return output

    backward = staticmethod(_scale_gradient)


def _is_transformed() -> bool:
    """Whether more than plain autograd wants to see the op: torch.compile, torch.export, torch.func or a mode."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
    )


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))
    ctx.per_sample = inputs[1]


def _gramian_backward(ctx: Any, grad_gramian: Tensor) -> tuple[Tensor, None]:
    (gradients,) = ctx.saved_tensors
    rows = gradients.to(grad_gramian.dtype)
    rows = rows.flatten(2).transpose(0, 1) if ctx.per_sample else rows.flatten(1)
    result = (grad_gramian + grad_gramian.mT) @ rows
    result = result.transpose(0, 1) if ctx.per_sample else result
    return result.reshape(gradients.shape).to(gradients.dtype), None


def _combine_backward(ctx: Any, grad_combined: Tensor) -> tuple[Tensor | None, Tensor | None]:
    gradients, coefficients = ctx.saved_tensors
    upstream = grad_combined.to(coefficients.dtype)
    of_gradients, of_coefficients = ctx.needs_input_grad
    shape = (-1,) + (1,) * upstream.ndim
    return (
        (coefficients.view(shape) * upstream).to(gradients.dtype) if of_gradients else None,
        gradients.to(coefficients.dtype).flatten(1) @ upstream.flatten() if of_coefficients else None,
    )


def _save_corners(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, corners, _ = inputs
    ctx.save_for_backward(corners)
    ctx.shape = inputs[0].shape


def _add_windows(ctx: Any, grad_windows: Tensor) -> tuple[Any, ...]:
    return torch.ops.lidnet_fast.roi_windows_backward(grad_windows, *ctx.saved_tensors, ctx.shape), None, None


def _cut_windows(ctx: Any, grad_images: Tensor) -> tuple[Any, ...]:
    return torch.ops.lidnet_fast.roi_windows(grad_images, *ctx.saved_tensors, ctx.shape[2:]), None, None


def _refuse_double_backward(ctx: Any, *grads: Any) -> None:
    raise NotImplementedError(
        "the fused losses can't be differentiated twice; "
        'lidnet_fast.backend.use("reference") chooses the definition, which can'
    )


def _refuse_vmap(info: Any, in_dims: Any, *arguments: Any) -> None:
    raise NotImplementedError(
        "the fused ops on boxes don't run under torch.vmap: make the mapped dimension part of the batch, "
        "with each box's batch index pointing at its image"
    )


def _refuse_vmap_of_images(info: Any, in_dims: Any, *arguments: Any) -> None:
    raise NotImplementedError(
        "the fused multi_loss doesn't run under torch.vmap: make the mapped dimension part of the batch"
    )


torch.library.register_autograd("lidnet_fast::roi_perceptual_losses", _backward, setup_context=_save)
torch.library.register_autograd("lidnet_fast::roi_perceptual_losses_backward", _refuse_double_backward)
torch.library.register_autograd("lidnet_fast::roi_align", _spread, setup_context=_save_shapes)
torch.library.register_autograd("lidnet_fast::roi_align_backward", _pool, setup_context=_save_pooling)
torch.library.register_autograd("lidnet_fast::multi_loss", _scale_gradient, setup_context=_save_gradient)
torch.library.register_autograd("lidnet_fast::multi_loss_backward", _refuse_double_backward)
torch.library.register_autograd("lidnet_fast::gradient_gramian", _gramian_backward, setup_context=_save_inputs)
torch.library.register_autograd("lidnet_fast::combine_gradients", _combine_backward, setup_context=_save_inputs)
torch.library.register_autograd("lidnet_fast::roi_windows", _add_windows, setup_context=_save_corners)
torch.library.register_autograd("lidnet_fast::roi_windows_backward", _cut_windows, setup_context=_save_corners)
torch.library.register_vmap("lidnet_fast::multi_loss", _refuse_vmap_of_images)
torch.library.register_vmap("lidnet_fast::multi_loss_jacobian", _refuse_vmap_of_images)
for _op in ("roi_align", "roi_align_backward", "roi_perceptual_losses", "roi_perceptual_losses_backward"):
    torch.library.register_vmap(f"lidnet_fast::{_op}", _refuse_vmap)


@torch.library.impl(_library, "multi_loss_backward", "CompositeExplicitAutograd")
def _(grad_total: Tensor, gradient: Tensor, input: Tensor) -> Tensor:
    return (gradient * grad_total).to(input.dtype)


@torch.library.impl(_library, "roi_perceptual_losses", "CUDA")
def _(*arguments: Any) -> Tensor:
    from .kernels.roi_perceptual import roi_perceptual_losses

    return roi_perceptual_losses(*arguments)


@torch.library.impl(_library, "roi_perceptual_losses_backward", "CUDA")
def _(*arguments: Any) -> list[Tensor]:
    from .kernels.roi_perceptual import roi_perceptual_losses_backward

    return roi_perceptual_losses_backward(*arguments)


@torch.library.impl(_library, "roi_windows", "CUDA")
def _(*arguments: Any) -> Tensor:
    from .kernels.roi_windows import roi_windows

    return roi_windows(*arguments)


@torch.library.impl(_library, "roi_windows_backward", "CUDA")
def _(*arguments: Any) -> Tensor:
    from .kernels.roi_windows import roi_windows_backward

    return roi_windows_backward(*arguments)
