"""The pixel losses, all terms in one sweep over the images."""

from typing import Any

import torch
from torch import Tensor

from lidnet_fast._tensors import compute_dtype, in_forward_mode

from ._library import (
    define,
    differentiate,
    is_batched,
    keep,
    library,
    refuse_second_derivative,
    refuse_tangents,
)

_REMEDY = 'call lidnet_fast.backend.use("reference") for the definition'
_IMAGES = "Tensor input, Tensor target, str[] terms"
_OPTIONS = "Tensor? rois, float roi_weight, float data_range"

# The gradient comes with the value, in the dtype of the arithmetic: one sweep over the images gives both.
define(
    f"multi_loss({_IMAGES}, float[] weights, {_OPTIONS}, bool with_gradient) "
    "-> (Tensor total, Tensor values, Tensor gradient)"
)
# The gradient of the total as a function of `input`, so that its derivative, which no kernel computes, is refused.
define("multi_loss_backward(Tensor grad_total, Tensor gradient, Tensor input) -> Tensor")
define(f"multi_loss_jacobian({_IMAGES}, {_OPTIONS}) -> Tensor")


@torch.library.register_fake("lidnet_fast::multi_loss")
def _(input: Tensor, target: Tensor, terms: list[str], *options: Any) -> tuple[Tensor, Tensor, Tensor]:
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


def _save_gradient(ctx: Any, arguments: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    input, target, *ctx.options, rois, roi_weight, data_range, with_gradient = arguments
    ctx.options += [roi_weight, data_range]
    _, values, gradient = output
    ctx.mark_non_differentiable(values, gradient)
    keep(ctx, input, target, rois)
    ctx.gradient = gradient if with_gradient else None


def _take_gradient(ctx: Any) -> Tensor:
    """The gradient of the total.

    As large as the images, it is handed over rather than copied. A second walk through the graph, which is rare, costs
    another sweep.
    """
    gradient, ctx.gradient = ctx.gradient, None
    if gradient is None:
        input, target, rois = ctx.saved_tensors
        terms, weights, roi_weight, data_range = ctx.options
        arguments = (target, terms, weights, rois, roi_weight, data_range, True)
        _, _, gradient = torch.ops.lidnet_fast.multi_loss(input.detach(), *arguments)
    return gradient


def _scale_gradient(ctx: Any, grad_total: Tensor | None, *_: Any) -> tuple[Any, ...]:
    nothing = (None,) * 7
    if grad_total is None:
        return (None, *nothing)
    input = ctx.saved_tensors[0]
    gradient = _take_gradient(ctx)
    # A second derivative is meant, or a graph traced, or a gradient batched: nothing may happen in place.
    is_plain = type(gradient) is Tensor and not is_batched(grad_total) and not _is_transformed()
    if torch.is_grad_enabled() or in_forward_mode() or not is_plain:
        return (torch.ops.lidnet_fast.multi_loss_backward(grad_total, gradient, input), *nothing)
    # Most upstream gradients of a loss are 1. Asking costs less than a pass over the gradient, but on CUDA would wait.
    if gradient.device.type != "cpu" or grad_total.item() != 1:
        gradient.mul_(grad_total)
    return (gradient.to(input.dtype), *nothing)


def _total_tangent(ctx: Any, tangent: Tensor | None, of_target: Tensor | None, *_: Any) -> tuple[Tensor, None, None]:
    refuse_tangents("multi_loss", target=of_target)
    assert tangent is not None
    input = ctx.saved_tensors[0]
    gradient = _take_gradient(ctx)
    one = gradient.new_ones(())
    gradient = torch.ops.lidnet_fast.multi_loss_backward(one, gradient, input.to(gradient.dtype))
    return (gradient * tangent.to(gradient.dtype)).sum(), None, None


def _save_nothing(ctx: Any, arguments: tuple[Any, ...], output: Tensor) -> None:
    ctx.mark_non_differentiable(output)


def _no_gradient(ctx: Any, *_: Any) -> tuple[None, ...]:
    return (None,) * 6


def _no_tangent(ctx: Any, *tangents: Any) -> None:
    raise NotImplementedError("multi_loss_jacobian has no derivative in input. To fix: pass input.detach()")


def _is_transformed() -> bool:
    """Whether more than plain autograd wants to see the op: torch.compile, torch.export, torch.func or a mode."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
    )


def _save_factors(ctx: Any, arguments: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    grad_total, gradient, _ = arguments
    keep(ctx, grad_total, gradient)
    ctx.dtype = output.dtype


def _unscale(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    of_grad_total, of_gradient, of_input = ctx.needs
    if of_input:
        refuse_second_derivative(_REMEDY)
    grad_total, gradient = ctx.saved_tensors
    wide = upstream.to(gradient.dtype)
    return (wide * gradient).sum() if of_grad_total else None, wide * grad_total if of_gradient else None, None


def _scaled_tangent(ctx: Any, of_grad_total: Tensor | None, of_gradient: Tensor | None, of_input: Tensor | None) -> Any:
    if of_input is not None:
        refuse_second_derivative(_REMEDY)
    grad_total, gradient = ctx.saved_tensors
    parts = [] if of_grad_total is None else [gradient * of_grad_total]
    parts += [] if of_gradient is None else [of_gradient * grad_total]
    return torch.stack(parts).sum(0).to(ctx.dtype)


differentiate("multi_loss", _save_gradient, _scale_gradient, _total_tangent)
differentiate("multi_loss_backward", _save_factors, _unscale, _scaled_tangent)
differentiate("multi_loss_jacobian", _save_nothing, _no_gradient, _no_tangent)
