"""What a run computes on, and in which arithmetic."""

from typing import Literal

import torch

from lidnet_fast.trainer.config import RunConfig


def evaluation_device(config: RunConfig) -> torch.device:
    """The first GPU unless the configuration asks for the CPU or there is none."""
    if config.accelerator == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda")


def native_precision(device: torch.device) -> Literal["bf16-mixed", "32-true"]:
    """ "bf16-mixed" where the device multiplies bfloat16 in hardware, else "32-true"."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities = torch.cpu.get_capabilities()
        native = capabilities.get("amx_bf16") or capabilities.get("avx512_bf16")
    return "bf16-mixed" if native else "32-true"
