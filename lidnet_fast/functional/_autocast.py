from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def without_autocast(tensor: Tensor) -> AbstractContextManager[None]:
    """Autocast off: the ops choose the dtype of their arithmetic themselves."""
    # Entering it takes as long as all checks of the arguments.
    return torch.autocast(tensor.device.type, enabled=False) if _is_autocast(tensor) else nullcontext()


def promote(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Within autocast both in the wider dtype, as PyTorch's own losses have them; otherwise as they are."""
    if isinstance(input, Tensor) and isinstance(target, Tensor) and input.dtype != target.dtype and _is_autocast(input):
        dtype = torch.promote_types(input.dtype, target.dtype)
        return input.to(dtype), target.to(dtype)
    return input, target


def _is_autocast(tensor: Tensor) -> bool:
    kind = tensor.device.type
    return kind != "meta" and torch.is_autocast_enabled(kind)  # which knows no "meta"
