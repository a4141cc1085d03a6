"""The versions that pyproject.toml declares, tested: `make versions` makes an environment for each row below.

    lowest        Python 3.11, torch 2.10, and every other dependency at its lower bound
    gpu_machine   Python 3.12, torch 2.11, triton 3.6, numpy before 2.4, nothing of the trainer's: benches/gpu_check.sh
    newest        Python 3.13, and the newest of everything
    audit         known vulnerabilities of what is installed today

Each gets the wheel from dist/, which `make wheel` built once, and the tests of the operators. A row whose Python isn't
found is skipped, and nox says which; in CI it fails. TORCH_INDEX is a package index to take torch from, such as
https://download.pytorch.org/whl/cpu; PyPI's builds have CUDA and need 5 GB each.
"""

import os
import shutil
import subprocess
import urllib.request
from pathlib import Path

import nox

nox.needs_version = ">=2024.10.9"
nox.options.default_venv_backend = "uv|venv"  # uv shares the gigabytes that the rows have in common
os.environ.setdefault("UV_INDEX_STRATEGY", "unsafe-best-match")  # as pip: the best of TORCH_INDEX and PyPI

ROOT = Path(__file__).parent
# pyenv's shims stand for every version that it has, but run only the chosen one.
PYENV = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")).glob("versions/*/bin")
os.environ["PATH"] = os.pathsep.join([*map(str, sorted(PYENV)), os.environ["PATH"]])
INDEX = ["--extra-index-url", os.environ["TORCH_INDEX"]] if "TORCH_INDEX" in os.environ else []
TEST_TOOLS = ["pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6.100", "pytest-benchmark>=5"]
TESTS = ["tests/ops", "tests/conformance", "tests/test_backend.py"]
READY = (
    "import torch; from lidnet_fast import backend; why = backend.missing_kernels()['cpu']; "
    "print('torch', torch.__version__, why or 'kernels ready'); raise SystemExit(why)"
)


def checkout(session: nox.Session, *, package: bool) -> Path:
    """A copy of the checkout to run tests in; without `package`, they find the installed one."""
    copy = Path(session.create_tmp()).resolve() / "checkout"
    shutil.rmtree(copy, ignore_errors=True)
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines():
        if (ROOT / name).is_file() and (package or not name.startswith("lidnet_fast/")):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    return copy


def install_wheel(session: nox.Session) -> None:
    """Install the one wheel in dist/ without a compiler in reach, and see that its kernels load."""
    wheels = list((ROOT / "dist").glob("lidnet_fast-*.whl"))
    if len(wheels) != 1:
        session.error(f"dist/ has {len(wheels)} wheels of lidnet_fast, not one. To fix: rm -rf dist && make wheel")
    session.install("--no-deps", "--force-reinstall", str(wheels[0]))
    session.chdir(session.create_tmp())
    session.run("python", "-c", READY, env={"PATH": str(Path(session.bin))})
    session.chdir(ROOT)


@nox.session(python="3.11")
def lowest(session: nox.Session) -> None:
    """Every dependency at its lower bound."""
    session.install("uv")
    lowest = Path(session.create_tmp()).resolve() / "lowest.txt"
    extras = ["--extra", "train", "--extra", "cloud"]
    resolve = ["uv", "pip", "compile", "--resolution", "lowest-direct", "--python-version", "3.11", *extras]
    session.run(*resolve, "--quiet", "pyproject.toml", "--output-file", str(lowest))
    session.install(*INDEX, "--requirement", str(lowest))
    session.install(*TEST_TOOLS, "pydicom-data>=1.0")
    install_wheel(session)
    session.chdir(checkout(session, package=False))
    session.run("pytest", "-n", "auto", "-m", "not slow", *TESTS, "tests/data", "tests/inference", *session.posargs)


@nox.session(python="3.12")
def gpu_machine(session: nox.Session) -> None:
    """An environment with nothing of the trainer's, where benches/gpu_check.sh must run: its parts without a GPU."""
    session.install(*INDEX, "torch==2.11.0", "torchvision==0.26.0", "numpy<2.4")
    session.install("pip", "setuptools>=77", "ninja", "pytest>=8")
    install_wheel(session)
    session.chdir(checkout(session, package=True))
    session.run(
        "benches/gpu_check.sh",
        *(session.posargs or ["install", "ops", "conformance", "kernels"]),
        env={"PYTHON": f"{session.bin}/python"},
        external=True,
    )


@nox.session(python="3.13")
def newest(session: nox.Session) -> None:
    """The newest of everything."""
    session.install(*INDEX, "torch", "torchvision")
    session.install(*TEST_TOOLS)
    install_wheel(session)
    session.chdir(checkout(session, package=False))
    session.run("pytest", "-n", "auto", "-m", "not slow", *TESTS, *session.posargs)


@nox.session(python="3.11")
def audit(session: nox.Session) -> None:
    """Known vulnerabilities of what `pip install 'lidnet_fast[train,cloud]'` brings today."""
    try:
        urllib.request.urlopen("https://pypi.org/pypi/numpy/1.26.4/json", timeout=20).close()
    except OSError as error:
        session.skip(f"nothing was audited: pip-audit asks PyPI's JSON API, which can't be reached ({error})")
    session.install("uv", "pip-audit")
    today = Path(session.create_tmp()).resolve() / "today.txt"
    extras = ["--extra", "train", "--extra", "cloud"]
    session.run("uv", "pip", "compile", *extras, "--quiet", "pyproject.toml", "--output-file", str(today))
    session.run("pip-audit", "--strict", "--no-deps", "--disable-pip", "--requirement", str(today))
