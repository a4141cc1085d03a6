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

__all__ = ["Part", "parts_of"]


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


def parts_of(
    plan: Plan, rois: Tensor, images: Tensor, layers: Iterable[str], extractor: WindowedExtractor | None
) -> tuple[list[Part], Tensor]:
    """The parts of a plan on the device of the images, and what brings values of their boxes into the boxes' order.

    Args:
        plan: Windows and whole images.
        rois: The plan's boxes, on the CPU.
        images: [N, C, H, W] or [N, C, D, H, W].
        layers: Names of the layers.
        extractor: What computes windows; without it the plan has none.
    """
    parts = [] if extractor is None else _of_windows(plan, rois, images, list(layers), extractor)
    if plan.whole:
        boxes, whole = np.flatnonzero(plan.window_of_box < 0), torch.tensor(sorted(plan.whole), device="cpu")
        local = rois[boxes]
        local[:, 0] = torch.searchsorted(whole, local[:, 0].long()).to(local.dtype)
        parts.append(Part(boxes, [], None, whole, [local for _ in layers]))
    order = torch.from_numpy(np.concatenate([part.boxes for part in parts]).argsort())
    order, *numbers = upload([order, *(tensor for part in parts for tensor in _numbers(part))], images.device)
    return [_with_numbers(part, numbers) for part in parts], order


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


def _numbers(part: Part) -> list[Tensor]:
    places = part.images if part.batch is None else part.batch.corners
    assert places is not None
    return [places, *part.rois]


def _with_numbers(part: Part, numbers: list[Tensor]) -> Part:
    """A part with the next of the numbers, which are taken, for its own."""
    places, *rois = (numbers.pop(0) for _ in range(1 + len(part.rois)))
    if part.batch is None:
        return part._replace(images=places, rois=rois)
    return part._replace(batch=part.batch._replace(corners=places), rois=rois)
