"""Where the time of a collaborative step goes, in the trainer itself: definitions, kernels, bfloat16.

    python -m benches.profile_step                 three scales, about half an hour on two cores
    python -m benches.profile_step --scale demo    one of them

Every variant trains for some cycles (four denoiser steps, one detector step) on the same phantoms, in turns, so that a
busy moment of the machine hits all of them; medians of the cycles. The tables are Markdown, for docs/performance.md.
"""

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lidnet_fast.data.phantoms.study import Study, make_study
from lidnet_fast.runtime import keep_freed_memory, machine_facts
from lidnet_fast.trainer.bench import Speed, measured
from lidnet_fast.trainer.clock import PARTS
from lidnet_fast.trainer.config import DataConfig, ObjectiveConfig, RunConfig

LIDNET = ObjectiveConfig(pixel={"mse": 1.0, "ssim": 0.1})
DEFAULT = RunConfig()
SCALES = {
    "demo": (
        "demo: 4x128x128, unet of 16 channels, faster_rcnn_small; mse, ssim, ROI perceptual, detection",
        replace(
            DEFAULT,
            data=DataConfig(crop=128),
            denoiser=replace(DEFAULT.denoiser, options={"channels": 16, "levels": 3, "blocks": 1}),
            detector=replace(DEFAULT.detector, name="faster_rcnn_small"),
            collaborate=replace(DEFAULT.collaborate, objective=LIDNET),
        ),
    ),
    "default": (
        "default: 4x256x256, unet, faster_rcnn_resnet18_fpn; mse, ssim, ROI perceptual, detection",
        replace(DEFAULT, collaborate=replace(DEFAULT.collaborate, objective=LIDNET)),
    ),
    "slices": (
        "whole slices: 4x512x512, the same and ROI perceptual of VGG19 relu3_4; regions are the lesion boxes",
        replace(
            DEFAULT,
            data=DataConfig(crop=None),
            # A detector with initial weights would propose regions anywhere; a trained one does where lesions are.
            collaborate=replace(DEFAULT.collaborate, objective=replace(LIDNET, roi_extractor=0.01, regions="boxes")),
        ),
    ),
}
VARIANTS = {
    "reference, float32": {"ops": "reference", "precision": "float32"},
    "fused, float32": {"ops": "fused", "precision": "float32"},
    "reference, bfloat16": {"ops": "reference", "precision": "bfloat16"},
    "fused, bfloat16": {"ops": "fused", "precision": "bfloat16"},
    "the same, compiled": {"ops": "fused", "precision": "bfloat16", "compile": True},
    "the same, activations recomputed": {"ops": "fused", "precision": "bfloat16", "activation_checkpointing": True},
}


def profile(config: RunConfig, folder: Path, rounds: int, seconds: float) -> dict[str, list[Speed]]:
    """Speeds of all variants, measured in turns."""
    found: dict[str, list[Speed]] = {name: [] for name in VARIANTS}
    for number in range(rounds):
        for name, change in VARIANTS.items():
            out = folder / f"{number} {name}"
            found[name].append(measured(replace(config, out=str(out), **change), seconds))
    return found


def print_table(title: str, speeds: dict[str, list[Speed]], batch: int) -> None:
    """One row per variant: milliseconds of a step and of its parts, medians."""
    print(f"\n| {title} | step, ms | {' | '.join(PARTS)} | peak MiB | times |")
    print(f"| --- |{' ---: |' * (len(PARTS) + 3)}")
    steps = {name: statistics.median(1e3 * batch / s.images_per_s for s in of) for name, of in speeds.items()}
    first = next(iter(steps.values()))
    for name, step in steps.items():
        parts = [step * statistics.median(s.shares[part] for s in speeds[name]) for part in PARTS]
        memory = statistics.median(s.peak_memory_mb for s in speeds[name])
        cells = " | ".join(f"{part:.0f}" for part in parts)
        print(f"| {name} | {step:.0f} | {cells} | {memory:.0f} | {first / step:.2f} |", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", choices=SCALES, action="append", help="repeatable; all by default")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=30.0, help="per variant and round after a cycle to warm up")
    options = parser.parse_args(arguments)
    keep_freed_memory()
    facts = machine_facts()
    print(f"{facts['processor']}, torch {facts['torch']}, {facts['date']}")
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        make_study(store, Study((("train", 4), ("val", 1), ("test", 1))), seed=0)
        for scale in options.scale or SCALES:
            title, config = SCALES[scale]
            config = replace(config, data=replace(config.data, store=str(store)))
            speeds = profile(config, Path(folder) / scale, options.rounds, options.seconds)
            print_table(title, speeds, config.collaborate.batch_size)


if __name__ == "__main__":
    main()
