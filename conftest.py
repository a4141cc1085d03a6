"""`pytest --benchmark` runs the speed checks in benches/ and no test; plain `pytest` the tests and no speed check."""

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options that the speed checks need beside pytest-benchmark's."""
    group = parser.getgroup("benchmark")
    group.addoption("--benchmark", action="store_true", help="Run the speed checks in benches/ instead of the tests.")
    group.addoption(
        "--benchmark-table", metavar="FILE", type=Path, help="Write the table of ratios to a Markdown file, too."
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Leave the report to the table of ratios."""
    if config.getoption("benchmark"):
        config.option.benchmark_quiet = True  # it would print a table of its own


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out the folder that isn't asked for; its files, since pytest always enters the folders it was given."""
    left_out = "tests" if config.getoption("benchmark") else "benches"
    return True if config.rootpath / left_out in collection_path.parents else None
