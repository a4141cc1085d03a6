"""From a folder of studies to a folder of denoised studies: what `lidnet-fast denoise` runs."""

import errno
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from itertools import groupby, repeat
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import numpy as np

from lidnet_fast import __version__
from lidnet_fast.data.formats.account import Account
from lidnet_fast.data.formats.dicom.images import DicomSeries
from lidnet_fast.data.formats.dicom.values import without_pydicom_warnings
from lidnet_fast.data.formats.dicom.writer import CTImage, Derivation, read_image, write_derived
from lidnet_fast.data.formats.geometry import LOWEST_HU
from lidnet_fast.data.formats.volumes.files import is_volume, write_voxels
from lidnet_fast.data.formats.volumes.series import VolumeSeries
from lidnet_fast.device import Device, Precision, choose_device
from lidnet_fast.errors import InputError
from lidnet_fast.files import as_private_as, is_temporary, lock, move_whole, own_folder, remove_temporary
from lidnet_fast.inference.acquisition import acquisition_of_series, acquisition_of_volume
from lidnet_fast.inference.manifest import MANIFEST, Manifest
from lidnet_fast.inference.slices import SliceDenoiser
from lidnet_fast.inference.sources import find
from lidnet_fast.inference.volumes import check_free, rounded_hu
from lidnet_fast.models.envelope import Acquisition
from lidnet_fast.models.files import denoiser_file, load_denoiser
from lidnet_fast.progress import progress

Outside = Literal["warn", "refuse", "accept"]
"""What becomes of a series that lies outside of what the model was trained on."""

_OUTSIDE = "lies outside of what the model was trained on"
_LOCK = ".lock"
_OURS = {(MANIFEST,), (_LOCK,)}
# What the system says of one path, and not of all of them.
_OF_ONE_PATH = {errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP}

T = TypeVar("T")
R = TypeVar("R")


@dataclass
class DenoiseSummary:
    """What `denoise` did.

    Attributes:
        out: where the results are.
        account: what became of the files.
        denoised: series and volumes that this call denoised.
        slices: how many slices it denoised.
        already: series and volumes that were there.
        outside: series or volume -> where it lies outside of what the model was trained on; None where that is
            unknown, as with an older model file.
        warned: whether to say so.
    """

    out: Path
    account: Account
    denoised: int = 0
    slices: int = 0
    already: int = 0
    outside: dict[str, list[str]] | None = field(default_factory=dict)
    warned: bool = True

    @property
    def skipped(self) -> Counter[str]:
        """How many files were skipped for which reason."""
        return self.account.skipped

    @property
    def failures(self) -> list[str]:
        """One sentence for everything that couldn't be denoised."""
        return [fault.reason for fault in self.account.rejected]

    def lines(self) -> list[str]:
        """Return the summary as lines of text."""
        already = f", {self.already} were there already" if self.already else ""
        lines = [f"{self.out}: {self.denoised} series ({self.slices} slices) denoised{already}"]
        lines += self.account.lines()
        if self.outside is None:
            lines.append(
                "  warning: its file doesn't say what the model was trained on, so no series was compared with it"
            )
            return lines
        return lines + [f"  warning: {_outside(*item)}" for item in self.outside.items() if self.warned]


