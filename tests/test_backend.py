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
    monkeypatch.setattr(backend, "_load_extension", lambda: "the C++ extension isn't built; to mend it: build it")
    monkeypatch.setattr(backend, "_missing_triton", lambda: "no CUDA device")
    monkeypatch.setattr(backend, "_load_cuda_extension", lambda: "no CUDA device")


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
    assert "cpu: the C++ extension isn't built; to mend it: build it" in describe()


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


def test_import_is_light():
    heavy = ("torchvision", "torchjd", "lightning", "torchmetrics", "scipy", "matplotlib")
    code = f"import sys, lidnet_fast; print([name for name in {heavy} if name in sys.modules])"
    environment = {**os.environ, "LIDNET_FAST_BACKEND": "cudnn"}  # not even a bad choice stops it
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert result.stdout.strip() == "[]"
