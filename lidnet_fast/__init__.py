"""lidnet_fast: lesion-aware CT denoising (LIDnet, arXiv:2104.08845) for PyTorch."""

from . import backend
from .functional import (
    MultiLossOutput,
    combine_gradients,
    gradient_gramian,
    multi_loss,
    multi_loss_jacobian,
    multiscale_roi_align,
    multiscale_roi_perceptual_loss,
    roi_align,
    roi_perceptual_loss,
    roi_windows,
)
from .losses import MultiLoss, ROIPerceptualLoss
from .multitask import mtl_backward

__all__ = [
    "MultiLoss",
    "MultiLossOutput",
    "ROIPerceptualLoss",
    "backend",
    "combine_gradients",
    "gradient_gramian",
    "mtl_backward",
    "multi_loss",
    "multi_loss_jacobian",
    "multiscale_roi_align",
    "multiscale_roi_perceptual_loss",
    "roi_align",
    "roi_perceptual_loss",
    "roi_windows",
]

__version__ = "0.1.0"
