"""Erasure and invention: known lesions that an arm takes away, and blobs that it makes up."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy import stats

from lidnet_fast.assessment.arms import Arm
from lidnet_fast.assessment.cases import Case
from lidnet_fast.assessment.options import CALIBRATION, AssessOptions
from lidnet_fast.assessment.scanner import Scan, batches
from lidnet_fast.metrics.erasure import retained_contrast, survival
from lidnet_fast.metrics.invention import NoiseFloor, threshold

_SHOWN = 3
"""Worst cases of each kind that are kept for the report."""

_MAP_PIXELS = 2
"""Side of the square of pixels that a pixel of a map stands for."""

Results = dict[str, Any]


@dataclass(eq=False)
class Shown:
    """A case for a reader's eyes: its worst arm's score, and one realisation of every arm.

    Attributes:
        score: higher is worse.
        arm: the arm with this score.
        case: what is shown.
        images: name -> [H, W] HU: the truth first, then the low dose and the arms.
        captions: name -> a short remark.
        marks: name -> boxes [n, 4] of what lies beyond the noise.
    """

    score: float
    arm: str
    case: Case
    images: dict[str, np.ndarray]
    captions: dict[str, str]
    marks: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(eq=False)
class LesionResults:
    """Results at one dose.

    Attributes:
        arms: arm -> figures, JSON-able.
        threshold: beyond it, a blob is an invention; in standard deviations, as the scores of maps.
        erased: cases with the worst erasures.
        invented: cases with the strongest inventions.
        maps: case -> arm -> float32 [h, w] score of one realisation without lesions, bright above and dark below zero.
    """

    arms: dict[str, Results]
    threshold: float
    erased: list[Shown]
    invented: list[Shown]
    maps: dict[str, dict[str, np.ndarray]]


class LesionAssessment:
    """Measures arms side by side on twins of cases, with and without lesions, at one dose.

    Args:
        options: of the assessment.
        arms: what restores, the low dose first.
        dose: of the twins.
        noisy: the cases' images have the noise of dose 1 already.
    """

    def __init__(self, options: AssessOptions, arms: Sequence[Arm], dose: float, *, noisy: bool = False) -> None:
        self.options, self.arms, self.dose = options, arms, dose
        self.simulation = options.simulation(dose, noisy=noisy)
        self._lesions: dict[str, list[Results]] = {arm.name: [] for arm in arms}
        self._peaks: dict[str, list[tuple[float, float]]] = {arm.name: [] for arm in arms}
        self._noise_peaks: list[np.ndarray] = []
        self._erased: list[Shown] = []
        self._invented: list[Shown] = []
        self._maps: dict[str, dict[str, np.ndarray]] = {}

    def measure(self, cases: Sequence[Case]) -> Iterator[None]:
        """Restore all cases; yields after each."""
        for number, case in enumerate(cases, 1):
            self._measure(case, number)
            yield

    def results(self) -> LesionResults:
        """All figures; which blobs count as inventions is decided by the noise of all cases."""
        height = threshold(np.concatenate(self._noise_peaks), self.options.false_alarm_rate)
        for shown in self._invented:
            shown.captions = {name: text for name, text in shown.captions.items() if name == shown.arm}
        figures = {
            arm.name: {
                "lesions": self._lesions[arm.name],
                "survival": survival([lesion["retained"] for lesion in self._lesions[arm.name]]),
                "survival_by_diameter": self._by("diameter_mm", arm.name),
                "survival_by_contrast": {
                    tissue: self._by("contrast_hu", arm.name, tissue)
                    for tissue in sorted({lesion["tissue"] for lesion in self._lesions[arm.name]})
                },
                "threshold": height,
                "false_alarm_rate": self.options.false_alarm_rate,
                "images": len(self._peaks[arm.name]),
                "bright": _rate([bright > height for bright, _ in self._peaks[arm.name]]),
                "dark": _rate([dark > height for _, dark in self._peaks[arm.name]]),
            }
            for arm in self.arms
        }
        invented = [shown for shown in self._invented if shown.score > height]
        return LesionResults(figures, height, self._erased, invented, self._maps)

    def _by(self, key: str, arm: str, tissue: str | None = None) -> list[Results]:
        chosen = [one for one in self._lesions[arm] if tissue in (None, one["tissue"])]
        return [
            {key: value, "survival": survival([one["retained"] for one in chosen if one[key] == value])}
            for value in sorted({one[key] for one in chosen})
        ]

    def _measure(self, case: Case, number: int) -> None:
        options, scene = self.options, case.scene
        calibration = scene.noise(self.simulation, range(CALIBRATION)).numpy()
        floor = NoiseFloor(scene.view, calibration, options.diameters, scene.spacing)
        self._noise_peaks.append(floor.peaks)
        retained: dict[str, list[np.ndarray]] = {arm.name: [] for arm in self.arms}
        peaks: dict[str, list[tuple[float, float]]] = {arm.name: [] for arm in self.arms}
        first: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        maps = self._maps.setdefault(f"{number}. {case.name}", {})
        view, signal = torch.from_numpy(scene.view), torch.from_numpy(case.signal)
        for realisations in batches(options.case_realisations, options.batch_size, first=CALIBRATION):
            absent = scene.noise(self.simulation, realisations).add_(view)
            scans = [
                Scan(f"dose{self.dose:g}_case{number}_{twin}", realisations[0] - CALIBRATION, options.case_realisations)
                for twin in ("without", "with")
            ]
            for arm in self.arms:
                twins = arm(absent, scans[0]).numpy(), arm(absent + signal, scans[1]).numpy()
                retained[arm.name].append(_retained(case, *twins))
                bright, dark = floor.excess(twins[0])
                peaks[arm.name] += zip(bright.max((1, 2)).tolist(), dark.max((1, 2)).tolist(), strict=True)
                first.setdefault(arm.name, (twins[0][0], twins[1][0], np.maximum(bright[0], dark[0])))
                maps.setdefault(arm.name, _map(bright[0], dark[0]))
        means = {name: np.concatenate(parts).mean(0) for name, parts in retained.items()}
        for name, values in means.items():
            self._peaks[name] += peaks[name]
            self._lesions[name] += [
                {
                    "case": case.name,
                    "diameter_mm": lesion.diameter,
                    "contrast_hu": lesion.contrast,
                    "tissue": lesion.tissue,
                    "retained": float(value),
                }
                for lesion, value in zip(case.lesions, values, strict=True)
            ]
        self._keep(case, means, first)

    def _keep(
        self,
        case: Case,
        retained: Mapping[str, np.ndarray],
        first: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]],
    ) -> None:
        """Keep the case for the report if it is among the worst so far."""
        judged = [arm.name for arm in self.arms[1:]] or [arm.name for arm in self.arms]
        worst = max(judged, key=lambda name: 1 - float(retained[name].min(initial=1.0)))
        images = {"truth": scene_with(case), **{name: with_lesions for name, (_, with_lesions, _) in first.items()}}
        captions = {name: f"least retained {values.min(initial=1.0):.0%}" for name, values in retained.items()}
        erased = Shown(1 - float(retained[worst].min(initial=1.0)), worst, case, images, captions)
        worst = max(judged, key=lambda name: float(first[name][2].max()))
        images = {"truth": case.scene.view, **{name: without for name, (without, _, _) in first.items()}}
        captions = {name: f"strongest blob {score.max():.1f} deviations" for name, (_, _, score) in first.items()}
        marks = {name: _boxes_of_peaks(score) for name, (_, _, score) in first.items()}
        invented = Shown(float(first[worst][2].max()), worst, case, images, captions, marks)
        for kept, new in ((self._erased, erased), (self._invented, invented)):
            kept.append(new)
            kept.sort(key=lambda shown: -shown.score)
            del kept[_SHOWN:]


def scene_with(case: Case) -> np.ndarray:
    """The field of view with its lesions and without added noise, HU."""
    return case.scene.view + case.signal


def _retained(case: Case, absent: np.ndarray, present: np.ndarray) -> np.ndarray:
    """[B, lesions] share of each lesion's contrast that is left."""
    columns = [retained_contrast(present[:, *window], absent[:, *window], patch) for window, patch in case.signals]
    return np.stack(columns, 1) if columns else np.zeros((len(absent), 0))


