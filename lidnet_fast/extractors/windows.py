"""Which windows of the images a perceptual loss has to look at, given its boxes.

Along each axis images are counted in units: as many pixels as the graph's alignment, so that every layer has whole
cells in a unit. A window is a range of units of the layers that the boxes read; what it needs of the image is that and
the receptive field around it. A window for which that passes the image's edge is extended to the edge, so that there
are few kinds of windows: those inside, which differ in nothing but their place, and those at an edge.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from torch import fx

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
        self._extra = last - first
        self.first_free = max(0, math.ceil((-first / self.per_unit).max()))
        self.last_free = math.floor(((self.most - last) / self.per_unit).min())
        self.buckets = self._buckets()

    def _buckets(self) -> np.ndarray:
        """Sizes of windows, in units."""
        image = self.nodes.index(self.graph.image)
        sizes = [1]
        while sizes[-1] < self.units:
            pixels = self.alignment * sizes[-1] + self._extra[image]
            sizes.append(max(sizes[-1] + 1, math.ceil((BUCKET_GROWTH * pixels - self._extra[image]) / self.alignment)))
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

    def cells(self, start: np.ndarray, stop: np.ndarray) -> np.ndarray:
        """Cells of every node that windows need: [..., nodes]."""
        return np.minimum((stop - start)[..., None] * self.per_unit + self._extra, self.most)

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
        self._costs = np.zeros(len(nodes))
        for node, convolution in graph.convolutions.items():
            self._costs[nodes.index(node)] = convolution.macs + CELL_COST * convolution.out_channels
        self._costs[nodes.index(graph.image)] += CELL_COST
        weights = sum(convolution.macs for convolution in graph.convolutions.values())
        self.kind_cost = COST_PER_CALL * len(graph.steps) + COST_PER_WEIGHT * weights
        self.whole_cost = float(math.prod(axis.most for axis in self.axes) @ self._costs)  # type: ignore[operator]

    def cost(self, start: np.ndarray, stop: np.ndarray) -> np.ndarray:
        """The cost of windows [..., axes], in multiply-adds of one pass through the layers."""
        cells = [axis.cells(start[..., number], stop[..., number]) for number, axis in enumerate(self.axes)]
        return math.prod(cells) @ self._costs  # type: ignore[operator]

    def fit(self, start: np.ndarray, stop: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`Axis.fit` along each axis, of windows [..., axes]."""
        fitted = [axis.fit(start[..., number], stop[..., number]) for number, axis in enumerate(self.axes)]
        return np.stack([first for first, _ in fitted], -1), np.stack([last for _, last in fitted], -1)

    def plan(self, rois: np.ndarray, images: int, aligned: bool = True, share_kinds: bool = True) -> Plan:
        """Windows for boxes: one that overlaps others is merged with them where that costs less.

        Args:
            rois: [K, 5], (image, x1, y1, x2, y2), or [K, 7], (image, x1, y1, z1, x2, y2, z2), in pixels.
            images: In the batch.
            aligned: As in `functional.roi_perceptual_loss`.
            share_kinds: Enlarge windows where computing them with others, as one batch, costs less. Otherwise the
                windows of an image don't depend on what else is in the batch.
        """
        dimensions = len(self.axes)
        low, high = rois[:, dimensions:0:-1], rois[:, :dimensions:-1]
        plan = Plan(window_of_box=np.full(len(rois), -1, np.int64))
        units = [axis.units_of(low[:, n], high[:, n], aligned) for n, axis in enumerate(self.axes)]
        needed_start, needed_stop = (np.stack(ends, -1) for ends in zip(*units, strict=True))
        for image in np.unique(rois[:, 0]).astype(int).tolist():
            boxes = np.flatnonzero(rois[:, 0] == image)
            start, stop, window_of_box = self._merged(needed_start[boxes], needed_stop[boxes])
            windows = [
                Window(image, tuple(axis.stretch(int(a), int(b)) for axis, a, b in zip(self.axes, *ends, strict=True)))
                for ends in zip(start, stop, strict=True)
            ]
            windows = self._sharing_kinds(windows) if share_kinds else windows
            cost = self._cost_of(windows)
            if cost >= self.whole_cost:
                share = cost / self.whole_cost
                plan.whole[image] = f"windows for {len(boxes)} boxes would cost {share:.2f} of the whole image"
                continue
            plan.window_of_box[boxes] = len(plan.windows) + window_of_box
            plan.windows += windows
        plan.windows = self._sharing_kinds(plan.windows) if share_kinds else plan.windows
        total = self._cost_of(plan.windows) + len(plan.whole) * self.whole_cost
        plan.relative_cost = total / (max(images, 1) * self.whole_cost)
        return plan

    def _cost_of(self, windows: Sequence[Window]) -> float:
        sizes = np.array([[stretch.stop - stretch.start for stretch in window.stretches] for window in windows])
        kinds = len({window.kind for window in windows})
        of_windows = float(self.cost(np.zeros_like(sizes), sizes).sum()) if windows else 0.0
        return WINDOW_PENALTY * (kinds * self.kind_cost + of_windows)

    def _sharing_kinds(self, windows: Sequence[Window]) -> list[Window]:
        """Windows of fewer kinds: two kinds that differ in size only become one where that costs less."""
        result = list(windows)
        alike: dict[tuple, list[int]] = {}
        for number, window in enumerate(windows):
            alike.setdefault(tuple((kind[0], *kind[2:]) for kind in window.kind), []).append(number)
        for members in alike.values():
            sizes = np.array([[s.stop - s.start for s in windows[number].stretches] for number in members])
            kinds, kind_of_window = np.unique(sizes, axis=0, return_inverse=True)
            kind_of_window = kind_of_window.reshape(-1)
            counts = np.bincount(kind_of_window).astype(float)
            while len(kinds) > 1:
                together = np.maximum(kinds[:, None], kinds)
                each, both = self.cost(np.zeros_like(kinds), kinds), self.cost(np.zeros_like(together), together)
                growth = (both - each[:, None]) * counts[:, None] + (both - each) * counts
                for number, (axis, stretch) in enumerate(zip(self.axes, windows[members[0]].stretches, strict=True)):
                    begin, end = axis.place(stretch.start, stretch.stop, together[..., number])
                    growth[end - begin != together[..., number]] = np.inf  # no room
                np.fill_diagonal(growth, np.inf)
                if growth.min() >= self.kind_cost:
                    break
                kept, gone = sorted(np.unravel_index(growth.argmin(), growth.shape))
                kinds[kept] = together[kept, gone]
                counts[kept] += counts[gone]
                kind_of_window[kind_of_window == gone] = kept
                kind_of_window[kind_of_window > gone] -= 1
                kinds, counts = np.delete(kinds, gone, 0), np.delete(counts, gone)
            for number, kind in zip(members, kind_of_window, strict=True):
                stretches = zip(self.axes, windows[number].stretches, kinds[kind].tolist(), strict=True)
                places = [(axis, axis.place(stretch.start, stretch.stop, units)) for axis, stretch, units in stretches]
                grown = tuple(axis.stretch(int(begin), int(end)) for axis, (begin, end) in places)
                result[number] = windows[number]._replace(stretches=grown)
        return result

    def _merged(self, start: np.ndarray, stop: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Windows [L, axes] for the needs [K, axes] of boxes, and the window of each box."""
        start, stop, window_of_box = _distinct(start, stop)
        alive = np.ones(len(start), bool)
        cost = self.cost(*self.fit(start, stop))
        saved = cost[:, None] + cost - self._cost_together(start[:, None], stop[:, None], start, stop)
        np.fill_diagonal(saved, -np.inf)
        while (best := saved.max()) >= 0:
            kept, gone = sorted(np.unravel_index(saved.argmax(), saved.shape))
            start[kept] = np.minimum(start[kept], start[gone])
            stop[kept] = np.maximum(stop[kept], stop[gone])
            cost[kept] += cost[gone] - best
            alive[gone] = False
            window_of_box[window_of_box == gone] = kept
            row = cost[kept] + cost - self._cost_together(start[kept], stop[kept], start, stop)
            saved[kept] = saved[:, kept] = np.where(alive, row, -np.inf)
            saved[gone] = saved[:, gone] = saved[kept, kept] = -np.inf
        start, stop = self.fit(start[alive], stop[alive])
        return start, stop, (np.cumsum(alive) - 1)[window_of_box]

    def _cost_together(self, start: np.ndarray, stop: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
        return self.cost(*self.fit(np.minimum(start, starts), np.maximum(stop, stops)))


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
