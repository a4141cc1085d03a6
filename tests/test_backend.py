import json
import os
import subprocess
import sys

import pytest
import torch

from lidnet_fast import backend, gradient_gramian, roi_perceptual_loss
from lidnet_fast.info import describe


@pytest.fixture(autouse=True)
def _no_choice(monkeypatch):
    monkeypatch.delenv("LIDNET_FAST_BACKEND", raising=False)
    backend.use(None)
    yield
    backend.use(None)


@pytest.fixture
def no_kernels(monkeypatch):
    monkeypatch.setattr(backend, "_load_extension", lambda: "the C++ extension isn't built. To fix: build it")
    monkeypatch.setattr(backend, "_missing_triton", lambda: "no CUDA device")
    monkeypatch.setattr(backend, "_load_cuda_extension", lambda: "no CUDA device")
    monkeypatch.setattr(backend, "_load_planner", lambda: "the planner isn't built")


@pytest.fixture
def kernels(monkeypatch):
    monkeypatch.setattr(backend, "_load_extension", lambda: None)


def test_the_kernels_are_the_default(kernels):
    assert backend.available() == ("reference", "fused")
    assert backend.current() == "fused"
    assert backend.reason() == "the default"


def test_without_kernels_the_definitions_run(no_kernels):
    assert backend.available() == ("reference",)
    assert backend.current() == "reference"
    assert backend.reason() == "the default"
    assert roi_perceptual_loss(torch.ones(1, 1, 4, 4), torch.zeros(1, 1, 4, 4), torch.tensor([[0.0, 1, 1, 3, 3]])) == 1
    assert "cpu: the C++ extension isn't built. To fix: build it" in describe()


def test_a_library_that_does_not_load_is_remembered_with_its_cause(monkeypatch, tmp_path):
    (tmp_path / "_C.abi3.so").write_bytes(b"not a library")
    monkeypatch.setattr(backend, "__file__", str(tmp_path / "backend.py"))
    cause = backend._load_extension.__wrapped__()
    assert cause.startswith("_C.abi3.so doesn't load (")
    assert "pip install --no-build-isolation" in cause


def test_use_goes_before_the_environment(monkeypatch):
    monkeypatch.setenv("LIDNET_FAST_BACKEND", "nonsense")
    backend.use("reference")
    assert backend.current() == "reference"
    assert backend.reason() == "chosen by lidnet_fast.backend.use"


def test_use_in_a_with_statement_ends_with_it(kernels):
    backend.use("fused")
    with backend.use("reference"):
        assert backend.current() == "reference"
        with backend.use(None):
            assert backend.reason() == "the default"
        assert backend.current() == "reference"
    assert backend.current() == "fused"
    with pytest.raises(RuntimeError), backend.use("reference"):
        raise RuntimeError
    assert backend.current() == "fused"


def test_environment(monkeypatch):
    monkeypatch.setenv("LIDNET_FAST_BACKEND", "reference")
    assert backend.current() == "reference"
    assert backend.reason() == "chosen by the environment variable LIDNET_FAST_BACKEND"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fused", r"backend 'fused' isn't available here \(available: reference\): the C\+\+ extension isn't built"),
        ("cudnn", r"unknown backend 'cudnn' \(available: reference\)"),
        ("", r"unknown backend ''"),
    ],
)
def test_a_bad_name_leaves_the_choice_alone(no_kernels, name, message):
    with pytest.raises(ValueError, match=f"backend.use: {message}"):
        backend.use(name)
    assert backend.reason() == "the default"


@pytest.mark.parametrize("name", ["fused", "cudnn"])
def test_a_bad_environment_is_named_when_an_op_runs(no_kernels, monkeypatch, name):
    monkeypatch.setenv("LIDNET_FAST_BACKEND", name)
    with pytest.raises(ValueError, match=f"LIDNET_FAST_BACKEND: .*backend '{name}'"):
        gradient_gramian(torch.ones(2, 2))


# A process that imported the library, and loaded, chose and ran nothing yet, forks for each call.
FRESH_PROCESS = """
import json, os, sys
import torch
import lidnet_fast as fast
import torch._dynamo

def count(graph, inputs):
    graphs.append(graph)
    return graph.forward

for name, expression in json.load(sys.stdin).items():
    if os.fork():
        _, status = os.wait()
        assert status == 0, name
        continue
    x, t = torch.rand(2, 1, 16, 16, requires_grad=True), torch.rand(2, 1, 16, 16)
    b = [torch.tensor([[1.0, 2, 9, 12]]), torch.zeros(0, 4)]
    corners = torch.tensor([[0, 1, 2], [1, 3, 4]])
    module = fast.MultiLoss({"mse": 1.0, "ssim": 0.1}, roi_weight=3.0)
    graphs = []
    call = eval("lambda: " + expression)
    assert torch.equal(torch.compile(call, fullgraph=True, backend=count)(), call())
    assert len(graphs) == 1, len(graphs)
    kernels = [str(node.target) for node in graphs[0].graph.nodes if "lidnet_fast" in str(node.target)]
    print(name, *kernels, flush=True)
    os._exit(0)
"""

CALLS = {
    "multi_loss": 'fast.multi_loss(x, t, {"mse": 1.0}, boxes=b, roi_weight=3.0).total',
    "MultiLoss": "module(x, t, b).total",
    "multi_loss_jacobian": 'fast.multi_loss_jacobian(x, t, ["l1", "tv"])',
    "gradient_gramian": "fast.gradient_gramian(x)",
    "combine_gradients": "fast.combine_gradients(x, t[:, 0, 0, 0])",
    "roi_align": "fast.roi_align(x, b, 7)",
    "multiscale_roi_align": 'fast.multiscale_roi_align({"0": x, "1": x[..., ::2, ::2]}, b, [(32, 32)] * 2, 7, 2)',
    "roi_perceptual_loss": "fast.roi_perceptual_loss(x, t, b)",
    "multiscale_roi_perceptual_loss": 'fast.multiscale_roi_perceptual_loss({"0": x}, {"0": t}, b, [(32, 32)] * 2)',
    "roi_windows": "fast.roi_windows(x, corners, (4, 5))",
}


@pytest.mark.skipif("fused" not in backend.available(), reason="the extension isn't built")
def test_a_fresh_process_compiles_every_op_to_one_graph_with_a_kernel_in_it():
    command = [sys.executable, "-W", "ignore", "-c", FRESH_PROCESS]
    result = subprocess.run(command, input=json.dumps(CALLS), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    kernels = dict(line.split(" ", 1) for line in result.stdout.splitlines())
    assert {name: kernel.removeprefix("lidnet_fast.") for name, kernel in kernels.items()} == {
        "multi_loss": "multi_loss",
        "MultiLoss": "multi_loss",
        "multi_loss_jacobian": "multi_loss_jacobian",
        "gradient_gramian": "gradient_gramian",
        "combine_gradients": "combine_gradients",
        "roi_align": "roi_align",
        "multiscale_roi_align": "roi_align",
        "roi_perceptual_loss": "roi_perceptual_loss",
        "multiscale_roi_perceptual_loss": "roi_perceptual_loss",
        "roi_windows": "roi_windows",
    }


def test_import_is_light():
    heavy = ("torch._dynamo", "torchvision", "torchjd", "lightning", "torchmetrics", "scipy", "matplotlib")
    code = f"import sys, lidnet_fast; print([name for name in {heavy} if name in sys.modules])"
    environment = {**os.environ, "LIDNET_FAST_BACKEND": "cudnn"}  # not even a bad choice stops it
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert result.stdout.strip() == "[]"
