"""Builds the CUDA kernels for the CPU, emulated (cuda_emulation.h), as the operators torch.ops.lidnet_fast_emulated."""

import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType

import torch
from filelock import FileLock
from torch.utils.cpp_extension import include_paths, library_paths

from lidnet_fast import ops

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
_SCHEMAS = torch.library.Library("lidnet_fast_emulated", "DEF")  # which go with it


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
        *(f"-I{path}" for path in (HERE, *include_paths(), sysconfig.get_path("include"))),
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


@functools.cache
def load(path: Path) -> ModuleType:
    """Registers the library's operators, with the schemas of the package's own; returns its controls.

    They are `reset`, `error`, `barriers` and `launches`, see cuda_emulation.cpp.
    """
    for name in ops.KERNELS["cuda, C++"]:
        schema = str(getattr(torch.ops.lidnet_fast, name).default._schema)
        _SCHEMAS.define(schema.removeprefix("lidnet_fast::"))
    torch.ops.load_library(str(path))
    spec = importlib.util.spec_from_file_location("emulated", path)
    controls = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(controls)
    return controls
