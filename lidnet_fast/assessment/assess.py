"""`lidnet-fast assess`: denoisers measured side by side, as a radiology physicist would."""

import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lidnet_fast.assessment.arms import LOW_DOSE, Arm, low_dose_arm, model_arms
from lidnet_fast.assessment.cases import Case, phantom_cases, store_cases
from lidnet_fast.assessment.images import ImagesArm, ScanWriter
from lidnet_fast.assessment.lesions import LesionAssessment, LesionResults
from lidnet_fast.assessment.options import AssessOptions
from lidnet_fast.assessment.results import build_report, mean_auc, print_results
from lidnet_fast.assessment.uniform import OBSERVERS, UniformPhantom
from lidnet_fast.data.simulation.dose import DoseSimulation
from lidnet_fast.data.store.reader import Store, index_files
from lidnet_fast.device import Device, Precision
from lidnet_fast.errors import InputError
from lidnet_fast.files import as_private_as, make_folder, whole_path, write_bytes, write_text
from lidnet_fast.metrics.observers import equal_detectability_dose
from lidnet_fast.progress import progress
from lidnet_fast.report.page import write_report
from lidnet_fast.results_folder import refuse_to_lose
from lidnet_fast.runtime import machine_facts
from lidnet_fast.urls import without_secrets

FILES = RESULTS, SPECTRA, REPORT = "assess.json", "noise_power.npz", "assess.html"

_BEYOND = 4.0
"""The low dose itself is measured at doses so many times lower and higher than those that are denoised."""

Results = dict[str, Any]


def assess(
    models: Sequence[str],
    out: Path,
    options: AssessOptions,
    *,
    images: Mapping[str, Path] | None = None,
    store: Path | str | None = None,
    device: Device = "auto",
    precision: Precision = "auto",
    trust_code: bool = False,
) -> Results:
    """Measure denoisers; write `assess.json`, `noise_power.npz` and `assess.html`, and print a table.

    Args:
        models: see `model_arms`.
        out: gets the results.
        options: what is measured.
        images: name -> folder with the scans of `export_scans` with the same options, denoised by any tool.
        store: whose slices are the backgrounds of lesions; by default chest phantoms.
        device: where networks run.
        precision: their arithmetic.
        trust_code: import the classes that model files name.

    Returns:
        What `assess.json` holds.

    Raises:
        InputError: a model, an option, images or the store can't be used, or results that are there would be lost.
    """
    if not models and not images:
        raise InputError("assess needs at least one --model or --images")
    opened, options, cases, doses = _prepared(options, store)
    arms = [low_dose_arm(), *model_arms(models, device=device, precision=precision, trust_code=trust_code)]
    for name, folder in (images or {}).items():
        if name in {arm.name for arm in arms}:
            raise InputError(f"--images {name}={folder}: the name {name!r} is taken")
        arms.append(ImagesArm(name, folder))
    asked = {
        "options": options.record(),
        "backgrounds": "chest phantoms" if opened is None else without_secrets(opened.path),
        "arms": {arm.name: arm.source for arm in arms},
    }
    refuse_to_lose(out, FILES, asked, lambda content: {key: content[key] for key in asked})
    phantom = UniformPhantom(options)
    lesions = {dose: LesionAssessment(options, arms, dose, noisy=opened is not None) for dose in doses}
    extra = (min(options.doses) / _BEYOND, max(options.doses) * _BEYOND)
    uniform: dict[float, dict[str, Results]] = {}
    steps = _steps(phantom, arms, [*options.doses, *extra], len(options.doses), uniform, lesions, cases)
    for _ in progress(steps, "assessing", total=phantom.batches * (len(options.doses) + 2) + len(cases) * len(doses)):
        pass
    spectra = {
        f"{name}, dose {dose:g}": results["noise"].pop("power_2d")
        for dose, of_dose in uniform.items()
        for name, results in of_dose.items()
    }
    found: dict[float, LesionResults] = {dose: one.results() for dose, one in lesions.items()} if cases else {}
    content: Results = {
        **asked,
        "doses": list(options.doses),
        "uniform": {
            arm.name: {f"{d:g}": uniform[d][arm.name] for d in sorted(uniform) if arm.name in uniform[d]}
            for arm in arms
        },
        "equal_detectability_dose": {arm.name: _equal_doses(arm.name, uniform, options) for arm in arms[1:]},
        "lesions": {arm.name: {f"{dose:g}": one.arms[arm.name] for dose, one in found.items()} for arm in arms},
        "machine": machine_facts(),
    }
    content = _plain(content)
    shown = found[min(found)] if found else None
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **spectra)
    with as_private_as([*_files_of(store), *(images or {}).values()]):
        write_text(out / RESULTS, json.dumps(content, indent=1))
        write_bytes(out / SPECTRA, buffer.getvalue())
        write_report(out / REPORT, build_report(content, shown))
    print_results(content)
    return content


