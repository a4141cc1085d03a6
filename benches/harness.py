"""Races between implementations of one op, and the table of their results.

A contestant is a function without arguments that returns Tensors, the same from each: the op's value and, where it is
asked for, its gradient. Every contestant first has to agree with the expected Tensors; nothing is timed otherwise. Then
they run in turns, round by round in one process, so that a busy moment of the machine hits all of them, and medians are
compared. Before each turn two large buffers are copied: that leaves no contestant's data in the cache, and gives the
bandwidth that the memory floor is counted with.

pytest-benchmark's options say how long: a race takes about --benchmark-max-time seconds per contestant, in at least
--benchmark-min-rounds rounds, or SLOW_ROUNDS where those would take longer than SLOW_SECONDS. On a machine that does
other work, --benchmark-timer time.process_time counts the processor's time. With --benchmark-disable contestants are
compared and not timed.
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from lidnet_fast.runtime import peak_memory_mb, reset_peak_memory

Contestant = Callable[[], Sequence[Tensor]]

OURS = "lidnet_fast"
SLOW_SECONDS = 10.0
SLOW_ROUNDS = 3
COPIED_BYTES = 2**26


@dataclass(frozen=True)
class Row:
    """The outcome of one race: medians in milliseconds, and memory in MiB beyond the Tensors that are returned."""

    op: str
    case: str
    mode: str
    rounds: int
    ours_ms: float
    peers_ms: dict[str, float]
    floor_ms: float | None
    extra_mb: dict[str, float | None]

    @property
    def ratios(self) -> dict[str, float]:
        """How many times as long as ours each peer takes, and ours as the floor."""
        peers = {name: ms / self.ours_ms for name, ms in self.peers_ms.items()}
        return peers if self.floor_ms is None else peers | {"floor": self.ours_ms / self.floor_ms}


class Race:
    """Compares contestants, times them and notes the outcome."""

    def __init__(self, benchmark: BenchmarkFixture, rows: list[Row], *, seconds: float, min_rounds: int):
        """`benchmark` is pytest-benchmark's fixture; it gets our rounds, and the Row as its extra_info."""
        self._benchmark = benchmark
        self._rows = rows
        self._seconds = seconds
        self._min_rounds = min_rounds

    def __call__(
        self,
        op: str,
        case: str,
        mode: str,
        *,
        ours: Contestant,
        peers: Mapping[str, Contestant],
        expected: Sequence[Tensor],
        tolerance: float | Mapping[str, float],
        floor_bytes: int | None = None,
        before: Mapping[str, Callable[[], None]] | None = None,
    ) -> None:
        """Run one race.

        Args:
            op: Rows of the same op make one part of the table.
            case: What is computed on: shapes and boxes.
            mode: Forward or backward, dtype, layout.
            ours: The contestant that the others are compared with.
            peers: Name -> contestant. The first one's memory is in the table.
            expected: What every contestant has to return, in float64.
            tolerance: Relative L2 error allowed in each Tensor, of all contestants or by the name of each.
            floor_bytes: What any implementation has to read and write at least; None where memory isn't the limit.
            before: Name -> what is done before each of its turns, and isn't timed.
        """
        contestants = {OURS: ours, **peers}
        prepare = {name: (before or {}).get(name, lambda: None) for name in contestants}
        for name, contestant in contestants.items():
            check_parity(name, contestant(), expected, tolerance[name] if isinstance(tolerance, Mapping) else tolerance)
        if self._benchmark.disabled:
            self._benchmark.pedantic(ours)
            return
        copy, timer = _copy_of_large_buffers(), self._benchmark._timer  # what --benchmark-timer names
        start = time.perf_counter()
        extra_mb = {name: _extra_memory_mb(contestant) for name, contestant in contestants.items()}
        round_seconds = time.perf_counter() - start + len(contestants) * _seconds_of(copy)
        rounds = self._rounds(len(contestants), round_seconds)

        copies: list[float] = []
        of_peers: dict[str, list[float]] = {name: [] for name in peers}
        results: list[Sequence[Tensor]] = []  # freed before the next turn, and outside of what is timed

        def turns_of_peers() -> None:
            results.clear()
            for name, peer in peers.items():
                copies.append(_seconds_of(copy, timer))
                prepare[name]()
                of_peers[name].append(_seconds_of(peer, timer))
            copies.append(_seconds_of(copy, timer))
            prepare[OURS]()

        self._benchmark.pedantic(lambda: results.append(ours()), setup=turns_of_peers, rounds=rounds)
        row = Row(
            op,
            case,
            mode,
            rounds,
            ours_ms=1e3 * self._benchmark.stats["median"],
            peers_ms={name: 1e3 * statistics.median(seconds) for name, seconds in of_peers.items()},
            floor_ms=floor_bytes and 1e3 * statistics.median(copies) * floor_bytes / (2 * COPIED_BYTES),
            extra_mb=extra_mb,
        )
        self._benchmark.extra_info.update(asdict(row), ratios=row.ratios)
        self._rows.append(row)

    def _rounds(self, contestants: int, round_seconds: float) -> int:
        rounds = int(self._seconds * contestants / round_seconds)
        if self._min_rounds * round_seconds > SLOW_SECONDS:
            return max(rounds, min(self._min_rounds, SLOW_ROUNDS))
        return max(rounds, self._min_rounds)


