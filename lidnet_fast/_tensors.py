"""What definitions and ops alike ask of tensors."""

import torch
from torch.autograd import forward_ad


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that an op computes in and returns: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def in_forward_mode() -> bool:
    """Whether tensors may have tangents now: within torch.autograd.forward_ad.dual_level, torch.func.jvp or jacfwd."""
    return forward_ad._current_level >= 0
