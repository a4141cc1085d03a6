"""From the records that are there to tables: every arm's metrics, and paired differences between arms."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lidnet_fast.comparison.cells import Cell, Plan
from lidnet_fast.comparison.records import Record
from lidnet_fast.comparison.statistics import Estimate, draws, estimate, plain_metrics
from lidnet_fast.comparison.work import BOUND, Task, record_file
from lidnet_fast.evaluation.arms import LOW_DOSE, NORMAL_DOSE
from lidnet_fast.evaluation.results import (
    COTRAINED,
    COTRAINED_COLUMNS,
    IMAGE_COLUMNS,
    INDEPENDENT_WORDS,
    JUDGE,
    JUDGE_COLUMNS,
    detector_columns,
)
from lidnet_fast.files import write_text
from lidnet_fast.progress import progress
from lidnet_fast.report.data import Column, Metric


@dataclass(frozen=True, eq=False)
class Table:
    """The arms of one denoiser on one store, between low and normal dose."""

    store: str
    denoiser: str
    seeds: list[int]
    """Those of which every arm of the table has a record."""
    arms: dict[str, dict[str, Estimate]]
    """Arm -> metric -> estimate: low dose, the arms in their order, normal dose."""
    records: dict[str, Record]
    """Arm -> record of the first seed."""
    by_seed: dict[int, dict[str, dict[str, float]]]
    """Seed -> arm -> metric -> value."""
    tasks: dict[str, dict[str, Metric]] = field(default_factory=dict)
    """Arm -> further columns, of `lidnet_fast.assessment`; empty where nobody asked for them."""

    @property
    def trained(self) -> list[str]:
        """The arms, the baseline first."""
        return [arm for arm in self.arms if arm not in (LOW_DOSE, NORMAL_DOSE)]

    def rows(self) -> dict[str, dict[str, Metric]]:
        """Arm -> metric -> value with its interval."""
        return {arm: {**_metrics(values), **self.tasks.get(arm, {})} for arm, values in self.arms.items()}

    def differences(self) -> dict[tuple[str, str], dict[str, Metric]]:
        """(later arm, earlier arm) -> metric -> paired difference, for all pairs in the order of the arms."""
        pairs = [(later, earlier) for place, later in enumerate(self.trained) for earlier in self.trained[:place]]
        return {(later, earlier): _metrics(_minus(self.arms[later], self.arms[earlier])) for later, earlier in pairs}


def _minus(one: Mapping[str, Estimate], other: Mapping[str, Estimate]) -> dict[str, Estimate]:
    return {key: value - other[key] for key, value in one.items() if key in other}


def _metrics(estimates: Mapping[str, Estimate]) -> dict[str, Metric]:
    return {name: one.metric() for name, one in estimates.items()}


def collect(plan: Plan) -> tuple[list[Table], list[str]]:
    """Tables of all records that there are, and the names of the pieces of work that aren't done.

    An arm without any record is left out of its table, and then every seed of which another has none: arms are only
    ever compared on the same seeds.
    """
    missing = [task.name for task in plan.tasks if not task.done]
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in plan.cells:
        groups.setdefault((cell.store, cell.denoiser), []).append(cell)
    tables = []
    for (store, denoiser), cells in progress(list(groups.items()), "statistics"):
        files = _files(plan, store, cells)
        seeds = [seed for seed in plan.comparison.matrix.seeds if all(seed in of for of in files.values())]
        if seeds and any(arm in files for arm in plan.comparison.arms):
            same_people = plan.comparison.study(store) is None
            table = _table(store, denoiser, seeds, files, same_people)
            _add_bounds(table, [cell for cell in cells if cell.seed in seeds], same_people)
            tables.append(table)
    return tables, missing


def _files(plan: Plan, store: str, cells: Sequence[Cell]) -> dict[str, dict[int, Path]]:
    """Arm -> seed -> record, of the arms that have one."""
    references: dict[int, Task] = {seed: task for (name, seed), task in plan.shared.items() if name == store}
    tasks = {LOW_DOSE: references}
    for cell in cells:
        tasks.setdefault(cell.arm, {})[cell.seed] = cell.task
    tasks[NORMAL_DOSE] = references
    places = {}
    for arm, of_seed in tasks.items():
        done = {seed: record_file(task.folder, arm) for seed, task in of_seed.items() if task.done}
        if done:
            places[arm] = done
    return places


def _table(
    store: str, denoiser: str, seeds: list[int], files: Mapping[str, Mapping[int, Path]], same_people: bool
) -> Table:
    drawn = None
    arms, first = {}, {}
    by_seed: dict[int, dict[str, dict[str, float]]] = {seed: {} for seed in seeds}
    for arm, of_seed in files.items():
        records = [Record.load(of_seed[seed]) for seed in seeds]
        drawn = drawn or draws([record.patient for record in records], same_people)
        arms[arm] = estimate(records, drawn)
        first[arm] = records[0]
        for seed, record in zip(seeds, records, strict=True):
            by_seed[seed][arm] = plain_metrics(record)
    return Table(store, denoiser, seeds, arms, first, by_seed)


def _add_bounds(table: Table, cells: Sequence[Cell], same_people: bool) -> None:
    """Add what judges trained on an arm's images find there, and the share of the closable gap that an arm closes.

    The gap of a judge is between what it finds in the baseline's images and the most that any detector of its kind,
    trained on any arm's images, found in these: what low dose doesn't hold, no loss can bring back.
    """
    baseline, *equipped = table.trained
    records: dict[tuple[str, str, str], list[Record]] = {}
    for cell in cells:
        for (judge, way), task in cell.bounds.items():
            if task.done and cell.arm in table.arms:
                record = Record.load(record_file(task.folder, cell.arm))
                records.setdefault((cell.arm, judge, way), []).append(record)
    best: dict[str, Estimate] = {}
    for (arm, judge, way), of_seeds in records.items():
        if len(of_seeds) == len(table.seeds):
            drawn = draws([record.patient for record in of_seeds], same_people)
            found = estimate(of_seeds, drawn)[f"{BOUND}_ap50"]
            table.arms[arm][f"{judge}_{way}_ap50"] = found
            if judge not in best or found.value > best[judge].value:
                best[judge] = found
    for judge, most in best.items():
        key = f"{judge}_ap50"
        gap = most - table.arms[baseline][key]
        for arm in equipped:
            gained = table.arms[arm][key] - table.arms[baseline][key]
            table.arms[arm][f"{judge}_closed"] = gained.share_of(gap)


def rows_of_cell(cell: Path) -> tuple[dict[str, dict[str, Metric]], int]:
    """What judges said of one cell and, on the same samples, of its seed's other arms, low and normal dose.

    Args:
        cell: its folder, `STORE/seed0/DENOISER/arms/ARM` in a comparison's.

    Returns:
        Arm -> metric -> value, this arm first, with intervals that say nothing of another training; and how many
        samples there are. Empty where the cell has no record.

    Raises:
        InputError: a record can't be read.
    """
    references = cell.parents[2] / "references"
    others = sorted(folder for folder in cell.parent.iterdir() if folder.is_dir() and folder != cell)
    places = {cell.name: cell, LOW_DOSE: references, **{folder.name: folder for folder in others}}
    places[NORMAL_DOSE] = references
    files = {arm: record_file(folder, arm) for arm, folder in places.items()}
    if not files[cell.name].is_file():
        return {}, 0
    records = {arm: Record.load(file) for arm, file in files.items() if file.is_file()}
    own = records[cell.name]
    drawn = draws([own.patient])
    alike = {arm: record for arm, record in records.items() if np.array_equal(record.patient, own.patient)}
    return {arm: _metrics(estimate([record], drawn)) for arm, record in alike.items()}, len(own.patient)


def columns(judges: Iterable[str]) -> list[Column]:
    """The columns of a comparison's tables."""
    independent = [column for name in judges for column in detector_columns(name, name, INDEPENDENT_WORDS)]
    return [*IMAGE_COLUMNS, *JUDGE_COLUMNS, *independent, *COTRAINED_COLUMNS]


