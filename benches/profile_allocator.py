"""What `keep_freed_memory` brings: the same step in processes with and without it, alternating, medians.

    python -m benches.profile_allocator        about two minutes on two cores

Processor time is of all threads, which a busy machine hardly changes; faults are pages that the kernel handed out.
"""

import json
import statistics
import subprocess
import sys

PROCESSES, STEPS_EACH = 3, 5
SETUPS = {
    "roi_perceptual_loss, 4x256x128x128, 256 boxes": """
from benches.boxes import proposals
from lidnet_fast import roi_perceptual_loss
features, target = torch.rand(2, 4, 256, 128, 128)
features.requires_grad_()
boxes = proposals((512, 512), 4, 256)
step = lambda: torch.autograd.grad(roi_perceptual_loss(features, target, boxes, 7, 1 / 4), features)
""",
    "torchvision's roi_align twice and mse_loss, the same": """
from benches.boxes import proposals
from torchvision.ops import roi_align
features, target = torch.rand(2, 4, 256, 128, 128)
features.requires_grad_()
boxes = proposals((512, 512), 4, 256)
pool = lambda maps: roi_align(maps, boxes, 7, 1 / 4, 2, True)
step = lambda: torch.autograd.grad(torch.nn.functional.mse_loss(pool(features), pool(target)), features)
""",
    "small denoiser, 4x256x256": """
from lidnet_fast.models.denoisers import build_denoiser
denoiser, images = build_denoiser("small"), torch.rand(4, 1, 256, 256)
step = lambda: denoiser(images).square().mean().backward()
""",
}
PROCESS = """
import json, resource, statistics, sys, time, torch
from lidnet_fast.runtime import keep_freed_memory
if sys.argv[2] == "kept":
    keep_freed_memory()
torch.manual_seed(0)
exec(sys.argv[1])
costs = []
for _ in range(int(sys.argv[3]) + 1):
    before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    step()
    took, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    costs.append((1e3 * took, 1e3 * processor, after.ru_minflt - before.ru_minflt))
print(json.dumps([statistics.median(cost) for cost in zip(*costs[1:])]))
"""


def main() -> None:
    print("| forward and backward | freed memory | ms | processor, ms | faults |\n| --- | --- | ---: | ---: | ---: |")
    for name, setup in SETUPS.items():
        costs: dict[str, list[list[float]]] = {"returned": [], "kept": []}
        for _ in range(PROCESSES):
            for mode, of_mode in costs.items():
                command = [sys.executable, "-c", PROCESS, setup, mode, str(STEPS_EACH)]
                run = subprocess.run(command, capture_output=True, text=True, check=True)
                of_mode.append(json.loads(run.stdout))
        for mode, of_mode in costs.items():
            cells = " | ".join(f"{statistics.median(cost):.0f}" for cost in zip(*of_mode, strict=True))
            print(f"| {name} | {mode} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
