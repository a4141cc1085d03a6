"""From a user's CT to a store: `prepare` is what `lidnet-fast prepare` runs."""

import csv
import dataclasses
import hashlib
import io
import json
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Executor
from contextlib import closing
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np

from lidnet_fast.data.annotations import read_annotations
from lidnet_fast.data.formats.find import counted
from lidnet_fast.data.formats.geometry import Rejected, Rejections, Series
from lidnet_fast.data.formats.sources import find_series
from lidnet_fast.data.prepare.jobs import executor, run
from lidnet_fast.data.prepare.pairing import pair
from lidnet_fast.data.prepare.resample import Resampling, resampling
from lidnet_fast.data.prepare.splits import check_fractions, read_splits, split_of
from lidnet_fast.data.simulation.dose import DoseSimulation
from lidnet_fast.data.store.index import SPLITS, SeriesInfo
from lidnet_fast.data.store.writer import SeriesWriter, StoreWriter
from lidnet_fast.errors import InputError
from lidnet_fast.files import write_text
from lidnet_fast.strangers_text import csv_cell

REPORT_COLUMNS = ("series_uid", "path", "reason")
_SPLIT_REMEDY = {
    "draw": "give another seed, other fractions or a split table",
    "table": "list patients for it in the split table",
}
_SHOWN = 5
"""How many rejected series the summary names."""


@dataclasses.dataclass(frozen=True)
class PrepareSummary:
    """What `prepare` wrote.

    Attributes:
        out: the store.
        patients: number of patients by split.
        series: number of series by split.
        slices: number of slices by split.
        slices_with_boxes: number of slices with a lesion box by split.
        boxes: number of lesion boxes by split.
        skipped: how many files were skipped for which reason.
        rejected: CT that couldn't be used.
        warnings: what the user should know, one sentence each.
    """

    out: Path
    patients: dict[str, int]
    series: dict[str, int]
    slices: dict[str, int]
    slices_with_boxes: dict[str, int]
    boxes: dict[str, int]
    skipped: Counter[str]
    rejected: tuple[Rejected, ...]
    warnings: tuple[str, ...]

    def lines(self) -> list[str]:
        """Return the summary as lines of text."""
        lines = [f"{self.out}:"]
        for split in SPLITS:
            lines.append(
                f"  {split}: {self.patients[split]} patients, {self.series[split]} series, "
                f"{self.slices[split]} slices, {self.boxes[split]} boxes on {self.slices_with_boxes[split]} of them"
            )
        if self.skipped:
            lines.append(f"  skipped: {counted(self.skipped)}")
        if self.rejected:
            lines.append(f"  rejected: {len(self.rejected)}")
            lines += [f"    {fault.reason}" for fault in self.rejected[:_SHOWN]]
            if len(self.rejected) > _SHOWN:
                lines.append(f"    and {len(self.rejected) - _SHOWN} more; --report FILE lists them")
        return lines + [f"  warning: {warning}" for warning in self.warnings]


@dataclasses.dataclass(frozen=True)
class _Job:
    """One series to be written; pickles."""

    index: int
    series: Series
    split: str
    boxes: np.ndarray
    low_dose: Series | None
    resampling: Resampling | None

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.series.shape if self.resampling is None else self.resampling.shape

    def info(self) -> SeriesInfo:
        """What the store says of the series."""
        way = self.resampling
        return SeriesInfo(
            series_uid=self.series.series_uid,
            patient_id=self.series.patient_id,
            split=self.split,
            shape=self.shape,
            spacing=self.series.spacing,
            origin=self.series.positions[0] if way is None else way.origin,
            orientation=self.series.orientation,
            has_low_dose=self.low_dose is not None,
        )

    def fingerprint(self) -> Any:
        """What the written series depends on, JSON-able; files count by their names, sizes and times."""
        files = [path for one in (self.series, self.low_dose) if one is not None for path in one.files]
        try:
            states = [(path, path.stat()) for path in dict.fromkeys(files)]
        except OSError as error:
            raise InputError(f"{error.filename}: was there a moment ago: {error.strerror}") from error
        return [
            dataclasses.asdict(self.info()),
            [(str(path), state.st_size, state.st_mtime_ns) for path, state in states],
            self.boxes.tolist(),
            self.resampling and dataclasses.asdict(self.resampling),
        ]


