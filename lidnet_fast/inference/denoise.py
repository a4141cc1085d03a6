"""From a folder of studies to a folder of denoised studies: what `lidnet-fast denoise` runs."""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby, repeat
from pathlib import Path
from typing import Any

import numpy as np

from lidnet_fast import __version__
from lidnet_fast.data.formats.dicom.images import DicomSeries
from lidnet_fast.data.formats.dicom.writer import CTImage, Derivation, write_derived
from lidnet_fast.data.formats.geometry import LOWEST_HU
from lidnet_fast.data.formats.volumes.files import is_volume, write_voxels
from lidnet_fast.data.formats.volumes.series import VolumeSeries
from lidnet_fast.device import Device, Precision, choose_device
from lidnet_fast.errors import InputError
from lidnet_fast.files import move_whole, own_folder, remove_temporary
from lidnet_fast.inference.acquisition import acquisition_of_series, acquisition_of_volume
from lidnet_fast.inference.manifest import Manifest
from lidnet_fast.inference.series import frames_in_place, read_ahead, with_neighbours
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
    places,
    writing,
)
from lidnet_fast.inference.volumes import check_free, rounded_hu
from lidnet_fast.models.files import denoiser_file, fingerprint, load_denoiser, model_name

MANIFEST = "denoise.json"
OURS = {MANIFEST, LOCK}
"""The names of the command's own files in its folder."""


@dataclass(kw_only=True)
class DenoiseSummary(Summary):
    """What `denoise` did; see `Summary`."""

    what, doing = "denoised", "denoising"

    @property
    def denoised(self) -> int:
        """Series and volumes that this call denoised."""
        return self.done


def denoise(
    source: str | Path,
    out: str | Path,
    *,
    model: str | Path,
    precision: Precision = "auto",
    device: Device = "auto",
    tile: int | None = None,
    batch_size: int | None = None,
    blend: float = 1.0,
    follow_links: bool = False,
    reformats: bool = False,
    outside: Outside = "warn",
    max_volume_gib: float | None = None,
    any_values: bool = False,
    trust_code: bool = False,
) -> DenoiseSummary:
    """Denoise every CT series below a folder, slice by slice; see docs/denoise.md.

    Each series and volume appears whole or not at all. The same call again resumes an interrupted one.

    Args:
        source: a folder, searched with everything below it, or a file: DICOM, NIfTI, MetaImage or NRRD.
        out: a new folder, or one that an earlier call with this model made; for a volume, also the file to make.
        model: the folder of a run, a `denoiser.pt`, or what `lidnet-fast publish` made: the folder or its `model.onnx`.
        precision: see `SliceDenoiser`.
        device: "auto" is the first GPU if there is one.
        tile: see `SliceDenoiser`.
        batch_size: see `SliceDenoiser`.
        blend: see `SliceDenoiser`.
        follow_links: follow links in the source to wherever they lead; by default to inside the source only.
        reformats: take reformats (coronal and sagittal sections, projections), which are skipped otherwise.
        outside: what becomes of a series that lies outside of what the model was trained on: "warn" denoises it and
            says so, "accept" denoises it, "refuse" doesn't. Results and `denoise.json` say so in any case.
        max_volume_gib: up to how many GiB a compressed volume may unpack; None for the usual limits of size and ratio.
        any_values: take volumes whose values don't look like HU: none is below -50.
        trust_code: import the class that the model file names by import path.

    Raises:
        InputError: something of this can't be used. What is wrong with a single series doesn't stop the others, and is
            among the summary's `failures`.
    """
    check_outside(outside)
    source, out = Path(source), Path(out)
    file = denoiser_file(model)
    denoiser = SliceDenoiser(
        load_denoiser(file, trust_code=trust_code),
        choose_device(device),
        precision=precision,
        tile=tile,
        batch_size=batch_size,
        blend=blend,
    )
    one_volume = is_volume(out) and not out.is_dir()
    if one_volume and not (source.is_file() and is_volume(source)):
        raise InputError(f"{out}: is the name of a volume, which {source} isn't; give a folder")
    if out.suffix.lower() == ".dcm" and not out.is_dir():
        raise InputError(f"{out}: is the name of a file, and DICOM is written to a folder per series; give a folder")
    if one_volume and out.exists():
        raise InputError(f"{out}: exists already. To fix: choose another name")
    found = find(
        source,
        out,
        follow_links=follow_links,
        reformats=reformats,
        max_volume_gib=max_volume_gib,
        any_values=any_values,
    )
    check_found(found)
    settings = {"model": fingerprint(file), "precision": denoiser.precision, "blend": float(blend)}
    with ExitStack() as held:
        held.enter_context(writing(source, found, out))
        manifest = None
        if not one_volume:
            manifest = Manifest(out, MANIFEST, "denoised images", settings, measured=denoiser.envelope is not None)
            held.enter_context(claimed(out, DenoiseSummary.doing))
        derivation = _derivation(file, settings, manifest.created if manifest else datetime.now())
        targets: dict[Path, Study] = {}
        for one, inside in places(found, source, out, OURS):
            if isinstance(one, DicomSeries):
                targets[out / inside / derivation.uid("series", one.uid)] = one
            else:
                targets[out if one_volume else out / inside] = one
        summary = DenoiseSummary(out=out, account=found, warned=outside == "warn")
        _Denoising(denoiser, derivation, summary, manifest, refusing=outside == "refuse").run(targets)
    return summary


