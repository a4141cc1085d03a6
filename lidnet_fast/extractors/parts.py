"""What the boxes of a batch are computed from: windows of one kind, or whole images.

All of it follows from the plan, on the host, and goes to the images' device in one copy that nothing waits for.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .windowed import WindowBatch, WindowedExtractor
from .windows import Plan, Window

__all__ = ["Part", "Parts", "parts_of"]


class Part(NamedTuple):
    """Boxes whose features are computed together.

    Attributes:
        boxes: Their rows.
        windows: Their windows; none for whole images.
        batch: What computes these windows, or None for whole images.
        images: int64, the numbers of the whole images, or None for windows.
        rois: Of each layer the boxes, [K, 5] or [K, 7]: their window or whole image as the batch index, and pixels from
            where the layer's features begin.
    """

    boxes: np.ndarray
    windows: list[Window]
    batch: WindowBatch | None
    images: Tensor | None
    rois: list[Tensor]

    @property
    def kind(self) -> tuple:
        """Of the windows; () for whole images."""
        return self.windows[0].kind if self.windows else ()


class Parts(NamedTuple):
    """What a plan comes to, on the CPU at first.

    Attributes:
        parts: A part for each kind of window, and one of whole images if the plan has any.
        corners: Of the windows of all parts, one after the other.
        order: What brings values of the parts' boxes, part by part, into the boxes' order; None where they are in it.
    """

    parts: list[Part]
    corners: Tensor
    order: Tensor | None

    @classmethod
    def of(cls, parts: list[Part], axes: int) -> "Parts":
        """With the corners and the order of parts of images with so many axes."""
        nowhere = torch.empty(0, 1 + axes, dtype=torch.int64, device="cpu")
        corners = torch.cat([nowhere, *(part.batch.corners for part in parts if part.batch is not None)])
        order = torch.from_numpy(np.concatenate([part.boxes for part in parts]).argsort()) if len(parts) > 1 else None
        return cls(parts, corners, order)

    @property
    def layout(self) -> list[tuple[tuple, int, int]]:
        """What the tensors' shapes follow from: of each part its kind, its windows or images and its boxes."""
        counts = [len(part.windows) if part.images is None else len(part.images) for part in self.parts]
        return [(part.kind, count, len(part.boxes)) for part, count in zip(self.parts, counts, strict=True)]

    def in_order_of(self, others: "Parts") -> "Parts":
        """With the parts in the order of others' of the same kinds."""
        by_kind = {part.kind: part for part in self.parts}
        kinds = [part.kind for part in others.parts]
        in_order = [by_kind.pop(kind) for kind in kinds if kind in by_kind]
        return Parts.of([*in_order, *by_kind.values()], self.corners.shape[1] - 1)

    def tensors(self) -> list[Tensor]:
        """All that are wanted on the device of the images."""
        of_parts = [tensor for part in self.parts for tensor in (part.images, *part.rois)]
        return [tensor for tensor in (self.corners, self.order, *of_parts) if tensor is not None]

    def with_tensors(self, tensors: Iterable[Tensor]) -> "Parts":
        """With others in place of `tensors()`, in their order."""
        others = iter(tensors)
        corners, order = next(others), None if self.order is None else next(others)
        parts, first = [], 0
        for part in self.parts:
            if part.batch is None:
                part = part._replace(images=next(others))
            else:
                of_part = corners[first : first + len(part.windows)]
                part, first = part._replace(batch=part.batch._replace(corners=of_part)), first + len(of_part)
            parts.append(part._replace(rois=[next(others) for _ in part.rois]))
        return Parts(parts, corners, order)


def parts_of(
    plan: Plan, rois: Tensor, images: Tensor, layers: Iterable[str], extractor: WindowedExtractor | None
) -> Parts:
    """The parts of a plan.

    Args:
        plan: Windows and whole images.
        rois: The plan's boxes, on the CPU.
        images: [N, C, H, W] or [N, C, D, H, W].
        layers: Names of the layers.
        extractor: What computes windows; without it the plan has none.
    """
    layers = list(layers)
    parts = [] if extractor is None else _of_windows(plan, rois, images, layers, extractor)
    if plan.whole:
        parts.append(_of_images(plan, rois, layers))
    return Parts.of(parts, images.ndim - 2)


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
        parts.append(Part(boxes, [plan.windows[number] for number in windows], batch, None, local))
    return parts


def _of_images(plan: Plan, rois: Tensor, layers: Sequence[str]) -> Part:
    boxes, whole = np.flatnonzero(plan.window_of_box < 0), torch.tensor(sorted(plan.whole), device="cpu")
    local = rois[boxes]
    local[:, 0] = torch.searchsorted(whole, local[:, 0].long()).to(local.dtype)
    return Part(boxes, [], None, whole, [local for _ in layers])
