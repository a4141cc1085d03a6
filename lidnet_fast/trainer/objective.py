"""The joint objective of a denoiser step (arXiv:2104.08845): pixel terms and the frozen detector's opinion."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lidnet_fast import backend, functional
from lidnet_fast.errors import InputError
from lidnet_fast.extractors.networks import load_network, network_and_layers
from lidnet_fast.losses import ROIPerceptualLoss
from lidnet_fast.models.detectors import LesionDetector
from lidnet_fast.models.windowing import HUWindow
from lidnet_fast.trainer.config import ObjectiveConfig

# What networks trained on ImageNet expect of images in [0, 1].
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Objective:
    """The objective of one batch: `total` is the sum of `losses`."""

    losses: dict[str, Tensor]
    """The weighted losses that meet in the denoised image: pixel, detection, perceptual, roi_perceptual and
    roi_extractor."""
    terms: dict[str, Tensor]
    """Every term's detached, unweighted value."""

    @property
    def total(self) -> Tensor:
        """What a denoiser step minimises."""
        return torch.stack(list(self.losses.values())).sum()


@dataclass(frozen=True)
class Regions:
    """Regions of the ROI perceptual loss in one batch."""

    boxes: list[Tensor]
    """Per image [L,4], in pixels."""
    weights: Tensor
    """[sum L]: 1 for a ground-truth box, a proposal's score for a proposal."""


class JointObjective:
    """Weighted sum of the terms of `ObjectiveConfig`; a term of weight 0 is not computed.

    The detector's backbone sees the denoised image once: its features serve the detection loss, the perceptual loss on
    whole maps and the ROI perceptual loss alike. Another extractor's features are computed in windows around the
    regions, or of whole images where the ops run on their definitions.

    Raises:
        InputError: `config.extractor` or its weights can't be used.
    """

    def __init__(self, config: ObjectiveConfig, window: HUWindow) -> None:
        self.config, self.window = config, window
        self._extractor_loss = _extractor_loss(config) if config.roi_extractor else None

    def __call__(
        self, denoised: Tensor, normal_dose: Tensor, boxes: list[Tensor], detector: LesionDetector
    ) -> Objective:
        """The objective of one batch.

        Args:
            denoised: windowed [N,1,H,W], with a gradient.
            normal_dose: windowed [N,1,H,W].
            boxes: per image [L,4] ground-truth lesion boxes.
            detector: frozen, in eval mode.
        """
        config = self.config
        pixel, terms = self.pixel(denoised, normal_dose, boxes)
        losses = {"pixel": pixel}
        if not (config.perceptual or config.roi_perceptual or config.detection or config.roi_extractor):
            return Objective(losses, terms)

        images = self.window.clamp(denoised)
        if config.perceptual or config.roi_perceptual or config.detection:
            features = detector.features(images)
        if config.detection:
            detection = torch.stack(list(detector.losses(images, boxes, features).values())).sum()
            losses["detection"] = config.detection * detection
            terms["detection"] = detection.detach()
        if config.perceptual or config.roi_perceptual or config.roi_extractor:
            with torch.no_grad():
                normal_images = self.window.clamp(normal_dose)
                normal_features = detector.features(normal_images)
            levels = list(normal_features)[: config.levels]
            # Weights are per unit of feature variance, whatever the detector's scale.
            scales = {k: normal_features[k].float().var((0, 2, 3)).mean().clamp_min(1e-12) for k in levels}
        if config.perceptual:
            whole = torch.stack(
                [(features[k].float() - normal_features[k].float()).square().mean() / scales[k] for k in levels]
            ).mean()
            losses["perceptual"] = config.perceptual * whole
            terms["perceptual"] = whole.detach()
        if config.roi_perceptual or config.roi_extractor:
            regions = self.regions(normal_images, normal_features, boxes, detector)
        if config.roi_perceptual:
            roi = torch.stack(
                [
                    functional.roi_perceptual_loss(
                        features[k],
                        normal_features[k],
                        regions.boxes,
                        config.roi_size,
                        1 / detector.feature_strides[k],
                        box_weights=regions.weights,
                    )
                    / scales[k]
                    for k in levels
                ]
            ).mean()
            losses["roi_perceptual"] = config.roi_perceptual * roi
            terms["roi_perceptual"] = roi.detach()
        if self._extractor_loss is not None:
            if next(self._extractor_loss.parameters()).device != images.device:  # moving derives all windows anew
                self._extractor_loss.to(images.device)
            seen = self._extractor_loss(images.float(), normal_images.float(), regions.boxes, regions.weights)
            losses["roi_extractor"] = config.roi_extractor * seen
            terms["roi_extractor"] = seen.detach()
        return Objective(losses, terms)

    def pixel(self, denoised: Tensor, normal_dose: Tensor, boxes: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The pixel terms alone: their weighted sum and each term's detached value."""
        config = self.config
        result = functional.multi_loss(
            denoised.float(),  # autocast leaves the network's output in half precision
            normal_dose,
            config.pixel,
            boxes=self._grown(boxes, denoised) if config.roi_weight != 1 else None,
            roi_weight=config.roi_weight,
        )
        return result.total, dict(result.terms)

    @torch.no_grad()
    def regions(
        self, images: Tensor, features: dict[str, Tensor], boxes: list[Tensor], detector: LesionDetector
    ) -> Regions:
        """Where the ROI perceptual loss looks, from the normal-dose images and their features."""
        config = self.config
        regions = [b if config.regions != "proposals" else b[:0] for b in boxes]
        weights = [b.new_ones(len(b)) for b in regions]
        if config.regions != "boxes":
            proposals = detector.proposals(
                images,
                features,
                score_threshold=config.proposal_score,
                max_per_image=config.proposals_per_image,
                nms_threshold=0.3,
            )
            regions = [torch.cat([b, found.to(b)]) for b, (found, _) in zip(regions, proposals, strict=True)]
            weights = [torch.cat([w, scores.to(w)]) for w, (_, scores) in zip(weights, proposals, strict=True)]
        return Regions(self._grown(regions, images), torch.cat(weights))

    def _grown(self, boxes: list[Tensor], images: Tensor) -> list[Tensor]:
        grow = self.config.grow
        height, width = images.shape[-2:]
        limit = images.new_tensor([width, height, width, height])
        outward = images.new_tensor([-grow, -grow, grow, grow])
        return [torch.minimum((b + outward).clamp_min(0), limit) for b in boxes]


def _extractor_loss(config: ObjectiveConfig) -> ROIPerceptualLoss:
    halo = "auto" if backend.current() == "fused" else "whole"
    try:
        name, layers = network_and_layers(config.extractor)
        with torch.random.fork_rng():
            torch.manual_seed(0)  # random weights are the same in every run, and when it resumes
            network = load_network(name, config.extractor_weights)
        return ROIPerceptualLoss(
            network, layers, halo, output_size=config.roi_size, mean=IMAGENET_MEAN, std=IMAGENET_STD
        )
    except (ValueError, OSError) as error:
        key = "collaborate.objective.extractor"
        raise InputError(f"{key} {config.extractor!r}, weights {config.extractor_weights!r}: {error}") from error
