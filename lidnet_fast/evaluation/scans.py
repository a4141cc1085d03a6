"""Whole scans: lesions found by a run's detectors, or by any other detector, scored by LUNA16's rules."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from lidnet_fast.data.annotations.luna16 import Row, read_candidates, read_series_uids, read_spheres
from lidnet_fast.data.samples.dataset import SampleId
from lidnet_fast.data.store.reader import Store, index_files
from lidnet_fast.device import autocast
from lidnet_fast.errors import InputError
from lidnet_fast.evaluation.arms import Arm
from lidnet_fast.evaluation.export import low_dose_volume
from lidnet_fast.evaluation.results import format_metric
from lidnet_fast.files import as_private_as, write_text
from lidnet_fast.metrics.scans import Scan, ScanFroc, Spheres, scan_froc
from lidnet_fast.models.files import fingerprint
from lidnet_fast.models.linking import link
from lidnet_fast.models.slice_detector import SliceDetector
from lidnet_fast.neighbours import neighbours
from lidnet_fast.progress import progress
from lidnet_fast.report.data import Column, Metric
from lidnet_fast.report.terminal import print_table
from lidnet_fast.results_folder import refuse_to_lose
from lidnet_fast.strangers_text import printable
from lidnet_fast.trainer.config import RunConfig

_BATCH = 2
_NONE = Spheres.of([])


def lesions_of_store(store: Store, index: int) -> Spheres:
    """The lesions of a series as spheres.

    The centre is the mean of those of the lesion's boxes, the diameter the longest side of any of them.
    """
    info, table = store.series[index], store.index
    rows = []
    for lesion in np.unique(table.lesion[table.box_series == index]):
        mine = table.lesion == lesion
        boxes = table.box[mine]
        centre = info.to_patient(table.box_z[mine], (boxes[:, :2] + boxes[:, 2:]) / 2).mean(axis=0)
        sides = (boxes[:, 2:] - boxes[:, :2]) * [info.spacing[2], info.spacing[1]]
        rows.append([*centre, sides.max()])
    return Spheres.of(rows)


def evaluate_scans(
    config: RunConfig,
    arms: Sequence[Arm],
    device: torch.device,
    precision: Literal["float32", "bfloat16"] = "float32",
) -> dict[str, dict[str, ScanFroc]]:
    """Run arms on the whole series of the test split, slice by slice, and link what their detectors find.

    Simulated low dose is that which `lidnet-fast export` writes with its seed 0.

    Args:
        config: names the store, the window, and the field of view that detectors were trained on.
        arms: their restoration must take whole slices; networks are moved to `device` by the caller.
        device: where it runs.
        precision: of the networks.

    Returns:
        Arm -> detector -> FROC.

    Raises:
        InputError: no series of the split has neighbouring slices.
    """
    store = Store(config.data.store)
    indices = [index for index, info in enumerate(store.series) if info.split == "test"]
    if all(store.series[index].shape[0] == 1 for index in indices):
        raise InputError(f"{store.path}: its test series have one slice each; --scans needs whole scans")
    scans: dict[str, dict[str, list[Scan]]] = {arm.name: {name: [] for name in arm.detectors} for arm in arms}
    for index in progress(indices, "evaluating scans"):
        info, lesions = store.series[index], lesions_of_store(store, index)
        normal = np.stack([store.read(index, z) for z in range(info.shape[0])])
        low = low_dose_volume(store, index, normal, seed=0)
        for arm in arms:
            found = _detect(arm, index, low, normal, config, device, precision)
            for name, detections in found.items():
                candidates = link(detections)
                centres = np.array([candidate.centre(info.to_patient) for candidate in candidates]).reshape(-1, 3)
                scores = np.array([candidate.score for candidate in candidates])
                scans[arm.name][name].append(Scan(lesions, _NONE, centres, scores))
    return {arm: {name: scan_froc(of_detector) for name, of_detector in found.items()} for arm, found in scans.items()}


@torch.inference_mode()
def _detect(
    arm: Arm,
    index: int,
    low: np.ndarray,
    normal: np.ndarray,
    config: RunConfig,
    device: torch.device,
    precision: Literal["float32", "bfloat16"],
) -> dict[str, list[dict[str, torch.Tensor]]]:
    """Detector -> what it finds in each slice of a series."""
    looking = {
        name: SliceDetector(detector, config.window, config.data.crop, device, precision)
        for name, detector in arm.detectors.items()
    }
    found: dict[str, list[dict[str, torch.Tensor]]] = {name: [] for name in looking}
    context = config.data.context_of("detector")
    for start in range(0, len(low), _BATCH):
        slices = np.arange(start, min(start + _BATCH, len(low)))
        # Restored one by one, and then repeated at the ends, as `lidnet-fast detect --denoise-first` does.
        around = np.arange(max(0, start - context), min(slices[-1] + context + 1, len(low)))
        low_dose, normal_dose = (
            torch.from_numpy(volume[neighbours(around, len(low), seen)]).to(device).float()
            for volume, seen in ((low, config.data.context_of("denoiser")), (normal, 0))
        )
        ids: list[SampleId] = [(index, z, 0, 0, False, False) for z in around.tolist()]
        with autocast(device, precision):
            restored = arm.restore({"low_dose": low_dose, "normal_dose": normal_dose, "boxes": [], "ids": ids})[:, 0]
        shown = restored[neighbours(slices, len(low), context) - around[0]]
        for name, detector in looking.items():
            found[name] += detector(shown)
    return found


def scan_metrics(results: Mapping[str, Mapping[str, ScanFroc]]) -> dict[str, dict[str, Metric]]:
    """Arm -> columns of the result table: the CPM of each detector with its interval."""
    return {
        arm: {f"{name}_cpm": _interval(froc.curve.mean, froc.mean_interval) for name, froc in found.items()}
        for arm, found in results.items()
    }


def scan_record(froc: ScanFroc) -> dict[str, Any]:
    """A result in plain types, as `metrics.json` and `scans.json` hold it."""
    values = froc.curve.sensitivities.items()
    return {
        "cpm": _interval(froc.curve.mean, froc.mean_interval),
        "sensitivity": {str(rate): _interval(value, froc.intervals[rate]) for rate, value in values},
        "curve": {
            "false_positives": froc.curve.false_positives.tolist(),
            "sensitivity": froc.curve.sensitivity.tolist(),
        },
    }


def _interval(value: float | None, ends: tuple[float, float] | None) -> Metric:
    return value if value is None or ends is None else (value, *ends)


@dataclass(frozen=True)
class Truth:
    """What is known of some scans.

    Attributes:
        name: what they are, for messages.
        series_uids: all of them.
        lesions: those to be found, by series.
        excluded: findings that count neither way, by series.
        files: what says so; a result is no more readable.
    """

    name: str
    series_uids: Sequence[str]
    lesions: Mapping[str, Spheres]
    excluded: Mapping[str, Spheres]
    files: Sequence[Path]

    @classmethod
    def of_store(cls, location: str | Path) -> "Truth":
        """The test series of a store; its lesions are those of `lesions_of_store`.

        Raises:
            InputError: the store can't be read, or has none.
        """
        store = Store(location)
        lesions = {
            info.series_uid: lesions_of_store(store, index)
            for index, info in enumerate(store.series)
            if info.split == "test"
        }
        if not lesions:
            raise InputError(f"{store.path}: the test split has no series")
        name = f"the {len(lesions)} test series of {store.path}"
        return cls(name, list(lesions), lesions, {}, index_files(location))

    @classmethod
    def of_tables(cls, annotations: Path, series_uids: Path, excluded: Path | None = None) -> "Truth":
        """Tables as LUNA16 has them: annotations.csv, seriesuids.csv and annotations_excluded.csv.

        Raises:
            InputError: one of them can't be used, or names a series that isn't in `series_uids`.
        """
        uids = read_series_uids(series_uids)
        name = f"the {len(uids)} of {series_uids}"
        lesions = _in(uids, read_spheres(annotations), annotations, name)
        others = {} if excluded is None else _in(uids, read_spheres(excluded, excluded=True), excluded, name)
        files = [path for path in (annotations, series_uids, excluded) if path is not None]
        return cls(name, uids, lesions, others, files)


def _in(uids: Sequence[str], found: Mapping[str, Sequence[Row]], path: Path, name: str) -> dict[str, Spheres]:
    if unknown := found.keys() - set(uids):
        raise InputError(f"{path}: there is no series {min(unknown)} among {name}")
    return {uid: Spheres.of(rows) for uid, rows in found.items()}


def evaluate_candidates(candidates: Path, truth: Truth, out: Path) -> ScanFroc:
    """Score a table of candidates; write `scans.json` and print the sensitivities.

    Args:
        candidates: CSV file with the columns seriesuid, coordX, coordY, coordZ (mm) and probability.
        truth: what there is to be found.
        out: the folder of the result.

    Raises:
        InputError: the table can't be used, names a scan that isn't there, or a result that is there would be lost.
    """
    found = read_candidates(candidates, frozenset(truth.series_uids), truth.name)
    inputs = {file.name: fingerprint(file) for file in (candidates, *truth.files)}
    refuse_to_lose(out, ["scans.json"], _of_inputs(inputs), lambda content: _of_inputs(content["inputs"]))
    scans = []
    for uid in truth.series_uids:
        rows = np.array(found.get(uid, []), np.float64).reshape(-1, 4)
        scans.append(Scan(truth.lesions.get(uid, _NONE), truth.excluded.get(uid, _NONE), rows[:, :3], rows[:, 3]))
    froc = scan_froc(scans)
    counts = {
        "scans": len(scans),
        "lesions": sum(len(scan.lesions.diameters) for scan in scans),
        "candidates": sum(len(scan.scores) for scan in scans),
    }
    record = scan_record(froc)
    with as_private_as([candidates, *truth.files]):
        write_text(out / "scans.json", json.dumps({"inputs": inputs, **counts, **record}, indent=1))
    columns = [Column(rate, f"{float(rate):g}") for rate in record["sensitivity"]] + [Column("cpm", "CPM")]
    shown = {**record["sensitivity"], "cpm": record["cpm"]}
    print_table(
        {column.key: column.label for column in columns},
        {candidates.name: {column.key: format_metric(column, shown[column.key]) for column in columns}},
        f"Sensitivity by false positives per scan: {', '.join(f'{count} {what}' for what, count in counts.items())}",
    )
    print(printable(f"Results: {out / 'scans.json'}"))
    return froc


def _of_inputs(inputs: Mapping[str, str]) -> dict[str, Any]:
    """What decides a result: one more table makes another result."""
    return {"files": len(inputs), "SHA-256 of": inputs}