def _outside(name: str, where: Sequence[str]) -> str:
    return f"{name}: {_OUTSIDE}: {'; '.join(where)}"


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
        model: the folder of a run, or a `denoiser.pt`.
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
    if outside not in get_args(Outside):
        raise InputError(f"outside must be one of {', '.join(get_args(Outside))}, got {outside!r}")
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
    if one_volume and out.exists():
        raise InputError(f"{out}: exists already")
    found = find(
        source,
        out,
        follow_links=follow_links,
        reformats=reformats,
        max_volume_gib=max_volume_gib,
        any_values=any_values,
    )
    if not found.series:
        more = f" (and {len(found.rejected) - 1} more)" if len(found.rejected) > 1 else ""
        raise InputError(f"{found.rejected[0].reason}{more}")
    settings = {"model": _fingerprint(file), "precision": denoiser.precision, "blend": float(blend)}
    files = [file for one in found.series for file in one.files]
    try:
        with ExitStack() as held:
            held.enter_context(as_private_as([source, *files]))
            manifest = None if one_volume else Manifest(out, settings, measured=denoiser.envelope is not None)
            if not one_volume:
                held.enter_context(_locked(out))
            derivation = _derivation(file, settings, manifest.created if manifest else datetime.now())
            base = source if source.is_dir() else source.parent
            targets: dict[Path, DicomSeries | VolumeSeries] = {}
            for one in found.series:
                where = one.folder if isinstance(one, DicomSeries) else one.header.path
                inside = where.relative_to(base)
                if inside.parts[:1] in _OURS or any(map(is_temporary, (inside, *inside.parents))):
                    fault = f"{where}: {out} can't hold this name beside its own files. To fix: rename it"
                    found.reject([one.rejected(fault)])
                elif isinstance(one, DicomSeries):
                    targets[out / inside / derivation.uid("series", one.uid)] = one
                else:
                    targets[out if one_volume else out / inside] = one
            summary = DenoiseSummary(
                out,
                found,
                outside=None if denoiser.envelope is None else {},
                warned=outside == "warn",
            )
            worker = _Worker(denoiser, derivation, summary, manifest, refusing=outside == "refuse")
            total = sum(one.shape[0] if isinstance(one, VolumeSeries) else len(one.files) for one in found.series)
            with without_pydicom_warnings():
                for _ in progress(worker.run(targets), "denoising", total=total):
                    pass
            found.close(worker.used)
            if not one_volume:
                remove_temporary(out)
    except OSError as error:
        raise InputError(f"{error.filename or out}: can't be written: {error.strerror or error}") from error
    return summary


class _Worker:
    """Denoises series and volumes one after the other; reading, computing and writing overlap."""

    def __init__(
        self,
        denoiser: SliceDenoiser,
        derivation: Derivation,
        summary: DenoiseSummary,
        manifest: Manifest | None,
        *,
        refusing: bool,
    ) -> None:
        self.denoiser, self.derivation, self.summary = denoiser, derivation, summary
        self.manifest, self.refusing = manifest, refusing
        self.used: list[Path] = []

    def run(self, targets: Mapping[Path, DicomSeries | VolumeSeries]) -> Iterator[None]:
        """Make each target; yields for each slice, or each file of multi-frame CT."""
        with ThreadPoolExecutor(2) as pool:
            for target, source in targets.items():
                try:
                    if isinstance(source, VolumeSeries):
                        yield from self._volume(source, target)
                    else:
                        yield from self._series(source, target, pool)
                    self.used += source.files
                except InputError as error:
                    self.summary.account.reject([source.rejected(str(error))])
                except OSError as error:
                    if error.errno not in _OF_ONE_PATH:
                        raise
                    fault = f"{error.filename or target}: can't be written: {error.strerror}"
                    self.summary.account.reject([source.rejected(fault)])

    def _outside(self, name: str, acquisition: Callable[[], Acquisition]) -> list[str]:
        """Where a series lies outside of what the model was trained on.

        Raises:
            InputError: it lies outside, and is to be refused.
        """
        envelope = self.denoiser.envelope
        where = [] if envelope is None else envelope.outside(acquisition())
        if where and self.refusing:
            raise InputError(f"{_outside(name, where)}. To fix: --outside warn denoises it all the same")
        return where

    def _derivation(self, where: Sequence[str]) -> Derivation:
        said = f"; it {_OUTSIDE}: {', '.join(where)}" if where else ""
        return replace(self.derivation, description=f"{self.derivation.description}{said}")

    def _note(self, name: str, target: Path, where: list[str]) -> None:
        if self.manifest is not None:
            self.manifest.note(target, where)
        self._say(name, where)

    def _already(self, name: str, target: Path) -> None:
        self.summary.already += 1
        if self.manifest is not None:
            self._say(name, self.manifest.noted(target))

    def _say(self, name: str, where: list[str]) -> None:
        if self.summary.outside is not None and where:
            self.summary.outside[name] = where

    def _series(self, series: DicomSeries, target: Path, pool: ThreadPoolExecutor) -> Iterator[None]:
        name = f"series {series.uid} in {series.folder}"
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
        self.summary.denoised += 1

    def _fill(
        self, folder: Path, series: DicomSeries, derivation: Derivation, pool: ThreadPoolExecutor
    ) -> Iterator[None]:
        """Denoise what isn't in the folder yet, in the batches of an uninterrupted call."""
        outputs = {file: folder / file.relative_to(series.folder) for file in series.files}
        files = list(outputs)
        size = 1 if any(image.frames > 1 for image in series.images) else self.denoiser.batch_size
        batches = [files[start : start + size] for start in range(0, len(files), size)]
        wanted = [batch for batch in batches if not all(outputs[file].exists() for file in batch)]
        yield from repeat(None, len(files) - sum(map(len, wanted)))
        writing: Future[None] | None = None
        try:
            for images in _one_ahead(_read, wanted, pool):
                denoised = self._denoised(images)
                if writing is not None:
                    writing.result()
                paths = [outputs[image.path] for image in images]
                writing = pool.submit(_write, images, denoised, derivation, series.uid, paths)
                self.summary.slices += sum(map(len, denoised))
                yield from repeat(None, len(images))
        finally:
            if writing is not None:
                writing.result()

    def _denoised(self, images: Sequence[CTImage]) -> list[np.ndarray]:
        """HU of each image; neighbours of one size are computed together."""
        denoised: list[np.ndarray] = []
        for _, group in groupby(images, key=lambda image: image.hu.shape[1:]):
            alike = list(group)
            stack = self._checked(np.concatenate([image.hu for image in alike]), alike[0].path)
            denoised += np.split(stack, np.cumsum([len(image.hu) for image in alike])[:-1])
        return denoised

    def _checked(self, hu: np.ndarray, path: Path) -> np.ndarray:
        try:
            return self.denoiser(hu)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error

    def _volume(self, volume: VolumeSeries, target: Path) -> Iterator[None]:
        name = str(volume.header.path)
        if target.exists():
            self._already(name, target)
            yield from repeat(None, volume.shape[0])
            return
        check_free(target)
        slices = volume.read_hu()
        where = self._outside(name, lambda: acquisition_of_volume(volume, slices))
        result = np.empty(slices.shape, np.int16)
        size = self.denoiser.batch_size
        for start in range(0, len(slices), size):
            original = slices[start : start + size].astype(np.float32)
            hu = self._checked(np.maximum(original, LOWEST_HU), volume.header.path)
            result[start : start + size] = rounded_hu(hu, original)
            yield from repeat(None, len(original))
        self._note(name, target, where)
        write_voxels(target, volume.to_file(result), volume.header, self._derivation(where).description)
        self.summary.denoised += 1
        self.summary.slices += len(result)


