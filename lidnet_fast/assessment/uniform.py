"""Noise, resolution, detectability and bias of arms in the uniform phantom."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy import stats

from lidnet_fast.assessment.arms import Arm
from lidnet_fast.assessment.options import LAGUERRE_GAUSS, ORIENTATIONS, AssessOptions
from lidnet_fast.assessment.phantom import (
    DISC_CELL,
    FIELD,
    SIGNAL_CELL,
    Placed,
    core,
    disc_radius,
    place_discs,
    place_signals,
    scene,
)
from lidnet_fast.assessment.scanner import Scan, batches
from lidnet_fast.metrics.noise import EnsembleNoise
from lidnet_fast.metrics.observers import (
    channel_responses,
    gabor_channels,
    hotelling,
    laguerre_gauss_channels,
    with_internal_noise,
)
from lidnet_fast.metrics.resolution import (
    MIN_CONTRAST_TO_NOISE,
    EdgeProfiles,
    edge_profiles,
    frequency_interval,
    task_transfer_function,
)

OBSERVERS = {
    "npw": "non-prewhitening",
    "laguerre_gauss": "Hotelling, Laguerre-Gauss channels",
    "gabor": "Hotelling, Gabor channels",
}

_NOISE_MARGIN = 32
"""Pixels at the field's edge that the noise power spectrum leaves out: networks pad there."""

Results = dict[str, Any]


class UniformPhantom:
    """Measures arms side by side, on the same noise, dose by dose.

    Args:
        options: of the assessment.

    Raises:
        InputError: a signal doesn't fit its field.
    """

    def __init__(self, options: AssessOptions) -> None:
        self.options = options
        self.signals, self.discs = place_signals(options), place_discs(options)
        templates = [_templates(signal, options) for signal in self.signals]
        self.kinds, self._channels = templates[0][0], [channels for _, channels in templates]
        members: list[Sequence[Placed]] = [[]]
        self._names = ["water"]
        for kind, placed in (("signals", self.signals), ("discs", self.discs)):
            for number in range(placed[-1].object + 1):
                members.append([one for one in placed if one.object == number])
                self._names.append(f"{kind}{number + 1}")
        self._members = members

    @property
    def batches(self) -> int:
        """How many batches `measure` takes."""
        return len(self._members) * len(list(batches(self.options.realisations, self.options.batch_size)))

    def measure(self, arms: Sequence[Arm], dose: float, stream: int, results: dict[str, Results]) -> Iterator[None]:
        """Scan and restore all objects at a dose; yields after every batch.

        Args:
            arms: what restores.
            dose: of the scans.
            stream: number of the dose, for its noise.
            results: arm -> results, filled at the end.
        """
        options, simulation = self.options, self.options.simulation(dose)
        measured = {arm.name: _Measured(self, options) for arm in arms}
        for number, (members, name) in enumerate(zip(self._members, self._names, strict=True)):
            scanned = scene(members, options, 1000 * (stream + 1) + number)
            for realisations in batches(options.realisations, options.batch_size):
                images = scanned.noise(simulation, realisations).add_(torch.from_numpy(scanned.view))
                scan = Scan(f"dose{dose:g}_{name}", realisations[0], options.realisations)
                for arm in arms:
                    measured[arm.name].update(members, arm(images, scan).numpy())
                yield
        for name, one in measured.items():
            results[name] = one.results()

    def responses(self, signal: int, images: np.ndarray) -> np.ndarray:
        """Responses [B, p] of a signal's channels to images [B, H, W]."""
        rows, columns = self.signals[signal].cell
        return channel_responses(images[:, rows, columns], self._channels[signal])


