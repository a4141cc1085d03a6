import numpy as np
import pytest
import scipy.fft
import scipy.ndimage

from lidnet_fast.errors import InputError
from lidnet_fast.metrics.noise import EnsembleNoise, noise_power_spectrum

SPACING = (0.5, 0.8)


def coloured(count, shape=(48, 64), seed=0, deviation=12.0):
    """Noise with a known spectrum, highest at 0.3 per mm: realisations and their true power, HU^2 mm^2."""
    y, x = scipy.fft.fftfreq(shape[0], SPACING[0])[:, None], scipy.fft.fftfreq(shape[1], SPACING[1])
    frequency = np.hypot(y, x)
    power = frequency * np.exp(-frequency / 0.3)
    cell = 1 / (np.prod(shape) * np.prod(SPACING))
    power *= deviation**2 / (power.sum() * cell)
    white = np.random.default_rng(seed).standard_normal((count, *shape))
    return scipy.fft.ifft2(scipy.fft.fft2(white) * np.sqrt(power / np.prod(SPACING))).real, scipy.fft.fftshift(power)


def test_a_known_spectrum_is_recovered():
    images, power = coloured(400)
    spectrum = noise_power_spectrum(images, SPACING)
    assert np.abs(spectrum.power.mean() / power.mean() - 1) < 0.01
    # Every frequency follows chi-square with two times 399 degrees of freedom.
    relative = spectrum.power[power > 0] / power[power > 0] - 1
    assert np.sqrt((relative**2).mean()) == pytest.approx(np.sqrt(1 / 399), rel=0.1)
    assert spectrum.magnitude == pytest.approx(12, rel=0.01)
    frequency, radial = spectrum.radial()
    expected = frequency * np.exp(-frequency / 0.3)
    # The innermost ring has four frequencies, over which the spectrum is far from straight.
    assert (radial / radial.sum())[1:] == pytest.approx((expected / expected.sum())[1:], rel=0.06)
    assert spectrum.mean_frequency == pytest.approx((frequency * expected).sum() / expected.sum(), rel=0.01)
    assert spectrum.peak_frequency == pytest.approx(0.3, abs=0.05)


def test_white_noise_has_variance_times_pixel_area_everywhere():
    white = np.random.default_rng(0).normal(0, 10, (300, 32, 32))
    spectrum = noise_power_spectrum(white, 0.7)
    assert spectrum.power.mean() == pytest.approx(100 * 0.49, rel=0.01)
    _, radial = spectrum.radial()
    assert radial == pytest.approx(100 * 0.49, rel=0.1)


def test_the_variance_is_that_of_numpy():
    images, _ = coloured(7)
    spectrum = noise_power_spectrum(images, SPACING)
    assert spectrum.magnitude**2 == pytest.approx(images.var(0, ddof=1).mean(), rel=1e-10)


def test_structure_cancels_exactly():
    images, _ = coloured(5)
    structure = np.random.default_rng(1).uniform(-1000, 1500, images.shape[1:])
    plain, structured = noise_power_spectrum(images, SPACING), noise_power_spectrum(images + structure, SPACING)
    assert structured.power == pytest.approx(plain.power, rel=1e-6)


def test_identical_images_have_no_noise():
    spectrum = noise_power_spectrum(np.tile(np.arange(64.0).reshape(8, 8), (3, 1, 1)), 1.0)
    assert spectrum.magnitude < 1e-12


def test_batches_change_nothing():
    images, _ = coloured(9)
    batched = EnsembleNoise(SPACING)
    for start in (0, 2, 5):
        batched.update(images[start : {0: 2, 2: 5, 5: 9}[start]])
    assert batched.spectrum().power == pytest.approx(noise_power_spectrum(images, SPACING).power, rel=1e-9)


def test_the_magnitude_lies_in_its_interval_as_often_as_stated():
    inside = 0
    for seed in range(200):
        low, high = noise_power_spectrum(coloured(6, (24, 24), seed)[0], SPACING).magnitude_interval(0.9)
        inside += low <= 12 <= high
    assert 0.83 < inside / 200 < 0.96


@pytest.mark.parametrize("spacing", [0.0, -1.0, float("nan"), (1.0, 0.0)])
def test_impossible_spacing(spacing):
    with pytest.raises(InputError, match="pixel_spacing must be positive"):
        noise_power_spectrum(np.zeros((2, 4, 4)), spacing)


def test_bad_images():
    with pytest.raises(InputError, match="realisations: noise takes at least two, got 1"):
        noise_power_spectrum(np.zeros((1, 4, 4)), 1.0)
    with pytest.raises(ValueError, match=r"images must be \[B, H, W\]"):
        noise_power_spectrum(np.zeros((4, 4)), 1.0)
    noise = EnsembleNoise(1.0)
    noise.update(np.zeros((1, 4, 4)))
    with pytest.raises(ValueError, match="one size"):
        noise.update(np.zeros((1, 4, 5)))


def test_against_the_micro_ct_toolbox():
    """Another implementation; it subtracts a polynomial of the image, which takes away the lowest frequencies."""
    toolbox = pytest.importorskip("microct_iq_toolbox.api", reason="pip install micro-ct-image-quality-toolbox")
    images = scipy.ndimage.gaussian_filter(np.random.default_rng(0).normal(0, 50, (100, 64, 64)), (0, 0.8, 0.8))
    theirs = toolbox.nps(images, [[0, 64, 0, 64]], 0.5)
    frequency, power = noise_power_spectrum(images, 0.5).radial()
    middle = (frequency > 0.15) & (frequency < 0.8)
    assert power[middle] == pytest.approx(np.interp(frequency[middle], theirs.x, theirs.y), rel=0.12)