def judges_in(row: Mapping[str, Metric]) -> list[str]:
    """The independent judges that an arm's metrics name."""
    names = [key.removesuffix("_ap50") for key in row if key.endswith("_ap50")]
    return [name for name in names if name not in (JUDGE, COTRAINED)]


def bound_columns(judges: Iterable[str]) -> list[Column]:
    """The columns of judges' bounds."""
    return [
        Column(f"{judge}_{key}", label, number, "", True, words, f"{title}, bound")
        for judge, title in {JUDGE: "frozen judge", **{name: name for name in judges}}.items()
        for key, label, number, words in (
            ("scratch_ap50", "start", ".3f", "AP@0.5 of a detector of this kind, trained on the arm's images."),
            ("tuned_ap50", "tuned", ".3f", "AP@0.5 of this judge, fine-tuned on the arm's images."),
            ("closed", "closed", ".0%", "Gain over the baseline, as a share of what any detector shows can be gained."),
        )
    ]


def as_json(table: Table) -> dict[str, Any]:
    """A table as plain types."""
    return {
        "store": table.store,
        "denoiser": table.denoiser,
        "arms": table.rows(),
        "differences": {f"{later} minus {earlier}": row for (later, earlier), row in table.differences().items()},
        "seeds": table.by_seed,
    }


def write_csv(path: Path, tables: Sequence[Table]) -> None:
    """One line per metric of an arm or of a difference: store, denoiser, arm, minus, metric, value, low, high."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(("store", "denoiser", "arm", "minus", "metric", "value", "low", "high"))
    for table in tables:
        rows = {(arm, ""): row for arm, row in table.rows().items()} | table.differences()
        for (arm, minus), row in rows.items():
            for metric, value in row.items():
                numbers = value if isinstance(value, tuple) else (value, None, None)
                lines.writerow((table.store, table.denoiser, arm, minus, metric, *numbers))
    write_text(path, text.getvalue())
