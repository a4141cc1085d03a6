"""Which windows of the images a perceptual loss has to look at, given its boxes.

Along each axis images are counted in units: as many pixels as the graph's alignment, so that every layer has whole
cells in a unit. A window is a range of units of the layers that the boxes read; what it needs of the image is that and
the receptive field around it. A window for which that passes the image's edge is extended to the edge, so that there
are few kinds of windows: those inside, which differ in nothing but their place, and those at an edge.

What is planned is defined here, in NumPy. The extension `_C_planner` (csrc/planner/) plans the same windows.
"""

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from torch import fx

from .. import backend
from .operations import Cells
from .receptive_field import LayerGraph

__all__ = ["Axis", "Plan", "Stretch", "Window", "WindowPlanner"]

# Of consecutive sizes of windows, the larger has to be longer by this factor: few sizes, little waste.
BUCKET_GROWTH = 1.1
# What a cell of a convolution's output costs in addition to its multiply-adds (activations, pooling, memory), per
# channel and in multiply-adds.
CELL_COST = 64
# What each kind of window costs in addition, in multiply-adds: for every operation that is called, and for every
# weight, which convolutions bring into another order at each call. Measured on two cores (benches/profile_windows.py).
COST_PER_CALL, COST_PER_WEIGHT = 1.5e7, 40
# How much longer a multiply-add takes in windows than in whole images, measured alike.
WINDOW_PENALTY = 1.15
# Every two windows of an image are compared. Above this number, boxes that lie near each other share one at first.
MOST_WINDOWS = 256


class Stretch(NamedTuple):
    """A window along one axis: units start, ..., stop - 1. What has the same `kind` has the same shape and padding.

    Attributes:
        start: First unit.
        stop: One behind the last.
        kind: ("inside", units), ("first", units), ("last", units, pixels of the image) or ("all", pixels).
    """

    start: int
    stop: int
    kind: tuple[str, int] | tuple[str, int, int]


class Window(NamedTuple):
    """A part of one image; `stretches` are along its axes, depth or rows first."""

    image: int
    stretches: tuple[Stretch, ...]

    @property
    def kind(self) -> tuple:
        """The kinds of all stretches: windows of one kind can be computed as one batch."""
        return tuple(stretch.kind for stretch in self.stretches)


@dataclass
class Plan:
    """What to compute for a batch of images.

    Attributes:
        windows: All windows.
        window_of_box: Box -> index of the window that holds it, -1 where its whole image is computed.
        whole: Image that has boxes and is computed as a whole -> why.
        relative_cost: Cost of the plan over that of computing all images as a whole.
    """

    windows: list[Window] = field(default_factory=list)
    window_of_box: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    whole: dict[int, str] = field(default_factory=dict)
    relative_cost: float = 0.0


