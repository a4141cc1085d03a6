"""Results of an assessment for people: the table, the curves and the worst cases of the report."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from lidnet_fast.assessment.arms import LOW_DOSE
from lidnet_fast.assessment.lesions import LesionResults, Shown
from lidnet_fast.assessment.uniform import OBSERVERS
from lidnet_fast.report.data import Arm, Column, Curve, Metric, Panel, Report, ScoreMaps
from lidnet_fast.report.page import format_metric
from lidnet_fast.report.terminal import print_table

Results = dict[str, Any]

_SUMMARISED = "laguerre_gauss"
"""The observer that the table is about."""

COLUMNS = tuple(
    Column(key, label, form, unit, better, help_text, group)
    for group, members in {
        "noise": (
            ("noise", "magnitude", ".1f", "HU", None, "Standard deviation of a pixel."),
            ("mean_frequency", "mean frequency", ".3f", "1/mm", None, "Of the noise's power: lower is blotchier."),
        ),
        "resolution": (
            ("f50_low", "faintest disc", ".3f", "1/mm", True, "Where its task transfer function is 0.5."),
            ("f50_high", "strongest disc", ".3f", "1/mm", True, "The same."),
        ),
        "detectability": (
            ("auc", "mean AUC", ".3f", "", True, "Hotelling observer, Laguerre-Gauss channels, over all signals."),
            ("dose", "worth a dose of", ".2f", "", True, "Undenoised images of this dose have the same mean AUC."),
        ),
        "signals": (("bias", "bias", ".1f", "HU", False, "Root mean square over signals of the mean error inside."),),
        "lesions": (("survival", "survive", ".0%", "", True, "Those that keep half of their contrast or more."),),
        "inventions": (
            ("bright", "bright", ".0%", "", False, "Images with a bright blob that truth and noise don't explain."),
            ("dark", "dark", ".0%", "", False, "The same, dark."),
        ),
    }.items()
    for key, label, form, unit, better, help_text in members
)


def rows(content: Results, dose: float) -> dict[str, dict[str, Metric]]:
    """Arm -> figures of one dose, by column."""
    found: dict[str, dict[str, Metric]] = {}
    for name, by_dose in content["uniform"].items():
        uniform = by_dose[f"{dose:g}"]
        discs = sorted(uniform["resolution"], key=lambda disc: abs(disc["contrast_hu"]))
        equal = content["equal_detectability_dose"].get(name, {}).get(f"{dose:g}", {})
        lesions = content["lesions"][name].get(f"{dose:g}", {})
        found[name] = {
            "noise": _interval(uniform["noise"]["magnitude_hu"]),
            "mean_frequency": uniform["noise"]["mean_frequency"],
            "f50_low": _interval(discs[0]["f50"]),
            "f50_high": _interval(discs[-1]["f50"]),
            "auc": mean_auc(uniform, _SUMMARISED),
            "dose": dose if name == LOW_DOSE else equal.get(_SUMMARISED),
            "bias": float(np.sqrt(np.mean([row["bias_hu"][0] ** 2 for row in uniform["bias"]]))),
            **{key: _interval(lesions.get(key)) for key in ("survival", "bright", "dark")},
        }
    return found


def task_columns() -> list[Column]:
    """The table's columns next to those of other results."""
    return [replace(column, key=f"task_{column.key}", group=f"task: {column.group}") for column in COLUMNS]


def task_rows(content: Results) -> dict[str, dict[str, Metric]]:
    """Arm -> figures of the lowest dose, by the keys of `task_columns`."""
    found = rows(content, min(content["doses"]))
    return {name: {f"task_{key}": value for key, value in row.items()} for name, row in found.items()}


def print_results(content: Results) -> None:
    """Print the table of the lowest dose."""
    dose = min(content["doses"])
    cells = {
        name: {column.key: " ".join(filter(None, format_metric(row.get(column.key), column))) for column in COLUMNS}
        for name, row in rows(content, dose).items()
    }
    print_table({column.key: f"{column.group}\n{column.label}" for column in COLUMNS}, cells, f"At dose {dose:g}")


def build_report(content: Results, shown: LesionResults | None) -> Report:
    """Assemble the report.

    Args:
        content: of `assess.json`.
        shown: the cases for the reader's eyes, of the lowest dose; None where there are no cases.
    """
    dose = min(content["doses"])
    options = content["options"]
    found = rows(content, dose)
    known = [column for column in COLUMNS if any(row[column.key] is not None for row in found.values())]
    panels = [] if shown is None else [*map(_erased, shown.erased), *map(_invented, shown.invented)]
    facts = {
        name: ", ".join(f"{one:g}" for one in value) if isinstance(value, list) else value
        for name, value in options.items()
    }
    return Report(
        title="Task-based assessment",
        summary=f"{', '.join(list(content['arms'])[1:])}: table, spectra and images at dose {dose:g}. Uniform phantom "
        f"with {options['realisations']} realisations; lesions in {content['backgrounds']}.",
        columns=known,
        arms=[
            Arm(
                name,
                {column.key: row[column.key] for column in known},
                reference=name == LOW_DOSE,
                note=content["arms"][name],
            )
            for name, row in found.items()
        ],
        panels=panels,
        maps=[] if shown is None else [_maps(shown)],
        curves=list(_curves(content, dose)),
        facts={"assessment": facts, "machine": content["machine"]},
    )


