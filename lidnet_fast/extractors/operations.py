# ruff: noqa: D102  (what an override does is said where it overrides)
"""What the operations of a convolutional network read, and how each runs on a part of its input.

Cells of a feature map are counted along each axis from the map's first one. An operation says which cells of its input
a range of its output reads, beyond the map's edges too, where padding is. With that it can be put into a graph that
computes this range alone. The cells that the range reads go in, padding is added where the map ends and nowhere else,
and exactly the range comes out.
"""

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from .layouts import Layout, usual

__all__ = [
    "AveragePooling",
    "Cells",
    "Convolution",
    "Frame",
    "Linear",
    "MaxPooling",
    "Operation",
    "Padding",
    "Part",
    "Piece",
    "Pointwise",
    "Regrouping",
    "Resizing",
    "Slicing",
    "Sliding",
    "argument",
    "cut",
]


class Cells(NamedTuple):
    """Cells start, ..., stop - 1 along one axis."""

    start: int
    stop: int

    def hull(self, other: "Cells | None") -> "Cells":
        """The smallest range that holds both."""
        return self if other is None else Cells(min(self.start, other.start), max(self.stop, other.stop))


class Frame(NamedTuple):
    """An operation on a part of its input, along one axis.

    Attributes:
        size: Cells of the whole input.
        held: The cells of it that are given.
        read: What is read, beyond the ends of the whole input too.
        made: The cells of the output that are computed.
    """

    size: int
    held: Cells
    read: Cells
    made: Cells

    @property
    def padding(self) -> tuple[int, int]:
        """How many cells before the whole input's first and behind its last are read."""
        return max(0, -self.read.start), max(0, self.read.stop - self.size)


@dataclass
class Part:
    """A graph in the making, that computes a part of what a network's graph computes.

    Attributes:
        graph: The new graph.
        maps: Node of the network's graph -> node of the new one that holds the needed cells of it.
    """

    graph: fx.Graph
    maps: dict[fx.Node, fx.Node]

    def value(self, node: fx.Node) -> fx.Node:
        """The node of the new graph for a map, or for a constant, which is copied with all that it's computed from."""
        if node not in self.maps:
            self.maps[node] = self.graph.node_copy(node, self.value)
        return self.maps[node]

    def call(self, function: Callable, *arguments: object, **options: object) -> fx.Node:
        """Append a call of `function`."""
        return self.graph.call_function(function, arguments, options)  # type: ignore[arg-type]


class Operation:
    """One node of a network's graph, along axes numbered from 0 (depth or rows first)."""

    def rate(self, axis: int) -> Fraction:
        """Input cells per output cell."""
        return Fraction(1)

    def size(self, axis: int, cells: int) -> int:
        """How many cells the output has, given the input's."""
        return cells

    def reads(self, axis: int, made: Cells) -> Cells:
        """The input cells that cells of the output depend on, as if the input had no end."""
        return made

    def touches(self, axis: int, made: Cells, size: int) -> Cells:
        """The cells, of an input of `size`, that those cells of the output are computed from: at least one."""
        start, stop = self.reads(axis, made)
        return Cells(min(max(start, 0), size - 1), max(min(stop, size), 1))

    def emit(self, part: Part, node: fx.Node, inputs: Mapping[fx.Node, fx.Node], frames: Sequence[Frame]) -> fx.Node:
        """Append to `part` what computes the cells `made`.

        Args:
            part: The graph in the making.
            node: The operation in the graph of the whole.
            inputs: Each map that `node` reads -> node of `part` with the cells `held` of it.
            frames: Along each axis; the same for each input.
        """
        raise NotImplementedError


class Pointwise(Operation):
    """Output cell i depends on cell i of each input: activations, evaluation BatchNorm, sums, concatenation."""

    def emit(self, part: Part, node: fx.Node, inputs: Mapping[fx.Node, fx.Node], frames: Sequence[Frame]) -> fx.Node:
        return part.graph.node_copy(node, lambda read: inputs[read] if read in inputs else part.value(read))


