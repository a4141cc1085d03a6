"""Which part of an image decides a cell of a network's inner layer, derived from the network's graph."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .layers import LayerExtractor
from .operations import Cells, Convolution, Linear, Operation
from .reading import Map, Refused, operations

__all__ = ["LayerGraph", "ReceptiveField", "receptive_fields"]


@dataclass(frozen=True)
class ReceptiveField:
    """The pixels that a layer's cells depend on; a value for each axis, depth or rows first.

    Cell i covers the pixels i * stride, ..., (i + 1) * stride - 1, and depends on those from `before` pixels ahead of
    them to `after` pixels behind them (negative: not even on all that it covers).

    Attributes:
        stride: Pixels from cell to cell, below 1 for a layer finer than the image.
        before: Halo towards the first row or column, in pixels.
        after: Halo towards the last.
        alignment: Shifting the image by this number of pixels shifts the network's layers by whole cells.
    """

    stride: tuple[Fraction, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    alignment: tuple[int, ...]

    @property
    def size(self) -> tuple[int, ...]:
        """Pixels that one cell depends on."""
        return tuple(
            first + math.ceil(step) + last
            for first, step, last in zip(self.before, self.stride, self.after, strict=True)
        )


def receptive_fields(network: nn.Module, layers: str | Iterable[str]) -> dict[str, ReceptiveField]:
    """Receptive fields of layers of a convolutional network.

    Args:
        network: Any module that torch.fx can trace and that takes images alone: convolutions (stride, dilation,
            groups; zeros, reflect and replicate padding), pooling, activations, evaluation BatchNorm, sums,
            concatenation along channels, up-sampling by whole factors, padding, slicing from the first cell.
        layers: A name or names, as `LayerExtractor` takes them.

    Returns:
        Layer -> its receptive field.

    Raises:
        TypeError: If `network` isn't a module.
        ValueError: If it can't be traced, there is no such layer (naming near matches), or a layer has no finite
            receptive field: what it depends on pools or normalises over the image (global pooling, attention,
            GroupNorm, BatchNorm in training mode), or isn't known. The message names the node and an alternative.
    """
    extractor = LayerExtractor(network, [layers] if isinstance(layers, str) else layers)
    for name, module in network.named_modules():
        if isinstance(module, _BatchNorm) and module.training:
            raise ValueError(
                f"extractor: {name!r} is BatchNorm in training mode, which depends on the whole batch; call eval()"
            )
    return {layer: LayerGraph(extractor, [layer]).receptive_field(layer) for layer in extractor.layers}


class LayerGraph:
    """The part of a `LayerExtractor`'s graph that its layers depend on, as operations.

    Args:
        extractor: The extractor.
        layers: Which of its layers; by default all.

    Attributes:
        network: The extractor's; its output is layer -> features.
        image: The node of the images.
        steps: Node -> operation, in the order of computation.
        inputs: Node -> the nodes of the maps that it reads.
        layouts: Node -> what the dimensions of its map are.
        layers: Layer -> node.
        strides: Node -> pixels per cell, for each axis.
        alignment: Pixels, for each axis: a shift by this number shifts every map by whole cells.

    Raises:
        ValueError: If a layer has no finite receptive field, or it joins maps of different strides.
    """

    def __init__(self, extractor: LayerExtractor, layers: Iterable[str] | None = None) -> None:
        dimensions = extractor.dimensions
        self.network = network = extractor.network
        known, values = operations(network, extractor.channels or 1, dimensions)
        self.image = next(node for node in network.graph.nodes if node.op == "placeholder")
        output = next(node for node in network.graph.nodes if node.op == "output")
        self.layers: dict[str, fx.Node] = {
            layer: node for layer, node in output.args[0].items() if layers is None or layer in layers
        }
        self.inputs: dict[fx.Node, tuple[fx.Node, ...]] = {}
        self.layouts = {node: value.layout for node, value in values.items() if isinstance(value, Map)}
        self.steps = self._needed(known, values)
        self.strides: dict[fx.Node, tuple[Fraction, ...]] = {self.image: (Fraction(1),) * dimensions}
        for node, operation in self.steps.items():
            self.strides[node] = self._stride(node, operation)
        self.alignment = tuple(
            math.lcm(*(stride[axis].numerator for stride in self.strides.values())) for axis in range(dimensions)
        )

    def _needed(
        self, known: Mapping[fx.Node, Operation], values: Mapping[fx.Node, Map | Refused]
    ) -> dict[fx.Node, Operation]:
        """The operations that the layers depend on."""
        needed: set[fx.Node] = set()
        for layer, node in self.layers.items():
            value = values.get(node)
            if isinstance(value, Refused):
                raise ValueError(f"layer {layer!r} has no finite receptive field: {value.reason}")
            if value is None:
                raise ValueError(f"layer {layer!r} doesn't depend on the image")
            if value.layout != self.layouts[self.image]:
                raise ValueError(
                    f"layer {layer!r} has dimensions ({', '.join(map(str, value.layout))}), where numbers are "
                    "axes; batch, channels and then the axes are needed"
                )
            waiting = [node]
            while waiting:
                node = waiting.pop()
                if node not in needed and node is not self.image:
                    needed.add(node)
                    self.inputs[node] = values[node].reads  # type: ignore[union-attr]
                    waiting += self.inputs[node]
        return {node: operation for node, operation in known.items() if node in needed}

    def _stride(self, node: fx.Node, operation: Operation) -> tuple[Fraction, ...]:
        strides = {self.strides[read] for read in self.inputs[node]}
        if len(strides) > 1:
            named = ", ".join(f"{read.name!r} {_in_words(self.strides[read])}" for read in self.inputs[node])
            raise ValueError(f"node {node.name!r} joins maps of different strides: {named}")
        (stride,) = strides
        return tuple(step * operation.rate(axis) for axis, step in enumerate(stride))

    def receptive_field(self, layer: str) -> ReceptiveField:
        """The receptive field of a layer; `alignment` is that of all layers together."""
        node = self.layers[layer]
        before, after = [], []
        for axis, step in enumerate(self.strides[node]):
            # The cells of one alignment stand for all.
            cells = range(int(self.alignment[axis] / step))
            read = [self.demand(axis, {node: Cells(cell, cell + 1)})[self.image] for cell in cells]
            before.append(max(math.floor(cell * step) - pixels.start for cell, pixels in zip(cells, read, strict=True)))
            after.append(
                max(pixels.stop - math.ceil((cell + 1) * step) for cell, pixels in zip(cells, read, strict=True))
            )
        return ReceptiveField(self.strides[node], tuple(before), tuple(after), self.alignment)

    def sizes(self, axis: int, pixels: int) -> dict[fx.Node, int]:
        """Cells of every map along an axis, for images of `pixels`."""
        sizes = {self.image: pixels}
        for node, operation in self.steps.items():
            sizes[node] = operation.size(axis, sizes[self.inputs[node][0]])
        return sizes

    def demand(
        self, axis: int, wanted: Mapping[fx.Node, Cells], sizes: Mapping[fx.Node, int] | None = None
    ) -> dict[fx.Node, Cells]:
        """The cells of every map that cells of some maps are computed from, along an axis.

        Args:
            axis: The axis.
            wanted: Node -> cells.
            sizes: Of the maps, whose ends cells don't go beyond; None for maps without ends.

        Returns:
            Node -> cells, of the image's pixels too; without nodes that nothing is needed of.
        """
        needed = dict(wanted)
        for node, operation in reversed(self.steps.items()):
            if node in needed:
                for read in self.inputs[node]:
                    cells = (
                        operation.reads(axis, needed[node])
                        if sizes is None
                        else operation.touches(axis, needed[node], sizes[read])
                    )
                    needed[read] = cells.hull(needed.get(read))
        return needed

    @property
    def convolutions(self) -> dict[fx.Node, Convolution | Linear]:
        """Node -> convolution, or linear map of channels."""
        return {node: step for node, step in self.steps.items() if isinstance(step, Convolution | Linear)}


def _in_words(stride: Sequence[Fraction]) -> str:
    return " x ".join(map(str, stride))
