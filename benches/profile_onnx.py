"""A denoiser in ONNX Runtime against the same in PyTorch, on the CPU: what `denoise` computes per slice.

    python -m benches.profile_onnx [--networks small unet redcnn] [--size 512] [--rounds 5] [--threads 1]

Both in float32 and in turns in one process, after a turn that isn't counted. Medians of the processor's time, of all
threads. Weights are random; nothing is timed whose results differ by more than the 0.05 HU that `publish` allows.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime
import torch

from lidnet_fast.inference import HUDenoiser, SliceDenoiser
from lidnet_fast.models import HUWindow, build_denoiser
from lidnet_fast.models.onnx import TOLERANCE_HU, OnnxDenoiser, write_onnx
from lidnet_fast.runtime import keep_freed_memory, machine_facts

CHANNELS = 32


def build(name: str) -> HUDenoiser:
    """A denoiser that changes what it sees: as built, its last layer is zero."""
    torch.manual_seed(0)
    network = build_denoiser(name, channels=CHANNELS)
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.03)
    return HUDenoiser(network, HUWindow()).eval()


def measure(name: str, size: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of processor per slice and runtime."""
    denoiser = build(name)
    hu = np.random.default_rng(0).uniform(-1000, 1000, (size, size)).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        write_onnx(path, denoiser)
        runtimes = {"PyTorch": SliceDenoiser(denoiser, "cpu"), "ONNX Runtime": SliceDenoiser(OnnxDenoiser(path), "cpu")}
        first, second = (runtime(hu) for runtime in runtimes.values())
        difference = float(np.abs(first - second).max())
        if not difference <= TOLERANCE_HU:
            raise SystemExit(f"{name}: results differ by {difference:.3f} HU, so nothing is timed")
        times: dict[str, list[float]] = {runtime: [] for runtime in runtimes}
        for _ in range(rounds):
            for runtime, denoise in runtimes.items():
                start = time.process_time()
                denoise(hu)
                times[runtime].append(time.process_time() - start)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["small", "unet", "redcnn"])
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    facts = {**machine_facts(), "onnxruntime": onnxruntime.__version__, "load average": f"{os.getloadavg()[0]:.1f}"}
    print(", ".join(f"{name} {fact}" for name, fact in facts.items()), end=".\n\n")
    print(f"| 1x{options.size}x{options.size}, ms | PyTorch | ONNX Runtime | times |\n| --- | ---: | ---: | ---: |")
    for name in options.networks:
        pytorch, onnx = (
            1e3 * statistics.median(times) for times in measure(name, options.size, options.rounds).values()
        )
        print(f"| {name} | {pytorch:.0f} | {onnx:.0f} | {pytorch / onnx:.2f} |", flush=True)


if __name__ == "__main__":
    main()
