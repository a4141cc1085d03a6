"""The account of the files that a command finds: each is used, skipped for a reason or rejected by name."""

import dataclasses
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from lidnet_fast.errors import InputError


class _Named(Protocol):
    @property
    def series_uid(self) -> str: ...


T = TypeVar("T")
AnySeries = TypeVar("AnySeries", bound=_Named)


@dataclasses.dataclass(frozen=True)
class Rejected:
    """Something that was found and can't be used.

    Attributes:
        series_uid: the series, where it is known.
        path: a file of it, or the folder that holds it.
        reason: one sentence that names the cause.
        files: all files of it; `path` alone where none are given.
    """

    series_uid: str
    path: Path
    reason: str
    files: Collection[Path] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "files", frozenset(self.files) or {self.path})


@dataclasses.dataclass
class Account:
    """What became of the files that were found; `close` makes sure that it adds up.

    Attributes:
        strict: refuse the first thing that can't be used, instead of collecting all of it.
        found: how many files there were.
        used: those that are in the output; known at the end.
        skipped: how many were skipped for which reason.
        rejected: what can't be used.
    """

    strict: bool = False
    found: int = 0
    used: frozenset[Path] = frozenset()
    skipped: Counter[str] = dataclasses.field(default_factory=Counter)
    rejected: list[Rejected] = dataclasses.field(default_factory=list)

    def take(self, other: "Account") -> None:
        """Add the files of another account to those of this one.

        Raises:
            InputError: with `strict`, if some are rejected.
        """
        self.found += other.found
        self.skipped += other.skipped
        self.reject(other.rejected)

    def reject(self, rejected: Sequence[Rejected]) -> None:
        """Add what can't be used.

        Raises:
            InputError: with `strict`, if there is any.
        """
        if self.strict and rejected:
            raise InputError(rejected[0].reason)
        self.rejected += rejected

    def drop(self, rejected: Sequence[Rejected], series: Sequence[AnySeries]) -> list[AnySeries]:
        """As `reject`; return the series that aren't among them."""
        self.reject(rejected)
        uids = {fault.series_uid for fault in rejected}
        return [one for one in series if one.series_uid not in uids]

    def close(self, used: Iterable[Path]) -> None:
        """Name the files that are in the output, each once or several times.

        Raises:
            AssertionError: a file is missing, or counted twice.
        """
        self.used = frozenset(used)
        if self.found != sum(self._parts().values()):
            raise AssertionError(f"the account doesn't add up: {self._sum()}. This is a fault of lidnet_fast")

    def lines(self) -> list[str]:
        """The account as lines of text."""
        lines = [f"  files: {self._sum()}"]
        if self.skipped:
            lines.append(f"  skipped: {counted(self.skipped)}")
        if self.rejected:
            lines.append(f"  rejected: {len(self.rejected)}")
        return lines

    def _sum(self) -> str:
        return f"{self.found} found = {' + '.join(f'{count} {what}' for what, count in self._parts().items())}"

    def _parts(self) -> dict[str, int]:
        # Two headers may share their voxels, of which one is used and one is rejected.
        rejected = {path for fault in self.rejected for path in fault.files} - self.used
        return {"used": len(self.used), "skipped": self.skipped.total(), "rejected": len(rejected)}


@dataclasses.dataclass
class Found(Account, Generic[T]):
    """The account of a search for CT.

    Attributes:
        series: the series or volumes.
    """

    series: list[T] = dataclasses.field(default_factory=list)

    def check_any(self, sources: Sequence[Path]) -> None:
        """Refuse sources in which there is no CT, be it usable or not.

        Raises:
            InputError: says what was found instead.
        """
        if not self.series and not self.rejected:
            looked = ", ".join(str(source) for source in sources)
            raise InputError(f"{looked}: no CT found ({counted(self.skipped) or 'no files at all'})")


def counted(skipped: Counter[str]) -> str:
    """In words: "1 files localiser, 3 files not CT"."""
    return ", ".join(f"{count} files {why}" for why, count in sorted(skipped.items()))
