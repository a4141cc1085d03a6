"""Time and memory of `denoise` against the length of a series: `python -m benches.profile_denoise [NETWORK]`.

DICOM series of 30 and of 300 slices of 512x512, the denoiser `small` by default, float32, in PyTorch and as ONNX. Every
call is a process of its own; the memory is its largest resident size.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benches.profile_ldct_benchmark import write_slices
from lidnet_fast.inference import HUDenoiser, save_denoiser
from lidnet_fast.models import HUWindow, NetworkConfig, build_denoiser
from lidnet_fast.publication import publish
from lidnet_fast.runtime import machine_facts

LENGTHS = (30, 300)


def denoise(studies: Path, out: Path, model: Path) -> tuple[float, float]:
    """Seconds and MiB of one call."""
    command = ["lidnet-fast", "denoise", studies, out, "--model", model, "--precision", "float32", "--device", "cpu"]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = status
    assert status == 0
    return time.perf_counter() - start, usage.ru_maxrss / 1024


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "small"
    print(*machine_facts().items(), f"load average {os.getloadavg()[0]:.1f}", sep="\n")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        save_denoiser(root / "denoiser.pt", HUDenoiser(build_denoiser(name), HUWindow()), NetworkConfig(name))
        published = publish(root / "denoiser.pt", root / "published")
        models = {"PyTorch": published, "ONNX Runtime": published / "model.onnx"}
        noise = np.random.default_rng(0).normal(0, 60, (LENGTHS[-1], 512, 512)).astype(np.int16)
        for length in LENGTHS:
            write_slices(root / str(length), noise[:length], 0.7, "anna")
        del noise
        for runtime, model in models.items():
            for length in LENGTHS:
                seconds, memory = denoise(root / str(length), root / f"{runtime} {length}", model)
                rate = length / seconds
                print(f"{runtime}, {length} slices: {seconds:.1f} s, {rate:.1f} images/s, {memory:.0f} MiB")


if __name__ == "__main__":
    main()
