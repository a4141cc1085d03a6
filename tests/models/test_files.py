"""Network files: what comes back is what went in, and anything else is refused by name."""

from pathlib import Path

import numpy as np
import pytest
import torch

from lidnet_fast.errors import InputError
from lidnet_fast.models.envelope import Envelope
from lidnet_fast.models.files import build_network, load_denoiser, load_network, save_denoiser, save_network
from lidnet_fast.models.hu import HUDenoiser
from lidnet_fast.models.registry import NetworkConfig
from lidnet_fast.models.windowing import HUWindow

SMALL = NetworkConfig("small", {"channels": 8})
WINDOW = HUWindow(-160, 240)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, torch.nn.Module]:
    torch.manual_seed(0)
    network = build_network("denoiser", SMALL)
    for parameter in network.parameters():  # the last layer starts at zero
        torch.nn.init.normal_(parameter, std=0.1)
    path = tmp_path / "denoiser.pt"
    save_network(path, "denoiser", network, SMALL, WINDOW, {"seed": 0})
    return path, network


def test_round_trip(saved) -> None:
    path, network = saved
    hu = torch.randint(-1000, 1000, (2, 1, 40, 56), dtype=torch.int16)
    denoised = load_denoiser(path, SMALL)(hu)
    assert denoised.shape == hu.shape
    assert denoised.dtype == torch.float32
    torch.testing.assert_close(denoised, WINDOW.unscale(network(WINDOW.scale(hu.float()))))
    assert list(path.parent.iterdir()) == [path]


def test_the_envelope_comes_back_and_may_be_unknown(saved, tmp_path: Path) -> None:
    path, network = saved
    assert load_denoiser(path).envelope is None
    envelope = Envelope(pixel_spacing=(0.5, 0.9), noise={"lung": (20.0, 80.0)})
    save_network(path, "denoiser", network, SMALL, WINDOW, {}, envelope)
    assert load_denoiser(path).envelope == envelope
    content = torch.load(path, weights_only=True)
    torch.save({**content, "envelope": {"colour": 1}}, path)
    with pytest.raises(InputError, match=r"denoiser.pt: its envelope has unknown entries"):
        load_denoiser(path)
    del content["envelope"]  # as files were written before
    torch.save(content, path)
    assert load_denoiser(path).envelope is None


def test_identity_network_keeps_values_beyond_the_window() -> None:
    hu = torch.tensor([[[[-3000.0, -1000.0], [400.0, 2500.0]]]])
    torch.testing.assert_close(HUDenoiser(torch.nn.Identity(), HUWindow())(hu), hu)


def test_a_runs_folder_stands_for_its_denoiser(saved, tmp_path: Path) -> None:
    path, _ = saved
    run = tmp_path / "run"
    (run / "collaborate").mkdir(parents=True)
    path.rename(run / "collaborate" / "denoiser.pt")
    denoiser = load_denoiser(str(run))
    assert not denoiser(torch.full((1, 1, 8, 8), 40.0)).requires_grad
    with pytest.raises(InputError, match=r"there is no checkpoint .*elsewhere.collaborate.denoiser.pt"):
        (tmp_path / "elsewhere").mkdir()
        load_denoiser(tmp_path / "elsewhere")


def test_arrays_are_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"hu must be a Tensor \[N,1,H,W\], got ndarray. To fix: .*SliceDenoiser takes"):
        HUDenoiser(torch.nn.Identity(), HUWindow())(np.zeros((1, 1, 8, 8), np.float32))


def test_images_of_the_wrong_shape() -> None:
    with pytest.raises(ValueError, match=r"\[N,1,H,W\], got \[8, 8\]"):
        HUDenoiser(torch.nn.Identity(), HUWindow())(torch.zeros(8, 8))


def test_pretrained_weights_are_not_fetched_to_load_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = NetworkConfig("retinanet_resnet18_fpn")
    pretrained = NetworkConfig("retinanet_resnet18_fpn", {"weights": "IMAGENET1K_V1"})
    path = tmp_path / "detector.pt"
    save_network(path, "detector", build_network("detector", plain), pretrained, WINDOW, {})
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *_, **__: pytest.fail("downloads weights"))
    load_network(path, "detector", pretrained)


def test_refusals(saved, tmp_path: Path) -> None:
    path, _ = saved
    with pytest.raises(InputError, match=r"there is no checkpoint .*nowhere.pt"):
        load_network(tmp_path / "nowhere.pt", "denoiser")
    with pytest.raises(InputError, match="holds a denoiser, not a detector"):
        load_network(path, "detector")
    with pytest.raises(InputError, match=r"holds denoiser small .* asks for redcnn"):
        load_network(path, "denoiser", NetworkConfig("redcnn"))
    damaged = tmp_path / "damaged.pt"
    damaged.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"damaged.pt is not a readable checkpoint"):
        load_network(damaged, "denoiser")
    foreign = tmp_path / "foreign.pt"
    torch.save({"state_dict": {}}, foreign)
    with pytest.raises(InputError, match=r"foreign.pt is not a lidnet_fast-network file"):
        load_network(foreign, "denoiser")
    content = torch.load(path, weights_only=True)
    content["network"]["options"]["channels"] = 16
    torch.save(content, foreign)
    with pytest.raises(InputError, match="its weights do not fit denoiser small"):
        load_network(foreign, "denoiser")


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save(Bomb(), tmp_path / "bomb.pt")
    with pytest.raises(InputError, match="not a readable checkpoint"):
        load_network(tmp_path / "bomb.pt", "denoiser")
    assert not (tmp_path / "ran").exists()


def test_a_network_of_your_own_loop(tmp_path):
    config = NetworkConfig("unet", {"channels": 4})
    denoiser = HUDenoiser(build_network("denoiser", config).eval(), HUWindow(-160, 240))
    save_denoiser(tmp_path / "mine.pt", denoiser, config)
    loaded, hu = load_denoiser(tmp_path / "mine.pt"), torch.randn(1, 1, 32, 32) * 50
    torch.testing.assert_close(loaded(hu), denoiser(hu), rtol=0, atol=0)
    with pytest.raises(InputError, match="config must be how the denoiser's network was built, but unet"):
        save_denoiser(tmp_path / "other.pt", denoiser, NetworkConfig("unet", {"channels": 8}))
    assert not (tmp_path / "other.pt").exists()
