"""What neighbouring slices cost a loader process and the simulated noise, per sample, in turns with single slices.

python -m benches.profile_context
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch

from lidnet_fast.data.samples.dataset import LesionPatches, Samples, collate, make_batch
from lidnet_fast.data.simulation.dose import DoseSimulation
from lidnet_fast.data.store.index import SeriesInfo
from lidnet_fast.data.store.writer import StoreWriter
from lidnet_fast.runtime import keep_freed_memory, machine_facts

SLICES, SIDE, BATCH, ROUNDS = 40, 512, 4, 20
NOISE = "new noise"
PARTS: dict[str, dict[str, object]] = {
    "loaded, normal dose alone (detectors)": {"with_low_dose": False},
    "loaded, with what noise needs": {},
    "the same, slices not seen before": {"cache_mib": 0},
    NOISE: {},
}


def write_store(path: Path) -> None:
    """A noisy disc of water in air."""
    y, x = np.mgrid[:SIDE, :SIDE] - SIDE / 2
    body = np.where(np.hypot(x / 230, y / 200) < 1, 40, -1000)
    noisy = body + np.random.default_rng(0).normal(0, 25, (SLICES, SIDE, SIDE))
    volume = noisy.clip(-1024, 3000).astype(np.int16)
    geometry = {"spacing": (2.5, 0.7, 0.7), "origin": (0.0, 0, 0), "orientation": (1.0, 0, 0, 0, 1.0, 0)}
    info = SeriesInfo("series", "patient", "train", shape=volume.shape, **geometry)
    with StoreWriter(path, simulation=DoseSimulation().to_dict()) as writer:
        writer.add_series(info, volume, np.array([(z, 200, 200, 215, 215) for z in range(SLICES)]))


def seconds(run: Callable[[], object]) -> float:
    """Of the processor: others may use it, too."""
    start = time.thread_time()
    run()
    return (time.thread_time() - start) / BATCH


def main() -> None:
    torch.set_num_threads(1)
    keep_freed_memory()  # as `train` does
    print(", ".join(f"{name} {fact}" for name, fact in machine_facts().items()), end=".\n\n")
    print("| field of view | ms per sample | one slice | three | times |\n| --- | --- | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as folder:
        write_store(Path(folder) / "store")
        for crop, (part, phase) in product((256, None), PARTS.items()):
            options = {"crop": crop, "positive_fraction": 0.85, "augment": True, "seed": 0, **phase}
            data = [
                LesionPatches(Path(folder) / "store", "train", **options, context=k, low_dose_context=k)  # type: ignore[arg-type]
                for k in (0, 1)
            ]
            for of_context in data:  # fills the caches
                for draw in range(5 * SLICES):
                    of_context[draw]
            times: list[tuple[float, ...]] = []
            for number in range(ROUNDS):
                draws = range(number * BATCH, (number + 1) * BATCH)
                work = [loading(of_context, draws) for of_context in data]
                if part == NOISE:
                    work = [partial(make_batch, load(), torch.device("cpu")) for load in work]
                times.append(tuple(seconds(run) for run in work))
            one, three = (1e3 * statistics.median(of_context) for of_context in zip(*times, strict=True))
            print(f"| {crop or SIDE} | {part} | {one:.2f} | {three:.2f} | {three / one:.2f} |", flush=True)


def loading(data: LesionPatches, draws: range) -> Callable[[], Samples]:
    """What a loader process does for a batch, but for handing it over."""
    return lambda: collate([data[draw] for draw in draws])


if __name__ == "__main__":
    main()
