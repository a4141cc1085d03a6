import math

import numpy as np
import pytest
import scipy.fft
from scipy.stats import norm

from lidnet_fast.errors import InputError
from lidnet_fast.metrics.observers import (
    channel_responses,
    equal_detectability_dose,
    gabor_channels,
    hotelling,
    laguerre_gauss_channels,
    needed_realisations,
    non_prewhitening,
    with_internal_noise,
)

SIZE = (32, 32)
Y, X = np.mgrid[:32, :32] - 15.5
SIGNAL = 6.0 * np.exp(-(X**2 + Y**2) / (2 * 3.0**2))


def noise(count, seed, coloured):
    white = np.random.default_rng(seed).normal(0, 10, (count, *SIZE))
    return scipy.fft.ifft2(scipy.fft.fft2(white) * np.sqrt(power(coloured))).real


def power(coloured):
    """Eigenvalues of the noise's covariance over 100 HU^2: that of a ramp, or 1."""
    frequency = np.hypot(scipy.fft.fftfreq(32)[:, None], scipy.fft.fftfreq(32))
    return 0.05 + 3 * frequency * np.exp(-8 * frequency**2) if coloured else np.ones(SIZE)


def covered(image, coloured):
    """Covariance times an image."""
    return 100 * scipy.fft.ifft2(scipy.fft.fft2(image) * power(coloured)).real


def exact(channels, coloured):
    """d' of the channelised Hotelling observer in theory."""
    shift = np.einsum("phw,hw->p", channels, SIGNAL)
    covariance = np.einsum("phw,qhw->pq", channels, np.stack([covered(one, coloured) for one in channels]))
    return math.sqrt(shift @ np.linalg.solve(covariance, shift))


CHANNELS = {
    "template": SIGNAL[None],
    "Laguerre-Gauss": laguerre_gauss_channels(SIZE, 10.0),
    "Gabor": gabor_channels(SIZE, bands=((1 / 32, 1 / 16), (1 / 16, 1 / 8), (1 / 8, 1 / 4))),
}


@pytest.mark.parametrize("coloured", [False, True], ids=["white", "coloured"])
@pytest.mark.parametrize("kind", CHANNELS)
def test_against_theory(kind, coloured):
    """Unbiased over many seeds, in the interval as often as stated."""
    channels = CHANNELS[kind]
    theory = exact(channels, coloured)
    squares, inside, seeds = [], 0, 100
    for seed in range(seeds):
        responses = channel_responses(noise(60, seed, coloured), channels)
        responses[:30] += np.einsum("phw,hw->p", channels, SIGNAL)
        found = hotelling(responses[:30], responses[30:])
        assert found.low <= found.dprime <= found.high or found.dprime == 0
        squares.append(found.dprime**2)
        inside += found.low <= theory <= found.high
    error = np.std(squares) / math.sqrt(seeds)
    assert np.mean(squares) == pytest.approx(theory**2, abs=3 * error)
    assert inside / seeds >= 0.95 - 3 * math.sqrt(0.05 * 0.95 / seeds)


def test_the_interval_covers_as_often_as_stated():
    rng, inside = np.random.default_rng(0), 0
    for _ in range(500):
        found = hotelling(rng.normal((1.5, 0, 0, 0), 1, (20, 4)), rng.normal(size=(12, 4)), confidence=0.8)
        inside += found.low <= 1.5 <= found.high
    assert inside / 500 == pytest.approx(0.8, abs=0.05)


def test_white_noise_in_closed_form():
    """The non-prewhitening observer is ideal there: d' = |signal| / sigma. So is Hotelling, with the right channel."""
    theory = np.linalg.norm(SIGNAL) / 10
    assert exact(SIGNAL[None], False) == pytest.approx(theory)
    found = non_prewhitening(SIGNAL + noise(2000, 0, False), noise(2000, 1, False), SIGNAL)
    assert found.dprime == pytest.approx(theory, rel=0.04)
    assert found.low < theory < found.high
    assert found.auc[0] == pytest.approx(norm.cdf(found.dprime / math.sqrt(2)))


def test_prewhitening_wins_in_coloured_noise():
    assert exact(CHANNELS["Laguerre-Gauss"], True) > 1.1 * exact(CHANNELS["template"], True)


def test_channels():
    laguerre = laguerre_gauss_channels((64, 64), 12.0)
    assert np.einsum("phw,qhw->pq", laguerre, laguerre) == pytest.approx(np.eye(5), abs=1e-6)
    gabor = gabor_channels((129, 129))
    assert gabor.shape == (16, 129, 129)
    assert gabor[:, 64, 64] == pytest.approx(1)
    spectrum = np.abs(scipy.fft.fft2(gabor[12]))[0, :65]  # the highest band, along x
    assert scipy.fft.rfftfreq(129)[spectrum.argmax()] == pytest.approx(3 / 16, abs=0.01)


def test_internal_noise_adds_variance():
    responses = np.random.default_rng(0).normal(0, (1, 5), (5000, 2))
    noisy = with_internal_noise(responses, 3.0, np.random.default_rng(1))
    assert noisy.std(0) == pytest.approx([2, 10], rel=0.03)


def test_no_signal_is_not_detected():
    found = hotelling(*np.random.default_rng(0).normal(size=(2, 100, 5)))
    assert found.low == 0 and found.dprime < 0.6 and found.high < 1


def test_large_detectability():
    rng = np.random.default_rng(0)
    found = hotelling(rng.normal((40, 0, 0), 1, (400, 3)), rng.normal(size=(400, 3)))
    assert found.low < 40 < found.high and found.high - found.low < 5


def test_equal_images_have_no_detectability():
    assert hotelling(np.ones((20, 3)), np.ones((20, 3))).dprime == 0


def test_equal_detectability_dose():
    """Unprocessed d' goes with the root of the dose: half the detectability is a quarter of the dose."""
    doses = np.array([1.0, 0.1, 0.5, 0.25])
    assert equal_detectability_dose(doses, 4 * np.sqrt(doses), 2.0) == pytest.approx(0.25)
    assert equal_detectability_dose(doses, 4 * np.sqrt(doses), 3.1) == pytest.approx((3.1 / 4) ** 2)
    assert math.isnan(equal_detectability_dose(doses, 4 * np.sqrt(doses), 4.5))
    assert math.isnan(equal_detectability_dose(doses, 4 * np.sqrt(doses), 0.1))
    assert math.isnan(equal_detectability_dose(doses, np.zeros(4), 0.0))


def test_bad_input():
    with pytest.raises(InputError, match=r"5 with and 5 without the signal are too few for 16 channels.*at least 10"):
        hotelling(np.zeros((5, 16)), np.zeros((5, 16)))
    rng = np.random.default_rng(0)
    hotelling(*rng.normal(size=(2, needed_realisations(16), 16)))
    with pytest.raises(InputError, match="too few"):
        hotelling(*rng.normal(size=(2, needed_realisations(16) - 1, 16)))
    with pytest.raises(ValueError, match="responses must be"):
        hotelling(np.zeros((5, 2)), np.zeros((5, 3)))
    with pytest.raises(InputError, match="don't fit"):
        channel_responses(np.zeros((3, 8, 8)), np.zeros((1, 9, 9)))
