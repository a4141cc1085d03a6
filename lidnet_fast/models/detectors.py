"""Lesion detectors: torchvision's Faster R-CNN and RetinaNet behind one interface that shares features.

Inputs are windowed images [N, 1, H, W] in [0, 1], never resized. A detector of context k also sees the k slices on each
side, [N, 2 k + 1, H, W], and looks for lesions in the middle one. Boxes are (x1, y1, x2, y2) in pixels of the image,
pixel edges at integers. There is one class, "lesion", with label 1.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign, clip_boxes_to_image, nms, remove_small_boxes

from lidnet_fast.errors import InputError
from lidnet_fast.functional import multiscale_roi_align
from lidnet_fast.models.backbones import Backbone, DilatedBackbone, ResNetFPN, SmallFPN
from lidnet_fast.models.registry import construct, unknown_name

#: Square anchors in pixels for strides 4, 8 and 16. In LIDC-IDRI, lesion boxes are 4.7 to 43 pixels wide and the square
#: root of their area is log-normal with median 13: neighbouring sizes are a factor 1.3 apart, so that every lesion has
#: an anchor with IoU above .7 but for its offset from the grid.
LESION_ANCHORS: tuple[tuple[int, ...], ...] = ((6, 8, 11), (14, 18, 23), (30, 38, 48))
#: The same range on a single stride-4 map.
LESION_ANCHORS_ONE_LEVEL: tuple[tuple[int, ...], ...] = ((5, 8, 12, 18, 27, 40),)

_LESION = 1
_CLASSES = 2  # torchvision counts the background


class _KeepSize(GeneralizedRCNNTransform):
    """torchvision's transform without its resizing (its own `_skip_resize` still resizes in eval mode)."""

    def resize(self, image: Tensor, target: Any = None) -> tuple[Tensor, Any]:
        return image, target


class _BoxCoder(BoxCoder):
    """Decodes in the boxes' dtype.

    torchvision's rounds boxes to the dtype of the head's output, under autocast bfloat16: to whole pixels from 128 on,
    to every second from 256.
    """

    def decode_single(self, rel_codes: Tensor, boxes: Tensor) -> Tensor:
        return super().decode_single(rel_codes.to(boxes.dtype), boxes)


class _BoxPool(MultiScaleRoIAlign):
    """torchvision's pooling of boxes, which its models insist on, computed by our op."""

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        return multiscale_roi_align(
            {name: x[name] for name in self.featmap_names},
            boxes,
            image_shapes,
            self.output_size,
            self.sampling_ratio,
            canonical_scale=self.canonical_scale,
            canonical_level=self.canonical_level,
        )


@contextmanager
def _training_flag(value: bool, *modules: nn.Module) -> Iterator[None]:
    """Set the modules' own `training` flag, which selects their code path, leaving their children's alone."""
    before = [module.training for module in modules]
    for module in modules:
        module.training = value
    try:
        yield
    finally:
        for module, flag in zip(modules, before, strict=True):
            module.training = flag