def prepare(
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    boxes: str | Path | None = None,
    readers: int = 2,
    low_dose: str | Path | None = None,
    low_dose_description: str | None = None,
    simulate_dose: float | None = None,
    photons: float | None = None,
    electronic_noise: float | None = None,
    splits: str | Path | None = None,
    val_fraction: float = 0.1,
    test_fraction: float = 0.1,
    seed: int = 0,
    resample: bool = False,
    strict: bool = False,
    report: str | Path | None = None,
    volume_format: str = "blosc2",
    workers: int | None = None,
    dask: str | None = None,
) -> PrepareSummary:
    """Turn CT series into a store to train on; docs/datasets.md has a command for each of the published data sets.

    Headers, boxes, splits and pairs are checked before the first volume is decoded; a store appears whole or not at
    all. Interrupted, even killed, the same call goes on where it stopped. `workers` and `dask` don't change the store.

    Args:
        sources: folders with normal-dose CT (searched with everything below them) or single files: DICOM, .mhd, .mha,
            .nrrd, .nhdr, .nii, .nii.gz, DeepLesion.
        out: the store's folder; must not exist yet.
        boxes: lesion boxes: CSV (docs/box_csv.md), LUNA16's annotations.csv, LIDC-IDRI XML (a file or folder); None
            prepares a study without boxes, or with those that the data set itself brings.
        readers: of LIDC-IDRI: how many readers must have outlined a nodule on a slice.
        low_dose: folder with low-dose CT of the same scans. A low-dose series belongs to the normal-dose series of the
            same patient with the same size, spacing and slice positions.
        low_dose_description: the low-dose CT lies among the sources: series whose SeriesDescription has this text in
            it, in capitals or not.
        simulate_dose: dose of the simulated low dose over that of the images, in (0, 1]. The store keeps the parameters
            only; the noise itself is made anew in training.
        photons: of the simulation: incident photons per ray at the images' dose; None is `DoseSimulation`'s default.
        electronic_noise: of the simulation: variance of the electronic noise, photons squared; None as above.
        splits: CSV file with the columns patient_id, split; None takes the data set's own splits and draws the others.
        val_fraction: expected fraction of patients drawn for validation.
        test_fraction: expected fraction of patients drawn for testing.
        seed: of the draw.
        resample: make tilted and unevenly spaced series regular (`lidnet_fast.data.prepare.resample`), not reject them.
        strict: refuse at the first series that can't be used, instead of leaving it out.
        report: CSV file for what was rejected and why.
        volume_format: how the store keeps its volumes, "blosc2" or "zarr"; see `StoreWriter`.
        workers: processes that read and write, by default one per core.
        dask: address of a Dask scheduler whose workers do it instead; they must see the same files.

    Raises:
        InputError: something of this can't be used; the message names the argument, file or series and the cause.
    """
    out = Path(out).absolute()
    if out.exists():
        raise InputError(f"{out}: exists already; a store is written to a new folder")
    if not sources:
        raise InputError("sources: at least one folder with CT is needed")
    folders = [Path(source).absolute() for source in sources]
    simulation = _simulation(low_dose, low_dose_description, simulate_dose, photons, electronic_noise)
    check_fractions(val_fraction, test_fraction)
    for table, present in ((boxes, Path.exists), (splits, Path.is_file)):
        if table is not None and not present(Path(table)):
            raise InputError(f"{table}: there is no such file")
    if report is not None:
        report = Path(report)
        _check_report(report)

    rejections = Rejections(strict)
    with executor(workers, dask) as pool:
        found = find_series(folders, "reading headers", strict=strict, resample=resample, executor=pool)
        rejections.add(found.rejected)
        series, pairs, warnings = _paired(found.series, low_dose, low_dose_description, rejections, resample, pool)
        boxes_of = _boxes(boxes, series, rejections, readers)
        series, resamplings = _resamplings(series, boxes_of, rejections) if resample else (series, {})
        if not series:
            raise _none_usable(folders, rejections.all, report)
        split_of_patient, split_record = _splits(series, splits, val_fraction, test_fraction, seed)
        jobs = [
            _Job(
                index,
                one,
                split_of_patient[one.patient_id],
                boxes_of[one.series_uid],
                pairs.get(one.series_uid),
                resamplings.get(one.series_uid),
            )
            for index, one in enumerate(series)
        ]
        key = _digest([simulation, [job.fingerprint() for job in jobs]])
        with StoreWriter(
            out, simulation=simulation, split=split_record, volume_format=volume_format, key=key
        ) as writer:
            written = _write_all(jobs, writer, rejections, pool)
            if not written:
                raise _none_usable(folders, rejections.all, report)
            if report is not None:
                _write_report(report, rejections.all)
    return _summary(out, written, found.skipped, rejections.all, warnings, _SPLIT_REMEDY[split_record["by"]])


