"""Scans of one scene: its noise at any dose, realisation by realisation."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lidnet_fast.data.simulation.dose import DoseSimulation, noise_variance_maps, sample_generator, sector_noise

FieldOfView = tuple[int, int, int, int]


class Scan(NamedTuple):
    """Which realisations of which scan a batch of images shows.

    Attributes:
        name: of the scan: dose, object or case, unique in an assessment.
        first: number of the batch's first realisation.
        realisations: how many the scan has.
    """

    name: str
    first: int
    realisations: int


@dataclass(eq=False)
class Scene:
    """A slice of which a field of view is scanned again and again.

    Attributes:
        hu: [H, W] of the whole slice, on which the noise depends.
        spacing: mm between rows and columns.
        field_of_view: first row, first column, height and width, pixels.
        seed: of its noise, two numbers; another pair draws other noise.
    """

    hu: np.ndarray
    spacing: tuple[float, float]
    field_of_view: FieldOfView
    seed: tuple[int, int]
    _maps: dict[DoseSimulation, Tensor] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        y, x, height, width = self.field_of_view
        self.view = self.hu[y : y + height, x : x + width].astype(np.float32)

    def noise(self, simulation: DoseSimulation, realisations: Sequence[int]) -> Tensor:
        """Draw realisations of the noise in the field, [B, h, w] HU, each a pure function of its number."""
        if simulation not in self._maps:
            slices = torch.from_numpy(self.hu.astype(np.float32))[None]
            self._maps = {simulation: noise_variance_maps(slices, float(np.mean(self.spacing)), simulation)}
        maps, count = self._maps[simulation], len(realisations)
        generators = [sample_generator(*self.seed, number) for number in realisations]
        size = (self.hu.shape[0], self.hu.shape[1])
        return sector_noise(maps.expand(count, -1, -1, -1), size, [self.field_of_view] * count, generators)


def batches(count: int, size: int, first: int = 0) -> Iterator[range]:
    """Realisations from `first` on, `count` of them, in batches."""
    for start in range(first, first + count, size):
        yield range(start, min(start + size, first + count))
