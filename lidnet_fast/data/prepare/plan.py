"""From a user's CT to a store: `prepare` is what `lidnet-fast prepare` runs."""

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import Executor
from contextlib import ExitStack
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np

from lidnet_fast.data.annotations import read_annotations
from lidnet_fast.data.formats.account import Account, Found, Rejected
from lidnet_fast.data.formats.geometry import Series
from lidnet_fast.data.formats.sources import find_series
from lidnet_fast.data.prepare.jobs import executor
from lidnet_fast.data.prepare.options import PrepareOptions
from lidnet_fast.data.prepare.pairing import pair
from lidnet_fast.data.prepare.report import PrepareSummary, counted_patients, summarise, write_report
from lidnet_fast.data.prepare.resample import Resampling, resampling
from lidnet_fast.data.prepare.splits import read_splits, split_of
from lidnet_fast.data.prepare.writing import Job, write_all
from lidnet_fast.data.pseudonyms import Pseudonyms, write_table
from lidnet_fast.data.store.reader import Store
from lidnet_fast.data.store.writer import StoreWriter
from lidnet_fast.errors import InputError
from lidnet_fast.files import as_private_as

_SPLIT_REMEDY = {
    "draw": "give another seed, other fractions or a split table",
    "table": "list patients for it in the split table",
}


def prepare(sources: Sequence[str | Path], out: str | Path, **options: Any) -> PrepareSummary:
    """Turn CT series into a store to train on; docs/datasets.md has a command for each of the published data sets.

    Headers, boxes, splits and pairs are checked before the first volume is decoded; a store appears whole or not at
    all. Interrupted, even killed, the same call resumes. `workers` and `dask` don't change the store.

    Args:
        sources: folders with normal-dose CT (searched with everything below them) or single files: DICOM, .mhd, .mha,
            .nrrd, .nhdr, .nii, .nii.gz, DeepLesion.
        out: the store's folder; must not exist yet.
        options: those of `PrepareOptions`, by name.

    Raises:
        InputError: something of this can't be used; the message names the argument, file or series and the cause.
    """
    out = Path(out).absolute()
    if out.exists():
        raise InputError(f"{out}: exists already; a store is written to a new folder")
    if not sources:
        raise InputError("sources: at least one folder with CT is needed")
    folders = [Path(source).absolute() for source in sources]
    chosen = PrepareOptions(**options)
    with executor(chosen.workers, chosen.dask) as pool, ExitStack() as held:
        found = _found(folders, "reading headers", chosen, pool)
        tables = [Path(table) for table in (chosen.low_dose, chosen.boxes, chosen.splits) if table is not None]
        files = [file for one in found.series for file in one.files]
        held.enter_context(as_private_as([*folders, *tables, *files]))
        series, pairs, warnings = _paired(found, chosen, pool)
        boxes_of = _boxes(chosen, series, found)
        series, resamplings = _resamplings(series, pairs, boxes_of, found) if chosen.resample else (series, {})
        if not series:
            raise _none_usable(folders, found.rejected, chosen.report)
        pseudonyms = chosen.pseudonyms()
        if pseudonyms is not None:  # nor does their order tell who is who
            series = sorted(series, key=lambda one: pseudonyms.series(one.series_uid))
        split_of_patient, split_record = _splits(series, chosen, pseudonyms)
        insertion = chosen.insertion()
        jobs = [
            Job(
                index,
                one if pseudonyms is None else pseudonyms.info(one),
                split_of_patient[one.patient_id],
                boxes_of[one.series_uid],
                pairs.get(one.series_uid),
                resamplings.get(one.series_uid),
                insertion,
            )
            for index, one in enumerate(series)
        ]
        simulation = chosen.simulation()
        key = _digest([simulation, [job.fingerprint() for job in jobs]])
        with StoreWriter(
            out,
            simulation=simulation,
            split=split_record,
            inserted_lesions=None if insertion is None else insertion.record(),
            pseudonyms=None if pseudonyms is None else pseudonyms.fingerprint,
            volume_format=chosen.volume_format,
            key=key,
        ) as writer:
            written = write_all(jobs, writer, found, pool)
            if not written:
                raise _none_usable(folders, found.rejected, chosen.report)
            found.close(path for job in written for path in job.files())
            if chosen.report is not None:
                write_report(Path(chosen.report), found.rejected)
            if pseudonyms is not None and chosen.pseudonym_table is not None:
                write_table(Path(chosen.pseudonym_table), pseudonyms, series)
    if insertion is not None:
        warnings.append("its lesions were inserted: none of them is a patient's own")
    return summarise(out, Store(out).index, found, warnings, _SPLIT_REMEDY[split_record["by"]])


