"""What lesions cost `ROIPerceptualLoss`: time against their number, on windows, on whole images, and as planned.

    python -m benches.profile_windows                      # prints tables; about four minutes on two cores
    python -m benches.profile_windows --plot windows.svg   # and draws them; needs matplotlib
    python -m benches.profile_windows --planning           # what planning alone takes; half a minute

One 512x512 image, VGG19, lesions of LIDC-IDRI's sizes anywhere in it, forward and backward, medians of interleaved
runs. "As planned" is what users get: windows, or the whole image where the planner expects it to cost less.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torchvision

from benches.boxes import as_rois, lesions
from lidnet_fast import ROIPerceptualLoss, backend
from lidnet_fast.runtime import keep_freed_memory, machine_facts

SIDE = 512
LAYERS = ("relu2_2", "relu3_4", "relu4_4")
COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
ROUNDS, PLANNING_ROUNDS = 3, 21


def medians(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Milliseconds of each of some runs, which take turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(of_run[1:]) for name, of_run in times.items()}  # the first warms up


def planning(network: torch.nn.Module) -> None:
    """Prints what planning takes in Python, the definition, and in C++."""
    planner = ROIPerceptualLoss(network, "relu3_4").windows.planner((SIDE, SIDE))
    print("| lesions | windows | definition, ms | C++, ms | times |")
    print("| ---: | ---: | ---: | ---: | ---: |")

    def plan(name: str) -> None:
        with backend.use(name):
            planner.plan(rois, 1)

    for count in COUNTS:
        rois = as_rois(lesions((SIDE, SIDE), 1, count)).double().numpy()
        taken = medians({name: lambda n=name: plan(n) for name in ("reference", "fused")}, PLANNING_ROUNDS)
        cells = " | ".join(f"{milliseconds:.3g}" for milliseconds in taken.values())
        windows = len(planner.plan(rois, 1).windows) or "whole image"
        print(f"| {count} | {windows} | {cells} | {taken['reference'] / taken['fused']:.0f} |", flush=True)


def against_lesions(network: torch.nn.Module, layer: str) -> dict[int, dict[str, float]]:
    """Lesions -> milliseconds of "as planned", "windows" and "whole image"."""
    halos = {"as planned": "exact", "windows": "exact", "whole image": "whole"}
    losses = {name: ROIPerceptualLoss(network, layer, halo) for name, halo in halos.items()}
    losses["windows"].windows.planner((SIDE, SIDE)).whole_cost = float("inf")
    denoised, normal_dose = torch.rand(1, 1, SIDE, SIDE, requires_grad=True), torch.rand(1, 1, SIDE, SIDE)
    rows = {}
    for count in COUNTS:
        boxes = lesions((SIDE, SIDE), 1, count)
        runs = {name: lambda l=loss: l(denoised, normal_dose, boxes).backward() for name, loss in losses.items()}  # noqa: B023, E741
        rows[count] = medians(runs, ROUNDS)
        plan = losses["as planned"].plan((SIDE, SIDE), boxes)
        chosen = "whole image" if plan.whole else f"{len(plan.windows)} windows"
        cells = " | ".join(f"{rows[count][name]:.0f}" for name in losses)
        print(f"| {layer} | {count} | {cells} | {chosen} |", flush=True)
    return rows


def plot(path: Path, times: Mapping[str, Mapping[int, Mapping[str, float]]]) -> None:
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(times), figsize=(4 * len(times), 3.4), layout="constrained")
    for panel, (layer, rows) in zip(panels, times.items(), strict=True):
        for name, style in (("whole image", "--"), ("windows", ":"), ("as planned", "-")):
            panel.plot(list(rows), [row[name] for row in rows.values()], style, label=name, lw=2)
        panel.set(xscale="log", yscale="log", title=f"VGG19 {layer}", xlabel="lesions in a 512x512 image", ylabel="ms")
        panel.grid(alpha=0.3)
    panels[0].legend()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", type=Path, help="file to draw to")
    parser.add_argument("--planning", action="store_true", help="time the planner alone")
    options = parser.parse_args()
    keep_freed_memory()
    torch.manual_seed(0)
    network = torchvision.models.vgg19()
    print(", ".join(f"{name} {fact}" for name, fact in machine_facts().items()), end=".\n\n")
    if options.planning:
        return planning(network)
    print("| layer | lesions | as planned, ms | windows, ms | whole image, ms | planned |")
    print("| --- | ---: | ---: | ---: | ---: | --- |")
    times = {layer: against_lesions(network, layer) for layer in LAYERS}
    if options.plot:
        plot(options.plot, times)


if __name__ == "__main__":
    main()
