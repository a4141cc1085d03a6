"""How far a network looks, and what it costs per pixel.

Both are found by running the network, so that any module will do, whether torch.fx can trace it or not.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_ALIGNMENTS = (1, 2, 4, 8, 16, 32, 64)
_PROBE_SIZES = (123, 251, 507, 1019)
"""Multiples of nothing, so that a network that pads to a multiple does so."""


@dataclass(frozen=True)
class Reach:
    """Which pixels an output pixel depends on, along either axis.

    Attributes:
        before: pixels towards the first.
        after: pixels towards the last.
        alignment: a shift of the image by this many pixels shifts the output.
    """

    before: int
    after: int
    alignment: int


@torch.inference_mode()
def find_reach(network: nn.Module, channels: int = 1) -> Reach | None:
    """How far a network looks, found by spoiling a few pixels with NaN and by shifting a random image.

    Args:
        network: [1,C,H,W] -> [1,1,H,W], float32, in eval mode, on the CPU (GPU convolutions may spread a NaN further).
        channels: C.

    Returns:
        None where the output depends on the whole image, or on its absolute place.
    """
    generator = torch.Generator().manual_seed(0)
    for size in _PROBE_SIZES:
        image = torch.rand(1, channels, size, size, generator=generator)
        output = network(image)
        for alignment in _ALIGNMENTS:
            reach = _spread(network, image, alignment)
            if reach is None or reach.before + reach.after + 2 * alignment >= size:
                break
            if _same_when_cut(network, image, output, reach):
                return reach
    return None


def _spread(network: nn.Module, image: Tensor, alignment: int) -> Reach | None:
    """The reach that one aligned block of pixels shows; None where it leaves the image."""
    size = image.shape[-1]
    start = size // 2 // alignment * alignment
    spoiled = image.clone()
    spoiled[..., start : start + alignment, start : start + alignment] = torch.nan
    places = network(spoiled)[0, 0].isnan().nonzero()
    first, last = int(places.min()), int(places.max())
    if first == 0 or last == size - 1:
        return None
    return Reach(last - start, start + alignment - 1 - first, alignment)


def _same_when_cut(network: nn.Module, image: Tensor, output: Tensor, reach: Reach) -> bool:
    """Whether a part of the image gives the same: its rows up to the image's end, its columns not quite."""
    start, short = reach.alignment, 3
    change = (output - image).abs().max()
    inner = start + reach.before
    expected = output[..., inner:, inner : -short - reach.after]
    cut = network(image[..., start:, start:-short])
    got = cut[..., reach.before :, reach.before : cut.shape[-1] - reach.after]
    return bool((got - expected).abs().max() <= 1e-6 + 1e-4 * change)


def bytes_per_pixel(network: nn.Module, channels: int = 1) -> int:
    """Most memory that a network's activations take at one time, for each pixel of its input.

    Args:
        network: [1,C,H,W] -> [1,1,H,W], float32, in eval mode.
        channels: C.
    """
    size = 128
    with torch.inference_mode(), _PeakMemory() as memory:
        network(torch.zeros(1, channels, size, size))
    return -(-memory.peak // size**2)


class _PeakMemory(TorchDispatchMode):
    """Adds up the storages that are alive after each operation."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                self._alive[StorageWeakRef(storage)] = storage.nbytes()
        self._alive = {storage: size for storage, size in self._alive.items() if not storage.expired()}
        self.peak = max(self.peak, sum(self._alive.values()))
        return result
