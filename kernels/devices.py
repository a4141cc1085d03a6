"""Where a launch happens."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's GPU the current one: Triton launches on that, wherever the arguments are."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
