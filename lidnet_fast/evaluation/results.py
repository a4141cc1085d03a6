"""Results for people: the columns of the table, on a terminal and in the report."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import ArrayLike

from lidnet_fast.assessment.results import task_columns
from lidnet_fast.evaluation.arms import LOW_DOSE, NORMAL_DOSE, Evaluation, Example
from lidnet_fast.report.data import Arm, Column, Curve, Forest, Metric, Panel, Report
from lidnet_fast.report.terminal import print_table
from lidnet_fast.runtime import machine_facts
from lidnet_fast.trainer.config import RunConfig, to_dict
from lidnet_fast.trainer.run import curves

JUDGE, INDEPENDENT, COTRAINED = "judge", "independent", "cotrained"


def detector_columns(name: str, title: str, who: str) -> tuple[Column, ...]:
    """The columns of what a detector finds.

    Args:
        name: the detector's in the metrics.
        title: heading of its columns.
        who: the detector in words, for their explanation.
    """
    return tuple(
        Column(f"{name}_{key}", label, ".3f", "", True, f"{help_text} By {who}.", title)
        for key, label, help_text in (
            ("ap50", "AP@.5", "Average precision at IoU 0.5."),
            ("ap", "AP", "Average precision, mean over IoU 0.5 to 0.95."),
            ("froc_mean", "FROC", "Mean sensitivity at 1/8 to 8 false positives per image."),
            ("cpm", "CPM", "Of whole scans by LUNA16's rules: mean sensitivity at 1/8 to 8 false positives per scan."),
        )
    )


JUDGE_COLUMNS = detector_columns(
    JUDGE, "frozen judge", "the detector trained on normal dose, frozen before any denoiser saw it"
)
COTRAINED_COLUMNS = detector_columns(
    COTRAINED, "co-trained detector", "the detector trained together with this denoiser"
)
INDEPENDENT_WORDS = "a detector of another architecture that no denoiser was trained through"

IMAGE_COLUMNS = (
    Column("psnr", "PSNR", ".2f", "dB", True, "Peak signal-to-noise ratio over the window.", "whole image"),
    Column("ssim", "SSIM", ".3f", "", True, "Structural similarity, 11x11 Gaussian.", "whole image"),
    Column("rmse_hu", "RMSE", ".1f", "HU", False, "Root mean square error over the window.", "whole image"),
    Column("lesion_psnr", "PSNR", ".2f", "dB", True, "The same inside lesion boxes grown by 2 pixels.", "in lesions"),
    Column("lesion_ssim", "SSIM", ".3f", "", True, "Mean of the SSIM map inside lesion boxes.", "in lesions"),
    Column("lesion_rmse_hu", "RMSE", ".1f", "HU", False, "Root mean square error there.", "in lesions"),
    Column("lesion_bias_hu", "bias", "+.1f", "HU", None, "Mean signed error inside lesion boxes.", "in lesions"),
)
COLUMNS = (
    *IMAGE_COLUMNS,
    *JUDGE_COLUMNS,
    *detector_columns(INDEPENDENT, "independent judge", INDEPENDENT_WORDS),
    *COTRAINED_COLUMNS,
    *task_columns(),
)


def format_metric(column: Column, metric: Metric) -> str:
    """A table value as text: "28.31", "28.31 [28.02, 28.60]" or a dash."""
    if metric is None:
        return "–"
    if isinstance(metric, tuple):
        mean, low, high = (format(v, column.format) for v in metric)
        return f"{mean} [{low}, {high}]"
    return format(metric, column.format)


def present_columns(rows: Mapping[str, Mapping[str, Metric]], columns: Sequence[Column] = COLUMNS) -> list[Column]:
    """The columns for which at least one row has a value."""
    return [c for c in columns if any(row.get(c.key) is not None for row in rows.values())]


def print_results(rows: Mapping[str, Mapping[str, Metric]], title: str, columns: Sequence[Column] = COLUMNS) -> None:
    """Print the result table; AP@0.5 stands for the detectors, the rest is in the JSON and the report."""
    hidden = ("_ap", "_froc_mean", "rmse_hu")
    shown = present_columns(rows, columns)
    shown = [c for c in shown if not c.key.endswith(hidden) and not c.key.startswith("task_")]
    print_table(
        {c.key: f"{c.group}\n{c.label}" for c in shown},
        {name: {c.key: format_metric(c, row.get(c.key)) for c in shown} for name, row in rows.items()},
        title,
    )


def build_report(
    title: str,
    summary: str,
    config: RunConfig,
    rows: Mapping[str, Mapping[str, Metric]],
    examples: Sequence[Example],
    froc: Mapping[str, tuple[ArrayLike, ArrayLike]],
    phases: Mapping[str, Path],
    facts: Mapping[str, Any],
    highlight: str | None,
    others: Sequence[str] = (),
    notes: Mapping[str, str] | None = None,
    columns: Sequence[Column] = COLUMNS,
    forests: Sequence[Forest] = (),
) -> Report:
    """Assemble the report of an evaluation.

    Args:
        title: of the page.
        summary: one or two sentences on what was measured.
        config: the run's configuration.
        rows: arm -> flat metrics, as in the result table.
        examples: samples as the arms restored them.
        froc: arm -> false positives per image, sensitivities.
        phases: curve label -> folder of the phase's logs.
        facts: shown together with the machine's.
        highlight: the arm the report is about, if it's about one.
        others: the arms shown next to it in the panels.
        notes: arm -> a remark next to its name.
        columns: of the table, where a row has them.
        forests: differences between arms.
    """
    present = present_columns(rows, columns)
    known = {c.key for c in present}
    references = {LOW_DOSE, NORMAL_DOSE}
    arms = [
        Arm(
            name,
            {k: v for k, v in row.items() if k in known},
            highlight=name == highlight,
            reference=name in references,
            note=(notes or {}).get(name, ""),
        )
        for name, row in rows.items()
    ]
    return Report(
        title=title,
        summary=summary,
        columns=present,
        arms=arms,
        tradeoffs=_tradeoffs(known),
        forests=forests,
        panels=_panels(examples, [*others, *([] if highlight is None else [highlight])]),
        curves=_curves(phases),
        froc=froc,
        facts={**facts, "machine": machine_facts()},
        config=yaml.safe_dump(to_dict(config), sort_keys=False),
        window=(config.window.low, config.window.high),
    )


def froc_curves(evaluation: Evaluation) -> dict[str, tuple[ArrayLike, ArrayLike]]:
    """Arm -> false positives per image and sensitivities, by the frozen judge."""
    curves = {}
    for name, values in evaluation.metrics.items():
        curve = (values.get(JUDGE) or {}).get("curve")
        if curve is not None and len(curve["false_positives"]):
            curves[name] = curve["false_positives"], curve["sensitivity"]
    return curves


def _panels(examples: Sequence[Example], arms: Sequence[str]) -> list[Panel]:
    """The examples as these arms restored them, between low and normal dose; the difference is the last arm's."""
    shown = [LOW_DOSE, *arms, NORMAL_DOSE]
    panels = []
    for number, example in enumerate(examples, 1):
        found = {
            name: [
                (box.tolist(), float(score))
                for box, score in zip(
                    example.detections[name]["boxes"], example.detections[name]["scores"], strict=True
                )
                if score >= 0.1 and (box[2:] > box[:2]).all()
            ]
            for name in shown
            if name in example.detections
        }
        images = {name: example.images[name].numpy() for name in shown}
        title = f"Held-out sample {number}"
        panels.append(Panel(title, images, example.boxes.numpy(), found, {}, (shown[-2], NORMAL_DOSE)))
    return panels


def _tradeoffs(known: set[str]) -> Sequence[tuple[str, str]]:
    pairs = (("psnr", f"{JUDGE}_ap50"), ("lesion_psnr", f"{INDEPENDENT}_ap50"))
    return [pair for pair in pairs if set(pair) <= known]


_CHARTS = (
    ("val/psnr", "Validation PSNR", "dB"),
    ("val/lesion_psnr", "Validation PSNR in lesions", "dB"),
    ("val/ap50", "Validation AP@0.5", "AP@0.5"),
    ("collaborate/total", "Objective of the denoiser steps", "loss"),
    ("detector/total", "Detector loss on normal dose", "loss"),
)


def _curves(phases: Mapping[str, Path]) -> list[Curve]:
    logged = {label: curves(folder) for label, folder in phases.items()}
    charts = []
    for key, title, unit in _CHARTS:
        series = {label: values[key] for label, values in logged.items() if key in values}
        if series:
            charts.append(Curve(title, "step", unit, {k: (np.array(x), np.array(y)) for k, (x, y) in series.items()}))
    return charts
