"""Training and evaluation samples from a store: every sample is a pure function of (seed, draw).

A *draw* is the running number of a sample within a phase. Slice, field of view, flips and noise all follow from the
seed and the draw, so a run can be continued at any step, on any number of workers, with bit-identical samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import NotRequired, TypedDict

import numpy as np
import torch
from cachetools import LRUCache
from torch import Tensor
from torch.utils.data import Dataset

from lidnet_fast.data.samples.fields_of_view import boxes_in_view, draw_origin
from lidnet_fast.data.samples.sampling import BalancedDraws
from lidnet_fast.data.simulation.dose import (
    DoseSimulation,
    coarse_attenuation,
    sample_generator,
    stack_noise,
    variance_maps,
)
from lidnet_fast.data.store.reader import Store
from lidnet_fast.errors import InputError
from lidnet_fast.neighbours import middle, neighbours

SampleId = tuple[int, int, int, int, bool, bool]
"""Series, slice, first row and column of the field of view, and whether its rows and columns are reversed: what a
normal-dose sample of one dataset depends on."""


@dataclass(frozen=True)
class Sample:
    """One field of view as it is read: compact, and not copied before the batch is put together."""

    id: SampleId
    normal_dose: np.ndarray
    """int16 [C,H,W], HU, flipped; channels are the slice, in the middle, and its neighbours."""
    low_dose: np.ndarray | None
    """int16 [C,H,W], HU, flipped; None where the low dose is simulated or not asked for."""
    attenuation: Tensor | None
    """[C,h,w] `coarse_attenuation` of the whole slices; None where no low dose is simulated."""
    image_size: tuple[int, int]
    pixel_spacing: float
    boxes: np.ndarray
    """float32 [L,4] in the flipped field of view."""
    noise_keys: list[tuple[int, ...]]
    """What the noise of each channel is seeded with: (seed, epoch, sample) of a slice alone, and (seed, epoch, series,
    slice) of one among neighbours, so that the same slice is the same in every stack of an epoch."""
    simulation: DoseSimulation | None
    """Of the low dose; None where it is stored or not asked for."""
    context: int
    """Neighbours on each side that the normal-dose images of a batch keep."""


@dataclass(frozen=True)
class Samples:
    """Samples put together, as they leave a loader process: a few compact arrays, converted on the device."""

    ids: list[SampleId]
    normal_dose: Tensor
    """int16 [N,C,H,W], HU, flipped."""
    low_dose: Tensor | None
    """int16 [N,C,H,W], HU, flipped; None where the low dose is simulated or not asked for."""
    attenuation: dict[tuple[int, int], Tensor]
    """[n,C,h,w] `coarse_attenuation` of the whole slices, by their size; empty where no low dose is simulated."""
    image_sizes: list[tuple[int, int]]
    pixel_spacings: list[float]
    boxes: Tensor
    """float32 [sum of L,4] in the flipped fields of view."""
    boxes_per_sample: list[int]
    noise_keys: list[list[tuple[int, ...]]]
    simulation: DoseSimulation | None
    context: int

    def pin_memory(self) -> "Samples":
        """Return the same in page-locked memory, from which the GPU copies while the CPU goes on."""
        return replace(
            self,
            normal_dose=self.normal_dose.pin_memory(),
            low_dose=None if self.low_dose is None else self.low_dose.pin_memory(),
            attenuation={size: values.pin_memory() for size, values in self.attenuation.items()},
            boxes=self.boxes.pin_memory(),
        )


class Batch(TypedDict):
    """What a phase trains on. Images are HU, float32 [N,1,H,W], with neighbouring slices as further channels on both
    sides: as many as the detector sees, and of low dose as many as these are denoised from. Low dose is there if it was
    asked for."""

    normal_dose: Tensor
    low_dose: NotRequired[Tensor]
    boxes: list[Tensor]
    ids: list[SampleId]


class LesionPatches(Dataset[Sample]):
    """Fields of view of one split: in a given fraction centred near lesions, the others anywhere.

    Every patient is as likely as any other; so is, within a patient, every lesion or (anywhere) every slice; and of a
    lesion every box.

    Args:
        store: the prepared store's folder or URL.
        split: "train", "val" or "test".
        crop: side of the field of view in pixels; None for whole slices.
        positive_fraction: fraction of draws centred near a lesion.
        augment: random flips.
        seed: of everything random here.
        cache_mib: bound in MiB on the cache of what the simulation of the noise reads of whole slices.
        context: neighbouring slices on each side in the normal-dose images of a batch.
        low_dose_context: the same in the low-dose images; at least `context`.
        with_low_dose: False reads and simulates no low dose, for what trains on normal dose alone.

    Raises:
        InputError: the split is empty, a slice is smaller than `crop` (or, without one, slices differ in size), or a
            series has no low dose, where it is asked for.
    """

    def __init__(
        self,
        store: str | Path,
        split: str,
        *,
        crop: int | None,
        positive_fraction: float,
        augment: bool,
        seed: int,
        cache_mib: int = 512,
        context: int = 0,
        low_dose_context: int = 0,
        with_low_dose: bool = True,
    ) -> None:
        self.store = Store(store)
        self.with_low_dose = with_low_dose
        self.context, self.around = context, low_dose_context if with_low_dose else context
        self.crop = crop
        self.positive_fraction = positive_fraction
        self.augment = augment
        self.seed = seed
        described = self.store.simulation if with_low_dose else None
        self.simulation = None if described is None else DoseSimulation.from_dict(described)
        self._cache: LRUCache[tuple[int, int], Tensor] = LRUCache(cache_mib * 2**20, getsizeof=attrgetter("nbytes"))

        self._draws = BalancedDraws(self.store.index, split)
        index, ours = self.store.index, self._draws.series
        if not len(ours):
            raise InputError(
                f"{store}: the {split} split has no slices. To fix: prepare a store with patients in {split}"
            )
        sizes = index.shape[ours, 1:]
        small = ours[sizes.min(1) < (crop or 0)]
        if len(small):
            series = self.store.series[small[0]]
            raise InputError(f"data.crop is {crop}, but series {series.series_uid} has slices of {series.shape[1:]}")
        unpaired = ours[~index.has_low_dose[ours]]
        if with_low_dose and self.simulation is None and len(unpaired):
            raise InputError(
                f"{store}: series {self.store.series[unpaired[0]].series_uid} has no low-dose images and the store "
                "simulates none; prepare it with --low-dose or --simulate-dose"
            )
        different = np.unique(sizes, axis=0).tolist()
        if crop is None and len(different) > 1:
            raise InputError(f"{store}: slices differ in size ({different}): set data.crop")

    @property
    def lesions(self) -> int:
        """Lesions in the split."""
        return self._draws.lesions

    def __len__(self) -> int:
        """Slices in the split: the draws of one epoch."""
        return self._draws.slices

    def __getitem__(self, draw: int) -> Sample:
        """The sample of this draw, which may exceed the length: draws go on over epochs."""
        rng = np.random.default_rng([self.seed, draw])
        lesion = None
        if self._draws.lesions and rng.random() < self.positive_fraction:
            index, z, lesion = self._draws.lesion(rng)
        else:
            index, z = self._draws.slice(rng)
        height, width = self.store.series[index].shape[1:]
        rows, columns = (height, width) if self.crop is None else (self.crop, self.crop)
        y0, x0 = draw_origin(rng, lesion, (height, width), (rows, columns))
        window = (y0, x0, rows, columns)
        flips = (bool(rng.integers(2)), bool(rng.integers(2))) if self.augment else (False, False)
        flip = (slice(None), *(slice(None, None, -1 if flipped else 1) for flipped in flips))
        stored = self.with_low_dose and self.simulation is None
        epoch, sample = divmod(draw, len(self))
        around = self.around
        seen = neighbours(z, self.store.series[index].shape[0], around).tolist()
        pixels, attenuation = self._normal_dose(index, z, seen, window)
        return Sample(
            id=(index, z, y0, x0, *flips),
            normal_dose=pixels[flip],
            low_dose=self.store.read_stack(index, z, around, window, low_dose=True)[flip] if stored else None,
            attenuation=attenuation,
            image_size=(height, width),
            pixel_spacing=self.store.series[index].spacing[2],
            boxes=boxes_in_view(self.store.boxes(index, z), window, flips),
            noise_keys=[(self.seed, epoch, index, one) if around else (self.seed, epoch, sample) for one in seen],
            simulation=self.simulation,
            context=self.context,
        )

    def _normal_dose(
        self, index: int, z: int, seen: Sequence[int], window: tuple[int, int, int, int]
    ) -> tuple[np.ndarray, Tensor | None]:
        """A field of view of slices, and their attenuation if noise is simulated; nothing is decoded twice."""
        if self.simulation is None:
            return self.store.read_stack(index, z, self.around, window), None
        whole: np.ndarray | None = None
        attenuation = []
        for channel, one in enumerate(seen):
            known = self._cache.get((index, one))
            if known is None:
                if whole is None:
                    whole = self.store.read_stack(index, z, self.around)
                hu = torch.from_numpy(whole[channel])[None]
                known = coarse_attenuation(hu, self.store.series[index].spacing[2], self.simulation)[0]
                if known.nbytes <= self._cache.maxsize:
                    self._cache[index, one] = known
            attenuation.append(known)
        y0, x0, rows, columns = window
        if whole is None:
            pixels = self.store.read_stack(index, z, self.around, window)
        else:
            pixels = whole[:, y0 : y0 + rows, x0 : x0 + columns]
        return pixels, torch.stack(attenuation)


def collate(samples: Sequence[Sample]) -> Samples:
    """Put samples together; each pixel is copied once."""
    low_dose = [s.low_dose for s in samples if s.low_dose is not None]
    attenuation: dict[tuple[int, int], list[Tensor]] = {}
    for s in samples:
        if s.attenuation is not None:
            attenuation.setdefault(s.image_size, []).append(s.attenuation)
    return Samples(
        ids=[s.id for s in samples],
        normal_dose=torch.from_numpy(np.stack([s.normal_dose for s in samples])),
        low_dose=torch.from_numpy(np.stack(low_dose)) if low_dose else None,
        attenuation={size: torch.stack(values) for size, values in attenuation.items()},
        image_sizes=[s.image_size for s in samples],
        pixel_spacings=[s.pixel_spacing for s in samples],
        boxes=torch.from_numpy(np.concatenate([s.boxes for s in samples])),
        boxes_per_sample=[len(s.boxes) for s in samples],
        noise_keys=[s.noise_keys for s in samples],
        simulation=samples[0].simulation,
        context=samples[0].context,
    )


def make_batch(samples: Samples, device: torch.device) -> Batch:
    """Samples as a training batch: converted, and noise added where it is simulated, on `device`."""
    normal = samples.normal_dose.to(device, non_blocking=True).float()
    batch: Batch = {
        "normal_dose": middle(normal, samples.context),
        "boxes": list(samples.boxes.to(device, non_blocking=True).split(samples.boxes_per_sample)),
        "ids": samples.ids,
    }
    if samples.simulation is not None:
        batch["low_dose"] = normal + _noise(samples, samples.simulation, device)
    elif samples.low_dose is not None:
        batch["low_dose"] = samples.low_dose.to(device, non_blocking=True).float()
    return batch


def _noise(samples: Samples, simulation: DoseSimulation, device: torch.device) -> Tensor:
    slices, rows, columns = samples.normal_dose.shape[1:]
    noise = torch.empty(samples.normal_dose.shape, device=device)
    for size, attenuation in samples.attenuation.items():
        members = [n for n, of_sample in enumerate(samples.image_sizes) if of_sample == size]
        spacings = torch.tensor([samples.pixel_spacings[n] for n in members]).repeat_interleave(slices)
        maps = variance_maps(attenuation.flatten(0, 1).to(device, non_blocking=True), size, spacings, simulation)
        noise[members] = stack_noise(
            maps.unflatten(0, (-1, slices)),
            size,
            [(*samples.ids[n][2:4], rows, columns) for n in members],
            [[sample_generator(*key) for key in samples.noise_keys[n]] for n in members],
        )
    flips = torch.tensor([sample[4:] for sample in samples.ids]).to(device, non_blocking=True)
    for axis in (2, 3):
        noise = torch.where(flips[:, axis - 2, None, None, None], noise.flip(axis), noise)
    return noise
