import numpy as np
import pytest
from scipy import ndimage

from lidnet_fast.metrics.erasure import retained_contrast, survival

SIGNAL = 100.0 * (np.hypot(*(np.mgrid[:48, :48] - 23.5)) < 6)


def test_nothing_denoised_keeps_everything_whatever_the_noise():
    noise = np.random.default_rng(0).normal(0, 500, (5, 48, 48))
    assert retained_contrast(noise + SIGNAL, noise, SIGNAL) == pytest.approx(1, abs=1e-12)


def test_a_blur_erases_by_what_its_kernel_says():
    noise = np.random.default_rng(0).normal(0, 500, (5, 48, 48))
    blur = lambda images: ndimage.gaussian_filter(images, (0, 3, 3))  # noqa: E731
    expected = (ndimage.gaussian_filter(SIGNAL, 3) * SIGNAL).sum() / (SIGNAL**2).sum()
    assert retained_contrast(blur(noise + SIGNAL), blur(noise), SIGNAL) == pytest.approx(expected)
    assert 0.4 < expected < 0.8


def test_a_lesion_without_a_trace():
    assert retained_contrast(np.zeros((2, 48, 48)), np.zeros((2, 48, 48)), SIGNAL) == pytest.approx(0)


def test_survival_with_its_interval():
    fraction, low, high = survival([0.9, 0.2, 0.5, 0.49])
    assert fraction == 0.5
    assert (low, high) == pytest.approx((0.0676, 0.9324), abs=1e-4)  # Clopper-Pearson, 2 of 4
    assert survival([]) is None


def test_shapes():
    with pytest.raises(ValueError, match="present and absent"):
        retained_contrast(np.zeros((1, 4, 4)), np.zeros((1, 4, 4)), np.zeros((5, 5)))
