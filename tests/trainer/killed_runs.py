"""Trains runs that are killed again and again; started by test_faults.py in a process of its own.

A process that has imported everything forks the trainers, so that a start takes milliseconds. Half of them are killed
after a random time, the others at a random event on the run's files: right before one is opened, renamed or removed.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from lidnet_fast import cli
from lidnet_fast.trainer import run  # noqa: F401  # what a trainer imports

EVENTS = {"open", "os.rename", "os.remove", "os.mkdir"}


def start(arguments: list[str], log: Path, die_at: tuple[str, int] | None = None) -> int:
    """Fork a trainer, which dies right before so many events under a folder."""
    pid = os.fork()
    if pid:
        return pid
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if die_at is not None:
        folder, left = die_at

        def audit(event: str, values: tuple) -> None:
            nonlocal left
            if event in EVENTS and str(values[0]).startswith(folder):
                left -= 1
                if not left:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(audit)
    status = 1
    try:
        cli.main(["train", *arguments])
        status = 0
    except SystemExit as stop:
        status = int(stop.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def steps_done(out: Path) -> dict[str, int]:
    """Steps that the run's files hold, by phase; every file that there is must be whole."""
    done = {}
    for path in out.glob("*/*.pt"):
        torch.load(path, weights_only=True)
        done[f"{path.parent.name}/{path.name}"] = 10**6
    for path in out.glob("*/last.ckpt"):
        done[path.parent.name] = torch.load(path, weights_only=True)["global_step"]
    return done


def lost(before: dict[str, int], now: dict[str, int]) -> list[str]:
    """What was there before and isn't any more; a finished phase needs no checkpoint."""
    return [
        name
        for name, steps in before.items()
        if now.get(name, 0) < steps and not any(other.startswith(f"{name}/") for other in now)
    ]


def main(config: str, root: Path, kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    rng = random.Random(seed)
    number, killed, before = 0, 0, {}
    started = time.monotonic()
    _, status = os.waitpid(start(["--config", config, "--out", str(root / "whole")], root / "whole.log"), 0)
    assert status == 0, (root / "whole.log").read_text()
    whole = time.monotonic() - started
    while True:
        out = root / f"run{number}"
        arguments = ["--config", config, "--out", str(out)]
        log = root / f"run{number}.log"
        if killed >= kills:
            pid = start(arguments, log)
        elif rng.random() < 0.5:
            pid = start(arguments, log)
            time.sleep(rng.uniform(0, whole / 3))
            os.kill(pid, rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT]))
        else:
            pid = start(arguments, log, die_at=(str(out), rng.randint(1, 60)))
        _, status = os.waitpid(pid, 0)
        code = os.waitstatus_to_exitcode(status)
        assert code in (0, 130, -signal.SIGKILL, -signal.SIGTERM), (code, log.read_text())
        now = steps_done(out)
        assert not lost(before, now), (before, now)
        before = now
        killed += code != 0
        if code == 0:
            before, number = {}, number + 1
            if killed >= kills:
                break
    print(f"{killed} kills in {number} runs, {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
