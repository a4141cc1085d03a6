"""From a user's CT to a store: `prepare` is what `lidnet-fast prepare` runs."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lidnet_fast.data.boxes import read_boxes
from lidnet_fast.data.dicom import CTSeries, read_volume, scan
from lidnet_fast.data.dose import DoseSimulation
from lidnet_fast.data.splits import check_fractions, read_splits, split_of
from lidnet_fast.data.store import SPLITS, SeriesInfo
from lidnet_fast.data.store_writer import StoreWriter
from lidnet_fast.errors import InputError
from lidnet_fast.progress import progress

_SAME_PLACE_MM = 0.1
"""A low-dose slice belongs to a normal-dose slice when their first pixels are no further apart than this."""


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
        skipped: number of files that were left aside, by reason.
        warnings: what the user should know, one sentence each.
    """

    out: Path
    patients: dict[str, int]
    series: dict[str, int]
    slices: dict[str, int]
    slices_with_boxes: dict[str, int]
    boxes: dict[str, int]
    skipped: dict[str, int]
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
            lines.append("  left aside: " + ", ".join(f"{count} files {why}" for why, count in self.skipped.items()))
        return lines + [f"  warning: {warning}" for warning in self.warnings]


def prepare(
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    boxes: str | Path | None = None,
    low_dose: str | Path | None = None,
    simulate_dose: float | None = None,
    photons: float | None = None,
    electronic_noise: float | None = None,
    splits: str | Path | None = None,
    val_fraction: float = 0.1,
    test_fraction: float = 0.1,
    seed: int = 0,
) -> PrepareSummary:
    """Turn DICOM CT series into a store to train on.

    Headers, boxes, splits and pairs are checked before the first pixel is decoded; a store appears whole or not at all.

    Args:
        sources: folders with normal-dose CT (searched with everything below them) or single files.
        out: the store's folder; must not exist yet.
        boxes: CSV file of lesion boxes (docs/box_csv.md); None prepares a study without boxes.
        low_dose: folder with low-dose CT of the same scans. A low-dose series belongs to the normal-dose series of the
            same patient with the same size, spacing and slice positions.
        simulate_dose: dose of the simulated low dose over that of the images, in (0, 1]. The store keeps the parameters
            only; the noise itself is made anew in training.
        photons: of the simulation: incident photons per ray at the images' dose; None is `DoseSimulation`'s default.
        electronic_noise: of the simulation: variance of the electronic noise, photons squared; None as above.
        splits: CSV file with the columns patient_id, split; None draws the splits.
        val_fraction: expected fraction of patients drawn for validation.
        test_fraction: expected fraction of patients drawn for testing.
        seed: of the draw.

    Raises:
        InputError: something of this can't be used; the message names the argument, file or series and the cause.
    """
    out = Path(out)
    if out.exists():
        raise InputError(f"{out}: exists already; a store is written to a new folder")
    if not sources:
        raise InputError("sources: at least one folder with CT is needed")
    simulation = _simulation(low_dose, simulate_dose, photons, electronic_noise)
    check_fractions(val_fraction, test_fraction)
    for table in (boxes, splits):
        if table is not None and not Path(table).is_file():
            raise InputError(f"{table}: there is no such file")

    found = scan([Path(source) for source in sources])
    boxes_of = read_boxes(Path(boxes), found.series) if boxes is not None else {}
    patients = {series.patient_id for series in found.series}
    if splits is not None:
        split_by_patient = read_splits(Path(splits), patients)
        split_record: dict[str, Any] = {"by": "table", "patients": split_by_patient}
    else:
        split_by_patient = {patient: split_of(patient, seed, val_fraction, test_fraction) for patient in patients}
        split_record = {"by": "draw", "seed": seed, "val_fraction": val_fraction, "test_fraction": test_fraction}
    warnings = _split_warnings(split_by_patient, drawn=splits is None)
    pairs: dict[str, CTSeries] = {}
    if low_dose is not None:
        pairs, unused = _pair(found.series, scan([Path(low_dose)], "reading low-dose headers").series)
        if unused:
            warnings.append(f"{unused} low-dose series belong to no normal-dose series and are left aside")

    counts: dict[str, Counter[str]] = {name: Counter() for name in ("series", "slices", "slices_with_boxes", "boxes")}
    with StoreWriter(out, simulation=simulation, split=split_record) as writer:
        for series in progress(found.series, "writing the store"):
            split = split_by_patient[series.patient_id]
            rows = boxes_of.get(series.series_uid, np.empty((0, 5), np.float32))
            pair = pairs.get(series.series_uid)
            writer.add_series(
                _info(series, split, pair is not None),
                read_volume(series),
                rows,
                read_volume(pair) if pair is not None else None,
            )
            counts["series"][split] += 1
            counts["slices"][split] += series.shape[0]
            counts["slices_with_boxes"][split] += len(np.unique(rows[:, 0]))
            counts["boxes"][split] += len(rows)
    per_split = {name: {split: counter[split] for split in SPLITS} for name, counter in counts.items()}
    patient_counts = Counter(split_by_patient.values())
    return PrepareSummary(
        out=out,
        patients={split: patient_counts[split] for split in SPLITS},
        skipped=found.skipped,
        warnings=tuple(warnings),
        **per_split,
    )


