"""Lesions from boxes, and draws balanced over patients and lesions."""

import tracemalloc

import numpy as np
import pytest
from scipy.stats import chisquare

from lidnet_fast.data.samples.sampling import BalancedDraws
from lidnet_fast.data.store.index import Index, SeriesInfo, lesion_numbers

GEOMETRY = {"spacing": (1.0, 1.0, 1.0), "origin": (0.0, 0.0, 0.0), "orientation": (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)}


def make_index(*series):
    """An index of series (patient, split, depth, boxes)."""
    infos = [
        SeriesInfo(f"series {n}", patient, split, shape=(depth, 64, 64), **GEOMETRY)
        for n, (patient, split, depth, _) in enumerate(series)
    ]
    boxes = [np.array(rows, np.float32).reshape(-1, 5) for *_, rows in series]
    return Index.of(infos, range(len(infos)), boxes)


def lesion(slices, x, y=10):
    return [(z, x, y, x + 8, y + 8) for z in slices]


def partition(numbers):
    """Which rows are together, whatever their numbers are."""
    return {frozenset(np.flatnonzero(numbers == number).tolist()) for number in set(numbers.tolist())}


def test_lesions_are_chains_of_overlapping_boxes_on_neighbouring_slices():
    boxes = [
        (0, 0, (0, 0, 10, 10)),  # a lesion on slices 0, 1 and 2 that wanders: its ends don't overlap
        (0, 1, (8, 8, 18, 18)),
        (0, 1, (40, 40, 50, 50)),  # another, on slice 1 alone
        (0, 2, (16, 16, 26, 26)),
        (0, 2, (50, 40, 60, 50)),  # touches the box below, without an area in common
        (0, 4, (16, 16, 26, 26)),  # slice 3 is without it
        (1, 5, (16, 16, 26, 26)),  # another series
        (1, 6, (0, 0, 64, 64)),  # joins the one below with
        (1, 7, (1, 1, 9, 9)),  # two
        (1, 7, (40, 40, 50, 50)),
    ]
    series, z = (np.array([box[n] for box in boxes]) for n in range(2))
    numbers = lesion_numbers(series, z, np.array([box[2] for box in boxes], np.float32))
    expected = [{0, 1, 3}, {2}, {4}, {5}, {6, 7, 8, 9}]
    assert partition(numbers) == {frozenset(rows) for rows in expected}
    assert numbers.dtype == np.int32
    assert set(numbers.tolist()) == set(range(5))


def test_lesions_of_random_boxes_are_those_of_a_search_of_all_pairs():
    rng = np.random.default_rng(0)
    count = 400
    series, z = rng.integers(0, 4, count), rng.integers(0, 12, count)
    order = np.lexsort((z, series))
    series, z = series[order], z[order]
    corner = rng.uniform(0, 80, (count, 2))
    box = np.concatenate([corner, corner + rng.uniform(2, 14, (count, 2))], axis=1)
    together = np.eye(count, dtype=bool)
    for a in range(count):
        for b in range(count):
            if series[a] == series[b] and abs(z[a] - z[b]) == 1:
                (ax, ay, aX, aY), (bx, by, bX, bY) = box[a], box[b]
                together[a, b] = ax < bX and bx < aX and ay < bY and by < aY
    for via in range(count):
        together |= np.outer(together[:, via], together[via])
    assert partition(lesion_numbers(series, z, box)) == {frozenset(np.flatnonzero(row).tolist()) for row in together}


def test_no_boxes():
    draws = BalancedDraws(make_index(("a", "train", 3, [])), "train")
    assert (draws.lesions, draws.slices) == (0, 3)
    empty = np.empty(0, np.int32)
    assert len(lesion_numbers(empty, empty, np.empty((0, 4), np.float32))) == 0
    assert BalancedDraws(make_index(("a", "train", 3, [])), "val").slices == 0


STUDY = (
    ("anna", "train", 40, [*lesion(range(30), 5), *lesion([35], 40)]),
    ("bert", "val", 10, lesion([0], 5)),
    ("anna", "train", 5, lesion([1, 2, 3], 20)),
    ("carla", "train", 20, lesion([7], 30)),
    ("dora", "train", 1, []),
    ("carla", "train", 60, []),
)


def is_fair(counts, shares):
    expected = np.array(shares) / sum(shares) * sum(counts)
    return chisquare(counts, expected).pvalue > 1e-3


def test_positives_are_balanced_over_patients_then_lesions_then_their_slices():
    draws, rng = BalancedDraws(make_index(*STUDY), "train"), np.random.default_rng(0)
    assert draws.lesions == 4
    drawn = [draws.lesion(rng) for _ in range(6000)]
    boxes = {(series, z, *box.tolist()) for series, z, box in drawn}
    assert boxes == {(n, *row) for n, (_, split, _, rows) in enumerate(STUDY) if split == "train" for row in rows}
    # anna's three lesions share half of all draws, on 30 slices, 1 slice and 3 slices; carla's has the other half.
    of_lesion = [
        sum(series == 0 and z < 30 for series, z, _ in drawn),
        sum(series == 0 and z == 35 for series, z, _ in drawn),
        sum(series == 2 for series, _, _ in drawn),
        sum(series == 3 for series, _, _ in drawn),
    ]
    assert is_fair(of_lesion, [1, 1, 1, 3])
    assert is_fair(np.bincount([z for series, z, _ in drawn if series == 0 and z < 30]), [1] * 30)


def test_slices_are_balanced_over_patients_then_their_slices():
    draws, rng = BalancedDraws(make_index(*STUDY), "train"), np.random.default_rng(0)
    assert draws.slices == 40 + 5 + 20 + 1 + 60
    drawn = [draws.slice(rng) for _ in range(9000)]
    assert set(drawn) == {
        (n, z) for n, (_, split, depth, _) in enumerate(STUDY) if split == "train" for z in range(depth)
    }
    counts = np.bincount([series for series, _ in drawn], minlength=6)
    assert is_fair(counts[[0, 2, 3, 4, 5]], [40 / 45, 5 / 45, 20 / 80, 1, 60 / 80])
    assert is_fair(np.bincount([z for series, z in drawn if series == 5]), [1] * 60)


@pytest.mark.parametrize("split", ["train", "val"])
def test_only_series_of_the_split(split):
    draws = BalancedDraws(make_index(*STUDY), split)
    assert [STUDY[n][1] for n in draws.series] == [split] * len(draws.series)


@pytest.mark.parametrize("together", [True, False], ids=["all touch", "none touch"])
def test_crowded_slices_take_linear_memory(together):
    """All pairs of these boxes at once would take gigabytes."""
    count = 4000
    series, z = np.zeros(2 * count, np.int32), np.repeat(np.arange(2, dtype=np.int32), count)
    left = np.zeros(2 * count) if together else 2.0 * np.arange(2 * count)
    box = np.stack([left, np.zeros(2 * count), left + 1, np.ones(2 * count)], axis=1).astype(np.float32)
    tracemalloc.start()
    numbers = lesion_numbers(series, z, box)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(set(numbers.tolist())) == (1 if together else 2 * count)
    assert peak < 100e6
