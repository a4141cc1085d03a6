"""What a comparison consists of: stores x denoisers x arms x seeds, over one run's configuration."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from importlib.resources import files
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import yaml

from lidnet_fast.data.phantoms.study import STUDIES, Study
from lidnet_fast.errors import InputError
from lidnet_fast.evaluation.results import COTRAINED, INDEPENDENT, JUDGE
from lidnet_fast.models.files import build_network, without_weights
from lidnet_fast.models.registry import NetworkConfig, unknown_name
from lidnet_fast.trainer.config import RunConfig, check_available, overridden, to_dict
from lidnet_fast.trainer.datamodule import split_patches
from lidnet_fast.urls import without_secrets

DEVELOPMENT_SEEDS = 100
"""Seeds from here on are for choosing: they are judged on validation patients, and the others on test patients."""

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")
_CHANGES = ("collaborate", "balance", "ema_decay", "detector")
_SET_HERE = {"seed": "seeds", "data.store": "stores"}


@dataclass(frozen=True)
class Matrix:
    """What is compared. Names become folders: letters, digits and . _ + - only."""

    stores: dict[str, str] = field(default_factory=dict)
    """Name -> store made by `lidnet-fast prepare`; its test patients need lesions."""
    studies: list[str] = field(default_factory=list)
    """Embedded phantom studies, made anew for every seed."""
    denoisers: dict[str, dict[str, Any] | None] = field(default_factory=dict)
    """Name -> what differs from the group `denoiser`; null: the network of that name or import path, without options.
    By default the group `denoiser` alone."""
    arms: dict[str, dict[str, Any] | None] = field(
        default_factory=lambda: dict.fromkeys(("mse", "whole-map", "lesion-weighted", "lidnet"))
    )
    """Name -> what differs from the configuration after the warm-up; null: the arm of that name in
    `lidnet_fast/comparison/arms.yaml`. The first is the baseline. An arm with a `detector` of its own begins with that
    one, trained on normal dose."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """Each trains everything anew, with other samples, noise and initial weights. Seeds from 100 on are for choosing,
    and are judged on validation patients."""
    judges: dict[str, NetworkConfig] = field(default_factory=dict)
    """Name -> detector that is trained on normal dose and only judges: no denoiser is trained through it. The
    configuration's `independent_judge` is one more, under the name "independent"."""
    bound: bool = False
    """Train every judge on every arm's images too, from the start and fine-tuned: what a detector could find there at
    best, and which share of what is to be gained an arm gains."""


