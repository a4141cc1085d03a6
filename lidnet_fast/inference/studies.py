"""What the commands on folders of studies share: what is where, the lock, restart, and the account that adds up."""

import abc
import errno
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Literal, TypeVar, get_args

from lidnet_fast.data.formats.account import Account, Found
from lidnet_fast.data.formats.dicom.images import DicomSeries
from lidnet_fast.data.formats.dicom.values import without_pydicom_warnings
from lidnet_fast.data.formats.dicom.writer import Derivation
from lidnet_fast.data.formats.volumes.series import VolumeSeries
from lidnet_fast.errors import InputError
from lidnet_fast.files import as_private_as, is_temporary, lock, remove_temporary
from lidnet_fast.inference.manifest import Manifest
from lidnet_fast.models.envelope import Acquisition, Envelope
from lidnet_fast.progress import progress

Study = DicomSeries | VolumeSeries
Outside = Literal["warn", "refuse", "accept"]
"""What becomes of a series that lies outside of what the model was trained on."""
OUTSIDE = "lies outside of what the model was trained on"

LOCK = ".lock"
# What the system says of one path, and not of all of them.
_OF_ONE_PATH = {errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP}

T = TypeVar("T")
R = TypeVar("R")


@dataclass(kw_only=True)
class Summary:
    """What a command did to studies; `what` was done, and what it is `doing`, are its words for that.

    Attributes:
        out: where the results are.
        account: what became of the files.
        done: series and volumes that this call processed.
        slices: how many slices they have.
        already: series and volumes whose results were there.
        outside: series or volume -> where it lies outside of what the model was trained on; None where that is
            unknown, as with an older model file.
        warned: whether to say so.
    """

    what: ClassVar[str]
    doing: ClassVar[str]

    out: Path
    account: Account
    done: int = 0
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
        """One sentence for everything that couldn't be used."""
        return [fault.reason for fault in self.account.rejected]

    def lines(self) -> list[str]:
        """Return the summary as lines of text."""
        already = f", {self.already} were there already" if self.already else ""
        lines = [f"{self.out}: {self.done} series ({self.slices} slices) {self.what}{already}"]
        lines += self.account.lines()
        if self.outside is None:
            lines.append(
                "  warning: the model's file doesn't say what it was trained on, so no series was compared with it"
            )
            return lines
        return lines + [f"  warning: {_outside(*item)}" for item in self.outside.items() if self.warned]


def _outside(name: str, where: Sequence[str]) -> str:
    return f"{name}: {OUTSIDE}: {'; '.join(where)}"


def check_outside(outside: str) -> None:
    """Refuse what isn't one of `Outside`."""
    if outside not in get_args(Outside):
        raise InputError(f"outside must be one of {', '.join(get_args(Outside))}, got {outside!r}")


def check_found(found: Found[Study]) -> None:
    """Refuse a search of which nothing can be used."""
    if not found.series:
        more = f" (and {len(found.rejected) - 1} more)" if len(found.rejected) > 1 else ""
        raise InputError(f"{found.rejected[0].reason}{more}")


@contextmanager
def writing(source: Path, found: Found[Study], out: Path) -> Iterator[None]:
    """Keep what is written as private as the sources; what the system says of it is the user's to fix."""
    files = [file for one in found.series for file in one.files]
    try:
        with as_private_as([source, *files]):
            yield
    except OSError as error:
        raise InputError(f"{error.filename or out}: can't be written: {error.strerror or error}") from error


@contextmanager
def claimed(out: Path, doing: str) -> Iterator[None]:
    """Keep other processes from making the same files, and leave nothing unfinished behind.

    Args:
        out: the folder.
        doing: what the other process is doing, for the message.
    """
    path = out / LOCK
    taken = lock(path, f"{out}: another process is {doing} into it")
    try:
        yield
        remove_temporary(out)
    finally:
        path.unlink(missing_ok=True)
        taken.release()


