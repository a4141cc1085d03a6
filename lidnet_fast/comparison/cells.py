"""A comparison's cells (store x seed x denoiser x arm), what they need, and how processes share them.

Everything lies in one folder, and every piece of work in a folder of its own in it:

    STORE/seed0/study                    an embedded study's phantoms
    STORE/seed0/detector, judges/NAME    trained once for all denoisers and arms
    STORE/seed0/critics/NAME             the detector of arms that begin with another one
    STORE/seed0/references               records of low and normal dose
    STORE/seed0/DENOISER/warm-up         trained once for all arms
    STORE/seed0/DENOISER/arms/ARM        the cell: a run, as `train` makes it, and its record
    STORE/seed0/DENOISER/bounds/ARM/...  judges trained on the cell's images

A file next to each (`detector.lock`) is locked by the process that works there. Its lock ends with the process, so that
another goes on where a killed one stopped.
"""

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import yaml
from filelock import FileLock, Timeout

from lidnet_fast.comparison.config import Comparison
from lidnet_fast.comparison.work import (
    JudgeReferences,
    MakeStudy,
    Task,
    TrainArm,
    TrainBound,
    TrainDetector,
    TrainJudge,
    WarmUp,
)
from lidnet_fast.device import choose_device, choose_precision
from lidnet_fast.errors import InputError
from lidnet_fast.evaluation.results import JUDGE
from lidnet_fast.files import is_temporary, make_folder, write_text
from lidnet_fast.models.registry import NetworkConfig
from lidnet_fast.progress import overall_progress
from lidnet_fast.results_folder import refuse_to_lose
from lidnet_fast.trainer.config import CollaborateConfig, DenoiserConfig, ObjectiveConfig, RunConfig

WAYS = {"scratch": 1.0, "tuned": 0.2}
"""How a judge is trained on an arm's images -> its learning rate, as a share of the detector phase's."""

TABLES = "metrics.json"
_CONFIG, _LOCK = "compare.yaml", "compare.lock"
_POLL_SECONDS = 1.0


@dataclass(frozen=True)
class Cell:
    """One combination, and the piece of work that it is."""

    store: str
    seed: int
    denoiser: str
    arm: str
    task: TrainArm
    bounds: dict[tuple[str, str], TrainBound]
    """(judge, way of training) -> the judge trained on this cell's images."""


