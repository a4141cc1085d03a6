"""The definitions: every op in plain PyTorch and torchvision.

They are the fallback where no kernel is available and the oracle that kernels are tested against. Each takes the
arguments of the op of the same name in `lidnet_fast.ops`, which `lidnet_fast.functional` has checked and brought to one
form: features as lists of levels, boxes as Tensor[K, 5], or [K, 7] for volumes, in the dtype of the arithmetic. They
run outside autocast.
"""

from .gradients import combine_gradients, gradient_gramian
from .multi_loss import multi_loss, multi_loss_jacobian
from .roi_align import roi_align
from .roi_perceptual import roi_perceptual_loss
from .roi_windows import roi_windows

__all__ = [
    "combine_gradients",
    "gradient_gramian",
    "multi_loss",
    "multi_loss_jacobian",
    "roi_align",
    "roi_perceptual_loss",
    "roi_windows",
]
