import math

import pytest
import torch
from torch import nn

from lidnet_fast.errors import InputError
from lidnet_fast.models import HUWindow
from lidnet_fast.models.hu import HUDenoiser


def test_ends_map_to_zero_and_one():
    window = HUWindow(-160, 240)
    scaled = window.scale(torch.tensor([-160.0, 240.0, 40.0, 640.0]))
    assert scaled.tolist() == [0.0, 1.0, 0.5, 2.0]
    assert window.width == 400


def test_defaults():
    assert HUWindow() == HUWindow(-1000.0, 400.0)


def test_integers_become_float32():
    scaled = HUWindow(-1000, 400).scale(torch.tensor([-1000, 400, 3071], dtype=torch.int16))
    assert scaled.dtype == torch.float32
    torch.testing.assert_close(scaled, torch.tensor([0.0, 1.0, 4071 / 1400]))


def test_unscale_inverts_scale_beyond_the_window():
    hu = torch.linspace(-2000, 3000, 101, dtype=torch.float64)
    window = HUWindow(-135, 215)
    torch.testing.assert_close(window.unscale(window.scale(hu)), hu)


def test_clamp_values_are_exactly_clamped_and_gradients_pass_straight_through():
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(1000, generator=generator) * 7).requires_grad_()
    upstream = torch.randn(1000, generator=generator)
    clamped = HUWindow().clamp(x)
    assert torch.equal(clamped, x.detach().clamp(0, 1))
    (gradient,) = torch.autograd.grad(clamped, x, upstream)
    assert torch.equal(gradient, upstream)


def test_clamp_keeps_its_input_and_builds_no_graph_without_need():
    x = torch.tensor([-1.0, 2.0])
    assert not HUWindow().clamp(x).requires_grad
    assert x.tolist() == [-1.0, 2.0]


@pytest.mark.parametrize(("low", "high"), [(400, -1000), (0, 0), (-math.inf, 0), (0, math.nan)])
def test_bad_windows_are_refused(low, high):
    with pytest.raises(InputError, match="must be") as error:
        HUWindow(low, high)
    assert f"low={low}" in str(error.value) and f"high={high}" in str(error.value)


def test_frozen():
    with pytest.raises(AttributeError):
        HUWindow().low = 0.0


def smoothing() -> nn.Conv2d:
    """A network that carries what it sees 4 pixels far."""
    network = nn.Conv2d(1, 1, 9, padding=4, bias=False)
    nn.init.constant_(network.weight, 1 / 81)
    return network.requires_grad_(False)


@pytest.mark.parametrize("low_high", [(-1000, 400), (-160, 240)])
def test_metal_changes_what_is_around_it_no_more_than_dense_bone(low_high):
    """The demo's network changed tissue 4 px from a block of 20000 HU by 2312 HU."""
    window = HUWindow(*low_high)
    denoiser = HUDenoiser(smoothing(), window)
    outside = {}
    for metal in (1500.0, 1501.0, 3071.0, 8000.0, 20000.0):
        hu = torch.full((1, 1, 40, 40), 40.0)
        hu[..., 16:24, 16:24] = metal
        denoised = denoiser(hu)
        if metal > 1500:
            assert torch.equal(denoised[..., 16:24, 16:24], hu[..., 16:24, 16:24])
            denoised[..., 16:24, 16:24] = 0
        outside[metal] = denoised
    bone = outside.pop(1500.0)
    bone[..., 16:24, 16:24] = 0
    for changed in outside.values():
        assert torch.equal(changed, bone)
    padded = torch.full((1, 1, 40, 40), 40.0)
    padded[..., :8, :] = -3024.0
    assert torch.equal(denoiser(padded)[..., :8, :], padded[..., :8, :])


def test_a_window_wider_than_the_range_is_denoised_whole():
    window = HUWindow(-2000, 3000)
    hu = torch.linspace(-2000, 3000, 64 * 64).reshape(1, 1, 64, 64)
    assert bool(window.is_denoised(hu).all())
    assert not bool(window.is_denoised(hu * 1.01).all())


def test_training_sees_the_same_range_and_learns_nothing_from_beyond_it():
    """In training too: the network's input is limited, and a value that passes unchanged has no gradient."""
    window, network = HUWindow(), smoothing().requires_grad_(True)
    hu = torch.full((1, 1, 12, 12), 3071.0)
    window.denoise(network, hu).sum().backward()
    assert not network.weight.grad.any()
    denoised = window.denoise(network, torch.full((1, 1, 12, 12), 100.0))
    denoised.sum().backward()
    assert network.weight.grad.all()
