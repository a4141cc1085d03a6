"""The pixel losses, all terms in one sweep over the images."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lidnet_fast._checks import compute_dtype

from ._library import define, library, refuse_double_backward

# The gradient comes with the value, in the dtype of the arithmetic: one sweep over the images gives both.
define(
    "multi_loss(Tensor input, Tensor target, str[] terms, float[] weights, Tensor? rois, float roi_weight, "
    "float data_range, bool with_gradient) -> (Tensor total, Tensor values, Tensor gradient)"
)
define("multi_loss_backward(Tensor grad_total, Tensor gradient, Tensor input) -> Tensor")
define(
    "multi_loss_jacobian(Tensor input, Tensor target, str[] terms, Tensor? rois, float roi_weight, float data_range) "
    "-> Tensor"
)


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
        from lidnet_fast import reference

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
        from lidnet_fast import reference

        return reference.multi_loss_jacobian(
            input, target, terms, rois=rois, roi_weight=roi_weight, data_range=data_range, dtype=dtype
        )
    return torch.ops.lidnet_fast.multi_loss_jacobian(input.detach(), target, list(terms), rois, roi_weight, data_range)


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


@torch.library.impl(library, "multi_loss_backward", "CompositeExplicitAutograd")
def _(grad_total: Tensor, gradient: Tensor, input: Tensor) -> Tensor:
    return (gradient * grad_total).to(input.dtype)


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


def _refuse_vmap(info: Any, in_dims: Any, *arguments: Any) -> None:
    raise NotImplementedError(
        "the fused multi_loss doesn't run under torch.vmap: make the mapped dimension part of the batch"
    )


torch.library.register_autograd("lidnet_fast::multi_loss", _scale_gradient, setup_context=_save_gradient)
torch.library.register_autograd("lidnet_fast::multi_loss_backward", refuse_double_backward)
torch.library.register_vmap("lidnet_fast::multi_loss", _refuse_vmap)
torch.library.register_vmap("lidnet_fast::multi_loss_jacobian", _refuse_vmap)
