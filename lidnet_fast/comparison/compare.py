"""`lidnet-fast compare`: the cells of a comparison, and what they say together."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from lidnet_fast.assessment.assess import assess as assess_models
from lidnet_fast.assessment.results import task_rows
from lidnet_fast.comparison.cells import Plan, do_all
from lidnet_fast.comparison.config import Comparison
from lidnet_fast.comparison.pages import PATIENTS, pages, summary
from lidnet_fast.comparison.tables import Table, as_json, collect, columns, write_csv
from lidnet_fast.data.store.reader import index_files
from lidnet_fast.errors import InputError
from lidnet_fast.evaluation.arms import write_metrics
from lidnet_fast.evaluation.evaluate import assessment_of
from lidnet_fast.evaluation.results import print_results
from lidnet_fast.files import as_private_as
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
        assess: add columns of `lidnet_fast.assessment`, of the first seed at the dose of the store.

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
    """Arm -> columns of task-based image quality. The classes that models name are the configuration's own."""
    at = (table.store, table.denoiser, table.seeds[0])
    tasks = {cell.arm: cell.task for cell in plan.cells if (cell.store, cell.denoiser, cell.seed) == at}
    run = tasks[table.trained[0]].run
    content = assess_models(
        [f"{arm}={tasks[arm].folder}" for arm in table.trained],
        plan.out / table.store / table.denoiser / "assessment",
        assessment_of(run),
        store=run.data.store,
        device=run.device,
        precision=run.precision,
        trust_code=True,
    )
    return task_rows(content)


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
