"""A build records what it leaves out, and `lidnet-fast info` says why and what to do. The compilers are stand-ins."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
COMPILER = """#!/bin/sh
# Writes an empty file where a compiler or linker is told to write.
while [ $# -gt 0 ]; do
  case "$1" in -o) : > "$2";; -dumpfullversion|-v|--version) echo 12.2.0;; esac
  shift
done
"""
NVCC = """#!/bin/sh
case "$1" in
  -dryrun) echo '#$ TOP={folder}' >&2;;
  --version) echo 'Cuda compilation tools, release {version}, V{version}.0';;
  *) exec {compiler} "$@";;
esac
"""


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def build(tmp_path):
    """Runs setup.py with changes of the environment; returns its result, the record, and the built package's folder."""

    def run(**changes: str) -> tuple[subprocess.CompletedProcess, dict, Path]:
        environment = {**os.environ, "CXX": str(program(tmp_path / "bin" / "g++", COMPILER)), **changes}
        environment["CC"] = environment["CXX"]
        command = [sys.executable, "setup.py", "build", "--build-base", str(tmp_path / "build")]
        command += ["--build-lib", str(tmp_path / "built")]
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        record = tmp_path / "built" / "lidnet_fast" / "_build.json"
        return result, json.loads(record.read_text()) if record.exists() else {}, tmp_path / "built"

    return run


@pytest.fixture
def toolkit(tmp_path):
    """Makes a CUDA toolkit of a version, and returns its folder."""

    def make(version: str) -> Path:
        folder = tmp_path / f"cuda-{version}"
        text = NVCC.format(folder=folder, version=version, compiler=tmp_path / "bin" / "g++")
        program(folder / "bin" / "nvcc", text)
        return folder

    return make


def info(built: Path) -> str:
    """What the package in a folder says of its kernels, in a process of its own."""
    code = "from lidnet_fast.info import describe; print(describe())"
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=built,
        env={**os.environ, "PYTHONPATH": str(built)},
        capture_output=True,
        text=True,
        check=True,
    )
    return result.stdout


def libraries(built: Path) -> list[str]:
    return sorted(path.name.partition(".")[0] for path in (built / "lidnet_fast").glob("*.so"))


def hide_torch(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "torch.py").write_text("raise ImportError(\"No module named 'torch'\")\n")
    return folder


def test_isolation_is_named(build, tmp_path):
    overlay = hide_torch(tmp_path / "pip-build-env-x" / "overlay")
    result, record, built = build(PYTHONPATH=str(overlay))
    assert result.returncode == 0, result.stderr
    assert "isolated" in record["_C"]["cause"]
    (line,) = (line for line in info(built).splitlines() if line.startswith("  cpu: "))
    assert "the build was isolated from the installed torch (pip's default). To fix: pip install 'setuptools" in line
    assert "; then: pip install --no-build-isolation" in line


def test_a_missing_torch_is_named(build, tmp_path):
    result, _, built = build(PYTHONPATH=str(hide_torch(tmp_path / "without")))
    assert result.returncode == 0, result.stderr
    said = info(built)
    assert "cpu: _C isn't built: torch couldn't be imported where it was built (No module named 'torch')" in said
    assert libraries(built) == ["_C_planner"]


def test_a_missing_pybind11_leaves_out_the_planner_alone(build, tmp_path):
    (tmp_path / "pybind11.py").write_text("raise ImportError(\"No module named 'pybind11'\")\n")
    result, record, built = build(PYTHONPATH=str(tmp_path), CUDA_HOME="")
    assert result.returncode == 0, result.stderr
    assert "_C" in libraries(built)
    assert "_C_planner" not in libraries(built)
    cause = "_C_planner isn't built: pybind11 couldn't be imported where it was built (No module named 'pybind11')"
    assert f"  window planner: {cause}. To fix: {record['_C_planner']['fix']}; then: pip install " in info(built)
    assert shlex.split(record["_C_planner"]["fix"])[-1] == "pybind11"


def test_a_missing_compiler_is_named(build):
    result, record, built = build(CXX="/nowhere/c++", CUDA_HOME="")
    assert result.returncode == 0, result.stderr
    assert record["_C"]["cause"] == "there was no C++ compiler (/nowhere/c++)"
    assert "apt-get install g++" in info(built)
    assert libraries(built) == []


def test_a_failed_compilation_is_named_and_is_an_error_where_it_was_demanded(build, tmp_path):
    broken = program(tmp_path / "broken" / "g++", COMPILER.replace(': > "$2"', "exit 1"))
    result, record, built = build(CXX=str(broken))
    assert result.returncode == 0, result.stderr
    assert record["_C"]["cause"].startswith("it didn't compile (")
    assert "LIDNET_FAST_EXTENSION=1" in info(built)
    demanded, _, _ = build(CXX=str(broken), LIDNET_FAST_EXTENSION="1")
    assert demanded.returncode != 0


