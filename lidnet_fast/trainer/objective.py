"""The joint objective of a denoiser step (arXiv:2104.08845): pixel terms and the frozen detector's opinion."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lidnet_fast import backend, functional
from lidnet_fast.errors import InputError
from lidnet_fast.extractors.cache import FeatureCache
from lidnet_fast.extractors.networks import load_network, network_and_layers, outline_network
from lidnet_fast.losses import ROIPerceptualLoss
from lidnet_fast.models.detectors import LesionDetector
from lidnet_fast.models.registry import first_line
from lidnet_fast.models.windowing import HUWindow
from lidnet_fast.trainer.clock import StepClock
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


@dataclass(frozen=True)
class SeenInNormalDose:
    """What the detector makes of the normal-dose images of one batch."""

    features: dict[str, Tensor]
    """[N,C,h,w] of the levels that are compared."""
    proposals: Tensor
    """float32 [N,P,5], boxes and scores; rows of a negative score are none."""


_PROPOSALS = "proposals"


class JointObjective:
    """Weighted sum of the terms of `ObjectiveConfig`; a term of weight 0 is not computed.

    The detector's backbone sees the denoised image once: its features serve the detection loss, the perceptual loss on
    whole maps and the ROI perceptual loss alike. Another extractor's features are computed in windows around the
    regions, or of whole images where the ops run on their definitions.

    Args:
        config: the terms.
        window: of the images.
        detector_cache_mib: MiB for what the detector makes of normal-dose images; for a detector that doesn't train.
        extractor_cache_mib: MiB for the other extractor's features of normal-dose images.

    Raises:
        InputError: `config.extractor` or its weights can't be used.
    """

    def __init__(
        self,
        config: ObjectiveConfig,
        window: HUWindow,
        *,
        detector_cache_mib: float = 0,
        extractor_cache_mib: float = 0,
    ) -> None:
        self.config, self.window = config, window
        self.cache = FeatureCache(detector_cache_mib) if detector_cache_mib else None
        self._extractor_loss = _extractor_loss(config, extractor_cache_mib) if config.roi_extractor else None

    def __call__(
        self,
        denoised: Tensor,
        normal_dose: Tensor,
        boxes: list[Tensor],
        detector: LesionDetector,
        *,
        ids: Sequence[Hashable] | None = None,
        clock: StepClock | None = None,
    ) -> Objective:
        """The objective of one batch.

        Args:
            denoised: windowed [N,1,H,W], with a gradient.
            normal_dose: windowed [N,1,H,W].
            boxes: per image [L,4] ground-truth lesion boxes.
            detector: frozen, in eval mode.
            ids: what each normal-dose image is known by in the caches; the same id has to mean the same pixels.
            clock: gets the laps "detector" and "losses", in the backward pass too.
        """
        config, clock = self.config, clock or StepClock(denoised.device)
        pixel, terms = self.pixel(denoised, normal_dose, boxes)
        clock.lap("losses")
        losses = {"pixel": pixel}
        if not (config.perceptual or config.roi_perceptual or config.detection or config.roi_extractor):
            clock.lap_in_backward(denoised, "losses")
            return Objective(losses, terms)

        clock.lap_in_backward(denoised, "detector")
        images = self.window.clamp(denoised)
        if config.perceptual or config.roi_perceptual or config.detection:
            features = detector.features(images)
        if config.detection:
            detection = torch.stack(list(detector.losses(images, boxes, features).values())).sum()
            clock.lap_in_backward(detection, "losses")  # the other losses, made later, have been walked by then
            losses["detection"] = config.detection * detection
            terms["detection"] = detection.detach()
        normal_images = self.window.clamp(normal_dose)
        proposed = config.roi_extractor and config.regions != "boxes"
        if config.perceptual or config.roi_perceptual or proposed:
            seen = self._normal_dose(normal_images, detector, ids)
            # Weights are per unit of feature variance, whatever the detector's scale.
            scales = {k: f.float().var((0, 2, 3)).mean().clamp_min(1e-12) for k, f in seen.features.items()}
        else:
            seen = SeenInNormalDose({}, images.new_empty(len(images), 0, 5))
        clock.lap("detector")
        if config.perceptual:
            whole = torch.stack(
                [(features[k].float() - f.float()).square().mean() / scales[k] for k, f in seen.features.items()]
            ).mean()
            losses["perceptual"] = config.perceptual * whole
            terms["perceptual"] = whole.detach()
        if config.roi_perceptual or config.roi_extractor:
            regions = self.regions(normal_images, boxes, seen.proposals)
        if config.roi_perceptual:
            roi = torch.stack(
                [
                    functional.roi_perceptual_loss(
                        features[k],
                        f,
                        regions.boxes,
                        config.roi_size,
                        1 / detector.feature_strides[k],
                        box_weights=regions.weights,
                    )
                    / scales[k]
                    for k, f in seen.features.items()
                ]
            ).mean()
            losses["roi_perceptual"] = config.roi_perceptual * roi
            terms["roi_perceptual"] = roi.detach()
        if self._extractor_loss is not None:
            if next(self._extractor_loss.parameters()).device != images.device:  # moving derives all windows anew
                self._extractor_loss.to(images.device)
            found = self._extractor_loss(images.float(), normal_images.float(), regions.boxes, regions.weights, ids)
            losses["roi_extractor"] = config.roi_extractor * found
            terms["roi_extractor"] = found.detach()
        clock.lap("losses")
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

    def regions(self, images: Tensor, boxes: list[Tensor], proposals: Tensor) -> Regions:
        """Where the ROI perceptual loss looks.

        Args:
            images: [N,1,H,W], for their size.
            boxes: per image [L,4] ground-truth lesion boxes.
            proposals: [N,P,5], boxes and scores; rows of a negative score are none.
        """
        config = self.config
        regions = [b if config.regions != "proposals" else b[:0] for b in boxes]
        weights = [b.new_ones(len(b)) for b in regions]
        if config.regions != "boxes":
            found = [rows[rows[:, 4] >= 0] for rows in proposals]
            regions = [torch.cat([b, rows[:, :4].to(b)]) for b, rows in zip(regions, found, strict=True)]
            weights = [torch.cat([w, rows[:, 4].to(w)]) for w, rows in zip(weights, found, strict=True)]
        return Regions(self._grown(regions, images), torch.cat(weights))

    @torch.no_grad()
    def _normal_dose(
        self, images: Tensor, detector: LesionDetector, ids: Sequence[Hashable] | None
    ) -> SeenInNormalDose:
        """What the detector makes of normal-dose images, from the cache where it is known."""
        if self.cache is None or ids is None:
            found = self._see(images, detector)
        else:
            self.cache.keep_for((*detector.parameters(), *detector.buffers()))
            found = self.cache.features(ids, lambda number: self._see(images[number : number + 1], detector))
        return SeenInNormalDose(proposals=found.pop(_PROPOSALS), features=found)

    def _see(self, images: Tensor, detector: LesionDetector) -> dict[str, Tensor]:
        """The features of the levels that are compared, and under a name of its own [N,P,5] proposals."""
        config = self.config
        features = detector.features(images)
        most = config.proposals_per_image if config.regions != "boxes" else 0
        proposals = images.new_full((len(images), most, 5), -1, dtype=torch.float32)
        if most:
            found = detector.proposals(
                images, features, score_threshold=config.proposal_score, max_per_image=most, nms_threshold=0.3
            )
            for rows, (boxes, scores) in zip(proposals, found, strict=True):
                rows[: len(boxes)] = torch.cat([boxes, scores[:, None]], 1)
        return {**{k: features[k] for k in list(features)[: config.levels]}, _PROPOSALS: proposals}

    def _grown(self, boxes: list[Tensor], images: Tensor) -> list[Tensor]:
        grow = self.config.grow
        height, width = images.shape[-2:]
        limit = images.new_tensor([width, height, width, height])
        outward = images.new_tensor([-grow, -grow, grow, grow])
        return [torch.minimum((b + outward).clamp_min(0), limit) for b in boxes]


def check_extractor(config: ObjectiveConfig, side: int) -> None:
    """Refuse an extractor that can't be used on images of so many pixels a side; fetches and computes nothing.

    Raises:
        InputError: as `JointObjective`.
    """
    if not config.roi_extractor:
        return
    extractor = _extractor_loss(config, 0, outline_network).extractor.to("meta")
    try:
        extractor(torch.empty(1, 1, side, side, device="meta"))
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"collaborate.objective.extractor {config.extractor!r} can't be used on images of {side} x {side} pixels: "
            f"{first_line(error)}"
        ) from error


def _extractor_loss(
    config: ObjectiveConfig, cache_mib: float, load: Callable[[str, object], nn.Module] = load_network
) -> ROIPerceptualLoss:
    halo = "auto" if backend.current() == "fused" else "whole"
    try:
        name, layers = network_and_layers(config.extractor)
        with torch.random.fork_rng():
            torch.manual_seed(0)  # random weights are the same in every run, and when it resumes
            network = load(name, config.extractor_weights)
        loss = ROIPerceptualLoss(
            network,
            layers,
            halo,
            output_size=config.roi_size,
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
            cache_mib=cache_mib,
        )
        return loss.to(memory_format=torch.channels_last)
    except (ValueError, OSError) as error:
        key = "collaborate.objective.extractor"
        raise InputError(f"{key} {config.extractor!r}, weights {config.extractor_weights!r}: {error}") from error
