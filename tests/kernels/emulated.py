"""Builds the CUDA kernels for the CPU, emulated (cuda_emulation.h), as the operators torch.ops.lidnet_fast_emulated."""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths, library_paths

from lidnet_fast import ops

ROOT = Path(__file__).parents[2]


def build(folder: Path, flags: Sequence[str] = ()) -> Path:
    """The library's path. Raises FileNotFoundError where there is no C++ compiler."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise FileNotFoundError("no C++ compiler")
    options = [
        "-std=c++17",
        "-O2",
        "-fPIC",
        "-Wno-psabi",
        "-fvisibility=hidden",
        "-DLID_EMULATED",
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
    ]
    options += [f"-I{path}" for path in (Path(__file__).parent, *include_paths())]
    sources = [*(ROOT / "csrc" / "cuda").glob("*.c*"), Path(__file__).with_name("cuda_emulation.cpp")]
    sources = [source for source in sources if source.suffix in (".cu", ".cpp")]
    objects = [folder / f"{source.name}.o" for source in sources]

    def compile(source: Path, to: Path) -> None:
        subprocess.run([compiler, *options, *flags, "-x", "c++", "-c", source, "-o", to], check=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile, sources, objects))
    library = folder / "emulated.so"
    torch_libraries = [*(f"-L{path}" for path in library_paths()), "-ltorch_cpu"]
    subprocess.run([compiler, *flags, "-shared", *objects, *torch_libraries, "-o", library], check=True)
    return library


class Emulation:
    """The loaded library."""

    def __init__(self, path: Path) -> None:
        """Registers its operators, with the schemas of the library's own."""
        self._schemas = torch.library.Library("lidnet_fast_emulated", "DEF")
        for name in ops.KERNELS["cuda, C++"]:
            schema = str(getattr(torch.ops.lidnet_fast, name).default._schema)
            self._schemas.define(schema.removeprefix("lidnet_fast::"))
        torch.ops.load_library(str(path))
        self._library = ctypes.CDLL(str(path))
        self._library.lid_emulation_error.restype = self._library.lid_emulation_barriers.restype = ctypes.c_char_p

    def reset(self, order: int = 0, seed: int = 0, skipped: str = "") -> None:
        """Forget errors; threads and blocks run ascending (0), descending (1) or in random order (2)."""
        self._library.lid_emulate(order, seed, skipped.encode())

    def error(self) -> str:
        """What the checks found first, or ''."""
        return self._library.lid_emulation_error().decode()

    def barriers(self) -> list[str]:
        """file:line of every __syncthreads that was reached since `reset`."""
        return self._library.lid_emulation_barriers().decode().splitlines()
