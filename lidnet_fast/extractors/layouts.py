"""Which dimension of a map's tensor is what: batch, channels (one dimension or several), or an axis of the image."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

__all__ = ["BATCH", "CHANNELS", "Layout", "Side", "arranged", "map_shapes", "regrouped", "usual"]

BATCH, CHANNELS = "batch", "channels"
# Of each dimension: BATCH, CHANNELS, or the number of an axis.
Layout = tuple[str | int, ...]


@dataclass(frozen=True)
class Side:
    """The size of a map along the batch or an axis, which isn't the same in windows."""

    role: str | int


def usual(dimensions: int) -> Layout:
    """Batch, channels, then the axes."""
    return (BATCH, CHANNELS, *range(dimensions))


def arranged(layout: Layout, arrange: Callable[[Tensor], Tensor]) -> Layout:
    """The layout after what only changes the order of dimensions."""
    sizes = range(2, 2 + len(layout))
    return tuple(layout[size - 2] for size in arrange(torch.empty(*sizes, device="meta")).shape)


def regrouped(layout: Layout, shape: Sequence[int], sizes: Sequence[int | Side]) -> tuple[Layout, tuple[int, ...]]:
    """The layout after a view that divides or merges dimensions of channels and leaves the others alone.

    Args:
        layout: Before.
        shape: Of some tensor of this layout, for its channels.
        sizes: Wanted; one may be -1.

    Returns:
        The layout, and each dimension's size: of channels, or for the batch and axes -1 - the dimension it is before.

    Raises:
        ValueError: If the view does anything else.
    """
    kept = [role for role in layout if role != CHANNELS]
    roles: list[str | int] = [size.role if isinstance(size, Side) else CHANNELS for size in sizes]
    missing = [role for role in kept if role not in roles]
    if -1 in sizes and len(missing) == 1:
        roles[list(sizes).index(-1)] = missing[0]
    before, after = _channels_between(layout, shape), _channels_between(roles, sizes)
    if [role for role in roles if role != CHANNELS] != kept or len(before) != len(after):
        raise ValueError("doesn't keep batch and axes of the image as they are")
    for (_, groups), (_, parts) in zip(before, after, strict=True):
        if -1 in parts:
            parts[parts.index(-1)] = math.prod(groups) // -math.prod(parts)
        if math.prod(groups) != math.prod(parts):
            raise ValueError("moves values between channels and axes of the image")
    wanted: list[int] = []
    for role, parts in after:
        wanted += [] if role is None else [-1 - layout.index(role)]
        wanted += parts
    return tuple(roles), tuple(wanted)


def _channels_between(roles: Sequence[str | int], sizes: Sequence) -> list[tuple[str | int | None, list[int]]]:
    """(None or a role other than channels, sizes of the channels behind it), in order."""
    groups: list[tuple[str | int | None, list[int]]] = [(None, [])]
    for role, size in zip(roles, sizes, strict=True):
        if role == CHANNELS:
            groups[-1][1].append(size)
        else:
            groups.append((role, []))
    return groups


def map_shapes(network: fx.GraphModule, channels: int, dimensions: int) -> dict[fx.Node, tuple[int, ...]]:
    """The shape of every map for some image, without computing it; nothing for a network that takes another size."""
    shapes: dict[fx.Node, tuple[int, ...]] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            result = super().run_node(n)
            if isinstance(result, Tensor):
                shapes[n] = tuple(result.shape)
            return result

    class Run(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, images: Tensor) -> object:
            return Recorder(self.network).run(images)

    tensors = {
        f"network.{name}": torch.empty_like(tensor, device="meta")
        for name, tensor in (*network.named_parameters(), *network.named_buffers())
    }
    dtype = next((tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()), None)
    try:
        with torch.device("meta"), torch.no_grad():
            torch.func.functional_call(Run(), tensors, torch.empty(2, channels, *(512,) * dimensions, dtype=dtype))
    except Exception:  # as in `layers.probe`; the shapes up to there are known
        pass
    return shapes
