"""`lidnet-fast evaluate`: the result table of a finished run, of images that other tools denoised, or of both."""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from lidnet_fast.assessment.assess import assess as assess_models
from lidnet_fast.assessment.options import AssessOptions
from lidnet_fast.assessment.results import task_rows
from lidnet_fast.data.samples.dataset import SampleId
from lidnet_fast.data.store.reader import Store, index_files
from lidnet_fast.device import Device, Precision, choose_device, choose_precision
from lidnet_fast.errors import InputError
from lidnet_fast.evaluation.arms import (
    LOW_DOSE,
    NORMAL_DOSE,
    Evaluation,
    evaluate,
    images_arm,
    network_arm,
    reference_arms,
    write_metrics,
)
from lidnet_fast.evaluation.denoised import denoised_views
from lidnet_fast.evaluation.export import plain_beginning
from lidnet_fast.evaluation.results import COTRAINED, INDEPENDENT, JUDGE, build_report, froc_curves, print_results
from lidnet_fast.evaluation.scans import Truth, evaluate_scans, scan_metrics, scan_record
from lidnet_fast.files import as_private_as
from lidnet_fast.metrics.scans import ScanFroc
from lidnet_fast.models.files import (
    denoiser_file,
    fingerprint,
    load_denoiser,
    load_detector,
    model_name,
    refuse_foreign_code,
)
from lidnet_fast.report.data import Metric
from lidnet_fast.report.page import write_report
from lidnet_fast.results_folder import place, refuse_to_lose
from lidnet_fast.runtime import machine_facts
from lidnet_fast.trainer.config import RunConfig, check_available, from_tree
from lidnet_fast.trainer.datamodule import split_patches
from lidnet_fast.trainer.stored import nested, read_stored
from lidnet_fast.urls import is_url, without_secrets

DENOISED = "denoised"
RESULTS = ("metrics.json", "report.html")
_NAMES = (LOW_DOSE, DENOISED, NORMAL_DOSE)


def read_config(path: Path, *, trust_code: bool = False) -> RunConfig:
    """The configuration that a run stored.

    Args:
        path: the run's config.yaml.
        trust_code: let it name networks by import path, whose modules are imported when the networks are built.

    Raises:
        InputError: the file is missing, is not a run's configuration, or names code that wasn't trusted.
    """
    stored = read_stored(path)
    try:
        config = from_tree(nested(stored))
    except InputError as error:
        raise InputError(f"{path} is not the configuration of a run: {error}") from error
    if not trust_code:
        refuse_foreign_code(path, config.denoiser, config.detector, config.independent_judge)
    return config


def named_folders(options: Sequence[str]) -> dict[str, Path]:
    """Folders of denoised images by the name of their arm, from options NAME=FOLDER.

    Raises:
        InputError: an option has another form, or a name is taken.
    """
    folders: dict[str, Path] = {}
    for option in options:
        name, _, folder = option.partition("=")
        if not name or not folder:
            raise InputError(f"--images {option}: NAME=FOLDER is needed")
        if name in folders or name in _NAMES:
            raise InputError(f"--images {option}: the name {name!r} is taken")
        folders[name] = Path(folder)
    return folders


