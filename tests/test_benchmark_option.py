import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benches.boxes import as_rois, lesions, proposals
from benches.harness import Race, Row, check_parity, report

ROOT = Path(__file__).parents[1]

BENCH = """
import pytest
import torch

@pytest.mark.parametrize("factor", [2.0, 3.0])
def test_doubling(race, factor):
    x = torch.ones(4)
    race(
        "doubling", "4 values", "forward",
        ours=lambda: (factor * x,), peers={"sum": lambda: (x + x,)}, expected=(2 * x.double(),), tolerance=1e-6,
        floor_bytes=32,
    )
"""


@pytest.fixture
def project(tmp_path):
    """A project with this one's configuration, two speed checks and one test, and a function that runs its pytest."""
    for name in ("conftest.py", "pyproject.toml", "benches/conftest.py", "benches/harness.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_nothing.py").write_text("def test_nothing(): pass")
    (tmp_path / "benches" / "bench_doubling.py").write_text(BENCH)

    def run(*options):
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options]
        # pytest-benchmark times nothing in a worker of pytest-xdist, as this may be.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment).stdout

    return tmp_path, run


def test_without_the_option_only_tests_run(project):
    _, run = project
    output = run()
    assert "1 passed" in output
    assert "doubling" not in output


def test_the_option_races_what_passes_parity_and_prints_one_table(project):
    folder, run = project
    output = run("--benchmark", "--benchmark-max-time=0.01", "--benchmark-json=runs.json", "--benchmark-table=table.md")
    assert "1 failed, 1 passed" in output
    assert "test_nothing" not in output
    assert "lidnet_fast isn't timed: relative error 5.0e-01 > 1e-06" in output
    table = (folder / "table.md").read_text()
    assert table in output
    assert table.count("| 4 values | forward |") == 1
    assert "torch " + torch.__version__ in table
    assert output.count("Medians") == 1
    assert "Outliers" not in output  # pytest-benchmark's own table

    runs = json.loads((folder / "runs.json").read_text())
    (benchmark,) = runs["benchmarks"]
    info = benchmark["extra_info"]
    assert benchmark["stats"]["rounds"] == info["rounds"] >= 5
    assert info["ours_ms"] == pytest.approx(1e3 * benchmark["stats"]["median"])
    assert info["ratios"]["sum"] == pytest.approx(info["peers_ms"]["sum"] / info["ours_ms"])
    assert runs["machine_info"]["lidnet_fast"]["torch"] == torch.__version__


def test_selection_and_comparison_without_timing(project):
    _, run = project
    output = run("--benchmark", "--benchmark-disable", "-k", "2.0")
    assert "1 passed, 1 deselected" in output
    assert "Medians" not in output


def test_the_plugins_own_option_and_none(project):
    """Both used to find nothing, and to say no more than that."""
    _, run = project
    assert "1 passed, 1 deselected" in run("benches", "--benchmark-only", "--benchmark-max-time=0.01", "-k", "2.0")
    file = "benches/bench_doubling.py"
    assert f"Not run: the speed checks: pytest --benchmark {file}." in run(file)


def test_report():
    measured = {"rounds": 5, "ours_ms": 2.0, "floor_ms": 0.5}
    rows = [
        Row("op", "case", "forward", peers_ms={"a": 250.0, "b": 3.0}, extra_mb={"ours": 0.25, "a": 64.0}, **measured),
        Row("op", "case", "fwd+bwd", peers_ms={"a": 25.0}, extra_mb={"ours": None, "a": None}, **measured),
        Row("other", "case", "forward", peers_ms={}, extra_mb={"ours": 1.0}, **measured),
    ]
    assert rows[0].ratios == {"a": 125.0, "b": 1.5, "floor": 4.0}
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report(rows, {}).splitlines() if "|" in line]
    assert lines[0] == ["op", "", "ours", "a", "b", "floor", "extra MiB"]
    assert lines[2] == ["case", "forward", "2.00", "250 (125x)", "3.00 (1.50x)", "0.50 (4.00x)", "0.25 (64.0)"]
    assert lines[3] == ["case", "fwd+bwd", "2.00", "25.0 (12.5x)", "", "0.50 (4.00x)", "? (?)"]
    assert lines[6] == ["case", "forward", "2.00", "0.50 (4.00x)", "1.00"]


@pytest.mark.parametrize(("wrong", "message"), [(1.1, "error 1.0e-01"), (math.nan, "error nan")])
@pytest.mark.parametrize("name", ["lidnet_fast", "peer"])
def test_nothing_is_timed_if_a_gradient_is_wrong(name, wrong, message):
    value, gradient = torch.ones(()), torch.ones(3)
    contestants = {"lidnet_fast": lambda: (value, gradient), "peer": lambda: (value, gradient)}
    contestants[name] = lambda: (value, wrong * gradient)
    rows = []
    race = Race(None, rows, seconds=1.0, min_rounds=5)  # without a fixture to time with
    with pytest.raises(AssertionError, match=f"{name} isn't timed: relative {message} .* in result 1"):
        race(
            "op",
            "case",
            "mode",
            ours=contestants["lidnet_fast"],
            peers={"peer": contestants["peer"]},
            expected=(value.double(), gradient.double()),
            tolerance=1e-5,
            floor_bytes=1,
        )
    assert rows == []


def test_parity_looks_at_shapes_and_numbers_of_results():
    ones = torch.ones(3)
    with pytest.raises(AssertionError, match="result 0 is"):
        check_parity("op", (ones[:1],), (ones,), 1.0)
    with pytest.raises(ValueError, match="zip"):
        check_parity("op", (ones,), (ones, ones), 1.0)


@pytest.mark.parametrize("extent", [(512, 256), (128, 128, 64)])
def test_boxes_lie_in_the_image(extent):
    axes = len(extent)
    for boxes in (lesions(extent, 3), proposals(extent, 3, 256)):
        starts, ends = as_rois(boxes)[:, 1:].split(axes, 1)
        assert (starts >= 0).all()
        assert (ends > starts).all()
        assert (ends <= torch.tensor(extent)).all()
    assert sum(map(len, proposals(extent, 3, 256))) == 256
    assert all(torch.equal(*pair) for pair in zip(proposals(extent, 3, 256), proposals(extent, 3, 256), strict=True))
