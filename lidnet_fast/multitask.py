"""One backward pass for several losses that meet in a shared tensor, with weights chosen from their gradients."""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .functional import MultiLossOutput, combine_gradients, gradient_gramian

__all__ = ["MTLBackwardOutput", "Weighting", "mtl_backward"]

Weighting = Callable[[Tensor], Tensor]

# Name -> TorchJD's class: those that need the Gramian alone, no arguments, and keep nothing from call to call.
_TORCHJD_WEIGHTINGS = {
    "aligned_mtl": "AlignedMTLWeighting",
    "dualproj": "DualProjWeighting",
    "imtl_g": "IMTLGWeighting",
    "mgda": "MGDAWeighting",
    "pcgrad": "PCGradWeighting",
    "upgrad": "UPGradWeighting",
}
# TorchJD's weightings that a Gramian of one batch would satisfy in form but not in meaning.
_NOT_OF_A_GRAMIAN = ("ExcessMTLWeighting", "MoDoWeighting", "SDMGradWeighting")


class MTLBackwardOutput(NamedTuple):
    """What `mtl_backward` found, for logs. T losses, in the order given; all detached.

    Attributes:
        weights: [T], the coefficients of the combined gradient.
        gramian: [T, T], inner products of the losses' gradients at the shared tensor.
        norms: [T], the gradients' Euclidean norms.
        cosines: [T, T], the gradients' cosines; 0 where one of them is zero.
    """

    weights: Tensor
    gramian: Tensor
    norms: Tensor
    cosines: Tensor


def mtl_backward(
    losses: Sequence[Tensor] | Mapping[str, Tensor], shared: Tensor, weighting: str | Weighting = "sum"
) -> MTLBackwardOutput:
    """Backward pass of several losses through one shared tensor, such as the denoised image.

    Takes each loss's gradient g_t at `shared`, their Gramian, weights w from it, and runs one backward pass below
    `shared` with sum over t of w_t g_t. Parameters below `shared` accumulate the result in `.grad`, as after
    `loss.backward()`; those between `shared` and a loss get nothing. The graph is freed.

        denoised = denoiser(low_dose)
        pixels = multi_loss(denoised, normal_dose, {"mse": 1.0, "ssim": 0.1})
        mtl_backward({"pixels": pixels.total, "lesions": loss(denoised, normal_dose, boxes)}, denoised, "upgrad")
        optimizer.step()

    Args:
        losses: T scalars, each depending on `shared`, such as `multi_loss`'s `total`; names, if any, are for error
            messages.
        shared: Floating-point tensor that requires a gradient, a leaf or not.
        weighting: "sum" (w = 1, the plain sum's gradient), "mean" (w = 1 / T), or a weighting from TorchJD (Quinton and
            Rey, "Jacobian Descent for Multi-Objective Optimization", arXiv:2406.16232) by name: "upgrad", "dualproj"
            (both need `pip install "lidnet_fast[quadprog]"`), "mgda", "pcgrad", "aligned_mtl", "imtl_g". Or any
            callable from the Gramian [T, T] to weights [T], which is how to pass options, weightings that keep state,
            or one of your own.

    Returns:
        MTLBackwardOutput(weights, gramian, norms, cosines), in float32 (float64 for a float64 `shared`).

    Raises:
        TypeError: If `losses` or `shared` aren't tensors, or `weighting` can't work from a Gramian (a TorchJD
            Aggregator, or a TorchJD weighting that needs gradients of more than one batch or the gradients themselves).
        ValueError: If there is no loss, a loss isn't a scalar or doesn't depend on `shared`, `shared` needs no
            gradient, the weighting is unknown, or its result doesn't have shape [T].
        ImportError: If the weighting needs a package that isn't installed.
    """
    if isinstance(losses, MultiLossOutput):
        raise TypeError("losses must be several, got one MultiLossOutput. To fix: pass [its .total, further losses]")
    named = dict(losses) if isinstance(losses, Mapping) else {str(n): loss for n, loss in enumerate(losses)}
    _check(named, shared)
    weigh = _resolve(weighting)
    gradients = _gradients(named, shared)
    gramian = gradient_gramian(gradients)
    weights = torch.as_tensor(weigh(gramian), device=gramian.device).detach().to(gramian)
    if weights.shape != (len(named),):
        raise ValueError(f"weighting must give {len(named)} weights, one per loss, got shape {tuple(weights.shape)}")
    shared.backward(gradient=combine_gradients(gradients, weights))
    norms = gramian.diagonal().sqrt()
    products = torch.outer(norms, norms)
    cosines = torch.where(products > 0, gramian / products, 0.0)
    return MTLBackwardOutput(weights, gramian, norms, cosines)


