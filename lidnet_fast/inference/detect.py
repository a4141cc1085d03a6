"""From a folder of studies to a folder of the lesions in them: what `lidnet-fast detect` runs."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import groupby, repeat
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from lidnet_fast import __version__
from lidnet_fast.data.formats.dicom.images import DicomSeries
from lidnet_fast.data.formats.dicom.series import CTSeries, assemble, decode_slices
from lidnet_fast.data.formats.dicom.writer import Derivation
from lidnet_fast.data.formats.geometry import LOWEST_HU, Series
from lidnet_fast.data.formats.volumes.series import VolumeSeries
from lidnet_fast.device import Device, Precision, choose_device
from lidnet_fast.errors import InputError
from lidnet_fast.inference.acquisition import acquisition_of_series, acquisition_of_volume
from lidnet_fast.inference.lesions import BOXES, CANDIDATES, Lesion, read_lesions, write_lesions, write_tables
from lidnet_fast.inference.manifest import Manifest
from lidnet_fast.inference.slices import SliceDenoiser
from lidnet_fast.inference.sources import find
from lidnet_fast.inference.studies import (
    LOCK,
    Outside,
    Study,
    Summary,
    Worker,
    check_found,
    check_outside,
    claimed,
    name_of,
    one_ahead,
    places,
    writing,
)
from lidnet_fast.models.envelope import Envelope
from lidnet_fast.models.files import (
    WhichDetector,
    denoiser_file,
    detector_file,
    fingerprint,
    load_denoiser,
    load_trained_detector,
    model_name,
)
from lidnet_fast.models.linking import link
from lidnet_fast.models.slice_detector import SliceDetector
from lidnet_fast.neighbours import neighbours, slabs

MANIFEST = "detect.json"
OURS = {MANIFEST, LOCK, CANDIDATES, BOXES}
"""The names of the command's own files in its folder."""
_MOST_LESIONS = 100
"""Of a series: as many as LUNA16's evaluation counts."""


@dataclass(kw_only=True)
class DetectSummary(Summary):
    """What `detect` did; see `Summary`.

    Attributes:
        lesions: how many there are in the tables, those of earlier calls included.
    """

    what, doing = "searched", "detecting"

    lesions: int = 0

    def lines(self) -> list[str]:
        """Return the summary as lines of text."""
        first, *others = super().lines()
        return [first, f"  lesions: {self.lesions}", *others]


def detect(
    source: str | Path,
    out: str | Path,
    *,
    model: str | Path,
    detector: WhichDetector | None = None,
    denoise_first: bool = False,
    min_score: float | None = None,
    precision: Precision = "auto",
    device: Device = "auto",
    batch_size: int | None = None,
    follow_links: bool = False,
    reformats: bool = False,
    outside: Outside = "warn",
    max_volume_gib: float | None = None,
    any_values: bool = False,
    trust_code: bool = False,
) -> DetectSummary:
    """Look for lesions in every CT series below a folder; see docs/detect.md.

    The results of a series appear whole or not at all. The same call again resumes an interrupted one.

    Args:
        source: a folder, searched with everything below it, or a file: DICOM, NIfTI, MetaImage or NRRD.
        out: a new folder, or one that an earlier call with this model made.
        model: the folder of a run, or without `denoise_first` a `detector.pt`.
        detector: which of the run's; by default the co-trained one of denoised images, the frozen one of others.
        denoise_first: look at the images that the run's denoiser makes of them.
        min_score: boxes that score less are left out before others are linked; by default the detector's own threshold.
        precision: see `SliceDenoiser`.
        device: "auto" is the first GPU if there is one.
        batch_size: most slices at a time; None for 1 on the CPU and 8 on a GPU.
        follow_links: see `denoise`.
        reformats: see `denoise`.
        outside: what becomes of a series that lies outside of what the model was trained on: the denoiser where it is
            asked first, the detector otherwise; see `denoise`.
        max_volume_gib: see `denoise`.
        any_values: see `denoise`.
        trust_code: import the denoiser's class that the model file names by import path.

    Raises:
        InputError: something of this can't be used. What is wrong with a single series doesn't stop the others, and is
            among the summary's `failures`.
    """
    check_outside(outside)
    if detector is not None and detector not in get_args(WhichDetector):
        raise InputError(f"detector must be one of {', '.join(get_args(WhichDetector))}, got {detector!r}")
    if min_score is not None and not 0 <= min_score <= 1:
        raise InputError(f"min_score must lie in [0, 1], got {min_score}")
    if batch_size is not None and batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}")
    source, out, model = Path(source), Path(out), Path(model)
    if not model.is_dir() and (denoise_first or detector is not None):
        option = "denoise_first" if denoise_first else "detector"
        raise InputError(f"{model}: {option} needs the folder of a run")
    which = detector or ("cotrained" if denoise_first else "frozen")
    networks = _Networks.load(
        detector_file(model, which),
        denoiser_file(model) if denoise_first else None,
        choose_device(device),
        precision,
        batch_size,
        trust_code=trust_code,
    )
    found = find(
        source,
        out,
        follow_links=follow_links,
        reformats=reformats,
        max_volume_gib=max_volume_gib,
        any_values=any_values,
    )
    check_found(found)
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is a file; give a folder")
    which_of_run = which if model.is_dir() else None
    settings = {"detector": which_of_run, **networks.settings, "min_score": min_score}
    with ExitStack() as held:
        held.enter_context(writing(source, found, out))
        manifest = Manifest(out, MANIFEST, "detected lesions", settings, measured=networks.envelope is not None)
        held.enter_context(claimed(out, DetectSummary.doing))
        derivation = networks.derivation(settings, manifest)
        targets: dict[Path, Study] = {}
        for one, inside in places(found, source, out, OURS):
            name = derivation.uid("series", one.uid) if isinstance(one, DicomSeries) else inside.name
            folder = inside if isinstance(one, DicomSeries) else inside.parent
            targets[out / folder / f"{name}.json"] = one
        summary = DetectSummary(out=out, account=found, warned=outside == "warn")
        worker = _Detecting(networks, settings, derivation, summary, manifest, refusing=outside == "refuse")
        worker.run(targets)
        summary.lesions = write_tables(out, map(read_lesions, filter(Path.exists, targets)))
    return summary


