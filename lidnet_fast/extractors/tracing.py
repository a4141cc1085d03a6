"""A network's graph, under torchvision's names of nodes and with nothing changed in place.

An operation in place overwrites the map of the layer before it, which may be wanted, and all that shares its memory.
Here each becomes the same operation out of place, and what reads the overwritten map later reads its result. Where
that can't be done, the node is refused by name as soon as a chosen layer depends on it.
"""

import inspect
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torchvision
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torchvision.models.feature_extraction import NodePathTracer

__all__ = ["Trace", "trace"]


@dataclass
class Trace:
    """A network's graph.

    Attributes:
        network: What was traced; its modules work out of place from then on.
        graph: Its graph.
        nodes: Name of a node, or of a module that gives a tensor -> the node that holds the features.
        refusals: Node that would read what was overwritten -> why that can't be rewritten.
    """

    network: nn.Module
    graph: fx.Graph
    nodes: dict[str, fx.Node]
    refusals: dict[fx.Node, str] = field(default_factory=dict)

    def extract(self, layers: Iterable[str]) -> fx.GraphModule:
        """A module that gives layer -> features, and computes nothing else.

        Raises:
            ValueError: If a layer depends on a node that was refused.
        """
        outputs = {layer: self.nodes[layer] for layer in layers}
        needed: set[fx.Node] = set()
        waiting = list(outputs.values())
        while waiting:
            node = waiting.pop()
            if node not in needed:
                needed.add(node)
                waiting += node.all_input_nodes
        for node in self.graph.nodes:
            if node in needed and node in self.refusals:
                raise ValueError(f"extractor: {self.refusals[node]}")
        for node in reversed(self.graph.nodes):
            if node.op == "output" or (node not in needed and node.op != "placeholder"):
                self.graph.erase_node(node)
        self.graph.output(outputs)
        return fx.GraphModule(self.network, self.graph)


def trace(network: nn.Module) -> Trace:
    """The graph of a network in evaluation mode, whose modules are made to work out of place.

    Raises:
        ValueError: If torch.fx can't trace the network.
    """
    blocks = [kind for kind in vars(torchvision.ops).values() if inspect.isclass(kind) and issubclass(kind, nn.Module)]
    # Torchvision's own blocks are looked into, and buffers read when called, unless the network doesn't allow it.
    for leaves, with_buffers in (([], True), (blocks, True), (blocks, False)):
        tracer = _Tracer(leaves, with_buffers)
        try:
            graph = tracer.trace(network)
            break
        except Exception as error:  # whatever a forward raises that was never meant to be traced
            failure = error
    else:
        raise ValueError(
            f"extractor {type(network).__name__} can't be traced by torch.fx: {failure}. To fix: give a part of it "
            "without control flow that depends on values"
        ) from failure
    names = {name: node for node, name in tracer.node_to_qualname.items()}
    nodes: dict[str, fx.Node] = {}
    for name, node in names.items():
        parts = name.split(".")
        nodes.update({".".join(parts[:end]): node for end in range(1, len(parts) + 1)})  # the last within a module
    nodes.update(names)
    rewriting = _Rewriting(network, graph, tracer.results)
    nodes.update(rewriting.results)
    for module in network.modules():
        if getattr(module, "inplace", False):
            module.inplace = False  # type: ignore[assignment]
    return Trace(network, graph, nodes, rewriting.refusals)


class _Proxy(fx.Proxy):
    """Records `x += y` as such; torch.fx takes it for `x = x + y`, also where `x` has another name."""


_OPERATORS = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor")


def _out_of_place(operation: str) -> Callable:
    return getattr(operator, f"{operation}_" if operation in ("and", "or") else operation)


def _recorded(operation: str) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    """What a Proxy does for an operator in place; nodes keep the names that torchvision gives them."""
    function, name = getattr(operator, f"i{operation}"), _out_of_place(operation).__name__
    return lambda proxy, other: proxy.tracer.create_proxy("call_function", function, (proxy, other), {}, name)


for _operation in _OPERATORS:
    setattr(_Proxy, f"__i{_operation}__", _recorded(_operation))


