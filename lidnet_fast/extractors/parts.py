"""What the boxes of a batch are computed from: windows of one kind, or whole images.

All of it follows from the plan, on the host, and goes to the images' device in one copy that nothing waits for.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .._tensors import upload
from .windowed import WindowBatch, WindowedExtractor
from .windows import Plan

__all__ = ["Part", "Parts", "parts_of"]


class Part(NamedTuple):
    """Boxes whose features are computed together.

    Attributes:
        boxes: Their rows.
        windows: Indices of their windows in the plan; none for whole images.
        batch: These windows, or None for whole images.
        images: int64, the numbers of the whole images, or None for windows.
        rois: Of each layer the boxes, [K, 5] or [K, 7]: their window or whole image as the batch index, and pixels from
            where the layer's features begin.
    """

    boxes: np.ndarray
    windows: list[int]
    batch: WindowBatch | None
    images: Tensor | None
    rois: list[Tensor]


class Parts(NamedTuple):
    """What a plan comes to, on the device of the images.

    Attributes:
        parts: A part for each kind of window, and one of whole images if the plan has any.
        corners: Of the windows of all parts, one after the other.
        order: What brings values of the parts' boxes, part by part, into the boxes' order; None where they are in it.
        others: What the caller had brought along.
    """

    parts: list[Part]
    corners: Tensor
    order: Tensor | None
    others: list[Tensor]


def parts_of(
    plan: Plan,
    rois: Tensor,
    images: Tensor,
    layers: Iterable[str],
    extractor: WindowedExtractor | None,
    others: Sequence[Tensor] = (),
) -> Parts:
    """The parts of a plan of at least one box.

    Args:
        plan: Windows and whole images.
        rois: The plan's boxes, on the CPU.
        images: [N, C, H, W] or [N, C, D, H, W].
        layers: Names of the layers.
        extractor: What computes windows; without it the plan has none.
        others: What else on the CPU is wanted on the device.
    """
    layers = list(layers)
    parts = [] if extractor is None else _of_windows(plan, rois, images, layers, extractor)
    nowhere = torch.empty(0, images.ndim - 1, dtype=torch.int64, device="cpu")
    corners = torch.cat([nowhere, *(part.batch.corners for part in parts if part.batch is not None)])
    if plan.whole:
        parts.append(_of_images(plan, rois, layers))
    order = [torch.from_numpy(np.concatenate([part.boxes for part in parts]).argsort())] if len(parts) > 1 else []
    of_parts = [tensor for part in parts for tensor in (part.images, *part.rois) if tensor is not None]
    corners, *numbers = upload([corners, *order, *of_parts, *others], images.device)
    in_order = numbers.pop(0) if order else None
    return Parts(_placed(parts, corners, numbers), corners, in_order, numbers)


def _placed(parts: Sequence[Part], corners: Tensor, numbers: list[Tensor]) -> list[Part]:
    """Parts with their corners and the next of the numbers, which are taken, for their own."""
    placed, first = [], 0
    for part in parts:
        if part.batch is None:
            part = part._replace(images=numbers.pop(0))
        else:
            of_part = corners[first : first + len(part.windows)]
            part, first = part._replace(batch=part.batch._replace(corners=of_part)), first + len(of_part)
        placed.append(part._replace(rois=[numbers.pop(0) for _ in part.rois]))
    return placed


def _of_windows(
    plan: Plan, rois: Tensor, images: Tensor, layers: Sequence[str], extractor: WindowedExtractor
) -> list[Part]:
    parts = []
    for windows, batch in extractor.batches(plan, images):
        boxes = np.flatnonzero(np.isin(plan.window_of_box, windows))
        window = torch.from_numpy(np.searchsorted(windows, plan.window_of_box[boxes]))
        local = []
        for layer in layers:
            shift = (batch.origins[layer][window].double() * extractor.stride(layer)).flip(1).to(rois.dtype)
            local.append(torch.hstack((window[:, None], rois[boxes, 1:] - torch.hstack((shift, shift)))))
        parts.append(Part(boxes, windows, batch, None, local))
    return parts


def _of_images(plan: Plan, rois: Tensor, layers: Sequence[str]) -> Part:
    boxes, whole = np.flatnonzero(plan.window_of_box < 0), torch.tensor(sorted(plan.whole), device="cpu")
    local = rois[boxes]
    local[:, 0] = torch.searchsorted(whole, local[:, 0].long()).to(local.dtype)
    return Part(boxes, [], None, whole, [local for _ in layers])
