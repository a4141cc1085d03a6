"""The pieces of work of a comparison: each has a folder of its own, is done once, and resumes where it stopped."""

import abc
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import lightning as L
import numpy as np

from lidnet_fast.comparison.records import Record
from lidnet_fast.data.phantoms.study import Study, make_study
from lidnet_fast.data.store.reader import Store
from lidnet_fast.device import choose_device
from lidnet_fast.evaluation.arms import Arm, evaluate, network_arm, reference_arms
from lidnet_fast.evaluation.results import COTRAINED
from lidnet_fast.files import whole_path
from lidnet_fast.models.files import load_denoiser, load_detector
from lidnet_fast.models.lesion_detector import LesionDetector
from lidnet_fast.models.registry import NetworkConfig
from lidnet_fast.runtime import recorded_cost
from lidnet_fast.trainer.config import RunConfig
from lidnet_fast.trainer.run import Run, check_folder

BOUND = "bound"
"""A bound's detector in its record."""

Advance = Callable[[int], None]
"""Says how much of a piece of work is done, in training steps."""


@dataclass(frozen=True, eq=False)
class Task(abc.ABC):
    """A piece of work that one process at a time does, in a folder of its own."""

    name: str
    folder: Path
    needs: tuple["Task", ...]

    @property
    @abc.abstractmethod
    def done(self) -> bool:
        """Whether its result is there."""

    @property
    def steps(self) -> int:
        """How long it is, in training steps."""
        return 1

    @abc.abstractmethod
    def work(self, advance: Advance) -> None:
        """Do what isn't done yet."""

    def check(self) -> None:  # noqa: B027  # not every piece of work has something to check
        """Refuse a folder that holds something else.

        Raises:
            InputError: names what differs.
        """

    def costs(self) -> dict[str, dict[str, float]]:
        """What was measured of it: phase -> "seconds" and "peak_memory_mb"."""
        found = sorted(self.folder.glob("*/cost.json"))
        return {path.parent.name: json.loads(path.read_text(encoding="utf-8")) for path in found}


@dataclass(frozen=True, eq=False)
class MakeStudy(Task):
    """The phantoms of an embedded study."""

    study: Study
    seed: int

    @property
    def done(self) -> bool:
        """Whether the store is there."""
        return (self.folder / "store").exists()

    def work(self, advance: Advance) -> None:
        """Make and scan the phantoms."""
        with recorded_cost(self.folder / "making" / "cost.json"):
            make_study(self.folder / "store", self.study, self.seed)


@dataclass(frozen=True, eq=False)
class _Training(Task):
    """A phase of a run."""

    run: RunConfig

    @property
    @abc.abstractmethod
    def network(self) -> Path:
        """The trained network's file."""

    @property
    def done(self) -> bool:
        """Whether the network is there."""
        return self.network.exists()

    def check(self) -> None:
        """Refuse another run's folder."""
        if self.folder.exists():
            check_folder(self.run)

    def _begun(self, advance: Advance) -> Run:
        return Run(self.run, [_Steps(advance)])


class TrainDetector(_Training):
    """The detector, on normal dose: the judge that the arms begin their own from, frozen."""

    network = property(lambda self: self.folder / "detector" / "detector.pt")
    steps = property(lambda self: self.run.detector.steps)

    def work(self, advance: Advance) -> None:
        """Train it."""
        self._begun(advance).train_detector()


class TrainJudge(_Training):
    """An independent judge, on normal dose."""

    network = property(lambda self: self.folder / "independent_judge" / "detector.pt")
    steps = property(lambda self: self.run.detector.steps)

    def work(self, advance: Advance) -> None:
        """Train it."""
        self._begun(advance).train_independent_judge()


class WarmUp(_Training):
    """The denoiser that all arms of a seed start from."""

    network = property(lambda self: self.folder / "denoiser" / "denoiser.pt")
    steps = property(lambda self: self.run.denoiser.steps)

    def work(self, advance: Advance) -> None:
        """Train it."""
        self._begun(advance).train_denoiser()