def export_scans(out: Path, options: AssessOptions, store: Path | str | None = None) -> int:
    """Write every scan that `assess` with these options shows to its arms, for other tools to denoise.

    Args:
        out: the new folder; it appears whole or not at all.
        options: what is measured.
        store: as of `assess`.

    Returns:
        How many volumes were written.

    Raises:
        InputError: `out` exists, or an option or the store can't be used.
    """
    if out.exists():
        raise InputError(f"{out}: exists already; an export goes to a new folder")
    opened, options, cases, doses = _prepared(options, store)
    phantom = UniformPhantom(options)
    with as_private_as(_files_of(store)), whole_path(out) as work:
        writer = ScanWriter(make_folder(work), (options.pixel_spacing, options.pixel_spacing))
        lesions = {dose: LesionAssessment(options, [writer], dose, noisy=opened is not None) for dose in doses}
        steps = _steps(phantom, [writer], options.doses, len(options.doses), {}, lesions, cases)
        for _ in progress(steps, "exporting", total=phantom.batches * len(options.doses) + len(cases) * len(doses)):
            pass
    return writer.written


def _prepared(
    options: AssessOptions, store: Path | str | None
) -> tuple[Store | None, AssessOptions, list[Case], list[float]]:
    """The opened store, options with its scanner, the cases, and the doses at which they are scanned."""
    if store is None:
        return None, options, list(phantom_cases(options)), list(options.doses)
    opened = Store(store)
    options = _of_store(options, opened)
    cases = list(store_cases(opened, options))
    # A store's images are the scan of dose 1: there is no noise to add.
    doses = [dose for dose in options.doses if dose < 1]
    if cases and not doses:
        raise InputError("doses: at 1, a store's images stay as they are. To fix: give a dose below 1")
    return opened, options, cases, doses


def _files_of(store: Path | str | None) -> list[Path]:
    return [] if store is None else index_files(store)


def _of_store(options: AssessOptions, store: Store) -> AssessOptions:
    """Options with the scanner of a store that simulates its low dose, where the user names no other."""
    if store.simulation is None:
        return options
    own = DoseSimulation.from_dict(store.simulation)
    return replace(
        options,
        photons=own.photons if options.photons is None else options.photons,
        electronic_noise=own.electronic_noise if options.electronic_noise is None else options.electronic_noise,
    )


def _steps(
    phantom: UniformPhantom,
    arms: Sequence[Arm],
    doses: Sequence[float],
    denoised: int,
    uniform: dict[float, dict[str, Results]],
    lesions: dict[float, LesionAssessment],
    cases: Sequence[Case],
) -> Iterator[None]:
    """Everything that takes time; the first `denoised` doses are denoised, at the others the low dose is measured."""
    for stream, dose in enumerate(doses):
        uniform[dose] = {}
        yield from phantom.measure(arms if stream < denoised else arms[:1], dose, stream, uniform[dose])
    for assessment in lesions.values():
        yield from assessment.measure(cases)


def _equal_doses(arm: str, uniform: dict[float, dict[str, Results]], options: AssessOptions) -> Results:
    """Dose -> the dose of undenoised images with the arm's detectability: over all signals, and of each."""
    measured = sorted(uniform)
    values: Results = {}
    for dose in options.doses:
        values[f"{dose:g}"] = {
            observer: equal_detectability_dose(
                measured,
                [mean_auc(uniform[d][LOW_DOSE], observer) for d in measured],
                mean_auc(uniform[dose][arm], observer),
            )
            for observer in OBSERVERS
        }
        values[f"{dose:g}"]["signals"] = [
            {
                **{key: row[key] for key in ("diameter_mm", "contrast_hu", "observer")},
                "dose": equal_detectability_dose(
                    measured,
                    [uniform[d][LOW_DOSE]["detectability"][number]["dprime"][0] for d in measured],
                    row["dprime"][0],
                ),
            }
            for number, row in enumerate(uniform[dose][arm]["detectability"])
        ]
    return values


def _plain(value: Any) -> Any:
    """JSON-able values; what isn't finite is null."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value
