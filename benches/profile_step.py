"""Where the time of a collaborative step goes: every part on its own, forward and backward, medians.

    python benches/profile_step.py            both scales, about four minutes on two cores

Each part runs on detached inputs, so that its backward ends where the part ends; parts are interleaved, so that a busy
moment of the machine hits all of them. What the library computes runs on its definitions ("reference", whole images)
and on its kernels ("fused", ROI windows). The tables are Markdown, for docs/performance.md.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torchvision
from torch import Tensor

import lidnet_fast
from lidnet_fast import backend
from lidnet_fast.data.dose import DoseSimulation, noise_variance_maps, sample_generator, sector_noise
from lidnet_fast.data.lidc import load_lidc_boxes
from lidnet_fast.models.windowing import HUWindow
from lidnet_fast.runtime import keep_freed_memory, machine_facts
from lidnet_fast.trainer.config import NetworkConfig
from lidnet_fast.trainer.networks import build_network

OPS = ("reference", "fused")


@dataclass(frozen=True)
class Scale:
    """One configuration to be profiled."""

    name: str
    images: int
    size: int
    denoiser: NetworkConfig
    detector: NetworkConfig
    pixel: Mapping[str, float]
    vgg: bool


SCALES = (
    Scale(
        "demo: 4x128x128, unet of 16 channels, faster_rcnn_small",
        4,
        128,
        NetworkConfig("unet", {"channels": 16, "levels": 3, "blocks": 1}),
        NetworkConfig("faster_rcnn_small"),
        {"mse": 1.0},
        False,
    ),
    Scale(
        "whole slices: 4x512x512, unet, faster_rcnn_resnet18_fpn",
        4,
        512,
        NetworkConfig("unet"),
        NetworkConfig("faster_rcnn_resnet18_fpn"),
        {"mse": 1.0, "ssim": 0.1},
        True,
    ),
)


def parts_of(scale: Scale) -> tuple[dict[str, Callable[[], None]], dict[str, Callable[[], None]]]:
    """The parts of a step as functions that run one forward and backward each: those of others, and the library's."""
    torch.manual_seed(0)
    n, side = scale.images, scale.size
    window = HUWindow()
    hu = torch.empty(n, side, side).uniform_(-1000, 400)
    simulation = DoseSimulation(dose_fraction=0.1)
    denoiser = build_network("denoiser", scale.denoiser)
    detector = build_network("detector", scale.detector).eval().requires_grad_(False)
    low, normal = (window.scale(image)[:, None] for image in (hu + 100 * torch.randn_like(hu), hu))
    boxes = lidc_boxes(n, side)
    with torch.no_grad():
        denoised = window.clamp(denoiser(low))
        normal = window.clamp(normal)
        normal_features = detector.features(normal)
        features = detector.features(denoised)
    levels = list(features)[:2]

    def data() -> None:
        maps = noise_variance_maps(hu, 0.7, simulation)
        sector_noise(maps, (side, side), [(0, 0, side, side)] * n, [sample_generator(0, 0, i) for i in range(n)])

    def run_denoiser() -> None:
        output = denoiser(low)
        output.backward(torch.randn_like(output))

    def backbone_denoised() -> None:
        images = leaf(denoised)
        found = detector.features(images)
        torch.autograd.backward(list(found.values()), [torch.randn_like(f) for f in found.values()])

    @torch.no_grad()
    def backbone_normal() -> None:
        detector.features(normal)

    def detection_heads() -> None:
        torch.stack(
            list(detector.losses(denoised, boxes, {k: leaf(f) for k, f in features.items()}).values())
        ).sum().backward()

    def roi_perceptual() -> None:
        torch.stack(
            [
                lidnet_fast.roi_perceptual_loss(
                    leaf(features[k]), normal_features[k], boxes, 7, 1 / detector.feature_strides[k]
                )
                for k in levels
            ]
        ).sum().backward()

    def pixel_losses() -> None:
        lidnet_fast.multi_loss(leaf(denoised), normal, scale.pixel).total.backward()

    parts = {
        "low-dose noise (data)": data,
        "denoiser": run_denoiser,
        "detector backbone, denoised image": backbone_denoised,
        "detector backbone, normal dose (no graph)": backbone_normal,
        "detection loss (RPN, box head)": detection_heads,
    }
    ours: dict[str, Callable[[], None]] = {
        "ROI perceptual: RoIAlign and loss": roi_perceptual,
        f"pixel losses ({', '.join(scale.pixel)})": pixel_losses,
    }
    if scale.vgg:
        # Random weights cost what trained ones do.
        vgg = torchvision.models.vgg19(weights=None)
        losses = {
            ops: lidnet_fast.ROIPerceptualLoss(vgg, "relu3_4", halo)
            for ops, halo in (("reference", "whole"), ("fused", "exact"))
        }

        def vgg_perceptual() -> None:
            losses[backend.current()](leaf(denoised), normal, boxes).backward()

        ours["ROI perceptual: VGG19 relu3_4"] = vgg_perceptual
    return parts, ours


def on(ops: str, part: Callable[[], None]) -> Callable[[], None]:
    """The part, computed by these implementations."""

    def run() -> None:
        backend.use(ops)
        part()

    return run


def leaf(tensor: Tensor) -> Tensor:
    """The tensor as a new leaf that collects a gradient."""
    return tensor.detach().requires_grad_()


def lidc_boxes(images: int, side: int) -> list[Tensor]:
    """One box per image with sizes from LIDC-IDRI, away from the edges."""
    rng = np.random.default_rng(0)
    table = load_lidc_boxes()
    chosen = table[rng.integers(len(table), size=images)]
    boxes = []
    for row in chosen:
        width, height = float(row["x2"] - row["x1"]), float(row["y2"] - row["y1"])
        x, y = rng.uniform(side * 0.2, side * 0.6, 2)
        boxes.append(torch.tensor([[x, y, x + width, y + height]], dtype=torch.float32))
    return boxes


def medians(parts: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each part, the parts interleaved."""
    for part in parts.values():
        part()
    times: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(repeats):
        for name, part in parts.items():
            start = time.perf_counter()
            part()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args(arguments)
    keep_freed_memory()
    facts = machine_facts()
    print(f"{facts['processor']}, torch {facts['torch']}, {facts['date']}")
    for scale in SCALES:
        repeats = options.repeats if not scale.vgg else max(3, options.repeats // 2)
        parts, ours = parts_of(scale)
        of_both = {f"{ops} {name}": on(ops, part) for name, part in ours.items() for ops in OPS}
        times = medians({**parts, **of_both}, repeats)
        columns = {ops: [times.get(f"{ops} {name}", times.get(name, 0.0)) for name in (*parts, *ours)] for ops in OPS}
        totals = {ops: sum(column) for ops, column in columns.items()}
        print(f"\n| {scale.name} | reference, ms | fused, ms | share of fused |\n| --- | ---: | ---: | ---: |")
        for name, reference, fused in zip((*parts, *ours), *columns.values(), strict=True):
            print(f"| {name} | {reference * 1e3:.1f} | {fused * 1e3:.1f} | {fused / totals['fused']:.0%} |")
        print(f"| **sum** | **{totals['reference'] * 1e3:.0f}** | **{totals['fused'] * 1e3:.0f}** | |")


if __name__ == "__main__":
    main()
