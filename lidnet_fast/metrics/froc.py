"""Free-response ROC: the fraction of lesions found against false positives per image."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torchvision.ops import box_iou

#: The operating points of LUNA16 (Setio et al. 2017, arXiv:1612.08012), false positives per image or scan. DeepLesion's
#: (Yan et al. 2018, arXiv:1710.01766) are among them: 1/2, 1, 2 and 4.
FALSE_POSITIVES: tuple[float, ...] = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8)


@dataclass(frozen=True)
class Froc:
    """A FROC curve and its value at the operating points.

    The curve holds only the points between which it isn't straight; connect them with straight lines.
    """

    false_positives: NDArray[np.float64]
    """False positives per image or scan, never decreasing, from 0; where two are equal, the curve rises straight up."""
    sensitivity: NDArray[np.float64]
    """Fraction of lesions found, never decreasing."""
    sensitivities: dict[float, float | None]
    """Sensitivity by operating point; None throughout where there was no lesion."""
    mean: float | None
    """Mean of the sensitivities."""


def froc(
    detections: Sequence[dict[str, Tensor]],
    boxes: Sequence[Tensor],
    false_positives: Sequence[float] = FALSE_POSITIVES,
    iou_threshold: float = 0.5,
) -> Froc:
    """FROC analysis of detections in images.

    A detection hits a lesion when their boxes' IoU is at least `iou_threshold` (the usual rule for lesion boxes, as for
    DeepLesion). As in LUNA16, a lesion counts once, at the score of its best hit; further hits on it are neither true
    nor false positives; a detection that hits no lesion is a false positive. Going down the scores gives one point per
    distinct score; at an operating point that several share, the highest sensitivity counts. Before the first point
    the curve starts at (0, 0); between points it is linear; beyond the last one (a detector that never makes that many
    false positives) it stays at its last sensitivity. This is how LUNA16's own evaluation reads its curves.

    Args:
        detections: per image {"boxes": [D, 4], "scores": [D]}.
        boxes: per image the lesions' boxes [L, 4]; L may be 0.
        false_positives: operating points, false positives per image.
        iou_threshold: least IoU of a hit, in (0, 1].

    Returns:
        The curve (empty without a lesion) and the sensitivities.

    Raises:
        ValueError: no image, or numbers of images that differ.
    """
    if not len(detections) or len(detections) != len(boxes):
        raise ValueError(f"froc needs as many detections as boxes, at least one: got {len(detections)}, {len(boxes)}")
    hit_scores, false_scores = [], []
    for found, lesions in zip(detections, boxes, strict=True):
        scores = found["scores"].detach().cpu().double().numpy()
        hits = (box_iou(lesions.cpu().double(), found["boxes"].detach().cpu().double()) >= iou_threshold).numpy()
        hit_scores.append(np.where(hits, scores, -np.inf).max(axis=1, initial=-np.inf))
        false_scores.append(scores[~hits.any(axis=0)])
    return froc_curve(np.concatenate(hit_scores), np.concatenate(false_scores), len(boxes), false_positives)


def froc_curve(
    lesion_scores: NDArray[np.float64],
    false_scores: NDArray[np.float64],
    count: int,
    false_positives: Sequence[float] = FALSE_POSITIVES,
) -> Froc:
    """The curve of scored hits and false positives, by the rules that `froc` states.

    Args:
        lesion_scores: [L], the score of each lesion's best hit, -inf where it has none.
        false_scores: [F], the scores of the false positives.
        count: number of images or scans.
        false_positives: operating points, false positives per image or scan.
    """
    if not len(lesion_scores):
        empty = np.empty(0)
        return Froc(empty, empty, dict.fromkeys(false_positives), None)

    found_scores, wrong = np.sort(lesion_scores[np.isfinite(lesion_scores)]), np.sort(false_scores)
    thresholds = np.unique(np.concatenate([found_scores, wrong]))[::-1]
    per_image = (len(wrong) - np.searchsorted(wrong, thresholds)) / count
    sensitivity = (len(found_scores) - np.searchsorted(found_scores, thresholds)) / len(lesion_scores)
    per_image, sensitivity = np.append(0.0, per_image), np.append(0.0, sensitivity)
    between = np.zeros(len(per_image), dtype=bool)  # points on a level or an upright stretch
    for along in (per_image, sensitivity):
        between[1:-1] |= (along[1:-1] == along[:-2]) & (along[1:-1] == along[2:])
    per_image, sensitivity = per_image[~between], sensitivity[~between]
    # np.interp takes the last of equal false positives, the highest sensitivity since both run upwards.
    values = [float(v) for v in np.interp(false_positives, per_image, sensitivity)]
    return Froc(
        per_image,
        sensitivity,
        dict(zip(false_positives, values, strict=True)),
        sum(values) / len(values),
    )
