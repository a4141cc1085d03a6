"""`lidnet-fast evaluate`: the result table of a finished run."""

from dataclasses import replace
from pathlib import Path

import yaml
from jsonargparse import ArgumentParser

from lidnet_fast.errors import InputError
from lidnet_fast.report.page import write_report
from lidnet_fast.runtime import machine_facts
from lidnet_fast.trainer.config import RunConfig, from_options, validate
from lidnet_fast.trainer.device import evaluation_device
from lidnet_fast.trainer.evaluate import Evaluation, evaluate, network_arm, reference_arms, write_metrics
from lidnet_fast.trainer.networks import load_denoiser, load_detector
from lidnet_fast.trainer.results import COTRAINED, INDEPENDENT, JUDGE, build_report, print_results


def read_config(path: Path) -> RunConfig:
    """The configuration that a run stored.

    Raises:
        InputError: the file is missing or is not a run's configuration.
    """
    if not path.is_file():
        raise InputError(f"there is no {path}: {path.parent} is not the folder of a run")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(RunConfig)
    try:
        made = parser.instantiate(parser.parse_object(yaml.safe_load(path.read_text(encoding="utf-8"))))
    except Exception as error:  # whatever YAML and jsonargparse raise
        raise InputError(f"{path} is not the configuration of a run: {error}") from error
    return from_options(made)


def evaluate_run(folder: Path, denoiser: Path | None = None, samples: int | None = None) -> Evaluation:
    """Score the run's denoiser between the low-dose and the normal-dose images; write `metrics.json`, `report.html`.

    Args:
        folder: of a finished run.
        denoiser: another network file than the run's own.
        samples: how many held-out samples; by default the run's.

    Raises:
        InputError: the folder is not a finished run's, or a checkpoint is of another model.
    """
    config = read_config(folder / "config.yaml")
    if samples is not None:
        config = replace(config, evaluation=replace(config.evaluation, samples=samples))
    validate(config)
    device = evaluation_device(config)
    judges = {JUDGE: load_detector(folder / "detector" / "detector.pt", config.detector).to(device)}
    if config.independent_judge is not None:
        judges[INDEPENDENT] = load_detector(folder / "independent_judge" / "detector.pt", config.independent_judge).to(
            device
        )
    network = load_denoiser(
        denoiser or folder / "collaborate" / "denoiser.pt", None if denoiser else config.denoiser
    ).to(device)
    detectors = judges
    if denoiser is None:
        cotrained = load_detector(folder / "collaborate" / "detector.pt", config.detector)
        detectors = {**judges, COTRAINED: cotrained.to(device)}
    low, normal = reference_arms(judges)
    evaluation = evaluate(config, [low, network_arm("denoised", network, detectors), normal], device)
    rows = evaluation.flat()
    write_metrics(folder / "metrics.json", {"arms": evaluation.metrics, "machine": machine_facts()})
    phases = {name: folder / name for name in ("detector", "denoiser", "collaborate")}
    summary = (
        f"{config.evaluation.samples} held-out samples of {config.data.store}, denoised by {config.denoiser.name}."
    )
    write_report(
        folder / "report.html",
        build_report(f"LIDnet run {folder.name}", summary, config, rows, evaluation, phases, {}, "denoised"),
    )
    print_results(rows, f"Held-out samples of {config.data.store}")
    print(f"Report: {folder / 'report.html'}")
    return evaluation
