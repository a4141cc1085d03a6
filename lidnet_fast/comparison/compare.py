"""`lidnet-fast compare`: the cells of a comparison, and what they say together."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from lidnet_fast.assessment.arms import LOW_DOSE
from lidnet_fast.assessment.assess import FILES, RESULTS
from lidnet_fast.assessment.assess import assess as assess_models
from lidnet_fast.assessment.results import task_rows
from lidnet_fast.comparison.cells import TABLES, Plan, do_all
from lidnet_fast.comparison.config import Comparison
from lidnet_fast.comparison.pages import PATIENTS, pages, summary
from lidnet_fast.comparison.tables import Table, as_json, collect, columns, write_csv
from lidnet_fast.comparison.work import record_file
from lidnet_fast.data.store.reader import index_files
from lidnet_fast.device import choose_device
from lidnet_fast.errors import InputError
from lidnet_fast.evaluation.arms import write_metrics
from lidnet_fast.evaluation.evaluate import assessment_of
from lidnet_fast.evaluation.results import print_results
from lidnet_fast.files import as_private_as, remove
from lidnet_fast.report.data import Metric, mean_of
from lidnet_fast.report.page import write_report
from lidnet_fast.runtime import machine_facts


def compare(
    comparison: Comparison,
    out: Path,
    *,
    share: tuple[int, int] | None = None,
    only_collect: bool = False,
    assess: bool = False,
) -> list[Table]:
    """Do the cells that aren't done, then write tables of those that are.

    `metrics.json`, `metrics.csv` and reports come from whatever is there, and name what is missing.

    Args:
        comparison: what is compared.
        out: the folder; that of the same comparison goes on.
        share: (3, 16) does the third of sixteen equal parts of the cells, and writes no tables.
        only_collect: does no cell.
        assess: add columns of `lidnet_fast.assessment`, at the dose of the store: means over the seeds.

    Returns:
        The tables, as written.

    Raises:
        InputError: the folder holds cells of another configuration, none to collect, or tables of other stores.
    """
    if only_collect and not out.is_dir():
        raise InputError(f"there is no folder {out}, so there are no cells to collect")
    if not only_collect:
        choose_device(comparison.run.device)  # before a folder is made for what can't run
    stores = [file for store in comparison.matrix.stores.values() for file in index_files(store)]
    with as_private_as(stores):
        plan = Plan(comparison, out, replacing=only_collect or share is not None)
        if not only_collect:
            do_all(plan.tasks if share is None else plan.share(*share))
        if share is not None:
            done = sum(cell.task.done for cell in plan.cells)
            print(f"{done} of {len(plan.cells)} cells are done; `--collect` makes the tables")
            return []
        tables, missing = collect(plan)
        if assess:
            for table in tables:
                table.tasks.update(_assessed(plan, table))
        _write(plan, tables, missing)
    for table in tables:
        _print(table, plan)
    for name in missing:
        print(f"missing: {name}")
    return tables


def _assessed(plan: Plan, table: Table) -> dict[str, dict[str, Metric]]:
    """Arm -> columns of task-based image quality: of one seed as they are, of several their mean and its interval."""
    of_seeds = [task_rows(_assessment(plan, table, seed)) for seed in table.seeds]
    if len(of_seeds) == 1:
        return of_seeds[0]
    return {
        arm: {key: _over_seeds([mean_of(of_seed[arm][key]) for of_seed in of_seeds]) for key in row}
        for arm, row in of_seeds[0].items()
    }


def _assessment(plan: Plan, table: Table, seed: int) -> dict[str, Any]:
    """What `assess` says of a seed's arms, unless it has been said. Classes that models name are the user's own."""
    at = (table.store, table.denoiser, seed)
    tasks = {cell.arm: cell.task for cell in plan.cells if (cell.store, cell.denoiser, cell.seed) == at}
    run = tasks[table.trained[0]].run
    out = plan.out / table.store / f"seed{seed}" / table.denoiser / "assessment"
    study = plan.comparison.study(table.store)
    lesion_contrasts = None if study is None else study.lesion_contrasts
    options = replace(assessment_of(run), seed=seed, lesion_contrasts=lesion_contrasts)
    if (done := out / RESULTS).exists():
        content = json.loads(done.read_text(encoding="utf-8"))
        judged = [record_file(tasks[arm].folder, arm).stat().st_mtime for arm in table.trained]
        # What is open, such as the photons, is the store's own.
        chosen = json.loads(json.dumps({key: value for key, value in options.record().items() if value is not None}))
        same = {*content["arms"]} == {LOW_DOSE, *table.trained} and chosen == {
            key: content["options"].get(key) for key in chosen
        }
        if same and done.stat().st_mtime > max(judged):
            return content
    for name in FILES:  # of a comparison that has become another one
        remove(out / name)
    return assess_models(
        [f"{arm}={tasks[arm].folder}" for arm in table.trained],
        out,
        options,
        store=run.data.store,
        device=run.device,
        precision=run.precision,
        trust_code=True,
    )


def _over_seeds(values: Sequence[float | None]) -> Metric:
    """Mean with the 95 % interval of Student's t; None where a seed has no value."""
    found = np.array([np.nan if value is None else value for value in values])
    if np.isnan(found).any():
        return None
    error = stats.sem(found) * stats.t.ppf(0.975, len(found) - 1)
    return float(found.mean()), float(found.mean() - error), float(found.mean() + error)


def _write(plan: Plan, tables: Sequence[Table], missing: Sequence[str]) -> None:
    costs = {task.name: found for task in plan.tasks if (found := task.costs())}
    content = {
        "split": plan.comparison.split,
        "tables": [as_json(table) for table in tables],
        "missing": missing,
        "cost": costs,
        "machine": machine_facts(),
    }
    write_metrics(plan.out / TABLES, content)
    write_csv(plan.out / "metrics.csv", tables)
    for path, page in pages(plan, tables, missing, costs).items():
        write_report(path, page)
        print(f"Report: {path}")


def _print(table: Table, plan: Plan) -> None:
    shown = columns(plan.comparison.judges)
    patients = PATIENTS[plan.comparison.split]
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
