"""Runs the layers of an extractor on windows of images: the same features, and nothing that isn't asked for."""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, fx

from .. import functional as fast
from .layers import LayerExtractor, prepare_images
from .operations import Cells, Convolution, Frame, Part, cut
from .receptive_field import LayerGraph
from .windows import Axis, Plan, Window, WindowPlanner

__all__ = ["WindowBatch", "WindowedExtractor"]

# How many kinds of windows keep their network, compiled or not, and how many sizes of images their planner.
MOST_KINDS, MOST_SIZES = 256, 256

# (the extractor's network, whose parameters it reads; windows; mean; std; folded weights) -> layer -> features.
WindowNetwork = Callable[..., dict[str, Tensor]]


class Fold(NamedTuple):
    """A convolution of images that are neither normalised nor repeated yet; see `fold`."""

    node: fx.Node
    padded: bool


# Weights and bias as `fold` gives them, once for all windows and both images of a call.
Folded = dict[Fold, tuple[Tensor, Tensor | None]]


class WindowBatch(NamedTuple):
    """Windows of one kind.

    Attributes:
        network: What computes them.
        corners: [windows, 1 + axes] on the CPU: the image, and the first row and column (and depth before) to take.
        size: Pixels of each window along the axes.
        origins: Layer -> [windows, axes], the features' first cell in the layer of the whole image.
        folds: Whose folded weights the network takes, in this order.
    """

    network: WindowNetwork
    corners: Tensor
    size: tuple[int, ...]
    origins: dict[str, Tensor]
    folds: tuple[Fold, ...]


@dataclass(frozen=True)
class _Kind:
    """What a network is derived for; windows of the same kind are equal, wherever they lie and in whichever images.

    Attributes:
        kind: As in `Window`.
        channels: Of the images.
        captured: Whether it runs as a CUDA graph.
        window: One of the kind.
        axes: Of its image.
    """

    kind: tuple
    channels: int
    captured: bool
    window: Window = field(compare=False)
    axes: tuple[Axis, ...] = field(compare=False)


class _Derived(NamedTuple):
    """What is derived for a kind of window.

    Attributes:
        network: What computes them.
        offset: Along each axis, from a window's first unit to the first pixel that it needs.
        size: Pixels of a window along the axes.
        folds: As in `WindowBatch`.
    """

    network: WindowNetwork
    offset: tuple[int, ...]
    size: tuple[int, ...]
    folds: tuple[Fold, ...]


