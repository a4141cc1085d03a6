"""The synthesis against theory and against noise inserted in projections."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lidnet_fast.data.simulation import projection
from lidnet_fast.data.simulation.dose import (
    DoseSimulation,
    insert_noise_in_projections,
    insertion_variance,
    noise_variance_maps,
    sample_generator,
    sector_noise,
    simulate_low_dose,
    stack_noise,
)
from lidnet_fast.errors import InputError

SIZE, SPACING = 160, 2.2
REALISATIONS = 24
SCAN = DoseSimulation(dose_fraction=0.1, photons=2e5, views=240)


def ellipse(size, a, b, x=0.0, y=0.0):
    axis = torch.arange(size) - (size - 1) / 2
    return ((axis[None, :] - x) / a) ** 2 + ((axis[:, None] - y) / b) ** 2 < 1


@pytest.fixture(scope="module")
def chest():
    """An elongated body with two lungs and a spine, HU [1, SIZE, SIZE]."""
    hu = torch.full((SIZE, SIZE), -1000.0)
    hu[ellipse(SIZE, 70, 44)] = 30
    for side in (-1, 1):
        hu[ellipse(SIZE, 22, 32, side * 34)] = -850
    hu[ellipse(SIZE, 9, 8, 0, 30)] = 400
    return hu[None]


@pytest.fixture(scope="module")
def inserted(chest):
    return (
        insert_noise_in_projections(chest.repeat(REALISATIONS, 1, 1), SPACING, SCAN, sample_generator(1, 0, 0)) - chest
    )


@pytest.fixture(scope="module")
def synthesised(chest):
    return draw(chest, SCAN, REALISATIONS)


def draw(hu, simulation, count, window=None, seed=2):
    maps = noise_variance_maps(hu, SPACING, simulation)
    height, width = hu.shape[1:]
    window = window or (0, 0, height, width)
    generators = [sample_generator(seed, 0, n) for n in range(count)]
    return sector_noise(maps.expand(count, -1, -1, -1), (height, width), [window] * count, generators)


def spectrum(noise):
    """Power of the realisations' mean-free square patches, with the frequencies along x and y."""
    side = noise.shape[-1]
    power = torch.fft.fft2(noise - noise.mean((1, 2), keepdim=True)).abs().square().mean(0)
    frequency = torch.fft.fftfreq(side)
    return power, frequency[None, :].expand(side, side), frequency[:, None].expand(side, side)


def mean_frequency(noise):
    power, fx, fy = spectrum(noise)
    return float((power * torch.hypot(fx, fy)).sum() / power.sum())


def horizontal_over_vertical(noise):
    power, fx, fy = spectrum(noise)
    frequency = torch.hypot(fx, fy)
    band = (frequency > 0.05) & (frequency < 0.4)
    return float(power[band & (fx.abs() > 2 * fy.abs())].sum() / power[band & (fy.abs() > 2 * fx.abs())].sum())


def block_deviation(noise, block=16):
    return F.avg_pool2d(noise.square().mean(0)[None, None], block)[0, 0].sqrt()


# --- strength


def test_the_inserted_variance_follows_the_formula():
    """At f of the dose, variance goes from 1/N to 1/(fN): (1-f)/f e^p/N0 is added where quanta rule."""
    p = torch.tensor([0.0, 2.0, 5.0], dtype=torch.float64)
    quantum = DoseSimulation(dose_fraction=0.2, photons=1e6, electronic_noise=0.0)
    torch.testing.assert_close(insertion_variance(p, quantum), 4 * p.exp() / 1e6)
    # With electronic noise sigma^2, a ray of N photons has variance (1 + sigma^2 / N) / N at any dose.
    noisy = dataclasses.replace(quantum, electronic_noise=50.0)
    expected, lower = 1e6 * (-p).exp(), 0.2e6 * (-p).exp()
    added = (1 + 50 / lower) / lower - (1 + 50 / expected) / expected
    torch.testing.assert_close(insertion_variance(p, noisy), added)


