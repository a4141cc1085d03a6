"""`lidnet-fast compare`: the cells of a comparison, and what they say together."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lidnet_fast import backend
from lidnet_fast.comparison.cells import Plan, do_all
from lidnet_fast.comparison.config import Comparison
from lidnet_fast.comparison.records import Record, joined_examples
from lidnet_fast.comparison.statistics import froc_curve
from lidnet_fast.comparison.tables import Table, as_json, collect, columns, write_csv
from lidnet_fast.data.store.reader import index_files
from lidnet_fast.errors import InputError
from lidnet_fast.evaluation.arms import write_metrics
from lidnet_fast.evaluation.results import JUDGE, build_report, print_results
from lidnet_fast.files import as_private_as
from lidnet_fast.report.charts import FROC_TICKS
from lidnet_fast.report.data import Column, Forest, Metric, Report, mean_of
from lidnet_fast.report.page import write_report
from lidnet_fast.runtime import machine_facts

_FROC_POINTS = 129


def compare(
    comparison: Comparison, out: Path, *, share: tuple[int, int] | None = None, only_collect: bool = False
) -> list[Table]:
    """Do the cells that aren't done, then write tables of those that are.

    `metrics.json`, `metrics.csv` and a report per store and denoiser come from whatever is there, and name what is
    missing.

    Args:
        comparison: what is compared.
        out: the folder; that of the same comparison goes on.
        share: (3, 16) does the third of sixteen equal parts of the cells, and writes no tables.
        only_collect: does no cell.

    Returns:
        The tables, as written.

    Raises:
        InputError: the folder holds cells of another configuration, or none to collect.
    """
    if only_collect and not out.is_dir():
        raise InputError(f"there is no folder {out}, so there are no cells to collect")
    stores = [file for store in comparison.matrix.stores.values() for file in index_files(store)]
    with as_private_as(stores):
        plan = Plan(comparison, out)
        if not only_collect:
            do_all(plan.tasks if share is None else plan.share(*share))
        if share is not None:
            done = sum(cell.task.done for cell in plan.cells)
            print(f"{done} of {len(plan.cells)} cells are done; `--collect` makes the tables")
            return []
        tables, missing = collect(plan)
        _write(plan, tables, missing)
    for table in tables:
        _print(table, plan)
    for name in missing:
        print(f"missing: {name}")
    return tables


def _write(plan: Plan, tables: Sequence[Table], missing: Sequence[str]) -> None:
    costs = {task.name: found for task in plan.tasks if (found := task.costs())}
    content = {
        "split": plan.comparison.split,
        "tables": [as_json(table) for table in tables],
        "missing": missing,
        "cost": costs,
        "machine": machine_facts(),
    }
    write_metrics(plan.out / "metrics.json", content)
    write_csv(plan.out / "metrics.csv", tables)
    for table in tables:
        path = report_file(plan, table)
        write_report(path, _report(plan, table, missing, costs))
        print(f"Report: {path}")


def report_file(plan: Plan, table: Table) -> Path:
    """The report of a table: in the comparison's folder itself, where there is one table only."""
    only_one = len(plan.comparison.names) * len(plan.comparison.denoisers) == 1
    return (plan.out if only_one else plan.out / table.store / table.denoiser) / "report.html"


def _report(plan: Plan, table: Table, missing: Sequence[str], costs: Mapping[str, Mapping[str, Any]]) -> Report:
    comparison = plan.comparison
    cells = {
        cell.arm: cell.task
        for cell in plan.cells
        if (cell.store, cell.denoiser, cell.seed) == (table.store, table.denoiser, table.seeds[0])
    }
    first = next(iter(cells.values()))
    spent = {name: phases for name, phases in costs.items() if name.startswith(f"{table.store}, seed {table.seeds[0]}")}
    facts: dict[str, Any] = {
        "comparison": {
            "store": table.store,
            "denoiser": table.denoiser,
            "seeds": ", ".join(map(str, table.seeds)),
            "samples per seed": first.run.evaluation.samples,
            "patients of": {"val": "validation", "test": "test"}[comparison.split],
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
        columns=columns(list(comparison.judges)),
        forests=_forests(table, columns(list(comparison.judges))),
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


def _print(table: Table, plan: Plan) -> None:
    shown = columns(list(plan.comparison.judges))
    patients = {"val": "validation", "test": "test"}[plan.comparison.split]
    title = f"{table.denoiser} on {table.store}: {patients} patients, {len(table.seeds)} seed(s)"
    means = {arm: {key: mean_of(value) for key, value in row.items()} for arm, row in table.rows().items()}
    print_results(means, title, shown)
    *others, last = table.trained
    if not others:
        return
    gains: dict[str, Mapping[str, Metric]] = {
        f"{last} minus {other}": table.differences()[last, other] for other in others
    }
    print_results(gains, "Paired differences, 95 % intervals", shown)
    print(summary(table, plan.comparison.judges))


def summary(table: Table, judges: Iterable[str]) -> str:
    """The result in one sentence: the last arm against the baseline."""
    baseline, last = table.trained[0], table.trained[-1]

    def gain(key: str) -> float:
        means = [table.arms[arm][key].value if key in table.arms[arm] else math.nan for arm in (last, baseline)]
        return means[0] - means[1]

    words = {JUDGE: "the frozen judge", **{name: name for name in judges}}
    found = [f"{gain(f'{name}_ap50'):+.3f} for {who}" for name, who in words.items()]
    return (
        f"Against {baseline} from the same start, {last} changes AP@0.5 by {' and by '.join(found)}, PSNR in lesions "
        f"by {gain('lesion_psnr'):+.2f} dB and PSNR by {gain('psnr'):+.2f} dB (seeds: {len(table.seeds)})."
    )
