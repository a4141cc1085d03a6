"""The bootstrap against closed forms, and how often its intervals hold the truth."""

import numpy as np
import pytest
from scipy.stats import t as student_t

from lidnet_fast.comparison.records import IMAGE_METRICS, LESION_METRICS, Record
from lidnet_fast.comparison.statistics import Estimate, draws, estimate

PATIENTS, SAMPLES = 12, 4


def record(psnr: np.ndarray) -> Record:
    """A record of one metric [patients, samples], without lesions."""
    none = np.empty(0, np.int32)
    return Record(
        patient=np.repeat(np.arange(len(psnr), dtype=np.int32), psnr.shape[1]),
        images={**dict.fromkeys(IMAGE_METRICS, np.zeros(psnr.size)), "psnr": psnr.ravel()},
        lesion_image=none,
        lesion_box=np.empty((0, 4), np.float32),
        lesions=dict.fromkeys(LESION_METRICS, np.empty(0)),
        detectors={},
        examples=np.empty((0, 1, 1), np.int16),
        example_image=none,
        example_found=np.empty((0, 6), np.float32),
    )


def study(rng: np.random.Generator, effect: float, seeds: int, between: float) -> tuple[list[Record], list[Record]]:
    """Two arms of each seed: patients differ much, arms by an effect that varies with seeds and patients."""
    pairs = []
    for _ in range(seeds):
        of_patient = rng.normal(30, 5, (PATIENTS, 1)) + rng.normal(0, 0.1, (PATIENTS, SAMPLES))
        gain = effect + rng.normal(0, between) + rng.normal(0, 0.5, (PATIENTS, 1))
        pairs.append((record(of_patient), record(of_patient + gain)))
    baseline, equipped = zip(*pairs, strict=True)
    return list(baseline), list(equipped)


def gain(baseline: list[Record], equipped: list[Record], same_people: bool = False, replicates: int = 1000):
    drawn = draws([one.patient for one in baseline], same_people, replicates)
    return (estimate(equipped, drawn)["psnr"] - estimate(baseline, drawn)["psnr"]).metric()


def test_one_seed_is_students_interval_over_patients() -> None:
    """The bootstrap's variance of a mean is the sample's over n, with n and not n - 1; the factor makes up for it."""
    baseline, equipped = study(np.random.default_rng(0), effect=1.0, seeds=1, between=0.0)
    differences = (equipped[0].images["psnr"] - baseline[0].images["psnr"]).reshape(PATIENTS, SAMPLES).mean(1)
    half = student_t.ppf(0.975, PATIENTS - 1) * differences.std(ddof=1) / PATIENTS**0.5
    value, low, high = gain(baseline, equipped, replicates=20000)
    assert value == pytest.approx(differences.mean())
    assert high - value == pytest.approx(half, rel=0.03)
    assert value - low == pytest.approx(half, rel=0.03)


def test_over_seeds_it_is_students_where_patients_agree() -> None:
    rng = np.random.default_rng(0)
    levels = rng.normal(0, 1, 5)
    baseline = [record(np.zeros((PATIENTS, SAMPLES))) for _ in levels]
    equipped = [record(np.full((PATIENTS, SAMPLES), level)) for level in levels]
    value, _, high = gain(baseline, equipped, replicates=20000)
    assert value == pytest.approx(levels.mean())
    assert high - value == pytest.approx(student_t.ppf(0.975, 4) * levels.std(ddof=1) / 5**0.5, rel=0.03)


def test_patients_of_one_store_are_drawn_once_for_all_seeds() -> None:
    """Where all seeds say the same of the same people, more seeds make the mean no surer."""
    rng = np.random.default_rng(0)
    of_patient = np.repeat(rng.normal(0, 1, (PATIENTS, 1)), SAMPLES, axis=1)
    baseline = [record(np.zeros_like(of_patient))] * 3
    drawn = draws([one.patient for one in baseline], same_people=True, replicates=20000)
    spread = estimate([record(of_patient)] * 3, drawn)["psnr"].replicates.std()
    assert spread == pytest.approx(of_patient[:, 0].std() / PATIENTS**0.5, rel=0.03)


@pytest.mark.parametrize(("seeds", "between"), [(1, 0.0), (3, 0.0), (3, 1.0), (5, 0.3)])
def test_intervals_hold_the_truth(seeds: int, between: float) -> None:
    """Of 120 simulated studies; 95 % of 120 are 114, and 107 or fewer have a chance below 1 in 200."""
    rng = np.random.default_rng(seeds)
    found = [gain(*study(rng, 0.5, seeds, between), replicates=200) for _ in range(120)]
    assert sum(low <= 0.5 <= high for _, low, high in found) > 107
    assert np.mean([value for value, _, _ in found]) == pytest.approx(0.5, abs=0.25)


def test_what_is_missing_is_none() -> None:
    baseline, _ = study(np.random.default_rng(0), 0.0, 2, 0.0)
    estimates = estimate(baseline, draws([one.patient for one in baseline]))
    assert estimates["lesion_psnr"].metric() is None
    one_patient = [record(np.ones((1, SAMPLES)))]
    assert estimate(one_patient, draws([one_patient[0].patient]))["psnr"].metric() == 1.0


def test_a_share_is_paired_and_exists_where_there_is_something_to_share() -> None:
    gained, gap = Estimate(0.1, np.array([0.05, 0.1, 0.2]), 5), Estimate(0.4, np.array([0.2, 0.4, 0.8]), 5)
    assert gained.share_of(gap).metric() == pytest.approx((0.25, 0.25, 0.25))
    assert gained.share_of(Estimate(-0.1, np.array([-0.1, 0.0, 0.1]), 5)).metric() is None


def test_draws_repeat() -> None:
    patients = [np.array([0, 0, 1, 1, 2]), np.array([3, 4, 5, 5, 5])]
    for one, again in zip(draws(patients), draws(patients), strict=True):
        assert (one.weights == again.weights).all() and (one.replicate == again.replicate).all()
        assert (one.weights.sum(1) == 3).all()
