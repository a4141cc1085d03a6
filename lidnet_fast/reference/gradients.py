"""Gradients of several losses at one tensor: their inner products and their combination."""

import torch
from torch import Tensor


def gradient_gramian(gradients: Tensor, dtype: torch.dtype) -> Tensor:
    """G[i, j] = <g_i, g_j> over all elements: Tensor[T, T] in `dtype`, for gradients [T, ...]."""
    rows = gradients.flatten(1).to(dtype)
    return rows @ rows.T


def combine_gradients(gradients: Tensor, coefficients: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum over t of coefficients[t] * gradients[t], computed in `dtype`, returned in the dtype of `gradients`."""
    return torch.tensordot(coefficients.to(dtype), gradients.to(dtype), dims=1).to(gradients.dtype)
