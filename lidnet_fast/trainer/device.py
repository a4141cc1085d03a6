"""Where evaluation runs."""

import torch

from lidnet_fast.trainer.config import RunConfig


def evaluation_device(config: RunConfig) -> torch.device:
    """The first GPU unless the configuration asks for the CPU or there is none."""
    if config.accelerator == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda")
