"""The loops are compiled for AVX-512, for AVX2 and without: what depends on the vectors passes on all that are here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lidnet_fast import backend

pytestmark = pytest.mark.skipif("fused" not in backend.available(), reason="the extension isn't built")

HERE = Path(__file__).parent
FILES = [*sorted(HERE.glob("test_fused_*.py")), HERE / "test_gradients.py"]
TESTS = ("panels", "scales", "fill_the_vectors", "blocks", "rounding", "same_bits")
"""Parts of the tests' names."""
LESSER = {"AVX512": ["avx2", "baseline"], "AVX2": ["baseline"]}
"""The instruction sets that the other tests don't run on here."""


@pytest.mark.parametrize("instructions", LESSER.get(torch.backends.cpu.get_cpu_capability(), []))
def test_instruction_sets_agree(instructions):
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", " or ".join(TESTS), *FILES]
    environment = {**os.environ, "LIDNET_FAST_CPU": instructions}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout[-2000:]


def test_every_file_has_tests_for_them():
    for path in FILES:
        assert any(part in path.read_text() for part in TESTS), path.name