def places(found: Found[Study], source: Path, out: Path, ours: Iterable[str]) -> list[tuple[Study, Path]]:
    """Where each series and volume lies below the source: its folder or file.

    Those in the places of `ours`, names of the command's own files in `out`, are rejected.
    """
    base = source if source.is_dir() else source.parent
    usable: list[tuple[Study, Path]] = []
    for one in found.series:
        where = one.folder if isinstance(one, DicomSeries) else one.header.path
        inside = where.relative_to(base)
        if inside.parts[:1] in {(name,) for name in ours} or any(map(is_temporary, (inside, *inside.parents))):
            fault = f"{where}: {out} can't hold this name beside its own files. To fix: rename it"
            found.reject([one.rejected(fault)])
        else:
            usable.append((one, inside))
    return usable


class Worker(abc.ABC):
    """Processes series and volumes one after the other; what fails of one stops no other.

    Args:
        derivation: what is said of results.
        summary: is filled in; its account gets what is rejected.
        manifest: the record of the folder, where there is one.
        envelope: what the model was trained on; None where that is unknown.
        refusing: what lies outside of it is rejected.
    """

    def __init__(
        self,
        derivation: Derivation,
        summary: Summary,
        manifest: Manifest | None,
        envelope: Envelope | None,
        *,
        refusing: bool,
    ) -> None:
        self.derivation, self.summary, self.manifest = derivation, summary, manifest
        self.envelope, self.refusing = envelope, refusing
        if envelope is None:
            summary.outside = None

    def run(self, targets: Mapping[Path, Study]) -> None:
        """Make each target, under a progress bar, and close the account."""
        total = sum(one.shape[0] if isinstance(one, VolumeSeries) else len(one.files) for one in targets.values())
        used: list[Path] = []
        with without_pydicom_warnings():
            for _ in progress(self._each(targets, used), self.summary.doing, total=total):
                pass
        self.summary.account.close(used)

    def _each(self, targets: Mapping[Path, Study], used: list[Path]) -> Iterator[None]:
        """Yields for each slice, or each file of multi-frame CT."""
        with ThreadPoolExecutor(2) as pool:
            for target, source in targets.items():
                try:
                    if isinstance(source, VolumeSeries):
                        yield from self._volume(source, target)
                    else:
                        yield from self._series(source, target, pool)
                    used += source.files
                except InputError as error:
                    self.summary.account.reject([source.rejected(str(error))])
                except OSError as error:
                    if error.errno not in _OF_ONE_PATH:
                        raise
                    fault = f"{error.filename or target}: can't be written: {error.strerror}"
                    self.summary.account.reject([source.rejected(fault)])

    @abc.abstractmethod
    def _series(self, series: DicomSeries, target: Path, pool: Executor) -> Iterator[None]:
        """Make the target of a DICOM series."""

    @abc.abstractmethod
    def _volume(self, volume: VolumeSeries, target: Path) -> Iterator[None]:
        """Make the target of a volume."""

    def _outside(self, name: str, acquisition: Callable[[], Acquisition]) -> list[str]:
        """Where a series lies outside of what the model was trained on.

        Raises:
            InputError: it lies outside, and is to be refused.
        """
        where = [] if self.envelope is None else self.envelope.outside(acquisition())
        if where and self.refusing:
            raise InputError(f"{_outside(name, where)}. To fix: --outside warn takes it all the same")
        return where

    def _derivation(self, where: Sequence[str]) -> Derivation:
        """What is said of results of a series that lies outside there."""
        said = f"; it {OUTSIDE}: {', '.join(where)}" if where else ""
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


def name_of(study: Study) -> str:
    """What messages call a series or volume."""
    return str(study.header.path) if isinstance(study, VolumeSeries) else f"series {study.uid} in {study.folder}"


def one_ahead(function: Callable[[T], R], items: Iterable[T], pool: Executor) -> Iterator[R]:
    """`map` that works on the next item while one is in use."""
    waiting: Future[R] | None = None
    for item in items:
        following = pool.submit(function, item)
        if waiting is not None:
            yield waiting.result()
        waiting = following
    if waiting is not None:
        yield waiting.result()