@dataclass(frozen=True)
class _Networks:
    """The networks that look at slices, and what they say of themselves."""

    detector: SliceDetector
    denoiser: SliceDenoiser | None
    envelope: Envelope | None
    batch_size: int
    settings: Mapping[str, Any]
    name: str

    @classmethod
    def load(
        cls,
        detector: Path,
        denoiser: Path | None,
        device: torch.device,
        precision: Precision,
        batch_size: int | None,
        *,
        trust_code: bool,
    ) -> "_Networks":
        trained = load_trained_detector(detector)
        looking = SliceDetector(trained.network, trained.window, trained.crop, device, precision)
        first = None
        if denoiser is not None:
            first = SliceDenoiser(
                load_denoiser(denoiser, trust_code=trust_code), device, precision=precision, batch_size=batch_size
            )
        settings = {
            "model": fingerprint(detector),
            "denoised_by": None if denoiser is None else fingerprint(denoiser),
            "precision": looking.precision,
        }
        envelope = trained.envelope if first is None else first.envelope
        if first is not None and envelope is not None and trained.envelope is not None and not first.context:
            # What the denoiser does is the same at any distance; what the detector sees beside it isn't.
            envelope = replace(envelope, slice_distance=trained.envelope.slice_distance)
        size = batch_size or (1 if device.type == "cpu" else 8)
        return cls(looking, first, envelope, size, settings, model_name(detector))

    def derivation(self, settings: Mapping[str, Any], manifest: Manifest) -> Derivation:
        """What is said of lesions in reports, whose UIDs follow from the settings."""
        seen = "images as they are"
        if self.settings["denoised_by"] is not None:
            seen = f"images denoised first by the model with SHA-256 {self.settings['denoised_by'][:16]}"
        return Derivation(
            model=f"{self.name} {self.settings['model'][:8]}",
            description=f"Lesions found by a convolutional network in {seen}: lidnet_fast {__version__}, model "
            f"{self.name}, SHA-256 {self.settings['model'][:16]}, computed in {self.settings['precision']}",
            identity=json.dumps(settings, sort_keys=True),
            created=manifest.created,
        )

    @property
    def around(self) -> int:
        """Neighbouring slices on each side that what is found in a slice depends on."""
        return self.detector.detector.context + (0 if self.denoiser is None else self.denoiser.context)

    def look(self, hu: np.ndarray, before: int, after: int) -> list[dict[str, Tensor]]:
        """What there is in slices [N,H,W], HU, of which the first and the last are there as neighbours only."""
        hu = np.maximum(hu, LOWEST_HU).astype(np.float32)
        context = self.detector.detector.context
        if self.denoiser is not None:
            unseen = max(0, before - context), max(0, after - context)
            hu = np.maximum(self.denoiser(hu, *unseen), LOWEST_HU)
            before, after = before - unseen[0], after - unseen[1]
        wanted = np.arange(before, len(hu) - after)
        return self.detector(torch.from_numpy(hu[neighbours(wanted, len(hu), context)]))


