import os
import subprocess
import sys

import pytest
import torch

from lidnet_fast import backend, gradient_gramian


@pytest.fixture(autouse=True)
def _no_choice(monkeypatch):
    monkeypatch.delenv("LIDNET_FAST_BACKEND", raising=False)
    backend.use(None)
    yield
    backend.use(None)


def test_default():
    assert backend.available() == ("reference",)
    assert backend.current() == "reference"
    assert backend.reason() == "the default"


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
        ("fused", r"backend 'fused' isn't available in this build \(available: reference\)"),
        ("cudnn", r"unknown backend 'cudnn' \(available: reference\)"),
        ("", r"unknown backend ''"),
    ],
)
def test_a_bad_name_leaves_the_choice_alone(name, message):
    with pytest.raises(ValueError, match=f"backend.use: {message}"):
        backend.use(name)
    assert backend.reason() == "the default"


@pytest.mark.parametrize("name", ["fused", "cudnn"])
def test_a_bad_environment_is_named_when_an_op_runs(monkeypatch, name):
    monkeypatch.setenv("LIDNET_FAST_BACKEND", name)
    with pytest.raises(ValueError, match=f"LIDNET_FAST_BACKEND: .*backend '{name}'"):
        gradient_gramian(torch.ones(2, 2))


def test_import_is_light():
    heavy = ("torchvision", "torchjd", "lightning", "torchmetrics", "scipy", "matplotlib")
    code = f"import sys, lidnet_fast; print([name for name in {heavy} if name in sys.modules])"
    environment = {**os.environ, "LIDNET_FAST_BACKEND": "cudnn"}  # not even a bad choice stops it
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert result.stdout.strip() == "[]"
