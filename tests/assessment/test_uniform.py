import math

import numpy as np
import pytest
import torch
from torchvision.transforms.functional import gaussian_blur

from lidnet_fast.assessment.arms import Arm, low_dose_arm
from lidnet_fast.assessment.options import AssessOptions
from lidnet_fast.assessment.phantom import FIELD, place_discs, place_signals, scene
from lidnet_fast.assessment.uniform import UniformPhantom
from lidnet_fast.data.simulation.projection import reconstruction_transfer
from lidnet_fast.errors import InputError

OPTIONS = AssessOptions(realisations=16, diameters=(5.0, 12.0), contrasts=(80.0,), edges=(400.0,))
SIGMA = 1.5


@pytest.fixture(scope="module")
def measured():
    arms = [
        low_dose_arm(),
        Arm("blur", lambda images: gaussian_blur(images, 15, SIGMA)),
        Arm("weaker", lambda images: 0.8 * images),
        Arm("truth", lambda images: images.mean(0, keepdim=True).expand_as(images)),
    ]
    results = {}
    phantom = UniformPhantom(OPTIONS)
    assert len(list(phantom.measure(arms, 0.5, 0, results))) == phantom.batches == 6
    return results


def test_the_low_dose_has_the_scanners_noise_and_resolution(measured):
    simulation = OPTIONS.simulation(0.5)
    water = scene([], OPTIONS, 99)
    deviation = float(water.noise(simulation, range(8))[:, 32:-32, 32:-32].std())
    assert measured["low dose"]["noise"]["magnitude_hu"][0] == pytest.approx(deviation, rel=0.03)
    frequency = np.linspace(0, 0.5, 1000)
    exact = frequency[np.argmax(reconstruction_transfer(frequency) < 0.5)] / OPTIONS.pixel_spacing
    (disc,) = measured["low dose"]["resolution"]
    assert disc["f50"][0] == pytest.approx(exact, rel=0.05)
    assert disc["f50"][1] <= disc["f50"][0] <= disc["f50"][2]
    assert disc["measured_contrast_hu"] == pytest.approx(400, rel=0.02)


def test_noise_goes_with_the_root_of_the_dose():
    options = AssessOptions(electronic_noise=0.0)
    few = options.simulation(1.0), options.simulation(0.25)
    quiet, loud = (float(scene([], OPTIONS, 0).noise(one, range(4)).std()) for one in few)
    assert loud / quiet == pytest.approx(2, rel=0.02)


def test_a_blur_costs_resolution_by_its_kernel(measured):
    frequency = np.linspace(0, 0.5, 1000)
    transfer = reconstruction_transfer(frequency) * np.exp(-2 * (math.pi * SIGMA * frequency) ** 2)
    exact = frequency[np.argmax(transfer < 0.5)] / OPTIONS.pixel_spacing
    (disc,) = measured["blur"]["resolution"]
    assert disc["f50"][0] == pytest.approx(exact, rel=0.05)


def test_a_blur_gains_nothing_for_the_hotelling_observer(measured):
    """It can be undone: what PSNR takes for a gain is none."""
    assert measured["blur"]["noise"]["magnitude_hu"][0] < 0.5 * measured["low dose"]["noise"]["magnitude_hu"][0]
    for blurred, plain in zip(measured["blur"]["detectability"], measured["low dose"]["detectability"], strict=True):
        if plain["observer"] == "gabor":
            assert blurred["dprime"][0] == pytest.approx(plain["dprime"][0], rel=0.25)


def test_a_factor_is_a_bias_and_nothing_else(measured):
    for weaker, plain in zip(measured["weaker"]["bias"], measured["low dose"]["bias"], strict=True):
        assert plain["bias_hu"][1] <= 0 <= plain["bias_hu"][2]
        expected = 0.8 * (plain["bias_hu"][0] + plain["truth_hu"]) - plain["truth_hu"]
        assert weaker["bias_hu"][0] == pytest.approx(expected, abs=1e-3)
    for weaker, plain in zip(measured["weaker"]["detectability"], measured["low dose"]["detectability"], strict=True):
        assert weaker["dprime"] == pytest.approx(plain["dprime"], rel=1e-3)


def test_detectability_rises_with_size(measured):
    found = {
        row["diameter_mm"]: row["dprime"][0]
        for row in measured["low dose"]["detectability"]
        if row["observer"] == "npw"
    }
    assert found[12.0] > 2 * found[5.0] > 0


def test_batches_change_nothing():
    small = AssessOptions(realisations=10, diameters=(5.0,), contrasts=(40.0,), edges=(400.0,), batch_size=3)
    results = []
    for options in (small, AssessOptions(**{**small.record(), "batch_size": 10})):
        found = {}
        list(UniformPhantom(options).measure([low_dose_arm()], 1.0, 0, found))
        results.append(found["low dose"])
    assert results[0]["noise"]["magnitude_hu"] == pytest.approx(results[1]["noise"]["magnitude_hu"], rel=1e-6)
    for one, other in zip(*(found["detectability"] for found in results), strict=True):
        assert one["dprime"] == pytest.approx(other["dprime"], rel=1e-5)


def test_signals_fill_their_cells():
    options = AssessOptions(contrasts=(5.0, 10.0, 20.0, 40.0, 80.0))
    signals = place_signals(options)
    assert len(signals) == 20 and {one.object for one in signals} == {0, 1}
    assert len(place_discs(options)) == 4
    view = scene([one for one in signals if one.object == 0], options, 0).view
    assert view.shape == (FIELD, FIELD)
    assert view[31, 31] == pytest.approx(5, abs=0.5) and abs(view[0, 0]) < 0.01
    assert torch.equal(
        scene([], options, 3).noise(options.simulation(1.0), [2]),
        scene([], options, 3).noise(options.simulation(1.0), [2]),
    )


def test_a_signal_larger_than_its_field():
    with pytest.raises(InputError, match=r"diameters: 40 mm is larger than the signals' field of 33.6 mm"):
        place_signals(AssessOptions(diameters=(40.0,)))
