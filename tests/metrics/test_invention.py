import numpy as np
import pytest
from scipy import ndimage

from lidnet_fast.errors import InputError
from lidnet_fast.metrics.invention import NoiseFloor, blobs, threshold

SIZE, SPACING, DIAMETERS = (96, 96), 0.7, (4.0, 8.0)
RATE = 0.05


def noise(count, seed, deviation=40.0):
    white = np.random.default_rng(seed).normal(0, 1, (count, *SIZE))
    smooth = ndimage.gaussian_filter(white, (0, 1, 1), mode="wrap")
    return deviation * smooth / smooth.std()


def vessels():
    """A lung with vessels: structure that no denoiser may be blamed for keeping."""
    image = np.full(SIZE, -850.0)
    for column in (10, 76):
        image[:, column : column + 3] = 40
    return image


def disc(contrast, y=48, x=43, radius=5):
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    return contrast * (np.hypot(rows - y, columns - x) < radius)


@pytest.fixture(scope="module")
def floor():
    return NoiseFloor(vessels(), noise(150, 0), DIAMETERS, SPACING)


@pytest.fixture(scope="module")
def height(floor):
    return threshold(floor.peaks, RATE)


def test_noise_alone_is_flagged_at_the_stated_rate(floor, height):
    bright, dark = floor.excess(vessels() + noise(300, 1))
    for excess in (bright, dark):
        assert 0.01 < np.mean(excess.max((1, 2)) > height) < 0.1


def test_a_pasted_blob_is_flagged_where_it_is(floor, height):
    bright, dark = floor.excess(vessels() + disc(120.0) + noise(3, 2))
    for one in bright:
        y, x = np.unravel_index(one.argmax(), SIZE)
        assert one.max() > height and abs(y - 48) < 3 and abs(x - 43) < 3
    bright, dark = floor.excess(vessels() - disc(120.0) + noise(3, 2))
    assert (dark.max((1, 2)) > height).all()


def test_a_perfect_denoiser_invents_nothing(floor, height):
    for excess in floor.excess(vessels()[None]):
        assert excess.max() <= 0


def test_a_blur_invents_nothing(floor, height):
    blurred = ndimage.gaussian_filter(vessels() + noise(20, 3), (0, 1.5, 1.5), mode="wrap")
    for excess in floor.excess(blurred):
        assert np.mean(excess.max((1, 2)) > height) <= 0.15


def test_blobs_of_a_disc():
    """Constants vanish; a disc of the filter's size stands out, and more so than from a filter of another size."""
    assert blobs(np.full((1, *SIZE), 500.0), [4.0], SPACING) == pytest.approx(0, abs=1e-3)
    matched, large = blobs(disc(100.0)[None], [7.0, 30.0], SPACING)[:, 0, 48, 43]
    assert matched > 50 > large


def test_bad_input():
    with pytest.raises(InputError, match="at least 4, got 3"):
        NoiseFloor(vessels(), noise(3, 0), DIAMETERS, SPACING)
    with pytest.raises(InputError, match="no noise"):
        NoiseFloor(vessels(), np.zeros((4, *SIZE)), DIAMETERS, SPACING)
    with pytest.raises(InputError, match=r"10 realisations of the noise are too few. To fix: .* at least 0.1"):
        threshold(np.arange(10), 0.05)
