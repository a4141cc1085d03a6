"""The fused ops as PyTorch sees them: schemas, fakes, autograd, vmap, and which kernel runs on which device.

Each public function here has the signature of its definition in `lidnet_fast.reference`, and is reached through
`lidnet_fast.functional`, which checks the arguments. Kernels in C++ and CUDA register themselves when
`lidnet_fast.backend` loads their libraries; Triton's are imported at the first call with a CUDA tensor.
"""

from .gradients import combine_gradients, gradient_gramian
from .pixel_losses import multi_loss, multi_loss_jacobian
from .roi import (
    multiscale_roi_align,
    multiscale_roi_perceptual_loss,
    roi_align,
    roi_perceptual_loss,
    roi_windows,
)

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

# Which of them the kernels of each kind compute, by the names of `backend.missing_kernels`.
KERNELS = {
    "cpu": frozenset(__all__),
    "cuda, Triton": frozenset({"multiscale_roi_perceptual_loss", "roi_perceptual_loss", "roi_windows"}),
    "cuda, C++": frozenset({"combine_gradients", "gradient_gramian", "multi_loss", "multi_loss_jacobian"}),
}
