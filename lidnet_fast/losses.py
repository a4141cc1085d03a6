"""The losses as modules on images."""

import logging
import math
from collections.abc import Hashable, Mapping, Sequence
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from . import functional as fast
from ._checks import Boxes, check_choice, check_float, check_pair
from ._plausibility import boxes_inside
from ._tensors import compute_dtype, reduce_boxes, upload
from .extractors.cache import FeatureCache
from .extractors.layers import LayerExtractor, spatial_scale
from .extractors.parts import Part, Parts, parts_of
from .extractors.windowed import Folded, WindowBatch, WindowedExtractor
from .extractors.windows import Plan
from .functional._boxes import as_box_weights
from .functional._pooling import Pooling
from .functional.roi import OUTSIDE, compare_boxes, windows_of_pair
from .pixel_losses import MultiLoss
from .prepared import Arranged, PreparedBoxes, rois_on_host

__all__ = ["MultiLoss", "PreparedBoxes", "ROIPerceptualLoss"]

HALOS = ("exact", "auto", "whole")
_log = logging.getLogger(__name__)


class ROIPerceptualLoss(nn.Module):
    """Perceptual loss inside lesion boxes: features of the denoised and the normal-dose image, compared in the boxes.

    The sum over the layers of weight * `functional.roi_perceptual_loss` of that layer's features (LIDnet, Chen et al.,
    arXiv:2104.08845). The extractor is a frozen copy of the network given (see `extractors.LayerExtractor`); the
    normal-dose image goes through it without a graph.

    Only what the boxes need is computed: windows of the images around them, as large as the layers' receptive fields
    demand, with the values and gradients of the whole image's features. Images whose windows would cost more than
    the whole (lesions that cover them) are computed as a whole; `plan` says what is done. Windows are planned on the
    host: boxes on the CPU save a synchronisation when images are on a GPU.

    Args:
        extractor: Network whose features are compared; any module that torch.fx can trace (`extractors.load_network`
            gives torchvision's by name; of a torchvision detector, its `backbone`).
        layers: Name of a layer, names (each of weight 1), or name -> weight; `extractors.layer_names(extractor)` lists
            them. Of a VGG, and of a part of its `features`, "relu3_4" and the like too; numbers are the names of a
            `Sequential`'s modules.
        halo: "exact": windows with the whole receptive field; the layers must have finite ones. "auto": the
            same, and whole images where a layer has none. "whole": whole images, to compare with.
        output_size: As in `functional.roi_perceptual_loss`, like the four that follow.
        sampling_ratio: Samples per bin and axis.
        aligned: Whether the boxes are in pixel-edge coordinates.
        criterion: "mse", "l1", "smooth_l1" or "charbonnier".
        reduction: "none", "sum" or "mean" over the boxes.
        outside: As in `functional.roi_perceptual_loss`.
        mean: Per channel, subtracted from the images before the extractor; None for nothing. "imagenet" is the mean and
            the std that a network trained on ImageNet expects, for images in [0, 1].
        std: Per channel, divides the images after that; None for nothing. On the CPU an `InputWarning` tells if the
            normal-dose images are far from what they suit.
        normalise_by: Normal-dose images, as `forward` takes them in one Tensor. Each layer's loss is divided by the
            variance of its features of these images (the mean over channels), so that a weight means the same at every
            layer and for every network, and the same as the trainer's `roi_perceptual`. None for no division.
        save_extractor: Whether `state_dict` holds the frozen network; without it the module loads such a state dict,
            and keeps the network that it was made with.
        compiled: Put the networks of the windows through torch.compile, one for each kind of window; on CUDA they are
            captured as CUDA graphs.
        cache_mib: Memory in MiB for normal-dose features of windows, for calls with `sample_ids`; 0 for no cache.

    Attributes:
        cache: The `extractors.FeatureCache`, which knows its hit rate (also logged, level DEBUG), or None.
        variances: Tensor[layers] by which the layers' losses are divided, or None.

    Raises:
        TypeError: If the extractor isn't a module, or `normalise_by` no floating-point Tensor.
        ValueError: For an unknown layer (naming near matches), an extractor that can't be traced, a layer without a
            finite receptive field (naming what it depends on) unless `halo` is "auto", a bad option, or a
            `normalise_by` whose features don't vary.
    """

    variances: Tensor | None

    def __init__(
        self,
        extractor: nn.Module,
        layers: str | int | Sequence[str | int] | Mapping[str | int, float],
        halo: str = "exact",
        *,
        output_size: int | tuple[int, ...] = 7,
        sampling_ratio: int = 2,
        aligned: bool = True,
        criterion: str = "mse",
        reduction: str = "mean",
        outside: str = "keep",
        mean: Sequence[float] | str | None = None,
        std: Sequence[float] | None = None,
        normalise_by: Tensor | None = None,
        save_extractor: bool = True,
        compiled: bool = False,
        cache_mib: float = 0,
    ) -> None:
        super().__init__()
        check_choice("halo", halo, HALOS)
        check_choice("outside", outside, OUTSIDE)
        if cache_mib < 0:
            raise ValueError(f"cache_mib must be at least 0, got {cache_mib}")
        self.layer_weights = _layer_weights(layers)
        self.extractor = LayerExtractor(extractor, self.layer_weights, mean=mean, std=std)
        self.output_size = fast.check_pooling(
            output_size, sampling_ratio, criterion, reduction, dimensions=self.extractor.dimensions
        )
        self.halo = halo
        self.sampling_ratio = sampling_ratio
        self.aligned = aligned
        self.criterion = criterion
        self.reduction = reduction
        self.outside = outside
        self.cache = FeatureCache(cache_mib) if cache_mib else None
        variances = None if normalise_by is None else self.extractor.variances(normalise_by, "normalise_by")
        self.register_buffer("variances", variances)
        if not save_extractor:
            self.register_state_dict_post_hook(_leave_out_extractor)
            self.register_load_state_dict_pre_hook(_keep_extractor)
        self._no_windows = 'halo="whole"'
        self.windows: WindowedExtractor | None = None
        for layer, strides in self.extractor.strides.items():
            if strides is not None and len(set(strides)) > 1:
                steps = " x ".join(map(str, strides))
                raise ValueError(
                    f"layer {layer!r} has strides {steps}; they must be the same. To fix: choose another layer"
                )
        if halo == "whole":
            return
        try:
            self.windows = WindowedExtractor(self.extractor, compiled)
        except ValueError as error:
            if halo != "auto":
                raise ValueError(f'{error} (halo="auto" computes whole images)') from error
            self._no_windows = str(error)

    def forward(
        self,
        denoised: Tensor | Sequence[Tensor],
        normal_dose: Tensor | Sequence[Tensor],
        boxes: Boxes | PreparedBoxes,
        box_weights: Tensor | None = None,
        sample_ids: Sequence[Hashable] | None = None,
    ) -> Tensor:
        """The loss of a batch.

        Args:
            denoised: Images [N, C, H, W], C 1 or the extractor's ([N, C, D, H, W] for one of 3-D convolutions), or a
                list of [C, H, W] that differ in size. Differentiable.
            normal_dose: As `denoised`, of any floating-point dtype; gets no gradient, so it mustn't require one.
            boxes: As in `functional.roi_perceptual_loss`, in pixels of the images, on any device; a list for a list of
                images. Or what `prepare` made of them and their weights, for CUDA graphs; neither weights nor ids are
                given then.
            box_weights: As in `functional.roi_perceptual_loss`, on the images' device or, like boxes, on the CPU.
            sample_ids: What each normal-dose image is known by in the cache. The same id has to mean the same pixels;
                None computes without the cache.

        Returns:
            Scalar, or Tensor[K] with reduction "none", in float32 (float64 for float64 features).

        Raises:
            TypeError: As `functional.roi_perceptual_loss`, and for images of a longer dtype than the extractor's, such
                as float64 to its float32; shorter ones are converted.
            ValueError: As `functional.roi_perceptual_loss`, and for images that a layer has no cell in, or that boxes
                weren't prepared for.
            RuntimeError: If a CUDA graph is being captured, and boxes aren't prepared.
        """
        if torch.compiler.is_dynamo_compiling():  # asked first: before PyTorch 2.12 it calls itself exporting, too
            _leave_out_of_graphs()
        elif torch.compiler.is_exporting():
            raise NotImplementedError(
                "ROIPerceptualLoss plans its windows from the boxes' values, which torch.export hasn't got. "
                "To fix: export extractors.LayerExtractor and roi_perceptual_loss"
            )
        return _of_images(self, denoised, normal_dose, boxes, box_weights, sample_ids)

    def _of_images(
        self,
        denoised: Tensor | Sequence[Tensor],
        normal_dose: Tensor | Sequence[Tensor],
        boxes: Boxes | PreparedBoxes,
        box_weights: Tensor | None,
        sample_ids: Sequence[Hashable] | None,
    ) -> Tensor:
        if not isinstance(denoised, list | tuple):
            of_batch = self._of_batch(denoised, normal_dose, boxes, box_weights, sample_ids)  # type: ignore[arg-type]
            return reduce_boxes(of_batch.losses, of_batch.weights, self.reduction, of_batch.counted, of_batch.number)
        if isinstance(boxes, Tensor | PreparedBoxes) or not len(denoised) == len(normal_dose) == len(boxes) > 0:
            raise ValueError("lists of images need as many normal-dose images and Tensors of boxes, at least one")
        pairs = []
        for number, (image, target) in enumerate(zip(denoised, normal_dose, strict=True)):
            name, target_name = f"denoised[{number}]", f"normal_dose[{number}]"
            check_float(name, image)
            check_float(target_name, target)
            pairs.append(self._accepted(image[None], target[None], name, target_name))
        denoised, normal_dose = ([pair[side][0] for pair in pairs] for side in range(2))
        starts = np.cumsum([0, *(len(of_image) for of_image in boxes)])
        weights = as_box_weights(box_weights, starts[-1], denoised[0].device, compute_dtype(denoised[0].dtype))
        if weights is not None and weights.device != denoised[0].device:
            (weights,) = upload([weights], denoised[0].device)
        parts, rows = [], []
        for shape in dict.fromkeys(image.shape for image in denoised):
            members = [number for number, image in enumerate(denoised) if image.shape == shape]
            of_shape = self._of_batch(
                torch.stack([denoised[n] for n in members]),
                torch.stack([normal_dose[n] for n in members]),
                [boxes[n] for n in members],
                None,
                None if sample_ids is None else [sample_ids[n] for n in members],
            )
            parts.append(of_shape)
            rows += [row for n in members for row in range(starts[n], starts[n + 1])]
        losses = _in_order([part.losses for part in parts], rows)
        counted = [part.counted for part in parts if part.counted is not None]
        in_order, count = _in_order(counted, rows) if counted else None, sum(part.number for part in parts)
        return reduce_boxes(losses, weights, self.reduction, in_order, count)

    def _of_batch(
        self,
        denoised: Tensor,
        normal_dose: Tensor,
        boxes: Boxes | PreparedBoxes,
        box_weights: Tensor | None,
        sample_ids: Sequence[Hashable] | None,
    ) -> "_BoxLosses":
        denoised, normal_dose = self._accepted(denoised, normal_dose, "denoised", "normal_dose")
        if sample_ids is not None and len(sample_ids) != len(denoised):
            raise ValueError(f"sample_ids must have one for each image, {len(denoised)}, got {len(sample_ids)}")
        if self.cache is None:
            sample_ids = None
        if isinstance(boxes, PreparedBoxes):
            if box_weights is not None or sample_ids is not None:
                raise ValueError(
                    "box_weights and sample_ids must be None for prepared boxes. To fix: prepare with weights"
                )
            boxes.check_images(denoised)
            arranged = boxes.arranged
        else:
            on_host = self._arranged(denoised, boxes, box_weights, share_kinds=sample_ids is None)
            arranged = on_host.uploaded(denoised.device)
        self.extractor.warn_of_images(normal_dose, "normal_dose")
        losses = self._losses(denoised, normal_dose, arranged.parts, sample_ids)
        return _BoxLosses(losses, arranged.weights, arranged.counted, arranged.number)

    def prepare(self, denoised: Tensor, boxes: Boxes, box_weights: Tensor | None = None) -> PreparedBoxes:
        """Boxes of a batch where the loss needs them, for calls that a CUDA graph captures.

        Args:
            denoised: As in `forward`, but no list; only the shape, dtype and device count.
            boxes: As in `forward`.
            box_weights: As in `forward`.

        Raises:
            TypeError: As `forward`.
            ValueError: As `forward`.
        """
        check_float("denoised", denoised)
        images = self.extractor.accepted(denoised.detach()[..., :0], "denoised")
        images = images.new_empty(()).expand(denoised.shape)

        def arrange(boxes: Boxes, box_weights: Tensor | None) -> Arranged:
            on_host = box_weights.cpu() if isinstance(box_weights, Tensor) else box_weights
            return self._arranged(images, boxes, on_host, share_kinds=True)

        return PreparedBoxes(arrange, images, boxes, box_weights)

    def _arranged(self, images: Tensor, boxes: Boxes, box_weights: Tensor | None, share_kinds: bool) -> Arranged:
        """Boxes checked and planned, on the CPU; weights may be on the images' device already."""
        rois = rois_on_host(boxes, images, self.outside)
        weights = as_box_weights(box_weights, len(rois), images.device, rois.dtype)
        counted = boxes_inside(rois, images.shape[2:]) if self.outside == "ignore" else None
        parts = Parts.of([], images.ndim - 2)
        if len(rois):
            plan = self._plan(rois, images.shape[2:], len(images), share_kinds)
            parts = parts_of(plan, rois, images, self.layer_weights, self.windows)
        return Arranged(parts, weights, counted, len(rois) if counted is None else int(counted.sum()))

    def _accepted(self, denoised: Tensor, normal_dose: Tensor, name: str, target_name: str) -> tuple[Tensor, Tensor]:
        """Images checked and of one dtype: the extractor's, or with autocast what they promote to."""
        for called, images in ((name, denoised), (target_name, normal_dose)):
            check_float(called, images)
        denoised, normal_dose = (
            self.extractor.accepted(denoised, name),
            self.extractor.accepted(normal_dose, target_name),
        )
        dtype = torch.promote_types(denoised.dtype, normal_dose.dtype)
        denoised, normal_dose = denoised.to(dtype), normal_dose.to(dtype)
        check_pair(denoised, normal_dose, name, target_name, volumes=True)
        return denoised, normal_dose

    def plan(self, image_size: Sequence[int], boxes: Boxes, images: int | None = None) -> Plan:
        """Which windows, or whole images and why, `forward` would compute.

        Args:
            image_size: (H, W), or (D, H, W).
            boxes: As in `forward`.
            images: In the batch; needed for boxes that aren't a list.

        Raises:
            TypeError: If `image_size` isn't numbers.
            ValueError: As `forward`.
        """
        if not isinstance(image_size, Sequence) or not all(isinstance(side, Integral) for side in image_size):
            raise TypeError(f"image_size must be (H, W) or (D, H, W), then boxes; got {_brief(image_size)}")
        count = len(boxes) if not isinstance(boxes, Tensor) else images
        if count is None:
            raise ValueError("images must be given for boxes that aren't a list")
        return self._plan(
            rois_on_host(boxes, torch.empty((), device="cpu").expand(count, 1, *image_size), self.outside),
            image_size,
            count,
        )

    def _plan(self, rois: Tensor, image_size: Sequence[int], images: int, share_kinds: bool = True) -> Plan:
        if self.windows is None:
            whole = {int(image): self._no_windows for image in rois[:, 0].unique()}
            return Plan(window_of_box=np.full(len(rois), -1), whole=whole, relative_cost=len(whole) / max(images, 1))
        return self.windows.planner(image_size).plan(_array(rois.double()), images, self.aligned, share_kinds)

    def _losses(
        self, denoised: Tensor, normal_dose: Tensor, parts: Parts, sample_ids: Sequence[Hashable] | None
    ) -> Tensor:
        """The loss of each box, [K], all layers together."""
        size = denoised.shape[2:]
        if not parts.parts:  # an empty part of the images keeps the loss in their graph
            empty = fast.roi_windows(denoised, parts.corners, (1,) * len(size))
            return empty.flatten().to(compute_dtype(denoised.dtype))
        of_denoised, of_normal_dose = self._cut(parts, denoised, normal_dose if sample_ids is None else None)
        losses: list[Tensor] = []
        folded: Folded = {}
        for part in parts.parts:
            inputs = self._features(part, denoised, of_denoised, folded)
            with torch.no_grad():
                if part.batch is not None and sample_ids is not None:
                    kind = denoised.device.type
                    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else denoised.dtype
                    keys = [(sample_ids[window.image], window.stretches, size, dtype) for window in part.windows]
                    targets = self._cached(normal_dose, part.batch, keys)
                else:
                    targets = self._features(part, normal_dose, of_normal_dose, folded)
            losses.append(self._compare(inputs, targets, part.rois, size))
        return losses[0] if parts.order is None else torch.cat(losses).index_select(0, parts.order)

    def _cut(self, parts: Parts, denoised: Tensor, normal_dose: Tensor | None) -> tuple[list[Tensor], list[Tensor]]:
        """The windows of both images, of each part that has windows."""
        batches = [part.batch for part in parts.parts if part.batch is not None]
        counts, sizes = [len(batch.corners) for batch in batches], [batch.size for batch in batches]
        return windows_of_pair(denoised, normal_dose, parts.corners, counts, sizes) if batches else ([], [])

    def _features(self, part: Part, images: Tensor, windows: list[Tensor], folded: Folded) -> dict[str, Tensor]:
        """Those of a part of the images, from the next of the windows, which is taken, where it has windows."""
        if part.batch is not None:
            assert self.windows is not None
            return self.windows.features_of(windows.pop(0), part.batch, folded)
        assert part.images is not None
        return self.extractor.features(images if len(part.images) == len(images) else images[part.images])

    def _cached(self, normal_dose: Tensor, batch: WindowBatch, keys: Sequence[Hashable]) -> dict[str, Tensor]:
        assert self.cache is not None and self.windows is not None
        self.cache.keep_for((*self.extractor.parameters(), *self.extractor.buffers()))
        windows = self.windows
        found = self.cache.features(
            keys,
            lambda number: windows.features(normal_dose, batch._replace(corners=batch.corners[number : number + 1])),
        )
        _log.debug(
            "normal-dose features: %d windows kept in %.1f MiB, hit rate %.1f %%",
            len(self.cache),
            self.cache.bytes / 2**20,
            100 * self.cache.hit_rate,
        )
        return found

    def _compare(
        self,
        inputs: Mapping[str, Tensor],
        targets: Mapping[str, Tensor],
        rois: Sequence[Tensor],
        image_size: Sequence[int],
    ) -> Tensor:
        """The loss of each box from the features that hold it."""
        losses = []
        for (layer, weight), of_layer in zip(self.layer_weights.items(), rois, strict=True):
            features = inputs[layer]
            scale = self._scale(layer, features.shape[2:], image_size)
            pooling = Pooling(None, [scale], self.output_size, self.sampling_ratio, self.aligned)
            local = of_layer.to(compute_dtype(features.dtype))
            of_boxes = compare_boxes([features], [targets[layer]], local, pooling, self.criterion)
            losses.append(of_boxes if weight == 1 else weight * of_boxes)
        if len(losses) == 1:
            return losses[0] if self.variances is None else losses[0] / self.variances
        together = torch.stack(losses)
        return (together if self.variances is None else together / self.variances[:, None]).sum(0)

    def _scale(self, layer: str, feature_size: Sequence[int], image_size: Sequence[int]) -> float:
        """Cells of a layer per pixel."""
        strides = self.extractor.strides[layer]
        if self.windows is not None:
            return 1 / self.windows.stride(layer)
        return spatial_scale(feature_size, image_size) if strides is None else float(1 / strides[0])

    def extra_repr(self) -> str:
        """Layers with their weights, and the options."""
        layers = ", ".join(f"{layer}: {weight:g}" for layer, weight in self.layer_weights.items())
        return (
            f"layers={{{layers}}}, halo={self.halo!r}, output_size={self.output_size}, "
            f"sampling_ratio={self.sampling_ratio}, aligned={self.aligned}, criterion={self.criterion!r}, "
            f"reduction={self.reduction!r}, outside={self.outside!r}"
        )


