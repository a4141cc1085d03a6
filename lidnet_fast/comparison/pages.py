"""The reports of a comparison: a page for every store and denoiser, and one over all of them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lidnet_fast import backend
from lidnet_fast.assessment.results import task_columns
from lidnet_fast.comparison.cells import Plan
from lidnet_fast.comparison.records import Record, joined_examples
from lidnet_fast.comparison.statistics import froc_curve
from lidnet_fast.comparison.tables import Table, bound_columns, columns
from lidnet_fast.evaluation.arms import LOW_DOSE, NORMAL_DOSE
from lidnet_fast.evaluation.results import JUDGE, build_report, present_columns
from lidnet_fast.report.charts import FROC_TICKS
from lidnet_fast.report.data import Arm, Column, Forest, Metric, Report
from lidnet_fast.runtime import machine_facts

_FROC_POINTS = 129

PATIENTS = {"val": "validation", "test": "test"}
"""Split -> whose patients judge, in words."""


def pages(
    plan: Plan, tables: Sequence[Table], missing: Sequence[str], costs: Mapping[str, Mapping[str, Any]]
) -> dict[Path, Report]:
    """Where each page belongs; one over all tables, where the comparison has several, is in its folder itself.

    Args:
        plan: the comparison.
        tables: of what is there.
        missing: names of the pieces of work that aren't done.
        costs: piece of work -> phase -> "seconds" and "peak_memory_mb".
    """
    first = plan.out / "report.html"
    several = len(plan.comparison.names) * len(plan.comparison.denoisers) > 1
    found = {first: _overview(plan, tables, missing)} if several and tables else {}
    for table in tables:
        place = plan.out / table.store / table.denoiser / "report.html" if several else first
        found[place] = _page(plan, table, missing, costs)
    return found


def _overview(plan: Plan, tables: Sequence[Table], missing: Sequence[str]) -> Report:
    """All tables in one, and the gains of the last arm over the others on all stores."""
    shown = columns(plan.comparison.judges)
    rows: dict[str, dict[str, Metric]] = {}
    arms = []
    for table in tables:
        for arm, row in table.rows().items():
            name = f"{table.store}, {arm if arm in (LOW_DOSE, NORMAL_DOSE) else f'{table.denoiser}: {arm}'}"
            if name not in rows:  # low and normal dose are the same for all denoisers
                rows[name] = {column.key: row[column.key] for column in shown if column.key in row}
                reference = arm in (LOW_DOSE, NORMAL_DOSE)
                arms.append(Arm(name, rows[name], highlight=arm == table.trained[-1], reference=reference))
    forests = []
    for column in shown:
        if column.key in ("psnr", "lesion_psnr") or column.key.endswith("_ap50"):
            groups = {}
            for table in tables:
                differences, (*others, last) = table.differences(), table.trained
                gains = {f"{last} over {arm}": differences[last, arm].get(column.key) for arm in others}
                groups[f"{table.store}, {table.denoiser}"] = gains
            forests.append(Forest(f"{column.label}, {column.group}", column.label, column.unit, groups))
    return Report(
        title="Comparison",
        summary=" ".join(
            f"{table.store}, {table.denoiser}: {summary(table, plan.comparison.judges)}" for table in tables
        ),
        # No best value is marked: rows are of different stores.
        columns=[replace(column, higher_is_better=None) for column in present_columns(rows, shown)],
        arms=arms,
        forests=forests,
        facts={**({"missing": dict.fromkeys(missing, "not done")} if missing else {}), "machine": machine_facts()},
    )


def _page(plan: Plan, table: Table, missing: Sequence[str], costs: Mapping[str, Mapping[str, Any]]) -> Report:
    comparison = plan.comparison
    cells = {
        cell.arm: cell.task
        for cell in plan.cells
        if (cell.store, cell.denoiser, cell.seed) == (table.store, table.denoiser, table.seeds[0])
    }
    first = next(iter(cells.values()))
    seed = f"{table.store}, seed {table.seeds[0]}"
    spent = {
        name: phases for name, phases in costs.items() if name.startswith((f"{seed}:", f"{seed}, {table.denoiser}:"))
    }
    facts: dict[str, Any] = {
        "comparison": {
            "store": table.store,
            "denoiser": table.denoiser,
            "seeds": ", ".join(map(str, table.seeds)),
            "samples per seed": first.run.evaluation.samples,
            "patients of": PATIENTS[comparison.split],
            "ops": backend.current(),
        },
        "seconds": {name: round(sum(p["seconds"] for p in phases.values()), 1) for name, phases in spent.items()},
        "peak memory, MiB": {
            name: round(max(p["peak_memory_mb"] for p in phases.values())) for name, phases in spent.items()
        },
    }
    if missing:
        facts["missing"] = dict.fromkeys(missing, "not done")
    arms = table.trained
    return build_report(
        f"{table.denoiser} on {table.store}",
        summary(table, comparison.judges),
        first.run,
        table.rows(),
        joined_examples(table.records),
        {arm: _froc(record) for arm, record in table.records.items() if len(record.lesion_image)},
        {
            "detector": first.detector.folder / "detector",
            "warm-up": first.warm_up.folder / "denoiser",
            **{arm: task.folder / "collaborate" for arm, task in cells.items()},
        },
        facts,
        arms[-1],
        arms[:1] if len(arms) > 1 else [],
        columns=[*columns(comparison.judges), *bound_columns(comparison.judges), *task_columns()],
        forests=_forests(table, columns(comparison.judges)),
    )


def _forests(table: Table, shown: Sequence[Column]) -> list[Forest]:
    """The gains over the baseline, and those of the last arm over all others."""
    baseline, *equipped = table.trained
    differences = table.differences()
    found = [column for column in shown if column.key.endswith("_ap50")]
    image = [column for column in shown if column.key in ("psnr", "lesion_psnr")]

    def forest(title: str, chosen: Sequence[Column], pairs: Mapping[str, tuple[str, str]]) -> Forest:
        rows = {
            column.group: {name: differences[pair].get(column.key) for name, pair in pairs.items()} for column in chosen
        }
        return Forest(title, chosen[0].label, chosen[0].unit, rows)

    over = {arm: (arm, baseline) for arm in equipped}
    made = [forest(f"{some[0].label} gained over {baseline}", some, over) for some in (found, image) if equipped]
    if len(equipped) > 1:
        last = {f"over {arm}": (equipped[-1], arm) for arm in table.trained[:-1]}
        made.append(forest(f"AP@.5 of {equipped[-1]}", found, last))
    return made


def _froc(record: Record) -> tuple[np.ndarray, np.ndarray]:
    """The frozen judge's FROC curve where the report shows it."""
    ones = np.ones((1, len(record.patient)))
    (false_positives,), (sensitivity,) = froc_curve(record.detectors[JUDGE], ones, ones[:, record.lesion_image])
    last = np.append(np.diff(false_positives) > 0, True)
    shown = np.geomspace(FROC_TICKS[0], FROC_TICKS[-1], _FROC_POINTS)
    return shown, np.interp(shown, false_positives[last], sensitivity[last])


def summary(table: Table, judges: Iterable[str]) -> str:
    """The result in one sentence: the last arm against the baseline."""
    baseline, last = table.trained[0], table.trained[-1]
    if baseline == last:
        return f"Of the arms, only {last} is done."

    def gain(key: str) -> float:
        return table.arms[last][key].value - table.arms[baseline][key].value

    words = {JUDGE: "the frozen judge", **{name: name for name in judges}}
    found = [f"{gain(f'{name}_ap50'):+.3f} for {who}" for name, who in words.items()]
    return (
        f"Against {baseline} from the same start, {last} changes AP@0.5 by {' and by '.join(found)}, PSNR in lesions "
        f"by {gain('lesion_psnr'):+.2f} dB and PSNR by {gain('psnr'):+.2f} dB (seeds: {len(table.seeds)})."
    )
