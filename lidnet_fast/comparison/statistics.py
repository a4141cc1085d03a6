"""Metrics of records, and their intervals: a bootstrap over seeds and, within seeds, over patients.

A replicate draws as many seeds as there are, with replacement, and for each seed drawn as many patients as its samples
are of; a metric of it is the mean over its seeds. All arms see the same draws, so differences between them are paired.
With one seed only patients are drawn. Where all seeds share one store, their patients are the same people: they are
drawn once for the whole replicate.

The standard error is that of the replicates times sqrt(n / (n - 1)), and the 95 % interval the estimate plus or minus
Student's t of n - 1 degrees of freedom times that, with n seeds (or, of one seed, n patients). Without the two, few
seeds give intervals that are too narrow (Hesterberg 2015, The American Statistician 69:371, section 3.2).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.stats import t as student_t

from lidnet_fast.comparison.records import IMAGE_METRICS, LESION_METRICS, Findings, Record
from lidnet_fast.metrics.froc import FALSE_POSITIVES
from lidnet_fast.report.data import Metric

Floats = NDArray[np.float64]

REPLICATES = 1000

_AT_ONCE = 100
"""Replicates that are computed together: bounds memory."""

_RECALLS = np.linspace(0, 1, 101)


@dataclass(frozen=True, eq=False)
class Draw:
    """What the replicates drew of one seed."""

    patients: NDArray[np.int32]
    """[P], sorted."""
    replicate: NDArray[np.int64]
    """[M] which replicate; one that drew the seed twice comes twice."""
    weights: Floats
    """[M,P] how often each of the seed's patients was drawn."""


@dataclass(frozen=True, eq=False)
class Estimate:
    """A metric, and its bootstrap replicates; differences of two are paired."""

    value: float
    replicates: Floats
    """[R]."""
    units: int
    """Independent units that were drawn: seeds, or the patients of one seed."""

    def __sub__(self, other: "Estimate") -> "Estimate":
        return Estimate(self.value - other.value, self.replicates - other.replicates, self.units)

    def share_of(self, whole: "Estimate") -> "Estimate":
        """This as a share of another; it doesn't exist where that isn't positive."""
        positive = np.where(whole.replicates > 0, whole.replicates, np.nan)
        replicates = self.replicates / positive
        return Estimate(self.value / whole.value if whole.value > 0 else np.nan, replicates, self.units)

    def metric(self) -> Metric:
        """(value, low, high) of the 95 % interval; the value alone of one unit, None where it doesn't exist."""
        if np.isnan(self.value):
            return None
        spread = float(np.nanstd(self.replicates)) if np.isfinite(self.replicates).any() else np.nan
        if self.units < 2 or np.isnan(spread):
            return self.value
        half = spread * float((self.units / (self.units - 1)) ** 0.5 * student_t.ppf(0.975, self.units - 1))
        return self.value, self.value - half, self.value + half


def draws(patients: Sequence[NDArray[np.int32]], same_people: bool = False, replicates: int = REPLICATES) -> list[Draw]:
    """Draw the replicates.

    Args:
        patients: for each seed, whom its samples are of; one may come again.
        same_people: a number means the same person in every seed.
        replicates: their number.

    Returns:
        One entry per seed.
    """
    rng = np.random.default_rng(0)
    seeds = len(patients)
    chosen = rng.integers(seeds, size=(replicates, seeds)) if seeds > 1 else np.zeros((replicates, 1), int)
    everyone = np.unique(np.concatenate(patients))
    drawn_people = _counts(rng, len(everyone), replicates)
    drawn = []
    for seed, samples in enumerate(patients):
        replicate, _ = np.nonzero(chosen == seed)
        people = everyone if same_people else np.unique(samples)
        counts = drawn_people[replicate] if same_people else _counts(rng, len(people), len(replicate))
        drawn.append(Draw(people, replicate, counts))
    return drawn


def _counts(rng: np.random.Generator, patients: int, replicates: int) -> Floats:
    return rng.multinomial(patients, np.full(patients, 1 / patients), size=replicates).astype(np.float64)


def estimate(records: Sequence[Record], drawn: Sequence[Draw]) -> dict[str, Estimate]:
    """Every metric of one arm.

    Args:
        records: the arm's, one per seed.
        drawn: see `draws`; the same for all arms.

    Returns:
        Flat name ("psnr", "lesion_psnr", "judge_ap50", "judge_froc_mean", ...) -> estimate; NaN without a lesion.
    """
    replicates = 1 + max(int(draw.replicate.max(initial=0)) for draw in drawn)
    values: dict[str, list[float]] = {}
    sums: dict[str, Floats] = {}
    for record, draw in zip(records, drawn, strict=True):
        of_patient = np.searchsorted(draw.patients, record.patient)
        for name, whole in plain_metrics(record).items():
            values.setdefault(name, []).append(whole)
            sums.setdefault(name, np.zeros(replicates))
        for start in range(0, len(draw.replicate), _AT_ONCE):
            rows = slice(start, start + _AT_ONCE)
            for name, value in metrics(record, draw.weights[rows][:, of_patient]).items():
                np.add.at(sums[name], draw.replicate[rows], value)
    seeds = len(records)
    units = seeds if seeds > 1 else len(np.unique(records[0].patient))
    return {
        name: Estimate(sum(found) / seeds, sums[name] / seeds, units)
        for name, found in values.items()
        if len(found) == seeds  # a detector that only some of the records have tells nothing of all seeds
    }


