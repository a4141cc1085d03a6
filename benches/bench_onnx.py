"""A denoiser in ONNX Runtime against the same in PyTorch, on the CPU: what `denoise` computes per slice."""

import numpy as np
import pytest
import torch

from lidnet_fast.inference import HUDenoiser, SliceDenoiser
from lidnet_fast.models import HUWindow, build_denoiser
from lidnet_fast.models.onnx import OnnxDenoiser, write_onnx

NETWORKS = {"unet": {"channels": 32}, "redcnn": {"channels": 32}, "small": {"channels": 32}}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("size", [256, 512])
def test_denoise(race, tmp_path, name, size):
    torch.manual_seed(0)
    network = build_denoiser(name, **NETWORKS[name])
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.03)
    write_onnx(tmp_path / "model.onnx", HUDenoiser(network, HUWindow()))
    hu = np.random.default_rng(0).uniform(-1000, 1000, (1, size, size)).astype(np.float32)
    exact = HUDenoiser(network.double(), HUWindow()).eval()
    with torch.no_grad():
        windowed = exact.network(exact.window.scale(torch.from_numpy(hu[:, None]).double()))
    expected = [exact.window.unscale(windowed)[:, 0]]
    in_pytorch = SliceDenoiser(HUDenoiser(network.float(), HUWindow()), "cpu")
    in_onnx = SliceDenoiser(OnnxDenoiser(tmp_path / "model.onnx"), "cpu")
    race(
        "denoise",
        f"{name}, 1x{size}x{size}",
        "float32",
        ours=lambda: (torch.from_numpy(in_onnx(hu)),),
        peers={"PyTorch": lambda: (torch.from_numpy(in_pytorch(hu)),)},
        expected=expected,
        tolerance=1e-5,
    )
