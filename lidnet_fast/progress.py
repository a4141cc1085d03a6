"""Progress bars for people, silence for logs."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar("T")

_one_for_all = False


def shown() -> bool:
    """Whether a part of the work may draw a bar of its own: on a terminal, where there is none over the whole."""
    return sys.stdout.isatty() and not _one_for_all


def progress(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """Yield `items` under a progress bar, which is drawn only on a terminal.

    Args:
        items: anything iterable.
        what: shown before the bar.
        total: its length, where `items` has none.
    """
    with _bar(shown()) as bar:
        yield from bar.track(items, total=total if total is not None else len(items), description=what)  # type: ignore[arg-type]


@contextmanager
def overall_progress(total: int) -> Iterator[Callable[[int, str], None]]:
    """One progress bar over work that has bars of its own, which then aren't drawn.

    Args:
        total: of the work, in any unit.

    Yields:
        What says how much of the work is done, and what is being done.
    """
    global _one_for_all
    with _bar(shown()) as bar:
        task = bar.add_task("", total=total)
        _one_for_all = True
        try:
            yield lambda done, what: bar.update(task, completed=done, description=what)
        finally:
            _one_for_all = False


def _bar(drawn: bool) -> Progress:
    return Progress(
        TextColumn("{task.description:<32}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        disable=not drawn,
    )
