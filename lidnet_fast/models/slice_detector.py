"""A trained lesion detector on slices of any size."""

from collections.abc import Iterator
from itertools import pairwise, product

import torch
from torch import Tensor
from torchvision.ops import nms

from lidnet_fast.device import Precision, autocast, choose_precision
from lidnet_fast.models.lesion_detector import LesionDetector
from lidnet_fast.models.windowing import HUWindow

OVERLAP = 64
"""Least overlap of neighbouring tiles in pixels, where tiles are twice as large: lesions are smaller."""


class SliceDetector:
    """Looks for lesions in whole slices, in tiles of the size of the fields of view that the detector was trained on.

    Such a detector may find less in whole slices, which show it more at once than it has ever seen. Tiles overlap; each
    answers for the boxes whose centre is nearer to its own middle than to its neighbours', and what two of them still
    both find is left to non-maximum suppression.

    Args:
        detector: moved to `device`, in eval mode.
        window: the HU window that it works in.
        tile: side of the fields of view that it was trained on, in pixels; None for whole slices.
        device: where it runs.
        precision: of the network.
    """

    def __init__(
        self,
        detector: LesionDetector,
        window: HUWindow,
        tile: int | None,
        device: torch.device,
        precision: Precision = "float32",
    ) -> None:
        self.detector = detector.to(device).to(memory_format=torch.channels_last).eval()
        self.window, self.tile, self.device = window, tile, device
        self.precision = choose_precision(precision, device)

    @torch.inference_mode()
    def __call__(self, hu: Tensor) -> list[dict[str, Tensor]]:
        """Detect.

        Args:
            hu: slices [N, 2 context + 1, H, W] of the detector's context, HU; see `lidnet_fast.neighbours`.

        Returns:
            Per slice, on the CPU, {"boxes": float32 [D, 4] (x1, y1, x2, y2) in pixels, "scores": float32 [D]}, best
            first.
        """
        images = self.window.clamp(self.window.scale(hu.to(self.device).float()))
        height, width = images.shape[-2:]
        found: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(len(images))]
        for (rows, own_rows), (columns, own_columns) in product(_spans(height, self.tile), _spans(width, self.tile)):
            with autocast(self.device, self.precision):
                detections = self.detector.detect(images[..., rows, columns])
            corner = torch.tensor([columns.start, rows.start] * 2)
            for of_slice, detected in zip(found, detections, strict=True):
                boxes, scores = detected["boxes"].float().cpu() + corner, detected["scores"].float().cpu()
                x, y = (boxes[:, :2] + boxes[:, 2:]).T / 2
                own = (x >= own_columns[0]) & (x < own_columns[1]) & (y >= own_rows[0]) & (y < own_rows[1])
                of_slice.append((boxes[own], scores[own]))
        return [self._best(*map(torch.cat, zip(*of_slice, strict=True))) for of_slice in found]

    def _best(self, boxes: Tensor, scores: Tensor) -> dict[str, Tensor]:
        best = nms(boxes, scores, self.detector.nms_threshold)[: self.detector.max_detections]
        return {"boxes": boxes[best], "scores": scores[best]}


def _spans(size: int, tile: int | None) -> Iterator[tuple[slice, tuple[float, float]]]:
    """The tiles along an axis, evenly from its first pixel to its last, and the part that each answers for."""
    if tile is None or tile >= size:
        yield slice(0, size), (-torch.inf, torch.inf)
        return
    count = -(-(size - tile) // (tile - min(OVERLAP, tile // 2))) + 1
    starts = [round(place * (size - tile) / (count - 1)) for place in range(count)]
    borders = [-torch.inf, *((after + before + tile) / 2 for before, after in pairwise(starts)), torch.inf]
    for start, part in zip(starts, pairwise(borders), strict=True):
        yield slice(start, start + tile), part
