"""Time and memory of `denoise` and `detect` against the length of a series.

    python -m benches.profile_series [--cases denoise tiles ...] [--lengths 50 150 300] [--network small]

DICOM series of 512x512, networks with initial weights, float32 on the CPU. Every call is a process of its own. Seconds
are the processor's, of all threads, and those per slice are what the longest series takes more than the shortest, which
leaves out imports and weights. The memory is the largest resident size, as the process itself knows it: what its parent
is told counts the parent's own, from before the program began.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from benches.profile_ldct_benchmark import write_slices
from lidnet_fast.inference import HUDenoiser, save_denoiser
from lidnet_fast.models import HUWindow, NetworkConfig, build_denoiser
from lidnet_fast.models.detectors import build_detector
from lidnet_fast.models.files import save_network
from lidnet_fast.publication import publish
from lidnet_fast.runtime import machine_facts

SIDE, TILE = 512, 256
DETECTOR = "faster_rcnn_small"
PROCESS = """
import time
from lidnet_fast.cli import main
from lidnet_fast.runtime import peak_memory_mb
main()
print(time.process_time(), peak_memory_mb())
"""
CASES = {
    "denoise": ("denoise", "--model", "whole"),
    "denoise, ONNX": ("denoise", "--model", "published/model.onnx"),
    "whole slices": ("detect", "--model", "whole"),
    "tiles": ("detect", "--model", "tiles"),
    "denoised first": ("detect", "--model", "whole", "--denoise-first"),
}


def write_models(root: Path, network: str) -> None:
    """Runs whose detectors were trained on whole slices, and on fields of view."""
    torch.manual_seed(0)
    for run, crop in (("whole", None), ("tiles", TILE)):
        denoiser = HUDenoiser(build_denoiser(network), HUWindow())
        for phase in ("detector", "collaborate"):
            file = root / run / phase / "detector.pt"
            file.parent.mkdir(parents=True)
            trained = {"data": {"crop": crop}}
            save_network(file, "detector", build_detector(DETECTOR), NetworkConfig(DETECTOR), HUWindow(), trained)
        save_denoiser(root / run / "collaborate" / "denoiser.pt", denoiser, NetworkConfig(network))


def measure(root: Path, case: str, length: int) -> tuple[float, float]:
    """Seconds of processor and MiB of one call."""
    command, flag, model, *options = CASES[case]
    if command == "detect":  # what initial weights find is as good as anything else, and all of it
        options += ["--min-score", "1"]
    places = [str(root / str(length)), str(root / f"{case} {length}"), flag, str(root / model)]
    call = [sys.executable, "-c", PROCESS, command, *places, "--precision", "float32", "--device", "cpu", *options]
    done = subprocess.run(call, stdout=subprocess.PIPE, text=True, check=True)
    seconds, memory = map(float, done.stdout.splitlines()[-1].split())
    return seconds, memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--lengths", nargs="+", type=int, default=[50, 150, 300])
    parser.add_argument("--network", default="small", help="of the denoiser")
    options = parser.parse_args()
    lengths = sorted(options.lengths)
    print(", ".join(f"{name} {fact}" for name, fact in machine_facts().items()))
    print(f"load average {os.getloadavg()[0]:.1f}, denoiser {options.network}, detector {DETECTOR}\n")
    columns = " | ".join(f"MiB, {length} slices" for length in lengths)
    print(f"| | ms per slice | images/s | {columns} |\n| --- |{' ---: |' * (2 + len(lengths))}")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_models(root, options.network)
        if any("published" in CASES[case][2] for case in options.cases):
            publish(root / "whole", root / "published")
        noise = np.random.default_rng(0).normal(0, 60, (lengths[-1], SIDE, SIDE)).astype(np.int16)
        for length in lengths:
            write_slices(root / str(length), noise[:length], 0.7, "anna")
        del noise
        for case in options.cases:
            seconds, memory = zip(*(measure(root, case, length) for length in lengths), strict=True)
            each = (seconds[-1] - seconds[0]) / (lengths[-1] - lengths[0])
            cells = " | ".join(f"{mib:.0f}" for mib in memory)
            print(f"| {case} | {1e3 * each:.0f} | {1 / each:.2f} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
