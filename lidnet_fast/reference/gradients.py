"""Gradients of several losses at one tensor: their inner products and their combination."""

import torch
from torch import Tensor

from lidnet_fast._tensors import compute_dtype


def gradient_gramian(gradients: Tensor, per_sample: bool) -> Tensor:
    """G[i, j] = <g_i, g_j>, in the dtype of the arithmetic: [T, T] over all elements of gradients [T, ...].

    With `per_sample` over each sample's elements of gradients [T, N, ...]: [N, T, T].
    """
    rows = gradients.flatten(2).transpose(0, 1) if per_sample else gradients.flatten(1)
    rows = rows.to(compute_dtype(gradients.dtype))
    return rows @ rows.mT


def combine_gradients(gradients: Tensor, coefficients: Tensor) -> Tensor:
    """Sum over t of coefficients[t] * gradients[t], in the dtype of `coefficients`; returned in that of `gradients`."""
    return torch.tensordot(coefficients, gradients.to(coefficients.dtype), dims=1).to(gradients.dtype)
