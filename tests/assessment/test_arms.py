import numpy as np
import pytest
import torch

from lidnet_fast.assessment.arms import Arm, low_dose_arm, model_arms
from lidnet_fast.assessment.scanner import Scan
from lidnet_fast.errors import InputError
from lidnet_fast.models.denoisers import SmallCNN
from lidnet_fast.models.files import save_network
from lidnet_fast.models.hu import HUDenoiser
from lidnet_fast.models.onnx import TOLERANCE_HU, write_onnx
from lidnet_fast.models.registry import NetworkConfig
from lidnet_fast.models.windowing import HUWindow

SCAN = Scan("dose1_water", 0, 2)
MINE = """
import torch
def same(images):
    return images
def half(images):
    return images * 0.5
def crop(images):
    return images[..., 1:]
def broken(images):
    raise RuntimeError("no licence")
def nothing(images):
    return images / 0
class Double(torch.nn.Module):
    def forward(self, images):
        return images * 2
number = 3
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "my_denoisers.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "run" / "collaborate" / "denoiser.pt"
    path.parent.mkdir(parents=True)
    save_network(path, "denoiser", SmallCNN(), NetworkConfig("small"), HUWindow(), {})
    return path


def test_files_runs_functions_and_classes(mine, checkpoint):
    models = [f"net={checkpoint}", "run", "my_denoisers:half", "my_denoisers.Double"]
    arms = model_arms(models, device="cpu", precision="float32")
    assert [arm.name for arm in arms] == ["net", "run", "half", "Double"]
    images = torch.rand(2, 16, 16) * 100
    factors = (1, 1, 0.5, 2)  # an untrained network is the identity
    for arm, factor in zip(arms, factors, strict=True):
        assert arm(images, SCAN) == pytest.approx(images.numpy() * factor, rel=1e-3, abs=1e-3)
    assert torch.equal(low_dose_arm()(images, SCAN), images)


def test_numpy_functions_will_do():
    assert Arm("mine", lambda images: np.asarray(images) + 1)(torch.zeros(1, 4, 4), SCAN).mean() == 1


@pytest.mark.parametrize(
    ("models", "said"),
    [
        (["nowhere/denoiser.pt"], "there is no checkpoint nowhere/denoiser.pt"),
        (["nowhere"], "there is no checkpoint nowhere"),
        (["my_denoisers:missing"], "has no 'missing'"),
        (["not_there:half"], "can't import module 'not_there'"),
        (["my_denoisers:number"], "must be a function or a torch.nn.Module class"),
        (["my_denoisers:half", "my_denoisers:half"], "'half' is taken. To fix: give --model NAME=my_denoisers:half"),
        (["low dose=my_denoisers:half"], "'low dose' is taken"),
    ],
)
def test_models_that_cannot_be(mine, models, said):
    with pytest.raises(InputError) as error:
        model_arms(models, device="cpu")
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("crop", r"'crop' must keep the images' shape \[1, 1, 8, 8\], got \[1, 1, 8, 7\]"),
        ("broken", "'broken' failed on .*: no licence"),
        ("nothing", "values that aren't finite"),
    ],
)
def test_arms_that_fail(mine, name, said):
    (arm,) = model_arms([f"my_denoisers:{name}"], device="cpu")
    with pytest.raises(InputError, match=said):
        arm(torch.zeros(1, 8, 8), SCAN)


@pytest.mark.slow
def test_an_arm_of_onnx(tmp_path):
    torch.manual_seed(0)
    network = SmallCNN(channels=4)
    torch.nn.init.normal_(network.body[-1].weight, std=0.1)
    denoiser = HUDenoiser(network, HUWindow()).eval()
    write_onnx(tmp_path / "model.onnx", denoiser)
    (arm,) = model_arms([f"theirs={tmp_path / 'model.onnx'}"], device="cpu")
    images = torch.rand(2, 33, 40) * 1000
    with torch.no_grad():
        expected = denoiser(images[:, None])[:, 0]
    torch.testing.assert_close(arm(images, SCAN), expected, rtol=0, atol=TOLERANCE_HU)
    with pytest.raises(InputError, match="there is no model"):
        model_arms([str(tmp_path / "none.onnx")], device="cpu")
