"""Settings of our own command-line programs, and facts about the machine. Nothing here runs on import."""

import ctypes
import json
import os
import platform
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

import torch

from lidnet_fast.files import write_text

# mallopt(3) parameters, from glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_TOP_PAD = -2
_M_MMAP_MAX = -4


def keep_freed_memory() -> bool:
    """Tell glibc's malloc to keep freed buffers instead of returning them to the kernel.

    A training step frees and allocates the same large buffers again and again; by default glibc maps and unmaps them
    each time, and the page faults can cost as much as the arithmetic (`docs/performance.md`). The process's resident
    memory then stays at its peak, so this is for programs that own their process: our command line calls it, and
    `import lidnet_fast` does not.

    Returns:
        Whether it was done: False where the C library is not glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all(
        mallopt(parameter, value) == 1
        for parameter, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 2**28))
    )


def cpu_name() -> str:
    """The processor's name as the operating system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def machine_facts() -> dict[str, str]:
    """What a reader needs with any measured number: processor, cores, GPU, versions and date."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    cores, threads = len(os.sched_getaffinity(0)), torch.get_num_threads()
    used = f"{cores} core{'s' * (cores > 1)} used by {threads} thread{'s' * (threads > 1)}"
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "processor": f"{cpu_name()}, {used}",
        "gpu": gpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
    }


@contextmanager
def recorded_cost(path: Path, **facts: int) -> Iterator[None]:
    """Write what the body took to a JSON file, if it ends well: "seconds", and "peak_memory_mb" (resident, MiB).

    Args:
        path: the file; parent folders are made.
        facts: further entries, such as the number of steps.
    """
    reset_peak_memory()
    start = time.perf_counter()
    yield
    cost = {"seconds": time.perf_counter() - start, "peak_memory_mb": peak_memory_mb(), **facts}
    write_text(path, json.dumps(cost))


def reset_peak_memory() -> None:
    """Give back what malloc keeps, and make `peak_memory_mb` start from now."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
    # proc(5): 5 resets the peak resident set size. Where it can't be, the peak is that of the process so far.
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory_mb() -> float:
    """Largest resident size of this process, in MiB, since `reset_peak_memory` where the system can tell."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) / 1024  # type: ignore[index]
    except OSError:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (1024**2 if sys.platform == "darwin" else 1024)
