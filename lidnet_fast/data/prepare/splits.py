"""Which patient trains, validates, tests: decided by patient, never by series or slice."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from lidnet_fast.data.annotations.csv import read_rows
from lidnet_fast.data.store.index import SPLITS
from lidnet_fast.errors import InputError


def split_of(patient_id: str, seed: int, val_fraction: float, test_fraction: float) -> str:
    """Return the split of a patient: a pure function of the seed and the patient's id.

    A patient keeps its split when others join or leave the study. The fractions are met on average over many patients;
    in a small study a split may well be empty.

    Args:
        patient_id: the patient.
        seed: another seed draws another split.
        val_fraction: expected fraction of patients in "val".
        test_fraction: expected fraction of patients in "test".
    """
    digest = hashlib.sha256(f"{seed}:{patient_id}".encode()).digest()
    draw = int.from_bytes(digest[:8], "big") / 2**64
    if draw < test_fraction:
        return "test"
    return "val" if draw < test_fraction + val_fraction else "train"


def check_fractions(val_fraction: float, test_fraction: float) -> None:
    """Refuse fractions that leave nothing to train on, unless all of it is to be tested on.

    Raises:
        InputError: a fraction is outside [0, 1) or both together reach 1, and `test_fraction` isn't 1.
    """
    if test_fraction == 1:
        return
    for name, fraction in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
        if not 0 <= fraction < 1:
            raise InputError(f"{name} must be in [0, 1), got {fraction}")
    if val_fraction + test_fraction >= 1:
        raise InputError(f"val_fraction + test_fraction must be below 1, got {val_fraction} + {test_fraction}")


def read_splits(path: Path, patients: Iterable[str]) -> dict[str, str]:
    """Read the split of every patient from a CSV file with the columns patient_id, split.

    Args:
        path: the file; it may list patients that aren't in the study.
        patients: the study's patients.

    Returns:
        Split by patient id, for the study's patients.

    Raises:
        InputError: wrong columns, an unknown split, a patient in two splits or in none. The message names the file, the
            line (both lines, of a patient in two splits) and the cause.
    """
    _, rows = read_rows(path, ("patient_id", "split"))
    listed: dict[str, tuple[str, int]] = {}
    for number, row in rows:
        patient, split = row["patient_id"], row["split"]
        if split not in SPLITS:
            raise InputError(f"{path}, line {number}: split {split!r} isn't one of {', '.join(SPLITS)}")
        earlier, earlier_number = listed.setdefault(patient, (split, number))
        if earlier != split:
            raise InputError(
                f"{path}: patient {patient} is in two splits, "
                f"{earlier} on line {earlier_number} and {split} on line {number}"
            )
    patients = sorted(set(patients))
    missing = [patient for patient in patients if patient not in listed]
    if missing:
        more = f" and {len(missing) - 1} more patients" if len(missing) > 1 else ""
        raise InputError(f"{path}: no line for patient {missing[0]}{more}")
    return {patient: listed[patient][0] for patient in patients}
