"""The demo: LIDnet and honest controls, on phantoms, from nothing to a report."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from scipy.stats import t as student_t

from lidnet_fast import backend
from lidnet_fast.data.phantoms.study import Study, make_study
from lidnet_fast.device import choose_device
from lidnet_fast.errors import InputError
from lidnet_fast.evaluation.arms import Evaluation, evaluate, network_arm, reference_arms, write_metrics
from lidnet_fast.evaluation.results import COTRAINED, INDEPENDENT, JUDGE, build_report, print_results
from lidnet_fast.models.hu import HUDenoiser
from lidnet_fast.report.data import Metric
from lidnet_fast.report.page import write_report
from lidnet_fast.runtime import machine_facts, recorded_cost
from lidnet_fast.trainer.config import ObjectiveConfig, RunConfig
from lidnet_fast.trainer.run import Run

LIDNET, CONTROL = "LIDnet", "MSE"


def controls(lidnet: ObjectiveConfig, quick: bool) -> dict[str, ObjectiveConfig]:
    """The objectives that are compared: name -> objective, LIDnet last.

    All share LIDnet's pixel terms, warm start, samples and number of steps; each also trains its own detector.
    """
    plain = replace(lidnet, roi_perceptual=0.0, detection=0.0, roi_extractor=0.0)
    arms = {CONTROL: plain}
    if not quick:
        # The same weight on the whole map as LIDnet gives to its regions; and, without any features, pixels weighted
        # so that lesions have about the share of the loss (0.3) at which more weight no longer helped.
        arms["whole-map perceptual"] = replace(plain, perceptual=lidnet.roi_perceptual)
        arms["lesion-weighted MSE"] = replace(plain, roi_weight=12.0)
    return {**arms, LIDNET: lidnet}


def run_demo(config: RunConfig, study: Study, *, seeds: int = 1, quick: bool = False) -> dict[str, dict[str, Metric]]:
    """Make the study, train all arms, evaluate them, and write `metrics.json` and `report.html` to `config.out`.

    Args:
        config: of LIDnet; `data.store` and `seed` are set here.
        study: the phantoms.
        seeds: runs with different phantoms, noise and initial weights; with more than one, means and 95 % intervals.
        quick: MSE and LIDnet only, without the independent judge, on half the samples.

    Returns:
        Arm -> metric -> value, as printed.

    Raises:
        InputError: the folder holds a run of another configuration, or `seeds` is not positive.
    """
    if seeds < 1:
        raise InputError(f"--seeds must be at least 1, got {seeds}")
    if quick:
        half = replace(config.evaluation, samples=max(config.evaluation.samples // 2, 1))
        config = replace(config, independent_judge=None, evaluation=half)
    out = Path(config.out)
    arms = controls(config.collaborate.objective, quick)
    evaluations = []
    for number in range(seeds):
        of_seed = _seed_config(config, number)
        store = Path(of_seed.data.store)
        if not store.exists():
            with recorded_cost(store.with_name("cost.json")):
                make_study(store, study, of_seed.seed)
        evaluations.append(_run_seed(of_seed, arms))
    rows = summarise([e.flat() for e in evaluations])
    gains = paired_gains([e.flat() for e in evaluations])
    _write_results(config, study, list(arms), rows, gains, evaluations)
    print_results(rows, f"Held-out phantom patients, {seeds} seed(s)")
    trained = {f"LIDnet minus {name}": gain for name, gain in gains.items() if name in arms}
    print_results(trained, "Differences on the same seeds")
    print(_summary(rows, study))
    print(f"Report: {out / 'report.html'}")
    return rows


def _seed_config(config: RunConfig, number: int) -> RunConfig:
    out = Path(config.out)
    data = replace(config.data, store=str(out / f"study{number}" / "store"))
    return replace(config, out=str(out / f"seed{number}"), seed=config.seed + number, data=data)


def _write_results(
    config: RunConfig,
    study: Study,
    arms: Sequence[str],
    rows: Mapping[str, Mapping[str, Metric]],
    gains: Mapping[str, Mapping[str, Metric]],
    evaluations: Sequence[Evaluation],
) -> None:
    """Writes `metrics.json` and `report.html`; costs and curves are those of the first seed."""
    out, first = Path(config.out), Path(config.out) / "seed0"
    arm_folders = {name: first / _phase(name) for name in arms}
    folders = {
        "phantom study": out / "study0",
        "detector": first / "detector",
        "independent judge": first / "independent_judge",
        "denoiser warm-up": first / "denoiser",
        **arm_folders,
        "evaluation": first / "evaluation",
    }
    cost = {
        name: json.loads((folder / "cost.json").read_text(encoding="utf-8"))
        for name, folder in folders.items()
        if folder.exists()
    }
    metrics = {
        "arms": rows,
        "gain_of_lidnet": gains,
        "seeds": [e.metrics for e in evaluations],
        "cost": cost,
        "machine": machine_facts(),
    }
    write_metrics(out / "metrics.json", metrics)
    facts = {
        "run": {
            "seeds": len(evaluations),
            "low dose": f"{study.dose_fraction:.2%} of normal",
            "ops": backend.current(),
        },
        "seconds per phase": {name: round(value["seconds"], 1) for name, value in cost.items()},
        "peak memory, MiB": {name: round(value["peak_memory_mb"]) for name, value in cost.items()},
    }
    phases = {"detector": folders["detector"], "warm-up": folders["denoiser warm-up"], **arm_folders}
    page = build_report(
        "LIDnet demo",
        _summary(rows, study),
        _seed_config(config, 0),
        rows,
        evaluations[0],
        phases,
        facts,
        LIDNET,
        [CONTROL],
    )
    write_report(out / "report.html", page)


def _phase(arm: str) -> str:
    return f"arms/{arm.replace(' ', '_')}"


def _run_seed(config: RunConfig, objectives: Mapping[str, ObjectiveConfig]) -> Evaluation:
    run = Run(config)
    device = choose_device(config.device)
    judges = {JUDGE: run.train_detector().to(device)}
    independent = run.train_independent_judge()
    if independent is not None:
        judges[INDEPENDENT] = independent.to(device)
    run.train_denoiser()
    low, normal = reference_arms(judges)
    arms = [low]
    for name, objective in objectives.items():
        denoiser, detector = run.collaborate(_phase(name), objective)
        restore = HUDenoiser(denoiser, run.window).to(device)
        arms.append(network_arm(name, restore, {**judges, COTRAINED: detector.to(device)}))
    with recorded_cost(run.out / "evaluation" / "cost.json"):
        return evaluate(config, [*arms, normal], device)


def summarise(seeds: Sequence[Mapping[str, Mapping[str, float | None]]]) -> dict[str, dict[str, Metric]]:
    """Arm -> metric -> value: the value itself of one seed, mean and 95 % interval of several."""
    return {arm: {key: interval([seed[arm][key] for seed in seeds]) for key in seeds[0][arm]} for arm in seeds[0]}


def paired_gains(seeds: Sequence[Mapping[str, Mapping[str, float | None]]]) -> dict[str, dict[str, Metric]]:
    """Control -> metric -> LIDnet minus the control on the same seed, as `summarise` gives it."""
    gains: dict[str, dict[str, Metric]] = {}
    for arm in seeds[0]:
        if arm == LIDNET:
            continue
        gains[arm] = {}
        for key in seeds[0][arm]:  # in order: a set's would change with the hash seed, and metrics.json with it
            if key not in seeds[0][LIDNET]:
                continue
            pairs = [(seed[LIDNET][key], seed[arm][key]) for seed in seeds]
            gains[arm][key] = interval([None if a is None or b is None else a - b for a, b in pairs])
    return gains


def interval(values: Sequence[float | None]) -> Metric:
    """One value as it is; several as (mean, low, high) of Student's 95 % interval; None where one is missing."""
    numbers = [v for v in values if v is not None]
    if len(numbers) < len(values):
        return None
    mean = statistics.fmean(numbers)
    if len(numbers) == 1:
        return mean
    half = float(student_t.ppf(0.975, len(numbers) - 1)) * statistics.stdev(numbers) / len(numbers) ** 0.5
    return mean, mean - half, mean + half


def _summary(rows: Mapping[str, Mapping[str, Metric]], study: Study) -> str:
    def gain(key: str) -> float:
        values = [rows[arm][key] for arm in (LIDNET, CONTROL)]
        means = [v[0] if isinstance(v, tuple) else v for v in values]
        return float("nan") if None in means else means[0] - means[1]  # type: ignore[operator]

    judges = [(JUDGE, "the frozen judge"), (INDEPENDENT, "the independent judge")]
    found = [f"{gain(f'{key}_ap50'):+.3f} for {who}" for key, who in judges if f"{key}_ap50" in rows[LIDNET]]
    return (
        f"At {study.dose_fraction:.1%} of the dose, against the same training with MSE alone, LIDnet changes AP@0.5 by "
        f"{' and by '.join(found)}, PSNR in lesions by {gain('lesion_psnr'):+.2f} dB and PSNR by "
        f"{gain('psnr'):+.2f} dB."
    )