class WindowedExtractor:
    """Features of a `LayerExtractor` in windows of the images, exactly those of the whole images.

    Each kind of window (its size, the image's edges that it touches) has a network of its own, derived from the
    extractor's graph. Every operation computes the cells that later ones need, and pads only where the image ends. So
    nothing is computed to be thrown away, and a window's edge leaves no trace. The normalisation and the repetition of
    one channel are folded into the first convolutions. These networks hold no parameters: at each call they read those
    that the extractor has then, however it came by them.

    Args:
        extractor: Layers with finite receptive fields.
        compiled: Whether networks go through torch.compile.

    Raises:
        ValueError: If a layer has no finite receptive field, naming the node that it depends on.
    """

    def __init__(self, extractor: LayerExtractor, compiled: bool = False) -> None:
        self.extractor = extractor
        self.compiled = compiled
        self._derive()

    def _derive(self) -> None:
        self.graph = LayerGraph(self.extractor)
        self._derived_for = lru_cache(MOST_KINDS)(self._derived)
        self._weights_of = lru_cache(MOST_KINDS)(self._reader_of_weights)
        self._planner_of = lru_cache(MOST_SIZES)(lambda size: WindowPlanner(self.graph, size))

    def __getstate__(self) -> dict:
        return {"extractor": self.extractor, "compiled": self.compiled}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._derive()

    def stride(self, layer: str) -> float:
        """Pixels per cell of a layer, the same along all axes."""
        return float(self.graph.strides[self.graph.layers[layer]][0])

    def planner(self, image_size: Sequence[int]) -> WindowPlanner:
        """The planner for images of a size."""
        return self._planner_of(tuple(image_size))

    def batches(self, plan: Plan, images: Tensor) -> list[tuple[list[int], WindowBatch]]:
        """The windows of a plan for these images by kind: their indices in the plan, and what to compute."""
        of_kind: dict[tuple, list[int]] = {}
        for number, window in enumerate(plan.windows):
            of_kind.setdefault(window.kind, []).append(number)
        return [(numbers, self._batch([plan.windows[n] for n in numbers], images)) for numbers in of_kind.values()]

    def _batch(self, windows: Sequence[Window], images: Tensor) -> WindowBatch:
        first, axes = windows[0], tuple(self.planner(images.shape[2:]).axes)
        captured = self.compiled and captures(images)
        derived = self._derived_for(_Kind(first.kind, images.shape[1], captured, first, axes))
        units = np.array([[stretch.start for stretch in window.stretches] for window in windows])
        corners = np.insert(
            units * self.graph.alignment + derived.offset, 0, [window.image for window in windows], axis=1
        )
        origins = {
            layer: torch.from_numpy(units * [axis.ratios[node] for axis in axes])
            for layer, node in self.graph.layers.items()
        }
        return WindowBatch(derived.network, torch.from_numpy(corners), derived.size, origins, derived.folds)

    def features(self, images: Tensor, batch: WindowBatch) -> dict[str, Tensor]:
        """Layer -> features of a batch of windows.

        Args:
            images: [N, C, H, W] or [N, C, D, H, W].
            batch: Windows of these images.
        """
        return self.features_of(fast.roi_windows(images, batch.corners, batch.size), batch, {})

    def features_of(self, windows: Tensor, batch: WindowBatch, folded: Folded) -> dict[str, Tensor]:
        """`features` of windows that are cut out already; `folded` holds what earlier windows of a call needed."""
        network, mean, std = self.extractor.network, self.extractor.mean, self.extractor.std
        for needed in batch.folds:
            if needed not in folded:
                weight, bias = self._weights_of(needed.node)(network)
                folded[needed] = fold(weight, bias, mean, std, windows.shape[1], needed.padded)
        return batch.network(network, windows, mean, std, [folded[needed] for needed in batch.folds])

    def _derived(self, kind: _Kind) -> _Derived:
        axes, stretches = kind.axes, kind.window.stretches
        needed = [axis.needed(stretch) for axis, stretch in zip(axes, stretches, strict=True)]
        pixels = [of_axis[self.graph.image] for of_axis in needed]
        first = (stretch.start * axis.alignment for axis, stretch in zip(axes, stretches, strict=True))
        offset = tuple(cells.start - unit for cells, unit in zip(pixels, first, strict=True))
        network, folds = self._network(kind, needed)
        return _Derived(network, offset, tuple(cells.stop - cells.start for cells in pixels), folds)

    def _reader_of_weights(self, node: fx.Node) -> Callable[..., tuple[Tensor, Tensor | None]]:
        """What gives the weight and the bias that a convolution has in the extractor's network then."""
        part, step = Part(fx.Graph(), {}), self.graph.steps[node]
        assert isinstance(step, Convolution)
        part.graph.output(step.weights(part, node))
        return type(fx.GraphModule(self.graph.network, part.graph)).forward

    def _network(
        self, kind: _Kind, needed: Sequence[Mapping[fx.Node, Cells]]
    ) -> tuple[WindowNetwork, tuple[Fold, ...]]:
        """What computes the layers' cells in a window from the pixels that it needs, and whose weights are folded."""
        graph, axes, stretches = self.graph, kind.axes, kind.window.stretches
        part = Part(fx.Graph(), {})
        image, mean, std, weights = (part.graph.placeholder(name) for name in ("images", "mean", "std", "folded"))
        folds: list[Fold] = []
        folded = (
            all(
                isinstance(step, Convolution) and step.groups == 1 and step.mode == "zeros"
                for node, step in graph.steps.items()
                if graph.image in graph.inputs[node]
            )
            and graph.image not in graph.layers.values()
        )
        if not folded:
            image = part.call(prepare_images, image, self.extractor.channels, mean, std)
        part.maps[graph.image] = image
        for node, step in graph.steps.items():
            sizes = [axis.sizes[graph.inputs[node][0]] for axis in axes]
            made = [of_axis[node] for of_axis in needed]
            frames = [
                Frame(size, step.touches(axis, cells, size), step.reads(axis, cells), cells)
                for axis, (size, cells) in enumerate(zip(sizes, made, strict=True))
            ]
            held = [frame.held for frame in frames]
            inputs = {
                read: cut(part, part.maps[read], [of_axis[read] for of_axis in needed], held, graph.layouts[read])
                for read in graph.inputs[node]
            }
            if folded and isinstance(step, Convolution) and graph.image in inputs:
                folds.append(Fold(node, any(any(frame.padding) for frame in frames)))
                own = part.call(operator.getitem, weights, len(folds) - 1)
                part.maps[node] = _emit_folded(part, step, inputs[graph.image], frames, mean, own, folds[-1].padded)
            else:
                part.maps[node] = step.emit(part, node, inputs, frames)
        wanted = [axis.wanted(stretch) for axis, stretch in zip(axes, stretches, strict=True)]
        part.graph.output(
            {
                layer: cut(part, part.maps[node], [n[node] for n in needed], [w[node] for w in wanted])
                for layer, node in graph.layers.items()
            }
        )
        # The function alone: a GraphModule keeps the parameters that there were when it was made.
        network = type(fx.GraphModule(graph.network, part.graph)).forward
        if self.compiled:
            network = (
                _keeping_outputs(torch.compile(network, mode="reduce-overhead"))
                if kind.captured
                else torch.compile(network)
            )
        return network, tuple(folds)