def evaluate_run(
    folder: Path,
    denoiser: Path | None = None,
    samples: int | None = None,
    *,
    images: Mapping[str, Path] | None = None,
    store: str | Path | None = None,
    out: Path | None = None,
    device: Device = "auto",
    precision: Precision = "float32",
    trust_code: bool = False,
    max_volume_gib: float | None = None,
    assess: bool = False,
    scans: bool = False,
) -> Evaluation:
    """Score the run's denoiser between the low-dose and the normal-dose images; write `metrics.json`, `report.html`.

    Args:
        folder: of a finished run.
        denoiser: another network file than the run's own.
        samples: how many held-out samples; by default the run's.
        images: arm -> folder of images of the same low-dose scans, denoised by any tool.
        store: another store than the run's, such as `lidnet-fast export` makes. One at a URL is opened only if it is
            given here: the run may be a stranger's, and its URL would be asked for.
        out: where the results go; by default to `folder`, and those of another denoiser, store, number of samples or
            with images to a folder of their own in `folder / "evaluated"`.
        device: where the networks run.
        precision: their arithmetic.
        trust_code: import the classes that the run's files name by import path.
        max_volume_gib: of the images: see `VolumeHeader.check_unpacked`.
        assess: add columns of `lidnet_fast.assessment`, at the dose of the store's simulation where it has one. Its own
            results go to the folder `assessment`. Images of other tools don't take part.
        scans: add the FROC of whole scans; see `lidnet_fast.evaluation.scans`. Images of other tools don't take part.

    Raises:
        InputError: the folder is not a finished run's, a checkpoint is of another model, images don't fit, or results
            that are there would be lost.
    """
    trained = _run_config(folder, store, trust_code=trust_code)
    config = _configured(trained, samples, store)
    own_store = _same_place(config.data.store, trained.data.store)
    on = choose_device(device)
    context = config.data.context_of("detector")
    judges = {JUDGE: load_detector(folder / "detector" / "detector.pt", config.detector.network, context=context)}
    if config.independent_judge is not None:
        independent = folder / "independent_judge" / "detector.pt"
        judges[INDEPENDENT] = load_detector(independent, config.independent_judge, context=context)
    network = load_denoiser(
        denoiser or folder,
        None if denoiser else config.denoiser.network,
        context=config.data.context_of("denoiser"),
        trust_code=trust_code,
    )
    arithmetic = choose_precision(precision, on)
    file = denoiser_file(denoiser or folder)
    if out is None:
        other_samples = samples if samples != trained.evaluation.samples else None
        other_store = None if own_store else config.data.store
        out = place_of_results(folder, denoiser and file, other_store, samples=other_samples, images=images or {})
    weights, own = fingerprint(file), denoiser is None and own_store
    asked = _asked(config, images or {}, arithmetic, assess=assess, scans=scans)
    if out != folder:  # a run's own results are of its weights, whatever these were when it was evaluated before
        asked["denoiser"] = weights
    refuse_to_lose(out, RESULTS, asked, partial(_said, keys=asked))
    views = _views(config, images or {}, max_volume_gib)
    detectors = judges
    if denoiser is None:
        cotrained = load_detector(folder / "collaborate" / "detector.pt", config.detector.network, context=context)
        detectors = {**judges, COTRAINED: cotrained}
    given = [images_arm(name, shown, judges) for name, shown in views.items()]
    low, normal = reference_arms(judges)
    for module in (network, *detectors.values()):
        module.to(on)
    denoised = network_arm(DENOISED, network, detectors)
    found = evaluate_scans(config, [low, denoised, normal], on, arithmetic) if scans else {}
    further = scan_metrics(found)
    if assess:
        content = assess_models(
            [f"{DENOISED}={denoiser or folder}"],
            out / "assessment",
            assessment_of(config),
            store=config.data.store,
            device=device,
            precision=precision,
            trust_code=trust_code,
        )
        for arm, columns in task_rows(content).items():
            further[arm] = {**further.get(arm, {}), **columns}
    evaluation = evaluate(config, [low, *given, denoised, normal], on, arithmetic)
    summary = (
        f"{config.evaluation.samples} held-out samples of {config.data.store}, denoised by {config.denoiser.name}"
        f"{' and, from images, ' if images else ''}{', '.join(views)}."
    )
    phases = {name: folder / name for name in ("detector", "denoiser", "collaborate")}
    title = f"LIDnet run {folder.name}"
    whose = {**asked, "denoiser": weights, "own": own}
    _publish(out, title, summary, config, evaluation, images or {}, phases, whose, further, found)
    return evaluation


