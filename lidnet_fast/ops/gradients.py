"""Gramian and combination of several losses' gradients."""

from typing import Any

import torch
from torch import Tensor

from lidnet_fast._checks import compute_dtype

from ._library import define

define("gradient_gramian(Tensor gradients, bool per_sample) -> Tensor")
define("combine_gradients(Tensor gradients, Tensor coefficients) -> Tensor")


def gradient_gramian(gradients: Tensor, dtype: torch.dtype, per_sample: bool) -> Tensor:
    """`lidnet_fast.reference.gradient_gramian`, each gradient read once."""
    return torch.ops.lidnet_fast.gradient_gramian(gradients, per_sample)


def combine_gradients(gradients: Tensor, coefficients: Tensor, dtype: torch.dtype) -> Tensor:
    """`lidnet_fast.reference.combine_gradients`, each gradient read once."""
    return torch.ops.lidnet_fast.combine_gradients(gradients, coefficients.to(dtype))


@torch.library.register_fake("lidnet_fast::gradient_gramian")
def _(gradients: Tensor, per_sample: bool) -> Tensor:
    count = gradients.shape[0]
    shape = (gradients.shape[1], count, count) if per_sample else (count, count)
    return gradients.new_empty(shape, dtype=compute_dtype(gradients.dtype))


@torch.library.register_fake("lidnet_fast::combine_gradients")
def _(gradients: Tensor, coefficients: Tensor) -> Tensor:
    return gradients.new_empty(gradients.shape[1:])


def _keep_for_gramian(ctx: Any, inputs: tuple[Tensor, bool], output: Tensor) -> None:
    gradients, ctx.per_sample = inputs
    ctx.save_for_backward(gradients)


def _keep_for_combination(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


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


torch.library.register_autograd("lidnet_fast::gradient_gramian", _gramian_backward, setup_context=_keep_for_gramian)
torch.library.register_autograd(
    "lidnet_fast::combine_gradients", _combine_backward, setup_context=_keep_for_combination
)
