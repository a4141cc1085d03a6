"""Progress bars for people, silence for logs."""

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar("T")


def progress(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """Yield `items` under a progress bar, which is drawn only on a terminal.

    Args:
        items: anything iterable.
        what: shown before the bar.
        total: its length, where `items` has none.
    """
    bar = Progress(
        TextColumn("{task.description:<32}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        disable=not sys.stdout.isatty(),
    )
    with bar:
        yield from bar.track(items, total=total if total is not None else len(items), description=what)  # type: ignore[arg-type]