def plain_metrics(record: Record) -> dict[str, float]:
    """All metrics of a record's samples as they are."""
    return {name: float(value[0]) for name, value in metrics(record, np.ones((1, len(record.patient)))).items()}


def metrics(record: Record, weights: Floats) -> dict[str, Floats]:
    """All metrics of weighted samples.

    Args:
        record: of N samples.
        weights: [R,N], how often each counts.

    Returns:
        Flat name -> [R]; NaN where nothing that it averages counts.
    """
    lesions = weights[:, record.lesion_image]
    values = {name: _mean(record.images[name], weights) for name in IMAGE_METRICS}
    values |= {f"lesion_{name}": _mean(record.lesions[name], lesions) for name in LESION_METRICS}
    for name, found in record.detectors.items():
        values[f"{name}_ap50"] = average_precision(found, weights, lesions.sum(1))
        values[f"{name}_froc_mean"] = froc_mean(found, weights, lesions)
    return values


def _mean(values: Floats, weights: Floats) -> Floats:
    with np.errstate(invalid="ignore"):
        return weights @ values / weights.sum(1)


def average_precision(found: Findings, weights: Floats, lesions: Floats) -> Floats:
    """Average precision at IoU 0.5 as COCO defines it: the mean of 101 interpolated precisions.

    Args:
        found: detections in N samples.
        weights: [R,N], how often each sample counts.
        lesions: [R], the weighted number of lesions.

    Returns:
        [R]; NaN where there is no lesion.
    """
    order = np.argsort(-found.score, kind="stable")
    image = found.image[order]
    # Precision falls from one hit to the next, so that only those at hits matter.
    at_hits = np.flatnonzero(found.matched[order])
    hits = np.cumsum(weights[:, image[at_hits]], axis=1)
    all_found = np.cumsum(_sums_between(weights, image, np.arange(len(image)), at_hits), axis=1)
    precision = hits / np.maximum(all_found, np.spacing(1))
    precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    values = np.full(len(weights), np.nan)
    for row in np.flatnonzero(lesions):
        at = np.searchsorted(hits[row] / lesions[row], _RECALLS)
        values[row] = precision[row][at[at < precision.shape[1]]].sum() / len(_RECALLS)
    return values


def froc_curve(found: Findings, weights: Floats, lesions: Floats) -> tuple[Floats, Floats]:
    """The points of FROC curves, as `lidnet_fast.metrics.froc.froc` defines them, of weighted samples.

    Only those at which a curve may turn: where lesions are hit, and just before.

    Args:
        found: detections in N samples.
        weights: [R,N], how often each sample counts.
        lesions: [R,L], how often each lesion counts.

    Returns:
        False positives per sample, never decreasing, and sensitivities, both [R,K] and from (0, 0): points of distinct
        scores. Of equal false positives the last point counts.
    """
    seen = np.flatnonzero(np.isfinite(found.lesion_score))
    misses = np.flatnonzero(found.misses)
    scores, place = np.unique(-np.concatenate([found.lesion_score[seen], found.score[misses]]), return_inverse=True)
    hit, missed = place[: len(seen)], place[len(seen) :]
    points = np.unique(np.concatenate([hit, hit - 1, [len(scores) - 1]]))
    points = points[points >= 0]
    true = _sums_between(lesions, seen, hit, points)
    false = _sums_between(weights, found.image[misses], missed, points)
    start = np.zeros((len(weights), 1))
    with np.errstate(invalid="ignore", divide="ignore"):
        sensitivity = np.cumsum(true, axis=1) / lesions.sum(1, keepdims=True)
        per_sample = np.cumsum(false, axis=1) / weights.sum(1, keepdims=True)
    return np.hstack([start, per_sample]), np.hstack([start, sensitivity])


def _sums_between(weights: Floats, column: NDArray[np.integer], place: NDArray[np.integer], ends: Any) -> Floats:
    """Sums of weights, one for each end: of the items placed after the end before, up to this one.

    Args:
        weights: [R,N].
        column: [D], whose weight an item has.
        place: [D], where it is.
        ends: [K], ascending; what lies beyond the last counts nowhere.

    Returns:
        [R,K].
    """
    end = np.searchsorted(ends, place)
    inside = end < len(ends)
    items = (np.ones(inside.sum()), (end[inside], column[inside]))
    return (csr_array(items, shape=(len(ends), weights.shape[1])) @ weights.T).T


def froc_mean(found: Findings, weights: Floats, lesions: Floats) -> Floats:
    """[R], the mean sensitivity at LUNA16's operating points; the arguments are those of `froc_curve`."""
    values = np.full(len(weights), np.nan)
    curves = zip(*froc_curve(found, weights, lesions), strict=True)
    for row, (per_sample, sensitivity) in enumerate(curves):
        if lesions[row].any():
            values[row] = np.interp(FALSE_POSITIVES, per_sample, sensitivity).mean()
    return values