def test_starved_rays_have_the_variance_of_one_photon():
    starved = insertion_variance(torch.tensor([30.0, 80.0]), SCAN)
    assert torch.isfinite(starved).all()
    assert starved[0] == starved[1]


@pytest.mark.parametrize("fraction", [0.5, 0.25, 0.05])
def test_variance_against_dose_follows_theory(chest, fraction):
    quantum = dataclasses.replace(SCAN, electronic_noise=0.0)
    tenth = draw(chest, quantum, 8).square().mean()
    other = draw(chest, dataclasses.replace(quantum, dose_fraction=fraction), 8, seed=3).square().mean()
    assert float(other / tenth) == pytest.approx((1 - fraction) / fraction / 9, rel=0.05)


def test_variance_goes_with_the_inverse_of_photons_and_views(chest):
    quantum = dataclasses.replace(SCAN, electronic_noise=0.0)
    base = noise_variance_maps(chest, SPACING, quantum)
    half = noise_variance_maps(chest, SPACING, dataclasses.replace(quantum, photons=quantum.photons / 2))
    torch.testing.assert_close(half, 2 * base)
    torch.testing.assert_close(noise_variance_maps(chest, SPACING, dataclasses.replace(quantum, views=120)), 2 * base)


def test_noise_of_empty_air_has_the_variance_of_the_analytic_formula():
    """White detector noise through ramp and window: variance (pi/V) sum h^2 (2/3 R0 + 1/3 R1) pi per pixel."""
    air = torch.full((1, 64, 64), -1000.0)
    simulation = DoseSimulation(dose_fraction=0.5, photons=1e4, electronic_noise=0.0, views=180)
    f = np.fft.fftfreq(4096)
    taps = np.fft.ifft(np.abs(f) * np.sqrt((1 + np.cos(2 * np.pi * f)) / 2)).real
    gain = 2 / 3 * (taps**2).sum() + 1 / 3 * (taps * np.roll(taps, 1)).sum()
    expected = math.pi**2 / 180 * gain * 1e-4 * (1000 / (0.0193 * 0.5)) ** 2
    total = noise_variance_maps(air, 0.5, simulation).sum(1)
    torch.testing.assert_close(total, torch.full_like(total, expected), rtol=0.01, atol=0)


def test_electronic_noise_adds_most_where_rays_are_weakest(chest):
    quiet = noise_variance_maps(chest, SPACING, dataclasses.replace(SCAN, electronic_noise=0.0))[0]
    loud = noise_variance_maps(chest, SPACING, dataclasses.replace(SCAN, electronic_noise=2000.0))[0]
    ratio = loud / quiet
    assert (ratio > 1).all()
    # Sector 0 holds frequencies along x: noise of the rays along y, which in the middle miss the lungs and cross the
    # spine; in the lungs, the rays near x (sectors 3 to 5) are the weakest.
    assert ratio[:, 32, 32].argmax() == 0
    assert ratio[:, 32, 18].argmax() in (3, 4, 5)


def test_nothing_is_added_at_full_dose(chest):
    low = simulate_low_dose(chest, SPACING, DoseSimulation(dose_fraction=1.0), [sample_generator(0, 0, 0)])
    torch.testing.assert_close(low, chest, rtol=0, atol=0)


# --- against insertion in projections


def test_local_strength_matches_projection_insertion(inserted, synthesised):
    seen = F.avg_pool2d(ellipse(SIZE, 72, 72).float()[None, None], 16)[0, 0] == 1
    ratio = block_deviation(synthesised)[seen] / block_deviation(inserted)[seen]
    assert float(ratio.median()) == pytest.approx(1, abs=0.03)
    assert float(ratio.quantile(0.05)) > 0.85
    assert float(ratio.quantile(0.95)) < 1.15


