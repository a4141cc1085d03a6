"""Where Triton kernels run in the tests, and what they do to memory meanwhile.

On the GPU where there is one; else in Triton's interpreter or, with LIDNET_FAST_TRITON=ptx, compiled for sm_90a on the
executor in `ptx/`, which checks every access to memory.
"""

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import pytest
import torch
from torch import Tensor


def _release(package: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in re.findall(r"\d+", version(package))[:2])
    except PackageNotFoundError:
        return ()


@pytest.fixture(autouse=True)
def _interpreter_that_works(request: pytest.FixtureRequest) -> None:
    """Skips tests of Triton kernels where there is no Triton, or neither a GPU nor an interpreter that works."""
    if request.node.get_closest_marker("interpreter") is None:
        return
    pytest.importorskip("triton")
    compiled = torch.cuda.is_available() or os.environ.get("LIDNET_FAST_TRITON") == "ptx"
    if not compiled and _release("triton") < (3, 7) and _release("numpy") >= (2, 4):
        pytest.skip("the interpreter of triton 3.6 needs numpy < 2.4")


class Traffic:
    """Bytes that the programs of a launch loaded and stored."""

    def __init__(self) -> None:
        self.loaded = 0
        self.stored = 0


@contextlib.contextmanager
def watch(allowed: Callable[[], list[Tensor]]) -> Iterator[Traffic]:
    """Raises for an access outside the `allowed` tensors, and for two programs that store to one element.

    Works on the builder of Triton's interpreter, which every load and store goes through with its pointers and mask.
    """
    from triton.runtime import interpreter

    builder, owner, traffic = interpreter.InterpreterBuilder, {}, Traffic()
    load, store = builder.create_masked_load, builder.create_masked_store

    def pointers(kind, program, pointer, mask):
        size = max(1, pointer.get_element_ty().primitive_bitwidth // 8)
        used = pointer.data.ravel() if mask is None else pointer.data[mask.data.astype(bool)].ravel()
        ranges = sorted((t.data_ptr(), t.data_ptr() + t.untyped_storage().nbytes()) for t in allowed())
        starts, ends = (np.array(side, dtype=np.uint64) for side in zip(*ranges, strict=True))
        place = np.searchsorted(starts, used, side="right").astype(np.int64) - 1
        wrong = (place < 0) | (used + np.uint64(size) > ends[np.maximum(place, 0)])
        if wrong.any():
            raise IndexError(f"{kind} outside of every tensor in program {program}: {wrong.sum()} of {used.size} lanes")
        return used, size

    def watched_load(self, pointer, mask, *rest):
        used, size = pointers("load", self.grid_idx, pointer, mask)
        traffic.loaded += used.size * size
        return load(self, pointer, mask, *rest)

    def watched_store(self, pointer, value, mask, *rest):
        used, size = pointers("store", self.grid_idx, pointer, mask)
        traffic.stored += used.size * size
        if np.unique(used).size != used.size:
            raise RuntimeError(f"program {self.grid_idx} stores one element from several lanes")
        for address in used.tolist():
            if owner.setdefault(address, tuple(self.grid_idx)) != tuple(self.grid_idx):
                raise RuntimeError(f"programs {owner[address]} and {self.grid_idx} store the same element")
        return store(self, pointer, value, mask, *rest)

    builder.create_masked_load, builder.create_masked_store = watched_load, watched_store
    try:
        yield traffic
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store


@contextlib.contextmanager
def recording(*places: tuple[object, str]) -> Iterator[list[Tensor]]:
    """What the functions that allocate, named by owner and name, return meanwhile."""
    allocated: list[Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in places:
            allocate = getattr(owner, name)

            def kept(*args, _allocate=allocate, **kwargs):
                allocated.append(_allocate(*args, **kwargs))
                return allocated[-1]

            patch.setattr(owner, name, kept)
        yield allocated


@pytest.fixture(autouse=True)
def launches(request, monkeypatch):
    """What the executor of PTX knows of the launches, or None where kernels are interpreted or run on a GPU."""
    if torch.cuda.is_available() or os.environ.get("LIDNET_FAST_TRITON") != "ptx":
        if not torch.cuda.is_available() and request.node.get_closest_marker("interpreter"):
            from triton.runtime import interpreter

            # It leaves assertions out unless it is told to.
            asserting = interpreter.InterpreterOptions(debug=True, sanitize_overflow=False)
            monkeypatch.setattr(interpreter.interpreter_builder, "options", asserting)
        yield None
    else:
        from tests.kernels.ptx.launch import running_ptx

        with running_ptx() as launches:
            yield launches


@pytest.fixture
def poisoned(launches, monkeypatch):
    """Allocations hold NaN, so that what isn't written is seen; the executor of PTX sees it by itself."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        allocate = getattr(owner, name)

        def poison(*args, _allocate=allocate, **kwargs):
            result = _allocate(*args, **kwargs)
            result.fill_(torch.nan if result.is_floating_point() else -(10**6))
            if launches is not None:
                launches.uninitialised.add(result)
            return result

        monkeypatch.setattr(owner, name, poison)


@pytest.fixture
def recorded():
    """`recording`, for tests that say what may be accessed."""
    return recording


@pytest.fixture
def watched(launches):
    """`watch`, where kernels are interpreted."""
    if torch.cuda.is_available():
        pytest.skip("kernels run on the GPU here, where compute-sanitizer looks at memory")
    if launches is not None:
        return lambda allowed: contextlib.nullcontext(launches)
    return watch


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
