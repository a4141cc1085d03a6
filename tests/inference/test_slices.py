import numpy as np
import pytest
import torch
from torch import nn

from lidnet_fast.errors import InputError
from lidnet_fast.inference import slices
from lidnet_fast.inference.slices import SliceDenoiser
from lidnet_fast.models.footprint import Reach
from lidnet_fast.models.hu import HUDenoiser
from lidnet_fast.models.windowing import HUWindow
from tests.inference.conftest import random_network

CPU = torch.device("cpu")
WINDOW = HUWindow()


def denoiser(network, **options):
    return SliceDenoiser(HUDenoiser(network, WINDOW).eval(), CPU, **{"precision": "float32", **options})


def random_hu(*shape):
    return np.random.default_rng(0).uniform(-1024, 2000, shape).astype(np.float32)


@pytest.mark.parametrize(
    ("name", "options"),
    [("small", {}), ("redcnn", {"channels": 6}), ("unet", {"channels": 8, "levels": 3, "blocks": 1})],
)
def test_little_memory_gives_the_same(name, options):
    network = random_network(name, **options)
    hu = random_hu(3, 250, 317)
    whole = denoiser(network)(hu)
    with torch.inference_mode():
        plain = HUDenoiser(network, WINDOW)(torch.from_numpy(hu[:, None]))[:, 0].numpy()
    np.testing.assert_allclose(whole, plain, rtol=0, atol=1e-4 * WINDOW.width)
    little = denoiser(network)
    little._memory = 50_000 * little._bytes_per_pixel
    at_once, side = little._plan(250, 317)
    assert at_once == 1
    assert side is not None
    assert side < 250
    np.testing.assert_allclose(little(hu), whole, rtol=0, atol=1e-4 * WINDOW.width)
    np.testing.assert_allclose(denoiser(network, tile=40)(hu), whole, rtol=0, atol=1e-4 * WINDOW.width)


class Greedy(nn.Module):
    """Runs out of memory above a number of pixels, once there is one."""

    def __init__(self):
        super().__init__()
        self.pixels, self.sizes = None, []
        self.conv = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x):
        if self.pixels is not None:
            if x.numel() > self.pixels:
                raise torch.OutOfMemoryError("out of memory")
            self.sizes.append(x.numel())
        return self.conv(x)


def test_halves_when_memory_runs_out():
    network, hu = Greedy(), random_hu(4, 200, 200)
    greedy = denoiser(network, batch_size=4)
    expected = greedy(hu)
    assert greedy._reach == Reach(1, 1, 1)
    network.pixels = 20_000
    np.testing.assert_allclose(greedy(hu), expected, rtol=0, atol=1e-2)
    assert 10 <= len(network.sizes) <= 40
    network.pixels = 3
    with pytest.raises(InputError, match="there isn't enough memory"):
        greedy(hu)


@pytest.mark.parametrize("name", ["small", "unet", "redcnn"])
def test_bfloat16_is_close(name):
    network, hu = random_network(name, channels=8), random_hu(1, 96, 96)
    exact, rough = denoiser(network)(hu), denoiser(network, precision="bfloat16")(hu)
    assert rough.dtype == np.float32
    assert 0 < np.abs(rough - exact).max() < 0.02 * np.abs(exact - hu).max()


def test_bfloat16_comes_out_as_float32():
    """A network without a sum of float32 at its end gives bf16."""
    hu = denoiser(nn.Conv2d(1, 1, 3, padding=1), precision="bfloat16")(random_hu(1, 16, 16))
    assert hu.dtype == np.float32


def test_blend():
    network, hu = random_network("small", channels=4), random_hu(2, 40, 40)
    denoised = denoiser(network)(hu)
    np.testing.assert_array_equal(denoiser(network, blend=0)(hu), hu)
    np.testing.assert_allclose(denoiser(network, blend=0.25)(hu), 0.25 * denoised + 0.75 * hu, rtol=0, atol=1e-2)


class Averaging(nn.Module):
    def forward(self, x):
        return x - x.mean((-1, -2), keepdim=True)


class Multiples(nn.Module):
    """Takes multiples of 16 pixels only, or of none."""

    def __init__(self, multiple=16):
        super().__init__()
        self.multiple = multiple

    def forward(self, x):
        if x.shape[-1] % self.multiple:
            raise ValueError(f"not a multiple of {self.multiple}")
        return x


@pytest.mark.parametrize(
    ("network", "options", "message"),
    [
        (nn.Conv2d(1, 1, 1), {"tile": 0}, "tile must be at least 1, got 0"),
        (nn.Conv2d(1, 1, 1), {"batch_size": -1}, "batch_size must be at least 1, got -1"),
        (nn.Conv2d(1, 1, 1), {"blend": 1.5}, r"blend must lie in \[0, 1\], got 1.5"),
        (nn.Conv2d(1, 1, 1), {"blend": float("nan")}, "blend must lie"),
        (Averaging(), {"tile": 64}, "depends on the whole image"),
        (Multiples(), {"tile": 64}, "or on its size"),
        (Multiples(1000), {}, "fails on a small image: not a multiple of 1000"),
    ],
)
def test_bad_arguments(network, options, message):
    with pytest.raises(InputError, match=message):
        denoiser(network, **options)


