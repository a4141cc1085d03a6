"""Cells in processes of their own: `python -m tests.conformance.fresh < names`.

A process that has imported lidnet_fast, and called nothing of it, forks for each pair of a case and a cell. So each
meets the library as a user's process does, and the seconds that imports take are spent once. Pairs come as lines of
JSON, [case, cell]; results go out likewise, [case, cell, error], whose error is empty for what is right.
"""

import json
import multiprocessing
import os
import sys
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

import lidnet_fast  # noqa: F401  (before all else that it might depend on)

from .cases import CASES, Case
from .cells import Cell, examine
from .table import CELLS


def jobs(pairs: Iterable[tuple[str, str]]) -> list[tuple[list[Case], Cell]]:
    """Each pair by itself, but all cases of a cell whose processes they share."""
    of_cell: dict[str, list[Case]] = {}
    for case, cell in pairs:
        of_cell.setdefault(cell, []).append(next(known for known in CASES if known.name == case))
    found = []
    for name, cases in of_cell.items():
        cell = CELLS[name]
        found += [(cases, cell)] if cell.together else [([case], cell) for case in cases]
    return found


def in_forks(waiting: list[tuple[list[Case], Cell]], at_once: int) -> Iterator[tuple[str, str, str]]:
    """(case, cell, error) of the jobs' cases, each job in a process of its own."""
    context = multiprocessing.get_context("fork")
    running: dict[Connection, tuple[BaseProcess, list[Case], Cell]] = {}
    while waiting or running:
        while waiting and len(running) < at_once:
            cases, cell = waiting.pop(0)
            receiving, sending = context.Pipe(duplex=False)
            process = context.Process(target=send, args=(sending, cases, cell))
            process.start()
            sending.close()
            running[receiving] = process, cases, cell
        for receiving in wait(list(running)):
            process, cases, cell = running.pop(receiving)
            try:
                errors = receiving.recv()
            except EOFError:
                process.join()
                errors = [f"the process ended with status {process.exitcode}"] * len(cases)
            process.join()
            yield from ((case.name, cell.name, error) for case, error in zip(cases, errors, strict=True))


def send(sending: Connection, cases: list[Case], cell: Cell) -> None:
    sending.send(examine(cases, cell))


if __name__ == "__main__":
    import torch._dynamo
    import torch._inductor.compile_fx
    import torch.export  # noqa: F401

    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Gloo of PyTorch 2.10 prints to the standard output
    for result in in_forks(jobs(json.loads(line) for line in sys.stdin), len(os.sched_getaffinity(0))):
        print(json.dumps(result), file=results, flush=True)
