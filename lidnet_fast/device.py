"""Which device networks run on, and in which arithmetic."""

from collections.abc import Mapping
from typing import Any, Literal

import torch

from lidnet_fast.errors import InputError

Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["auto", "float32", "bfloat16"]


def choose_device(name: Device = "auto") -> torch.device:
    """The device that a name stands for; "auto" is the first GPU if there is one.

    Raises:
        InputError: "cuda" is asked for, and PyTorch finds no GPU.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise InputError("device is 'cuda', but PyTorch finds no GPU. To fix: give --device cpu, or auto")
    return torch.device("cuda" if available and name != "cpu" else "cpu")


def choose_precision(name: Precision, device: torch.device) -> Literal["float32", "bfloat16"]:
    """The arithmetic that a name stands for; "auto" is bfloat16 where the device computes in it."""
    if name != "auto":
        return name
    return "bfloat16" if computes_in_bfloat16(device) else "float32"


def computes_in_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies matrices of bfloat16 in hardware rather than emulates it.

    That is AVX-512 BF16 or AMX on x86 and BF16 on ARM; PyTorch 2.10, the oldest supported, can't say what a CPU has.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def autocast(device: torch.device, precision: Literal["float32", "bfloat16"]) -> torch.autocast:
    """A context in which networks compute in a precision; their weights stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")