@dataclass(frozen=True)
class Linear(Pointwise):
    """A linear map of each place's channels: a convolution of one cell on a map whose channels come last."""

    in_channels: int
    out_channels: int

    @property
    def macs(self) -> int:
        """Multiply-adds per place."""
        return self.in_channels * self.out_channels


@dataclass(frozen=True)
class Regrouping(Operation):
    """A view that divides or merges channels; `sizes` are those of channels, or -1 - a dimension that stays."""

    sizes: tuple[int, ...]

    def emit(self, part: Part, node: fx.Node, inputs: Mapping[fx.Node, fx.Node], frames: Sequence[Frame]) -> fx.Node:
        (input,) = inputs.values()
        return part.call(regroup, input, self.sizes)


@dataclass(frozen=True)
class Piece(Operation):
    """One of the pieces that `node` divides the channels of a map into."""

    node: fx.Node
    index: int

    def emit(self, part: Part, node: fx.Node, inputs: Mapping[fx.Node, fx.Node], frames: Sequence[Frame]) -> fx.Node:
        pieces = part.graph.node_copy(self.node, lambda read: inputs[read] if read in inputs else part.value(read))
        return part.call(operator.getitem, pieces, self.index)


@dataclass(frozen=True)
class Sliding(Operation):
    """A kernel moved over the input in steps; fields have a value for each axis."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    dilation: tuple[int, ...]

    def rate(self, axis: int) -> Fraction:
        return Fraction(self.stride[axis])

    def size(self, axis: int, cells: int) -> int:
        return (cells + self.before[axis] + self.after[axis] - self._reach(axis)) // self.stride[axis] + 1

    def reads(self, axis: int, made: Cells) -> Cells:
        step, before = self.stride[axis], self.before[axis]
        return Cells(made.start * step - before, (made.stop - 1) * step - before + self._reach(axis))

    def _reach(self, axis: int) -> int:
        return (self.kernel[axis] - 1) * self.dilation[axis] + 1


@dataclass(frozen=True)
class Convolution(Sliding):
    """A convolution, by a module or a function."""

    mode: str
    groups: int
    in_channels: int
    out_channels: int

    @property
    def macs(self) -> int:
        """Multiply-adds per output cell, all channels together."""
        return math.prod(self.kernel) * self.in_channels // self.groups * self.out_channels

    def touches(self, axis: int, made: Cells, size: int) -> Cells:
        return _with_mirrored(super().touches(axis, made, size), self.reads(axis, made), size, self.mode)

    def emit(self, part: Part, node: fx.Node, inputs: Mapping[fx.Node, fx.Node], frames: Sequence[Frame]) -> fx.Node:
        (input,) = inputs.values()
        return self.emit_with(part, input, frames, *self.weights(part, node))

    def weights(self, part: Part, node: fx.Node) -> tuple[fx.Node, fx.Node | None]:
        """The weight and the bias that `node` convolves with, a module or a function, in `part`."""
        if node.op == "call_module":
            return tuple(part.graph.get_attr(f"{node.target}.{name}") for name in ("weight", "bias"))  # type: ignore[return-value]
        given = [argument(node.args, node.kwargs, place, name, None) for place, name in ((1, "weight"), (2, "bias"))]
        return tuple(part.value(read) if isinstance(read, fx.Node) else None for read in given)  # type: ignore[return-value]

    def emit_with(
        self, part: Part, input: fx.Node, frames: Sequence[Frame], weight: fx.Node, bias: fx.Node | None
    ) -> fx.Node:
        """`emit` with weights that the graph makes."""
        convolve = (F.conv1d, F.conv2d, F.conv3d)[len(frames) - 1]
        input = _padded(part, input, frames, self.mode)
        return part.call(convolve, input, weight, bias, self.stride, 0, self.dilation, self.groups)


@dataclass(frozen=True)
class Pooling(Sliding):
    """What max and average pooling have in common."""

    ceil_mode: bool

    def size(self, axis: int, cells: int) -> int:
        if not self.ceil_mode:
            return super().size(axis, cells)
        step, before = self.stride[axis], self.before[axis]
        count = -(-(cells + before + self.after[axis] - self._reach(axis)) // step) + 1
        # The last position has to start inside the input or the padding before it.
        return count - 1 if (count - 1) * step >= cells + before else count


@dataclass(frozen=True)
class MaxPooling(Pooling):
    """Max pooling: padding never wins."""

    def emit(self, part: Part, node: fx.Node, inputs: Mapping[fx.Node, fx.Node], frames: Sequence[Frame]) -> fx.Node:
        pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[len(frames) - 1]
        (input,) = inputs.values()
        return part.call(
            pool, _padded(part, input, frames, "constant", -math.inf), self.kernel, self.stride, 0, self.dilation
        )


@dataclass(frozen=True)
class AveragePooling(Pooling):
    """Average pooling. It divides by the kernel's cells inside the padded map, or inside the map."""

    count_include_pad: bool
    divisor: int | None

    def emit(self, part: Part, node: fx.Node, inputs: Mapping[fx.Node, fx.Node], frames: Sequence[Frame]) -> fx.Node:
        (input,) = inputs.values()
        result = self._pooled(part, _padded(part, input, frames, "constant"))
        if self.divisor is not None or not any(any(frame.padding) for frame in frames):
            return result
        counted, of_counted = part.call(torch.ones_like, input), list(frames)
        if self.count_include_pad:
            own = [(f.padding[0], min(f.padding[1], last)) for f, last in zip(frames, self.after, strict=True)]
            counted = _pad(part, counted, own, "constant", 1.0)
            of_counted = [
                Frame(
                    frame.size + first + last,
                    Cells(frame.held.start, frame.held.stop + first + last),
                    Cells(frame.read.start + first, frame.read.stop + first),
                    frame.made,
                )
                for frame, (first, last) in zip(frames, own, strict=True)
            ]
        return part.call(torch.div, result, self._pooled(part, _padded(part, counted, of_counted, "constant")))

    def _pooled(self, part: Part, input: fx.Node) -> fx.Node:
        average = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[len(self.kernel) - 1]
        options = {} if self.divisor is None else {"divisor_override": self.divisor}
        return part.call(average, input, self.kernel, self.stride, **options)


