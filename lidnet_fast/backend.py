"""Which implementation of the ops runs.

"fused" is the library's kernels: C++ on the CPU, Triton and C++ on CUDA. "reference" is plain PyTorch, the definition.
Where a device or an op has no kernel, "fused" runs the reference. The choice is, in this order, what `use` was last
given, the environment variable LIDNET_FAST_BACKEND, and "fused" where any kernel is available.
"""

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch

from lidnet_fast.build_record import rebuild_command, why_not_built

_VARIABLE = "LIDNET_FAST_BACKEND"
_NAMES = ("reference", "fused")

_used: str | None = None


def available() -> tuple[str, ...]:
    """Names of the implementations that can run here."""
    return _NAMES if None in missing_kernels().values() else _NAMES[:1]


def missing_kernels() -> Mapping[str, str | None]:
    """Kind of kernels -> None where they can run, else why they can't and how to fix it."""
    return {
        "cpu": _load_extension(),
        "cuda, Triton": _missing_triton(),
        "cuda, C++": _load_cuda_extension(),
        "window planner": _load_planner(),
    }


def use(name: str | None) -> AbstractContextManager[None]:
    """Choose the implementation for this process, or in a `with` statement until its end.

        backend.use("reference")  # from now on

        with backend.use("reference"):  # for these lines
            loss = multi_loss(...)

    Args:
        name: One of `available()`, or None to go back to the environment variable or the default.

    Raises:
        ValueError: If `name` is unknown or not available here.
    """
    global _used
    if name is not None:
        _check(name, "backend.use")
    before, _used = _used, name
    return _restored(before)


@contextmanager
def _restored(name: str | None) -> Iterator[None]:
    global _used
    try:
        yield
    finally:
        _used = name


def current() -> str:
    """Name of the implementation that the ops run on.

    Raises:
        ValueError: If LIDNET_FAST_BACKEND names one that is unknown or not available here.
    """
    if _used is not None:
        return _used
    name = os.environ.get(_VARIABLE)
    if not name:
        return available()[-1]
    _check(name, _VARIABLE)
    return name


def reason() -> str:
    """Why `current()` is what it is, in words."""
    if _used is not None:
        return "chosen by lidnet_fast.backend.use"
    return f"chosen by the environment variable {_VARIABLE}" if os.environ.get(_VARIABLE) else "the default"


def implementation(op: str, device: torch.device) -> Callable[..., Any]:
    """The function that computes an op on tensors of `device`: torch.ops.lidnet_fast.<op>, or its definition.

    Args:
        op: One of the seven that `lidnet_fast.reference` defines.
        device: Of the tensors.

    Raises:
        ValueError: As `current`.
    """
    return kernel(op, device) or definition(op)


def kernel(op: str, device: torch.device) -> Callable[..., Any] | None:
    """torch.ops.lidnet_fast.<op> where it is to compute the op on tensors of `device`, else None.

    Raises:
        ValueError: As `current`.
    """
    if current() == "fused" or device.type == "meta":
        from lidnet_fast import ops

        if device.type == "meta":  # shapes alone, which the ops know without kernels
            return getattr(torch.ops.lidnet_fast, op)
        for kind, computed in ops.KERNELS.items():
            if kind.split(",")[0] == device.type and op in computed and _has_kernels(kind):
                return getattr(torch.ops.lidnet_fast, op)
    return None


def definition(op: str) -> Callable[..., Any]:
    """The plain PyTorch function that defines `op`, of the same arguments as `implementation(op, device)`."""
    # Imported at the first use: it brings torchvision, which takes seconds, and `import lidnet_fast` stays light.
    from lidnet_fast import reference

    return getattr(reference, op)


def _has_kernels(kind: str) -> bool:
    return missing_kernels()[kind] is None


# torch.compile calls these while it compiles and keeps their results, since it can't trace how a library is loaded.
# The mark is what torch.compiler.assume_constant_result sets; that imports torch._dynamo, which takes seconds.
_constants: tuple[Any, ...] = (available, _has_kernels)
for _function in _constants:
    _function._dynamo_marked_constant = True


@functools.cache
def _load_extension() -> str | None:
    return _load_library("_C")


@functools.cache
def _load_cuda_extension() -> str | None:
    if torch.cuda.is_available():
        return _load_library("_C_cuda")
    # Where CUDA is meant to be used, a library left out is said also on a machine without a GPU, such as a login node.
    unbuilt = torch.version.cuda is not None and _library("_C_cuda") is None
    return f"no CUDA device; {why_not_built('_C_cuda')}" if unbuilt else "no CUDA device"


@functools.cache
def _load_planner() -> str | None:
    library = _library("_C_planner")
    if library is None:
        return why_not_built("_C_planner")
    try:
        importlib.import_module("lidnet_fast._C_planner")
    except ImportError as error:
        return f"{library.name} doesn't load ({error}). To fix: {rebuild_command()}"
    return None


def _library(name: str) -> Path | None:
    return next(Path(__file__).parent.glob(f"{name}.*so"), None)


def _load_library(name: str) -> str | None:
    """Why it can't be loaded, or None."""
    library = _library(name)
    if library is None:
        return why_not_built(name)
    from lidnet_fast import ops  # noqa: F401  (the schemas that the library implements)

    try:
        torch.ops.load_library(str(library))
    except (OSError, RuntimeError) as error:
        return f"{library.name} doesn't load ({str(error).splitlines()[0]}). To fix: {rebuild_command()}"
    return None


@functools.cache
def _missing_triton() -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA device"
    if importlib.util.find_spec("triton") is None:
        return "triton isn't installed. To fix: pip install triton"
    return None


def _check(name: str, source: str) -> None:
    names = ", ".join(available())
    if name not in _NAMES:
        raise ValueError(f"{source}: unknown backend {name!r} (available: {names})")
    if name not in available():
        raise ValueError(
            f"{source}: backend {name!r} isn't available here (available: {names}): {missing_kernels()['cpu']}"
        )
