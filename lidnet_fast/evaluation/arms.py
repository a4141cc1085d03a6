"""Evaluation: every way of restoring the same held-out samples, scored as images and by detectors."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lidnet_fast.assessment.arms import LOW_DOSE
from lidnet_fast.data.samples.dataset import Batch, SampleId, make_batch
from lidnet_fast.device import autocast
from lidnet_fast.files import write_text
from lidnet_fast.metrics.detection import DetectionMetrics
from lidnet_fast.metrics.image_quality import ImageQuality
from lidnet_fast.models.hu import HUDenoiser
from lidnet_fast.models.lesion_detector import LesionDetector
from lidnet_fast.neighbours import middle
from lidnet_fast.progress import progress
from lidnet_fast.trainer.config import RunConfig
from lidnet_fast.trainer.datamodule import held_out_loader

NORMAL_DOSE = "normal dose"
"""Name of the arm that shows what all others are to restore."""


@dataclass(frozen=True)
class Arm:
    """One way of restoring a low-dose image, to be compared with others on the same samples."""

    name: str
    restore: Callable[[Batch], Tensor]
    """Batch (HU) -> restored images, HU, of the shape of its normal dose."""
    detectors: Mapping[str, LesionDetector]
    """Who looks for lesions in the restored images: name -> detector in eval mode."""


@dataclass
class Example:
    """One held-out sample as all arms see it, for a reader's eyes."""

    sample: int
    """Its number among the held-out samples."""
    boxes: Tensor
    images: dict[str, Tensor] = field(default_factory=dict)
    """Arm -> [H,W] HU."""
    detections: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """Arm -> what its first detector found."""


@dataclass
class Evaluation:
    """Results of one evaluation."""

    quality: dict[str, ImageQuality]
    """Arm -> the scores of its images."""
    detection: dict[str, dict[str, DetectionMetrics]]
    """Arm -> detector -> what it found."""
    samples: list[SampleId]
    examples: list[Example]

    @cached_property
    def metrics(self) -> dict[str, dict[str, Any]]:
        """Arm -> metric -> value; a detector's metrics are under its name, with the FROC curve."""
        return {
            arm: {
                **quality.compute(),
                **{name: metric.compute() for name, metric in self.detection[arm].items()},
            }
            for arm, quality in self.quality.items()
        }

    def flat(self) -> dict[str, dict[str, float | None]]:
        """Arm -> flat metric name -> number, without the curves: "psnr", "lesion_psnr", "judge_ap50", ..."""
        return {arm: flatten(values) for arm, values in self.metrics.items()}


def flatten(values: Mapping[str, Any]) -> dict[str, float | None]:
    """One arm's metrics as flat names and numbers."""
    flat: dict[str, float | None] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update({f"{key}_{name}": v for name, v in value.items() if v is None or isinstance(v, int | float)})
        else:
            flat[key] = value
    return flat


def network_arm(name: str, denoiser: HUDenoiser, detectors: Mapping[str, LesionDetector]) -> Arm:
    """An arm that restores with a denoiser every slice that the detectors see."""

    def restore(batch: Batch) -> Tensor:
        low_dose = _as_normal_dose(batch, denoiser.context)
        return denoiser.denoise(low_dose)

    return Arm(name, restore, detectors)


def _as_normal_dose(batch: Batch, around: int = 0) -> Tensor:
    """The low dose of the slices that a batch has in normal dose, and of `around` more on each side."""
    return middle(batch["low_dose"], batch["normal_dose"].shape[1] // 2 + around)


def images_arm(name: str, views: Mapping[SampleId, np.ndarray], detectors: Mapping[str, LesionDetector]) -> Arm:
    """An arm that shows images denoised elsewhere; `views` has those of every sample, [C,H,W]."""

    def restore(batch: Batch) -> Tensor:
        images = np.stack([views[sample] for sample in batch["ids"]])
        return torch.from_numpy(images).float().to(batch["low_dose"].device)

    return Arm(name, restore, detectors)


def reference_arms(detectors: Mapping[str, LesionDetector]) -> tuple[Arm, Arm]:
    """The two ends of the scale: the low-dose image as it is, and the normal-dose image."""
    return (
        Arm(LOW_DOSE, _as_normal_dose, detectors),
        Arm(NORMAL_DOSE, lambda batch: batch["normal_dose"], detectors),
    )


@torch.no_grad()
def evaluate(
    config: RunConfig,
    arms: Sequence[Arm],
    device: torch.device,
    precision: Literal["float32", "bfloat16"] = "float32",
    examples: int = 6,
    split: Literal["val", "test"] = "test",
) -> Evaluation:
    """Score all arms on the fixed samples of a held-out split.

    Args:
        config: names the store, the field of view, the window and the number of samples.
        arms: networks are moved to `device` by the caller.
        device: where it runs.
        precision: of the networks; metrics are computed in float32 and more.
        examples: how many samples with a lesion are kept for the report.
        split: whose patients the samples are of.
    """
    window = config.window
    quality = {arm.name: ImageQuality(window) for arm in arms}
    detection = {arm.name: {name: DetectionMetrics() for name in arm.detectors} for arm in arms}
    kept: list[Example] = []
    ids: list[SampleId] = []
    for samples in progress(held_out_loader(config, split, config.evaluation.samples), "evaluating"):
        batch = make_batch(samples, device)
        shown = [i for i, boxes in enumerate(batch["boxes"]) if len(boxes)][: examples - len(kept)]
        new = [Example(len(ids) + i, batch["boxes"][i].cpu()) for i in shown]
        for arm in arms:
            with autocast(device, precision):
                restored = arm.restore(batch)
            quality[arm.name].update(middle(restored), middle(batch["normal_dose"]), batch["boxes"])
            images = window.clamp(window.scale(restored))
            for rank, (name, detector) in enumerate(arm.detectors.items()):
                with autocast(device, precision):
                    found = detector.detect(images)
                detection[arm.name][name].update(found, batch["boxes"])
                if rank == 0:
                    for example, i in zip(new, shown, strict=True):
                        example.detections[arm.name] = {k: v.cpu() for k, v in found[i].items()}
            for example, i in zip(new, shown, strict=True):
                example.images[arm.name] = middle(restored)[i, 0].cpu()
        kept += new
        ids += batch["ids"]
    return Evaluation(quality, detection, ids, kept)


def write_metrics(path: Path, content: Mapping[str, Any]) -> None:
    """Write results as JSON; arrays become lists."""
    write_text(path, json.dumps(content, indent=1, default=lambda value: value.tolist()))
