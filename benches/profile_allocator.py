"""What `keep_freed_memory` brings: the same training step in processes with and without it, alternating, medians.

python benches/profile_allocator.py        about a minute on two cores
"""

import statistics
import subprocess
import sys

STEP = """
import sys, time, torch
from lidnet_fast.models.denoisers import build_denoiser
from lidnet_fast.runtime import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
torch.manual_seed(0)
denoiser, images = build_denoiser("small"), torch.rand(4, 1, 256, 256)
times = []
for _ in range(8):
    start = time.perf_counter()
    denoiser(images).square().mean().backward()
    times.append(time.perf_counter() - start)
print(sorted(times[2:])[3])
"""


def main() -> None:
    seconds: dict[str, list[float]] = {"returned": [], "kept": []}
    for _ in range(5):
        for mode, values in seconds.items():
            run = subprocess.run([sys.executable, "-c", STEP, mode], capture_output=True, text=True, check=True)
            values.append(float(run.stdout))
    returned, kept = (statistics.median(seconds[mode]) for mode in ("returned", "kept"))
    print("| small denoiser, 4x256x256, forward and backward | ms |\n| --- | ---: |")
    print(f"| freed memory returned to the kernel (glibc's default) | {returned * 1e3:.0f} |")
    print(f"| freed memory kept | {kept * 1e3:.0f} |")
    print(f"\nratio of medians {returned / kept:.2f}")


if __name__ == "__main__":
    main()