def captures(images: Tensor) -> bool:
    """Whether compiled networks run as CUDA graphs on these images, one for each number of windows."""
    return images.is_cuda


def _keeping_outputs(network: WindowNetwork) -> WindowNetwork:
    """A captured network whose outputs outlive its next call.

    A CUDA graph's outputs lie in memory of its own. The next call overwrites them, unless they await a backward pass:
    then it is part of the same step to PyTorch. Features of the normal-dose image never do, nor do the denoised
    image's in validation.
    """

    def run(*args: object) -> dict[str, Tensor]:
        return {layer: values.clone() for layer, values in network(*args).items()}

    return run


def _emit_folded(
    part: Part,
    step: Convolution,
    image: fx.Node,
    frames: Sequence[Frame],
    mean: fx.Node,
    folded: fx.Node,
    padded: bool,
) -> fx.Node:
    """A convolution of images that are neither normalised nor repeated yet, with folded weights."""
    weight, bias = (part.call(operator.getitem, folded, number) for number in range(2))
    if padded:
        image = part.call(with_ones, image, mean)
    return step.emit_with(part, image, frames, weight, bias)


def fold(
    weight: Tensor, bias: Tensor | None, mean: Tensor | None, std: Tensor | None, channels: int, padded: bool
) -> tuple[Tensor, Tensor | None]:
    """Weight and bias that give conv((images - mean) / std) for images as they come.

    Args:
        weight: [O, C, ...].
        bias: [O], or None.
        mean: [1, C, ...], or None.
        std: As `mean`.
        channels: Of the images, C or 1 for one that stands for all.
        padded: Zeros beyond the image's edge are zeros after the normalisation. To keep them apart from pixels, the
            mean goes into the weights of another channel, which `with_ones` appends, rather than into the bias.
    """
    if std is not None:
        weight = weight / std.to(weight.dtype)
    shift = None if mean is None else -(weight * mean.to(weight.dtype)).sum(1, keepdim=True)
    if channels < weight.shape[1]:
        weight = weight.sum(1, keepdim=True)
    if shift is not None and padded:
        weight = torch.cat((weight, shift), 1)
    elif shift is not None:
        total = shift.flatten(1).sum(1)
        bias = total if bias is None else bias + total
    return weight, bias


def with_ones(images: Tensor, mean: Tensor | None) -> Tensor:
    """Images with a channel of ones, where a mean is folded into its weights."""
    return images if mean is None else torch.cat((images, torch.ones_like(images[:, :1])), 1)
