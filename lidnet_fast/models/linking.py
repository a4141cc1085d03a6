"""Detections of neighbouring slices, linked to candidates in three dimensions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor
from torchvision.ops import box_iou

LINK_IOU = 0.1
"""Least IoU of the boxes of one lesion on neighbouring slices: near its ends, a sphere's circles change fast."""


@dataclass(frozen=True)
class Candidate:
    """Boxes on neighbouring slices that are taken for one lesion.

    Attributes:
        slices: int64 [n], ascending; a slice may have several of its boxes.
        boxes: float32 [n, 4], (x1, y1, x2, y2) in pixels.
        scores: float32 [n].
    """

    slices: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray

    @property
    def score(self) -> float:
        """The highest of its boxes' scores."""
        return float(self.scores.max())

    @property
    def box(self) -> tuple[int, int, float, float, float, float]:
        """The smallest box around all of them: first slice, last slice, x1, y1, x2, y2."""
        (x1, y1), (x2, y2) = self.boxes[:, :2].min(axis=0), self.boxes[:, 2:].max(axis=0)
        return int(self.slices[0]), int(self.slices[-1]), float(x1), float(y1), float(x2), float(y2)

    def centre(self, to_patient: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
        """The mean of its boxes' centres, weighted by their scores: float64 [3] in mm.

        Args:
            to_patient: turns slices [n] and points [n, 2] on them, in pixels, into points [n, 3] in space, as a
                series' `to_patient` does.
        """
        points = to_patient(self.slices, (self.boxes[:, :2] + self.boxes[:, 2:]) / 2)
        return np.average(points, axis=0, weights=self.scores)


def link(detections: Sequence[dict[str, Tensor]], iou: float = LINK_IOU) -> list[Candidate]:
    """Link the detections of a series' slices.

    Boxes on neighbouring slices whose IoU is at least `iou` belong together, and so does what a chain of such pairs
    connects; boxes on one slice are joined only through their neighbours.

    Args:
        detections: per slice, in their order, {"boxes": [D, 4], "scores": [D]} on the CPU.
        iou: least IoU of a link, above 0.

    Returns:
        The candidates, best first; a box without a link is one, too.
    """
    counts = [len(found["scores"]) for found in detections]
    if not sum(counts):
        return []
    starts = np.cumsum([0, *counts])
    links = []
    for z, (lower, upper) in enumerate(pairwise(detections)):
        pairs = (box_iou(lower["boxes"], upper["boxes"]) >= iou).nonzero().numpy()
        links.append(pairs + starts[z : z + 2])
    rows, columns = np.concatenate([np.empty((0, 2), np.int64), *links]).T
    graph = coo_array((np.ones(len(rows), bool), (rows, columns)), shape=(starts[-1], starts[-1]))
    number, labels = connected_components(graph, directed=False)
    slices = np.repeat(np.arange(len(detections)), counts)
    boxes, scores = (torch.cat([found[key] for found in detections]).numpy() for key in ("boxes", "scores"))
    order = np.argsort(labels, kind="stable")
    parts = np.split(order, np.cumsum(np.bincount(labels, minlength=number))[:-1])
    candidates = [Candidate(slices[part], boxes[part], scores[part]) for part in parts]
    return sorted(candidates, key=lambda candidate: -candidate.score)
