import math

import pytest
import torch

from lidnet_fast.errors import InputError
from lidnet_fast.models import HUWindow


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
    with pytest.raises(InputError, match="HU window") as error:
        HUWindow(low, high)
    assert f"low={low}" in str(error.value) and f"high={high}" in str(error.value)


def test_frozen():
    with pytest.raises(AttributeError):
        HUWindow().low = 0.0
