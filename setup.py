"""Builds the optional extensions; the metadata lives in pyproject.toml.

lidnet_fast._C has the kernels for the CPU, lidnet_fast._C_cuda those written in CUDA C++. Both use PyTorch's stable
ABI, so that one library serves every torch from 2.10 on. They are left out, and the package runs on the plain PyTorch
definitions, where torch isn't importable while building (an isolated build) or there is no compiler; the CUDA one also
where torch is built without CUDA or there is no nvcc (on the PATH, in CUDA_HOME, or of PyPI's
cuda-toolkit[nvcc,cccl]). LIDNET_FAST_EXTENSION=0 leaves both out on purpose, =1 makes a failed build an error.
TORCH_CUDA_ARCH_LIST chooses the GPUs.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import find_packages, setup

CHOICE = os.environ.get("LIDNET_FAST_EXTENSION", "auto")
OLDEST_TORCH = "0x020a000000000000"  # 2.10
FLAGS = ["-O3", "-std=c++17", "-g0", "-Wno-psabi", "-fvisibility=hidden", f"-DTORCH_TARGET_VERSION={OLDEST_TORCH}"]
GPUS = "7.5;8.0;9.0;10.0+PTX"


def extensions() -> dict:
    """What setup() needs to build them; raises ImportError without torch."""
    import torch

    toolkit = find_cuda_toolkit() if torch.version.cuda else None
    if toolkit:
        os.environ["CUDA_HOME"] = str(toolkit)
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", GPUS)
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    class OptionalBuild(BuildExtension):
        left_out: list = []  # noqa: RUF012

        def build_extension(self, extension) -> None:
            try:
                super().build_extension(extension)
            except Exception as error:
                if CHOICE == "1":
                    raise
                leave_out(extension.name, error)
                self.left_out.append(extension)

        def copy_extensions_to_source(self) -> None:
            self.extensions = [extension for extension in self.extensions if extension not in self.left_out]
            super().copy_extensions_to_source()

    headers = sorted(str(path) for path in Path("csrc").rglob("*.*h"))
    modules = [
        CppExtension(
            "lidnet_fast._C",
            sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp")),
            depends=headers,
            extra_compile_args={"cxx": FLAGS},
            py_limited_api=True,
        )
    ]
    if toolkit:
        cuda = CUDAExtension(
            "lidnet_fast._C_cuda",
            sorted(str(path) for path in Path("csrc/cuda").glob("*.c*") if path.suffix in (".cu", ".cpp")),
            depends=headers,
            library_dirs=[str(toolkit / "lib")],
            extra_compile_args={"cxx": [*FLAGS, "-DUSE_CUDA"], "nvcc": ["-O3", "-std=c++17", "--threads=2"]},
            py_limited_api=True,
        )
        # The one library that every toolkit has under the name that the linker looks for.
        cuda.libraries[cuda.libraries.index("cudart")] = "cudart_static"
        modules.append(cuda)
    return {
        "ext_modules": modules,
        "cmdclass": {"build_ext": OptionalBuild},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }


def find_cuda_toolkit() -> Path | None:
    """The folder of the CUDA toolkit; the nvcc on the PATH may be a script that only calls the one in it."""
    if "CUDA_HOME" in os.environ:
        return Path(os.environ["CUDA_HOME"])
    packages = Path(next((path for path in sys.path if path.endswith("-packages")), ""))
    nvcc = shutil.which("nvcc") or next(packages.glob("nvidia/cu*/bin/nvcc"), None)
    if nvcc is None:
        return None
    plan = subprocess.run([nvcc, "-dryrun", "none.cu"], capture_output=True, text=True).stderr
    found = re.search(r"^#\$ TOP=(.+)$", plan, re.MULTILINE)
    return Path(found[1].strip()).resolve() if found else None


def leave_out(name: str, reason: Exception | str) -> None:
    """Say why, where the build's output is looked at (pip shows it with -v)."""
    print(f"lidnet_fast: building without {name}: {reason}", file=sys.stderr)


def optional_extensions() -> dict:
    """`extensions()`, or nothing where they aren't wanted or can't be built."""
    if CHOICE == "0":
        return {}
    try:
        return extensions()
    except ImportError as error:
        if CHOICE == "1":
            raise
        leave_out("its extensions", error)
        return {}


setup(
    packages=find_packages(include=["lidnet_fast*"]),
    package_dir={"lidnet_fast.kernels": "kernels"},
    **optional_extensions(),
)