@dataclass(frozen=True)
class Padding(Operation):
    """Explicit padding, cropping where negative; fields have a value for each axis."""

    before: tuple[int, ...]
    after: tuple[int, ...]
    mode: str
    value: float

    def size(self, axis: int, cells: int) -> int:
        return cells + self.before[axis] + self.after[axis]

    def reads(self, axis: int, made: Cells) -> Cells:
        return Cells(made.start - self.before[axis], made.stop - self.before[axis])

    def touches(self, axis: int, made: Cells, size: int) -> Cells:
        return _with_mirrored(super().touches(axis, made, size), self.reads(axis, made), size, self.mode)

    def emit(self, part: Part, node: fx.Node, inputs: Mapping[fx.Node, fx.Node], frames: Sequence[Frame]) -> fx.Node:
        (input,) = inputs.values()
        return _padded(part, input, frames, self.mode, self.value)


@dataclass(frozen=True)
class Resizing(Operation):
    """Upsampling by whole factors, one for each axis, "nearest" or "linear" (of corners that aren't aligned)."""

    factors: tuple[int, ...]
    mode: str

    def rate(self, axis: int) -> Fraction:
        return Fraction(1, self.factors[axis])

    def size(self, axis: int, cells: int) -> int:
        return cells * self.factors[axis]

    def reads(self, axis: int, made: Cells) -> Cells:
        factor, last = self.factors[axis], made.stop - 1
        if self.mode == "nearest":
            return Cells(made.start // factor, last // factor + 1)
        # Output cell i lies at (i + 1/2) / factor - 1/2 of the input, on or behind a cell and before the next.
        return Cells((2 * made.start + 1 - factor) // (2 * factor), (2 * last + 1 - factor) // (2 * factor) + 2)

    def emit(self, part: Part, node: fx.Node, inputs: Mapping[fx.Node, fx.Node], frames: Sequence[Frame]) -> fx.Node:
        mode = "nearest" if self.mode == "nearest" else ("linear", "bilinear", "trilinear")[len(frames) - 1]
        (input,) = inputs.values()
        resized = part.call(F.interpolate, input, scale_factor=tuple(map(float, self.factors)), mode=mode)
        held = [
            Cells(frame.held.start * factor, frame.held.stop * factor)
            for frame, factor in zip(frames, self.factors, strict=True)
        ]
        return cut(part, resized, held, [frame.made for frame in frames])


@dataclass(frozen=True)
class Slicing(Operation):
    """Indexing with slices, one for each axis, that count from the map's first cell; of any channels."""

    channels: slice
    slices: tuple[slice, ...]

    def rate(self, axis: int) -> Fraction:
        return Fraction(self.slices[axis].step or 1)

    def size(self, axis: int, cells: int) -> int:
        return len(range(*self.slices[axis].indices(cells)))

    def reads(self, axis: int, made: Cells) -> Cells:
        first, step = self.slices[axis].start or 0, self.slices[axis].step or 1
        return Cells(first + made.start * step, first + (made.stop - 1) * step + 1)

    def emit(self, part: Part, node: fx.Node, inputs: Mapping[fx.Node, fx.Node], frames: Sequence[Frame]) -> fx.Node:
        (input,) = inputs.values()
        return part.call(
            operator.getitem, input, (slice(None), self.channels, *(slice(None, None, s.step) for s in self.slices))
        )


def argument(args: Sequence[Any], kwargs: Mapping[str, Any], position: int, name: str, default: Any) -> Any:
    """An argument of a call, given by position or by name."""
    return args[position] if len(args) > position else kwargs.get(name, default)


def regroup(map: Tensor, sizes: Sequence[int]) -> Tensor:
    """What `Regrouping` does to a map."""
    return map.reshape([size if size > 0 else map.shape[-1 - size] for size in sizes])


def cut(
    part: Part, tensor: fx.Node, held: Sequence[Cells], wanted: Sequence[Cells], layout: Layout | None = None
) -> fx.Node:
    """Append the cells `wanted` of a tensor that holds `held`; nothing where they are the same.

    Args:
        part: The graph in the making.
        tensor: In it.
        held: Along each axis.
        wanted: Along each axis.
        layout: The tensor's; None for the usual one.
    """
    if list(held) == list(wanted):
        return tensor
    slices = [slice(w.start - h.start, w.stop - h.start) for h, w in zip(held, wanted, strict=True)]
    layout = usual(len(slices)) if layout is None else layout
    return part.call(
        operator.getitem, tensor, tuple(slices[role] if isinstance(role, int) else slice(None) for role in layout)
    )


def _padded(part: Part, input: fx.Node, frames: Sequence[Frame], mode: str, value: float = 0.0) -> fx.Node:
    """Append what is `read`: padding where the map ends, without cells that were held for the padding's sake."""
    padding = [frame.padding for frame in frames]
    grown = [
        Cells(frame.held.start - first, frame.held.stop + last)
        for frame, (first, last) in zip(frames, padding, strict=True)
    ]
    padded = _pad(part, input, padding, "constant" if mode == "zeros" else mode, value)
    return cut(part, padded, grown, [frame.read for frame in frames])


def _pad(part: Part, input: fx.Node, padding: Sequence[tuple[int, int]], mode: str, value: float) -> fx.Node:
    if not any(any(pair) for pair in padding):
        return input
    widths = [width for pair in reversed(padding) for width in pair]
    # Reflection and replication take no value.
    return part.call(F.pad, input, widths, mode, *([value] if mode == "constant" else []))


def _with_mirrored(touched: Cells, read: Cells, size: int, mode: str) -> Cells:
    """The cells touched, and with reflection those that lie as far inside as padding is read outside."""
    if mode != "reflect":
        return touched
    first, last = max(0, -read.start), max(0, read.stop - size)
    if first:
        touched = Cells(touched.start, max(touched.stop, min(first + 1, size)))
    if last:
        touched = Cells(min(touched.start, max(size - 1 - last, 0)), touched.stop)
    return touched