def _rate(flagged: Sequence[bool]) -> tuple[float, float, float]:
    """Fraction of images with its exact binomial interval."""
    low, high = stats.binomtest(sum(flagged), len(flagged)).proportion_ci()
    return sum(flagged) / len(flagged), float(low), float(high)


def _map(bright: np.ndarray, dark: np.ndarray) -> np.ndarray:
    """The stronger of two scores [H, W], dark ones negative: the strongest of each square of pixels."""
    signed = np.where(bright >= dark, np.maximum(bright, 0), -np.maximum(dark, 0))
    height, width = (side // _MAP_PIXELS * _MAP_PIXELS for side in signed.shape)
    squares = signed[:height, :width].reshape(height // _MAP_PIXELS, _MAP_PIXELS, width // _MAP_PIXELS, _MAP_PIXELS)
    squares = squares.transpose(0, 2, 1, 3).reshape(height // _MAP_PIXELS, width // _MAP_PIXELS, -1)
    strongest = np.abs(squares).argmax(-1)[..., None]
    return np.take_along_axis(squares, strongest, -1)[..., 0]


def _boxes_of_peaks(score: np.ndarray, half: int = 6) -> np.ndarray:
    """[1, 4] a box around the highest score."""
    y, x = np.unravel_index(score.argmax(), score.shape)
    height, width = score.shape
    return np.array([[max(x - half, 0), max(y - half, 0), min(x + half + 1, width), min(y + half + 1, height)]], float)
