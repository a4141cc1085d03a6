"""Builds the optional extensions; the metadata lives in pyproject.toml.

lidnet_fast._C has the kernels for the CPU, lidnet_fast._C_cuda those written in CUDA C++. Both use PyTorch's stable
ABI, so that one library serves every torch from 2.10 on. lidnet_fast._C_planner plans windows; it uses pybind11 instead
of torch, and serves the version of Python that it is built for. One that can't be built is left out, and the package
runs on its definition in Python. The cause is written into the package, where `lidnet-fast info` finds it.
LIDNET_FAST_EXTENSION=0 leaves all out on purpose, =1 makes a failed build an error. CUDA_HOME names a CUDA toolkit,
TORCH_CUDA_ARCH_LIST the GPUs, and LIDNET_FAST_LINK the last arguments of the linker (tools/wheel.py).
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import setuptools
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

OLDEST_SETUPTOOLS = 77  # reads `license = "BSD-3-Clause"` in pyproject.toml
if int(setuptools.__version__.split(".")[0]) < OLDEST_SETUPTOOLS:
    sys.exit(
        f"lidnet_fast: setuptools {setuptools.__version__} is too old to build it. "
        f"To fix: pip install 'setuptools>={OLDEST_SETUPTOOLS}' ninja pybind11"
    )

CHOICE = os.environ.get("LIDNET_FAST_EXTENSION", "auto")
OLDEST_TORCH = "0x020a000000000000"  # 2.10
FLAGS = ["-O3", "-std=c++17", "-g0", "-Wno-psabi", "-fvisibility=hidden", f"-DTORCH_TARGET_VERSION={OLDEST_TORCH}"]
LINK = shlex.split(os.environ.get("LIDNET_FAST_LINK", ""))
GPUS = "7.5;8.0;9.0;10.0+PTX"
CPU, CUDA, PLANNER = "_C", "_C_cuda", "_C_planner"
BUILD_TOOLS = f"pip install 'setuptools>={OLDEST_SETUPTOOLS}' ninja pybind11"
RECORD = "_build.json"
"""Name of the file in the package that holds `left_out`; lidnet_fast/build_record.py reads it."""

left_out: dict[str, dict[str, str]] = {}
"""Library -> its "cause", and the "fix" that must come before the package is installed once more (may be empty)."""


def leave_out(library: str, cause: str, fix: str = "") -> None:
    """Remember why, and say it where the build's output is looked at (pip shows it with -v)."""
    left_out[library] = {"cause": cause, "fix": fix}
    print(f"lidnet_fast: building without {library}: {cause}", file=sys.stderr)


def write_record(root: Path) -> None:
    """Write what was left out into the package below `root`, and remove what an earlier build left of it there."""
    package = root / "lidnet_fast"
    package.mkdir(parents=True, exist_ok=True)
    for library in left_out:
        for stale in package.glob(f"{library}.*so"):
            stale.unlink()
    (package / RECORD).write_text(json.dumps(left_out, indent=1) + "\n", encoding="utf-8")


class RecordedBuild(build_py):
    """Runs in every build, also in one that has no extensions."""

    def run(self) -> None:
        """Build, then write the record."""
        super().run()
        write_record(Path() if self.editable_mode else Path(self.build_lib))


def optional(build: type[build_ext]) -> type[build_ext]:
    """What builds extensions as `build` does, leaves out those that fail, and writes the record."""

    class OptionalBuild(build):  # type: ignore[valid-type, misc]
        def build_extensions(self) -> None:
            """One by one: torch checks compiler and toolkit for all that it is given before it builds the first."""
            wanted, built = self.extensions, []
            for extension in wanted:
                self.extensions = [extension]
                try:
                    super().build_extensions()
                except Exception as error:
                    if CHOICE == "1":
                        raise
                    leave_out(extension.name.rpartition(".")[2], *why_not_compiled(error))
                else:
                    built.append(extension)
            self.extensions = built

        def run(self) -> None:
            super().run()
            write_record(Path() if self.inplace else Path(self.build_lib))

    return OptionalBuild


def planner() -> list[Extension]:
    """The window planner's extension; raises ImportError without pybind11."""
    from pybind11.setup_helpers import Pybind11Extension

    folder = Path("csrc/planner")
    return [
        Pybind11Extension(
            f"lidnet_fast.{PLANNER}",
            sorted(str(path) for path in folder.glob("*.cpp")),
            depends=sorted(str(path) for path in folder.glob("*.h")),
            cxx_std=17,
            extra_compile_args=["-O3"],
            extra_link_args=LINK,
        )
    ]


def kernels() -> tuple[list[Extension], type[build_ext]]:
    """The kernels' extensions and what builds them; raises ImportError without torch."""
    import torch

    toolkit = usable_cuda_toolkit(torch.version.cuda)
    if toolkit:
        os.environ["CUDA_HOME"] = str(toolkit)
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", GPUS)
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    headers = sorted(str(path) for path in Path("csrc").rglob("*.*h") if path.parent.name != "planner")
    modules = [
        CppExtension(
            f"lidnet_fast.{CPU}",
            sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp")),
            depends=headers,
            extra_compile_args={"cxx": FLAGS},
            extra_link_args=LINK,
            py_limited_api=True,
        )
    ]
    if toolkit:
        cuda = CUDAExtension(
            f"lidnet_fast.{CUDA}",
            sorted(str(path) for path in Path("csrc/cuda").glob("*.c*") if path.suffix in (".cu", ".cpp")),
            depends=headers,
            library_dirs=[str(toolkit / "lib")],
            extra_compile_args={"cxx": [*FLAGS, "-DUSE_CUDA"], "nvcc": ["-O3", "-std=c++17", "--threads=2"]},
            extra_link_args=LINK,
            py_limited_api=True,
        )
        # The one library that every toolkit has under the name that the linker looks for.
        cuda.libraries[cuda.libraries.index("cudart")] = "cudart_static"
        modules.append(cuda)
    return modules, BuildExtension