def place_of_results(
    folder: Path,
    denoiser: Path | None = None,
    store: str | None = None,
    candidates: Path | None = None,
    *,
    samples: int | None = None,
    images: Mapping[str, Path] = MappingProxyType({}),
) -> Path:
    """Where results that an evaluation makes beside a run go: a run's folder has its own only.

    Args:
        folder: the run's.
        denoiser: the file of another than its own.
        store: another than its own.
        candidates: a table, which may be of any detector.
        samples: another number than its own.
        images: arm -> folder, of other tools.
    """
    named, identity = [], hashlib.sha256()
    if denoiser is not None:
        named.append(model_name(denoiser))
        identity.update(fingerprint(denoiser).encode())
    if candidates is not None:
        named.append(candidates.stem)
        if candidates.is_file():  # what isn't there is refused where it is read
            identity.update(fingerprint(candidates).encode())
    if store is not None:
        location = without_secrets(store)
        named.append(f"on {location.rstrip('/').rpartition('/')[2]}")
        identity.update(location.encode(errors="surrogatepass"))
    for name, images_folder in images.items():
        named.append(f"with {name}")
        identity.update(f"{name}={place(images_folder)}".encode(errors="surrogatepass"))
    if samples is not None:
        named.append(f"{samples} samples")
        identity.update(str(samples).encode())
    if not named:
        return folder
    return folder / "evaluated" / f"{plain_beginning(' '.join(named)) or 'other'}-{identity.hexdigest()[:8]}"


def _same_place(one: str, other: str) -> bool:
    one, other = without_secrets(one), without_secrets(other)  # a run keeps its store's URL without any
    return one == other or (not is_url(one + other) and Path(one).resolve() == Path(other).resolve())


def truth_of_run(folder: Path, store: str | Path | None = None) -> Truth:
    """The test series of a run's store; `store` as of `evaluate_run`.

    Raises:
        InputError: the folder is not a run's, or its store can't be used.
    """
    # No network is built, so the code of none that the configuration names runs.
    return Truth.of_store(store or _run_config(folder, store, trust_code=True).data.store)


def _run_config(folder: Path, store: str | Path | None, *, trust_code: bool) -> RunConfig:
    """A run's configuration, whose store is at no URL that the caller hasn't repeated."""
    config = read_config(folder / "config.yaml", trust_code=trust_code)
    if store is None and is_url(config.data.store):
        raise InputError(
            f"{folder}: the run's store is at {config.data.store}. "
            "To fix: if you trust that place, repeat the URL with --store"
        )
    if store is None and not Path(config.data.store).is_dir():
        raise InputError(
            f"{folder}: the run's store, {config.data.store}, isn't there. To fix: say with --store where it is now"
        )
    return config


def compare_images(
    store: str | Path,
    images: Mapping[str, Path],
    out: Path,
    samples: int | None = None,
    *,
    device: Device = "auto",
    max_volume_gib: float | None = None,
) -> Evaluation:
    """Score folders of denoised images alone: image quality, without detectors.

    Args:
        store: with measured low dose, such as `lidnet-fast export` makes.
        images: arm -> folder of images of its low-dose scans, denoised by any tool.
        out: gets `metrics.json` and `report.html`.
        samples: how many held-out samples.
        device: where the metrics are computed.
        max_volume_gib: of the images: see `VolumeHeader.check_unpacked`.

    Raises:
        InputError: the store or the images can't be used, or results that are there would be lost.
    """
    config = _configured(RunConfig(), samples, store)
    asked = _asked(config, images)
    refuse_to_lose(out, RESULTS, asked, partial(_said, keys=asked))
    sides = [min(info.shape[1:]) for info in Store(store).series if info.split == "test"]
    crop = min(side for side in (config.data.crop, *sides) if side is not None)
    config = replace(config, data=replace(config.data, crop=crop))
    views = _views(config, images, max_volume_gib)
    low, normal = reference_arms({})
    arms = [low, *(images_arm(name, shown, {}) for name, shown in views.items()), normal]
    evaluation = evaluate(config, arms, choose_device(device))
    summary = f"{config.evaluation.samples} held-out samples of {store}, {crop} pixels wide: {', '.join(images)}."
    _publish(out, "Denoised images compared", summary, config, evaluation, images, None, asked)
    return evaluation


def _asked(
    config: RunConfig,
    images: Mapping[str, Path],
    precision: str = "float32",
    *,
    assess: bool = False,
    scans: bool = False,
) -> dict[str, Any]:
    """What decides a result, as `metrics.json` keeps it."""
    return {
        "samples": config.evaluation.samples,
        "store": place(without_secrets(config.data.store)),
        "images": {name: place(folder) for name, folder in images.items()},
        "precision": precision,
        "assess": assess,
        "whole scans": scans,
    }


