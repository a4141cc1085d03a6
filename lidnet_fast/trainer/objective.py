"""The joint objective of a denoiser step (arXiv:2104.08845): pixel terms and the frozen detector's opinion."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lidnet_fast import backend, functional
from lidnet_fast.errors import InputError
from lidnet_fast.extractors.cache import FeatureCache
from lidnet_fast.extractors.layers import feature_variance
from lidnet_fast.extractors.networks import load_network, network_and_layers, outline_network
from lidnet_fast.losses import ROIPerceptualLoss
from lidnet_fast.models.lesion_detector import LesionDetector
from lidnet_fast.models.registry import first_line
from lidnet_fast.models.windowing import HUWindow
from lidnet_fast.neighbours import middle
from lidnet_fast.trainer.clock import StepClock
from lidnet_fast.trainer.config import ObjectiveConfig


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
class NormalDoseReading:
    """What the detector makes of the normal-dose images of one batch."""

    features: dict[str, Tensor]
    """[N,C,h,w] of the levels that are compared."""
    proposals: Tensor
    """float32 [N,P,5], boxes and scores; rows of a negative score are none."""


_PROPOSALS = "proposals"


@dataclass(frozen=True)
class TermInputs:
    """What the terms read of one batch; a field that no term needs is empty."""

    images: Tensor
    """The denoised slices that the detector sees, windowed and clamped, [N,C,H,W]."""
    normal_images: Tensor
    """The normal-dose images, likewise."""
    boxes: list[Tensor]
    """Per image [L,4] ground-truth lesion boxes."""
    detector: LesionDetector
    features: dict[str, Tensor]
    """The detector's features of the denoised images, [N,C,h,w] by level."""
    normal_features: dict[str, Tensor]
    """Its features of normal dose, of the levels that are compared."""
    scales: dict[str, Tensor]
    """The variance of each level's normal-dose features: weights are per unit of it, whatever the detector's scale."""
    regions: Regions
    ids: Sequence[Hashable] | None
    """What each normal-dose image is known by in caches."""


class Term(ABC):
    """A loss on features of the denoised images; `weight` times its value enters the objective.

    A new term is a subclass and its line in `JointObjective`.
    """

    name: ClassVar[str]
    reads: ClassVar[frozenset[str]]
    """Which costly fields of `TermInputs` it needs: "features", "normal_features", "regions"."""

    def __init__(self, weight: float) -> None:
        self.weight = weight

    @abstractmethod
    def __call__(self, inputs: TermInputs) -> Tensor:
        """The unweighted loss, a scalar."""


class Detection(Term):
    """The detector's own loss on the denoised images."""

    name, reads = "detection", frozenset({"features"})

    def __call__(self, inputs: TermInputs) -> Tensor:
        """The sum of the detector's losses."""
        losses = inputs.detector.losses(inputs.images, inputs.boxes, inputs.features)
        return torch.stack(list(losses.values())).sum()


class Perceptual(Term):
    """The mean square difference of the detector's feature maps."""

    name, reads = "perceptual", frozenset({"features", "normal_features"})

    def __call__(self, inputs: TermInputs) -> Tensor:
        """The mean over levels."""
        pairs = [(inputs.features[k], f, inputs.scales[k]) for k, f in inputs.normal_features.items()]
        return torch.stack([(found.float() - f.float()).square().mean() / scale for found, f, scale in pairs]).mean()


class ROIPerceptual(Term):
    """The ROI perceptual loss of the detector's features."""

    name, reads = "roi_perceptual", frozenset({"features", "normal_features", "regions"})

    def __init__(self, weight: float, roi_size: int) -> None:
        super().__init__(weight)
        self.roi_size = roi_size

    def __call__(self, inputs: TermInputs) -> Tensor:
        """The mean over levels."""
        values = []
        for level, target in inputs.normal_features.items():
            stride, regions = inputs.detector.feature_strides[level], inputs.regions
            loss = functional.roi_perceptual_loss(
                inputs.features[level], target, regions.boxes, self.roi_size, 1 / stride, box_weights=regions.weights
            )
            values.append(loss / inputs.scales[level])
        return torch.stack(values).mean()


class ROIExtractor(Term):
    """The ROI perceptual loss of another network's features of the middle slices, in windows around the regions."""

    name, reads = "roi_extractor", frozenset({"regions"})

    def __init__(self, weight: float, loss: ROIPerceptualLoss) -> None:
        super().__init__(weight)
        self.loss = loss

    def __call__(self, inputs: TermInputs) -> Tensor:
        """The loss of the extractor's layers."""
        if next(self.loss.parameters()).device != inputs.images.device:  # moving derives all windows again
            self.loss.to(inputs.images.device)
        images, normal_images = middle(inputs.images).float(), middle(inputs.normal_images).float()
        return self.loss(images, normal_images, inputs.regions.boxes, inputs.regions.weights, inputs.ids)


