"""What a user chooses when denoisers are assessed."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from lidnet_fast.data.simulation.dose import DoseSimulation
from lidnet_fast.errors import InputError
from lidnet_fast.metrics.observers import GABOR_BANDS, needed_realisations

LAGUERRE_GAUSS = 5
ORIENTATIONS = 4

CALIBRATION = 16
"""Realisations of each case's noise from which it is learnt what noise looks like."""

#: Noise of a scan at dose d is drawn as that of a fraction of a scan with this many times the photons: free of noise.
_NOISE_FREE = 1e6


@dataclass(frozen=True, kw_only=True)
class AssessOptions:
    """How denoisers are assessed.

    Attributes:
        doses: of the scans that are denoised, as fractions of `photons`; for a store, of its images' dose.
        realisations: K, noise realisations of each object of the uniform phantom.
        diameters: of signals and lesions, mm.
        contrasts: of the signals in the uniform phantom, HU.
        edges: contrasts of the discs at whose edge resolution is measured, HU.
        internal_noise: of the model observers: variance over that of each channel.
        cases: backgrounds with lesions; 0 leaves them out.
        lesions_per_case: lesions inserted into each.
        lesion_contrasts: of these lesions, HU, negative for darker ones, all in soft tissue; by default, four of 50 to
            850 HU in lung and four of 8 to 100 HU in soft tissue.
        case_realisations: noise realisations of each.
        false_alarm_rate: fraction of images in which noise alone may look like an invention, bright and dark each.
        photons: per ray at dose 1; None is a store's own value, or that of `DoseSimulation`.
        electronic_noise: variance, photons squared; None as above.
        pixel_spacing: of the uniform phantom, mm.
        batch_size: images at a time: bounds memory.
        seed: of phantoms, lesions and noise.

    Raises:
        InputError: a value can't work; the message names it.
    """

    doses: tuple[float, ...] = (0.1, 0.25, 0.5, 1.0)
    realisations: int = 200
    diameters: tuple[float, ...] = (3.0, 5.0, 8.0, 12.0)
    contrasts: tuple[float, ...] = (5.0, 10.0, 20.0, 40.0)
    edges: tuple[float, ...] = (60.0, 150.0, 400.0, -800.0)
    internal_noise: float = 0.0
    cases: int = 16
    lesions_per_case: int = 4
    lesion_contrasts: tuple[float, ...] | None = None
    case_realisations: int = 4
    false_alarm_rate: float = 0.05
    photons: float | None = None
    electronic_noise: float | None = None
    pixel_spacing: float = 0.7
    batch_size: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("doses", "diameters", "contrasts", "edges", "lesion_contrasts"):
            values = getattr(self, name)
            if values is None:
                continue
            if not values or len(set(values)) < len(values) or not all(math.isfinite(value) for value in values):
                raise InputError(f"{name} must be different finite numbers, at least one, got {list(values)}")
        for dose in self.doses:
            if not 0 < dose <= 1:
                raise InputError(f"doses must be in (0, 1], got {dose:g}: no dose above the images' own can be had")
        if min(self.diameters) <= 0:
            raise InputError(f"diameters must be positive, got {min(self.diameters):g}")
        if 0 in (*self.contrasts, *self.edges, *(self.lesion_contrasts or ())):
            raise InputError("contrasts, edges and lesion_contrasts can't be 0: there would be nothing to see")
        if not (math.isfinite(self.pixel_spacing) and self.pixel_spacing > 0):
            raise InputError(f"pixel_spacing must be positive and finite, in mm, got {self.pixel_spacing}")
        channels = len(GABOR_BANDS) * ORIENTATIONS
        if self.realisations < needed_realisations(channels):
            raise InputError(
                f"realisations: {self.realisations} are too few for the {channels} Gabor channels. "
                f"To fix: give at least {needed_realisations(channels)}"
            )
        for name, least in (("cases", 0), ("lesions_per_case", 1), ("case_realisations", 1), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not 0 < self.false_alarm_rate < 1:
            raise InputError(f"false_alarm_rate must be in (0, 1), got {self.false_alarm_rate}")
        if not (math.isfinite(self.internal_noise) and self.internal_noise >= 0):
            raise InputError(f"internal_noise must be finite and not negative, got {self.internal_noise}")
        enough = 2 * CALIBRATION * self.cases * self.false_alarm_rate
        if self.cases and enough < 1:
            raise InputError(
                f"false_alarm_rate {self.false_alarm_rate}: {self.cases} cases are too few. To fix: give more cases, "
                f"or a rate of at least {self.false_alarm_rate / enough:.2g}"
            )
        self.simulation(1.0)

    def simulation(self, dose: float, *, noisy: bool = False) -> DoseSimulation:
        """The noise of a scan at a dose.

        Args:
            dose: in (0, 1] of `photons`; for images free of noise, any positive number.
            noisy: the images have the noise of dose 1 already, so that only what is missing is added.
        """
        photons = DoseSimulation.photons if self.photons is None else self.photons
        electronic = DoseSimulation.electronic_noise if self.electronic_noise is None else self.electronic_noise
        if noisy:
            return DoseSimulation(dose_fraction=dose, photons=photons, electronic_noise=electronic)
        return DoseSimulation(
            dose_fraction=dose / _NOISE_FREE, photons=photons * _NOISE_FREE, electronic_noise=electronic
        )

    def record(self) -> dict[str, Any]:
        """Plain values, for the results."""
        return asdict(self)