def _simulation(
    low_dose: str | Path | None,
    low_dose_description: str | None,
    dose_fraction: float | None,
    photons: float | None,
    electronic_noise: float | None,
) -> dict[str, Any] | None:
    """Check the arguments that choose the low dose and return the parameters that the store keeps."""
    measured = [
        f"{name} ({value})"
        for name, value in (("low_dose", low_dose), ("low_dose_description", low_dose_description))
        if value is not None
    ]
    if dose_fraction is not None:
        measured.append(f"simulate_dose ({dose_fraction})")
    if len(measured) > 1:
        raise InputError(f"{' and '.join(measured[:2])}: give one of the two")
    if low_dose_description is not None and not low_dose_description.strip():
        raise InputError("low_dose_description is empty")
    chosen = {"photons": photons, "electronic_noise": electronic_noise}
    given: dict[str, Any] = {name: value for name, value in chosen.items() if value is not None}
    if dose_fraction is None:
        if given:
            raise InputError(f"{next(iter(given))}: means something only together with simulate_dose")
        return None
    try:
        return DoseSimulation(dose_fraction=dose_fraction, **given).to_dict()
    except ValueError as error:
        raise InputError(f"simulate_dose: {error}") from error


def _paired(
    series: list[Series],
    folder: str | Path | None,
    description: str | None,
    rejections: Rejections,
    resample: bool,
    pool: Executor | None,
) -> tuple[list[Series], dict[str, Series], list[str]]:
    """Find the low-dose series, in their folder or among the series by their description, and pair them.

    Returns:
        The normal-dose series, their low-dose series by UID, and warnings.
    """
    if folder is not None:
        found = find_series(
            [Path(folder).absolute()],
            "reading low-dose headers",
            strict=rejections.strict,
            resample=resample,
            executor=pool,
        )
        rejections.add(found.rejected)
        low_dose = found.series
    elif description is not None:
        of_low_dose = [description.lower() in one.description.lower() for one in series]
        low_dose = list(compress(series, of_low_dose))
        if len(low_dose) in (0, len(series)):
            which = "every" if low_dose else "no"
            raise InputError(f"low_dose_description: {which} series has {description!r} in its SeriesDescription")
        series = [one for one, other in zip(series, of_low_dose, strict=True) if not other]
    else:
        return series, {}, []
    pairs, unpaired, unused = pair(series, low_dose)
    left = f"{unused} low-dose series belong to no normal-dose series and are skipped"
    return rejections.drop(unpaired, series), pairs, [left] if unused else []


def _boxes(
    path: str | Path | None, series: Sequence[Series], rejections: Rejections, readers: int
) -> dict[str, np.ndarray]:
    """The boxes that came with the images, and those of the user's file."""
    own = {one.series_uid: np.array(one.boxes, np.float32).reshape(-1, 5) for one in series}
    if path is None:
        return own
    rejected = frozenset(fault.series_uid for fault in rejections.all)
    read = read_annotations(Path(path), series, rejected=rejected, readers=readers)
    return {uid: np.concatenate([rows, read[uid]]) for uid, rows in own.items()}


def _resamplings(
    series: Sequence[Series], boxes_of: dict[str, np.ndarray], rejections: Rejections
) -> tuple[list[Series], dict[str, Resampling]]:
    """Say how irregular series become regular; also return the series that are or can be made so."""
    ways: dict[str, Resampling] = {}
    rejected = []
    for one in series:
        try:
            way = resampling(one, boxes_of[one.series_uid])
        except InputError as error:
            rejected.append(Rejected(one.series_uid, one.files[0].parent, str(error)))
            continue
        if way is not None:
            ways[one.series_uid] = way
    return rejections.drop(rejected, series), ways