def _said(content: Mapping[str, Any], keys: Collection[str]) -> dict[str, Any]:
    """What was asked of the results of a `metrics.json`; those of older versions say less."""
    if not isinstance(content["arms"], Mapping):
        raise TypeError
    images = {name: place(folder) for name, folder in content["images"].items()}
    known = {key: content[key] for key in keys if key in content}
    return {**known, "samples": content["samples"], "images": images, "whole scans": "scans" in content}


def _configured(config: RunConfig, samples: int | None, store: str | Path | None) -> RunConfig:
    if samples is not None:
        config = replace(config, evaluation=replace(config.evaluation, samples=samples))
    if store is not None:
        config = replace(config, data=replace(config.data, store=str(store)))
    check_available(config)
    return config


def assessment_of(config: RunConfig) -> AssessOptions:
    """The options of an assessment at the dose that the run was trained for."""
    simulation = Store(config.data.store).simulation
    return AssessOptions() if simulation is None else AssessOptions(doses=(simulation["dose_fraction"],))


def _views(
    config: RunConfig, images: Mapping[str, Path], max_volume_gib: float | None
) -> dict[str, dict[SampleId, np.ndarray]]:
    """Arm -> the evaluation's fields of view, from the images of its folder."""
    if not images:
        return {}
    store = Store(config.data.store)
    if store.simulation is not None:
        raise InputError(
            f"--images: {store.path} draws its simulated noise for every sample, so no other tool has seen it. To fix: "
            f"`lidnet-fast export {store.path} OUT` writes low-dose images for the tool and OUT/store to evaluate on "
            "with --store"
        )
    patches = split_patches(config, "test", "test")
    ids = [patches[draw].id for draw in range(config.evaluation.samples)]
    crop = config.data.crop
    context = config.data.context_of("detector")
    return {name: denoised_views(folder, store, ids, crop, context, max_volume_gib) for name, folder in images.items()}


def _publish(
    out: Path,
    title: str,
    summary: str,
    config: RunConfig,
    evaluation: Evaluation,
    images: Mapping[str, Path],
    phases: Mapping[str, Path] | None,
    whose: Mapping[str, Any],
    further: Mapping[str, Mapping[str, Metric]] = MappingProxyType({}),
    scans: Mapping[str, Mapping[str, ScanFroc]] = MappingProxyType({}),
) -> None:
    """Write and print the results; `phases` is None where there is no run; `further` are columns by arm.

    `whose` says whose results they are: what was asked (`_asked`) and, of a run, the denoiser's fingerprint and whether
    denoiser and store are the run's own.
    """
    flat = evaluation.flat()
    rows: dict[str, dict[str, Metric]] = {name: {**row, **further.get(name, {})} for name, row in flat.items()}
    folders = {name: str(folder) for name, folder in images.items()}
    summary = without_secrets(summary)
    facts = {"images from": folders} if folders else {}
    if Store(config.data.store).inserted_lesions is not None:
        summary += " The lesions were inserted: none of them is a patient's own."
    highlight = None if phases is None else DENOISED
    notes = dict.fromkeys(images, "from images")
    report = build_report(
        title,
        summary,
        config,
        rows,
        evaluation.examples,
        froc_curves(evaluation),
        phases or {},
        facts,
        highlight,
        list(images),
        notes,
    )
    metrics = {"arms": evaluation.metrics, **whose, "machine": machine_facts()}
    if scans:
        metrics["scans"] = {
            arm: {name: scan_record(froc) for name, froc in found.items()} for arm, found in scans.items()
        }
    with as_private_as([*index_files(config.data.store), *images.values()]):
        write_metrics(out / "metrics.json", metrics)
        write_report(out / "report.html", report if phases is not None else replace(report, config=""))
    named = {f"{name} (images)" if name in images else name: row for name, row in rows.items()}
    print_results(named, f"Held-out samples of {config.data.store}")
    print(f"Report: {out / 'report.html'}")
