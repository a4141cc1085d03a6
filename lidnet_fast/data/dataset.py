"""Training and evaluation samples from a store: every sample is a pure function of (seed, draw).

A *draw* is the running number of a sample within a phase. Slice, field of view, flips and noise all follow from the
seed and the draw, so a run can be continued at any step, on any number of workers, with bit-identical samples.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lidnet_fast.data.dose import DoseSimulation, noise_variance_maps, sample_generator, sector_noise
from lidnet_fast.data.store import Store
from lidnet_fast.errors import InputError

# A lesion cut by the edge of the field of view is kept when its centre is inside, at least this many pixels from it.
_CENTRE_MARGIN = 1.0
_SMALLEST_SIDE = 2.0


SampleId = tuple[int, int, int, int, bool, bool]
"""Series, slice, first row and column of the field of view, and whether its rows and columns are reversed: what a
normal-dose sample of one dataset depends on."""


@dataclass(frozen=True)
class Sample:
    """One field of view, as it leaves a loader process: compact, converted on the batch."""

    id: SampleId
    normal_dose: Tensor
    """int16 [H,W], HU."""
    low_dose: Tensor | None
    """int16 [H,W], HU; None where the low dose is simulated."""
    noise_maps: Tensor | None
    """[K,h,w] variance maps of the whole slice; None where the low dose is stored."""
    image_size: tuple[int, int]
    origin: tuple[int, int]
    """First row and column of the field of view in its slice."""
    flips: tuple[bool, bool]
    """Whether rows and columns are reversed."""
    boxes: Tensor
    """float32 [L,4] in the (flipped) field of view."""
    noise_key: tuple[int, int, int]
    """(seed, epoch, sample): what the noise is seeded with."""


class Batch(TypedDict):
    """What a phase trains on. Images are HU, float32 [N,1,H,W]."""

    normal_dose: Tensor
    low_dose: Tensor
    boxes: list[Tensor]
    ids: list[SampleId]


class LesionPatches(Dataset[Sample]):
    """Fields of view of one split, balanced over patients and centred near lesions in a given fraction.

    Args:
        store: the prepared store's folder.
        split: "train", "val" or "test".
        crop: side of the field of view in pixels; None for whole slices.
        positive_fraction: fraction of draws centred near a lesion.
        augment: random flips.
        seed: of everything random here.
        cache_mb: bound on the cache of noise variance maps.

    Raises:
        InputError: the split is empty, a slice is smaller than `crop` (or, without one, slices differ in size), or a
            series has no low dose.
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
        cache_mb: int = 512,
    ) -> None:
        self.store = Store(store)
        self.crop = crop
        self.positive_fraction = positive_fraction
        self.augment = augment
        self.seed = seed
        self.simulation = None if self.store.simulation is None else DoseSimulation(**self.store.simulation)
        self._maps: OrderedDict[tuple[int, int], Tensor] = OrderedDict()
        self._maps_bytes = 0
        self._cache_bytes = cache_mb * 2**20

        self._slices = self.store.slices(split)
        if not len(self._slices):
            raise InputError(f"{store}: the {split} split has no slices")
        for index in np.unique(self._slices[:, 0]):
            series = self.store.series[index]
            if crop is not None and min(series.shape[1:]) < crop:
                raise InputError(f"data.crop is {crop}, but series {series.series_id} has slices of {series.shape[1:]}")
            if self.simulation is None and not series.has_low_dose:
                raise InputError(
                    f"{store}: series {series.series_id} has no low-dose images and the store simulates none; "
                    "prepare it with --low-dose or --simulate-dose"
                )
        sizes = {self.store.series[index].shape[1:] for index in np.unique(self._slices[:, 0])}
        if crop is None and len(sizes) > 1:
            raise InputError(f"{store}: slices differ in size ({sorted(sizes)}): set data.crop")
        self._all = self._by_patient(self._slices)
        self._positive = self._by_patient(self.store.slices(split, with_boxes=True))

    def _by_patient(self, slices: np.ndarray) -> list[np.ndarray]:
        patients = np.array([self.store.series[index].patient_id for index in slices[:, 0]])
        return [slices[patients == patient] for patient in np.unique(patients)]

    def __len__(self) -> int:
        """Slices in the split: the draws of one epoch."""
        return len(self._slices)

    def __getitem__(self, draw: int) -> Sample:
        """The sample of this draw, which may exceed the length: draws go on over epochs."""
        rng = np.random.default_rng([self.seed, draw])
        positive = bool(self._positive) and rng.random() < self.positive_fraction
        patients = self._positive if positive else self._all
        candidates = patients[rng.integers(len(patients))]
        index, z = (int(v) for v in candidates[rng.integers(len(candidates))])
        height, width = self.store.series[index].shape[1:]
        boxes = self.store.boxes(index, z)
        rows, columns = (height, width) if self.crop is None else (self.crop, self.crop)
        y0, x0 = self._origin(rng, boxes if positive else boxes[:0], (height, width), (rows, columns))
        window = (y0, x0, rows, columns)
        flips = (bool(rng.integers(2)), bool(rng.integers(2))) if self.augment else (False, False)
        epoch, sample = divmod(draw, len(self))
        return Sample(
            id=(index, z, y0, x0, *flips),
            normal_dose=torch.from_numpy(self.store.read(index, z, window)),
            low_dose=None
            if self.simulation is not None
            else torch.from_numpy(self.store.read(index, z, window, low_dose=True)),
            noise_maps=None if self.simulation is None else self._noise_maps(index, z),
            image_size=(height, width),
            origin=(y0, x0),
            flips=flips,
            boxes=_boxes_in_view(torch.from_numpy(boxes), window, flips),
            noise_key=(self.seed, epoch, sample),
        )

    @staticmethod
    def _origin(
        rng: np.random.Generator, boxes: np.ndarray, image_size: tuple[int, int], size: tuple[int, int]
    ) -> tuple[int, int]:
        room = (image_size[0] - size[0], image_size[1] - size[1])
        if not len(boxes):
            return int(rng.integers(room[0] + 1)), int(rng.integers(room[1] + 1))
        x1, y1, x2, y2 = boxes[rng.integers(len(boxes))]
        # The lesion lies anywhere in the inner 80 % of the field of view: a fixed place would be learnt.
        shift = rng.uniform(-0.4, 0.4, 2)
        y0 = (y1 + y2) / 2 + shift[0] * size[0] - size[0] / 2
        x0 = (x1 + x2) / 2 + shift[1] * size[1] - size[1] / 2
        return int(np.clip(y0, 0, room[0])), int(np.clip(x0, 0, room[1]))

    def _noise_maps(self, index: int, z: int) -> Tensor:
        assert self.simulation is not None
        key = (index, z)
        if key in self._maps:
            self._maps.move_to_end(key)
            return self._maps[key]
        hu = torch.from_numpy(self.store.read(index, z)).float()
        spacing = self.store.series[index].spacing
        maps = noise_variance_maps(hu[None], spacing[2], self.simulation)[0]
        self._maps[key] = maps
        self._maps_bytes += maps.nbytes
        while self._maps_bytes > self._cache_bytes and len(self._maps) > 1:
            self._maps_bytes -= self._maps.popitem(last=False)[1].nbytes
        return maps