def check_parity(name: str, actual: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    """Each Tensor of `actual` is within `tolerance`, relative in L2, of the one of `expected`; NaN never is."""
    for number, (tensor, reference) in enumerate(zip(actual, expected, strict=True)):
        assert tensor.shape == reference.shape, f"{name}: result {number} is {tensor.shape}, not {reference.shape}"
        norm = reference.double().norm().clamp(min=1e-30)
        error = float((tensor.double() - reference).norm() / norm)
        assert error <= tolerance, (
            f"{name} isn't timed: relative error {error:.1e} > {tolerance:.0e} in result {number}"
        )


def _copy_of_large_buffers() -> Contestant:
    source, destination = (torch.ones(COPIED_BYTES, dtype=torch.uint8) for _ in range(2))
    return lambda: (destination.copy_(source),)


def _seconds_of(contestant: Contestant, timer: Callable[[], float] = time.perf_counter) -> float:
    start = timer()
    result = contestant()
    seconds = timer() - start
    del result  # freed outside of what is timed, as ours is
    return seconds


def _extra_memory_mb(contestant: Contestant) -> float | None:
    """What one call adds to the resident memory at its peak, beyond what it returns; to about 0.3 MiB."""
    if sys.platform != "linux":
        return None
    reset_peak_memory()
    before = peak_memory_mb()
    result = contestant()
    returned = sum(tensor.nbytes for tensor in result) / 2**20
    return max(peak_memory_mb() - before - returned, 0.0)


def report(rows: Sequence[Row], facts: Mapping[str, str]) -> str:
    """The results in Markdown: a line of facts and a table for each op."""
    parts = [
        "Medians in ms; in brackets, how many times as long as ours a peer takes, and ours as the memory floor "
        "(bytes that must be read\nand written, over the bandwidth of a copy). Extra memory in MiB beyond what is "
        "returned; in brackets, the first peer's.\n\n"
        + ", ".join(f"{name} {fact}" for name, fact in facts.items())
        + ".\n"
    ]
    for op in dict.fromkeys(row.op for row in rows):
        of_op = [row for row in rows if row.op == op]
        peers = list(dict.fromkeys(name for row in of_op for name in row.peers_ms))
        floor = any(row.floor_ms is not None for row in of_op)
        head = [op, "", "ours", *peers, *(["floor"] if floor else []), "extra MiB"]
        parts.append(_table(head, [_cells(row, peers, floor) for row in of_op]))
    return "\n".join(parts)


def _cells(row: Row, peers: Iterable[str], floor: bool) -> list[str]:
    cells = [row.case, row.mode, _number(row.ours_ms)]
    for name in peers:
        timed = name in row.peers_ms
        cells.append(f"{_number(row.peers_ms[name])} ({_number(row.ratios[name])}x)" if timed else "")
    if floor:
        cells.append("" if row.floor_ms is None else f"{_number(row.floor_ms)} ({_number(row.ratios['floor'])}x)")
    ours_mb, *peers_mb = [_number(mb) if mb is not None else "?" for mb in row.extra_mb.values()]
    cells.append(f"{ours_mb} ({peers_mb[0]})" if peers_mb else ours_mb)
    return cells


def _number(value: float) -> str:
    """Three digits, and never an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _table(head: list[str], body: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    rule = [":" + "-" * (width + 1) if number < 2 else "-" * (width + 1) + ":" for number, width in enumerate(widths)]
    lines = [
        "| "
        + " | ".join(
            cell.ljust(width) if number < 2 else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        + " |"
        for cells in (head, *body)
    ]
    return "\n".join([lines[0], "|" + "|".join(rule) + "|", *lines[1:]]) + "\n"
