"""The wheel that `make wheel` builds, installed where there is no compiler, next to this torch and another one."""

import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.conftest import Once

ROOT = Path(__file__).parents[2]
OTHER_TORCH = "2.13.0"
NEWEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}
"""The versions of symbols that manylinux_2_28 allows."""
READY = """\
import torch
from lidnet_fast import backend
missing = backend.missing_kernels()
print(torch.__version__, missing["cpu"], missing["window planner"], backend.__file__, sep="\\n")
"""

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="the wheel is for Linux")]


@pytest.fixture(scope="session")
def wheel(once: Once) -> Path:
    for tool in ("auditwheel", "ziglang"):
        pytest.importorskip(tool, reason="it comes with pip install '.[dev]'")
    command = [sys.executable, "tools/wheel.py"]  # two at a time would clear each other's build/
    made = once("wheel", lambda path: subprocess.run([*command, str(path)], cwd=ROOT, check=True))
    (wheel,) = made.iterdir()
    return wheel


@pytest.fixture
def environment(tmp_path):
    """Makes an environment with what is given to pip, then all of this one's; runs code there without a compiler."""

    def make(*installed: str):
        folder = tmp_path / "environment"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
        packages = next(folder.glob("lib/python3*/site-packages"))
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(packages)]
        result = subprocess.run([*pip, *installed], capture_output=True, text=True)
        if result.returncode and any(name.startswith("torch") for name in installed):
            pytest.skip(f"{' '.join(installed)} can't be had here: {result.stderr.strip().splitlines()[-1]}")
        assert result.returncode == 0, result.stderr
        (packages / "rest.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")

        def run(code: str) -> str:
            clean = {"PATH": str(folder / "bin"), "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
            command = [str(folder / "bin" / "python"), "-c", code]
            return subprocess.run(command, cwd=tmp_path, env=clean, capture_output=True, text=True, check=True).stdout

        return run

    return make


def test_one_wheel_for_every_python_and_glibc(wheel):
    assert re.fullmatch(r"lidnet_fast-[\d.]+-cp311-abi3-manylinux_2_28_\w+\.whl", wheel.name)
    names = zipfile.ZipFile(wheel).namelist()
    assert "lidnet_fast/_C.abi3.so" in names
    assert f"lidnet_fast/_C_planner{sysconfig.get_config_var('EXT_SUFFIX')}" in names
    assert not [name for name in names if "libtorch" in name or "libc10" in name or ".libs/" in name]


def test_its_libraries_ask_for_no_newer_symbols(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    libraries = list((tmp_path / "lidnet_fast").glob("*.so"))
    assert libraries
    for library in libraries:
        symbols = subprocess.run(["objdump", "-T", library], capture_output=True, text=True, check=True).stdout
        asked = {(kind, tuple(map(int, v.split(".")))) for kind, v in re.findall(r"\b([A-Z]+)_(\d[\d.]*)\)?", symbols)}
        assert "GLIBC" in {kind for kind, _ in asked}
        assert not [f"{kind} {version}" for kind, version in asked if version > NEWEST[kind]]
        unversioned = re.findall(r"\*UND\*\s+\S+\s+((?:pthread_|dl|mem|str)\w+)$", symbols, re.M)
        assert not unversioned, "a symbol of the C library that the linker didn't find there"


def test_kernels_are_ready_without_a_compiler(wheel, environment):
    _, *missing, file = environment(str(wheel))(READY).splitlines()
    assert missing == ["None", "None"]
    assert Path(file).parents[1].name == "site-packages"


def test_kernels_are_ready_next_to_another_torch(wheel, environment):
    torch, *missing, _ = environment(str(wheel), f"torch=={OTHER_TORCH}")(READY).splitlines()
    assert torch.startswith(OTHER_TORCH)
    assert missing == ["None", "None"]


def test_another_python_adds_its_planner(tmp_path):
    """The other Python is a stand-in that "builds" a wheel which the test made."""
    wheel, other, built = (tmp_path / name for name in ("lidnet_fast-1.whl", "python3.99", "lidnet_fast-2.whl"))
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("lidnet_fast/_C_planner.cpython-311.so", b"ours")
    other.write_text(f'#!/bin/sh\nwhile [ "$1" != --wheel-dir ]; do shift; done; cp {built} "$2"\n')
    other.chmod(0o755)
    with zipfile.ZipFile(built, "w") as archive:
        archive.writestr("lidnet_fast/_C_planner.cpython-399.so", b"theirs")
        archive.writestr("lidnet_fast/backend.py", b"")
    code = f"import os, wheel; wheel.add_planner('{wheel}', '{other}', os.environ)"
    command = [sys.executable, "-c", code]
    subprocess.run(command, cwd=ROOT / "tools", check=True)
    assert zipfile.ZipFile(wheel).namelist() == [f"lidnet_fast/_C_planner.cpython-{n}.so" for n in (311, 399)]
    with zipfile.ZipFile(built, "w") as archive:
        archive.writestr("lidnet_fast/backend.py", b"")
    refused = subprocess.run(command, cwd=ROOT / "tools", capture_output=True, text=True)
    assert refused.returncode == 1
    assert f"{other} built no planner. To fix: " in refused.stderr


def test_without_its_library_info_names_the_command(wheel, environment, tmp_path):
    """What an installation that isn't the wheel's looks like: built from the index, in isolation."""
    run = environment(str(wheel))
    (library,) = (tmp_path / "environment").glob("lib/python3*/site-packages/lidnet_fast/_C.abi3.so")
    library.unlink()
    assert "pip install --no-build-isolation --no-deps --force-reinstall" in run(READY)
