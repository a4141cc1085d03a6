"""The `race` fixture, and the table of everything that was raced."""

import pytest

from benches.harness import Race, Row, report
from lidnet_fast import backend
from lidnet_fast.files import write_text
from lidnet_fast.runtime import keep_freed_memory, machine_facts

ROWS = pytest.StashKey[list[Row]]()


def pytest_configure(config):
    config.stash[ROWS] = []


@pytest.fixture
def race(benchmark, request) -> Race:
    """Races as in our programs, which keep freed memory: else page faults on the gradient outweigh what is compared."""
    keep_freed_memory()
    options = request.config.option
    return Race(
        benchmark,
        request.config.stash[ROWS],
        seconds=float(options.benchmark_max_time),
        min_rounds=options.benchmark_min_rounds,
    )


def facts(config) -> dict[str, str]:
    return {**machine_facts(), "ops": backend.current(), "timer": str(config.option.benchmark_timer)}


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["lidnet_fast"] = facts(config)


def pytest_terminal_summary(terminalreporter, config):
    if not config.stash[ROWS]:
        return
    text = report(config.stash[ROWS], facts(config))
    terminalreporter.section("speed")
    terminalreporter.write(text)
    if config.option.benchmark_table:
        write_text(config.option.benchmark_table, text)
