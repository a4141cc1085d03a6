"""The operations of a network's graph, or why some node of it has no finite receptive field."""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import type_before_parametrizations

from .layouts import CHANNELS, Layout, Side, arranged, map_shapes, regrouped, usual
from .operations import (
    AveragePooling,
    Convolution,
    Linear,
    MaxPooling,
    Operation,
    Padding,
    Piece,
    Pointwise,
    Regrouping,
    Resizing,
    Slicing,
    argument,
)
from .refusals import RefusedError, why

__all__ = ["Map", "Refused", "operations"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_POINTWISE_MODULES = (
    *(nn.CELU, nn.ELU, nn.GELU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.LeakyReLU, nn.LogSigmoid),
    *(nn.Mish, nn.PReLU, nn.ReLU, nn.ReLU6, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Softshrink, nn.Softsign),
    *(nn.Tanh, nn.Tanhshrink, nn.Threshold, nn.Softmax2d, nn.Identity),
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout),
)
_POINTWISE_FUNCTIONS = {
    *(operator.add, operator.iadd, operator.sub, operator.isub, operator.mul, operator.imul, operator.truediv),
    *(operator.neg, torch.add, torch.sub, torch.mul, torch.div, torch.neg, torch.abs, torch.exp, torch.sqrt),
    *(torch.square, torch.relu, torch.sigmoid, torch.tanh, torch.clamp, torch.maximum, torch.minimum),
    *(F.celu, F.elu, F.gelu, F.hardsigmoid, F.hardswish, F.hardtanh, F.leaky_relu, F.logsigmoid, F.mish, F.relu),
    *(F.relu6, F.selu, F.sigmoid, F.silu, F.softplus, F.softsign, F.tanh, F.threshold),
}
_POINTWISE_METHODS = {
    *("add", "add_", "sub", "sub_", "mul", "mul_", "div", "div_", "neg", "abs", "exp", "sqrt", "square", "relu"),
    *("relu_", "sigmoid", "tanh", "clamp", "contiguous", "clone", "detach", "float", "half", "bfloat16", "double"),
}
# What does nothing in evaluation, and which argument says so.
_DROPOUTS = {
    **dict.fromkeys(("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout"), 2),
    "stochastic_depth": 3,
}


@dataclass(frozen=True)
class Map:
    """A map of features that a finite part of the image decides each cell of.

    Attributes:
        node: What makes it.
        layout: What its dimensions are.
        reads: The nodes of the maps that it is made from.
    """

    node: fx.Node
    layout: Layout
    reads: tuple[fx.Node, ...] = ()


@dataclass(frozen=True)
class Pieces:
    """What `node` divides the channels of a map into."""

    node: fx.Node
    whole: Map


@dataclass(frozen=True)
class Refused:
    """What depends on more than a finite part of the image, and why."""

    reason: str


def operations(
    network: fx.GraphModule, channels: int, dimensions: int
) -> tuple[dict[fx.Node, Operation], dict[fx.Node, Map | Refused]]:
    """What the nodes of a network do that takes images alone.

    Args:
        network: In evaluation mode; its nodes are modules of torch.nn and functions.
        channels: Of the images.
        dimensions: Spatial dimensions of the images.

    Returns:
        Node -> its operation, in the graph's order, for the nodes with a finite receptive field; and all nodes that
        depend on the image's values.
    """
    reader = _Reader(network, channels, dimensions)
    reader.run(None)
    return reader.operations, reader.values


