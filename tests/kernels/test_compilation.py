"""The kernels compile for every GPU we mean to support, and need no more of it than they did."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lidnet_fast
from lidnet_fast import ops

RECORDED = json.loads(Path(__file__).with_name("resources.json").read_text())
TOOL = Path(__file__).parents[2] / "benches" / "gpu_resources.py"
VARIANTS = ["fp32 channels_last", "fp32 pyramid", "fp32 volume"]


@pytest.fixture(scope="module")
def measured():
    """In a process of its own: in this one Triton may be an interpreter."""
    triton = pytest.importorskip("triton")
    if triton.__version__ != RECORDED["triton"]:
        pytest.skip(f"recorded with triton {RECORDED['triton']}, this is {triton.__version__}")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(TOOL), "--json", "--variants", *VARIANTS]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout)


@pytest.mark.slow
def test_resources(measured):
    """Nothing spills; nothing needs more than resources.json says, or reaches less occupancy."""
    measured = {name: row for name, row in measured.items() if "CUDA C++" not in name}
    recorded = {name: row for name, row in RECORDED["kernels"].items() if name.split(", ")[1] in VARIANTS}
    assert measured.keys() == recorded.keys()
    for name, row in measured.items():
        assert row["spills"] == row["local"] == 0, name
        assert row["registers"] <= recorded[name]["registers"], name
        assert row["shared"] <= recorded[name]["shared"], name
        assert row.get("occupancy", 1) >= recorded[name].get("occupancy", 0), name
        assert row.get("load_bits", 0) >= recorded[name].get("load_bits", 0), name


@pytest.mark.slow
def test_resources_of_the_extension(measured):
    """As above; how many registers is the compiler's affair, as long as the occupancy stays."""
    recorded = {name: row for name, row in RECORDED["kernels"].items() if "CUDA C++" in name}
    measured = {name: row for name, row in measured.items() if "CUDA C++" in name}
    if not measured:
        pytest.skip("the CUDA extension isn't built")
    assert measured.keys() == recorded.keys()
    for name, row in measured.items():
        assert row["local"] == 0, name
        assert row["shared"] <= recorded[name]["shared"], name
        assert row["occupancy"] >= recorded[name]["occupancy"], name


def test_the_extension_has_a_cuda_kernel_for_every_op_that_it_says():
    library = next(Path(lidnet_fast.__file__).parent.glob("_C_cuda.*so"), None)
    if library is None:
        pytest.skip("the CUDA extension isn't built")
    torch.ops.load_library(str(library))
    for op in ops.KERNELS["cuda, C++"]:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"lidnet_fast::{op}", "CUDA")
