"""Builds the optional C++ extension; the metadata lives in pyproject.toml.

The extension uses PyTorch's stable ABI, so that one library serves every torch from 2.10 on. It is left out, and the
package runs on the plain PyTorch definitions, where torch isn't importable while building (an isolated build) or there
is no compiler. LIDNET_FAST_EXTENSION=0 leaves it out on purpose, =1 makes a failed build an error.
"""

import os
import sys
from pathlib import Path

from setuptools import find_packages, setup

CHOICE = os.environ.get("LIDNET_FAST_EXTENSION", "auto")
OLDEST_TORCH = "0x020a000000000000"  # 2.10


def extension() -> dict:
    """What setup() needs to build the extension; raises ImportError without torch."""
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class OptionalBuild(BuildExtension):
        def run(self) -> None:
            try:
                super().run()
            except Exception as error:
                if CHOICE == "1":
                    raise
                leave_out(error)

    sources = sorted(str(path) for path in Path("csrc").rglob("*.cpp"))
    flags = ["-O3", "-std=c++17", "-g0", "-Wno-psabi", f"-DTORCH_TARGET_VERSION={OLDEST_TORCH}"]
    return {
        "ext_modules": [
            CppExtension(
                "lidnet_fast._C",
                sources,
                depends=sorted(str(path) for path in Path("csrc").rglob("*.h")),
                extra_compile_args={"cxx": flags},
                py_limited_api=True,
            )
        ],
        "cmdclass": {"build_ext": OptionalBuild},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }


def leave_out(reason: Exception) -> None:
    """Say why, where the build's output is looked at (pip shows it with -v)."""
    print(f"lidnet_fast: building without the C++ extension: {reason}", file=sys.stderr)


def optional_extension() -> dict:
    """`extension()`, or nothing where it isn't wanted or can't be built."""
    if CHOICE == "0":
        return {}
    try:
        return extension()
    except ImportError as error:
        if CHOICE == "1":
            raise
        leave_out(error)
        return {}


setup(
    packages=[*find_packages(include=["lidnet_fast*"]), "lidnet_fast.kernels"],
    package_dir={"lidnet_fast.kernels": "kernels"},
    **optional_extension(),
)