@dataclass(frozen=True)
class Comparison:
    """A checked comparison.

    Raises:
        InputError: names what can't be compared, before anything is made.
    """

    run: RunConfig
    matrix: Matrix

    def __post_init__(self) -> None:
        for key, instead in _SET_HERE.items():
            if _value(self.run, key) != _value(RunConfig(), key):
                raise InputError(f"{key} is set: a comparison has {instead} instead")
        if self.run.devices * self.run.num_nodes > 1:
            raise InputError("devices and num_nodes must be 1: a comparison is shared by cells, see --cells")
        matrix = self.matrix
        for study in matrix.studies:
            if study not in STUDIES:
                raise unknown_name("study", study, STUDIES)
        for what in ("denoisers", "arms", "judges"):
            _check_names(what, list(getattr(matrix, what)))
        _check_names("stores and studies", self.names)
        for name in (JUDGE, COTRAINED, INDEPENDENT):
            if name in matrix.judges:
                raise InputError(f"judges: the name {name!r} is taken; choose another")
        if not matrix.stores and not matrix.studies:
            raise InputError("nothing to compare on: give stores, or --study with one of " + ", ".join(STUDIES))
        if len(matrix.arms) < 2:
            raise InputError(f"arms: at least two are needed, got {', '.join(matrix.arms) or 'none'}")
        _check_seeds(matrix.seeds)
        for (one, network), (other, same) in combinations(self.judges.items(), 2):
            if network == same:
                raise InputError(f"judges {one} and {other} are the same network, so neither adds anything")
        self._check_parts()

    @property
    def split(self) -> Literal["val", "test"]:
        """Whose patients judge: development seeds must not see those of the test."""
        return "val" if self.matrix.seeds[0] >= DEVELOPMENT_SEEDS else "test"

    @property
    def names(self) -> list[str]:
        """The stores and studies."""
        return [*self.matrix.stores, *self.matrix.studies]

    @property
    def judges(self) -> dict[str, NetworkConfig]:
        """The independent judges by name."""
        own = self.run.independent_judge
        return {**({} if own is None else {INDEPENDENT: own}), **self.matrix.judges}

    @property
    def denoisers(self) -> list[str]:
        """Names of the denoisers."""
        return list(self.matrix.denoisers) or [self.run.denoiser.name]

    @property
    def arms(self) -> list[str]:
        """Names of the arms, the baseline first."""
        return list(self.matrix.arms)

    def record(self) -> dict[str, Any]:
        """The comparison as plain types, as `--config` takes it: without what it sets itself for every run.

        Built-in arms are written out, so that it says the same when these have changed.
        """
        run = to_dict(self.run)
        for group in (run, run["data"]):
            for key in ("out", "seed", "devices", "num_nodes", "store"):
                group.pop(key, None)
        stores = {name: without_secrets(store) for name, store in self.matrix.stores.items()}
        known = built_in_arms()
        named = self.matrix.arms.items()
        arms: dict[str, Any] = {name: known[name] if changes is None else changes for name, changes in named}
        return {**asdict(replace(self.matrix, stores=stores, arms=arms)), **run}

    def study(self, name: str) -> Study | None:
        """The embedded study of this name; None for a store."""
        return None if name in self.matrix.stores else STUDIES[name]

    def configured(
        self, name: str, seed: int, store: Path, denoiser: str | None = None, arm: str | None = None
    ) -> RunConfig:
        """The run of one combination, without its folder.

        Args:
            name: of the store or study.
            seed: of the run.
            store: where an embedded study's store is.
            denoiser: name; None for the configuration's own.
            arm: name; None for the configuration's own objective.
        """
        study = self.study(name)
        path = self.matrix.stores.get(name, str(store))
        run = self._runs[denoiser, arm]
        run = replace(run, seed=seed, independent_judge=None, data=replace(run.data, store=path))
        return run if study is None else replace(run, window=study.window)

    @cached_property
    def _runs(self) -> dict[tuple[str | None, str | None], RunConfig]:
        """(denoiser, arm) -> its configuration; None for the configuration's own."""
        runs: dict[tuple[str | None, str | None], RunConfig] = {(None, None): self.run}
        for denoiser in self.denoisers:
            runs[denoiser, None] = run = overridden(self.run, {"denoiser": self._denoiser(denoiser)})
            runs |= {(denoiser, arm): overridden(run, self._arm(arm)) for arm in self.arms}
        return runs

    def _denoiser(self, name: str) -> dict[str, Any]:
        if not self.matrix.denoisers:
            return {}
        return _network_changes(self.run.denoiser, {"name": name, **(self.matrix.denoisers[name] or {})})

    def _arm(self, name: str) -> Mapping[str, Any]:
        changes = self.matrix.arms[name]
        if changes is None:
            known = built_in_arms()
            if name not in known:
                raise unknown_name("arm", name, known, "; one of your own needs what it changes of the configuration")
            changes = known[name]
        for key in changes:
            if key not in _CHANGES:
                raise InputError(
                    f"arm {name!r} sets {key}, but arms share what is trained before the joint phase: they may set "
                    f"{', '.join(_CHANGES)}"
                )
        if "detector" not in changes:
            return changes
        detector = changes["detector"]
        if not isinstance(detector, Mapping) or not detector.keys() <= {"name", "options"}:
            raise InputError(f"arm {name!r}: its detector may have a name and options, got {detector!r}")
        return {**changes, "detector": _network_changes(self.run.detector, detector)}

    def _check_parts(self) -> None:
        for denoiser in self.denoisers:
            try:
                one = overridden(self.run, {"denoiser": self._denoiser(denoiser)}).denoiser
            except InputError as error:
                raise InputError(f"denoiser {denoiser!r}: {error}") from error
            build_network("denoiser", without_weights(one.network))
        for arm in self.arms:
            try:
                critic = overridden(self.run, self._arm(arm)).detector.network
                build_network("detector", without_weights(critic))
            except InputError as error:
                raise error if arm in str(error) else InputError(f"arm {arm!r}: {error}") from error
        for network in self.judges.values():
            build_network("detector", without_weights(network))
        for name, store in self.matrix.stores.items():
            config = self.configured(name, self.matrix.seeds[0], Path(store))
            try:
                check_available(config)
                lesions = [split_patches(config, split, "test").lesions for split in ("train", self.split)]
            except InputError as error:
                raise InputError(f"store {name!r}: {error}") from error
            for split, count in zip(("train", self.split), lesions, strict=True):
                if not count:
                    raise InputError(
                        f"store {name!r}: {store} has no lesion box in its {split} split, and detectors are "
                        f"{'trained on' if split == 'train' else 'judged by'} them. To fix: prepare it with --boxes or "
                        "--insert-lesions, and patients in all splits"
                    )


