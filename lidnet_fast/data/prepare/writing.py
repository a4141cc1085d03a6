"""Writing the planned series of a store, in this process or in many."""

import dataclasses
from collections.abc import Sequence
from concurrent.futures import Executor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from lidnet_fast.data.formats.account import Account, Rejected
from lidnet_fast.data.formats.geometry import Series
from lidnet_fast.data.lesions.insertion import Insertion, insert_lesions
from lidnet_fast.data.prepare.jobs import run
from lidnet_fast.data.prepare.resample import Resampling
from lidnet_fast.data.store.index import SeriesInfo
from lidnet_fast.data.store.writer import SeriesWriter, StoreWriter
from lidnet_fast.errors import InputError
from lidnet_fast.files import as_private_as


@dataclasses.dataclass(frozen=True)
class Job:
    """One series to be written; pickles."""

    index: int
    series: Series
    split: str
    boxes: np.ndarray
    low_dose: Series | None
    resampling: Resampling | None
    insertion: Insertion | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(Z, H, W), as it is written."""
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
            slice_thickness=self.series.slice_thickness,
            kernel=self.series.kernel,
            body_part=self.series.body_part,
        )

    def files(self) -> list[Path]:
        """The files of both doses."""
        return list(dict.fromkeys([*self.series.files, *(self.low_dose.files if self.low_dose else ())]))

    def fingerprint(self) -> Any:
        """What the written series depends on, JSON-able; files count by their names, sizes and times."""
        try:
            states = [(path, path.stat()) for path in self.files()]
        except OSError as error:
            raise InputError(f"{error.filename}: can't be read any more: {error.strerror}") from error
        return [
            dataclasses.asdict(self.info()),
            [(str(path), state.st_size, state.st_mtime_ns) for path, state in states],
            self.boxes.tolist(),
            self.resampling and dataclasses.asdict(self.resampling),
            self.insertion and self.insertion.record(),
        ]


def write_all(jobs: Sequence[Job], writer: StoreWriter, account: Account, pool: Executor | None) -> list[Job]:
    """Write what isn't written yet; return the jobs whose series are in the store."""
    to_do = [job for job in jobs if job.series.series_uid not in writer.done]
    tasks = [(job, writer.series_writer()) for job in to_do]
    failed = set()
    with closing(run(pool, _write, tasks, "writing the store")) as results:
        for job, reason in zip(to_do, results, strict=True):
            if reason is not None:
                failed.add(job.index)
                account.reject([Rejected(job.series.series_uid, job.series.files[0].parent, reason, job.files())])
    return [job for job in jobs if job.index not in failed]


def _write(task: tuple[Job, SeriesWriter]) -> str | None:
    """Decode and write one series, in whatever process; say why where that can't be done."""
    job, writer = task
    try:
        volumes = [one.read() for one in (job.series, job.low_dose) if one is not None]
        boxes = job.boxes
        if job.resampling is not None:
            volumes = [job.resampling.volume(volume) for volume in volumes]
            boxes = job.resampling.boxes(boxes)
        if job.insertion is not None:
            volumes = [np.array(volume) for volume in volumes]
            boxes = insert_lesions(volumes, job.series.spacing, job.insertion, job.series.series_uid)
        with as_private_as(job.files()):
            writer.write(job.index, job.info(), volumes[0], boxes, volumes[1] if len(volumes) > 1 else None)
    except InputError as error:
        return str(error)
    return None