@pytest.mark.parametrize(
    ("y", "x"), [(80, 80), (80, 46), (80, 114), (105, 80), (55, 80)], ids=["centre", "right", "left", "back", "front"]
)
def test_direction_and_frequency_match_projection_insertion(inserted, synthesised, y, x):
    patch = (slice(None), slice(y - 12, y + 12), slice(x - 12, x + 12))
    reference, ours = inserted[patch], synthesised[patch]
    assert mean_frequency(ours) == pytest.approx(mean_frequency(reference), rel=0.04)
    assert horizontal_over_vertical(ours) == pytest.approx(horizontal_over_vertical(reference), rel=0.25)


def test_the_test_object_is_anisotropic_enough_to_tell(inserted, chest):
    """In the lung, noise is far from isotropic, and one sector (isotropic noise) would fail the comparison."""
    lung = (slice(None), slice(68, 92), slice(34, 58))
    assert horizontal_over_vertical(inserted[lung]) < 0.5
    isotropic = draw(chest, dataclasses.replace(SCAN, sectors=1), 8)
    assert horizontal_over_vertical(isotropic[lung]) == pytest.approx(1, abs=0.2)


def test_an_upright_object_turns_the_noise_with_it(chest):
    lying, upright = draw(chest, SCAN, 8), draw(chest.transpose(1, 2).contiguous(), SCAN, 8)
    lung = (slice(None), slice(68, 92), slice(34, 58))
    turned = (slice(None), slice(34, 58), slice(68, 92))
    assert horizontal_over_vertical(upright[turned]) == pytest.approx(
        1 / horizontal_over_vertical(lying[lung]), rel=0.3
    )


def test_hu_means_are_kept(chest, inserted, synthesised):
    inside = ellipse(SIZE, 60, 36)
    for noise in (inserted, synthesised):
        means = noise[:, inside].mean(1)
        assert abs(float(means.mean())) < 4 * float(means.std()) / math.sqrt(REALISATIONS) + 0.05
        assert abs(float(means.mean())) < 0.02 * float(noise[:, inside].std())


# --- patches


def test_patch_noise_has_the_statistics_of_whole_slice_noise(chest, synthesised):
    window = (60, 30, 48, 64)
    patches = draw(chest, SCAN, 96, window)
    whole = synthesised[:, 60:108, 30:94]
    ratio = block_deviation(patches) / block_deviation(whole)
    assert float(ratio.mean()) == pytest.approx(1, abs=0.03)
    assert mean_frequency(patches[:, :48, :48]) == pytest.approx(mean_frequency(whole[:, :48, :48]), rel=0.02)
    assert horizontal_over_vertical(patches[:, :48, :48]) == pytest.approx(
        horizontal_over_vertical(whole[:, :48, :48]), rel=0.15
    )


def test_no_periodic_wrap_shows(chest):
    """Opposite edges of a patch are neighbours of an FFT's period; neighbours inside correlate strongly, they don't."""
    patches = draw(chest, SCAN, 256, (56, 56, 48, 48))

    def correlation(a, b):
        return float((a * b).mean() / (a.square().mean() * b.square().mean()).sqrt())

    assert abs(correlation(patches[:, :, 20], patches[:, :, 21])) > 0.15
    assert abs(correlation(patches[:, :, 0], patches[:, :, -1])) < 0.04
    assert abs(correlation(patches[:, 0], patches[:, -1])) < 0.04


