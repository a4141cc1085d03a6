"""`pytest --benchmark` runs the speed checks in benches/ and no test; plain `pytest` the tests and no speed check."""

import hashlib
import os
from collections import Counter
from pathlib import Path

import pytest

MOST_WORKERS = 8
"""Of `pytest -n auto`: each takes about a gigabyte."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options that the speed checks need beside pytest-benchmark's."""
    group = parser.getgroup("benchmark")
    group.addoption("--benchmark", action="store_true", help="Run the speed checks in benches/ instead of the tests.")
    group.addoption(
        "--benchmark-table", metavar="FILE", type=Path, help="Write the table of ratios to a Markdown file, too."
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Leave the report of the speed checks to the table of ratios; give the tests one thread each."""
    if config.getoption("benchmark_only", False):  # pytest-benchmark's own, which would find no speed check
        config.option.benchmark = True
    if config.getoption("benchmark"):
        config.option.benchmark_quiet = True  # it would print a table of its own
        return
    # Whatever the shell says: workers and the processes that tests start share the cores.
    os.environ["OMP_NUM_THREADS"] = "1"
    # Graphs that torch.compile has cached call ops as they were when these were compiled.
    sources = sorted((config.rootpath / "lidnet_fast" / "ops").glob("*.py"))
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(config.rootpath / "build" / f"inductor-{digest}"))
    import torch

    torch.set_num_threads(1)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out the folder that isn't asked for; its files, since pytest always enters the folders it was given."""
    left_out = "tests" if config.getoption("benchmark") else "benches"
    return True if config.rootpath / left_out in collection_path.parents else None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One worker for each core that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST_WORKERS)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Name in one line what wasn't run; the reasons for skipping say how to get what is missing."""
    reasons = Counter(
        report.longrepr[2].removeprefix("Skipped: ")
        for report in terminalreporter.stats.get("skipped", [])
        if isinstance(report.longrepr, tuple)
    )
    left_out = [f"{count} test{'s' if count > 1 else ''}: {reason}" for reason, count in reasons.most_common()]
    if config.option.markexpr == "not slow":
        left_out.append("the slow tests: make test-all")
    benches = [name for name in config.args if name.split("/")[0] == "benches"]
    if benches and not config.getoption("benchmark"):
        left_out.append(f"the speed checks: pytest --benchmark {' '.join(benches)}")
    if left_out:
        terminalreporter.write_line(f"Not run: {'; '.join(left_out)}.")
