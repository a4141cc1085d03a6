import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lidnet_fast.runtime import machine_facts, recorded_cost


def test_recorded_cost_sees_this_bodys_peak_alone(tmp_path: Path) -> None:
    with recorded_cost(tmp_path / "large.json"):
        np.ones(2**25)  # 256 MiB
    with recorded_cost(tmp_path / "small.json", steps=3):
        pass
    large, small = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("large", "small"))
    assert large["peak_memory_mb"] > small["peak_memory_mb"] + 200
    assert small["steps"] == 3


def test_a_failed_body_records_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), recorded_cost(tmp_path / "cost.json"):
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_machine_facts_are_filled() -> None:
    assert all(machine_facts().values())


def test_import_needs_no_trainer_and_changes_no_allocator() -> None:
    program = """
import sys, lidnet_fast
heavy = {"lightning", "torchjd", "blosc2", "pydicom", "PIL", "lidnet_fast.runtime"} & set(sys.modules)
sys.exit(f"imported {heavy}" if heavy else 0)
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_freed_memory_is_kept_when_asked_for() -> None:
    # A process of its own: the setting is for good.
    program = """
import re, numpy as np
from lidnet_fast.runtime import keep_freed_memory
def resident():
    return int(re.search(r"VmRSS:\\s*(\\d+)", open("/proc/self/status").read())[1]) // 1024
assert keep_freed_memory()
before = resident()
block = np.ones(2**24)  # 128 MiB
del block
assert resident() - before > 100
"""
    subprocess.run([sys.executable, "-c", program], check=True)