def test_noise_depends_on_its_own_generator_alone(chest):
    maps = noise_variance_maps(torch.cat([chest, chest.flip(1), chest * 0.5]), SPACING, SCAN)
    windows = [(0, 0, 64, 48), (50, 60, 64, 48), (90, 100, 64, 48)]
    together = sector_noise(maps, (SIZE, SIZE), windows, [sample_generator(5, 1, n) for n in range(3)])
    alone = sector_noise(maps[2:], (SIZE, SIZE), windows[2:], [sample_generator(5, 1, 2)])
    torch.testing.assert_close(together[2:], alone, rtol=1e-5, atol=1e-4)
    reversed_order = sector_noise(
        maps.flip(0), (SIZE, SIZE), windows[::-1], [sample_generator(5, 1, n) for n in (2, 1, 0)]
    )
    torch.testing.assert_close(together, reversed_order.flip(0), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("sectors", [1, 7, 8])
def test_slices_of_a_stack_have_the_noise_that_they_have_alone(chest, sectors):
    """Two slices are shaped at a time, as one complex image, and an odd one alone."""
    simulation = dataclasses.replace(SCAN, sectors=sectors)
    slices = torch.cat([chest, chest.flip(1), chest * 0.5])
    maps = noise_variance_maps(torch.cat([slices, slices.flip(2)]), SPACING, simulation)
    windows = [(0, 0, 63, 48), (50, 60, 63, 48)]
    stacks = stack_noise(
        maps.unflatten(0, (2, 3)),
        (SIZE, SIZE),
        windows,
        [[sample_generator(5, stack, z) for z in range(3)] for stack in range(2)],
    )
    generators = [sample_generator(5, stack, z) for stack in range(2) for z in range(3)]
    alone = sector_noise(maps, (SIZE, SIZE), [window for window in windows for _ in range(3)], generators)
    torch.testing.assert_close(stacks.flatten(0, 1), alone, rtol=1e-5, atol=1e-3)
    assert torch.equal(stacks[:, 2], alone[2::3])


def test_the_same_call_gives_the_same_bits(chest):
    calls = [simulate_low_dose(chest, SPACING, SCAN, [sample_generator(7, 3, 11)]) for _ in range(2)]
    assert torch.equal(*calls)
    assert not torch.equal(calls[0], simulate_low_dose(chest, SPACING, SCAN, [sample_generator(7, 4, 11)]))


def test_generators_differ_in_each_argument():
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (2**32, 0, 0), (0, 2**32, 0), (10, 1, 0), (1, 0, 10)]
    states = {float(torch.rand((), generator=sample_generator(*key), dtype=torch.float64)) for key in keys}
    assert len(states) == len(keys)
    # Runs of today and tomorrow agree: the value is part of the contract.
    assert sample_generator(1, 2, 3).initial_seed() == sample_generator(1, 2, 3).initial_seed()


def test_oblong_slices_and_spacings_of_their_own(chest):
    pair = torch.cat([chest, chest])[:, 20:140]
    maps = noise_variance_maps(pair, torch.tensor([SPACING, SPACING / 2]), SCAN)
    assert maps.shape == (2, 8, 48, 64)
    torch.testing.assert_close(maps[1:], noise_variance_maps(pair[1:], SPACING / 2, SCAN), rtol=1e-4, atol=0)
    noise = sector_noise(maps, (120, SIZE), [(0, 0, 120, SIZE)] * 2, [sample_generator(0, 0, n) for n in range(2)])
    assert noise.shape == (2, 120, SIZE)


def test_cropping_air_leaves_the_noise_alone(chest):
    """The maps of an oblong slice are those of the square one where they overlap."""
    whole = noise_variance_maps(chest, SPACING, SCAN)
    cropped = noise_variance_maps(chest[:, 20:140], SPACING, SCAN)
    torch.testing.assert_close(cropped[..., 4:-4, 4:-4], whole[..., 12:-12, 4:-4], rtol=0.1, atol=0)


def test_integer_slices_are_welcome(chest):
    low = simulate_low_dose(chest.short(), SPACING, SCAN, [sample_generator(0, 0, 0)])
    torch.testing.assert_close(low, simulate_low_dose(chest, SPACING, SCAN, [sample_generator(0, 0, 0)]))


# --- the projector


def test_projections_are_the_chords_of_a_disc():
    disc = ellipse(128, 40, 40).float()[None]
    detectors = projection.detector_count(128, 128)
    sinogram = projection.project(disc, projection.view_angles(12), detectors)[0]
    s = torch.arange(detectors) - (detectors - 1) / 2
    chord = 2 * (1600 - s.square()).clamp(min=0).sqrt()
    inner = s.abs() < 36
    torch.testing.assert_close(sinogram[:, inner], chord[inner].expand(12, -1), rtol=0.05, atol=0)


