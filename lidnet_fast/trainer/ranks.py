"""The processes of a run: torchrun starts them, rank 0 writes all files, the others wait for it.

On one machine `lidnet-fast train --devices N` is its own torchrun; see `launch` and docs/cluster.md.
"""

import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

import torch
from torch import distributed

from lidnet_fast.device import choose_device
from lidnet_fast.errors import InputError
from lidnet_fast.trainer.config import RunConfig

T = TypeVar("T")

# What a process hears of one that has ended: gloo's and NCCL's words.
_LOST = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe")

# torchrun ends the other processes at once when one has failed.
_SECONDS_TO_BE_ENDED = 10

# What all processes find, rank 0 says, and the others are ended before they do.
_SECONDS_OF_PRECEDENCE = 2


def launched() -> bool:
    """Whether torchrun started this process."""
    return distributed.is_available() and distributed.is_torchelastic_launched()


def world() -> int:
    """Number of the run's processes."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def is_first() -> bool:
    """Whether this process is the one that writes files."""
    return world() == 1 or distributed.get_rank() == 0


def join(config: RunConfig) -> RunConfig:
    """Meet the run's other processes, where torchrun has started several.

    Returns:
        The configuration with `devices` and `num_nodes` as torchrun says.

    Raises:
        InputError: the configuration asks for several processes, and torchrun hasn't started this one.
    """
    if not launched():
        if config.devices != 1 or config.num_nodes != 1:
            raise InputError(
                f"devices is {config.devices} and num_nodes is {config.num_nodes}, but this is the only process: "
                "several are started by `lidnet-fast train` on one machine and by torchrun anywhere, "
                "see docs/cluster.md"
            )
        return config
    size, on_this_node = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if size % on_this_node:
        raise InputError(f"torchrun started {size} processes, {on_this_node} of them here: every node needs as many")
    if size > 1 and not distributed.is_initialized():
        _check_gpus(config, on_this_node)
        on_gpu = choose_device(config.device).type == "cuda"
        if on_gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        distributed.init_process_group("nccl" if on_gpu else "gloo")
    return replace(config, devices=on_this_node, num_nodes=size // on_this_node)


def on_first(work: Callable[[], T]) -> T:
    """Do something on rank 0 while the others wait; all get what it returns."""
    if world() == 1:
        return work()
    result = [work() if is_first() else None]
    distributed.broadcast_object_list(result)
    return result[0]  # type: ignore[return-value]


def launch(command: Sequence[str], config: RunConfig) -> None:
    """Run a command of `lidnet-fast` on this machine in `config.devices` processes, as torchrun would.

    Args:
        command: the command and its options.
        config: what the options say.

    Raises:
        InputError: there are not as many GPUs, or the system ended a process.
        SystemExit: a process failed, and has said why.
    """
    _check_gpus(config, config.devices)
    # Not every phase has parameters without a gradient; DDP warns of each that has none.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.disable()  # the processes speak for themselves
    launch_config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=config.devices,
        run_id=str(os.getpid()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(),
    )
    try:
        elastic_launch(launch_config, sys.executable)("-c", "from lidnet_fast.cli import main; main()", *command)
    except SignalException as stop:
        raise KeyboardInterrupt from stop
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            raise InputError(
                f"the process of rank {rank} was ended by {name} (too little memory?); "
                "the same command resumes from the last checkpoint"
            ) from error
        sys.exit(failure.exitcode)


@contextmanager
def one_speaks() -> Iterator[None]:
    """Let a process of several end in silence where another one, or who started them, says why.

    Raises:
        InputError: another process has ended, and nobody ends this one.
    """
    try:
        try:
            yield
        except RuntimeError as error:
            if world() == 1 or not any(word in str(error) for word in _LOST):
                raise
            time.sleep(_SECONDS_TO_BE_ENDED)
            raise InputError("another process of this run has ended; what it said is the cause") from error
        except InputError:
            if not is_first():
                time.sleep(_SECONDS_OF_PRECEDENCE)
            raise
    except KeyboardInterrupt:
        if world() == 1:
            raise
        sys.exit(130)


def _check_gpus(config: RunConfig, needed: int) -> None:
    if choose_device(config.device).type == "cuda" and needed > torch.cuda.device_count():
        raise InputError(
            f"{needed} processes here need a GPU each, and this machine has {torch.cuda.device_count()}: "
            "see --devices. To fix: lower it, or give --device cpu"
        )
