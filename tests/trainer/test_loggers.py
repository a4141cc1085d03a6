"""Loggers by name: wandb for real, offline; MLflow by what stands for it, and for real where it is installed."""

import json
import os
import sys
import time
import types
from dataclasses import replace
from pathlib import Path

import pytest
from lightning.pytorch.loggers import mlflow as lightning_mlflow

from lidnet_fast.cli.options import parse, run_config, run_parser
from lidnet_fast.errors import InputError
from lidnet_fast.trainer.config import RunConfig
from lidnet_fast.trainer.loggers import finish, phase_loggers
from lidnet_fast.trainer.run import Run, curves

RECORD = {"seed": 3, "denoiser": {"name": "small"}}


def test_csv_is_always_written_and_nothing_that_was_not_asked_for(tiny_config: RunConfig) -> None:
    run = Run(replace(tiny_config, loggers=["csv"]))
    run.train_denoiser()
    assert curves(run.out / "denoiser")["denoiser/total"][0] == [0, 1, 2, 3]
    assert not list(run.out.rglob("events.out.tfevents.*"))


@pytest.mark.slow
def test_a_resumed_phase_goes_on_with_its_run_of_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = tmp_path / "mine" / "denoiser"
    folder.mkdir(parents=True)
    ids = []
    for part in ("part0", "part1"):
        loggers = phase_loggers(["wandb"], folder, part, 1, RECORD)
        run = loggers[-1].experiment
        assert (run.project, run.name, run.group) == ("lidnet_fast", "mine denoiser", "mine")
        if part == "part0":
            assert run.config["denoiser"] == {"name": "small"}
        ids.append(run.id)
        for logger in loggers:
            logger.log_metrics({"denoiser/total": 0.5}, step=1)
        finish(loggers)
        assert wandb.run is None
        time.sleep(1)  # wandb names folders by the second, and no resumed phase starts in the same one
    assert ids[0] == ids[1] == json.loads((folder / "tracking.json").read_text())["wandb"]
    assert len(list(folder.glob(f"wandb/offline-run-*-{ids[0]}/*.wandb"))) == 2


class Client:
    """What of MlflowClient Lightning's logger calls."""

    runs: dict[str, list]

    def __init__(self, uri: str) -> None:
        self.uri = uri

    def get_experiment_by_name(self, name: str):
        return None

    def create_experiment(self, name: str, artifact_location: str | None) -> str:
        return name

    def create_run(self, experiment_id: str, tags: dict):
        run_id = f"run{len(self.runs)}"
        self.runs[run_id] = [("began", experiment_id, tags)]
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=run_id, experiment_id=experiment_id))

    def get_run(self, run_id: str):
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=run_id, experiment_id="lidnet_fast"))

    def log_batch(self, run_id: str, metrics=(), params=(), **_) -> None:
        self.runs[run_id].append(("logged", [*metrics, *params]))

    def set_terminated(self, run_id: str, status: str) -> None:
        self.runs[run_id].append((status,))


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> type[Client]:
    def module(name: str, **values) -> types.ModuleType:
        made = types.ModuleType(name)
        made.__dict__.update(values)
        monkeypatch.setitem(sys.modules, name, made)
        return made

    def entity(**values):
        return values

    monkeypatch.setattr(Client, "runs", {}, raising=False)
    module("mlflow", set_tracking_uri=lambda uri: None, __path__=[])
    module("mlflow.tracking", MlflowClient=Client, __path__=[])
    module("mlflow.tracking.context", __path__=[])
    module("mlflow.tracking.context.registry", resolve_tags=lambda tags: {"mlflow.user": "anna", **tags})
    module("mlflow.entities", Metric=entity, Param=entity)
    module("mlflow.utils", __path__=[])
    module("mlflow.utils.mlflow_tags", MLFLOW_RUN_NAME="mlflow.runName")
    monkeypatch.setattr(lightning_mlflow, "_MLFLOW_AVAILABLE", True)
    return Client


def test_a_resumed_phase_goes_on_with_its_run_of_mlflow(tmp_path: Path, mlflow: type[Client]) -> None:
    folder = tmp_path / "mine" / "denoiser"
    folder.mkdir(parents=True)
    for part in ("part0", "part1"):
        loggers = phase_loggers(["mlflow", "csv"], folder, part, 1, RECORD)
        for logger in loggers:
            logger.log_metrics({"denoiser/total": 0.5}, step=1)
        loggers[-1].finalize("success")
        finish(loggers)
    (calls,) = mlflow.runs.values()
    (_, experiment, tags), parameters, *_ = calls
    assert experiment == "lidnet_fast"
    assert tags == {"mlflow.user": "-", "mlflow.source.name": "lidnet-fast train", "mlflow.runName": "mine denoiser"}
    assert {"key": "denoiser/name", "value": "small"} in parameters[1]
    assert [call[0] for call in calls] == ["began", "logged", "logged", "FINISHED", "logged", "FINISHED"]


@pytest.mark.slow
def test_mlflow_for_real(tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a server it writes to the run's folder, which today's MLflow does only if it is asked for."""
    pytest.importorskip("mlflow", reason="mlflow-skinny isn't installed")
    for variable in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_ALLOW_FILE_STORE"):
        monkeypatch.delenv(variable, raising=False)
    run = Run(replace(tiny_config, loggers=["csv", "mlflow"]))
    run.train_denoiser()
    assert "MLFLOW_ALLOW_FILE_STORE" not in os.environ
    identity = json.loads((run.out / "denoiser" / "tracking.json").read_text())["mlflow"]
    (found,) = run.out.glob(f"mlruns/*/{identity}")
    losses = [float(line.split()[1]) for line in (found / "metrics" / "denoiser" / "total").read_text().splitlines()]
    assert losses == pytest.approx(list(curves(run.out / "denoiser")["denoiser/total"][1]), rel=1e-4)
    assert (found / "params" / "denoiser" / "name").read_text() == "small"
    assert (found / "tags" / "mlflow.user").read_text() == "-"


@pytest.mark.parametrize(("name", "package"), [("wandb", "wandb"), ("mlflow", "mlflow-skinny")])
def test_a_logger_without_its_package(
    name: str, package: str, tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=f"{name} is not installed: pip install {package}"):
        Run(replace(tiny_config, loggers=["csv", name]))
    assert not Path(tiny_config.out).exists()


def test_a_logger_that_can_not_begin(tmp_path: Path, mlflow: type[Client], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self, name):
        raise ConnectionError("no such server\nand more")

    monkeypatch.setattr(mlflow, "get_experiment_by_name", refuse)
    (tmp_path / "denoiser").mkdir()
    with pytest.raises(InputError, match=r"^loggers: mlflow can't begin a run: no such server$"):
        phase_loggers(["mlflow"], tmp_path / "denoiser", "part0", 1, RECORD)
    assert not (tmp_path / "denoiser" / "tracking.json").exists()


@pytest.mark.parametrize("words", [["csv", "wandb"], ["[csv,wandb]"], ["csv", "wandb", "--seed", "3"]])
def test_names_on_the_command_line(words: list[str]) -> None:
    parser = run_parser("train", "")
    assert run_config(parse(parser, ["--seed", "1", "--loggers", *words])).loggers == ["csv", "wandb"]


@pytest.mark.parametrize("value", ["true", "{csv: 1}", "csv", "null", "[csv, comet]"])
def test_what_is_no_list_of_loggers(value: str, tmp_path: Path) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text(f"loggers: {value}\n")
    with pytest.raises(InputError, match="loggers"):
        run_config(parse(run_parser("train", ""), ["--config", str(config)]))
