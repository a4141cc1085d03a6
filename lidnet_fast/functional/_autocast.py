from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def without_autocast(tensor: Tensor) -> AbstractContextManager[None]:
    """Autocast off: the ops choose the dtype of their arithmetic themselves."""
    kind = tensor.device.type
    # Entering it takes as long as all checks of the arguments.
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
