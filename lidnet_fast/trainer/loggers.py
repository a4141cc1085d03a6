"""Where a run's curves go: to CSV always, which reports read, and to other loggers by name."""

import importlib
import json
import os
import secrets
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from lidnet_fast.errors import InputError
from lidnet_fast.files import write_text
from lidnet_fast.models.registry import first_line
from lidnet_fast.trainer import ranks
from lidnet_fast.trainer.config import LoggerName

_PROJECT = "lidnet_fast"
_PACKAGES = {"wandb": "wandb", "mlflow": "mlflow-skinny"}
"""Loggers that need a package of their own -> what pip calls it."""
_FILES = "MLFLOW_ALLOW_FILE_STORE"


def check_loggers(names: Sequence[LoggerName]) -> None:
    """Refuse loggers whose package isn't installed.

    Raises:
        InputError: names the command that installs it.
    """
    for name in _PACKAGES.keys() & set(names):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise InputError(f"loggers: {name} is not installed: pip install {_PACKAGES[name]}") from error


def phase_loggers(
    names: Sequence[LoggerName], folder: Path, version: str, every: int, record: dict[str, Any]
) -> list[Logger]:
    """The loggers of a phase.

    With wandb and MLflow, a phase is a run of theirs. Its id is kept in `tracking.json` of the phase's folder, so that
    a resumed phase goes on with it. Project and experiment are "lidnet_fast" unless their own environment variables
    (WANDB_PROJECT, MLFLOW_EXPERIMENT_NAME, MLFLOW_TRACKING_URI, ...) say otherwise. Only rank 0 speaks to them.

    Args:
        names: of the loggers; "csv" is always among them.
        folder: of the phase, in the run's folder.
        version: folder in `logs` for this part of the phase.
        every: steps between two lines of CSV.
        record: the run's configuration as it may be shown to others.

    Raises:
        InputError: wandb or MLflow refuses to begin a run: no account, no such server, ...
    """
    made: list[Logger] = [CSVLogger(folder, name="logs", version=version, flush_logs_every_n_steps=every)]
    if "tensorboard" in names:
        made.append(TensorBoardLogger(folder, name="logs", version=version))
    trackers = {"wandb": _wandb, "mlflow": _mlflow}
    path = folder / "tracking.json"
    ids = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for name in (name for name in trackers if name in names and ranks.is_first()):
        try:
            logger, ids_of_run = trackers[name](folder, ids.get(name))
            if name not in ids:
                logger.log_hyperparams(record)
        except Exception as error:  # theirs: no account, no such server
            raise InputError(f"loggers: {name} can't begin a run: {first_line(error)}") from error
        ids[name] = ids_of_run
        write_text(path, json.dumps(ids))
        made.append(logger)
    return made


def finish(loggers: Sequence[Logger]) -> None:
    """End the phase's runs; wandb would log the next phase to the same one."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()


def _title(folder: Path) -> str:
    return f"{folder.parent.name} {folder.name}"


def _wandb(folder: Path, earlier: str | None) -> tuple[Logger, str]:
    import wandb

    # Neither paths, packages, host names nor what is printed leave this machine.
    settings = wandb.Settings(
        console="off",
        disable_git=True,
        host="-",
        silent=not sys.stderr.isatty(),
        x_disable_machine_info=True,
        x_disable_meta=True,
        x_disable_stats=True,
        x_save_requirements=False,
    )
    identity = earlier or secrets.token_hex(8)
    project = os.environ.get("WANDB_PROJECT", _PROJECT)
    logger = WandbLogger(
        _title(folder), folder, id=identity, project=project, group=folder.parent.name, settings=settings
    )
    _ = logger.experiment
    return logger, identity


def _mlflow(folder: Path, earlier: str | None) -> tuple[Logger, str]:
    with _files_allowed():
        logger = MLFlowLogger(
            os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT),
            _title(folder),
            os.environ.get("MLFLOW_TRACKING_URI"),
            {"mlflow.user": "-", "mlflow.source.name": "lidnet-fast train"},  # by default the user and a path
            str(folder.parent / "mlruns"),
            run_id=earlier,
        )
        identity = logger.run_id
    assert identity is not None
    return logger, identity


@contextmanager
def _files_allowed() -> Iterator[None]:
    """MLflow writes to a folder only if asked for, and mlflow-skinny has no database to write to instead."""
    before = os.environ.get(_FILES)
    if before is None:
        os.environ[_FILES] = "true"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_FILES]
