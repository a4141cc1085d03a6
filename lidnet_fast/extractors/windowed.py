"""Runs the layers of an extractor on windows of images: the same features, and nothing that isn't asked for."""

import operator
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn

from .. import functional as fast
from .layers import LayerExtractor, prepare_images
from .operations import Cells, Convolution, Frame, Part, cut
from .receptive_field import LayerGraph
from .windows import Axis, Plan, Window, WindowPlanner

__all__ = ["WindowBatch", "WindowedExtractor"]

# Compiled or not, networks for so many kinds of windows are kept.
MOST_KINDS = 256


class WindowBatch(NamedTuple):
    """Windows of one kind.

    Attributes:
        network: (windows, mean, std) -> layer -> features.
        corners: [windows, 1 + axes] on the CPU: the image, and the first row and column (and depth before) to take.
        size: Pixels of each window along the axes.
        origins: Layer -> [windows, axes], the features' first cell in the layer of the whole image.
    """

    network: nn.Module
    corners: Tensor
    size: tuple[int, ...]
    origins: dict[str, Tensor]


class WindowedExtractor:
    """Features of a `LayerExtractor` in windows of the images, exactly those of the whole images.

    Each kind of window (its size, the image's edges that it touches) has a network of its own, derived from the
    extractor's graph and sharing its weights: every operation computes the cells that later ones need, and pads where
    the image ends only. So nothing is computed to be thrown away, and a window's edge leaves no trace. The
    normalisation and the repetition of one channel are folded into the first convolutions.

    Args:
        extractor: Layers with finite receptive fields.
        truncated: Halo in pixels instead of the whole receptive field, at whose end the extractor pads; None for all.
        compiled: Whether networks go through torch.compile.

    Raises:
        ValueError: If a layer has no finite receptive field, naming the node that it depends on.
    """

    def __init__(self, extractor: LayerExtractor, truncated: int | None = None, compiled: bool = False) -> None:
        self.extractor = extractor
        self.truncated = truncated
        self.compiled = compiled
        self.renew()

    def renew(self) -> None:
        """Derive all from the extractor again, after it has moved to another device or dtype."""
        self.graph = LayerGraph(self.extractor.network, self.extractor.dimensions)
        self._planners: dict[tuple[int, ...], WindowPlanner] = {}
        self._networks: OrderedDict[tuple, nn.Module] = OrderedDict()
        for layer in self.graph.layers:
            self.stride(layer)

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name not in ("graph", "_planners", "_networks")}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self.renew()

    def stride(self, layer: str) -> float:
        """Pixels per cell of a layer, the same along all axes."""
        strides = self.graph.strides[self.graph.layers[layer]]
        if len(set(strides)) > 1:
            raise ValueError(f"layer {layer!r} has strides {' x '.join(map(str, strides))}; they must be the same")
        return float(strides[0])

    def planner(self, image_size: Sequence[int]) -> WindowPlanner:
        """The planner for images of a size."""
        size = tuple(image_size)
        if size not in self._planners:
            self._planners[size] = WindowPlanner(self.graph, size, self.truncated)
        return self._planners[size]

    def batches(self, plan: Plan, image_size: Sequence[int], channels: int) -> list[tuple[list[int], WindowBatch]]:
        """The windows of a plan by kind: their indices in the plan, and what to compute."""
        axes = self.planner(image_size).axes
        of_kind: dict[tuple, list[int]] = {}
        for number, window in enumerate(plan.windows):
            of_kind.setdefault(window.kind, []).append(number)
        return [
            (numbers, self._batch([plan.windows[n] for n in numbers], axes, channels)) for numbers in of_kind.values()
        ]

    def _batch(self, windows: Sequence[Window], axes: Sequence[Axis], channels: int) -> WindowBatch:
        first = windows[0]
        needed = [axis.needed(stretch) for axis, stretch in zip(axes, first.stretches, strict=True)]
        pixels = [of_axis[self.graph.image] for of_axis in needed]
        key = (first.kind, channels)
        if key not in self._networks:
            network: nn.Module = (
                self.extractor if self.truncated is not None else self._network(axes, first, needed, channels)
            )
            self._networks[key] = self._compiled(network) if self.compiled else network
            if len(self._networks) > MOST_KINDS:
                self._networks.popitem(last=False)
        self._networks.move_to_end(key)
        units = torch.tensor([[stretch.start for stretch in window.stretches] for window in windows])
        shift = (units - units[0]) * torch.tensor(self.graph.alignment)
        corners = torch.tensor([cells.start for cells in pixels]) + shift
        images = torch.tensor([[window.image] for window in windows])
        origins = {
            layer: units * torch.tensor([axis.ratios[node] for axis in axes])
            for layer, node in self.graph.layers.items()
        }
        size = tuple(cells.stop - cells.start for cells in pixels)
        return WindowBatch(self._networks[key], torch.hstack((images, corners)), size, origins)

    def _compiled(self, network: nn.Module) -> nn.Module:
        """The network through torch.compile; on CUDA as CUDA graphs, one for each number of windows."""
        on_cuda = next(self.extractor.parameters()).device.type == "cuda"
        return torch.compile(network, mode="reduce-overhead" if on_cuda else None)  # type: ignore[return-value]

    def features(self, images: Tensor, batch: WindowBatch) -> dict[str, Tensor]:
        """Layer -> features of a batch of windows.

        Args:
            images: [N, C, H, W] or [N, C, D, H, W].
            batch: Windows of these images.
        """
        windows = fast.roi_windows(images, batch.corners, batch.size)
        if self.truncated is not None:
            return batch.network(windows)
        return batch.network(windows, self.extractor.mean, self.extractor.std)

    def _network(
        self, axes: Sequence[Axis], window: Window, needed: Sequence[dict[fx.Node, Cells]], channels: int
    ) -> fx.GraphModule:
        """What computes the layers' cells in a window from the pixels that it needs, and their mean and std."""
        graph = self.graph
        part = Part(fx.Graph(), {})
        image, mean, std = (part.graph.placeholder(name) for name in ("images", "mean", "std"))
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
                read: cut(part, part.maps[read], [of_axis[read] for of_axis in needed], held)
                for read in graph.inputs[node]
            }
            if folded and isinstance(step, Convolution) and graph.image in inputs:
                part.maps[node] = _emit_folded(part, step, node, inputs[graph.image], frames, mean, std, channels)
            else:
                part.maps[node] = step.emit(part, node, inputs, frames)
        wanted = [axis.wanted(stretch) for axis, stretch in zip(axes, window.stretches, strict=True)]
        part.graph.output(
            {
                layer: cut(part, part.maps[node], [n[node] for n in needed], [w[node] for w in wanted])
                for layer, node in graph.layers.items()
            }
        )
        return fx.GraphModule(graph.network, part.graph)


def _emit_folded(
    part: Part,
    step: Convolution,
    node: fx.Node,
    image: fx.Node,
    frames: Sequence[Frame],
    mean: fx.Node,
    std: fx.Node,
    channels: int,
) -> fx.Node:
    """A convolution of images that are neither normalised nor repeated yet."""
    padded = any(any(frame.padding) for frame in frames)
    weight, bias = step.weights(part, node)
    folded = part.call(fold, weight, bias, mean, std, channels, padded)
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
    if channels == 1:
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
