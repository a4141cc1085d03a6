"""The Triton kernels' PTX for sm_90a passes the tests that the kernels pass in the interpreter; mutants of it don't."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lidnet_fast.kernels
from tests.kernels.test_roi_perceptual_triton import BOXES, check, features

triton = pytest.importorskip("triton")
HERE = Path(__file__).parent
KERNELS = Path(lidnet_fast.kernels.__path__[-1])

# Of each, the module, what it says, and what it says in the mutant.
MUTANTS = {
    "a division that isn't rounded": ("roi_sampling", "tl.div_rn(a, tl.cast(b, tl.float32))", "a / b"),
    "a mask that is dropped": (
        "roi_gather",
        "total.to(gradient.maps.dtype.element_ty), mask=mask)",
        "total.to(gradient.maps.dtype.element_ty))",
    ),
    "strides that are swapped": (
        "roi_perceptual",
        "at_x * stride[4] + at_y * stride[3]",
        "at_x * stride[3] + at_y * stride[4]",
    ),
    "slopes that aren't stored": (
        "roi_perceptual",
        "slope, mask=(c < slope_channels)[:, None] & (x < bins[2])[None, :])",
        "slope, mask=(c < slope_channels)[:, None] & ((x < bins[2]) & (x > 0))[None, :])",
    ),
    "an upstream gradient of another box": (
        "roi_gather",
        'grad_loss + (box if REDUCTION == "none" else 0)',
        "grad_loss",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "module",
    ["test_check_boxes_triton", "test_roi_perceptual_triton", "test_roi_windows_triton", "test_triton_ptx"],
)
def test_passes_as_ptx(module):
    """In a process of its own, whose Triton compiles."""
    if torch.cuda.is_available():
        pytest.skip("kernels run on the GPU here")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "not passes_as_ptx"]
    result = subprocess.run(
        [*command, HERE / f"{module}.py"],
        capture_output=True,
        text=True,
        env={**environment, "LIDNET_FAST_TRITON": "ptx"},
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "skipped" not in result.stdout.splitlines()[-1]


@pytest.mark.slow
def test_kernels_execute_no_more_than_they_did():
    """At full size, in instructions per warp; benches/gpu_counts.py --write renews what is recorded."""
    recorded = json.loads(HERE.joinpath("counts.json").read_text())
    if triton.__version__ != recorded["triton"]:
        pytest.skip(f"counted with triton {recorded['triton']}, this is {triton.__version__}")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, HERE.parents[1] / "benches" / "gpu_counts.py", "--json", "--boxes", "256"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    counted = json.loads(result.stdout)
    for part in ("counted", "extension") if counted.get("nvcc") == recorded["nvcc"] else ("counted",):
        for scenario, kernels in counted[part].items():
            assert kernels.keys() == recorded[part][scenario].keys()
            for kernel, now in kernels.items():
                for name in ("instructions_per_warp", "warps", "sectors_per_warp"):
                    assert now[name] <= recorded[part][scenario][kernel][name] * 1.02, (scenario, kernel, name)


@pytest.fixture
def ptx(launches, poisoned):
    if launches is None:
        pytest.skip("runs in the process of test_passes_as_ptx")


def scenarios(device="cpu"):
    """A call that each of the mutants gets wrong."""
    torch.manual_seed(0)
    boxes = torch.tensor([[0.0, 8, 8, 92, 92]])
    for shape, rois, size, options in (
        ((2, 5, 10, 13), BOXES, (3, 2), {}),
        ((1, 2, 32, 32), boxes, (7, 7), {"scales": (0.25,), "ratio": -1}),
    ):
        input, target = features(*shape)
        check(device, [input], [target], rois, size, **options)


def test_the_kernels_pass_what_mutants_fail(ptx):
    scenarios()


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_found(ptx, name, tmp_path, monkeypatch):
    module, original, mutated = MUTANTS[name]
    package = tmp_path / f"mutant_{list(MUTANTS).index(name)}"
    package.mkdir()
    for source in KERNELS.glob("*.py"):
        text = source.read_text()
        assert source.stem != module or text.count(original) == 1
        (package / source.name).write_text(text.replace(original, mutated) if source.stem == module else text)
    monkeypatch.syspath_prepend(tmp_path)
    mutant = importlib.import_module(f"{package.name}.roi_perceptual")
    monkeypatch.setattr(sys.modules[check.__module__], "kernels", mutant)
    with pytest.raises((AssertionError, IndexError, RuntimeError)):
        scenarios()
