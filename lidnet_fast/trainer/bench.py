"""`lidnet-fast bench`: how fast a configuration trains here, what limits it and what to change."""

import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L

from lidnet_fast.data.phantoms.study import Study, make_study
from lidnet_fast.data.samples.dataset import collate, make_batch
from lidnet_fast.device import choose_device, choose_precision
from lidnet_fast.errors import InputError
from lidnet_fast.report.terminal import print_table
from lidnet_fast.runtime import machine_facts
from lidnet_fast.trainer.clock import PARTS
from lidnet_fast.trainer.config import RunConfig
from lidnet_fast.trainer.datamodule import split_patches
from lidnet_fast.trainer.run import Run, curves

CONFIGURED = "as configured"
_MANY = 1_000_000
_WORTH_SAYING = 1.05
"""A change is advised that brings 5 % or more."""
_DATA_WAIT = 0.03
"""Share of a step that waiting for data may take."""


@dataclass(frozen=True)
class Speed:
    """What was measured of one variant of a configuration: medians over cycles of the collaborative phase."""

    images_per_s: float
    shares: dict[str, float]
    """Part of the step (`clock.PARTS`) -> share of its time."""
    peak_memory_mb: float


class _StopAfter(L.Callback):
    """Ends training at the end of a cycle, once the given seconds have passed since the first."""

    def __init__(self, seconds: float, cycle: int) -> None:
        self.seconds, self.cycle = seconds, cycle

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx + 1 == self.cycle:
            self.start = time.perf_counter()
        elif (batch_idx + 1) % self.cycle == 0 and time.perf_counter() - self.start > self.seconds:
            trainer.should_stop = True


def bench(config: RunConfig, seconds: float = 120.0) -> dict[str, Speed]:
    """Measure the collaborative phase as configured and with one thing changed at a time; print a table and advice.

    Networks have initial weights, and nothing is written but to a temporary folder.

    Args:
        config: of the run; without `data.store`, phantoms serve.
        seconds: about how long it may take.

    Returns:
        Variant -> speed.

    Raises:
        InputError: the configuration can't run.
    """
    if not seconds > 0:
        raise InputError(f"--seconds must be positive, got {seconds:g}")
    with tempfile.TemporaryDirectory(prefix="lidnet-fast-bench-") as folder:
        if not config.data.store:
            store = Path(folder) / "store"
            make_study(store, Study(patients=(("train", 2), ("val", 1), ("test", 1))), seed=0)
            config = replace(config, data=replace(config.data, store=str(store)))
        kinds = variants(config)
        speeds: dict[str, Speed] = {}
        start = time.perf_counter()
        for number, (name, variant) in enumerate(kinds.items()):
            if speeds and time.perf_counter() - start > seconds:
                print(f"No time was left for {name}: give more --seconds")
                continue
            out = replace(variant, out=str(Path(folder) / f"variant{number}"))
            speeds[name] = measured(out, 0.6 * seconds / len(kinds))
        loaded = loading_speed(config, 0.1 * seconds)
    facts = machine_facts()
    print_table(
        {"images": "images/s", "gain": "times", **{part: part for part in PARTS}, "memory": "peak MiB"},
        {name: _row(speed, speeds[CONFIGURED]) for name, speed in speeds.items()},
        f"Collaborative steps, batches of {config.collaborate.batch_size}: {facts['processor']}, GPU {facts['gpu']}",
    )
    print(f"The data alone, in one process: {loaded:.1f} images/s")
    print("\n".join(advice(config, speeds, loaded)))
    return speeds


def variants(config: RunConfig) -> dict[str, RunConfig]:
    """The configuration, and what a user might change in it: name -> configuration."""
    device = choose_device(config.device)
    native = choose_precision("auto", device)
    found = {CONFIGURED: config}
    if choose_precision(config.precision, device) != native:
        found[f"--precision {native}"] = replace(config, precision=native)
    elif native != "float32":
        found["--precision float32"] = replace(config, precision="float32")
    workers = 0 if config.data.workers else 2
    found[f"--data.workers {workers}"] = replace(config, data=replace(config.data, workers=workers))
    found["--ops reference"] = replace(config, ops="reference")
    return found


def measured(config: RunConfig, seconds: float) -> Speed:
    """Train a cycle to warm up, then at least one more for about the given seconds; read the logged speeds."""
    joint = config.collaborate
    cycle = joint.denoiser_steps + joint.detector_steps
    config = replace(
        config,
        detector=replace(config.detector, steps=0),
        denoiser=replace(config.denoiser, steps=0),
        independent_judge=None,
        collaborate=replace(joint, steps=_MANY),
        evaluation=replace(config.evaluation, validate_every=_MANY),
        checkpoint_every=_MANY,
        log_every=cycle,
    )
    run = Run(config, callbacks=[_StopAfter(seconds, cycle)])
    run.train_detector()
    run.train_denoiser()
    run.collaborate()
    logged = curves(run.out / "collaborate")

    def median(key: str) -> float:
        values = logged.get(key, ([], [0.0, 0.0]))[1]
        return statistics.median(values[1:])

    shares = {part: median(f"speed/{part}") for part in PARTS}
    return Speed(median("speed/images_per_s"), shares, max(logged["speed/peak_memory_mb"][1]))


def loading_speed(config: RunConfig, seconds: float) -> float:
    """Samples per second that one process reads, converts and adds noise to."""
    dataset, size, device = (
        split_patches(config, "train", "collaborate"),
        config.collaborate.batch_size,
        choose_device(config.device),
    )
    count, start = 0, time.perf_counter()
    while (spent := time.perf_counter() - start) < seconds or not count:
        make_batch(collate([dataset[draw] for draw in range(count, count + size)]), device)
        count += size
    return count / spent


def advice(config: RunConfig, speeds: Mapping[str, Speed], loaded: float) -> list[str]:
    """What limits the run and what to change, a sentence each."""
    base = speeds[CONFIGURED]
    limit = max(base.shares, key=lambda part: base.shares[part])
    lines = [f"Limited by: {limit} ({base.shares[limit]:.0%} of a step)."]
    if base.shares["data"] > _DATA_WAIT:
        lines.append(
            f"Steps wait for data ({base.shares['data']:.0%} of the time): more --data.workers, a local disk, or a "
            f"larger --data.noise_map_cache_mib; one process loads {loaded:.1f} images/s."
        )
    for name, speed in speeds.items():
        gain = speed.images_per_s / base.images_per_s
        if name != CONFIGURED and gain > _WORTH_SAYING:
            lines.append(f"Change: {name} takes {gain:.2f} times as many images/s.")
    if limit in ("denoiser", "detector"):
        lines.append(f"A smaller {limit} is another way: see --{limit}.name and --{limit}.options.")
    return lines


def _row(speed: Speed, base: Speed) -> dict[str, str]:
    return {
        "images": f"{speed.images_per_s:.2f}",
        "gain": f"{speed.images_per_s / base.images_per_s:.2f}",
        **{part: f"{share:.0%}" for part, share in speed.shares.items()},
        "memory": f"{speed.peak_memory_mb:.0f}",
    }