def _found(sources: Sequence[Path], what: str, options: PrepareOptions, pool: Executor | None) -> Found[Series]:
    names = ("strict", "resample", "follow_links", "reformats", "max_volume_gib", "any_values")
    return find_series(sources, what, **{name: getattr(options, name) for name in names}, executor=pool)


def _paired(
    sources: Found[Series], options: PrepareOptions, pool: Executor | None
) -> tuple[list[Series], dict[str, Series], list[str]]:
    """Find the low-dose series, in their folder or among the series by their description, and pair them.

    Returns:
        The normal-dose series, their low-dose series by UID, and warnings.
    """
    series, description = sources.series, options.low_dose_description
    if options.low_dose is not None:
        found = _found([Path(options.low_dose).absolute()], "reading low-dose headers", options, pool)
        sources.take(found)
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
    pairs, unpaired = pair(series, low_dose)
    warnings = []
    for one in series:
        other = pairs.get(one.series_uid)
        if other is not None and one.kernel and other.kernel and one.kernel != other.kernel:
            warnings.append(f"series {one.series_uid} has the kernel {one.kernel}, its low dose {other.kernel}")
    return sources.drop(unpaired, series), pairs, warnings


def _boxes(options: PrepareOptions, series: Sequence[Series], account: Account) -> dict[str, np.ndarray]:
    """The boxes that came with the images, and those of the user's file."""
    own = {one.series_uid: np.array(one.boxes, np.float32).reshape(-1, 5) for one in series}
    if options.insert_lesions is not None:
        for uid, rows in own.items():
            if len(rows):
                raise InputError(f"insert_lesions: series {uid} has boxes of its own. To fix: leave the option out")
    if options.boxes is None:
        return own
    rejected = frozenset(fault.series_uid for fault in account.rejected)
    read = read_annotations(Path(options.boxes), series, rejected=rejected, readers=options.readers)
    return {uid: np.concatenate([rows, read[uid]]) for uid, rows in own.items()}


def _resamplings(
    series: Sequence[Series], pairs: dict[str, Series], boxes_of: dict[str, np.ndarray], account: Account
) -> tuple[list[Series], dict[str, Resampling]]:
    """Say how irregular series become regular; also return the series that are or can be made so."""
    ways: dict[str, Resampling] = {}
    rejected = []
    for one in series:
        try:
            way = resampling(one, boxes_of[one.series_uid])
        except InputError as error:
            both = [path for each in (one, pairs.get(one.series_uid)) if each is not None for path in each.files]
            rejected.append(Rejected(one.series_uid, one.files[0].parent, str(error), both))
            continue
        if way is not None:
            ways[one.series_uid] = way
    return account.drop(rejected, series), ways


def _splits(
    series: Sequence[Series], options: PrepareOptions, pseudonyms: Pseudonyms | None
) -> tuple[dict[str, str], dict[str, Any]]:
    """Return the split of every patient, and the record of how it came about; pseudonyms are drawn and recorded."""
    patients = sorted({one.patient_id for one in series})
    own: dict[str, str] = {}
    if options.splits is not None:
        chosen = read_splits(Path(options.splits), patients)
        record: dict[str, Any] = {"by": "table", "patients": chosen}
    else:
        for one in series:
            if one.split is not None and own.setdefault(one.patient_id, one.split) != one.split:
                raise InputError(
                    f"splits: the data set puts patient {one.patient_id} into {own[one.patient_id]} and {one.split}"
                )
        draw = {option: getattr(options, option) for option in ("seed", "val_fraction", "test_fraction")}
        name = str if pseudonyms is None else pseudonyms.patient
        chosen = {patient: split_of(name(patient), **draw) for patient in patients} | own
        record = {"by": "draw", **draw}
        if own:
            record["given"] = own
    to_evaluate = options.splits is not None or options.test_fraction == 1 or own.keys() == chosen.keys()
    if "train" not in chosen.values() and not (to_evaluate and set(chosen.values()) == {"test"}):
        raise InputError(
            f"splits: none of the {counted_patients(len(chosen))} is in the split train; {_SPLIT_REMEDY[record['by']]}"
        )
    return chosen, record if pseudonyms is None else pseudonyms.split(record)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _none_usable(sources: Sequence[Path], rejected: Sequence[Rejected], report: str | Path | None) -> InputError:
    """Make the error of sources all of whose CT was rejected; the report lists all of it."""
    if report is not None:
        write_report(Path(report), rejected)
    looked = ", ".join(str(source) for source in sources)
    more = f" (and {len(rejected) - 1} more)" if len(rejected) > 1 else ""
    return InputError(f"{looked}: none of the CT there can be used; {rejected[0].reason}{more}")