class LesionDetector(nn.Module, ABC):
    """A torchvision detector with its features, losses, proposals and detections as separate calls.

    `features` is the expensive part; the others take its result, so that one backbone pass serves the detection loss
    and the ROI perceptual loss. All calls work in train and in eval mode. The mode only decides what BatchNorm in the
    backbone does, so a frozen detector in eval mode gives losses on its running statistics and isn't changed by them.

    Images whose sides aren't multiples of the coarsest stride are padded on the right and bottom with the normalisation
    mean; feature maps cover the padded image, boxes are clipped to the true one.

    Attributes:
        model: the torchvision model; `model(list(images))` gives torchvision's own result on the same weights.
        feature_strides: stride in pixels of every feature level by name, finest first.
        score_threshold: `detect` drops detections that score less.
        nms_threshold: IoU above which `detect` drops the lower-scoring of two boxes.
        max_detections: most detections that `detect` returns per image.
        context: neighbouring slices on each side that it sees as channels; see `lidnet_fast.neighbours.stacks`.
    """

    def __init__(
        self,
        model: Any,
        feature_strides: dict[str, int],
        score_threshold: float,
        nms_threshold: float,
        max_detections: int,
        context: int = 0,
    ) -> None:
        super().__init__()
        self.model: Any = model
        self.feature_strides = feature_strides
        self.score_threshold = score_threshold
        self.nms_threshold = nms_threshold
        self.max_detections = max_detections
        self.context = context

    def features(self, images: Tensor) -> dict[str, Tensor]:
        """Feature maps by level name, finest first; differentiable.

        Args:
            images: windowed images [N, 2 context + 1, H, W], floating point, in [0, 1].

        Returns:
            Name -> [N, C, ceil(H / stride), ceil(W / stride)] (for sides padded as the class describes).

        Raises:
            ValueError: `images` isn't a floating-point tensor of this shape.
        """
        slices = 2 * self.context + 1
        if images.dim() != 4 or images.shape[1] != slices or not images.is_floating_point():
            raise ValueError(
                f"images must be floating point [N, {slices}, H, W], got {images.dtype} {list(images.shape)}"
            )
        transform = self.model.transform
        normalised = (images - transform.image_mean[0]) / transform.image_std[0]
        height, width = self._padded(images)
        if (height, width) != tuple(images.shape[-2:]):
            normalised = F.pad(normalised, (0, width - images.shape[-1], 0, height - images.shape[-2]))
        return self.model.backbone(normalised)

    def losses(
        self, images: Tensor, boxes: Sequence[Tensor], features: dict[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Detection losses, in train and in eval mode; their sum is what a detector minimises.

        Differentiable in `images` (or in `features`). Anchors and proposals are sampled with torch's global generator.

        Args:
            images: as in `features`.
            boxes: per image the lesions' boxes [L, 4] in pixels; L may be 0.
            features: what `features(images)` returned, to share it.

        Returns:
            Name -> scalar loss.

        Raises:
            ValueError: the number or shape of `boxes` doesn't fit, or a box is empty or not finite (its image and row
                are named).
        """
        targets = self._targets(images, boxes)
        return self._losses(self._float(images, features), self._image_list(images), targets)

    @torch.no_grad()
    def proposals(
        self,
        images: Tensor,
        features: dict[str, Tensor] | None = None,
        *,
        score_threshold: float,
        max_per_image: int,
        nms_threshold: float,
    ) -> list[tuple[Tensor, Tensor]]:
        """The regions that the detector itself finds worth looking at, best first; no gradient.

        For a two-stage detector: the region proposals refined and scored by the box head. For a one-stage detector: its
        decoded anchors. Either way the detections at thresholds of the caller's choice.

        Args:
            images: as in `features`.
            features: what `features(images)` returned, to share it.
            score_threshold: drop what scores less.
            max_per_image: keep at most this many per image.
            nms_threshold: IoU above which the lower-scoring of two boxes is dropped.

        Returns:
            Per image (boxes [L, 4] within the image, scores [L] in [0, 1]).
        """
        detached = {name: level.detach() for name, level in self._float(images, features).items()}
        kept = []
        for boxes, scores in self._candidates(detached, self._image_list(images)):
            boxes, scores = boxes.float(), scores.float()
            above = scores >= score_threshold
            boxes, scores = clip_boxes_to_image(boxes[above], tuple(images.shape[-2:])), scores[above]
            large = remove_small_boxes(boxes, min_size=1e-2)
            boxes, scores = boxes[large], scores[large]
            best = nms(boxes, scores, nms_threshold)[:max_per_image]
            kept.append((boxes[best], scores[best]))
        return kept

    def detect(self, images: Tensor, features: dict[str, Tensor] | None = None) -> list[dict[str, Tensor]]:
        """Detections per image as torchvision gives them, best first; no gradient. Call `eval()` before.

        Args:
            images: as in `features`.
            features: what `features(images)` returned, to share it.

        Returns:
            Per image {"boxes": float32 [L, 4], "scores": float32 [L], "labels": int64 [L], all 1}.
        """
        found = self.proposals(
            images,
            features,
            score_threshold=self.score_threshold,
            max_per_image=self.max_detections,
            nms_threshold=self.nms_threshold,
        )
        return [
            {"boxes": boxes, "scores": scores, "labels": torch.full(scores.shape, _LESION, device=scores.device)}
            for boxes, scores in found
        ]

    def forward(
        self, images: Tensor, boxes: Sequence[Tensor] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """`losses(images, boxes)` where boxes are given, `detect(images)` otherwise."""
        return self.detect(images) if boxes is None else self.losses(images, boxes)

    @abstractmethod
    def _losses(
        self, features: dict[str, Tensor], images: ImageList, targets: list[dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Losses from float32 features and checked targets."""

    @abstractmethod
    def _candidates(self, features: dict[str, Tensor], images: ImageList) -> list[tuple[Tensor, Tensor]]:
        """Per image every decoded box [R, 4] and its score [R], before thresholds and non-maximum suppression."""

    def _padded(self, images: Tensor) -> tuple[int, int]:
        coarsest = max(self.feature_strides.values())
        height, width = images.shape[-2:]
        return height + -height % coarsest, width + -width % coarsest

    def _image_list(self, images: Tensor) -> ImageList:
        """The sizes that torchvision's heads want: of the padded batch, and of every image in it."""
        count, _, height, width = images.shape
        padded = torch.empty((count, 1, *self._padded(images)), device="meta")
        return ImageList(padded, [(height, width)] * count)

    def _float(self, images: Tensor, features: dict[str, Tensor] | None) -> dict[str, Tensor]:
        # torchvision makes anchors in the features' dtype: in bfloat16 they would be off by pixels.
        levels = self.features(images) if features is None else features
        return {name: level.float() for name, level in levels.items()}

    @staticmethod
    def _targets(images: Tensor, boxes: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        if len(boxes) != len(images):
            raise ValueError(f"boxes must have one tensor per image: got {len(boxes)} for {len(images)} images")
        for index, one in enumerate(boxes):
            if one.dim() != 2 or one.shape[1] != 4:
                raise ValueError(f"boxes[{index}] must have shape [L, 4], got {list(one.shape)}")
        moved = [one.to(device=images.device, dtype=torch.float32) for one in boxes]
        joined = torch.cat(moved)
        bad = ~(joined.isfinite().all(dim=1) & (joined[:, 2:] > joined[:, :2]).all(dim=1))
        if bad.any():
            for index, one in enumerate(bad.split([len(one) for one in moved])):
                if one.any():
                    row = int(one.nonzero()[0])
                    raise ValueError(f"boxes[{index}][{row}] is empty or not finite: {moved[index][row].tolist()}")
        return [
            {"boxes": one, "labels": torch.full((len(one),), _LESION, dtype=torch.int64, device=one.device)}
            for one in moved
        ]


class TwoStageDetector(LesionDetector):
    """Faster R-CNN (Ren et al. 2015, arXiv:1506.01497): region proposals, then a box head scores and refines them."""

    def _losses(
        self, features: dict[str, Tensor], images: ImageList, targets: list[dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        rpn, heads = self.model.rpn, self.model.roi_heads
        with _training_flag(True, rpn, heads):
            proposals, proposal_losses = rpn(images, features, targets)
            _, box_losses = heads(features, proposals, images.image_sizes, targets)
        return {**proposal_losses, **box_losses}

    def _candidates(self, features: dict[str, Tensor], images: ImageList) -> list[tuple[Tensor, Tensor]]:
        rpn, heads = self.model.rpn, self.model.roi_heads
        with _training_flag(False, rpn):
            proposals, _ = rpn(images, features)
        pooled = heads.box_roi_pool(features, proposals, images.image_sizes)
        logits, deltas = heads.box_predictor(heads.box_head(pooled))
        boxes = heads.box_coder.decode(deltas, proposals)[:, _LESION]
        scores = logits.softmax(-1)[:, _LESION]
        counts = [len(one) for one in proposals]
        return list(zip(boxes.split(counts), scores.split(counts), strict=True))


class OneStageDetector(LesionDetector):
    """RetinaNet (Lin et al. 2017, arXiv:1708.02002): every anchor is scored and refined at once, with a focal loss."""

    def _losses(
        self, features: dict[str, Tensor], images: ImageList, targets: list[dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        levels = list(features.values())
        # The focal weight of a sure negative is 1 - (1 - p), squared: in bfloat16 zero below a p of 1/512.
        outputs = {name: output.float() for name, output in self.model.head(levels).items()}
        return self.model.compute_loss(targets, outputs, self.model.anchor_generator(images, levels))

    def _candidates(self, features: dict[str, Tensor], images: ImageList) -> list[tuple[Tensor, Tensor]]:
        levels = list(features.values())
        outputs = self.model.head(levels)
        per_cell = self.model.anchor_generator.num_anchors_per_location()
        counts = [level.shape[-2] * level.shape[-1] * anchors for level, anchors in zip(levels, per_cell, strict=True)]
        found = []
        for logits, deltas, anchors in zip(
            outputs["cls_logits"], outputs["bbox_regression"], self.model.anchor_generator(images, levels), strict=True
        ):
            scores = logits[:, _LESION].sigmoid()
            # The best of every level, as torchvision selects them.
            best, start = [], 0
            for level in scores.split(counts):
                best.append(level.topk(min(self.model.topk_candidates, len(level))).indices + start)
                start += len(level)
            chosen = torch.cat(best)
            boxes = self.model.box_coder.decode_single(deltas[chosen], anchors[chosen])
            found.append((boxes, scores[chosen]))
        return found


@dataclass(frozen=True)
class DetectorOptions:
    """What `build_detector` lets a user choose.

    Raises:
        InputError: a value is out of its range.
    """

    anchor_sizes: Sequence[Sequence[int]] | None = None
    """Sides of the square anchors in pixels per feature level, equally many on each; None: those for LIDC lesions."""
    weights: str | None = None
    """Name of torchvision weights for a ResNet backbone, e.g. "IMAGENET1K_V1"; downloaded if missing."""
    image_mean: float = 0.3
    """Subtracted from windowed images; the default is about the mean of chest CT in -1000..400 HU."""
    image_std: float = 0.3
    """Divides windowed images."""
    score_threshold: float = 0.02
    """Detections that score less are dropped; low, since AP and FROC read the whole curve."""
    nms_threshold: float = 0.3
    """IoU above which the lower-scoring of two detections is dropped; lesions hardly overlap."""
    max_detections: int = 100
    """Most detections per image."""

    def __post_init__(self) -> None:
        for name in ("score_threshold", "nms_threshold"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"detector option {name} must lie in [0, 1], got {getattr(self, name)}")
        if not self.image_std > 0:
            raise InputError(f"detector option image_std must be positive, got {self.image_std}")
        if self.max_detections < 1:
            raise InputError(f"detector option max_detections must be at least 1, got {self.max_detections}")
        sizes = self.anchor_sizes
        if sizes is not None and not (
            sizes and all(len(level) == len(sizes[0]) > 0 for level in sizes) and min(map(min, sizes)) > 0
        ):
            raise InputError(f"detector option anchor_sizes needs positive sizes, equally many per level, got {sizes}")


@dataclass(frozen=True)
class _TwoStage:
    """Sizes of a Faster R-CNN: proposals before and after suppression, and the box head."""

    proposals_before: int
    proposals_after: int
    rois_per_image: int
    roi_size: int
    hidden: int

    def build(self, backbone: Backbone, anchors: AnchorGenerator, options: DetectorOptions) -> FasterRCNN:
        # A 28-pixel lesion is pooled from the second level: 7x7 samples of 4 pixels each. torchvision's own scale (224
        # pixels at level 4) would pool every lesion from the finest level.
        levels = [str(level) for level in range(len(backbone.strides))]
        pool = _BoxPool(levels, self.roi_size, sampling_ratio=2, canonical_scale=28, canonical_level=3)
        model = FasterRCNN(
            backbone,
            rpn_anchor_generator=anchors,
            rpn_pre_nms_top_n_train=self.proposals_before,
            rpn_pre_nms_top_n_test=self.proposals_before,
            rpn_post_nms_top_n_train=self.proposals_after,
            rpn_post_nms_top_n_test=self.proposals_after,
            rpn_fg_iou_thresh=0.5,
            rpn_bg_iou_thresh=0.3,
            box_roi_pool=pool,
            box_head=TwoMLPHead(backbone.out_channels * self.roi_size**2, self.hidden),
            box_predictor=FastRCNNPredictor(self.hidden, _CLASSES),
            box_batch_size_per_image=self.rois_per_image,
            box_score_thresh=options.score_threshold,
            box_nms_thresh=options.nms_threshold,
            box_detections_per_img=options.max_detections,
        )
        _kaiming(model.rpn.head.conv)
        return model


@dataclass(frozen=True)
class _OneStage:
    """Sizes of a RetinaNet: hidden convolutions of each head."""

    head_convolutions: int

    def build(self, backbone: Backbone, anchors: AnchorGenerator, options: DetectorOptions) -> RetinaNet:
        # Looser than the usual .5 and .4: a 5-pixel lesion off a stride-4 grid overlaps no anchor by half.
        model = RetinaNet(
            backbone,
            _CLASSES,
            anchor_generator=anchors,
            fg_iou_thresh=0.4,
            bg_iou_thresh=0.3,
            topk_candidates=200,
            score_thresh=options.score_threshold,
            nms_thresh=options.nms_threshold,
            detections_per_img=options.max_detections,
        )
        for head in (model.head.classification_head, model.head.regression_head):
            head.conv = head.conv[: self.head_convolutions]
            _kaiming(head.conv)
        return model


def _kaiming(convolutions: nn.Module) -> None:
    """Initialise hidden convolutions for ReLU; torchvision's standard deviation of 0.01 suits long schedules only."""
    for layer in convolutions.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")


@dataclass(frozen=True)
class _Architecture:
    backbone: Callable[..., Backbone]
    heads: _TwoStage | _OneStage
    anchors: tuple[tuple[int, ...], ...] = LESION_ANCHORS
    pretrained: bool = False


_LARGE = _TwoStage(proposals_before=1000, proposals_after=500, rois_per_image=256, roi_size=7, hidden=1024)
_SMALL = _TwoStage(proposals_before=200, proposals_after=100, rois_per_image=64, roi_size=5, hidden=128)

#: Detectors by name.
DETECTORS: dict[str, _Architecture] = {
    "faster_rcnn_resnet18_fpn": _Architecture(partial(ResNetFPN, "resnet18"), _LARGE, pretrained=True),
    "faster_rcnn_resnet50_fpn": _Architecture(partial(ResNetFPN, "resnet50"), _LARGE, pretrained=True),
    "faster_rcnn_small": _Architecture(SmallFPN, _SMALL),
    "retinanet_resnet18_fpn": _Architecture(partial(ResNetFPN, "resnet18"), _OneStage(4), pretrained=True),
    "retinanet_resnet50_fpn": _Architecture(partial(ResNetFPN, "resnet50"), _OneStage(4), pretrained=True),
    "retinanet_small": _Architecture(DilatedBackbone, _OneStage(2), LESION_ANCHORS_ONE_LEVEL),
    "retinanet_small_fpn": _Architecture(SmallFPN, _OneStage(2)),
}


def build_detector(name: str, *, context: int = 0, **options: Any) -> LesionDetector:
    """Make a lesion detector with random weights (torch's global generator) unless `weights` says otherwise.

    Names: "faster_rcnn_resnet18_fpn" and "faster_rcnn_resnet50_fpn" (two-stage), "retinanet_resnet18_fpn" and
    "retinanet_resnet50_fpn" (one-stage). For CPUs: "faster_rcnn_small" (two-stage), "retinanet_small_fpn" (one-stage on
    the same kind of pyramid) and "retinanet_small" (one-stage on a single dilated level).

    Args:
        name: one of `DETECTORS`.
        context: neighbouring slices on each side that it sees as channels.
        options: fields of `DetectorOptions`.

    Raises:
        InputError: unknown name or option, an option out of range, anchors that don't fit the levels, or `weights` for
            a detector that has none.
    """
    if name not in DETECTORS:
        raise unknown_name("detector", name, DETECTORS)
    chosen = construct("detector", name, DetectorOptions, options)
    architecture = DETECTORS[name]
    if chosen.weights is not None and not architecture.pretrained:
        raise InputError(f"detector {name!r} has no pretrained weights, got weights={chosen.weights!r}")
    pretrained = {"weights": chosen.weights} if architecture.pretrained else {}
    backbone = architecture.backbone(**pretrained, context=context)
    strides = backbone.strides
    sizes = architecture.anchors if chosen.anchor_sizes is None else chosen.anchor_sizes
    if len(sizes) != len(strides):
        raise InputError(f"detector {name!r} has {len(strides)} feature levels, got anchor_sizes for {len(sizes)}")
    anchors = AnchorGenerator(tuple(tuple(level) for level in sizes), ((1.0,),) * len(sizes))
    model = architecture.heads.build(backbone, anchors, chosen)
    for module in model.modules():
        if isinstance(getattr(module, "box_coder", None), BoxCoder):
            module.box_coder = _BoxCoder(module.box_coder.weights)
    model.transform = _KeepSize(1, 1, [chosen.image_mean], [chosen.image_std], size_divisible=max(strides))
    kind: type[LesionDetector] = TwoStageDetector if isinstance(architecture.heads, _TwoStage) else OneStageDetector
    named = {str(level): stride for level, stride in enumerate(strides)}
    return kind(model, named, chosen.score_threshold, chosen.nms_threshold, chosen.max_detections, context)
