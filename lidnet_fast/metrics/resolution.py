"""The resolution of a task: the transfer function of a disc's edge, at the disc's own contrast and noise.

The task transfer function (TTF) of AAPM Task Group 233 by the circular edge (Richard et al., "Towards task-based
assessment of CT performance", Med. Phys. 39(7), 2012): pixels by their distance from a disc's edge give the edge spread
function, its derivative the line spread function, and that one's Fourier transform, 1 at frequency zero, the TTF. A
linear system has one; a network has another for every contrast and dose.
"""

import math
import warnings
from dataclasses import dataclass

import numpy as np
import scipy.fft
from numpy.typing import ArrayLike, NDArray
from scipy import signal, stats

from lidnet_fast.errors import InputError
from lidnet_fast.metrics.noise import Spacing, checked_spacing

Floats = NDArray[np.float64]

MIN_CONTRAST_TO_NOISE = 15.0
"""Of a disc in the mean image, below which the noise makes a TTF unreliable (TG-233)."""

_PADDED = 1024


@dataclass(frozen=True, eq=False)
class EdgeProfiles:
    """Edge spread functions, one per realisation.

    Attributes:
        distance: [n], mm from the disc's edge, outwards; evenly spaced.
        values: [K, n], HU.
    """

    distance: Floats
    values: Floats

    @property
    def contrast(self) -> float:
        """Mean inside minus mean outside, HU, each over the outermost quarter of the profile."""
        inside, outside = self._ends()
        return float(inside.mean() - outside.mean())

    @property
    def contrast_to_noise(self) -> float:
        """Size of the contrast over the standard deviation of a point of the mean profile."""
        if len(self.values) < 2:
            return math.nan
        deviation = math.sqrt(float(self.values.var(0, ddof=1).mean()) / len(self.values))
        return abs(self.contrast) / deviation if deviation else math.inf

    def _ends(self) -> tuple[Floats, Floats]:
        quarter = max(1, len(self.distance) // 4)
        return self.values[:, :quarter], self.values[:, -quarter:]


@dataclass(frozen=True, eq=False)
class TransferFunction:
    """A task transfer function.

    Attributes:
        frequency: [m], cycles per mm, from 0 to the Nyquist frequency of the pixels.
        value: [m], 1 at frequency zero.
    """

    frequency: Floats
    value: Floats

    def frequency_at(self, level: float) -> float:
        """The lowest frequency at which the value falls to `level`, cycles per mm; NaN where it never does."""
        return float(_crossing(self.frequency, self.value[None], level)[0])


def edge_profiles(
    images: ArrayLike,
    centre: tuple[float, float],
    radius: float,
    pixel_spacing: Spacing,
    reach: float | None = None,
    step: float | None = None,
) -> EdgeProfiles:
    """The edge spread function of a disc, in each of several realisations.

    Args:
        images: [K, H, W], HU.
        centre: of the disc, (row, column) in pixels, 0 at the centre of the first pixel.
        radius: of the disc, mm. The blur should be small against it, since the edge is taken as straight.
        pixel_spacing: mm.
        reach: how far the profile goes to both sides of the edge, mm; by default as far as 80 % of the radius.
        step: of the profile, mm; by default a quarter of a pixel.

    Raises:
        InputError: the disc with its surroundings isn't within the images, or the spacing can't be.
        ValueError: shapes or numbers that can't be, or too fine a step.
    """
    stack = np.asarray(images, np.float64)
    if stack.ndim != 3:
        raise ValueError(f"images must be [K, H, W], got shape {stack.shape}")
    dy, dx = checked_spacing(pixel_spacing)
    reach = 0.8 * radius if reach is None else reach
    step = min(dy, dx) / 4 if step is None else step
    if not (0 < reach <= radius and 0 < step < reach):
        raise ValueError(f"0 < step < reach <= radius is needed, got step {step}, reach {reach}, radius {radius} mm")
    height, width = stack.shape[1:]
    y, x = (np.arange(height) - centre[0]) * dy, (np.arange(width) - centre[1]) * dx
    if min(-y[0], y[-1], -x[0], x[-1]) < radius + reach:
        raise InputError(
            f"a disc of {radius:g} mm radius at {centre} with {reach:g} mm around it doesn't fit "
            f"{height}x{width} pixels of {dy:g}x{dx:g} mm. To fix: make the disc smaller or the field larger"
        )
    bins = 2 * round(reach / step)
    place = np.floor((np.hypot(y[:, None], x) - radius) / step).astype(int) + bins // 2
    inside = (place >= 0) & (place < bins)
    count = np.bincount(place[inside], minlength=bins)
    filled = np.flatnonzero(count)
    if len(filled) < bins / 2:
        raise ValueError(f"step {step} mm leaves most of the profile without pixels. To fix: give a coarser step")
    order = np.argsort(place[inside], kind="stable")
    starts = np.concatenate([[0], np.cumsum(count[filled])[:-1]])
    means = np.add.reduceat(stack[:, inside][:, order], starts, axis=1) / count[filled]
    # Where the grid has no pixel at some distance, the profile is linear between its neighbours.
    values = np.stack([np.interp(np.arange(bins), filled, row) for row in means])
    return EdgeProfiles(np.linspace(-0.5, 0.5, bins) * (bins - 1) * step, values)


def task_transfer_function(profiles: EdgeProfiles, pixel_spacing: Spacing) -> TransferFunction:
    """The TTF of the mean profile.

    Args:
        profiles: of one disc.
        pixel_spacing: mm, of the images that they are from; the TTF ends at its Nyquist frequency.
    """
    frequency, values = _transfer(profiles.distance, profiles.values.mean(0)[None])
    inside = frequency <= 0.5 / max(checked_spacing(pixel_spacing)) + 1e-9
    return TransferFunction(frequency[inside], values[0, inside])


def frequency_interval(
    profiles: EdgeProfiles, level: float, confidence: float = 0.95, resamples: int = 400, seed: int = 0
) -> tuple[float, float]:
    """Interval of `TransferFunction.frequency_at`, by the percentile bootstrap over realisations (scipy).

    Args:
        profiles: of one disc, at least two.
        level: of the TTF.
        confidence: of the interval.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Returns:
        Cycles per mm; NaN where some resamples don't reach the level.
    """

    def crossing(chosen: NDArray[np.int64], axis: int) -> Floats:
        mean = profiles.values[np.moveaxis(chosen, axis, -1)].mean(-2)
        frequency, values = _transfer(profiles.distance, np.atleast_2d(mean))
        return _crossing(frequency, values, level).reshape(mean.shape[:-1])

    with warnings.catch_warnings():
        # Where some resamples don't reach the level, the interval is NaN, and scipy warns of it.
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        low, high = stats.bootstrap(
            (np.arange(len(profiles.values)),),
            crossing,
            confidence_level=confidence,
            n_resamples=resamples,
            batch=50,
            method="percentile",
            rng=np.random.default_rng(seed),
        ).confidence_interval
    return float(low), float(high)


def _transfer(distance: Floats, profiles: Floats) -> tuple[Floats, Floats]:
    """Frequencies [m] and the transfer functions [N, m] of edge spread functions [N, n]."""
    step = distance[1] - distance[0]
    lines = np.diff(profiles, axis=1) * signal.windows.tukey(len(distance) - 1, 0.5)
    length = max(_PADDED, 2 * len(distance))
    frequency = scipy.fft.rfftfreq(length, step)
    # A bin's mean and the difference of two bins each are a box of one step.
    values = np.abs(scipy.fft.rfft(lines, length)) / np.sinc(frequency * step) ** 2
    with np.errstate(invalid="ignore", divide="ignore"):
        return frequency, values / values[:, :1]


def _crossing(frequency: Floats, values: Floats, level: float) -> Floats:
    """Where each of several functions [N, m] first falls to a level, between two frequencies; NaN where none does."""
    below = values <= level
    last = below.argmax(1).clip(1)
    high, low = np.take_along_axis(values, np.stack([last - 1, last], 1), 1).T
    with np.errstate(invalid="ignore", divide="ignore"):
        share = (high - level) / (high - low)
    found = frequency[last - 1] + share * (frequency[last] - frequency[last - 1])
    return np.where(below.any(1) & ~below[:, 0], found, np.nan)