def check_weighting(weighting: str | Weighting) -> None:
    """Whether `mtl_backward` could run with this weighting here.

    Raises:
        TypeError: As `mtl_backward`.
        ValueError: As `mtl_backward`.
        ImportError: As `mtl_backward`.
    """
    weigh = _resolve(weighting)
    if isinstance(weighting, str):
        weigh(torch.eye(2, device="cpu"))  # some of TorchJD's look for their solver only now


def _check(losses: Mapping[str, Tensor], shared: Tensor) -> None:
    if not losses:
        raise ValueError("losses must hold at least one loss, got none")
    if not isinstance(shared, Tensor):
        raise TypeError(f"shared must be a Tensor, got {type(shared).__name__}")
    if not shared.requires_grad:
        raise ValueError("shared must require a gradient, got one that doesn't")
    for name, loss in losses.items():
        if not isinstance(loss, Tensor):
            total = ". To fix: pass its .total" if isinstance(loss, MultiLossOutput) else ""
            raise TypeError(f"losses[{name}] must be a Tensor, got {type(loss).__name__}{total}")
        if loss.ndim:
            raise ValueError(f"losses[{name}] must be a scalar, got shape {tuple(loss.shape)}")
        if not loss.requires_grad:
            raise ValueError(
                f"losses[{name}] must depend on shared, got one without a graph. To fix: of multi_loss, take `total`; "
                "its `terms` are detached"
            )


def _gradients(losses: Mapping[str, Tensor], shared: Tensor) -> Tensor:
    gradients = []
    for left, (name, loss) in enumerate(losses.items(), start=1 - len(losses)):
        # Losses may share what lies above `shared` (one detector pass for two of them), so the graph stays to the last.
        (gradient,) = torch.autograd.grad(loss, shared, retain_graph=left < 0, allow_unused=True)
        if gradient is None:
            raise ValueError(f"losses[{name}] must depend on shared, got one that doesn't")
        gradients.append(gradient)
    # At least two dimensions, also for a shared scalar.
    return torch.stack(gradients).reshape(len(gradients), *(shared.shape or (1,)))


def _sum(gramian: Tensor) -> Tensor:
    return gramian.new_ones(gramian.shape[0])


def _mean(gramian: Tensor) -> Tensor:
    return gramian.new_full((gramian.shape[0],), 1 / gramian.shape[0])


def _resolve(weighting: str | Weighting) -> Weighting:
    if not isinstance(weighting, str):
        return _check_callable(weighting)
    if weighting in ("sum", "mean"):
        return _sum if weighting == "sum" else _mean
    if weighting not in _TORCHJD_WEIGHTINGS:
        known = ", ".join(("sum", "mean", *sorted(_TORCHJD_WEIGHTINGS)))
        raise ValueError(f"weighting must be a callable or one of {known}, got {weighting!r}")
    try:
        from torchjd import aggregation
    except ImportError as error:
        raise ImportError(f"weighting {weighting!r} needs TorchJD: pip install torchjd") from error
    return getattr(aggregation, _TORCHJD_WEIGHTINGS[weighting])()


def _check_callable(weighting: Weighting) -> Weighting:
    if not callable(weighting):
        raise TypeError(f"weighting must be a name or a callable, got {type(weighting).__name__}")
    # An object of TorchJD's can only be here if TorchJD is loaded.
    aggregation = sys.modules.get("torchjd.aggregation")
    if aggregation is not None:
        kind = type(weighting).__name__
        if isinstance(weighting, aggregation.Aggregator):
            raise TypeError(f"weighting must turn a Gramian into weights; {kind} is an Aggregator, use {kind}Weighting")
        if isinstance(weighting, aggregation.Weighting) and kind in _NOT_OF_A_GRAMIAN:
            raise TypeError(f"weighting {kind} can't work from the Gramian of one batch")
    return weighting
