"""The pixel losses as a module."""

from collections.abc import Mapping

from torch import Tensor, nn

from . import functional as fast
from ._checks import Boxes, check_positive
from .functional import MultiLossOutput

__all__ = ["MultiLoss"]


class MultiLoss(nn.Module):
    """Weighted sum of pixel losses, `functional.multi_loss` with its options kept.

    Args:
        weights: Term -> weight; "l1", "mse", "charbonnier", "ssim", "ms_ssim", "edge", "tv".
        roi_weight: Weight of a pixel inside the boxes, for l1, mse and charbonnier; the module needs boxes then.
        data_range: Largest minus smallest possible pixel value, for ssim and ms_ssim.

    Raises:
        ValueError: For an unknown term or a bad option.
    """

    def __init__(
        self, weights: Mapping[str, float], *, roi_weight: float | None = None, data_range: float = 1.0
    ) -> None:
        super().__init__()
        fast.check_term_weights(weights)
        if roi_weight is not None:
            check_positive("roi_weight", roi_weight)
        check_positive("data_range", data_range)
        self.weights = {name: float(weight) for name, weight in weights.items()}
        self.roi_weight = None if roi_weight is None else float(roi_weight)
        self.data_range = float(data_range)

    def forward(self, denoised: Tensor, normal_dose: Tensor, boxes: Boxes | None = None) -> MultiLossOutput:
        """The loss of a batch: MultiLossOutput(total, terms), as `functional.multi_loss`.

        Args:
            denoised: Images [N, C, H, W] or volumes [N, C, D, H, W]. Differentiable.
            normal_dose: As `denoised`; gets no gradient, so it mustn't require one.
            boxes: As in `functional.multi_loss`; with `roi_weight` only, and always then.

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