class _Reader(fx.Interpreter):
    """Runs a graph on what its values are rather than on tensors; what doesn't depend on the image is computed."""

    def __init__(self, network: fx.GraphModule, channels: int, dimensions: int) -> None:
        super().__init__(network, garbage_collect_values=False)
        self.network = network
        self.channels = channels
        self.dimensions = dimensions
        self.usual = usual(dimensions)
        self.operations: dict[fx.Node, Operation] = {}
        self.values: dict[fx.Node, Map | Refused] = {}

    @cached_property
    def shapes(self) -> dict[fx.Node, tuple[int, ...]]:
        """The shape of every map, for some image."""
        return map_shapes(self.network, self.channels, self.dimensions)

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "output":
            return None
        if n.op == "placeholder":
            if self.values:  # an argument after the images, left at its default
                return n.args[0] if n.args else None
            self.values[n] = Map(n, self.usual)
            return self.values[n]
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        read: list[Any] = []
        fx.node.map_aggregate(
            (args, kwargs), lambda a: read.append(a) if isinstance(a, Map | Pieces | Side | Refused) else None
        )
        maps = [value for value in read if isinstance(value, Map | Pieces)]
        refused = next((value for value in read if isinstance(value, Refused)), None)
        if refused is None and not maps:
            if not read or n.target is operator.getitem:
                with torch.no_grad():
                    return super().run_node(n)
            return Refused(f"node {n.name!r}: {why('size')}")
        value = refused or self._describe(n, args, kwargs, maps)
        if isinstance(value, Map | Refused):
            self.values[n] = value
        return value

    def _describe(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], maps: list[Map | Pieces]) -> Any:
        """A Map with its operation, Pieces, sizes, or Refused."""
        try:
            value = self._of_pieces(node, args, maps) or self._of_layout(node, args, kwargs, maps)  # type: ignore[arg-type]
            if value is not None:
                return value
            layouts = {value.layout for value in maps if isinstance(value, Map)}
            if len(layouts) > 1:
                raise RefusedError("joins maps whose dimensions are in another order")
            (layout,) = layouts
            operation = self._operation(node, args, kwargs, layout)
            if not isinstance(operation, Pointwise) and layout != self.usual:
                raise RefusedError("isn't supported on a map whose channels aren't its second dimension")
        except RefusedError as refusal:
            what = f" ({node.target})" if node.op == "call_module" and node.target != node.name else ""
            return Refused(f"node {node.name!r}{what}: {refusal}")
        return self._map(node, operation, layout, maps)  # type: ignore[arg-type]

    def _map(self, node: fx.Node, operation: Operation, layout: Layout, maps: Sequence[Map]) -> Map:
        self.operations[node] = operation
        return Map(node, layout, tuple(dict.fromkeys(value.node for value in maps)))

    def _of_pieces(self, node: fx.Node, args: tuple[Any, ...], maps: list[Map | Pieces]) -> Map | None:
        """One of the pieces of a map."""
        pieces = next((value for value in maps if isinstance(value, Pieces)), None)
        if pieces is None:
            return None
        if node.target is not operator.getitem or not isinstance(args[1], int):
            raise RefusedError("takes the pieces of a map together; they are supported one by one")
        return self._map(node, Piece(pieces.node, args[1]), pieces.whole.layout, [pieces.whole])

    def _of_layout(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], maps: list[Map]) -> Any:
        """What asks for a map's sizes, or changes the order or the number of its dimensions; None for all else."""
        name = getattr(node.target, "__name__", str(node.target))
        if node.op == "call_module" or len(maps) > 1 or not args or not isinstance(args[0], Map):
            return None
        map = args[0]
        if name in ("chunk", "split"):
            if self._role(map, argument(args, kwargs, 2, "dim", 0)) != CHANNELS:
                raise RefusedError(f"{name} divides another dimension than channels")
            return Pieces(node, map)
        if name == "size" or (name == "getattr" and args[1] == "shape"):
            sizes = self._sizes(map)
            asked = argument(args, kwargs, 1, "dim", None) if name == "size" else None
            return sizes if asked is None else sizes[asked]
        if name == "dim" or (name == "getattr" and args[1] == "ndim"):
            return len(map.layout)
        if name in ("permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis"):
            function = getattr(Tensor, name)
            layout = arranged(map.layout, lambda tensor: function(tensor, *args[1:], **kwargs))
            return self._map(node, Pointwise(), layout, maps)
        if name in ("view", "reshape"):
            given = args[1] if isinstance(args[1], list | tuple) else args[1:]
            try:
                layout, sizes = regrouped(map.layout, self._known_shape(map), given)
            except ValueError as error:
                raise RefusedError(f"{name} {error}; choose a layer before it") from None
            return self._map(node, Regrouping(sizes), layout, maps)
        return None

    def _sizes(self, map: Map) -> tuple[int | Side, ...]:
        shape = self._known_shape(map)
        return tuple(size if role == CHANNELS else Side(role) for role, size in zip(map.layout, shape, strict=True))

    def _known_shape(self, map: Map) -> tuple[int, ...]:
        if map.node not in self.shapes:
            raise RefusedError(why("size"))
        return self.shapes[map.node]

    def _role(self, map: Map, dim: Any) -> str | int | None:
        """What a dimension of a map is."""
        return map.layout[dim] if isinstance(dim, int) and -len(map.layout) <= dim < len(map.layout) else None

    def _operation(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], layout: Layout) -> Operation:
        """What a node does to maps of one layout."""
        if node.op == "call_module":
            return self._of_module(self.fetch_attr(str(node.target)), layout)
        if node.op == "call_function":
            return self._of_function(node.target, args, kwargs, layout)  # type: ignore[arg-type]
        if node.target == "softmax":
            return _softmax(argument(args, kwargs, 1, "dim", None), layout)
        if node.target not in _POINTWISE_METHODS:
            raise RefusedError(why(str(node.target)))
        self._check_constants(args, kwargs, layout)
        return Pointwise()

    def _of_module(self, module: Any, layout: Layout) -> Operation:
        kind = type_before_parametrizations(module)
        if module._forward_hooks or module._forward_pre_hooks:
            raise RefusedError(
                f"{kind.__name__} has forward hooks, which would see windows. To fix: remove them, or replace those of "
                "torch.nn.utils.weight_norm by torch.nn.utils.parametrizations.weight_norm"
            )
        if kind in _CONVOLUTIONS:
            return self._convolution(module)
        if isinstance(module, _BatchNorm):  # SyncBatchNorm too, which in evaluation mode is no other
            _check_second(layout, kind.__name__)
            return _batch_norm(module)
        if kind in (nn.PReLU, nn.Softmax2d):
            _check_second(layout, kind.__name__)
        if kind in _POINTWISE_MODULES:
            return Pointwise()
        if kind is nn.Linear:
            return _linear(layout, module.in_features, module.out_features)
        if kind is nn.LayerNorm:
            return _layer_norm(layout, module.normalized_shape)
        if kind is nn.Softmax:
            return _softmax(module.dim, layout)
        if kind in (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d):
            return self._max_pool(*_attributes(module, _MAX_POOL))
        if kind in (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d):
            return self._average_pool(*_attributes(module, _AVERAGE_POOL))
        if kind in (nn.Upsample, nn.UpsamplingNearest2d):
            return self._resizing(*_attributes(module, _INTERPOLATE))
        for name in ("Constant", "Zero", "Reflection", "Replication"):
            if kind.__name__.startswith(f"{name}Pad"):
                mode = {"Reflection": "reflect", "Replication": "replicate"}.get(name, "constant")
                return self._padding(module.padding, mode, getattr(module, "value", 0.0))
        raise RefusedError(why(kind.__name__))

    def _of_function(
        self, function: Callable, args: tuple[Any, ...], kwargs: dict[str, Any], layout: Layout
    ) -> Operation:
        name = getattr(function, "__name__", str(function))
        if function in _POINTWISE_FUNCTIONS:
            self._check_constants(args, kwargs, layout)
            return Pointwise()
        if function in (torch.cat, torch.concat):
            if layout[argument(args, kwargs, 1, "dim", 0)] != CHANNELS:
                raise RefusedError("concatenates along another dimension than channels")
            return Pointwise()
        if name in _DROPOUTS:
            if argument(args, kwargs, _DROPOUTS[name], "training", True):
                raise RefusedError(f"{name} is in training mode")
            return Pointwise()
        if function is F.linear:
            weight = argument(args, kwargs, 1, "weight", None)
            if not isinstance(weight, Tensor):
                raise RefusedError("multiplies by a weight that depends on the image")
            return _linear(layout, weight.shape[1], weight.shape[0])
        if function is F.layer_norm:
            return _layer_norm(layout, argument(args, kwargs, 1, "normalized_shape", ()))
        if function in (F.softmax, torch.softmax):
            return _softmax(argument(args, kwargs, 1, "dim", None), layout)
        if function is F.batch_norm:
            _check_second(layout, name)
            if argument(args, kwargs, 5, "training", False):
                raise RefusedError("batch_norm in training mode depends on the whole batch")
            return Pointwise()
        if function in (F.interpolate, F.upsample):
            return self._resizing(*(argument(args, kwargs, *option) for option in _INTERPOLATE))
        if name in ("conv1d", "conv2d", "conv3d"):
            return self._functional_convolution(*(argument(args, kwargs, *option) for option in _CONVOLVE))
        if function is F.pad:
            mode, value = argument(args, kwargs, 2, "mode", "constant"), argument(args, kwargs, 3, "value", None)
            return self._padding(argument(args, kwargs, 1, "pad", ()), mode, value or 0.0)
        if function in _MAX_POOLS:
            return self._max_pool(*(argument(args, kwargs, *option) for option in _MAX_POOL))
        if function in _AVERAGE_POOLS:
            return self._average_pool(*(argument(args, kwargs, *option) for option in _AVERAGE_POOL))
        if function is operator.getitem:
            return self._slicing(args[1])
        raise RefusedError(why(name))

    def _check_constants(self, args: tuple[Any, ...], kwargs: dict[str, Any], layout: Layout) -> None:
        """Other tensors may differ from channel to channel, but not from place to place."""
        for value in (*args, *kwargs.values()):
            if isinstance(value, Side):
                raise RefusedError(why("size"))
            if isinstance(value, Tensor) and any(
                size != 1 and role != CHANNELS
                for role, size in zip(reversed(layout), reversed(value.shape), strict=False)
            ):
                raise RefusedError(
                    f"is combined with a tensor of shape {tuple(value.shape)}, which ties it to one place"
                )

    def _each_axis(self, value: Any) -> tuple[int, ...]:
        values = tuple(value) if isinstance(value, list | tuple) else (value,)
        values = values * self.dimensions if len(values) == 1 else values
        if len(values) != self.dimensions:
            raise RefusedError(f"is for {len(values)} spatial dimensions, and the images have {self.dimensions}")
        return values

    def _functional_convolution(self, weight: Any, stride: Any, padding: Any, dilation: Any, groups: int) -> Operation:
        if not isinstance(weight, Tensor):
            raise RefusedError("convolves with a weight that depends on the image")
        out_channels, in_channels, *kernel = weight.shape
        return self._convolution(
            SimpleNamespace(
                kernel_size=kernel,
                stride=stride,
                padding=padding,
                dilation=dilation,
                padding_mode="zeros",
                groups=groups,
                in_channels=in_channels * groups,
                out_channels=out_channels,
            )
        )

    def _convolution(self, module: Any) -> Operation:
        """The convolution of a module, or of what has its attributes."""
        kernel, dilation = self._each_axis(module.kernel_size), self._each_axis(module.dilation)
        if module.padding_mode == "circular":
            raise RefusedError(
                "circular padding reads the opposite edge of the image; zeros, reflect or replicate don't"
            )
        if isinstance(module.padding, str):
            total = [(k - 1) * d if module.padding == "same" else 0 for k, d in zip(kernel, dilation, strict=True)]
            before = tuple(n // 2 for n in total)
            after = tuple(n - n // 2 for n in total)
        else:
            before = after = self._each_axis(module.padding)
        return Convolution(
            kernel,
            self._each_axis(module.stride),
            before,
            after,
            dilation,
            mode=module.padding_mode,
            groups=module.groups,
            in_channels=module.in_channels,
            out_channels=module.out_channels,
        )

    def _max_pool(
        self, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool, indices: bool
    ) -> Operation:
        if indices:
            raise RefusedError("returns indices of maxima, which count from the map's first cell; return_indices=False")
        sides = self._each_axis(padding)
        return MaxPooling(
            self._each_axis(kernel),
            self._each_axis(stride or kernel),
            sides,
            sides,
            self._each_axis(dilation),
            ceil_mode=ceil_mode,
        )

    def _average_pool(
        self, kernel: Any, stride: Any, padding: Any, ceil_mode: bool, count_include_pad: bool, divisor: int | None
    ) -> Operation:
        sides = self._each_axis(padding)
        return AveragePooling(
            self._each_axis(kernel),
            self._each_axis(stride or kernel),
            sides,
            sides,
            (1,) * self.dimensions,
            ceil_mode=ceil_mode,
            count_include_pad=count_include_pad,
            divisor=divisor,
        )

    def _resizing(self, size: Any, scale_factor: Any, mode: str, align_corners: bool | None) -> Operation:
        if size is not None:
            raise RefusedError("resizes to a given size; a whole scale_factor has a finite receptive field")
        factors = self._each_axis(scale_factor)
        if not all(float(factor).is_integer() and factor >= 1 for factor in factors):
            raise RefusedError(f"resizes by {scale_factor}; whole factors have a finite receptive field")
        if mode not in ("nearest", "nearest-exact", "linear", "bilinear", "trilinear"):
            raise RefusedError(f"resizes with mode {mode!r}; nearest and linear interpolation are known")
        if align_corners:
            raise RefusedError("resizes with align_corners=True, which depends on the image's size; False doesn't")
        return Resizing(tuple(map(int, factors)), "nearest" if mode.startswith("nearest") else "linear")

    def _padding(self, widths: Any, mode: str, value: float) -> Operation:
        widths = list(widths) if isinstance(widths, list | tuple) else [widths] * 2 * self.dimensions
        if len(widths) > 2 * self.dimensions or not all(isinstance(width, int) for width in widths):
            raise RefusedError(f"pads by {widths}: only the image's axes can be padded")
        if mode == "circular":
            raise RefusedError(
                "circular padding reads the opposite edge of the image; constant, reflect, replicate don't"
            )
        widths += [0] * (2 * self.dimensions - len(widths))
        return Padding(tuple(widths[-2::-2]), tuple(widths[::-2]), mode, float(value))

    def _slicing(self, index: Any) -> Operation:
        index = index if isinstance(index, tuple) else (index,)
        if Ellipsis in index:
            place = index.index(Ellipsis)
            missing = self.dimensions + 3 - len(index)
            index = (*index[:place], *[slice(None)] * missing, *index[place + 1 :])
        index = (*index, *[slice(None)] * (self.dimensions + 2 - len(index)))
        if not all(isinstance(part, slice) for part in index) or index[0] != slice(None):
            raise RefusedError(f"is indexed with {index}; slices of channels and of the image's axes are known")
        for part in index[2:]:
            if not all(isinstance(value, int | None) for value in (part.start, part.stop, part.step)):
                raise RefusedError(f"is sliced with {part}; a slice of fixed numbers has a finite receptive field")
            if (part.start or 0) < 0:
                raise RefusedError(f"is sliced with {part}, from a place that depends on the image's size")
        return Slicing(index[1], tuple(index[2:]))


# Options of functions: position, name, which is that of the module's attribute too, and default.
_INTERPOLATE = ((1, "size", None), (2, "scale_factor", None), (3, "mode", "nearest"), (4, "align_corners", None))
_CONVOLVE: tuple[tuple[int, str, Any], ...] = (
    *((1, "weight", None), (3, "stride", 1), (4, "padding", 0), (5, "dilation", 1)),
    (6, "groups", 1),
)
# torch.nn.functional's names for these are functions that choose between two others.
_MAX_POOLS = (F.max_pool1d, F.max_pool2d, F.max_pool3d, torch.max_pool1d, torch.max_pool2d, torch.max_pool3d)
_AVERAGE_POOLS = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)
_MAX_POOL: tuple[tuple[int, str, Any], ...] = (
    *((1, "kernel_size", None), (2, "stride", None), (3, "padding", 0), (4, "dilation", 1)),
    *((5, "ceil_mode", False), (6, "return_indices", False)),
)
_AVERAGE_POOL: tuple[tuple[int, str, Any], ...] = (
    *((1, "kernel_size", None), (2, "stride", None), (3, "padding", 0), (4, "ceil_mode", False)),
    *((5, "count_include_pad", True), (6, "divisor_override", None)),
)


def _attributes(module: nn.Module, options: Sequence[tuple[int, str, Any]]) -> list[Any]:
    return [getattr(module, name, default) for _, name, default in options]


def _check_second(layout: Layout, name: str) -> None:
    if layout[1] != CHANNELS or CHANNELS in layout[2:]:
        raise RefusedError(f"{name} isn't supported on a map whose channels aren't its second dimension")


def _linear(layout: Layout, in_channels: int, out_channels: int) -> Operation:
    if layout[-1] != CHANNELS:
        raise RefusedError("is a linear map along an axis of the image; choose a layer before it")
    return Linear(in_channels, out_channels)


def _layer_norm(layout: Layout, normalized_shape: Sequence[int]) -> Operation:
    if any(role != CHANNELS for role in layout[-len(normalized_shape) :]):
        raise RefusedError("layer_norm normalises along axes of the image; along channels that come last it doesn't")
    return Pointwise()


def _softmax(dim: int | None, layout: Layout) -> Operation:
    if dim is None or layout[dim] != CHANNELS:
        raise RefusedError("softmax mixes places far apart in the image; choose a layer before it")
    return Pointwise()


def _batch_norm(module: Any) -> Operation:
    if module.training:
        raise RefusedError("BatchNorm in training mode depends on the whole batch; call eval() on the network")
    if module.running_mean is None:
        raise RefusedError("BatchNorm without running statistics depends on the whole batch; track_running_stats=True")
    return Pointwise()
