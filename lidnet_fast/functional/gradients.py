"""Inner products and linear combinations of gradients."""

from torch import Tensor

from lidnet_fast import backend
from lidnet_fast._checks import check_bool, check_float
from lidnet_fast._tensors import compute_dtype

from ._autocast import without_autocast


def gradient_gramian(gradients: Tensor, *, per_sample: bool = False) -> Tensor:
    """Inner products of T gradients of one tensor, G[i, j] = <g_i, g_j> over all elements, or over each sample's.

    Args:
        gradients: Tensor[T, ...], at least two dimensions, T >= 1; for example from `multi_loss_jacobian`. With
            `per_sample` Tensor[T, N, ...], at least three.
        per_sample: Whether each of N samples gets a Gramian of its own.

    Returns:
        Tensor[T, T], with `per_sample` Tensor[N, T, T], in float32 (float64 for float64 gradients). Differentiable.

    Raises:
        TypeError: If `gradients` isn't a floating-point Tensor, or `per_sample` not a bool.
        ValueError: If it has too few dimensions or no gradient in it.
    """
    check_bool("per_sample", per_sample)
    _check_gradients(gradients, "[T, N, ...]" if per_sample else "[T, ...]")
    with without_autocast(gradients):
        return backend.implementation("gradient_gramian", gradients.device)(gradients, per_sample)


def combine_gradients(gradients: Tensor, coefficients: Tensor) -> Tensor:
    """Linear combination of T gradients, sum over t of coefficients[t] * gradients[t].

    Args:
        gradients: Tensor[T, ...], at least two dimensions, T >= 1.
        coefficients: Floating-point Tensor[T] on the same device.

    Returns:
        Tensor[...] in the dtype of `gradients`, summed in float32 (float64 for float64 gradients).

    Raises:
        TypeError: If an argument isn't a floating-point Tensor.
        ValueError: If the shapes or devices don't fit.
    """
    _check_gradients(gradients)
    check_float("coefficients", coefficients)
    if coefficients.shape != gradients.shape[:1]:
        raise ValueError(
            f"coefficients must have shape ({gradients.shape[0]},), one per gradient, got {tuple(coefficients.shape)}"
        )
    if coefficients.device != gradients.device:
        raise ValueError(
            f"coefficients must be on the device of gradients, {gradients.device}, got {coefficients.device}"
        )
    with without_autocast(gradients):
        return backend.implementation("combine_gradients", gradients.device)(
            gradients, coefficients.to(compute_dtype(gradients.dtype))
        )


def _check_gradients(gradients: Tensor, shape: str = "[T, ...]") -> None:
    check_float("gradients", gradients)
    if gradients.ndim <= shape.count(",") or gradients.shape[0] == 0:
        raise ValueError(f"gradients must have shape {shape} with T >= 1, got {tuple(gradients.shape)}")
