"""How well detections match lesions: average precision and FROC over a test set."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics.detection import MeanAveragePrecision

from lidnet_fast.metrics.froc import froc

MAX_DETECTIONS = 100


class DetectionMetrics:
    """Average precision (COCO) and FROC of detections.

    Of every image the 100 best-scoring detections count, as in COCO.
    """

    def __init__(self) -> None:
        self.detections: list[dict[str, Tensor]] = []
        self.boxes: list[Tensor] = []

    @property
    def count(self) -> int:
        """Number of images so far."""
        return len(self.boxes)

    def reset(self) -> None:
        """Forget all images."""
        self.detections, self.boxes = [], []

    def update(self, detections: Sequence[dict[str, Tensor]], boxes: Sequence[Tensor]) -> None:
        """Add a batch.

        Args:
            detections: per image {"boxes": [D, 4], "scores": [D]} (other keys are ignored), as `LesionDetector.detect`
                returns them.
            boxes: per image the lesions' boxes [L, 4]; L may be 0.

        Raises:
            ValueError: the numbers of images differ, or an image's boxes and scores do.
        """
        if len(detections) != len(boxes):
            raise ValueError(f"got detections for {len(detections)} images and boxes for {len(boxes)}")
        for index, found in enumerate(detections):
            if len(found["boxes"]) != len(found["scores"]):
                raise ValueError(
                    f"detections[{index}] has {len(found['boxes'])} boxes and {len(found['scores'])} scores"
                )
        for found, lesions in zip(detections, boxes, strict=True):
            best = found["scores"].argsort(descending=True, stable=True)[:MAX_DETECTIONS]
            self.detections.append({key: found[key][best].detach().float().cpu() for key in ("boxes", "scores")})
            self.boxes.append(lesions.detach().float().cpu())

    def compute(self) -> dict[str, Any]:
        """The metrics.

        Returns:
            "ap50": average precision at IoU 0.5 (101 recall points, as COCO). "ap": its mean over IoU 0.5, 0.55, ...,
            0.95.
            "froc_mean" and "froc" {false positives per image: sensitivity}: see `lidnet_fast.metrics.froc.froc`,
            hits at IoU 0.5. "curve": {"false_positives", "sensitivity"}, float64 arrays. Without a lesion all values
            are None and the curve is empty.

        Raises:
            ValueError: there was no image.
        """
        if not self.boxes:
            raise ValueError("detection metrics of no images: call update() before compute()")
        curve = froc(self.detections, self.boxes)
        ap50, ap = self._average_precision() if any(len(lesions) for lesions in self.boxes) else (None, None)
        return {
            "ap50": ap50,
            "ap": ap,
            "froc_mean": curve.mean,
            "froc": curve.sensitivities,
            "curve": {"false_positives": curve.false_positives, "sensitivity": curve.sensitivity},
        }

    def _average_precision(self) -> tuple[float, float]:
        metric = MeanAveragePrecision(
            box_format="xyxy",
            iou_type="bbox",
            max_detection_thresholds=[1, 10, MAX_DETECTIONS],
            backend="faster_coco_eval",
        )
        metric.update(
            [{**found, "labels": _labels(found["boxes"])} for found in self.detections],
            [{"boxes": lesions, "labels": _labels(lesions)} for lesions in self.boxes],
        )
        values = metric.compute()
        return float(values["map_50"]), float(values["map"])


def _labels(boxes: Tensor) -> Tensor:
    return torch.ones(len(boxes), dtype=torch.int64)