def _boxes_in_view(boxes: Tensor, window: tuple[int, int, int, int], flips: tuple[bool, bool]) -> Tensor:
    y0, x0, rows, columns = window
    boxes = boxes - torch.tensor([x0, y0, x0, y0], dtype=boxes.dtype)
    limit = torch.tensor([columns, rows], dtype=boxes.dtype)
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    boxes = boxes[((centres > _CENTRE_MARGIN) & (centres < limit - _CENTRE_MARGIN)).all(1)]
    boxes = torch.cat([boxes[:, :2].clamp_min(0), torch.minimum(boxes[:, 2:], limit)], 1)
    boxes = boxes[(boxes[:, 2:] - boxes[:, :2] > _SMALLEST_SIDE).all(1)]
    if flips[0]:
        boxes = torch.stack([boxes[:, 0], rows - boxes[:, 3], boxes[:, 2], rows - boxes[:, 1]], 1)
    if flips[1]:
        boxes = torch.stack([columns - boxes[:, 2], boxes[:, 1], columns - boxes[:, 0], boxes[:, 3]], 1)
    return boxes


def make_batch(samples: Sequence[Sample], device: torch.device) -> Batch:
    """Samples as a training batch: converted, noise added where it is simulated, and flipped, on `device`."""
    normal = torch.stack([s.normal_dose for s in samples]).to(device).float()
    if samples[0].noise_maps is not None:
        rows, columns = normal.shape[1:]
        noise = sector_noise(
            torch.stack([s.noise_maps for s in samples if s.noise_maps is not None]).to(device),
            samples[0].image_size,
            [(*s.origin, rows, columns) for s in samples],
            [sample_generator(*s.noise_key) for s in samples],
        )
        low = normal + noise
    else:
        low = torch.stack([s.low_dose for s in samples if s.low_dose is not None]).to(device).float()
    return {
        "normal_dose": _flip(normal, samples)[:, None],
        "low_dose": _flip(low, samples)[:, None],
        "boxes": [s.boxes.to(device) for s in samples],
        "ids": [s.id for s in samples],
    }


def _flip(images: Tensor, samples: Sequence[Sample]) -> Tensor:
    axes = ([axis for axis, flipped in enumerate(s.flips) if flipped] for s in samples)
    return torch.stack([image.flip(a) if a else image for image, a in zip(images, axes, strict=True)])
