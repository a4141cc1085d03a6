"""Where a training step's time goes, measured while it trains."""

import time
from collections import defaultdict

import torch
from torch import Tensor

from lidnet_fast.runtime import peak_memory_mb

PARTS = ("data", "denoiser", "detector", "losses", "other")
"""What a step's time is divided into."""


class StepClock:
    """Adds the time since the previous lap to a named part.

    On a GPU laps are CUDA events, which are read only by `read`, so nothing waits for the device during a step. Time
    that the device spends waiting for the processor counts for the part that it waits for.

    Args:
        device: that the step runs on.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._laps: list[tuple[str, float | torch.cuda.Event]] = []

    def lap(self, part: str) -> None:
        """The time since the last lap was spent on this part."""
        self._laps.append((part, _now(self.device)))

    def lap_in_backward(self, tensor: Tensor, part: str) -> None:
        """A lap when the tensor's gradient has been computed."""
        if tensor.requires_grad:
            tensor.register_hook(lambda _: self.lap(part))

    def restart(self) -> None:
        """Whatever happened since the last lap belongs to no part."""
        self.lap("")

    def read(self) -> dict[str, float]:
        """Seconds of every part since the last call; parts without any are left out."""
        if self._laps and self.device.type == "cuda":
            torch.cuda.synchronize()
        seconds: dict[str, float] = defaultdict(float)
        for (_, start), (part, end) in zip(self._laps[:-1], self._laps[1:], strict=True):
            if part:
                seconds[part] += _between(start, end)
        self._laps = self._laps[-1:]
        return dict(seconds)


def step_memory_mb(device: torch.device) -> float:
    """Peak memory so far in MiB: the GPU's, or the process's on the CPU."""
    return torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else peak_memory_mb()


def _now(device: torch.device) -> "float | torch.cuda.Event":
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(start: "float | torch.cuda.Event", end: "float | torch.cuda.Event") -> float:
    if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        return start.elapsed_time(end) / 1e3
    assert isinstance(start, float) and isinstance(end, float)
    return end - start
