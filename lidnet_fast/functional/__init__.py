"""The public face of the ops: arguments are checked here, then the chosen backend computes.

Every function takes float32, float64, float16 and bfloat16, contiguous or not. Half-precision inputs are computed in
float32 and give a float32 result, or one of their own dtype where the result is features or pixels again. Their
gradients come back in their own dtype. Autocast doesn't change that.

Types, shapes, dtypes, devices and options are checked before any kernel runs. Values of boxes and weights are read on
CPU tensors only: NaN, infinities, x2 < x1 and a batch index that isn't there raise a ValueError that names the row. On
CUDA tensors, where reading would wait for the device, and inside torch.compile and torch.export, an assertion is
queued ahead of the op instead. It fails with a RuntimeError, on CUDA at the next synchronisation, as device-side
assertions do. On other accelerators the caller answers for the values. The library's own kernels clamp a batch index
into [0, N), so that a wrong one never reads outside the features.
"""

from .gradients import combine_gradients, gradient_gramian
from .pixel_losses import MultiLossOutput, check_term_weights, multi_loss, multi_loss_jacobian
from .roi import (
    check_pooling,
    multiscale_roi_align,
    multiscale_roi_perceptual_loss,
    roi_align,
    roi_perceptual_loss,
    roi_windows,
)

__all__ = [
    "MultiLossOutput",
    "check_pooling",
    "check_term_weights",
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