@pytest.mark.parametrize(("extent", "size"), [((512, 512), (64, 64)), ((96, 70), (64, 47)), ((40, 200), (13, 64))])
def test_the_projection_matrix_does_what_projecting_does(extent, size):
    pitch, angles = max(extent) / 64, projection.view_angles(7) - 0.2
    detectors = projection.detector_count(*size)
    images = torch.rand(3, *size, generator=torch.Generator().manual_seed(0)) + 0.1
    expected = projection.project(images, angles, detectors, pitch, extent)
    matrix = projection.projection_matrix(size, angles, detectors, pitch, extent)
    torch.testing.assert_close(matrix.project(images), expected.flatten(1), rtol=1e-5, atol=1e-4 * pitch)


def test_reconstruction_returns_the_projected_image():
    image = (ellipse(128, 50, 40).float() + 0.5 * ellipse(128, 12, 9, 14, -8).float())[None]
    image = F.avg_pool2d(image, 5, 1, 2)
    angles = projection.view_angles(240)
    again = projection.reconstruct(
        projection.project(image, angles, projection.detector_count(128, 128)), angles, 128, 128
    )
    inside = ellipse(128, 44, 34)
    assert float((again - image)[0, inside].abs().mean()) < 0.01
    assert float(again[0, 56, 78]) == pytest.approx(1.5, abs=0.03)


# --- bad input


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dose_fraction", 0.0),
        ("dose_fraction", 1.2),
        ("dose_fraction", float("nan")),
        ("photons", 0.0),
        ("photons", float("inf")),
        ("electronic_noise", -1.0),
        ("sectors", 0),
        ("sectors", 2.5),
        ("views", 1),
        ("map_size", 4),
    ],
)
def test_bad_settings_are_refused_by_name(field, value):
    with pytest.raises(InputError, match=f"{field} must be .* got {value}"):
        DoseSimulation(**{field: value})


def test_settings_survive_a_dict():
    assert DoseSimulation.from_dict(SCAN.to_dict()) == SCAN
    with pytest.raises(InputError, match="no such dose simulation setting: dose"):
        DoseSimulation.from_dict({"dose": 0.1})
    for damaged in (True, ["dose_fraction"], {"dose_fraction": "x"}):
        with pytest.raises(InputError, match="dose simulation"):
            DoseSimulation.from_dict(damaged)


@pytest.mark.parametrize("spacing", [0.0, -0.7, float("nan"), torch.tensor([0.7, 0.7])])
def test_bad_spacings_are_refused(chest, spacing):
    with pytest.raises(ValueError, match="pixel_spacing must be"):
        noise_variance_maps(chest, spacing, SCAN)


def test_bad_shapes_are_refused(chest):
    with pytest.raises(ValueError, match=r"hu must be \[N, H, W\]"):
        noise_variance_maps(chest[0], SPACING, SCAN)
    maps, generator = noise_variance_maps(chest, SPACING, SCAN), sample_generator(0, 0, 0)
    with pytest.raises(ValueError, match="maps must be"):
        sector_noise(maps[0], (SIZE, SIZE), [(0, 0, 8, 8)], [generator])
    with pytest.raises(ValueError, match="as many windows and generators, got 1 and 2"):
        sector_noise(maps, (SIZE, SIZE), [(0, 0, 8, 8)], [generator, generator])
    for window in [(0, 0, SIZE + 1, 8), (-1, 0, 8, 8), (SIZE - 7, 0, 8, 8), (0, 0, 0, 8)]:
        with pytest.raises(ValueError, match="windows must be of one size and inside"):
            sector_noise(maps, (SIZE, SIZE), [window], [generator])
    with pytest.raises(ValueError, match="windows must be of one size"):
        sector_noise(maps.expand(2, -1, -1, -1), (SIZE, SIZE), [(0, 0, 8, 8), (0, 0, 8, 9)], [generator, generator])
