"""Builds the CUDA kernels for the CPU, emulated (cuda_emulation.h), as the operators torch.ops.lidnet_fast_emulated."""

import ctypes
import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from filelock import FileLock
from torch.utils.cpp_extension import include_paths, library_paths

from lidnet_fast import ops

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def build(flags: Sequence[str] = ()) -> Path:
    """The library's path: built where csrc/, the emulator, the compiler or torch have changed since the last time.

    Raises:
        FileNotFoundError: there is no C++ compiler.
    """
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise FileNotFoundError("needs a C++ compiler (Debian: apt-get install g++)")
    command = [
        compiler,
        "-std=c++17",
        "-O2",
        "-fPIC",
        "-Wno-psabi",
        "-fvisibility=hidden",
        "-DLID_EMULATED",
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
        *(f"-I{path}" for path in (HERE, *include_paths())),
        *flags,
    ]
    folder = ROOT / "build" / "_".join(["emulated", *(flag.strip("-") for flag in flags)])
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"{fingerprint(command)}.so"
    with FileLock(folder / ".lock"):  # other processes of the tests want it, too
        if not library.exists():
            with TemporaryDirectory(dir=folder) as unfinished:
                compile_and_link(command, Path(unfinished)).rename(library)
            for outdated in set(folder.glob("*.so")) - {library}:
                outdated.unlink()
    return library


def fingerprint(command: Sequence[str]) -> str:
    """Of all that the library is made of."""
    version = subprocess.run([command[0], "--version"], capture_output=True, check=True).stdout
    digest = hashlib.sha256("\0".join([*command, torch.__version__]).encode() + version)
    for path in sorted([*(ROOT / "csrc").rglob("*.*"), *HERE.glob("cuda_emulation.*")]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def compile_and_link(command: Sequence[str], folder: Path) -> Path:
    sources = [path for path in (ROOT / "csrc" / "cuda").iterdir() if path.suffix in (".cu", ".cpp")]
    sources.append(HERE / "cuda_emulation.cpp")
    objects = [folder / f"{source.name}.o" for source in sources]

    def compile(source: Path, to: Path) -> None:
        subprocess.run([*command, "-x", "c++", "-c", source, "-o", to], check=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile, sources, objects))
    library = folder / "emulated.so"
    torch_libraries = [*(f"-L{path}" for path in library_paths()), "-ltorch_cpu"]
    subprocess.run([*command, "-shared", *objects, *torch_libraries, "-o", library], check=True)
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
