"""The fused ops as PyTorch sees them: schemas, fakes, derivatives, vmap, and which kernel runs on which device.

`lidnet_fast.functional` checks arguments and calls `torch.ops.lidnet_fast`. Each op has a definition of the same name
and arguments in `lidnet_fast.reference`. Kernels in C++ and CUDA register themselves when `lidnet_fast.backend` loads
their libraries; Triton's are imported at the first call with a CUDA tensor.
"""

from . import gradients, pixel_losses, roi  # noqa: F401  (they register the ops)

_TRITON = frozenset({"roi_perceptual_loss", "roi_windows"})
_CUDA = frozenset({"combine_gradients", "gradient_gramian", "multi_loss", "multi_loss_jacobian"})

# The ops that the kernels of each kind compute; the kinds are the names of `backend.missing_kernels`.
KERNELS = {
    "cpu": _TRITON | _CUDA | {"roi_align"},
    "cuda, Triton": _TRITON | {"check_boxes", "windows_of_pair"},
    "cuda, C++": _CUDA,
}
