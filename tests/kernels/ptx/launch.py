"""Launches of Triton kernels run their PTX for sm_90a on the CPU (executor.py), on tensors of the CPU.

Triton must not be interpreting: TRITON_INTERPRET is unset when it is imported.
"""

import os
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from .executor import WARP, Executed, execute
from .memory import GlobalMemory, Uninitialised
from .program import Program, parse

TARGET = GPUTarget("cuda", 90, 32)
_programs: dict[tuple[Any, ...], tuple[Program, int]] = {}


class Launches:
    """What is known of the launches while `running_ptx` is active."""

    def __init__(self) -> None:
        self.uninitialised = Uninitialised()
        self.executed: dict[str, Executed] = {}  # per kernel, over all launches
        self.warps: dict[str, int] = {}  # per kernel, of the whole grids of all launches

    @property
    def loaded(self) -> int:
        """Bytes of global memory; what several threads of a block load at once counts once."""
        return sum(executed.loaded for executed in self.executed.values())

    @property
    def stored(self) -> int:
        """Bytes of global memory."""
        return sum(executed.stored for executed in self.executed.values())


@contextmanager
def running_ptx(sampled: Mapping[str, int] | None = None) -> Iterator[Launches]:
    """Meanwhile launches of Triton kernels are compiled for sm_90a, and run.

    Args:
        sampled: kernels of which only so many blocks run, drawn at random: for counting, not for results.
    """
    launches = Launches()

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        backend = make_backend(TARGET)
        kwargs["debug"] = bool(self.debug)  # whether assertions are compiled
        binder = create_function_from_signature(self.signature, self.params, backend)
        bound, specialization, options = binder(*args, **kwargs)
        options, signature, constexprs, attributes = self._pack_args(backend, kwargs, bound, specialization, options)
        key = (self, str(signature), str(constexprs), str(attributes), str(kwargs))
        if key not in _programs:
            kernel = triton.compile(
                ASTSource(self, signature, constexprs, attributes), target=TARGET, options=options.__dict__
            )
            _programs[key] = parse(kernel.asm["ptx"]), kernel.metadata.shared
        program, shared = _programs[key]
        numbers: list[int] = []
        tensors: list[Tensor] = []
        for name, kind in signature.items():
            _flatten(bound[name], kind, numbers, tensors)
        numbers += [0] * (len(program.parameters) - len(numbers))  # Triton's own scratch memory, which isn't used
        memory, counts = GlobalMemory(tensors, launches.uninitialised), Executed()
        blocks: Sequence[int] = range(grid[0])
        most = (sampled or {}).get(self.__name__, grid[0])
        if most < grid[0]:
            blocks = random.Random(0).sample(blocks, most)
        execute(program, numbers, blocks, memory, shared, counts, grid[0])
        warps = grid[0] * program.threads // WARP
        launches.warps[self.__name__] = launches.warps.get(self.__name__, 0) + warps
        launches.executed.setdefault(self.__name__, Executed()).add(counts)

    # The PTX is wanted, not the machine code that ptxas would make of it: in a cache of its own, which no GPU reads.
    cache = {"TRITON_CACHE_DIR": str(Path(triton.knobs.cache.dir) / "ptx_only")}
    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(CUDABackend, "make_cubin", lambda *_: b""),
        mock.patch.dict(os.environ, cache),
    ):
        yield launches


def _flatten(value: Any, kind: Any, numbers: list[int], tensors: list[Tensor]) -> None:
    """The kernel's parameters, one after the other; constants are in the program."""
    if kind == "constexpr":
        return
    if isinstance(kind, (tuple, list)):
        for part, part_kind in zip(value, kind, strict=True):
            _flatten(part, part_kind, numbers, tensors)
    elif isinstance(value, Tensor):
        numbers.append(value.data_ptr())
        tensors.append(value)
    elif re.fullmatch(r"[iu]\d+", kind):
        numbers.append(int(value))
    else:
        raise TypeError(f"a parameter of type {kind} isn't modelled")
