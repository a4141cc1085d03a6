"""What opening a large store costs: time and memory until the first sample.

    python benches/profile_store_index.py            10,000 series of 300 slices, 200,000 boxes

The index is made up; all of its series share the file of one volume, since opening a store reads none. Each step is
timed in a fresh process with everything imported, and memory is what the step adds to the resident set.
"""

import argparse
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from lidnet_fast.data.samples.dataset import LesionPatches
from lidnet_fast.data.simulation.dose import DoseSimulation
from lidnet_fast.data.store.index import Index, SeriesInfo
from lidnet_fast.data.store.reader import Store
from lidnet_fast.data.store.writer import StoreWriter
from lidnet_fast.runtime import machine_facts, peak_memory_mb, reset_peak_memory

SIDE = 512
GEOMETRY = {"spacing": (1.0, 0.7, 0.7), "origin": (0.0, 0.0, 0.0), "orientation": (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)}


def make_store(path: Path, series: int, slices: int, boxes: int) -> None:
    """A store of which everything but the index is of one series."""
    rng = np.random.default_rng(0)
    shape = (slices, SIDE, SIDE)
    with StoreWriter(path, simulation=DoseSimulation().to_dict()) as writer:
        info = SeriesInfo("0", "0", "train", shape=shape, **GEOMETRY)
        writer.add_series(info, np.zeros(shape, np.int16), np.empty((0, 5)))
    uid = "1.3.6.1.4.1.14519.5.2.1.6279.6001."
    infos = [
        SeriesInfo(f"{uid}{number:030d}", f"LIDC-IDRI-{number // 2:05d}", "train", shape=shape, **GEOMETRY)
        for number in range(series)
    ]
    per_series = rng.multinomial(boxes, np.full(series, 1 / series))
    rows = []
    for count in per_series:  # lesions of five slices each
        start = np.repeat(rng.integers(0, slices - 5, -(-count // 5)), 5)[:count] + np.arange(count) % 5
        corner = np.repeat(rng.uniform(0, SIDE - 30, (-(-count // 5), 2)), 5, axis=0)[:count]
        rows.append(np.concatenate([start[:, None], corner, corner + 20], axis=1).astype(np.float32))
    Index.of(infos, [0] * series, rows).save(path / "index.npz")


def patches(path: Path) -> LesionPatches:
    return LesionPatches(path, "train", crop=64, positive_fraction=0.5, augment=True, seed=0)


STEPS = {
    "Store(path)": lambda path: Store(path),
    "LesionPatches(path, ...)": patches,
    "LesionPatches(path, ...) and its first sample": lambda path: patches(path)[0],
}


def cost(step: str, path: Path) -> tuple[float, float]:
    reset_peak_memory()
    memory, start = peak_memory_mb(), time.perf_counter()
    kept = STEPS[step](path)
    seconds = time.perf_counter() - start
    del kept
    return seconds, peak_memory_mb() - memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--series", type=int, default=10_000)
    parser.add_argument("--slices", type=int, default=300)
    parser.add_argument("--boxes", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "store"
        make_store(path, options.series, options.slices, options.boxes)
        size = (path / "index.npz").stat().st_size / 2**20
        print(f"{options.series} series of {options.slices} slices, {options.boxes} boxes; index.npz: {size:.1f} MiB")
        print(", ".join(f"{name} {fact}" for name, fact in machine_facts().items()) + "\n")
        print("| step | seconds | MiB |\n| :-- | --: | --: |")
        for step in STEPS:
            rounds = []
            for _ in range(options.rounds):
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    rounds.append(pool.apply(cost, (step, path)))
            seconds, memory = (statistics.median(values) for values in zip(*rounds, strict=True))
            print(f"| {step} | {seconds:.3f} | {memory:.0f} |")


if __name__ == "__main__":
    main()
