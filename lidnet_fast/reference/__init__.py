"""The definitions: every op in plain PyTorch and torchvision.

They are the fallback where no kernel is available and the oracle that kernels are tested against. They take arguments
that `lidnet_fast.functional` has already checked and brought to one form (boxes as Tensor[K, 5], or [K, 7] for volumes,
in the dtype of the arithmetic, output sizes as tuples), and run outside autocast. Nothing here imports the rest of the
package.
"""

from .gradients import combine_gradients, gradient_gramian
from .multi_loss import multi_loss, multi_loss_jacobian
from .multiscale_roi_perceptual import multiscale_roi_perceptual_loss
from .roi_align import multiscale_roi_align, roi_align
from .roi_perceptual import roi_perceptual_loss
from .roi_windows import roi_windows

__all__ = [
    "combine_gradients",
    "gradient_gramian",
    "multi_loss",
    "multi_loss_jacobian",
    "multiscale_roi_align",
    "multiscale_roi_perceptual_loss",
    "roi_align",
    "roi_perceptual_loss",
    "roi_windows",
]
