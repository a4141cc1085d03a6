from dataclasses import replace

import numpy as np
import pytest

from lidnet_fast.data.phantoms.chest import ChestPhantom
from lidnet_fast.data.phantoms.study import STUDIES, make_study
from lidnet_fast.data.store.reader import Store

NOISE = {"chest": ((-5, 60), (12, 17)), "liver": ((95, 126), (10, 14)), "head": ((27, 44), (3.8, 5.2))}
"""HU of an organ, and the noise that it has at full dose (docs/studies.md)."""


@pytest.fixture(scope="module", params=list(STUDIES))
def small(request, tmp_path_factory):
    """A study of two patients: its name, the study and its store."""
    name = request.param
    study = replace(STUDIES[name], patients=(("train", 1), ("test", 1)))
    study = replace(study, phantom=replace(study.phantom, slices=2))
    path = tmp_path_factory.mktemp(name) / "store"
    make_study(path, study, seed=100, workers=1)
    return name, study, Store(path)


def test_every_study_is_a_store_with_boxes_in_its_splits(small):
    name, study, store = small
    assert [info.split for info in store.series] == ["train", "test"]
    for number, info in enumerate(store.series):
        assert info.shape == (2, 512, 512)
        assert info.body_part == study.phantom.body_part == name.upper()
        assert info.spacing[1:] == pytest.approx((study.phantom.pixel_spacing,) * 2)
        assert info.spacing[0] == pytest.approx(study.phantom.slice_spacing_mm)
        assert sum(len(store.boxes(number, z)) for z in range(2)) > 0
    assert store.simulation["dose_fraction"] == study.dose_fraction
    assert store.simulation["photons"] == study.scan_photons


def test_the_organ_has_the_noise_of_a_scan_at_full_dose(small):
    name, study, store = small
    tissue, (least, most) = NOISE[name]
    for number in range(len(store.series)):
        truth = study.phantom.make_patient(np.random.default_rng([100, number])).volume
        scan = np.stack([store.read(number, z) for z in range(2)])
        organ = (truth > tissue[0]) & (truth < tissue[1])
        assert least <= (scan - truth)[organ].std() <= most


def test_windows_hold_organ_and_lesions():
    for study in STUDIES.values():
        assert study.window.low < study.window.high
    assert (STUDIES["chest"].window.low, STUDIES["chest"].window.high) == (-1000, 400)


def test_test_patients_have_enough_boxes_for_a_thousand_fields():
    """A lesion's box is seen in a few fields of view, each in another place."""
    for name in ("liver", "head"):
        study = STUDIES[name]
        patients = [study.phantom.make_patient(np.random.default_rng([100, n])) for n in range(3)]
        boxes = np.mean([len(patient.boxes) for patient in patients]) * dict(study.patients)["test"]
        assert boxes > 250


def test_the_chest_stays_what_it_was():
    """Results of the chest study would change with it."""
    patient = ChestPhantom(image_size=128, slices=2).make_patient(np.random.default_rng(100))
    np.testing.assert_array_equal(patient.boxes, [[0, 41, 77, 46, 83], [0, 97, 78, 100, 81], [1, 80, 40, 84, 44]])
    assert patient.volume.mean() == pytest.approx(-701.12, abs=0.01)