def _maps(shown: LesionResults) -> ScoreMaps:
    limit = 2 * shown.threshold
    return ScoreMaps(
        "Where the truth doesn't explain what is seen, case by case",
        "Standard deviations of the noise, in one scan without lesions. In the outer halves of the colours, beyond "
        f"{shown.threshold:.1f}, a blob is an invention: orange a bright one, blue a dark one.",
        limit,
        shown.maps,
    )


def _curves(content: Results, dose: float) -> Iterable[Curve]:
    at = {name: by_dose[f"{dose:g}"] for name, by_dose in content["uniform"].items()}
    where, frequency = f"dose {dose:g}", "cycles per mm"
    power = {name: (one["noise"]["frequency"], one["noise"]["power"]) for name, one in at.items()}
    yield Curve(f"Noise power spectrum, {where}", frequency, "HU² mm²", power)
    discs = next(iter(at.values()))["resolution"]
    by_size = sorted(range(len(discs)), key=lambda number: abs(discs[number]["contrast_hu"]))
    for number in dict.fromkeys((by_size[0], by_size[-1])):
        of_disc = {name: one["resolution"][number] for name, one in at.items()}
        functions = {name: (one["frequency"], _numbers(one["ttf"])) for name, one in of_disc.items()}
        title = f"Task transfer function, {discs[number]['contrast_hu']:g} HU, {where}"
        yield Curve(title, frequency, "TTF", functions)
    f50 = {
        name: _points(
            (abs(one["resolution"][n]["contrast_hu"]), (one["resolution"][n]["f50"] or [None])[0]) for n in by_size
        )
        for name, one in at.items()
    }
    yield Curve(f"Resolution against contrast, {where}", "size of the contrast, HU", "f50, 1/mm", f50, log_x=True)
    for observer, title in OBSERVERS.items():
        yield _against_dose(content, f"Detectability: {title}", "mean AUC", partial(mean_auc, observer=observer))
    contrast = max(content["options"]["contrasts"], key=abs)
    for diameter in content["options"]["diameters"][:2]:
        value = partial(_dprime, diameter=diameter, contrast=contrast)
        yield _against_dose(content, f"Detectability of {diameter:g} mm at {contrast:g} HU", "d'", value)
    equal = {
        name: _points((float(d), value[_SUMMARISED]) for d, value in by_dose.items())
        for name, by_dose in content["equal_detectability_dose"].items()
    }
    equal = {"no gain": (content["doses"], content["doses"]), **equal}
    label = "dose of undenoised images"
    yield Curve("Dose at equal detectability", "dose", label, equal, log_x=True, log_y=True)
    lesions = {name: found[f"{dose:g}"] for name, found in content["lesions"].items() if f"{dose:g}" in found}
    if lesions:
        yield from _survival_curves(lesions, where)


def _survival_curves(lesions: Mapping[str, Results], where: str) -> Iterable[Curve]:
    sizes = {
        name: _points((row["diameter_mm"], row["survival"][0]) for row in one["survival_by_diameter"])
        for name, one in lesions.items()
    }
    yield Curve(f"Survival of lesions against size, {where}", "diameter, mm", "fraction", sizes)
    for tissue in next(iter(lesions.values()))["survival_by_contrast"]:
        contrasts = {
            name: _points((row["contrast_hu"], row["survival"][0]) for row in one["survival_by_contrast"][tissue])
            for name, one in lesions.items()
        }
        title = f"Survival of lesions in {tissue} against contrast, {where}"
        yield Curve(title, "contrast, HU", "fraction", contrasts, log_x=True)


def _against_dose(content: Results, title: str, label: str, value: Callable[[Results], float | None]) -> Curve:
    series = {
        name: _points((float(dose), value(one)) for dose, one in by_dose.items())
        for name, by_dose in content["uniform"].items()
    }
    return Curve(title, "dose", label, series, log_x=True)


def _erased(shown: Shown) -> Panel:
    return _panel(f"Most erased: {shown.case.name}, by {shown.arm}", shown)


def _invented(shown: Shown) -> Panel:
    return _panel(f"Invented beyond the noise: {shown.case.name}, by {shown.arm}", shown)


def _panel(title: str, shown: Shown) -> Panel:
    boxes = shown.case.boxes() if not shown.marks else np.zeros((0, 4))
    marks = {name: [(box, 1.0) for box in boxes] for name, boxes in shown.marks.items() if name == shown.arm}
    return Panel(title, shown.images, boxes.reshape(-1, 4), marks, shown.captions, (shown.arm, "truth"))


def mean_auc(uniform: Results, observer: str) -> float:
    """Mean area under the ROC curve of an observer over all signals."""
    return float(np.mean([row["auc"][0] for row in uniform["detectability"] if row["observer"] == observer]))


def _dprime(uniform: Results, diameter: float, contrast: float) -> float:
    return next(
        row["dprime"][0]
        for row in uniform["detectability"]
        if (row["diameter_mm"], row["contrast_hu"], row["observer"]) == (diameter, contrast, _SUMMARISED)
    )


def _interval(value: Sequence[float | None] | None) -> Metric:
    """A figure with its interval, or without where that is unknown."""
    if value is None or value[0] is None:
        return None
    mean, low, high = value
    return (
        (mean, low, high) if mean is not None and low is not None and high is not None and low <= mean <= high else mean
    )


def _points(pairs: Iterable[tuple[float, float | None]]) -> tuple[list[float], list[float]]:
    """Two axes of the points that have a value."""
    known = [(x, y) for x, y in pairs if y is not None]
    return [x for x, _ in known], [y for _, y in known]


def _numbers(values: Sequence[float | None]) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values])
