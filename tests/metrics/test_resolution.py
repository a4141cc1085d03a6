import math

import numpy as np
import pytest
import scipy.fft
from scipy.special import j1

from lidnet_fast.errors import InputError
from lidnet_fast.metrics.resolution import edge_profiles, frequency_interval, task_transfer_function

SPACING, RADIUS, SIZE = 0.7, 14.0, 96
CENTRE = (47.3, 48.1)


def disc(sigma, contrast=100.0, centre=CENTRE):
    """A disc of RADIUS mm, blurred by a Gaussian of `sigma` mm, without aliasing: [H, W] HU."""
    y, x = scipy.fft.fftfreq(SIZE, SPACING)[:, None], scipy.fft.rfftfreq(SIZE, SPACING)
    frequency = np.hypot(y, x)
    with np.errstate(invalid="ignore"):
        transform = np.where(
            frequency > 0, RADIUS * j1(2 * math.pi * RADIUS * frequency) / frequency, math.pi * RADIUS**2
        )
    transform = transform * np.exp(-2 * (math.pi * sigma * frequency) ** 2)
    shift = np.exp(-2j * math.pi * SPACING * (y * centre[0] + x * centre[1]))
    return contrast * scipy.fft.irfft2(transform * shift, (SIZE, SIZE)) / SPACING**2


def noisy(image, count, deviation, seed=0):
    return image + np.random.default_rng(seed).normal(0, deviation, (count, *image.shape))


@pytest.mark.parametrize("sigma", [0.6, 1.0])
@pytest.mark.parametrize("contrast", [100.0, -850.0])
def test_a_known_blur(sigma, contrast):
    """The transfer function of a Gaussian is exp(-2 pi^2 sigma^2 f^2)."""
    profiles = edge_profiles(disc(sigma, contrast)[None], CENTRE, RADIUS, SPACING)
    function = task_transfer_function(profiles, SPACING)
    assert profiles.contrast == pytest.approx(contrast, rel=0.01)
    expected = np.exp(-2 * (math.pi * sigma * function.frequency) ** 2)
    assert np.abs(function.value - expected).max() < 0.02
    for level in (0.5, 0.1):
        exact = math.sqrt(-math.log(level) / 2) / (math.pi * sigma)
        if exact < 0.5 / SPACING:
            assert function.frequency_at(level) == pytest.approx(exact, rel=0.02)


def test_no_blur_falls_to_no_level():
    assert math.isnan(
        task_transfer_function(edge_profiles(disc(0.4)[None], CENTRE, RADIUS, SPACING), 2.0).frequency_at(0.1)
    )


def test_noise_averages_out_and_the_interval_covers():
    exact = math.sqrt(math.log(2) / 2) / math.pi
    inside = 0
    for seed in range(20):
        profiles = edge_profiles(noisy(disc(1.0), 12, 10.0, seed), CENTRE, RADIUS, SPACING)
        low, high = frequency_interval(profiles, 0.5, resamples=200, seed=seed)
        inside += low <= exact * 1.01 and exact * 0.99 <= high
    assert inside >= 17


def test_contrast_to_noise():
    """A point of the mean profile is the mean of K times as many pixels as its ring has: known in theory."""
    profiles = edge_profiles(noisy(disc(1.0), 50, 10.0), CENTRE, RADIUS, SPACING, step=0.7)
    pixels = 2 * math.pi * RADIUS * 0.7 / SPACING**2
    assert profiles.contrast_to_noise == pytest.approx(100 / (10 / math.sqrt(50 * pixels)), rel=0.15)


def test_bad_input():
    image = disc(1.0)[None]
    with pytest.raises(InputError, match="doesn't fit 96x96"):
        edge_profiles(image, (20.0, 48.0), RADIUS, SPACING)
    with pytest.raises(InputError, match="pixel_spacing must be positive"):
        edge_profiles(image, CENTRE, RADIUS, 0.0)
    with pytest.raises(ValueError, match=r"without pixels\. To fix"):
        edge_profiles(image, CENTRE, 3.0, SPACING, step=0.001)
    with pytest.raises(ValueError, match="reach <= radius"):
        edge_profiles(image, CENTRE, 3.0, SPACING, reach=4.0)


def test_against_the_micro_ct_toolbox():
    toolbox = pytest.importorskip("microct_iq_toolbox.api", reason="pip install micro-ct-image-quality-toolbox")
    image = noisy(disc(0.9, 300.0, (48.0, 48.0)), 20, 3.0)
    theirs = toolbox.ttf(image, [[48, 48], [48, 48]], 40, SPACING)
    function = task_transfer_function(edge_profiles(image, (48.0, 48.0), RADIUS, SPACING), SPACING)
    assert function.frequency_at(0.5) == pytest.approx(theirs.summary["ttf50_mean"], rel=0.05)
