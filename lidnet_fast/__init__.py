"""Lesion-aware CT denoising (LIDnet, arXiv:2104.08845) for PyTorch.

Losses and operators for a training loop of your own, each with a plain PyTorch definition and fused kernels. The
README begins with such a loop. `lidnet-fast --help` shows the complete system, from DICOM to denoised DICOM.

Losses on images:

    MultiLoss, multi_loss            several pixel losses at once: l1, mse, charbonnier, ssim, ms_ssim, edge, tv
    MultiLossOutput                  what they return: total, and each term's value
    ROIPerceptualLoss                any network's features inside boxes, computed only where the boxes need them

Losses and pooling on features:

    roi_perceptual_loss              difference of two feature maps inside boxes
    multiscale_roi_perceptual_loss   the same on a feature pyramid
    roi_align, multiscale_roi_align  torchvision's, deterministic and faster on the CPU
    roi_windows                      windows cut out of images, with their gradient

Several losses, balanced by their gradients:

    mtl_backward                     one backward pass, weighed at the denoised image
    MTLBackwardOutput                what it returns: weights, and the gradients' norms and cosines
    multi_loss_jacobian              each pixel loss's own gradient
    gradient_gramian                 inner products of gradients
    combine_gradients                their weighted sum

    backend                          which implementation runs, and why
    InputWarning                     warns of arguments that are probably a mistake, such as boxes outside the image

`lidnet_fast.extractors` says which network's features, `lidnet_fast.models` has denoisers and detectors,
`lidnet_fast.inference` denoises with trained ones, and `lidnet_fast.metrics` scores what comes out.
"""

from . import backend
from .errors import InputWarning
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
from .multitask import MTLBackwardOutput, mtl_backward

__all__ = [
    "InputWarning",
    "MTLBackwardOutput",
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
