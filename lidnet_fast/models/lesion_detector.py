"""What every lesion detector can be asked for: torchvision's Faster R-CNN and RetinaNet behind one interface.

Inputs are windowed images [N, 1, H, W] in [0, 1], never resized. A detector of context k also sees the k slices on each
side, [N, 2 k + 1, H, W], and looks for lesions in the middle one. Boxes are (x1, y1, x2, y2) in pixels of the image,
pixel edges at integers. There is one class, "lesion", with label 1.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import clip_boxes_to_image, nms, remove_small_boxes

_LESION = 1


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