def matrix_of(options: Any, studies: Sequence[str]) -> Matrix:
    """The matrix among parsed options, with these studies added.

    Raises:
        InputError: a key is null that can't be.
    """
    values = {entry.name: getattr(options, entry.name) for entry in fields(Matrix)}
    for key, value in values.items():
        if value is None:
            raise InputError(f"configuration key {key} must not be null")
    values["judges"] = {
        name: NetworkConfig(network.name, dict(network.options)) for name, network in values["judges"].items()
    }
    values["studies"] = [*values["studies"], *studies]
    return Matrix(**values)


def demo_of(run: RunConfig, seeds: int, *, quick: bool = False) -> Comparison:
    """The demo: the built-in arms on the chest study.

    Args:
        run: its configuration; `seed` is the first.
        seeds: how many.
        quick: the first and the last arm alone, on half the samples, without the independent judge.

    Raises:
        InputError: `seeds` isn't positive.
    """
    if seeds < 1:
        raise InputError(f"--seeds must be at least 1, got {seeds}")
    matrix = Matrix(studies=["chest"], seeds=list(range(run.seed, run.seed + seeds)))
    if quick:
        half = replace(run.evaluation, samples=max(run.evaluation.samples // 2, 1))
        run = replace(run, independent_judge=None, evaluation=half)
        arms = list(matrix.arms)
        matrix = replace(matrix, arms=dict.fromkeys((arms[0], arms[-1])))
    return Comparison(replace(run, seed=0), matrix)


def built_in_arms() -> dict[str, dict[str, Any]]:
    """The arms that every comparison knows: name -> what each changes of the configuration."""
    return yaml.safe_load(files("lidnet_fast.comparison").joinpath("arms.yaml").read_text(encoding="utf-8"))


def _network_changes(network: NetworkConfig, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Changes of a network's group; another network doesn't take over the options."""
    other = changes.get("name", network.name) != network.name
    return {**({"options": {}} if other else {}), **changes}


def _check_names(what: str, names: Sequence[str]) -> None:
    for name in names:
        if not _NAME.fullmatch(name):
            raise InputError(f"{what}: {name!r} becomes a folder's name; letters, digits and . _ + - only")
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise InputError(f"{what}: {', '.join(sorted(twice))} twice")


def _check_seeds(seeds: Sequence[int]) -> None:
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise InputError(f"seeds must be different numbers from 0 on, at least one, got {list(seeds)}")
    if min(seeds) < DEVELOPMENT_SEEDS <= max(seeds):
        raise InputError(
            f"seeds {list(seeds)} mix test with development: those from {DEVELOPMENT_SEEDS} on choose, on validation "
            "patients, and the others test what was chosen. To fix: compare them in two folders"
        )


def _value(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = getattr(config, name)
    return config
