"""Every header in csrc/ includes what it uses: it compiles alone, those of CUDA with the emulator."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
COMPILER = shutil.which(os.environ.get("CXX", "g++"))
HEADERS = sorted(path.relative_to(CSRC).as_posix() for path in CSRC.rglob("*.*h"))


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler (Debian: apt-get install g++)")
@pytest.mark.parametrize("header", HEADERS)
def test_header_compiles_alone(header):
    includes = [f"-I{path}" for path in (ROOT / "tests" / "kernels", *include_paths())]
    flags = ["-std=c++17", "-fsyntax-only", "-DTORCH_TARGET_VERSION=0x020a000000000000", *includes]
    if header.startswith("cuda/"):
        flags.append("-DLID_EMULATED")
    command = [COMPILER, *flags, "-include", CSRC / header, "-x", "c++", os.devnull]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[:2000]
