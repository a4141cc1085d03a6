"""What a model was trained on: noise is measured right, and what lies outside is named."""

import json
from dataclasses import replace

import numpy as np
import pytest

from lidnet_fast.errors import InputError
from lidnet_fast.models.envelope import Acquisition, Envelope, noise_level

RNG = np.random.default_rng


def scan(noise: float, seed: int = 0, value: float = 40.0) -> np.ndarray:
    """A disc of soft tissue with vessels and a slope, in air, with white noise."""
    y, x = np.mgrid[-128:128, -128:128]
    hu = np.where(x**2 + y**2 < 110**2, value + 0.2 * x, -1000.0)
    for k in range(-80, 81, 20):
        hu[(np.hypot(x - k, y) < 5)] += 60.0
    return hu + noise * RNG(seed).standard_normal(hu.shape)


@pytest.mark.parametrize("noise", [3.0, 12.0, 60.0])
@pytest.mark.parametrize("seed", range(3))
def test_white_noise_is_measured_in_spite_of_structure(noise, seed):
    level = noise_level(scan(noise, seed))
    assert list(level) == ["soft tissue"]
    assert level["soft tissue"] == pytest.approx(noise, rel=0.06)


def test_tissues_are_told_apart():
    hu = np.concatenate([scan(10.0), scan(40.0, value=-800.0)])
    level = noise_level(hu)
    assert level["soft tissue"] == pytest.approx(10, rel=0.06)
    assert level["lung"] == pytest.approx(40, rel=0.06)
    assert noise_level(np.full((64, 64), -1024.0)) == {}


TRAINED = Envelope.around(
    [
        Acquisition.measured(
            [scan(noise)],
            pixel_spacing=spacing,
            slice_thickness=thickness,
            slice_distance=distance,
            kernel=kernel,
            body_part="CHEST",
        )
        for noise, spacing, thickness, distance, kernel in (
            (100.0, 0.6, 1.0, 2.5, "B30f"),
            (140.0, 0.9, 2.5, 3.0, "B50f"),
        )
    ]
)


@pytest.mark.parametrize(
    ("noise", "known", "said"),
    [
        (120.0, {"pixel_spacing": 0.7, "slice_thickness": 2.0, "kernel": "B30f", "body_part": "CHEST"}, []),
        (120.0, {}, []),
        (12.0, {}, ["noise in soft tissue"]),
        (400.0, {}, ["noise in soft tissue", "values of"]),
        (120.0, {"pixel_spacing": 0.4}, ["pixel spacing 0.4 mm (trained on 0.6..0.9 mm)"]),
        (
            120.0,
            {"slice_thickness": 5.0, "kernel": "H60s"},
            ["slice thickness 5 mm", "kernel H60s (trained on B30f, B50f)"],
        ),
        (120.0, {"slice_distance": 0.6}, ["slice distance 0.6 mm (trained on 2.5..3 mm)"]),
        (120.0, {"slice_distance": 2.1}, []),
        (120.0, {"body_part": "HEAD"}, ["body part HEAD (trained on CHEST)"]),
    ],
)
def test_what_lies_outside_is_named(noise, known, said):
    found = TRAINED.outside(Acquisition.measured([scan(noise, seed=3)], **known))
    assert len(found) == len(said)
    assert all(phrase.startswith(start) for phrase, start in zip(found, said, strict=True)), found


def test_other_tissue_than_any_in_training_is_named():
    lungs = Acquisition.measured([scan(120.0, value=-800.0)])
    assert any(phrase.startswith("lung (trained on soft tissue)") for phrase in TRAINED.outside(lungs))


def test_an_unknown_envelope_says_nothing():
    assert Envelope().outside(Acquisition.measured([scan(500.0)], pixel_spacing=9.0, kernel="x")) == []


def test_round_trip():
    assert Envelope.from_dict(json.loads(json.dumps(TRAINED.to_dict()))) == TRAINED
    assert Envelope.from_dict(Envelope().to_dict()) == Envelope()
    assert TRAINED.described()["slice distance, mm"] == "2.5..3"


def test_files_of_before_there_was_a_slice_distance():
    """They load, and say nothing of it; nor do files of models that see one slice."""
    older = replace(TRAINED, slice_distance=None)
    assert "slice_distance" not in older.to_dict()
    assert Envelope.from_dict(older.to_dict()) == older
    assert older.outside(Acquisition(slice_distance=0.6)) == []


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (3, "unknown entries"),
        ({"colour": 1}, "unknown entries"),
        ({"hu": [1.0]}, r"envelope.hu can't be \[1.0\]"),
        ({"pixel_spacing": ["a", "b"]}, "envelope.pixel_spacing"),
        ({"kernels": "B30f"}, "envelope.kernels"),
        ({"inserted_lesions": "yes"}, "envelope.inserted_lesions"),
        ({"noise": {"lung": 3.0}}, "envelope.noise.lung"),
        ({"noise": {"spleen": [1.0, 2.0]}}, "envelope.noise"),
    ],
)
def test_damaged_entries(values, said):
    with pytest.raises(InputError, match=said):
        Envelope.from_dict(values)
