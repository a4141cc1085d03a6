"""What `prepare` says of its work: the summary, and the CSV of what was rejected."""

import csv
import dataclasses
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lidnet_fast.data.formats.account import Account, Rejected
from lidnet_fast.data.store.index import SPLITS, Index, box_keys
from lidnet_fast.errors import InputError
from lidnet_fast.files import write_text
from lidnet_fast.strangers_text import csv_cell

REPORT_COLUMNS = ("series_uid", "path", "reason")


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
        account: what became of the files.
        warnings: what the user should know, one sentence each.
    """

    out: Path
    patients: dict[str, int]
    series: dict[str, int]
    slices: dict[str, int]
    slices_with_boxes: dict[str, int]
    boxes: dict[str, int]
    account: Account
    warnings: tuple[str, ...]

    @property
    def skipped(self) -> Counter[str]:
        """How many files were skipped for which reason."""
        return self.account.skipped

    @property
    def rejected(self) -> list[Rejected]:
        """CT that couldn't be used."""
        return self.account.rejected

    def lines(self) -> list[str]:
        """Return the summary as lines of text."""
        lines = [f"{self.out}:"]
        for split in SPLITS:
            lines.append(
                f"  {split}: {self.patients[split]} patients, {self.series[split]} series, "
                f"{self.slices[split]} slices, {self.boxes[split]} boxes on {self.slices_with_boxes[split]} of them"
            )
        return [*lines, *self.account.lines(), *(f"  warning: {warning}" for warning in self.warnings)]


def check_report(path: Path) -> None:
    """Refuse to overwrite a file that isn't a report of ours."""
    if path.is_dir() or (path.is_file() and not path.read_bytes().startswith(",".join(REPORT_COLUMNS).encode())):
        raise InputError(f"report ({path}): exists already and isn't a report of an earlier call")


def write_report(path: Path, rejected: Sequence[Rejected]) -> None:
    """Write what was rejected and why."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(REPORT_COLUMNS)
    table.writerows(map(csv_cell, (fault.series_uid, fault.path, fault.reason)) for fault in rejected)
    write_text(path, text.getvalue())


def summarise(
    out: Path,
    index: Index,
    account: Account,
    warnings: Sequence[str],
    remedy: str,
) -> PrepareSummary:
    """Count what a store holds; `remedy` says what to do about an empty split."""
    split_of_box = index.split[index.box_series]
    patients = len(np.unique(index.patient_id))
    counts: dict[str, dict[str, int]] = {
        name: {} for name in ("patients", "series", "slices", "slices_with_boxes", "boxes")
    }
    for number, split in enumerate(SPLITS):
        series, boxes = index.split == number, split_of_box == number
        counts["patients"][split] = len(np.unique(index.patient_id[series]))
        counts["series"][split] = int(series.sum())
        counts["slices"][split] = int(index.shape[series, 0].sum())
        counts["boxes"][split] = int(boxes.sum())
        counts["slices_with_boxes"][split] = len(np.unique(box_keys(index.box_series[boxes], index.box_z[boxes])))
    to_evaluate = counts["patients"]["test"] == patients
    empty = (
        ["all patients are in the split test: the store is for evaluation only"]
        if to_evaluate
        else [
            f"none of the {counted_patients(patients)} is in the split {split}; {remedy}"
            for split in SPLITS
            if not counts["patients"][split]
        ]
    )
    if counts["patients"]["train"] and not counts["boxes"]["train"]:
        empty.append(
            "no lesion box is in the split train, so that LIDnet can't be trained on this store. "
            "To fix: prepare it with --boxes or --insert-lesions"
        )
    return PrepareSummary(out=out, account=account, warnings=(*warnings, *empty), **counts)


def counted_patients(count: int) -> str:
    """In words: "1 patient", "12 patients"."""
    return f"{count} patient{'s' if count > 1 else ''}"