class _Detecting(Worker):
    """Reading and computing overlap; of a series, its boxes are held, and a batch of its slices."""

    def __init__(
        self,
        networks: _Networks,
        settings: Mapping[str, Any],
        derivation: Derivation,
        summary: DetectSummary,
        manifest: Manifest,
        *,
        refusing: bool,
    ) -> None:
        super().__init__(derivation, summary, manifest, networks.envelope, refusing=refusing)
        self.networks, self.settings, self.min_score = networks, settings, settings["min_score"] or 0.0

    def _series(self, found: DicomSeries, target: Path, pool: Executor) -> Iterator[None]:
        name = name_of(found)
        if target.exists():
            self._already(name, target)
            yield from repeat(None, len(found.files))
            return
        series = assemble(found, "resampleable")
        _check_scan(series)
        where = self._outside(name, lambda: acquisition_of_series(found, pool))
        detections: list[dict[str, Tensor]] = []
        size, read = self.networks.batch_size, 0

        def parts() -> Iterator[np.ndarray]:
            nonlocal read
            for files, hu in one_ahead(_reader(series), _batches(series, size), pool):
                read += len(files)
                yield from (hu[start : start + size] for start in range(0, len(hu), size))

        shown = 0
        for slab in slabs(parts(), self.networks.around):
            detections += self._checked(*slab, series.files[len(detections)])
            yield from repeat(None, read - shown)
            shown = read
        lesions = self._lesions(series, detections)
        if lesions:
            from lidnet_fast.inference.report import write_report  # highdicom, which no other command needs

            write_report(target.with_suffix(".dcm"), series, lesions, self._derivation(where))
        self._finish(name, target, series, lesions, where)

    def _volume(self, volume: VolumeSeries, target: Path) -> Iterator[None]:
        name = name_of(volume)
        if target.exists():
            self._already(name, target)
            yield from repeat(None, volume.shape[0])
            return
        _check_scan(volume)
        slices = volume.read_hu()
        where = self._outside(name, lambda: acquisition_of_volume(volume, slices))
        detections: list[dict[str, Tensor]] = []
        size = self.networks.batch_size
        parts = (slices[start : start + size] for start in range(0, len(slices), size))
        for slab in slabs(parts, self.networks.around):
            found = self._checked(*slab, volume.header.path)
            detections += found
            yield from repeat(None, len(found))
        self._finish(name, target, volume, self._lesions(volume, detections), where)

    def _checked(self, hu: np.ndarray, before: int, after: int, path: Path) -> list[dict[str, Tensor]]:
        try:
            found = self.networks.look(hu, before, after)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        return [{key: values[one["scores"] >= self.min_score] for key, values in one.items()} for one in found]

    def _lesions(self, series: Series, detections: Sequence[dict[str, Tensor]]) -> list[Lesion]:
        best = link(detections)[:_MOST_LESIONS]
        return [Lesion.at(number, candidate, series) for number, candidate in enumerate(best, 1)]

    def _finish(self, name: str, target: Path, series: Series, lesions: Sequence[Lesion], where: list[str]) -> None:
        self._note(name, target, where)
        found_by = {**self.settings, "outside": where if self.envelope is not None else None}
        write_lesions(target, series, lesions, found_by)
        self.summary.done += 1
        self.summary.slices += series.shape[0]


def _check_scan(series: Series) -> None:
    if series.shape[0] == 1:
        raise InputError(
            f"{series.files[0]}: is the only slice of its series, and lesions are found in scans. "
            "To fix: give the whole series"
        )


def _batches(series: CTSeries, size: int) -> Iterator[list[tuple[Path, list[int]]]]:
    """Files with their frames, in the order of the slices: so many files, or one that is multi-frame."""
    frames = series.frames or repeat(0, len(series.files))
    files = [
        (path, [frame for _, frame in of_file])
        for path, of_file in groupby(zip(series.files, frames, strict=True), key=lambda place: place[0])
    ]
    step = 1 if series.frames else size
    return (files[start : start + step] for start in range(0, len(files), step))


def _reader(series: CTSeries) -> Callable[[list[tuple[Path, list[int]]]], tuple[list[Path], np.ndarray]]:
    def read(batch: list[tuple[Path, list[int]]]) -> tuple[list[Path], np.ndarray]:
        hu = np.concatenate([decode_slices(path, series.shape[1:], frames) for path, frames in batch])
        return [path for path, _ in batch], hu

    return read