def _splits(
    series: Sequence[Series], table: str | Path | None, val_fraction: float, test_fraction: float, seed: int
) -> tuple[dict[str, str], dict[str, Any]]:
    """Return the split of every patient, and the record of how it came about."""
    patients = sorted({one.patient_id for one in series})
    if table is not None:
        chosen = read_splits(Path(table), patients)
        record: dict[str, Any] = {"by": "table", "patients": chosen}
    else:
        own: dict[str, str] = {}
        for one in series:
            if one.split is not None and own.setdefault(one.patient_id, one.split) != one.split:
                raise InputError(
                    f"splits: the data set puts patient {one.patient_id} into {own[one.patient_id]} and {one.split}"
                )
        drawn = {patient: split_of(patient, seed, val_fraction, test_fraction) for patient in patients}
        chosen = {**drawn, **own}
        record = {"by": "draw", "seed": seed, "val_fraction": val_fraction, "test_fraction": test_fraction}
        if own:
            record["given"] = own
    if "train" not in chosen.values():
        raise InputError(
            f"splits: none of the {_patients(chosen)} is in the split train; {_SPLIT_REMEDY[record['by']]}"
        )
    return chosen, record


def _patients(split_of_patient: dict[str, str]) -> str:
    return f"{len(split_of_patient)} patient{'s' if len(split_of_patient) > 1 else ''}"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _write_all(jobs: Sequence[_Job], writer: StoreWriter, rejections: Rejections, pool: Executor | None) -> list[_Job]:
    """Write what isn't written yet; return the jobs whose series are in the store."""
    to_do = [job for job in jobs if job.series.series_uid not in writer.done]
    tasks = [(job, writer.series_writer()) for job in to_do]
    failed = set()
    with closing(run(pool, _write, tasks, "writing the store")) as results:
        for job, reason in zip(to_do, results, strict=True):
            if reason is not None:
                failed.add(job.index)
                rejections.add([Rejected(job.series.series_uid, job.series.files[0].parent, reason)])
    return [job for job in jobs if job.index not in failed]


def _write(task: tuple[_Job, SeriesWriter]) -> str | None:
    """Decode and write one series, in whatever process; say why where that can't be done."""
    job, writer = task
    try:
        volumes = [one.read() for one in (job.series, job.low_dose) if one is not None]
        boxes = job.boxes
        if job.resampling is not None:
            volumes = [job.resampling.volume(volume) for volume in volumes]
            boxes = job.resampling.boxes(boxes)
        writer.write(job.index, job.info(), volumes[0], boxes, volumes[1] if len(volumes) > 1 else None)
    except InputError as error:
        return str(error)
    return None


def _none_usable(sources: Sequence[Path], rejected: Sequence[Rejected], report: Path | None) -> InputError:
    """Make the error of sources all of whose CT was rejected, which the report tells all of."""
    if report is not None:
        _write_report(report, rejected)
    looked = ", ".join(str(source) for source in sources)
    more = f" (and {len(rejected) - 1} more)" if len(rejected) > 1 else ""
    return InputError(f"{looked}: none of the CT there can be used; {rejected[0].reason}{more}")


def _check_report(path: Path) -> None:
    """Refuse to overwrite a file that isn't a report of ours."""
    if path.is_dir() or (path.is_file() and not path.read_bytes().startswith(",".join(REPORT_COLUMNS).encode())):
        raise InputError(f"report ({path}): exists already and isn't a report of an earlier call")


def _write_report(path: Path, rejected: Sequence[Rejected]) -> None:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(REPORT_COLUMNS)
    table.writerows(map(csv_cell, (fault.series_uid, fault.path, fault.reason)) for fault in rejected)
    write_text(path, text.getvalue())


def _summary(
    out: Path,
    jobs: Sequence[_Job],
    skipped: Counter[str],
    rejected: Sequence[Rejected],
    warnings: Sequence[str],
    remedy: str,
) -> PrepareSummary:
    counts: dict[str, Counter[str]] = {name: Counter() for name in ("series", "slices", "slices_with_boxes", "boxes")}
    for job in jobs:
        counts["series"][job.split] += 1
        counts["slices"][job.split] += job.shape[0]
        counts["slices_with_boxes"][job.split] += len(np.unique(job.boxes[:, 0]))
        counts["boxes"][job.split] += len(job.boxes)
    split_of_patient = {job.series.patient_id: job.split for job in jobs}
    patients = Counter(split_of_patient.values())
    empty = [
        f"none of the {_patients(split_of_patient)} is in the split {split}; {remedy}"
        for split in SPLITS
        if not patients[split]
    ]
    return PrepareSummary(
        out=out,
        patients={split: patients[split] for split in SPLITS},
        skipped=skipped,
        rejected=tuple(rejected),
        warnings=(*warnings, *empty),
        **{name: {split: counter[split] for split in SPLITS} for name, counter in counts.items()},
    )