class _Tracer(NodePathTracer):
    """Torchvision's tracer, which also keeps what modules return, and when.

    Attributes:
        results: (the last node when a module returned, the module's name, the node of what it returned).
    """

    def __init__(self, leaves: Sequence[type[nn.Module]] = (), with_buffers: bool = True) -> None:
        super().__init__(autowrap_modules=(math, torchvision.ops), leaf_modules=leaves)
        self.proxy_buffer_attributes = with_buffers
        self.results: list[tuple[fx.Node, str, fx.Node]] = []

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def call_module(self, m: nn.Module, forward: Callable, args: Any, kwargs: Any) -> Any:
        result = super().call_module(m, forward, args, kwargs)
        name = self.path_of_module(m)
        if isinstance(result, fx.Proxy) and not self.is_leaf_module(m, name):
            self.results.append((next(iter(reversed(self.graph.nodes))), name, result.node))
        return result


# What may give its argument's own memory: views, and what has nothing to do at times. In evaluation, dropout hasn't.
_VIEWS = {
    *("adjoint", "as_strided", "broadcast_to", "chunk", "contiguous", "detach", "diagonal", "dsplit", "expand"),
    *("expand_as", "flatten", "getattr", "getitem", "hsplit", "imag", "movedim", "moveaxis", "narrow", "permute"),
    *("ravel", "real", "reshape", "reshape_as", "select", "split", "split_with_sizes", "squeeze", "swapaxes"),
    *("swapdims", "t", "tensor_split", "transpose", "unbind", "unflatten", "unfold", "unsqueeze", "view", "view_as"),
    *("vsplit", "to", "type", "type_as", "float", "double", "half", "bfloat16", "cpu", "cuda"),
    *("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout", "feature_dropout"),
    *("Identity", "Flatten", "Unflatten", "Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout"),
    *("FeatureAlphaDropout",),
}
_NUMBERS = ("size", "dim", "numel", "nelement", "stride", "ndimension", "item", "tolist")


