"""The fused ops as PyTorch sees them: schemas, fakes, autograd, vmap, and which kernel runs on which device.

Each public function here has the signature of its definition in `lidnet_fast.reference`, and is reached through
`lidnet_fast.functional`, which checks the arguments. CPU kernels register themselves when `lidnet_fast.backend` loads
the C++ extension; CUDA kernels are Triton's, imported at the first call with a CUDA tensor.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["multiscale_roi_perceptual_loss", "roi_perceptual_loss"]

_library = torch.library.Library("lidnet_fast", "DEF")

_ARGUMENTS = (
    "Tensor[] inputs, Tensor[] targets, Tensor rois, Tensor? box_levels, float[] spatial_scales, "
    "SymInt[] output_size, int sampling_ratio, bool aligned, str criterion"
)
# Both are of the loss per box, before weights and reduction: those are a few plain operations on K values, and leave
# every upstream gradient to autograd.
_library.define(f"roi_perceptual_losses({_ARGUMENTS}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_library.define(
    f"roi_perceptual_losses_backward(Tensor grad_losses, {_ARGUMENTS}) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)


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
        *_dense([input], [target]), rois, None, [spatial_scale], output_size, sampling_ratio, aligned, criterion
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
    from .reference.multiscale_roi_perceptual import assign_levels, pyramid_exponents
    from .reference.roi_perceptual import reduce_boxes

    exponents = pyramid_exponents([level.shape[2] for level in inputs], image_height)
    losses = torch.ops.lidnet_fast.roi_perceptual_losses(
        *_dense(inputs, targets),
        rois,
        assign_levels(rois, exponents[0], exponents[-1], canonical_scale, canonical_level),
        [2.0**-exponent for exponent in exponents],
        output_size,
        sampling_ratio,
        aligned,
        criterion,
    )
    return reduce_boxes(losses, box_weights, reduction)


def _dense(inputs: Sequence[Tensor], targets: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Each pair contiguous, or channels_last where the input is: what the kernels on the CPU read."""
    pairs = []
    for input, target in zip(inputs, targets, strict=True):
        form = torch.contiguous_format
        if not input.is_contiguous() and input.stride(1) == 1:
            form = torch.channels_last if input.ndim == 4 else torch.channels_last_3d
        pairs.append((input.contiguous(memory_format=form), target.contiguous(memory_format=form)))
    return [input for input, _ in pairs], [target for _, target in pairs]


@torch.library.register_fake("lidnet_fast::roi_perceptual_losses")
def _(inputs: list[Tensor], targets: list[Tensor], rois: Tensor, *options: Any) -> Tensor:
    return rois.new_empty(rois.shape[0])


@torch.library.register_fake("lidnet_fast::roi_perceptual_losses_backward")
def _(grad_losses: Tensor, inputs: list[Tensor], *arguments: Any) -> list[Tensor]:
    return [torch.empty_like(input) for input in inputs]


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


def _refuse_double_backward(ctx: Any, *grads: Any) -> None:
    raise NotImplementedError(
        "the fused ROI perceptual loss can't be differentiated twice; "
        'lidnet_fast.backend.use("reference") chooses the definition, which can'
    )


def _refuse_vmap(info: Any, in_dims: Any, *arguments: Any) -> None:
    raise NotImplementedError(
        "the fused ROI perceptual loss doesn't run under torch.vmap: make the mapped dimension part of the batch, "
        "with each box's batch index pointing at its image"
    )


torch.library.register_autograd("lidnet_fast::roi_perceptual_losses", _backward, setup_context=_save)
torch.library.register_autograd("lidnet_fast::roi_perceptual_losses_backward", _refuse_double_backward)
torch.library.register_vmap("lidnet_fast::roi_perceptual_losses", _refuse_vmap)
torch.library.register_vmap("lidnet_fast::roi_perceptual_losses_backward", _refuse_vmap)


@torch.library.impl(_library, "roi_perceptual_losses", "CUDA")
def _(*arguments: Any) -> Tensor:
    from .kernels.roi_perceptual import roi_perceptual_losses

    return roi_perceptual_losses(*arguments)


@torch.library.impl(_library, "roi_perceptual_losses_backward", "CUDA")
def _(*arguments: Any) -> list[Tensor]:
    from .kernels.roi_perceptual import roi_perceptual_losses_backward

    return roi_perceptual_losses_backward(*arguments)