def _simulation(
    low_dose: str | Path | None, dose_fraction: float | None, photons: float | None, electronic_noise: float | None
) -> dict[str, Any] | None:
    """Check the arguments that choose the low dose and return the parameters that the store keeps."""
    chosen = {"photons": photons, "electronic_noise": electronic_noise}
    given: dict[str, Any] = {name: value for name, value in chosen.items() if value is not None}
    if dose_fraction is None:
        if given:
            raise InputError(f"{next(iter(given))}: means something only together with simulate_dose")
        return None
    if low_dose is not None:
        raise InputError(f"low_dose ({low_dose}) and simulate_dose ({dose_fraction}): give one of the two")
    try:
        return DoseSimulation(dose_fraction=dose_fraction, **given).to_dict()
    except ValueError as error:
        raise InputError(f"simulate_dose: {error}") from error


def _split_warnings(split_by_patient: dict[str, str], drawn: bool) -> list[str]:
    """Warn of empty splits; refuse an empty training split."""
    empty = [split for split in SPLITS if split not in split_by_patient.values()]
    remedy = (
        "give another seed, other fractions or a split table" if drawn else "list patients for it in the split table"
    )
    patients = f"{len(split_by_patient)} patient{'s' if len(split_by_patient) > 1 else ''}"
    if "train" in empty:
        raise InputError(f"splits: none of the {patients} is in the split train; {remedy}")
    return [f"none of the {patients} is in the split {split}; {remedy}" for split in empty]


def _info(series: CTSeries, split: str, has_low_dose: bool) -> SeriesInfo:
    return SeriesInfo(
        series_id=series.series_uid,
        patient_id=series.patient_id,
        split=split,
        shape=series.shape,
        spacing=series.spacing,
        origin=series.positions[0],
        orientation=series.orientation,
        has_low_dose=has_low_dose,
    )


def _pair(normal_dose: Sequence[CTSeries], low_dose: Sequence[CTSeries]) -> tuple[dict[str, CTSeries], int]:
    """Find every normal-dose series' low-dose series; also say how many low-dose series were left over."""
    pairs: dict[str, CTSeries] = {}
    partner: dict[str, str] = {}
    uids = {series.series_uid for series in normal_dose}
    for series in low_dose:
        if series.series_uid in uids:
            raise InputError(
                f"low_dose: series {series.series_uid} in {series.files[0].parent} is among the normal-dose series too"
            )
    for series in normal_dose:
        candidates = [other for other in low_dose if _same_scan(series, other)]
        name = f"series {series.series_uid} of patient {series.patient_id}"
        if not candidates:
            raise InputError(f"low_dose: no series there has the patient, size and slice positions of {name}")
        if len(candidates) > 1:
            raise InputError(
                f"low_dose: {candidates[0].series_uid} and {candidates[1].series_uid} both have the patient, size and "
                f"slice positions of {name}"
            )
        pair = candidates[0]
        if pair.series_uid in partner:
            raise InputError(
                f"low_dose: series {pair.series_uid} has the patient, size and slice positions of both "
                f"{partner[pair.series_uid]} and {series.series_uid}"
            )
        partner[pair.series_uid] = series.series_uid
        pairs[series.series_uid] = pair
    return pairs, len(low_dose) - len(partner)


def _same_scan(one: CTSeries, two: CTSeries) -> bool:
    return (
        one.patient_id == two.patient_id
        and one.shape == two.shape
        and np.allclose(one.spacing[1:], two.spacing[1:], rtol=0, atol=1e-3)
        and np.allclose(one.orientation, two.orientation, rtol=0, atol=1e-3)
        and np.allclose(one.positions, two.positions, rtol=0, atol=_SAME_PLACE_MM)
    )
