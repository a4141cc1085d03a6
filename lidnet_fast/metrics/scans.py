"""FROC of candidates in whole scans by LUNA16's rules (Setio et al. 2017, arXiv:1612.08012).

The rules and the bootstrap are those of the challenge's `noduleCADEvaluationLUNA16.py`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lidnet_fast.metrics.froc import FALSE_POSITIVES, Froc, froc_curve

#: As many candidates of a scan count, those of the highest scores.
MAX_CANDIDATES = 100


@dataclass(frozen=True)
class Spheres:
    """Places in a scan, as the centres and diameters of spheres.

    Attributes:
        centres: float64 [n, 3], (x, y, z) in mm, in any system that all of a scan's share.
        diameters: float64 [n], mm.
    """

    centres: NDArray[np.float64]
    diameters: NDArray[np.float64]

    @classmethod
    def of(cls, rows: Sequence[Sequence[float]]) -> "Spheres":
        """Spheres from rows (x, y, z, diameter)."""
        values = np.array(rows, np.float64).reshape(-1, 4)
        return cls(values[:, :3], values[:, 3])

    def hold(self, points: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Which points [m, 3] lie inside which of the spheres: bool [n, m]; its surface is outside."""
        squared = ((self.centres[:, None] - points) ** 2).sum(axis=-1)
        return squared < (self.diameters[:, None] / 2) ** 2


@dataclass(frozen=True)
class Scan:
    """What there is in one scan, and what was found.

    Attributes:
        lesions: those to be found.
        excluded: findings that count neither way.
        centres: of the candidates, float64 [m, 3] in mm.
        scores: of the candidates, float64 [m], the higher the surer.
    """

    lesions: Spheres
    excluded: Spheres
    centres: NDArray[np.float64]
    scores: NDArray[np.float64]


@dataclass(frozen=True)
class ScanFroc:
    """A FROC curve of scans with intervals from a bootstrap over the scans.

    Attributes:
        curve: false positives are per scan; `curve.mean` is LUNA16's CPM.
        intervals: low and high end by operating point; None where there was no lesion.
        mean_interval: low and high end of the CPM.
    """

    curve: Froc
    intervals: dict[float, tuple[float, float] | None]
    mean_interval: tuple[float, float] | None


def scan_froc(
    scans: Sequence[Scan],
    false_positives: Sequence[float] = FALSE_POSITIVES,
    samples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> ScanFroc:
    """FROC analysis of candidates in scans.

    A candidate whose centre lies within a lesion's radius hits it. A lesion counts once, at the score of its best hit;
    further hits are neither true nor false positives, and neither are candidates in excluded findings. Of a scan with
    more than `MAX_CANDIDATES` candidates, those count that score higher than the next after so many. The curve is as
    `froc` describes it.

    Args:
        scans: all scans that were looked at, also those without lesions and without candidates.
        false_positives: operating points, false positives per scan.
        samples: bootstrap samples, each of as many scans as there are; those without a lesion are left out.
        confidence: of the intervals, which end at the samples' quantiles.
        seed: of the samples.

    Raises:
        ValueError: there is no scan.
    """
    if not scans:
        raise ValueError("scan_froc needs at least one scan")
    hits, wrong = zip(*(_judged(scan) for scan in scans), strict=True)
    lesion_scores, false_scores = np.concatenate(hits), np.concatenate(wrong)
    curve = froc_curve(lesion_scores, false_scores, len(scans), false_positives)
    if curve.mean is None:
        return ScanFroc(curve, dict.fromkeys(false_positives), None)
    generator = np.random.default_rng(seed)
    resampled = []
    for _ in range(samples):
        times = np.bincount(generator.integers(len(scans), size=len(scans)), minlength=len(scans))
        sampled = froc_curve(
            np.repeat(lesion_scores, np.repeat(times, [len(scores) for scores in hits])),
            np.repeat(false_scores, np.repeat(times, [len(scores) for scores in wrong])),
            len(scans),
            false_positives,
        )
        if sampled.mean is not None:
            resampled.append([*sampled.sensitivities.values(), sampled.mean])
    ordered = np.sort(np.array(resampled), axis=0)
    tail = (1 - confidence) / 2
    low, high = (ordered[math.floor(share * len(ordered))] for share in (tail, 1 - tail))
    *intervals, mean = zip(low.tolist(), high.tolist(), strict=True)
    return ScanFroc(curve, dict(zip(false_positives, intervals, strict=True)), mean)


def _judged(scan: Scan) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The score of each lesion's best hit, -inf where it has none; and the scores of the false positives."""
    centres, scores = scan.centres, scan.scores
    if len(scores) > MAX_CANDIDATES:
        counts = scores > np.sort(scores)[-MAX_CANDIDATES - 1]
        centres, scores = centres[counts], scores[counts]
    hits = scan.lesions.hold(centres)
    best = np.where(hits, scores, -np.inf).max(axis=1, initial=-np.inf)
    return best, scores[~hits.any(axis=0) & ~scan.excluded.hold(centres).any(axis=0)]