class Axis:
    """Windows along one axis of images of a given size.

    Args:
        graph: Of the layers.
        axis: The axis.
        pixels: Size of the images along it.

    Raises:
        ValueError: If a layer has no cell in so small an image.
    """

    def __init__(self, graph: LayerGraph, axis: int, pixels: int) -> None:
        self.graph, self.axis, self.pixels = graph, axis, pixels
        self.alignment = graph.alignment[axis]
        self.sizes = graph.sizes(axis, pixels)
        if min(self.sizes.values()) < 1:
            layers = ", ".join(map(repr, graph.layers))
            raise ValueError(f"images of {pixels} pixels along an axis are too small for {layers}: no cell is left")
        self.ratios = {node: int(self.alignment / graph.strides[node][axis]) for node in graph.layers.values()}
        self.units = max(-(-self.sizes[node] // ratio) for node, ratio in self.ratios.items())
        # Of every map, a window of units [a, b) needs the cells [per_unit * a + first, per_unit * b + last).
        one = graph.demand(axis, {node: Cells(0, ratio) for node, ratio in self.ratios.items()})
        self.nodes = list(one)
        self.per_unit = np.array([float(self.alignment / graph.strides[node][axis]) for node in self.nodes])
        first = np.array([one[node].start for node in self.nodes])
        last = np.array([one[node].stop for node in self.nodes]) - self.per_unit
        self.most = np.array([self.sizes[node] for node in self.nodes])
        self.extra = last - first
        self.first_free = max(0, math.ceil((-first / self.per_unit).max()))
        self.last_free = math.floor(((self.most - last) / self.per_unit).min())
        self.buckets = self._buckets()

    def _buckets(self) -> np.ndarray:
        """Sizes of windows, in units."""
        image = self.nodes.index(self.graph.image)
        sizes = [1]
        while sizes[-1] < self.units:
            pixels = self.alignment * sizes[-1] + self.extra[image]
            sizes.append(max(sizes[-1] + 1, math.ceil((BUCKET_GROWTH * pixels - self.extra[image]) / self.alignment)))
        return np.array(sizes)

    def units_of(self, low: np.ndarray, high: np.ndarray, aligned: bool) -> tuple[np.ndarray, np.ndarray]:
        """Units that RoIAlign of the layers reads for boxes from `low` to `high`, in pixels."""
        starts: list[np.ndarray] = []
        stops: list[np.ndarray] = []
        for node, ratio in self.ratios.items():
            stride = float(self.graph.strides[node][self.axis])
            # Samples lie in the box, and each is interpolated from the cell before it and the cell behind it.
            shift = 0.5 if aligned else 0.0
            begin, end = low / stride - shift, high / stride - shift
            end = end if aligned else np.maximum(end, begin + 1)
            for places, margin, units in ((begin, 0, starts), (end, 1, stops)):
                cells = np.clip(np.floor(places) + margin, 0, self.sizes[node] - 1).astype(np.int64)
                units.append(cells // ratio)
        return np.min(starts, axis=0), np.max(stops, axis=0) + 1

    def fit(self, start: np.ndarray, stop: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The units of windows that hold those from `start` to `stop`: sizes as in `buckets`, edges where touched."""
        first, last = start < self.first_free, stop > self.last_free
        least = np.where(first, stop, np.where(last, self.units - start, stop - start))
        return self.place(start, stop, self.buckets[np.searchsorted(self.buckets, least)])

    def place(
        self, start: np.ndarray | int, stop: np.ndarray | int, size: np.ndarray | int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The units of windows of `size` that hold those from `start` to `stop`; all units where none has room."""
        first, last = np.less(start, self.first_free), np.greater(stop, self.last_free)
        inside = np.clip(start - (size - (stop - start)) // 2, self.first_free, self.last_free - size)
        begin = np.where(first, 0, np.where(last, self.units - size, inside))
        everything = np.where(~first & ~last, size > self.last_free - self.first_free, first & last)
        everything |= first & (size > self.last_free) | last & (begin < self.first_free)
        return np.where(everything, 0, begin), np.where(everything, self.units, begin + size)

    def cells(self, units: np.ndarray) -> np.ndarray:
        """Cells of every node that windows of so many units need: [..., nodes]."""
        return np.minimum(units[..., None] * self.per_unit + self.extra, self.most)

    def stretch(self, start: int, stop: int) -> Stretch:
        """The window of units start, ..., stop - 1."""
        at_first, at_last = start < self.first_free, stop > self.last_free
        if at_first and at_last:
            return Stretch(start, stop, ("all", self.pixels))
        if at_last:
            return Stretch(start, stop, ("last", stop - start, self.pixels))
        return Stretch(start, stop, ("first" if at_first else "inside", stop - start))

    def wanted(self, stretch: Stretch) -> dict[fx.Node, Cells]:
        """The cells of the layers in a window."""
        return {
            node: Cells(min(stretch.start * ratio, self.sizes[node] - 1), min(stretch.stop * ratio, self.sizes[node]))
            for node, ratio in self.ratios.items()
        }

    def needed(self, stretch: Stretch) -> dict[fx.Node, Cells]:
        """The cells of every map that a window is computed from."""
        return self.graph.demand(self.axis, self.wanted(stretch), self.sizes)


class _Planned(NamedTuple):
    """A plan in arrays; windows are ranges of units along the axes.

    Attributes:
        images: [L], of each window.
        start: [L, axes], its first units.
        stop: [L, axes], one behind its last.
        window_of_box: As in `Plan`.
        whole: Image that is computed as a whole -> what its windows would cost.
        cost: Of the windows.
    """

    images: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    window_of_box: np.ndarray
    whole: dict[int, float]
    cost: float


class WindowPlanner:
    """Plans windows for boxes of images of one size.

    Args:
        graph: Of the layers.
        image_size: Pixels along the axes, depth or rows first.

    Raises:
        ValueError: If a layer has no cell in so small an image.
    """

    def __init__(self, graph: LayerGraph, image_size: Sequence[int]) -> None:
        self.axes = [Axis(graph, axis, pixels) for axis, pixels in enumerate(image_size)]
        nodes = self.axes[0].nodes
        # Costs and cells are whole numbers: their sums are exact up to 2^53, in any order. So are comparisons of them.
        self._costs = np.zeros(len(nodes))
        for node, convolution in graph.convolutions.items():
            self._costs[nodes.index(node)] = convolution.macs + CELL_COST * convolution.out_channels
        self._costs[nodes.index(graph.image)] += CELL_COST
        weights = sum(convolution.macs for convolution in graph.convolutions.values())
        self.kind_cost = COST_PER_CALL * len(graph.steps) + COST_PER_WEIGHT * weights
        self.whole_cost = float(math.prod(axis.most for axis in self.axes) @ self._costs)  # type: ignore[operator]

    def cost(self, sizes: np.ndarray) -> np.ndarray:
        """The cost of windows of `sizes` [..., axes], in multiply-adds of one pass through the layers."""
        cells = [axis.cells(sizes[..., number]) for number, axis in enumerate(self.axes)]
        return math.prod(cells) @ self._costs  # type: ignore[operator]

    def fit(self, start: np.ndarray, stop: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`Axis.fit` along each axis, of windows [..., axes]."""
        return _along(self.axes, Axis.fit, start, stop)

    def plan(self, rois: np.ndarray, images: int, aligned: bool = True, share_kinds: bool = True) -> Plan:
        """Windows for boxes: one that overlaps others is merged with them where that costs less.

        Args:
            rois: [K, 5], (image, x1, y1, x2, y2), or [K, 7], (image, x1, y1, z1, x2, y2, z2), in pixels.
            images: In the batch.
            aligned: As in `functional.roi_perceptual_loss`.
            share_kinds: Enlarge windows where computing them with others, as one batch, costs less. Otherwise the
                windows of an image don't depend on what else is in the batch.
        """
        if backend.current() == "fused" and backend.missing_kernels()["window planner"] is None:
            planned = _Planned(*self._extension.plan(rois, self.whole_cost, aligned, share_kinds))
        else:
            planned = self._plan(rois, aligned, share_kinds)
        ends = zip(planned.start.tolist(), planned.stop.tolist(), strict=True)
        windows = [
            Window(image, tuple(axis.stretch(a, b) for axis, a, b in zip(self.axes, start, stop, strict=True)))
            for image, (start, stop) in zip(planned.images.tolist(), ends, strict=True)
        ]
        whole = {}
        for image, cost in planned.whole.items():
            boxes, share = np.count_nonzero(rois[:, 0] == image), cost / self.whole_cost
            whole[image] = f"windows for {boxes} boxes would cost {share:.2f} of the whole image"
        total = planned.cost + len(whole) * self.whole_cost
        return Plan(windows, planned.window_of_box, whole, total / (max(images, 1) * self.whole_cost))

    @cached_property
    def _extension(self) -> Any:
        extension = importlib.import_module("lidnet_fast._C_planner")
        costly = np.flatnonzero(self._costs)
        axes = [
            extension.Axis(
                layers=[
                    extension.Layer(float(axis.graph.strides[node][axis.axis]), ratio, axis.sizes[node])
                    for node, ratio in axis.ratios.items()
                ],
                maps=[extension.MapCells(axis.per_unit[node], axis.extra[node], axis.most[node]) for node in costly],
                buckets=axis.buckets,
                units=axis.units,
                first_free=axis.first_free,
                last_free=axis.last_free,
            )
            for axis in self.axes
        ]
        return extension.WindowPlanner(axes, self._costs[costly], self.kind_cost, WINDOW_PENALTY, MOST_WINDOWS)

    def _plan(self, rois: np.ndarray, aligned: bool, share_kinds: bool) -> _Planned:
        """The definition of what `_C_planner` plans."""
        dimensions = len(self.axes)
        low, high = rois[:, dimensions:0:-1], rois[:, :dimensions:-1]
        units = [axis.units_of(low[:, n], high[:, n], aligned) for n, axis in enumerate(self.axes)]
        needed_start, needed_stop = (np.stack(ends, -1) for ends in zip(*units, strict=True))
        window_of_box, whole = np.full(len(rois), -1, np.int64), {}
        images = np.empty(0, np.int64)
        starts = stops = np.empty((0, dimensions), np.int64)
        for image in np.unique(rois[:, 0]).astype(int).tolist():
            boxes = np.flatnonzero(rois[:, 0] == image)
            start, stop, window_of_need = self._merged(needed_start[boxes], needed_stop[boxes])
            if share_kinds:
                start, stop = self._sharing_kinds(start, stop)
            cost = self._cost_of(start, stop)
            if cost >= self.whole_cost:
                whole[image] = cost
                continue
            window_of_box[boxes] = len(images) + window_of_need
            images = np.append(images, np.full(len(start), image))
            starts, stops = np.vstack((starts, start)), np.vstack((stops, stop))
        if share_kinds:
            starts, stops = self._sharing_kinds(starts, stops)
        return _Planned(images, starts, stops, window_of_box, whole, self._cost_of(starts, stops))

    def _edges(self, start: np.ndarray, stop: np.ndarray) -> np.ndarray:
        """Which edges of the image windows touch: [L, 2 * axes], the first along each axis and the last."""
        first = [axis.first_free for axis in self.axes]
        last = [axis.last_free for axis in self.axes]
        return np.hstack((start < first, stop > last))

    def _cost_of(self, start: np.ndarray, stop: np.ndarray) -> float:
        kinds = len(np.unique(np.hstack((self._edges(start, stop), stop - start)), axis=0))
        return WINDOW_PENALTY * (kinds * self.kind_cost + float(self.cost(stop - start).sum()))

    def _sharing_kinds(self, start: np.ndarray, stop: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Windows of fewer kinds: two kinds that differ in size only become one where that costs less."""
        _, edges = np.unique(self._edges(start, stop), axis=0, return_inverse=True)
        start, stop = start.copy(), stop.copy()
        for alike in np.unique(edges):
            members = np.flatnonzero(edges.reshape(-1) == alike)
            size = self._shared_size(start[members], stop[members])
            start[members], stop[members] = _along(self.axes, Axis.place, start[members], stop[members], size)
        return start, stop

    def _shared_size(self, start: np.ndarray, stop: np.ndarray) -> np.ndarray:
        """The sizes [L, axes] of windows that touch the same edges, once some are enlarged to be of one kind."""
        sizes, kind, counts = np.unique(stop - start, axis=0, return_inverse=True, return_counts=True)

        def gain(chosen: np.ndarray | int) -> np.ndarray:
            together = np.maximum(sizes[chosen], sizes)
            each, both = self.cost(sizes), self.cost(together)
            growth = (both - each[chosen]) * counts[chosen] + (both - each) * counts
            begin, end = _along(self.axes, Axis.place, start[0], stop[0], together)
            room = (end - begin == together).all(-1)
            return np.where(room, self.kind_cost - growth, -np.inf)

        def join(kept: int, gone: int) -> None:
            sizes[kept] = np.maximum(sizes[kept], sizes[gone])
            counts[kept] += counts[gone]

        return sizes[_join_pairs(len(sizes), gain, join)[kind.reshape(-1)]]

    def _merged(self, start: np.ndarray, stop: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Windows [L, axes] for the needs [K, axes] of boxes, and the window of each box."""
        start, stop, need_of_box = _distinct(start, stop)
        cost = self._cost_of_needs(start, stop)

        def gain(chosen: np.ndarray | int) -> np.ndarray:
            together = self._cost_of_needs(np.minimum(start[chosen], start), np.maximum(stop[chosen], stop))
            return cost[chosen] + cost - together

        def join(kept: int, gone: int) -> None:
            start[kept], stop[kept] = np.minimum(start[kept], start[gone]), np.maximum(stop[kept], stop[gone])
            cost[kept] = self._cost_of_needs(start[kept], stop[kept])

        ends, window_of_need = np.unique(_join_pairs(len(start), gain, join), return_inverse=True)
        return *self.fit(start[ends], stop[ends]), window_of_need[need_of_box]

    def _cost_of_needs(self, start: np.ndarray, stop: np.ndarray) -> np.ndarray:
        start, stop = self.fit(start, stop)
        return self.cost(stop - start)


def _along(axes: Sequence[Axis], function: Callable[..., tuple], *values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The starts and stops that a function of `Axis` returns along each axis, for values [..., axes]."""
    ends = [function(axis, *(value[..., number] for value in values)) for number, axis in enumerate(axes)]
    return np.stack([start for start, _ in ends], -1), np.stack([stop for _, stop in ends], -1)


def _join_pairs(
    count: int, gain: Callable[[np.ndarray | int], np.ndarray], join: Callable[[int, int], None]
) -> np.ndarray:
    """Joins items pair by pair, the pair of the largest gain first, as long as that loses nothing.

    Of equal gains, the first pair is joined.

    Args:
        count: Of the items.
        gain: What joining an item with each [count] brings, or some [..., 1] with each [..., count].
        join: Makes an item hold another, later one, which is gone then.

    Returns:
        [count], the item that each ends in.
    """
    ends_in, alive = np.arange(count), np.ones(count, bool)
    gains = gain(ends_in[:, None])
    np.fill_diagonal(gains, -np.inf)
    while count and gains.max() >= 0:
        kept, gone = sorted(map(int, np.unravel_index(gains.argmax(), gains.shape)))
        join(kept, gone)
        ends_in[ends_in == gone] = kept
        alive[gone] = False
        gains[kept] = gains[:, kept] = np.where(alive, gain(kept), -np.inf)
        gains[gone] = gains[:, gone] = gains[kept, kept] = -np.inf
    return ends_in


def _distinct(start: np.ndarray, stop: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Needs [L, axes] that hold the needs [K, axes], at most MOST_WINDOWS of them, and the one of each."""
    grid = 1
    while True:
        places = np.hstack((start // grid, -(-stop // grid)))
        distinct, index = np.unique(places, axis=0, return_inverse=True)
        if len(distinct) <= MOST_WINDOWS:
            break
        grid *= 2
    index = index.reshape(-1)
    first = np.full((len(distinct), start.shape[1]), np.iinfo(np.int64).max)
    last = np.zeros_like(first)
    np.minimum.at(first, index, start)
    np.maximum.at(last, index, stop)
    return first, last, index
