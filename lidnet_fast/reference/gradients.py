"""Gradients of several losses at one tensor: their inner products and their combination."""

import torch
from torch import Tensor


def gradient_gramian(gradients: Tensor, dtype: torch.dtype, per_sample: bool) -> Tensor:
    """G[i, j] = <g_i, g_j>, in `dtype`: [T, T] over all elements of gradients [T, ...].

    With `per_sample` over each sample's elements of gradients [T, N, ...]: [N, T, T].
    """
    rows = gradients.flatten(2).transpose(0, 1) if per_sample else gradients.flatten(1)
    rows = rows.to(dtype)
    return rows @ rows.mT


def combine_gradients(gradients: Tensor, coefficients: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum over t of coefficients[t] * gradients[t], computed in `dtype`, returned in the dtype of `gradients`."""
    return torch.tensordot(coefficients.to(dtype), gradients.to(dtype), dims=1).to(gradients.dtype)