class _BoxLosses(NamedTuple):
    """Of each box of a batch, [K]: its loss, its weight and whether it counts, None for all alike; and how many do."""

    losses: Tensor
    weights: Tensor | None
    counted: Tensor | None
    number: int


_of_images = ROIPerceptualLoss._of_images


def _leave_out_of_graphs() -> bool:
    """Has torch.compile call `_of_images` rather than trace it."""
    global _of_images
    _of_images = torch.compiler.disable(  # type: ignore[misc]
        ROIPerceptualLoss._of_images,  # type: ignore[arg-type]
        reason="ROIPerceptualLoss plans its windows from the boxes' values, outside of graphs. "
        "To fix: leave fullgraph=True out",
    )
    return True


# torch.compile calls it while it compiles. The mark is what torch.compiler.assume_constant_result sets; that imports
# torch._dynamo, as torch.compiler.disable does, which takes seconds.
_leave_out_of_graphs._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _array(values: Tensor) -> np.ndarray:
    """Values on the CPU as NumPy's; torch.func wraps all tensors, and wrappers have no memory."""
    values = torch.func.debug_unwrap(values)
    with torch._C._DisableFuncTorch():  # it would wrap them again
        return values.numpy()


def _leave_out_extractor(module: ROIPerceptualLoss, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for key in module.extractor.state_dict(prefix=f"{prefix}extractor."):
        del state[key]


def _keep_extractor(module: ROIPerceptualLoss, state: dict[str, Any], prefix: str, *further: Any) -> None:
    state.update({**module.extractor.state_dict(prefix=f"{prefix}extractor."), **state})


def _brief(value: object) -> str:
    return f"Tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"{value!r}"[:60]


def _in_order(losses: Sequence[Tensor], rows: Sequence[int]) -> Tensor:
    """The losses in the order of the boxes; the parts, one after the other, hold those of the boxes `rows`."""
    together = torch.cat(list(losses))
    (order,) = upload([torch.tensor(rows, dtype=torch.int64, device="cpu").argsort()], together.device)
    return together.index_select(0, order)


def _layer_weights(layers: str | int | Sequence[str | int] | Mapping[str | int, float]) -> dict[str, float]:
    if isinstance(layers, Mapping):
        weights = {str(layer): float(weight) for layer, weight in layers.items()}
    else:
        weights = dict.fromkeys(map(str, (layers,) if isinstance(layers, str | int) else layers), 1.0)
    for layer, weight in weights.items():
        if not math.isfinite(weight):
            raise ValueError(f"layers[{layer!r}] must be a finite weight, got {weight}")
    return weights
