"""Batches by number: the loader side of exact resumption."""

from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader, Sampler

from lidnet_fast.data.samples.dataset import Batch, LesionPatches, Sample, Samples, collate, make_batch
from lidnet_fast.trainer.config import RunConfig

# Streams of draws are kept apart, so that no phase sees another's samples.
_STREAMS = {"detector": 0, "denoiser": 1, "collaborate": 2, "independent_judge": 3, "val": 4, "test": 5}

# Batches that each loader process keeps ready: slices differ in what they cost to decode.
_PREFETCHED = 4


def stream_seed(seed: int, stream: str) -> int:
    """The seed of one stream of draws ("detector", "denoiser", "collaborate", "independent_judge", "val" or "test")."""
    return seed * len(_STREAMS) + _STREAMS[stream]


class DrawSampler(Sampler[list[int]]):
    """A rank's parts of batches of consecutive draws, starting after the steps already taken.

    Batch `step` holds the draws step * batch_size + [0, batch_size), and every rank an equal part of them. That is a
    pure function of the step, whatever the number of ranks, so nothing has to be saved but the number of steps taken.
    """

    def __init__(self, steps: int, batch_size: int, rank: int, world: int) -> None:
        self.steps, self.batch_size = steps, batch_size
        self.part = batch_size // world
        self.offset = rank * self.part
        self.start = 0

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        start, self.start = self.start, 0
        for step in range(start, self.steps):
            first = step * self.batch_size + self.offset
            yield list(range(first, first + self.part))


class PatchData(L.LightningDataModule):
    """Training batches of one phase, and the fixed validation samples.

    Args:
        config: the run's configuration.
        stream: whose draws these are; see `stream_seed`.
        steps: batches of the phase.
        batch_size: samples per batch, over all ranks.
        with_low_dose: see `LesionPatches`.
    """

    def __init__(
        self, config: RunConfig, stream: str, steps: int, batch_size: int, *, with_low_dose: bool = True
    ) -> None:
        super().__init__()
        self.with_low_dose = with_low_dose
        self.config, self.stream, self.steps, self.batch_size = config, stream, steps, batch_size
        self._steps_done = 0

    def train_dataloader(self) -> DataLoader[Sample]:
        """All of the phase's batches, from the first that is still to be done."""
        assert self.trainer is not None
        dataset = split_patches(self.config, "train", self.stream, with_low_dose=self.with_low_dose)
        sampler = DrawSampler(self.steps, self.batch_size, self.trainer.global_rank, self.trainer.world_size)
        sampler.start = self._steps_done
        workers = self.config.data.workers
        return DataLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=collate,
            num_workers=workers,
            prefetch_factor=_PREFETCHED if workers else None,
            pin_memory=self.trainer.strategy.root_device.type == "cuda",
        )

    def val_dataloader(self) -> DataLoader[Sample]:
        """The fixed validation samples."""
        samples = self.config.evaluation.validation_samples
        return held_out_loader(self.config, "val", samples, with_low_dose=self.with_low_dose)

    def transfer_batch_to_device(self, batch: Samples, device: torch.device, dataloader_idx: int) -> Batch:
        """Conversion and noise happen here, on the batch and on its device."""
        return make_batch(batch, device)

    def state_dict(self) -> dict[str, Any]:
        """Batches taken so far: Lightning's own progress, which counts batches and not optimiser steps."""
        assert self.trainer is not None
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress
        return {"steps_done": progress.current.processed, "processes": self.trainer.world_size}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue after the batches already taken."""
        assert self.trainer is not None
        self._steps_done = state_dict["steps_done"]
        before, now = state_dict["processes"], self.trainer.world_size
        if before != now and self.trainer.is_global_zero:
            print(
                f"The {self.stream} phase resumes at step {self._steps_done}, its processes changed from {before} to "
                f"{now}: every step sees the same samples in parts of another size, so results differ by rounding, "
                "and where BatchNorm, sampled anchors or a mean over boxes see a part of the batch."
            )


def split_patches(config: RunConfig, split: str, stream: str, *, with_low_dose: bool = True) -> LesionPatches:
    """The dataset of a split as the configuration describes it; only training samples are augmented."""
    # The detector's slices, each with the neighbours that it is denoised from; the warm-up has no detector.
    context = 0 if stream == "denoiser" else config.data.context_of("detector")
    return LesionPatches(
        config.data.store,
        split,
        crop=config.data.crop,
        positive_fraction=config.data.positive_fraction,
        augment=config.data.augment and split == "train",
        seed=stream_seed(config.seed, stream),
        cache_mib=config.data.noise_map_cache_mib,
        context=context,
        low_dose_context=context + config.data.context_of("denoiser"),
        with_low_dose=with_low_dose,
    )


def held_out_loader(config: RunConfig, split: str, samples: int, *, with_low_dose: bool = True) -> DataLoader[Sample]:
    """The first `samples` draws of a held-out split: the same fields of view and noise every time."""
    return DataLoader(
        split_patches(config, split, split, with_low_dose=with_low_dose),
        batch_sampler=[list(range(i, min(i + 8, samples))) for i in range(0, samples, 8)],
        collate_fn=collate,
    )