class JointObjective:
    """Weighted sum of the terms of `ObjectiveConfig`; a term of weight 0 is not computed.

    The detector's backbone sees the denoised image once: its features serve the detection loss, the perceptual loss on
    whole maps and the ROI perceptual loss alike. A detector with a context sees the denoised neighbours, too; pixel
    terms and the other extractor are about the middle slices. Another extractor's features are computed in windows
    around the regions, or of whole images where the ops run on their definitions.

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
        terms: list[Term] = [
            Detection(config.detection),
            Perceptual(config.perceptual),
            ROIPerceptual(config.roi_perceptual, config.roi_size),
        ]
        self.terms = [term for term in terms if term.weight]
        if config.roi_extractor:
            self.terms.append(ROIExtractor(config.roi_extractor, _extractor_loss(config, extractor_cache_mib)))
        self._reads = frozenset[str]().union(*(term.reads for term in self.terms))

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
            denoised: windowed [N, 2 context + 1, H, W] of the detector's context, with a gradient.
            normal_dose: windowed, of the same shape.
            boxes: per image [L,4] ground-truth lesion boxes.
            detector: frozen, in eval mode.
            ids: what each normal-dose image is known by in the caches; the same id has to mean the same pixels.
            clock: gets the laps "detector" and "losses", in the backward pass too.
        """
        clock = clock or StepClock(denoised.device)
        pixel, values = self.pixel(denoised, normal_dose, boxes)
        clock.lap("losses")
        losses = {"pixel": pixel}
        clock.lap_in_backward(denoised, "detector" if self.terms else "losses")
        if not self.terms:
            return Objective(losses, values)
        inputs = self._inputs(denoised, normal_dose, boxes, detector, ids)
        clock.lap("detector")
        for term in self.terms:
            value = term(inputs)
            if isinstance(term, Detection):
                clock.lap_in_backward(value, "losses")  # the other losses, made later, have been walked by then
                clock.lap("detector")
            losses[term.name] = term.weight * value
            values[term.name] = value.detach()
        clock.lap("losses")
        return Objective(losses, values)

    def _inputs(
        self,
        denoised: Tensor,
        normal_dose: Tensor,
        boxes: list[Tensor],
        detector: LesionDetector,
        ids: Sequence[Hashable] | None,
    ) -> TermInputs:
        """What the terms of this objective read of one batch."""
        images, normal_images = self.window.clamp(denoised), self.window.clamp(normal_dose)
        features = detector.features(images) if "features" in self._reads else {}
        reading = NormalDoseReading({}, images.new_empty(len(images), 0, 5))
        proposed = "regions" in self._reads and self.config.regions != "boxes"
        if "normal_features" in self._reads or proposed:
            reading = self.read_normal_dose(normal_images, detector, ids)
        scales = {k: feature_variance(f) for k, f in reading.features.items()}
        regions = Regions([], images.new_empty(0))
        if "regions" in self._reads:
            regions = self.regions(normal_images, boxes, reading.proposals)
        return TermInputs(images, normal_images, boxes, detector, features, reading.features, scales, regions, ids)

    def pixel(self, denoised: Tensor, normal_dose: Tensor, boxes: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The pixel terms alone, of the middle slices: their weighted sum and each term's detached value."""
        config = self.config
        result = functional.multi_loss(
            middle(denoised).float(),  # autocast leaves the network's output in half precision
            middle(normal_dose),
            config.pixel,
            boxes=self._grown(boxes, denoised) if config.roi_weight != 1 else None,
            roi_weight=config.roi_weight if config.roi_weight != 1 else None,
        )
        return result.total, dict(result.terms)

    def regions(self, images: Tensor, boxes: list[Tensor], proposals: Tensor) -> Regions:
        """Where the ROI perceptual loss looks.

        Args:
            images: [N,C,H,W], for their size.
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
    def read_normal_dose(
        self, images: Tensor, detector: LesionDetector, ids: Sequence[Hashable] | None
    ) -> NormalDoseReading:
        """What the detector makes of normal-dose images, from the cache where it is known."""
        if self.cache is None or ids is None:
            found = self._detect(images, detector)
        else:
            self.cache.keep_for((*detector.parameters(), *detector.buffers()))
            found = self.cache.features(ids, lambda number: self._detect(images[number : number + 1], detector))
        return NormalDoseReading(proposals=found.pop(_PROPOSALS), features=found)

    def _detect(self, images: Tensor, detector: LesionDetector) -> dict[str, Tensor]:
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
    """Refuse an extractor that can't be used on images of `side` pixels a side; fetches and computes nothing.

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
            mean="imagenet",
            cache_mib=cache_mib,
        )
        return loss.to(memory_format=torch.channels_last)
    except (ValueError, OSError) as error:
        key = "collaborate.objective.extractor"
        raise InputError(f"{key} {config.extractor!r}, weights {config.extractor_weights!r}: {error}") from error
