import torch
from torch import Tensor


def without_autocast(tensor: Tensor) -> torch.autocast:
    """Autocast off: the ops choose the dtype of their arithmetic themselves."""
    return torch.autocast(tensor.device.type, enabled=False)
