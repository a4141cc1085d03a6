"""Lesion detectors by name: backbone, heads and anchors of torchvision's models, sized for lesions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign

from lidnet_fast.errors import InputError
from lidnet_fast.functional import multiscale_roi_align
from lidnet_fast.models.backbones import Backbone, DilatedBackbone, ResNetFPN, SmallFPN
from lidnet_fast.models.lesion_detector import LesionDetector, OneStageDetector, TwoStageDetector
from lidnet_fast.models.registry import construct, unknown_name

#: Square anchors in pixels for strides 4, 8 and 16. In LIDC-IDRI, lesion boxes are 4.7 to 43 pixels wide and the square
#: root of their area is log-normal with median 13: neighbouring sizes are a factor 1.3 apart, so that every lesion has
#: an anchor with IoU above .7 but for its offset from the grid.
LESION_ANCHORS: tuple[tuple[int, ...], ...] = ((6, 8, 11), (14, 18, 23), (30, 38, 48))
#: The same range on a single stride-4 map.
LESION_ANCHORS_ONE_LEVEL: tuple[tuple[int, ...], ...] = ((5, 8, 12, 18, 27, 40),)

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
