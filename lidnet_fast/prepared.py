"""The boxes of a batch as `ROIPerceptualLoss` computes with them: checked, planned, and on the images' device."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._checks import Boxes, _is_batched
from ._tensors import compute_dtype, pack, unpack, upload
from .extractors.parts import Parts
from .functional._boxes import check_boxes

__all__ = ["PreparedBoxes"]


class Arranged(NamedTuple):
    """Boxes of a batch, on the CPU at first.

    Attributes:
        parts: The windows and images that they are computed from.
        weights: Of each box, [K], or None; may be on the images' device from the start.
        counted: Which boxes count, bool [K], or None for all.
        number: How many do.
    """

    parts: Parts
    weights: Tensor | None
    counted: Tensor | None
    number: int

    def on_device(self, move: Callable[[list[Tensor]], list[Tensor]]) -> "Arranged":
        """With what `move` makes of all tensors that are on the CPU."""
        others = [other for other in (self.weights, self.counted) if other is not None and other.device.type == "cpu"]
        of_parts = self.parts.tensors()
        moved = move([*of_parts, *others])
        rest = iter(moved[len(of_parts) :])
        weights, counted = (
            next(rest) if other is not None and other.device.type == "cpu" else other
            for other in (self.weights, self.counted)
        )
        return Arranged(self.parts.with_tensors(moved[: len(of_parts)]), weights, counted, self.number)

    def uploaded(self, device: torch.device) -> "Arranged":
        """On the device, in one copy that nothing waits for.

        Raises:
            RuntimeError: If a CUDA graph is being captured, whose replays would copy what is in that memory then.
        """
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "boxes of a captured call must be on the device before, and stay there for the replays. "
                "To fix: capture loss(denoised, normal_dose, loss.prepare(denoised, boxes)), with `prepare` outside"
            )
        return self.on_device(lambda tensors: upload(tensors, device))

    @property
    def layout(self) -> str:
        """In words, what a call's sequence of kernels and their shapes follow from."""
        said = ["boxes that count: " + str(self.number) + ("" if self.weights is None else ", weighted")]
        for kind, count, boxes in self.parts.layout:
            stretches = " x ".join(" ".join(map(str, stretch)) for stretch in kind)
            said.append(f"{'windows ' + stretches if kind else 'whole images'}: {count}, with boxes: {boxes}")
        return "; ".join(said)


class PreparedBoxes:
    """Boxes, and their weights, that stay at one place on the images' device: for calls that a CUDA graph captures.

    `ROIPerceptualLoss.prepare` makes them, and the loss takes them in place of boxes and weights. `replace` puts those
    of another batch there, so that the next replay computes with them.
    """

    def __init__(
        self,
        arrange: Callable[[Boxes, Tensor | None], Arranged],
        images: Tensor,
        boxes: Boxes,
        box_weights: Tensor | None,
    ) -> None:
        self._arrange, self._device = arrange, images.device
        self._images = tuple(images.shape), images.device, compute_dtype(images.dtype)
        self._on_host = arrange(boxes, box_weights)
        self.arranged = self._on_host.on_device(self._placed)

    def _placed(self, tensors: list[Tensor]) -> list[Tensor]:
        self._packed = pack(tensors, self._device).to(self._device, non_blocking=True)
        return unpack(self._packed, tensors)

    def replace(self, boxes: Boxes, box_weights: Tensor | None = None) -> None:
        """Put the boxes of another batch in the place of these; nothing waits for the device.

        Args:
            boxes: Of images of the same size, on the CPU.
            box_weights: Of these boxes, where those before had weights.

        Raises:
            TypeError: As `ROIPerceptualLoss`.
            ValueError: As `ROIPerceptualLoss`, and where other kernels would have to run: unless as many boxes count,
                in as many windows of the same kinds.
        """
        new = self._arrange(boxes, box_weights)
        new = new._replace(parts=new.parts.in_order_of(self._on_host.parts))
        if new.layout != self._on_host.layout:
            raise ValueError(
                f"boxes must have windows of the same kinds as those that were prepared ({self._on_host.layout}), "
                f"got ({new.layout}). To fix: prepare these anew, and capture another graph for them"
            )
        new.on_device(self._copied)

    def _copied(self, tensors: list[Tensor]) -> list[Tensor]:
        self._packed.copy_(pack(tensors, self._device), non_blocking=True)
        return tensors

    def check_images(self, images: Tensor) -> None:
        """Raises a ValueError for images that these boxes weren't prepared for."""
        found = tuple(images.shape), images.device, compute_dtype(images.dtype)
        if found != self._images:
            said = ["{} on {}, computed in {}".format(*facts) for facts in (self._images, found)]
            raise ValueError(f"boxes were prepared for images of {said[0]}, got {said[1]}. To fix: prepare them anew")


def rois_on_host(boxes: Boxes, images: Tensor, outside: str) -> Tensor:
    """Boxes checked, in one form and on the CPU, wherever boxes and images are."""
    for part in (boxes,) if isinstance(boxes, Tensor) else boxes if isinstance(boxes, Sequence) else ():
        if isinstance(part, Tensor) and (part.is_meta or _is_batched(part)):
            hidden = "meta tensors don't have" if part.is_meta else "torch.vmap hides"
            raise NotImplementedError(
                f"ROIPerceptualLoss plans its windows from the boxes' values, which {hidden}. "
                "To fix: pass boxes on the CPU, of all images in one call"
            )
    if isinstance(boxes, Tensor):
        boxes = boxes.cpu()
    elif isinstance(boxes, Sequence):
        boxes = [of_image.cpu() if isinstance(of_image, Tensor) else of_image for of_image in boxes]
    on_host = torch.empty((), dtype=images.dtype, device="cpu").expand(images.shape)
    return check_boxes(boxes, on_host, outside=outside).rois
