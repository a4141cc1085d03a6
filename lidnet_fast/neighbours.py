"""Neighbouring slices: a network of context k sees 2 k + 1 slices as channels, and answers for the middle one.

Beyond the ends of a series, its end slices are repeated.
"""

from collections.abc import Iterable, Iterator
from itertools import chain

import numpy as np
from torch import Tensor

MOST_NEIGHBOURS = 16
"""Largest context."""


def neighbours(z: int | np.ndarray, depth: int, context: int) -> np.ndarray:
    """The slices that a network of this context sees for slice z: int [..., 2 context + 1], in order.

    Args:
        z: slice, or slices of any shape.
        depth: slices of the series.
        context: slices on each side.
    """
    return (np.asarray(z)[..., None] + np.arange(-context, context + 1)).clip(0, depth - 1)


def stacks(slices: Tensor, context: int) -> Tensor:
    """What a network of this context sees of each slice of a series.

    Args:
        slices: [Z,H,W], in order.
        context: slices on each side.

    Returns:
        [Z, 2 context + 1, H, W].
    """
    return slices[neighbours(np.arange(len(slices)), len(slices), context)]


def stacks_of_channels(slices: Tensor, context: int) -> Tensor:
    """What a network of this context sees of every channel that has its neighbours on both sides.

    Args:
        slices: [N,C,H,W]; channels are neighbours.
        context: slices on each side.

    Returns:
        [N (C - 2 context), 2 context + 1, H, W].
    """
    return slices.unfold(1, 2 * context + 1, 1).movedim(-1, 2).flatten(0, 1)


def middle(stack: Tensor, context: int = 0) -> Tensor:
    """The middle slice of stacks [N,C,H,W], with `context` of its neighbours on each side: [N, 2 context + 1, H, W]."""
    aside = stack.shape[1] // 2 - context
    return stack[:, aside : stack.shape[1] - aside] if aside else stack


def slabs(parts: Iterable[np.ndarray], context: int) -> Iterator[tuple[np.ndarray, int, int]]:
    """The slices of a series with their neighbours, as they arrive.

    Args:
        parts: [n,H,W], one behind the other.
        context: slices on each side.

    Yields:
        Slices [N,H,W], and how many of the first and of the last are there as neighbours only. At the ends of the
        series there are none.
    """
    held, before = None, 0
    for part in chain(parts, [None]):
        if part is not None:
            held = part if held is None or not len(held) else np.concatenate([held, part])
        after = 0 if part is None else context
        if held is None or len(held) <= before + after:
            continue
        yield held, before, after
        answered = len(held) - after
        before = min(context, answered)
        held = held[answered - before :]
