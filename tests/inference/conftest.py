from pathlib import Path

import pytest
import torch

from lidnet_fast.models.denoisers import build_denoiser
from lidnet_fast.models.files import load_denoiser, save_network
from lidnet_fast.models.registry import NetworkConfig
from lidnet_fast.models.windowing import HUWindow
from tests.data.conftest import make_hu, write_series

__all__ = ["make_hu", "write_series"]


def random_network(name: str, seed: int = 0, **options) -> torch.nn.Module:
    """A network whose last layer isn't zero, as an untrained one's is."""
    torch.manual_seed(seed)
    network = build_denoiser(name, **options).eval()
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.03)
    return network


@pytest.fixture(scope="session")
def make_run(tmp_path_factory):
    """The folder of a run with a random network, as training leaves it."""

    def make(name: str = "small", seed: int = 0, **options) -> Path:
        options = options or {"channels": 8, "layers": 3}
        folder = tmp_path_factory.mktemp("run") / "mine"
        network, config = random_network(name, seed, **options), NetworkConfig(name, options)
        save_network(folder / "collaborate" / "denoiser.pt", "denoiser", network, config, HUWindow(), {})
        return folder

    return make


@pytest.fixture(scope="session")
def run(make_run) -> Path:
    return make_run()


@pytest.fixture(scope="session")
def expected(run):
    """What the run's network makes of HU [N,H,W], as plainly as can be."""
    denoiser = load_denoiser(run / "collaborate" / "denoiser.pt")

    def denoised(hu):
        with torch.inference_mode():
            return denoiser(torch.as_tensor(hu, dtype=torch.float32)[:, None])[:, 0].numpy()

    return denoised
