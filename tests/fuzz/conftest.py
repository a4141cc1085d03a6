"""Profiles of the fuzzing: the same few examples every time; new ones, and many, with ``--hypothesis-profile long``."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

_COMMON = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
_EXAMPLES = os.environ.get("FUZZ_EXAMPLES")

settings.register_profile("short", max_examples=int(_EXAMPLES or 30), derandomize=True, print_blob=False, **_COMMON)
settings.register_profile("long", max_examples=int(_EXAMPLES or 5000), print_blob=True, **_COMMON)
settings.load_profile("short")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("fuzz")