def _read(paths: Sequence[Path]) -> list[CTImage]:
    return [read_image(path) for path in paths]


def _write(
    images: Sequence[CTImage],
    denoised: Sequence[np.ndarray],
    derivation: Derivation,
    series_uid: str,
    paths: Sequence[Path],
) -> None:
    for image, hu, path in zip(images, denoised, paths, strict=True):
        write_derived(image, hu, derivation, series_uid, path)


def _one_ahead(function: Callable[[T], R], items: Iterable[T], pool: Executor) -> Iterator[R]:
    """`map` that works on the next item while one is in use."""
    waiting: Future[R] | None = None
    for item in items:
        following = pool.submit(function, item)
        if waiting is not None:
            yield waiting.result()
        waiting = following
    if waiting is not None:
        yield waiting.result()


def _fingerprint(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _derivation(file: Path, settings: Mapping[str, Any], created: datetime) -> Derivation:
    folder = file.resolve().parent
    name = folder.parent.name if folder.name == "collaborate" else file.stem
    mixed = "" if settings["blend"] == 1 else f", mixed with the original, of which {1 - settings['blend']:.0%} remain"
    return Derivation(
        model=f"{name} {settings['model'][:8]}",
        description=f"Noise reduced by a convolutional network{mixed}: lidnet_fast {__version__}, model {name}, "
        f"SHA-256 {settings['model'][:16]}, computed in {settings['precision']}",
        identity=json.dumps(settings, sort_keys=True),
        created=created,
    )


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Keep other processes from making the same files."""
    path = out / _LOCK
    taken = lock(path, f"{out}: another process is denoising into it")
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        taken.release()