class _Denoising(Worker):
    """Reading, computing and writing overlap."""

    def __init__(
        self,
        denoiser: SliceDenoiser,
        derivation: Derivation,
        summary: DenoiseSummary,
        manifest: Manifest | None,
        *,
        refusing: bool,
    ) -> None:
        super().__init__(derivation, summary, manifest, denoiser.envelope, refusing=refusing)
        self.denoiser = denoiser

    def _series(self, series: DicomSeries, target: Path, pool: Executor) -> Iterator[None]:
        name = name_of(series)
        if target.exists():
            there = sum(file.is_file() for file in target.rglob("*"))
            if there != len(series.files):
                raise InputError(
                    f"{target}: holds {there} files, but series {series.uid} has {len(series.files)}; "
                    "remove the folder to denoise the series again"
                )
            self._already(name, target)
            yield from repeat(None, there)
            return
        where = self._outside(name, lambda: acquisition_of_series(series, pool))
        folder, slices_before = own_folder(target.with_name(f".{target.name}.part")), self.summary.slices
        remove_temporary(folder)
        try:
            yield from self._fill(folder, series, self._derivation(where), pool)
        except InputError:
            self.summary.slices = slices_before
            shutil.rmtree(folder, ignore_errors=True)
            raise
        self._note(name, target, where)
        move_whole(folder, target)
        self.summary.done += 1

    def _fill(self, folder: Path, series: DicomSeries, derivation: Derivation, pool: Executor) -> Iterator[None]:
        """Denoise what isn't in the folder yet, in the batches of an uninterrupted call."""
        outputs = {file: folder / file.relative_to(series.folder) for file in series.files}
        context = self.denoiser.context
        frames = frames_in_place(series) if context else {one.path: range(one.frames) for one in series.images}
        files = list(frames)
        size = 1 if any(image.frames > 1 for image in series.images) else self.denoiser.batch_size
        batches = [range(start, min(start + size, len(files))) for start in range(0, len(files), size)]
        wanted = [batch for batch in batches if not all(outputs[files[place]].exists() for place in batch)]
        yield from repeat(None, len(files) - sum(map(len, wanted)))
        needed = [with_neighbours(frames, batch, context) for batch in wanted]
        writing: Future[None] | None = None
        try:
            for read, batch in zip(read_ahead(needed, pool), wanted, strict=True):
                denoised = self._denoised(read, frames, files[batch.start : batch.stop])
                images = [image for image in read if image.path in denoised]
                if writing is not None:
                    writing.result()
                paths = [outputs[image.path] for image in images]
                results = [denoised[image.path] for image in images]
                writing = pool.submit(_write, images, results, derivation, series.uid, paths)
                self.summary.slices += sum(map(len, results))
                yield from repeat(None, len(images))
        finally:
            if writing is not None:
                writing.result()

    def _denoised(
        self, images: Sequence[CTImage], frames: Mapping[Path, Sequence[int]], wanted: Sequence[Path]
    ) -> dict[Path, np.ndarray]:
        """HU of each image that is wanted; neighbours of one size are computed together, and no others are neighbours.

        Args:
            images: those wanted, one behind the other, and their neighbours on both sides.
            frames: of each file, in order.
            wanted: their files.
        """
        denoised: dict[Path, np.ndarray] = {}
        for _, group in groupby(images, key=lambda image: image.hu.shape[1:]):
            alike = list(group)
            places = [number for number, image in enumerate(alike) if image.path in wanted]
            if not places:
                continue
            before, chosen, after = alike[: places[0]], [alike[n] for n in places], alike[places[-1] + 1 :]
            stack = np.concatenate([image.hu[list(frames[image.path])] for image in alike])
            ends = [sum(len(image.hu) for image in side) for side in (before, after)]
            result = self._checked(stack, chosen[0].path, *ends)
            for image, hu in zip(
                chosen, np.split(result, np.cumsum([len(one.hu) for one in chosen])[:-1]), strict=True
            ):
                denoised[image.path] = hu[np.argsort(frames[image.path])]
        return denoised

    def _checked(self, hu: np.ndarray, path: Path, before: int = 0, after: int = 0) -> np.ndarray:
        try:
            return self.denoiser(hu, before, after)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error

    def _volume(self, volume: VolumeSeries, target: Path) -> Iterator[None]:
        name = name_of(volume)
        if target.exists():
            self._already(name, target)
            yield from repeat(None, volume.shape[0])
            return
        check_free(target)
        slices = volume.read_hu()
        where = self._outside(name, lambda: acquisition_of_volume(volume, slices))
        result = np.empty(slices.shape, np.int16)
        size, context = self.denoiser.batch_size, self.denoiser.context
        for start in range(0, len(slices), size):
            stop = min(start + size, len(slices))
            first, last = max(0, start - context), min(len(slices), stop + context)
            seen = np.maximum(slices[first:last].astype(np.float32), LOWEST_HU)
            hu = self._checked(seen, volume.header.path, start - first, last - stop)
            result[start:stop] = rounded_hu(hu, slices[start:stop].astype(np.float32))
            yield from repeat(None, stop - start)
        self._note(name, target, where)
        write_voxels(target, volume.to_file(result), volume.header, self._derivation(where).description)
        self.summary.done += 1
        self.summary.slices += len(result)


def _write(
    images: Sequence[CTImage],
    denoised: Sequence[np.ndarray],
    derivation: Derivation,
    series_uid: str,
    paths: Sequence[Path],
) -> None:
    for image, hu, path in zip(images, denoised, paths, strict=True):
        write_derived(image, hu, derivation, series_uid, path)


def _derivation(file: Path, settings: Mapping[str, Any], created: datetime) -> Derivation:
    name = model_name(file)
    mixed = "" if settings["blend"] == 1 else f", mixed with the original, of which {1 - settings['blend']:.0%} remain"
    return Derivation(
        model=f"{name} {settings['model'][:8]}",
        description=f"Noise reduced by a convolutional network{mixed}: lidnet_fast {__version__}, model {name}, "
        f"SHA-256 {settings['model'][:16]}, computed in {settings['precision']}",
        identity=json.dumps(settings, sort_keys=True),
        created=created,
    )