class Plan:
    """Everything that a comparison consists of, in its folder.

    Args:
        comparison: what is compared.
        out: the folder, which is made.
        replacing: tables that are there, of other stores or studies, may be replaced.

    Raises:
        InputError: the folder holds cells of another configuration, or tables of other stores or studies.
    """

    def __init__(self, comparison: Comparison, out: Path, *, replacing: bool = True) -> None:
        self.out = out
        self.cells: list[Cell] = []
        self.shared: dict[tuple[str, int], JudgeReferences] = {}
        """What all arms of a store and seed are set against: the records of low and normal dose."""
        began = out / _CONFIG
        if (
            out.is_dir()
            and not began.exists()
            and any(path.name != _LOCK and not is_temporary(path) for path in out.iterdir())
        ):
            raise InputError(f"{out} is not empty and holds no comparison: choose another --out")
        with FileLock(make_folder(out) / _LOCK):
            self.comparison = _in_precision_of(began, comparison)
            for seed in comparison.matrix.seeds:  # first, so that tables of all stores are there early
                for name in comparison.names:
                    self._add(name, seed)
            try:
                for task in self.tasks:
                    task.check()
            except InputError as error:
                raise InputError(
                    f"{error}. What its cells began with, which may be another version's defaults, is in {began}: "
                    f"`lidnet-fast compare --config {began} --out {out}` goes on with it"
                ) from error
            if not replacing:
                refuse_to_lose(
                    out,
                    [TABLES],
                    {f"tables of {name}": True for name in self.comparison.names},
                    lambda content: {f"tables of {table['store']}": True for table in content["tables"]},
                    "To fix: choose another --out, name these too, or make tables without them by --collect",
                )
            write_text(began, yaml.safe_dump(self.comparison.record(), sort_keys=False))

    @cached_property
    def tasks(self) -> list[Task]:
        """All pieces of work, each after those that it needs."""
        return self._work_of(self.cells)

    def share(self, number: int, shares: int) -> list[Task]:
        """The pieces of work of one of so many equal shares of the cells, counted from 1."""
        first, last = ((k * len(self.cells)) // shares for k in (number - 1, number))
        return self._work_of(self.cells[first:last])

    def _work_of(self, cells: Sequence[Cell]) -> list[Task]:
        arms = [task for cell in cells for task in (self.shared[cell.store, cell.seed], cell.task)]
        return _ordered([*arms, *(bound for cell in cells for bound in cell.bounds.values())])

    def _add(self, name: str, seed: int) -> None:
        comparison, folder = self.comparison, self.out / name / f"seed{seed}"
        title = f"{name}, seed {seed}"
        study = comparison.study(name)
        made = () if study is None else (MakeStudy(f"{title}: phantoms", folder / "study", (), study, seed),)
        store = folder / "study" / "store"
        plain = _without_denoiser(comparison.configured(name, seed, store))
        detector = TrainDetector(f"{title}: detector", folder / "detector", made, _at(plain, folder / "detector"))
        judges: dict[str, tuple[TrainDetector | TrainJudge, NetworkConfig]] = {
            JUDGE: (detector, plain.detector.network)
        }
        for judge, network in comparison.judges.items():
            place = folder / "judges" / judge
            run = _at(replace(plain, independent_judge=network), place)
            judges[judge] = TrainJudge(f"{title}: {judge}", place, made, run), network
        trained = tuple(task for task, _ in judges.values())
        self.shared[name, seed] = JudgeReferences(
            f"{title}: references", folder / "references", trained, plain, judges, comparison.split
        )
        critics: dict[str, TrainDetector] = {}
        for denoiser in comparison.denoisers:
            title = f"{name}, seed {seed}, {denoiser}"
            place = folder / denoiser / "warm-up"
            run = _at(_without_objective(comparison.configured(name, seed, store, denoiser)), place)
            warm_up = WarmUp(f"{title}: warm-up", place, made, run)
            for arm in comparison.arms:
                place = folder / denoiser / "arms" / arm
                run = _at(comparison.configured(name, seed, store, denoiser, arm), place)
                start = detector
                if run.detector != plain.detector:
                    critic = folder / "critics" / run.detector.name
                    start = critics.setdefault(
                        run.detector.name,
                        TrainDetector(
                            f"{name}, seed {seed}: critic {run.detector.name}",
                            critic,
                            made,
                            _at(replace(plain, detector=run.detector), critic),
                        ),
                    )
                    if start.run.detector != run.detector:
                        raise InputError(f"arms begin with two detectors of the name {run.detector.name}: use one")
                needs = (*trained, start, warm_up)
                task = TrainArm(f"{title}: {arm}", place, needs, run, judges, comparison.split, start, warm_up, arm)
                bounds = self._bounds(task, judges, plain, folder / denoiser / "bounds" / arm)
                self.cells.append(Cell(name, seed, denoiser, arm, task, bounds if comparison.matrix.bound else {}))

    def _bounds(
        self,
        cell: TrainArm,
        judges: Mapping[str, tuple[TrainDetector | TrainJudge, NetworkConfig]],
        plain: RunConfig,
        folder: Path,
    ) -> dict[tuple[str, str], TrainBound]:
        bounds = {}
        for judge, (trained, network) in judges.items():
            for way, share in WAYS.items():
                place = folder / f"{judge}-{way}"
                detector = replace(
                    plain.detector,
                    name=network.name,
                    options=network.options,
                    learning_rate=plain.detector.learning_rate * share,
                )
                run = _at(replace(plain, detector=detector), place)
                begin = trained if way == "tuned" else None
                title = f"{cell.name}: {judge} {way}"
                bounds[judge, way] = TrainBound(title, place, (cell,), run, {}, cell.split, cell, begin)
        return bounds


def do_all(tasks: Sequence[Task]) -> None:
    """Do all pieces of work, together with what other processes do in the same folder."""
    total = sum(task.steps for task in tasks)
    with overall_progress(total) as show:
        while pending := [task for task in tasks if not task.done]:
            before = total - sum(task.steps for task in pending)
            ready = (task for task in pending if all(need.done for need in task.needs))
            if not any(_did(task, partial(_show_part, show, before, task.name)) for task in ready):
                show(before, "waiting for other processes")
                time.sleep(_POLL_SECONDS)


def _show_part(show: Callable[[int, str], None], before: int, name: str, steps: int) -> None:
    show(before + steps, name)


def _did(task: Task, show: Callable[[int], None]) -> bool:
    """Do a piece of work, unless another process is at it."""
    make_folder(task.folder.parent)
    lock = FileLock(task.folder.with_name(f"{task.folder.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    try:
        if not task.done:
            show(0)
            task.work(show)
    finally:
        lock.release()
    return True


def parse_share(text: str) -> tuple[int, int]:
    """The numbers of "3/16".

    Raises:
        InputError: it isn't such a share.
    """
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    number, shares = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= number <= shares:
        raise InputError(f"--cells {text}: a share such as 3/16 is needed, the third of sixteen")
    return number, shares


def _ordered(tasks: Sequence[Task]) -> list[Task]:
    """The tasks and all that they need, what is needed first."""
    ordered: dict[Task, None] = {}
    for task in tasks:
        for need in (*_ordered(task.needs), task):
            ordered.setdefault(need)
    return list(ordered)


def _at(run: RunConfig, folder: Path) -> RunConfig:
    return replace(run, out=str(folder))


def _without_denoiser(run: RunConfig) -> RunConfig:
    """What doesn't concern a detector at its default, so that all denoisers and arms can share it."""
    return replace(run, denoiser=DenoiserConfig(), collaborate=CollaborateConfig(), balance="none", ema_decay=0.0)


def _without_objective(run: RunConfig) -> RunConfig:
    """As `_without_denoiser`, of a warm-up."""
    pixel = ObjectiveConfig(pixel=run.collaborate.objective.pixel)
    return replace(run, collaborate=CollaborateConfig(objective=pixel), balance="none")


def _in_precision_of(began: Path, comparison: Comparison) -> Comparison:
    """The arithmetic of all cells: where the configuration leaves it open, that of the machine which began them."""
    run = comparison.run
    if run.precision != "auto":
        return comparison
    if began.exists():
        precision = yaml.safe_load(began.read_text(encoding="utf-8"))["precision"]
    else:
        precision = choose_precision(run.precision, choose_device(run.device))
    return replace(comparison, run=replace(run, precision=precision))
