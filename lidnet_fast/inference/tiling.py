"""Images in tiles that give what the whole image gives."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lidnet_fast.models.footprint import Reach


@dataclass(frozen=True)
class Span:
    """Along one axis: the pixels a tile answers for, those it is computed from, and the first among the second."""

    core: slice
    window: slice
    inner: slice


def spans(size: int, side: int, reach: Reach) -> Iterator[Span]:
    """Cut an axis of `size` pixels into tiles of about equal size, at most `side` rounded up to the alignment."""
    step = reach.alignment
    core = -(-size // -(-size // side))
    core = -(-core // step) * step
    for start in range(0, size, core):
        stop = min(start + core, size)
        first, last = max(0, start - reach.before) // step * step, min(size, stop + reach.after)
        yield Span(slice(start, stop), slice(first, last), slice(start - first, stop - first))


def in_tiles(network: Callable[[Tensor], Tensor], images: Tensor, side: int, reach: Reach) -> Tensor:
    """Run a network tile by tile.

    Args:
        network: [N,C,H,W] -> [N,1,H,W].
        images: [N,C,H,W].
        side: of a tile without its overlap, in pixels.
        reach: the network's.
    """
    output = torch.empty_like(images[:, :1])
    for rows in spans(images.shape[-2], side, reach):
        for columns in spans(images.shape[-1], side, reach):
            tile = network(images[..., rows.window, columns.window])
            output[..., rows.core, columns.core] = tile[..., rows.inner, columns.inner]
    return output