@dataclass(frozen=True, eq=False)
class _Judging(Task):
    """What ends with records of restored images."""

    run: RunConfig
    judges: Mapping[str, tuple[_Training, NetworkConfig]]
    """Name -> where it is trained, and its network."""
    split: Literal["val", "test"]

    def _judge(self, arms: Callable[[dict[str, LesionDetector]], list[Arm]]) -> None:
        device = choose_device(self.run.device)
        judges = {name: load_detector(task.network, network) for name, (task, network) in self.judges.items()}
        judges = {name: judge.to(device) for name, judge in judges.items()}
        with recorded_cost(self.folder / "evaluation" / "cost.json"):
            shown = arms(judges)
            evaluation = evaluate(self.run, shown, device, split=self.split)
            ids = [info.patient_id for info in Store(self.run.data.store).series]
            _, number = np.unique(ids, return_inverse=True)
            patients = [number[sample[0]] for sample in evaluation.samples]
            for arm in shown:
                Record.of(evaluation, arm.name, patients).save(record_file(self.folder, arm.name))

    def _has(self, arm: str, *others: str) -> bool:
        path = record_file(self.folder, arm)
        return path.exists() and {*self.judges, *others} <= set(Record.detectors_in(path))


class JudgeReferences(_Judging):
    """Low dose and normal dose as they are: the two ends of the scale."""

    @property
    def done(self) -> bool:
        """Whether both records are there, by all judges."""
        return all(self._has(arm.name) for arm in reference_arms({}))

    def work(self, advance: Advance) -> None:
        """Judge both."""
        self._judge(lambda judges: list(reference_arms(judges)))


@dataclass(frozen=True, eq=False)
class TrainArm(_Judging):
    """A cell: the joint phase with one objective, and what judges say of its denoiser. Its folder is a whole run's."""

    detector: TrainDetector
    warm_up: WarmUp
    arm: str

    @property
    def done(self) -> bool:
        """Whether the record is there, by all judges."""
        return self._has(self.arm, COTRAINED)

    @property
    def steps(self) -> int:
        """Those of the joint phase."""
        return self.run.collaborate.steps

    def check(self) -> None:
        """Refuse another run's folder."""
        if self.folder.exists():
            check_folder(self.run)

    def work(self, advance: Advance) -> None:
        """Train what isn't trained, and judge."""
        run = Run(self.run, [_Steps(advance)])
        for task in (self.detector, self.warm_up):
            _share(task.network, run.out / task.network.relative_to(task.folder))
        run.collaborate()
        trained = run.out / "collaborate"
        device = choose_device(self.run.device)

        def arms(judges: dict[str, LesionDetector]) -> list[Arm]:
            denoiser = load_denoiser(trained / "denoiser.pt", self.run.denoiser.network).to(device)
            cotrained = load_detector(trained / "detector.pt", self.run.detector.network).to(device)
            return [network_arm(self.arm, denoiser, {**judges, COTRAINED: cotrained})]

        self._judge(arms)


@dataclass(frozen=True, eq=False)
class TrainBound(_Judging):
    """A judge trained on one arm's images: what a detector of its kind could find there at best."""

    cell: TrainArm
    begin: _Training | None
    """The judge that is fine-tuned; None to train from the start."""

    @property
    def done(self) -> bool:
        """Whether the record is there."""
        return self._has(self.cell.arm, BOUND)

    @property
    def steps(self) -> int:
        """Those of a detector's phase."""
        return self.run.detector.steps

    def check(self) -> None:
        """Refuse another run's folder."""
        if self.folder.exists():
            check_folder(self.run)

    def work(self, advance: Advance) -> None:
        """Train and judge."""
        trained = load_denoiser(self.cell.folder / "collaborate" / "denoiser.pt", self.cell.run.denoiser.network)
        run = Run(self.run, [_Steps(advance)])
        detector = run.train_detector_on(trained.network, None if self.begin is None else self.begin.network)
        device = choose_device(self.run.device)
        found = {BOUND: detector.requires_grad_(False).to(device)}
        self._judge(lambda judges: [network_arm(self.cell.arm, trained.to(device), found)])


def record_file(folder: Path, arm: str) -> Path:
    """Where the record of an arm is."""
    return folder / "evaluation" / f"{arm.replace(' ', '_')}.npz"


def _share(source: Path, path: Path) -> None:
    """Make a finished file appear in a second place, without a copy where the file system can."""
    if not path.exists():
        with whole_path(path) as made:
            try:
                os.link(source, made)
            except OSError:
                shutil.copyfile(source, made)


class _Steps(L.Callback):
    """Says how far a phase is."""

    def __init__(self, advance: Advance) -> None:
        self.advance = advance

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        self.advance(batch_idx + 1)
