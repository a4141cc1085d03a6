"""What neighbouring slices cost a loader process and the simulated noise, per sample, in turns with single slices.

python -m benches.profile_context
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from lidnet_fast.data.samples.dataset import LesionPatches, collate, make_batch
from lidnet_fast.data.simulation.dose import DoseSimulation
from lidnet_fast.data.store.index import SeriesInfo
from lidnet_fast.data.store.writer import StoreWriter
from lidnet_fast.runtime import machine_facts

SLICES, SIDE, BATCH, ROUNDS = 40, 512, 4, 40


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
    print(", ".join(f"{name} {fact}" for name, fact in machine_facts().items()), end=".\n\n")
    print("| field of view | context | loaded, ms | noise, ms |\n| --- | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as folder:
        write_store(Path(folder) / "store")
        for crop in (256, None):
            options = {"crop": crop, "positive_fraction": 0.85, "augment": True, "seed": 0}
            data = {
                k: LesionPatches(Path(folder) / "store", "train", **options, context=k, low_dose_context=k)  # type: ignore[arg-type]
                for k in (0, 1)
            }
            times: dict[int, list[tuple[float, float]]] = {k: [] for k in data}
            for of_context in data.values():  # fills the caches
                for draw in range(10 * SLICES):
                    of_context[draw]
            for number in range(ROUNDS):
                draws = range(number * BATCH, (number + 1) * BATCH)
                for k, of_context in data.items():
                    samples = collate([of_context[draw] for draw in draws])
                    loaded = seconds(lambda d=of_context, n=draws: collate([d[draw] for draw in n]))  # type: ignore[misc]
                    noise = seconds(lambda s=samples: make_batch(s, torch.device("cpu")))  # type: ignore[misc]
                    times[k].append((loaded, noise))
            for k, measured in times.items():
                loaded, noise = (1e3 * statistics.median(part) for part in zip(*measured, strict=True))
                print(f"| {crop or SIDE} | {k} | {loaded:.2f} | {noise:.1f} |")


if __name__ == "__main__":
    main()