def test_a_choice_against_them_is_named_and_removes_what_an_earlier_build_made(build):
    _, _, built = build()
    assert "_C" in libraries(built)
    result, record, built = build(LIDNET_FAST_EXTENSION="0")
    assert result.returncode == 0, result.stderr
    assert record["_C"]["cause"] == "LIDNET_FAST_EXTENSION=0 left it out"


@pytest.mark.skipif(torch.version.cuda is None, reason="torch is built without CUDA here")
class TestToolkit:
    major = int((torch.version.cuda or "0").split(".")[0])

    def only(self, toolkit: Path, tmp_path: Path) -> dict[str, str]:
        """An environment whose only nvcc is that of the toolkit; those that this machine has are hidden."""
        hide = (
            "import pathlib\n"
            "find = pathlib.Path.glob\n"
            "pathlib.Path.glob = lambda self, pattern: iter(()) if 'nvcc' in pattern else find(self, pattern)\n"
        )
        hidden = tmp_path / "hidden"
        hidden.mkdir(exist_ok=True)
        (hidden / "sitecustomize.py").write_text(hide)
        return {
            "CUDA_HOME": str(toolkit),
            "PATH": os.pathsep.join((str(toolkit / "bin"), str(Path(sys.executable).parent), "/usr/bin", "/bin")),
            "PYTHONPATH": str(hidden),
        }

    def test_an_nvcc_of_another_major_version_leaves_out_its_library_alone(self, build, toolkit, tmp_path):
        other = toolkit(f"{self.major - 1}.8")
        result, record, built = build(**self.only(other, tmp_path))
        assert result.returncode == 0, result.stderr
        assert libraries(built) == ["_C", "_C_planner"]
        assert list(record) == ["_C_cuda"]
        cause = f"nvcc is of CUDA {self.major - 1}.8, torch of CUDA {torch.version.cuda}. To fix: "
        assert cause in info(built)

    def test_no_nvcc_is_named(self, build, tmp_path):
        environment = self.only(tmp_path / "empty", tmp_path)
        result, _, built = build(**environment)
        assert result.returncode == 0, result.stderr
        assert libraries(built) == ["_C", "_C_planner"]
        assert f"{tmp_path / 'empty'} has no nvcc" in info(built)

    def test_a_fitting_toolkit_goes_before_one_that_does_not_fit(self, build, toolkit, tmp_path):
        other, fitting = toolkit(f"{self.major - 1}.8"), toolkit(torch.version.cuda)
        environment = self.only(other, tmp_path)
        environment["PATH"] = f"{fitting / 'bin'}{os.pathsep}{environment['PATH']}"
        result, record, built = build(**environment)
        assert result.returncode == 0, result.stderr
        assert record == {}
        assert libraries(built) == ["_C", "_C_cuda", "_C_planner"]

    def test_whatever_torch_holds_against_the_toolkit_leaves_out_its_library_alone(self, build, toolkit, tmp_path):
        """Torch checks the host compiler's version, too, before it builds anything."""
        fitting = toolkit(torch.version.cuda)
        old = program(tmp_path / "old" / "g++", COMPILER.replace("12.2.0", "4.0.0"))
        result, record, built = build(**self.only(fitting, tmp_path), CXX=str(old))
        assert result.returncode == 0, result.stderr
        assert libraries(built) == ["_C", "_C_planner"]
        assert "4.0" in record["_C_cuda"]["cause"]


def test_an_old_setuptools_is_named(tmp_path):
    (tmp_path / "setuptools").mkdir()
    (tmp_path / "setuptools" / "__init__.py").write_text(
        '__version__ = "65.5.0"\nclass Extension: ...\ndef find_packages(): ...\ndef setup(): ...\n'
    )
    (tmp_path / "setuptools" / "command").mkdir()
    (tmp_path / "setuptools" / "command" / "__init__.py").touch()
    (tmp_path / "setuptools" / "command" / "build_py.py").write_text("class build_py: ...\n")
    (tmp_path / "setuptools" / "command" / "build_ext.py").write_text("class build_ext: ...\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run([sys.executable, "setup.py"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 1
    assert "setuptools 65.5.0 is too old" in result.stderr
    command = shlex.split(result.stderr.strip().rpartition("To fix: ")[2])
    assert command == ["pip", "install", "setuptools>=77", "ninja", "pybind11"]
