"""Imports point one way, and what a user imports brings no more than it needs."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "lidnet_fast"
# Rooms (modules and folders of the package) by floor: a room imports from its own and from lower floors only.
FLOORS = (
    {"urls"},
    {"errors", "_constants", "_tensors", "neighbours"},
    {"reference", "_plausibility"},
    {"files", "_checks", "kernels", "device", "build_record", "strangers_text", "_C", "_C_cuda", "__version__"},
    {"ops", "progress", "runtime", "results_folder"},
    {"backend"},
    {"functional"},
    {"extractors", "multitask", "models"},
    {"pixel_losses", "prepared"},
    {"losses", "data", "metrics", "report"},
    {"trainer", "info", "assessment"},
    {"evaluation", "inference"},
    {"comparison"},
    {"publication"},
    {"cli"},
)
# An op's derivative asks, when it runs, which implementation is chosen; backend registers the ops when it is asked.
EXCEPTIONS = {("ops", "backend")}
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def imported(path: Path) -> Iterator[str]:
    """Names of the package's modules that a file imports, at its head or inside a function."""
    package = ["lidnet_fast", *path.relative_to(ROOT).parent.parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name for name in names if name.startswith("lidnet_fast."))


MODULES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for name in imported(path):
        other = name.split(".")[1]
        assert {room, other} <= FLOOR.keys(), f"give {room} and {other} a place in FLOORS"
        assert other == room or (room, other) in EXCEPTIONS or FLOOR[other] < FLOOR[room], f"{name} isn't below {room}"


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("lidnet_fast", ("lightning", "jsonargparse", "pydicom", "blosc2", "rich", "lidnet_fast.data")),
        ("lidnet_fast.inference", ("lightning", "jsonargparse", "tensorboard", "highdicom", "lidnet_fast.trainer")),
        (
            "lidnet_fast.models.files",
            ("lightning", "jsonargparse", "pydicom", "lidnet_fast.data", "lidnet_fast.trainer"),
        ),
        ("lidnet_fast.data.prepare.plan", ("lightning", "jsonargparse", "torchvision", "lidnet_fast.models")),
        ("lidnet_fast.report", ("lightning", "jsonargparse", "lidnet_fast.trainer")),
    ],
)
def test_an_import_brings_no_more_than_it_needs(module: str, absent: tuple[str, ...]) -> None:
    """In a fresh process, as a user's first line is."""
    program = f"import sys, {module}; sys.exit(str([name for name in {absent!r} if name in sys.modules] or ''))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stderr.strip() == "", done.stderr
