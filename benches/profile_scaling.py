"""Images per second against the number of processes, for a model that costs nothing: what data and exchange allow.

    python -m benches.profile_scaling --ranks 1 2

Every rank is a process with one thread that reads its own samples of one store ("loaded": what a loader process does),
converts them, adds noise, and takes steps of a null model of one weight whose gradient is exchanged by gloo as DDP does
("in steps"; on a GPU, conversion and noise are its work). What real networks exchange per step is counted from their
weights. docs/scaling.md says what follows from the figures.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from lidnet_fast.data.phantoms.study import Study, make_study
from lidnet_fast.data.samples.dataset import LesionPatches, collate, make_batch
from lidnet_fast.models.files import build_network
from lidnet_fast.models.registry import NetworkConfig
from lidnet_fast.runtime import machine_facts

BATCH, STEPS, WARM_UP = 8, 24, 4
CROPS = (64, 256, None)


class NullModel(nn.Module):
    """Multiplies by one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images * self.weight


def run_rank(rank: int, world: int, store: str, port: int, results: str) -> None:
    """Train the null model for some steps at every field of view; rank 0 writes images per second."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=world)
    model = nn.parallel.DistributedDataParallel(NullModel())
    lines = []
    for crop in CROPS:
        data = LesionPatches(store, "train", crop=crop, positive_fraction=0.85, augment=True, seed=0)
        loading, whole = [], []
        for step in range(STEPS):
            start = time.perf_counter()
            first = (step * world + rank) * BATCH
            samples = collate([data[first + n] for n in range(BATCH)])
            loading.append(time.perf_counter() - start)
            batch = make_batch(samples, torch.device("cpu"))
            model(batch["low_dose"]).sub(batch["normal_dose"]).square().mean().backward()
            whole.append(time.perf_counter() - start)
        lines += [str(world * BATCH / statistics.median(seconds[WARM_UP:])) for seconds in (loading, whole)]
    if rank == 0:
        Path(results).write_text("\n".join(lines), encoding="utf-8")
    dist.destroy_process_group()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args(arguments)
    facts = machine_facts()
    print(f"{facts['processor']}, torch {facts['torch']}, {facts['date']}\n")
    with tempfile.TemporaryDirectory() as folder:
        store, results = str(Path(folder) / "store"), str(Path(folder) / "results")
        make_study(Path(store), Study((("train", 6), ("val", 1), ("test", 1))), seed=0)
        fields = ["512x512" if crop is None else f"{crop}x{crop}" for crop in CROPS]
        print(f"| ranks | {' | '.join(f'{f} loaded | {f} in steps' for f in fields)} |")
        print(f"| --- |{' ---: |' * 2 * len(CROPS)}")
        for number, world in enumerate(options.ranks):
            mp.spawn(run_rank, (world, store, 29_500 + number, results), nprocs=world)
            rates = [float(line) for line in Path(results).read_text(encoding="utf-8").split()]
            print(f"| {world} | {' | '.join(f'{rate:.0f}' for rate in rates)} |", flush=True)
    print("\n| network | gradient, MiB | sent per rank and step on 8 ranks, MiB |\n| --- | ---: | ---: |")
    for kind, name in (("denoiser", "redcnn"), ("denoiser", "unet"), ("detector", "faster_rcnn_resnet18_fpn")):
        network = build_network(kind, NetworkConfig(name))  # type: ignore[arg-type]
        mib = sum(p.nbytes for p in network.parameters()) / 2**20
        print(f"| {name} | {mib:.1f} | {mib * 2 * 7 / 8:.1f} |")


if __name__ == "__main__":
    main()
