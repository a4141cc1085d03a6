"""The losses as modules on images."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from . import functional as fast
from ._checks import Boxes, check_pair, check_positive
from .extractors.layers import LayerExtractor, spatial_scale
from .functional import MultiLossOutput

__all__ = ["MultiLoss", "ROIPerceptualLoss"]


class ROIPerceptualLoss(nn.Module):
    """Perceptual loss inside lesion boxes: features of the denoised and the normal-dose image, compared in the boxes.

    The sum over the layers of weight * `functional.roi_perceptual_loss` of that layer's features (LIDnet, Chen et al.,
    arXiv:2104.08845). A layer's spatial scale follows from the size of its features. The extractor is a frozen copy of
    the network given (see `extractors.LayerExtractor`); the normal-dose image goes through it without a graph.

    Args:
        extractor: Network whose features are compared; any module that torch.fx can trace.
        layers: Name of a layer, names (each of weight 1), or name -> weight.
        halo: "exact" or "auto". Both compute the features of whole images, which is exact.
        output_size: As in `functional.roi_perceptual_loss`, like the four that follow.
        sampling_ratio: Samples per bin and axis.
        aligned: Whether the boxes are in pixel-edge coordinates.
        criterion: "mse", "l1", "smooth_l1" or "charbonnier".
        reduction: "none", "sum" or "mean" over the boxes.
        mean: Per channel, subtracted from the images before the extractor; None for nothing. A network trained on
            ImageNet expects its mean and std on images in [0, 1].
        std: Per channel, divides the images after that; None for nothing.

    Raises:
        TypeError: If the extractor isn't a module.
        ValueError: For an unknown layer (naming near matches), an extractor that can't be traced, or a bad option.
    """

    def __init__(
        self,
        extractor: nn.Module,
        layers: str | Sequence[str] | Mapping[str, float],
        halo: str = "exact",
        *,
        output_size: int | tuple[int, int] = 7,
        sampling_ratio: int = 2,
        aligned: bool = True,
        criterion: str = "mse",
        reduction: str = "mean",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if halo not in ("exact", "auto"):
            raise ValueError(
                f'halo must be "exact" or "auto" (this release computes features of whole images only), got {halo!r}'
            )
        self.layer_weights = _layer_weights(layers)
        self.output_size = fast.check_pooling(output_size, sampling_ratio, criterion, reduction)
        self.halo = halo
        self.sampling_ratio = sampling_ratio
        self.aligned = aligned
        self.criterion = criterion
        self.reduction = reduction
        self.extractor = LayerExtractor(extractor, self.layer_weights, mean=mean, std=std)

    def forward(self, denoised: Tensor, normal_dose: Tensor, boxes: Boxes, box_weights: Tensor | None = None) -> Tensor:
        """The loss of a batch.

        Args:
            denoised: Images [N, C, H, W], C 1 or the extractor's. Differentiable.
            normal_dose: As `denoised`; gets no gradient, so it mustn't require one.
            boxes: As in `functional.roi_perceptual_loss`, in pixels of the images.
            box_weights: As in `functional.roi_perceptual_loss`.

        Returns:
            Scalar, or Tensor[K] with reduction "none", in float32 (float64 for float64 features).

        Raises:
            TypeError: As `functional.roi_perceptual_loss`.
            ValueError: As `functional.roi_perceptual_loss`.
        """
        check_pair(denoised, normal_dose, "denoised", "normal_dose")
        inputs = self.extractor(denoised)
        with torch.no_grad():
            targets = self.extractor(normal_dose)
        losses = [
            weight
            * fast.roi_perceptual_loss(
                inputs[layer],
                targets[layer],
                boxes,
                self.output_size,
                spatial_scale(inputs[layer].shape[2:], denoised.shape[2:]),
                self.sampling_ratio,
                self.aligned,
                criterion=self.criterion,
                box_weights=box_weights,
                reduction=self.reduction,
            )
            for layer, weight in self.layer_weights.items()
        ]
        return torch.stack(losses).sum(0)

    def extra_repr(self) -> str:
        """Layers with their weights, and the options."""
        layers = ", ".join(f"{layer}: {weight:g}" for layer, weight in self.layer_weights.items())
        return (
            f"layers={{{layers}}}, halo={self.halo!r}, output_size={self.output_size}, "
            f"sampling_ratio={self.sampling_ratio}, aligned={self.aligned}, criterion={self.criterion!r}, "
            f"reduction={self.reduction!r}"
        )


class MultiLoss(nn.Module):
    """Weighted sum of pixel losses, `functional.multi_loss` with its options kept.

    Args:
        weights: Term -> weight; "l1", "mse", "charbonnier", "ssim", "ms_ssim", "edge", "tv".
        roi_weight: Weight of a pixel inside the boxes, for l1, mse and charbonnier.
        data_range: Largest minus smallest possible pixel value, for ssim and ms_ssim.

    Raises:
        ValueError: For an unknown term or a bad option.
    """

    def __init__(self, weights: Mapping[str, float], *, roi_weight: float = 1.0, data_range: float = 1.0) -> None:
        super().__init__()
        fast.check_term_weights(weights)
        check_positive("roi_weight", roi_weight)
        check_positive("data_range", data_range)
        self.weights = dict(weights)
        self.roi_weight = roi_weight
        self.data_range = data_range

    def forward(self, denoised: Tensor, normal_dose: Tensor, boxes: Boxes | None = None) -> MultiLossOutput:
        """The loss of a batch: MultiLossOutput(total, terms), as `functional.multi_loss`.

        Args:
            denoised: Images [N, C, H, W] or volumes [N, C, D, H, W]. Differentiable.
            normal_dose: As `denoised`; gets no gradient, so it mustn't require one.
            boxes: As in `functional.multi_loss`.

        Raises:
            TypeError: As `functional.multi_loss`.
            ValueError: As `functional.multi_loss`.
        """
        return fast.multi_loss(
            denoised, normal_dose, self.weights, boxes=boxes, roi_weight=self.roi_weight, data_range=self.data_range
        )

    def extra_repr(self) -> str:
        """The options."""
        return f"weights={self.weights}, roi_weight={self.roi_weight}, data_range={self.data_range}"


def _layer_weights(layers: str | Sequence[str] | Mapping[str, float]) -> dict[str, float]:
    if isinstance(layers, Mapping):
        weights = {str(layer): float(weight) for layer, weight in layers.items()}
    else:
        weights = dict.fromkeys((layers,) if isinstance(layers, str) else layers, 1.0)
    for layer, weight in weights.items():
        if not math.isfinite(weight):
            raise ValueError(f"layers[{layer!r}] must be a finite weight, got {weight}")
    return weights
