"""Metrics of denoised images: closeness to the normal-dose image, and what lesion detectors find in them.

Task-based image quality is in the modules `noise`, `resolution` and `observers`: functions on NumPy arrays.

Needs the `train` extra (torchmetrics, faster-coco-eval).
"""

from lidnet_fast.metrics.detection import DetectionMetrics
from lidnet_fast.metrics.froc import FALSE_POSITIVES, Froc, froc
from lidnet_fast.metrics.image_quality import ImageQuality, ImageScores, LesionQuality, image_quality

__all__ = [
    "FALSE_POSITIVES",
    "DetectionMetrics",
    "Froc",
    "ImageQuality",
    "ImageScores",
    "LesionQuality",
    "froc",
    "image_quality",
]
