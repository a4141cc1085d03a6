"""What definitions and ops alike ask of tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that an op computes in and returns: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def in_forward_mode() -> bool:
    """Whether tensors may have tangents now: within torch.autograd.forward_ad.dual_level, torch.func.jvp or jacfwd."""
    return forward_ad._current_level >= 0


def reduce_boxes(
    losses: Tensor,
    box_weights: Tensor | None,
    reduction: str,
    counted: Tensor | None = None,
    count: int | None = None,
) -> Tensor:
    """Weights the losses [K] of the boxes and reduces them: "none" [w_k l_k], "sum" their sum, "mean" the sum over K.

    Boxes that aren't `counted`, bool [K], have a loss of 0 and no part in K; `count` is how many are, where that is
    known. Without boxes the sum and the mean are 0 and stay connected to the graph.
    """
    if counted is not None:
        losses = torch.where(counted, losses, 0)
    if box_weights is not None:
        losses = losses * box_weights
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    if count is None and counted is not None:
        return losses.sum() / counted.sum().clamp(min=1)
    return losses.sum() / max(losses.shape[0] if count is None else count, 1)


_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def empty_maps(
    like: Tensor, shapes: Sequence[int], channels_last: Sequence[bool], dtype: torch.dtype | None = None
) -> list[Tensor]:
    """Maps of as many axes as `like`, whose shapes are given one after the other."""
    axes = like.ndim
    return [
        torch.empty_like(
            like.new_empty(tuple(shapes[level * axes : (level + 1) * axes]), dtype=dtype),
            memory_format=_CHANNELS_LAST[axes] if last else torch.contiguous_format,
        )
        for level, last in enumerate(channels_last)
    ]


def empty_slopes(inputs: Sequence[Tensor], rois: Tensor, output_size: Sequence[int], *, on_gpu: bool) -> Tensor:
    """A value per box, channel and bin, in the order in which kernels keep the slopes of a criterion.

    On GPUs channels are adjacent, and there are more of them than features have, so that blocks of 16 need no mask.
    """
    channels = max(level.shape[1] for level in inputs)
    if on_gpu:
        return rois.new_empty((rois.shape[0], *output_size, -(-channels // 16) * 16)).movedim(-1, 1)
    return rois.new_empty((rois.shape[0], channels, *output_size))


def upload(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Tensors of the CPU on a device, in one copy; on CUDA from pinned memory, so that nothing waits for it."""
    if device.type == "cpu" or not tensors:
        return list(tensors)
    return unpack(pack(tensors, device).to(device, non_blocking=True), tensors)


def pack(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """The bytes of tensors of the CPU, one after the other, in memory from which they are copied to a device."""
    room = _room(tensors)
    packed = torch.empty(sum(room), dtype=torch.uint8, device="cpu", pin_memory=device.type == "cuda")
    for place, tensor in zip(packed.split(room), tensors, strict=True):
        _as(place, tensor).copy_(tensor)
    return packed


def unpack(packed: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Views of what `pack` made of tensors like these."""
    return [_as(place, tensor) for place, tensor in zip(packed.split(_room(like)), like, strict=True)]


def _room(tensors: Sequence[Tensor]) -> list[int]:
    return [-(-tensor.nbytes // 16) * 16 for tensor in tensors]  # as a view of any dtype may begin


def _as(place: Tensor, tensor: Tensor) -> Tensor:
    """The bytes of `place` as a tensor's dtype and shape."""
    return place[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