class _Measured:
    """What one arm shows at one dose. Images are reduced as they come: a few numbers are kept of each."""

    def __init__(self, phantom: UniformPhantom, options: AssessOptions) -> None:
        self.phantom, self.options = phantom, options
        self.noise = EnsembleNoise(options.pixel_spacing)
        self.absent: list[list[np.ndarray]] = [[] for _ in phantom.signals]
        self.present: list[list[np.ndarray]] = [[] for _ in phantom.signals]
        self.profiles: list[list[EdgeProfiles]] = [[] for _ in phantom.discs]

    def update(self, members: Sequence[Placed], images: np.ndarray) -> None:
        """Add restored images [B, H, W] of the object that shows these signals or discs."""
        phantom = self.phantom
        if not members:
            inner = slice(_NOISE_MARGIN, FIELD - _NOISE_MARGIN)
            self.noise.update(images[:, inner, inner])
            for number, kept in enumerate(self.absent):
                kept.append(phantom.responses(number, images))
        for number, (signal, kept) in enumerate(zip(phantom.signals, self.present, strict=True)):
            if signal in members:
                kept.append(phantom.responses(number, images))
        middle = (DISC_CELL - 1) / 2
        for disc, profiles in zip(phantom.discs, self.profiles, strict=True):
            if disc in members:
                radius, spacing = disc_radius(self.options), self.options.pixel_spacing
                profiles.append(edge_profiles(images[:, *disc.cell], (middle, middle), radius, spacing))

    def results(self) -> Results:
        """All figures, JSON-able."""
        return {
            "noise": self._noise(),
            "resolution": [self._resolution(n) for n in range(len(self.phantom.discs))],
            "detectability": [row for n in range(len(self.phantom.signals)) for row in self._detectability(n)],
            "bias": [self._bias(n) for n in range(len(self.phantom.signals))],
        }

    def _noise(self) -> Results:
        spectrum = self.noise.spectrum()
        frequency, power = spectrum.radial()
        return {
            "magnitude_hu": [spectrum.magnitude, *spectrum.magnitude_interval()],
            "mean_frequency": spectrum.mean_frequency,
            "peak_frequency": spectrum.peak_frequency,
            "frequency": frequency.tolist(),
            "power": power.tolist(),
            "power_2d": spectrum.power.astype(np.float32).round(3).tolist(),
        }

    def _resolution(self, number: int) -> Results:
        parts = self.profiles[number]
        profiles = EdgeProfiles(parts[0].distance, np.concatenate([part.values for part in parts]))
        function = task_transfer_function(profiles, self.options.pixel_spacing)
        enough = profiles.contrast_to_noise >= MIN_CONTRAST_TO_NOISE
        levels: Results = {
            name: [function.frequency_at(level), *frequency_interval(profiles, level)] if enough else None
            for name, level in (("f50", 0.5), ("f10", 0.1))
        }
        return {
            "contrast_hu": self.phantom.discs[number].lesion.contrast,
            "measured_contrast_hu": profiles.contrast,
            "contrast_to_noise": profiles.contrast_to_noise,
            **levels,
            "frequency": function.frequency.tolist(),
            "ttf": function.value.tolist(),
        }

    def _detectability(self, number: int) -> Iterator[Results]:
        present, absent = (np.concatenate(kept[number]) for kept in (self.present, self.absent))
        lesion = self.phantom.signals[number].lesion
        for observer, columns in self.phantom.kinds.items():
            if observer not in OBSERVERS:
                continue
            with_signal, without = present[:, columns], absent[:, columns]
            if self.options.internal_noise:
                rng = np.random.default_rng([self.options.seed, number])
                with_signal, without = (
                    with_internal_noise(one, self.options.internal_noise, rng) for one in (with_signal, without)
                )
            found = hotelling(with_signal, without)
            yield {
                "diameter_mm": lesion.diameter,
                "contrast_hu": lesion.contrast,
                "observer": observer,
                "dprime": [found.dprime, found.low, found.high],
                "auc": list(found.auc),
            }

    def _bias(self, number: int) -> Results:
        signal = self.phantom.signals[number]
        measured = np.concatenate(self.present[number])[:, self.phantom.kinds["core"]][:, 0]
        truth = float((core(signal, self.options.pixel_spacing) * signal.signal).sum())
        error = measured - truth
        spread = stats.sem(error) * stats.t.ppf(0.975, len(error) - 1)
        mean = float(error.mean())
        return {
            "diameter_mm": signal.lesion.diameter,
            "contrast_hu": signal.lesion.contrast,
            "truth_hu": truth,
            "bias_hu": [mean, mean - float(spread), mean + float(spread)],
        }


def _templates(signal: Placed, options: AssessOptions) -> tuple[Mapping[str, slice], np.ndarray]:
    """A signal's channels [p, h, w], and which of them are whose: of the observers, and "core"."""
    size = (SIGNAL_CELL, SIGNAL_CELL)
    width = max(1.5 * signal.lesion.diameter / options.pixel_spacing, 6.0)
    parts = {
        "npw": signal.signal[None],
        "laguerre_gauss": laguerre_gauss_channels(size, width, LAGUERRE_GAUSS),
        "gabor": gabor_channels(size, orientations=ORIENTATIONS),
        "core": core(signal, options.pixel_spacing)[None],
    }
    ends = np.cumsum([len(part) for part in parts.values()])
    kinds = {name: slice(end - len(part), end) for (name, part), end in zip(parts.items(), ends.tolist(), strict=True)}
    return kinds, np.concatenate(list(parts.values()))
