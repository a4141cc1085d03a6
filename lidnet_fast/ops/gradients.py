"""Gramian and combination of several losses' gradients."""

from typing import Any

import torch
from torch import Tensor

from lidnet_fast._tensors import compute_dtype

from ._library import define, differentiate, keep

define("gradient_gramian(Tensor gradients, bool per_sample) -> Tensor")
define("combine_gradients(Tensor gradients, Tensor coefficients) -> Tensor")


@torch.library.register_fake("lidnet_fast::gradient_gramian")
def _(gradients: Tensor, per_sample: bool) -> Tensor:
    count = gradients.shape[0]
    shape = (gradients.shape[1], count, count) if per_sample else (count, count)
    return gradients.new_empty(shape, dtype=compute_dtype(gradients.dtype))


@torch.library.register_fake("lidnet_fast::combine_gradients")
def _(gradients: Tensor, coefficients: Tensor) -> Tensor:
    return gradients.new_empty(gradients.shape[1:])


def _save_gradients(ctx: Any, arguments: tuple[Tensor, bool], output: Tensor) -> None:
    gradients, ctx.per_sample = arguments
    keep(ctx, gradients)


def _rows(gradients: Tensor, per_sample: bool) -> Tensor:
    """[T, elements], or per sample [N, T, elements], in the dtype of the arithmetic."""
    rows = gradients.to(compute_dtype(gradients.dtype))
    return rows.flatten(2).transpose(0, 1) if per_sample else rows.flatten(1)


def _gramian_backward(ctx: Any, grad_gramian: Tensor) -> tuple[Tensor, None]:
    (gradients,) = ctx.saved_tensors
    result = (grad_gramian + grad_gramian.mT) @ _rows(gradients, ctx.per_sample)
    result = result.transpose(0, 1) if ctx.per_sample else result
    return result.reshape(gradients.shape).to(gradients.dtype), None


def _gramian_tangent(ctx: Any, tangent: Tensor, _: None) -> Tensor:
    (gradients,) = ctx.saved_tensors
    products = _rows(tangent, ctx.per_sample) @ _rows(gradients, ctx.per_sample).mT
    return products + products.mT


def _save_both(ctx: Any, arguments: tuple[Tensor, Tensor], output: Tensor) -> None:
    keep(ctx, *arguments)


def _combine_backward(ctx: Any, grad_combined: Tensor) -> tuple[Tensor | None, Tensor | None]:
    gradients, coefficients = ctx.saved_tensors
    upstream = grad_combined.to(coefficients.dtype)
    of_gradients, of_coefficients = ctx.needs
    shape = (-1,) + (1,) * upstream.ndim
    return (
        (coefficients.view(shape) * upstream).to(gradients.dtype) if of_gradients else None,
        gradients.to(coefficients.dtype).flatten(1) @ upstream.reshape(-1) if of_coefficients else None,
    )


def _combine_tangent(ctx: Any, of_gradients: Tensor | None, of_coefficients: Tensor | None) -> Tensor:
    gradients, coefficients = ctx.saved_tensors
    combine = torch.ops.lidnet_fast.combine_gradients
    parts = [] if of_gradients is None else [combine(of_gradients, coefficients)]
    parts += [] if of_coefficients is None else [combine(gradients, of_coefficients)]
    return torch.stack(parts).sum(0)


differentiate("gradient_gramian", _save_gradients, _gramian_backward, _gramian_tangent)
differentiate("combine_gradients", _save_both, _combine_backward, _combine_tangent)