class _Rewriting:
    """Rewrites a graph's operations in place, in the order of computation.

    Attributes:
        results: Module -> the node that held what it returned when it returned it.
        refusals: As in `Trace`.
    """

    def __init__(self, network: nn.Module, graph: fx.Graph, results: list[tuple[fx.Node, str, fx.Node]]) -> None:
        self.network = network
        self.results: dict[str, fx.Node] = {}
        self.refusals: dict[fx.Node, str] = {}
        self._latest: dict[fx.Node, fx.Node] = {}  # overwritten -> the node with what is there now
        self._memory: dict[fx.Node, set[fx.Node]] = {}  # node -> the nodes whose memory it may share
        self._numbers: set[fx.Node] = set()
        nodes = [node for node in graph.nodes if node.op != "output"]
        self._place = {node: number for number, node in enumerate(nodes)}
        self._readers = {node: tuple(node.users) for node in nodes}
        returned: dict[fx.Node, list[tuple[str, fx.Node]]] = {}
        for when, name, node in results:
            returned.setdefault(when, []).append((name, node))
        for node in nodes:
            self._visit(node)
            for name, result in returned.get(node, ()):
                self.results[name] = self._now(result)

    def _now(self, node: fx.Node) -> fx.Node:
        return self._latest.get(node, node)

    def _visit(self, node: fx.Node) -> None:
        given = node.all_input_nodes
        overwritten, out_of_place = self._in_place(node)
        node.args, node.kwargs = fx.node.map_arg((node.args, node.kwargs), self._now)
        self._memory[node] = {node}
        if self._is_number(node):
            self._numbers.add(node)
        elif self._is_view(node):
            self._memory[node] = {node}.union(*(self._memory[read] for read in given))
        if overwritten is None:
            return
        if overwritten in self._numbers:
            out_of_place(node)  # type: ignore[misc]
            return
        reason = f"node {node.name!r} ({_name_of(self.network, node)}) changes"
        if out_of_place is None or overwritten.op == "get_attr":
            what = "a parameter or buffer" if overwritten.op == "get_attr" else f"{overwritten.name!r}"
            reason += f" {what} in place, which can't be rewritten. To fix: compute it out of place in the network"
            self.refusals[node] = reason
            self._refuse_readers(overwritten, node, reason, of_itself=True)
            return
        out_of_place(node)
        reason += f" {overwritten.name!r} in place, and others read it through a view. To fix: use the result instead"
        self._refuse_readers(overwritten, node, reason, of_itself=False)
        now = self._now(overwritten)
        self._memory[node] = self._memory[node] | self._memory[now]
        for name, current in list(self._latest.items()):
            if current is now:
                self._latest[name] = node
        self._latest[now] = self._latest[overwritten] = node

    def _refuse_readers(self, overwritten: fx.Node, node: fx.Node, reason: str, of_itself: bool) -> None:
        """Refuse what reads the memory of `overwritten` after `node`, other than by a name that is followed."""
        now = self._now(overwritten)
        for other, memory in self._memory.items():
            followed = other is node or self._now(other) is now
            if (followed and not of_itself) or other is node or not memory & self._memory[now]:
                continue
            for reader in self._readers[other]:
                if self._place.get(reader, -1) > self._place[node]:
                    self.refusals.setdefault(reader, reason)

    def _in_place(self, node: fx.Node) -> tuple[fx.Node | None, Callable[[fx.Node], None] | None]:
        """What a node overwrites, None for nothing, and how to make it work out of place, None for not at all."""
        first = node.args[0] if node.args else next(iter(node.kwargs.values()), None)
        overwritten = first if isinstance(first, fx.Node) else None
        if node.op == "call_module":
            module = self.network.get_submodule(str(node.target))
            return (overwritten, lambda node: None) if getattr(module, "inplace", False) else (None, None)
        if node.op not in ("call_method", "call_function"):
            return None, None
        out = node.kwargs.get("out")
        if isinstance(out, fx.Node):
            return out, None
        if node.op == "call_method":
            name = str(node.target)
            if not name.endswith("_") or name.endswith("__"):
                return None, None
            # Tensor.bernoulli takes other arguments than bernoulli_; of some methods there is no other form.
            replaceable = name != "bernoulli_" and callable(getattr(Tensor, name[:-1], None))
            return overwritten, _target(name[:-1]) if replaceable else None
        function: Any = node.target
        name = getattr(function, "__name__", "")
        if name in {f"i{operation}" for operation in _OPERATORS} and function is getattr(operator, name, None):
            return overwritten, _target(_out_of_place(name[1:]))
        if name == "setitem":
            return overwritten, None
        if isinstance(function, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
            overloads = [function] if isinstance(function, torch._ops.OpOverload) else _overloads(function)
            return (overwritten, None) if any(overload._schema.is_mutable for overload in overloads) else (None, None)
        if name.endswith("_") and not name.endswith("__"):
            replacement = next((getattr(home, name[:-1]) for home in (F, torch) if hasattr(home, name[:-1])), None)
            return overwritten, None if replacement is None else _target(replacement)
        return (overwritten, _without_inplace) if _inplace_option(node) else (None, None)

    def _is_number(self, node: fx.Node) -> bool:
        """Whether a node's value is a size or computed from sizes alone, which nothing changes in place."""
        name = getattr(node.target, "__name__", str(node.target))
        if node.op == "call_method" or name == "len":
            return name in (*_NUMBERS, "len")
        if name == "getattr":
            return node.args[1] in ("shape", "ndim", "itemsize", "nbytes")
        reads = node.all_input_nodes
        return node.op == "call_function" and bool(reads) and all(read in self._numbers for read in reads)

    def _is_view(self, node: fx.Node) -> bool:
        """Whether a node's value may share its inputs' memory."""
        if node.op == "call_module":
            return type(self.network.get_submodule(str(node.target))).__name__ in _VIEWS
        if node.op == "call_method":
            return node.target in _VIEWS
        if node.op != "call_function":
            return False
        home = getattr(node.target, "__module__", None) or ""
        of_torch = home.split(".")[0] in ("torch", "_operator", "math", "") or isinstance(
            node.target, torch._ops.OpOverload | torch._ops.OpOverloadPacket
        )
        return not of_torch or getattr(node.target, "__name__", "") in _VIEWS  # others' functions may do anything


def _target(target: Any) -> Callable[[fx.Node], None]:
    def change(node: fx.Node) -> None:
        node.target = target

    return change


def _inplace_option(node: fx.Node) -> bool:
    """Whether a function is called with inplace=True."""
    try:
        given = inspect.signature(node.target).bind(*node.args, **node.kwargs)  # type: ignore[arg-type]
    except (TypeError, ValueError):  # no signature, as most of torch's functions in C++
        return bool(node.kwargs.get("inplace"))
    return bool(given.arguments.get("inplace"))


def _without_inplace(node: fx.Node) -> None:
    if "inplace" in node.kwargs:
        node.kwargs = {**node.kwargs, "inplace": False}
        return
    place = list(inspect.signature(node.target).parameters).index("inplace")  # type: ignore[arg-type]
    node.args = (*node.args[:place], False, *node.args[place + 1 :])


def _overloads(packet: Any) -> list[Any]:
    return [getattr(packet, name) for name in packet.overloads()]


def _name_of(network: nn.Module, node: fx.Node) -> str:
    if node.op == "call_module":
        return type(network.get_submodule(str(node.target))).__name__
    return getattr(node.target, "__name__", str(node.target))
