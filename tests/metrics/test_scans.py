"""FROC of whole scans: by hand, and against the published script's rules written out one candidate at a time."""

import math

import numpy as np
import pytest

from lidnet_fast.metrics import FALSE_POSITIVES
from lidnet_fast.metrics.scans import MAX_CANDIDATES, Scan, Spheres, scan_froc


def scan(lesions=(), excluded=(), candidates=()):
    rows = np.array(candidates, float).reshape(-1, 4)
    return Scan(Spheres.of(lesions), Spheres.of(excluded), rows[:, :3], rows[:, 3])


NODULE, OTHER, FAR = (0, 0, 0, 10), (40, 0, 0, 6), (0, 90, 0)


def test_by_hand():
    """Two scans, three nodules: a hit found twice, one in an excluded finding, two false positives, a late hit."""
    first = scan(
        [NODULE, OTHER], [(-50, 0, 0, 8)], [(0, 3, 0, 0.9), (0, 0, 1, 0.6), (-50, 1, 0, 0.95), (*FAR, 0.8), (*FAR, 0.3)]
    )
    second = scan([NODULE], (), [(4, 0, 0, 0.5)])
    result = scan_froc([first, second])
    assert result.curve.false_positives.tolist() == [0, 0, 0.5, 0.5, 1.0]
    assert result.curve.sensitivity.tolist() == pytest.approx([0, 1 / 3, 1 / 3, 2 / 3, 2 / 3])
    expected = {1 / 8: 1 / 3, 1 / 4: 1 / 3, 1 / 2: 2 / 3, 1: 2 / 3, 2: 2 / 3, 4: 2 / 3, 8: 2 / 3}
    assert result.curve.sensitivities == pytest.approx(expected)
    assert result.curve.mean == pytest.approx(sum(expected.values()) / 7)


def test_a_hit_is_nearer_than_the_radius():
    on_surface, inside = (5, 0, 0, 0.9), (4.999, 0, 0, 0.9)
    assert scan_froc([scan([NODULE], (), [on_surface])]).curve.mean == 0
    assert scan_froc([scan([NODULE], (), [inside])]).curve.mean == 1


def test_a_lesion_comes_before_an_excluded_finding_around_it():
    assert scan_froc([scan([NODULE], [(0, 0, 0, 30)], [(1, 0, 0, 0.9), (9, 0, 0, 0.99)])]).curve.mean == 1


def test_scans_without_anything_count():
    """One false positive in four scans, surer than the hit."""
    scans = [scan([NODULE], (), [(0, 0, 0, 0.5), (*FAR, 0.9)]), scan(), scan(), scan()]
    assert scan_froc(scans).curve.sensitivities[1 / 8] == 0
    assert scan_froc(scans).curve.sensitivities[1 / 4] == 1


def test_so_many_candidates_of_a_scan_count():
    """Where the last that would count ties with the first that doesn't, neither does, as in the published script."""
    many = [(*FAR, 1 - k / 1000) for k in range(MAX_CANDIDATES)]
    hit = (0, 0, 0, many[-1][3])
    assert scan_froc([scan([NODULE], (), [*many[:-1], hit])], (200,)).curve.mean == 1
    assert scan_froc([scan([NODULE], (), [*many, hit])], (200,)).curve.mean == 0


def test_without_lesions_or_scans():
    result = scan_froc([scan((), (), [(*FAR, 0.5)])])
    assert result.curve.mean is None and result.mean_interval is None
    assert result.intervals == dict.fromkeys(FALSE_POSITIVES)
    with pytest.raises(ValueError, match="at least one scan"):
        scan_froc([])


def published(scans, rates):
    """The published script's rules: lists of hits and false positives, one point per score, linear between points."""
    truth, scores, missed = [], [], 0
    for one in scans:
        left = dict(enumerate(zip(one.centres, one.scores, strict=True)))
        for centre, diameter in zip(one.lesions.centres, one.lesions.diameters, strict=True):
            matches = []
            for number, (place, score) in enumerate(zip(one.centres, one.scores, strict=True)):
                if sum((a - b) ** 2 for a, b in zip(centre, place, strict=True)) < (diameter / 2) ** 2:
                    matches.append(score)
                    left.pop(number, None)
            if matches:
                truth.append(1)
                scores.append(max(matches))
            else:
                missed += 1
        for centre, diameter in zip(one.excluded.centres, one.excluded.diameters, strict=True):
            for number, place in enumerate(one.centres):
                if sum((a - b) ** 2 for a, b in zip(centre, place, strict=True)) < (diameter / 2) ** 2:
                    left.pop(number, None)
        truth += [0] * len(left)
        scores += [score for _, score in left.values()]
    truth, scores = np.array(truth), np.array(scores)
    x, y = [0.0], [0.0]
    for threshold in sorted(set(scores.tolist()), reverse=True):
        x.append(np.sum((scores >= threshold) & (truth == 0)) / len(scans))
        y.append(np.sum((scores >= threshold) & (truth == 1)) / (truth.sum() + missed))
    return np.interp(rates, x, y)


def some_scans(seed, count=12):
    rng = np.random.default_rng(seed)
    scans = []
    for _ in range(count):
        lesions, excluded = (
            np.c_[rng.uniform(0, 60, (n, 3)), rng.uniform(4, 20, n)] for n in rng.integers((0, 0), (4, 6))
        )
        near = np.concatenate([lesions, lesions, excluded])[:, :3]
        centres = np.concatenate([near + rng.normal(0, 3, near.shape), rng.uniform(0, 60, (5, 3))])
        scores = rng.integers(1, 15 * 10 ** (seed % 3), len(centres)) / 1500  # with few to many ties
        scans.append(Scan(Spheres.of(lesions), Spheres.of(excluded), centres, scores))
    return scans


@pytest.mark.parametrize("seed", range(5))
def test_against_the_published_rules(seed):
    scans = some_scans(seed)
    rates = (*FALSE_POSITIVES, 0.3, 0.77, 3.3)
    expected = published(scans, rates)
    assert 0.1 < expected.max() < 1
    result = scan_froc(scans, rates, samples=1)
    assert list(result.curve.sensitivities.values()) == pytest.approx(expected.tolist())


def test_intervals_are_quantiles_of_resampled_scans():
    """The samples drawn as documented, each scored as if it were a set of scans."""
    scans = some_scans(3)
    result = scan_froc(scans, samples=80, seed=7)
    generator = np.random.default_rng(7)
    values = np.array(
        [
            published([scans[n] for n in generator.integers(len(scans), size=len(scans))], FALSE_POSITIVES)
            for _ in range(80)
        ]
    )
    every = np.c_[values, values.mean(axis=1)]
    every.sort(axis=0)
    low, high = every[math.floor(0.025 * 80)], every[math.floor(0.975 * 80)]
    ends = np.array([*result.intervals.values(), result.mean_interval])
    np.testing.assert_allclose(ends, np.c_[low, high], atol=1e-12)
    assert scan_froc(scans, samples=80, seed=8).mean_interval != result.mean_interval
    assert (ends[:, 0] < ends[:, 1]).all()


def test_intervals_cover_the_truth():
    """Of a detector that finds 60 % of lesions, 95 % intervals from 60 scans hold 0.6 about 95 times in 100."""
    covered = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        scans = [scan([NODULE], (), [(0, 0, 0, 0.9)] if rng.random() < 0.6 else []) for _ in range(60)]
        low, high = scan_froc(scans, (1,), samples=200, seed=seed).mean_interval
        covered += low <= 0.6 <= high
    assert 88 <= covered <= 100