def test_what_a_network_cannot_do(monkeypatch):
    with pytest.raises(InputError, match="can't take 16 x 20 pixels: RED-CNN needs images of at least 21x21"):
        denoiser(random_network("redcnn", channels=2))(random_hu(1, 20, 16))
    broken = nn.Conv2d(1, 1, 1)
    nn.init.constant_(broken.weight, float("inf"))
    with pytest.raises(InputError, match="aren't finite"):
        denoiser(broken)(random_hu(1, 8, 8))
    monkeypatch.setattr(slices, "_CPU_MEMORY", 1000)
    with pytest.raises(InputError, match="don't fit into memory, and this denoiser can't work in tiles"):
        denoiser(Averaging())(random_hu(1, 64, 64))


def test_slices_come_as_arrays_or_tensors_in_two_or_three_dimensions():
    network, hu = random_network("small", channels=4), random_hu(2, 30, 40)
    denoise = SliceDenoiser(HUDenoiser(network, WINDOW), "cpu", precision="float32")
    expected = denoise(hu)
    assert denoise.device == CPU
    np.testing.assert_allclose(denoise(hu[0]), expected[0], rtol=0, atol=1e-3)
    rounded = hu.astype(np.int16)
    of_integers = denoise(rounded)
    assert of_integers.dtype == np.float32
    assert rounded.dtype == np.int16
    for given in (torch.from_numpy(hu), torch.from_numpy(hu).double().requires_grad_()):
        denoised = denoise(given)
        assert denoised.dtype == torch.float32
        assert not denoised.requires_grad
        np.testing.assert_array_equal(denoised.numpy(), expected)
    assert denoise(torch.from_numpy(hu[0])).shape == (30, 40)


@pytest.mark.parametrize(
    ("hu", "error", "message"),
    [
        (random_hu(1, 1, 8, 8), InputError, r"hu must be \[H,W\] or \[N,H,W\], got \[1, 1, 8, 8\]"),
        (random_hu(8), InputError, r"got \[8\]"),
        ([[0.0]], TypeError, "hu must be an array or a Tensor, .* got list"),
    ],
)
def test_what_is_no_slice_is_refused(hu, error, message):
    with pytest.raises(error, match=message):
        denoiser(random_network("small", channels=4))(hu)


class Trained(nn.Module):
    """What computes otherwise in training: dropout, and BatchNorm, of which one is frozen."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.BatchNorm2d(1), nn.Dropout(0.9), nn.BatchNorm2d(1).eval())

    def forward(self, x):
        return self.layers(x)


def test_networks_in_training_compute_in_eval_mode():
    network, hu = Trained(), random_hu(2, 12, 16)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    in_training = SliceDenoiser(HUDenoiser(network, WINDOW), CPU, tile=8)(hu)
    torch.testing.assert_close(network.state_dict(), before)
    assert network.training
    assert [layer.training for layer in network.layers] == [True, True, False]
    np.testing.assert_array_equal(in_training, denoiser(network)(hu))


def test_float32_is_the_default():
    hu = random_hu(1, 12, 16).clip(-1000, 1000)
    identity = nn.Conv2d(1, 1, 1, bias=False)
    nn.init.ones_(identity.weight)
    denoise = SliceDenoiser(HUDenoiser(identity, WINDOW), CPU)
    assert denoise.precision == "float32"
    np.testing.assert_allclose(denoise(hu), hu, rtol=0, atol=1e-3)


def test_what_is_no_denoiser_is_refused():
    with pytest.raises(
        TypeError, match=r"denoiser must be a HUDenoiser, got Conv2d. To fix: HUDenoiser\(network, HUWin"
    ):
        SliceDenoiser(nn.Conv2d(1, 1, 1), "cpu")
    with pytest.raises(TypeError, match=r"window must be an HUWindow, got tuple. To fix: HUWindow"):
        HUDenoiser(nn.Conv2d(1, 1, 1), (-1000, 400))
    shrinking = HUDenoiser(nn.Conv2d(1, 1, 3), WINDOW)
    with pytest.raises(
        ValueError, match=r"the network must return \[N,1,H,W\], here \[1, 1, 8, 9\], got \[1, 1, 6, 7\]"
    ):
        shrinking(torch.zeros(1, 1, 8, 9))
    with pytest.raises(InputError, match=r"fails on a small image: the network must return .* got \[1, 1, 126, 126\]"):
        SliceDenoiser(shrinking, "cpu")