def usable_cuda_toolkit(torch_cuda: str | None) -> Path | None:
    """The first toolkit of the CUDA version that torch was built with, as far as its major number; else says why none.

    Args:
        torch_cuda: `torch.version.cuda`, such as "13.0", or None for a torch without CUDA.
    """
    if torch_cuda is None:
        leave_out(CUDA, "the torch that it was built with has no CUDA", "install a torch with CUDA")
        return None
    others = []
    for toolkit in cuda_toolkits():
        version = nvcc_version(toolkit)
        if version and version.split(".")[0] == torch_cuda.split(".")[0]:
            return toolkit
        others.append(f"{toolkit / 'bin' / 'nvcc'} is of CUDA {version}" if version else f"{toolkit} has no nvcc")
    major = int(torch_cuda.split(".")[0])
    if major >= 13:
        fix = f"pip install 'cuda-toolkit[nvcc,cccl]=={torch_cuda}.*'"
    else:
        fix = f"install NVIDIA's CUDA toolkit {torch_cuda} and set CUDA_HOME to its folder"
    if CHOICE == "1" and others:
        sys.exit(f"lidnet_fast: {', '.join(others)}, torch of CUDA {torch_cuda}. To fix: {fix}")
    leave_out(CUDA, f"{', '.join(others)}, torch of CUDA {torch_cuda}" if others else "no nvcc was found", fix)
    return None


def cuda_toolkits() -> Iterator[Path]:
    """Folders of CUDA toolkits: CUDA_HOME, those of the nvcc on the PATH and in the usual places, PyPI's."""
    if "CUDA_HOME" in os.environ:
        yield Path(os.environ["CUDA_HOME"])
    packages = Path(next((path for path in sys.path if path.endswith("-packages")), ""))
    usual = (*sorted(Path("/usr/local").glob("cuda*/bin/nvcc")), *packages.glob("nvidia/cu*/bin/nvcc"))
    for nvcc in filter(None, (shutil.which("nvcc"), *usual)):
        # The nvcc on the PATH may be a script that only calls the one in the toolkit, which names its folder.
        plan = subprocess.run([nvcc, "-dryrun", "none.cu"], capture_output=True, text=True).stderr
        found = re.search(r"^#\$ TOP=(.+)$", plan, re.MULTILINE)
        if found:
            yield Path(found[1].strip()).resolve()


def nvcc_version(toolkit: Path) -> str | None:
    """Version of the toolkit's nvcc, such as "13.0"; None where it has none that runs."""
    try:
        said = subprocess.run([toolkit / "bin" / "nvcc", "--version"], capture_output=True, text=True).stdout
    except OSError:
        return None
    found = re.search(r"release (\d+\.\d+)", said)
    return found[1] if found else None


def why_not_compiled(error: Exception) -> tuple[str, str]:
    """Cause and fix of a failed compilation."""
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        return f"there was no C++ compiler ({compiler})", "install one for C++17 (on Debian: apt-get install g++)"
    said = str(error).strip().splitlines() or [type(error).__name__]
    return f"it didn't compile ({said[0]})", "look at what LIDNET_FAST_EXTENSION=1 and pip's -v show of the error"


def isolated() -> bool:
    """Whether pip, build or uv runs this in a temporary environment, which has none of the user's packages."""
    return any(mark in path for path in sys.path for mark in ("build-env-", "builds-v0"))


def optional_extensions() -> dict:
    """What setup() needs to build the extensions that are wanted and can be built; the others are in the record."""
    modules: list[Extension] = []
    arguments: dict = {
        "ext_modules": modules,
        "cmdclass": {"build_ext": optional(build_ext), "build_py": RecordedBuild},
    }
    if CHOICE == "0":
        for library in (CPU, CUDA, PLANNER):
            leave_out(library, "LIDNET_FAST_EXTENSION=0 left it out", "unset LIDNET_FAST_EXTENSION")
        return arguments
    try:
        of_torch, build = kernels()
        modules += of_torch
        arguments["cmdclass"]["build_ext"] = optional(build)
        # The planner, in the same wheel, is found by its version of Python alone.
        arguments["options"] = {"bdist_wheel": {"py_limited_api": "cp311"}}
    except ImportError as error:
        if CHOICE == "1":
            raise
        for library in (CPU, CUDA):
            if isolated():
                leave_out(library, "the build was isolated from the installed torch (pip's default)", BUILD_TOOLS)
            else:
                leave_out(library, f"torch couldn't be imported where it was built ({error})", BUILD_TOOLS)
    try:
        modules += planner()
    except ImportError as error:
        if CHOICE == "1":
            raise
        leave_out(PLANNER, f"pybind11 couldn't be imported where it was built ({error})", BUILD_TOOLS)
    return arguments


setup(
    packages=find_packages(include=["lidnet_fast*"]),
    package_dir={"lidnet_fast.kernels": "kernels"},
    **optional_extensions(),
)
