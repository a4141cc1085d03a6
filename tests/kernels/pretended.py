"""A GPU that is the CPU: tensors that say they are on it, and what calls with them would have a real one do.

Whole calls of the library take the way that they take on CUDA, with Triton's kernels interpreted and those in CUDA C++
emulated. Counted meanwhile are launches, copies between host and device, and what waits for the device. Calls can be
recorded and replayed as a CUDA graph would replay them: the same kernels on the same memory, without the host.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from lidnet_fast import backend
from lidnet_fast.ops._library import library

DEVICE = torch.device("cuda", 0)
_ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
_READS = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "unique_dim", "_unique2"}
_PINNING = {"_pin_memory", "pin_memory"}


class Pretended(Tensor):
    """A tensor on the CPU, `held`, that says it is on `DEVICE`.

    To PyTorch's own C++, which would look for the device, it is a tensor without memory (meta).
    """

    held: Tensor
    device, is_cuda, is_meta = DEVICE, True, False

    @staticmethod
    def __new__(cls, held: Tensor) -> "Pretended":
        layout = (held.shape, held.stride(), held.storage_offset())
        tensor = Tensor._make_wrapper_subclass(cls, *layout, dtype=held.dtype, device="meta")
        tensor.held = held
        return tensor

    def __repr__(self) -> str:
        return f"Pretended({self.held})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} outside of `pretending`")


class Recording:
    """What was launched: as a CUDA graph that is captured has it, with the places of all tensors and every number.

    Attributes:
        launches: In their order, names with arguments; of tensors on the device shapes, strides and dtypes, of others
            their values.
    """

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []
        self._again: list[Callable[[], None]] = []

    def add(self, name: str, arguments: Any, run: Callable[[], Any], result: Any = None) -> None:
        """A launch that `run` repeats; what it returns goes to the memory of `result`."""
        self.launches.append((name, _pytree.tree_map_only(Tensor, _described, arguments)))

        def again() -> None:
            new = run()
            for place, values in zip(_pytree.tree_leaves(result), _pytree.tree_leaves(new), strict=True):
                if isinstance(place, Tensor):
                    place.copy_(values)

        self._again.append(again)

    def replay(self) -> None:
        """All launches again, on what is in the memory of their tensors now."""
        with _disable_current_modes(), torch.no_grad():
            for again in self._again:
                again()


def _described(tensor: Tensor) -> Any:
    if isinstance(tensor, Pretended):
        return tuple(tensor.shape), tensor.stride(), tensor.dtype
    return tensor.tolist()


class Pretence(TorchDispatchMode):
    """What is known of the calls while it is active.

    Attributes:
        launches: Kernel, or PyTorch operator that launches one -> how often.
        uploads: Copies from pinned memory that the host doesn't wait for.
        waits: Operator that waits for the device, by any other copy or as it reads values -> how often.
    """

    def __init__(self, kernels: Mapping[str, Callable[..., Any]]) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.uploads = 0
        self.recording: Recording | None = None
        self._kernels = kernels
        self._pinned: list[Tensor] = []

    def on_device(self, tensor: Tensor) -> Tensor:
        """A tensor of the test's, on the device."""
        return Pretended(tensor.detach()).requires_grad_(tensor.requires_grad)

    @contextmanager
    def recorded(self) -> Iterator[Recording]:
        """Meanwhile launches are recorded, and PyTorch says that it captures."""
        self.recording = recording = Recording()
        try:
            yield recording
        finally:
            self.recording = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), func.overloadpacket.__name__
        tensors = [leaf for leaf in _pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_device = any(isinstance(tensor, Pretended) for tensor in tensors)
        if func.namespace == "lidnet_fast" and on_device:
            with self:
                if name in self._kernels:
                    return self._kernels[name](*args, **kwargs)
                return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
        if name == "is_pinned":
            return self._is_pinned(args[0])
        target = kwargs.get("device")
        to_device = on_device if target is None else torch.device(target).type in (DEVICE.type, "meta")
        if name == "_to_copy" and on_device and to_device and kwargs.get("dtype", args[0].dtype) == args[0].dtype:
            return args[0]  # PyTorch's C++ only believes that it is elsewhere
        if to_device and target is not None:
            kwargs["device"] = torch.device("cpu")
        pinned = kwargs.pop("pin_memory", None) or name in _PINNING
        with _disable_current_modes():
            held = _pytree.tree_map_only(Pretended, lambda tensor: tensor.held, (args, kwargs))
            result = args[0].clone() if name in _PINNING else func(*held[0], **held[1])
        if pinned:
            self._pinned.append(result)
        if on_device or to_device:
            counted = self.launches.total()
            self._count(func, tensors, to_device, result, kwargs.get("non_blocking") or (name == "copy_" and args[2:]))
            if self.recording is not None and self.launches.total() > counted:
                into = None if func._schema.is_mutable else result
                self.recording.add(name, (args, kwargs), partial(_run, func, held, into is not None), into)
        if func._schema.is_mutable:
            return args[0]
        return _pytree.tree_map_only(Tensor, Pretended, result) if to_device else result

    def _is_pinned(self, tensor: Tensor) -> bool:
        return any(tensor.untyped_storage().data_ptr() == p.untyped_storage().data_ptr() for p in self._pinned)

    def _count(self, func: Any, tensors: list[Tensor], to_device: bool, result: Any, asynchronous: Any) -> None:
        name = func.overloadpacket.__name__
        # A number, of which a kernel takes the value, isn't copied; what indexes is.
        host = [t for t in tensors if not isinstance(t, Pretended) and (t.ndim or name in ("_to_copy", "copy_"))]
        if host and asynchronous and self._is_pinned(host[-1]):
            self.uploads += 1
        elif host or not to_device or name in _READS:
            self.waits[name] += 1
        elif name not in _ALLOCATIONS and (func._schema.is_mutable or not _is_view(tensors, result)):
            self.launches[name] += 1


def _run(func: Any, held: Any, wanted: bool) -> Any:
    """What an operator gives, or nothing where it writes to its arguments."""
    result = func(*held[0], **held[1])
    return result if wanted else None


def _is_view(tensors: list[Tensor], result: Any) -> bool:
    """Whether the result is memory of an argument's."""
    places = {t.held.untyped_storage().data_ptr() for t in tensors if isinstance(t, Pretended)}
    results = [leaf for leaf in _pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
    return bool(results) and all(leaf.untyped_storage().data_ptr() in places for leaf in results)


def on_held(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of tensors on the CPU, for tensors on the device."""

    def run(*args: Any) -> Any:
        with _disable_current_modes():
            result = function(*_pytree.tree_map_only(Pretended, lambda tensor: tensor.held, args))
        return _pytree.tree_map_only(Tensor, Pretended, result)

    return run


@contextmanager
def pretending(**cuda_kernels: Callable[..., Any]) -> Iterator[Pretence]:
    """Meanwhile tensors can be on the device, and all kernels are there; `cuda_kernels` are those in CUDA C++."""
    from triton.runtime.interpreter import InterpretedFunction

    from lidnet_fast.kernels import check_boxes, roi_perceptual, roi_windows

    names = {name.removeprefix("lidnet_fast::") for name in library._op_defs}
    modules = (check_boxes, roi_perceptual, roi_windows)
    kernels = {op: getattr(module, op) for module in modules for op in vars(module).keys() & names}
    missing = {**backend.missing_kernels(), **dict.fromkeys(("cuda, Triton", "cuda, C++"))}
    pretence, interpret = Pretence(kernels | cuda_kernels), InterpretedFunction.run

    def run(self: InterpretedFunction, *args: Any, grid: Any, **kwargs: Any) -> None:
        pretence.launches[self.fn.__name__] += 1
        held, held_kwargs = _pytree.tree_map_only(Pretended, lambda tensor: tensor.held, (args, kwargs))
        again = partial(interpret, self, *held, grid=grid, **held_kwargs)
        with _disable_current_modes():
            again()
        if pretence.recording is not None:
            pretence.recording.add(self.fn.__name__, (grid, args, kwargs), again)

    with (
        mock.patch.object(InterpretedFunction, "run", run),
        mock.patch.object(backend, "missing_kernels", lambda: missing),
        mock.patch.object(torch.cuda, "device", lambda _: nullcontext()),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: pretence.recording is not None),
        FakeTensorMode(),  # so that PyTorch doesn't look for the device; nothing comes to it
        pretence,
    ):
        yield pretence
