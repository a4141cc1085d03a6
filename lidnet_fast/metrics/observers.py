"""Model observers: how well a signal that is known exactly, at a place that is known, is told from its absence.

An observer is a set of channels; an image's responses are its inner products with them. The Hotelling observer weighs
responses by the inverse of their covariance (channelised: Barrett and Myers, "Foundations of Image Science", 2004;
Laguerre-Gauss channels: Gallas and Barrett, J. Opt. Soc. Am. A 20(9), 2003; Gabor channels: Wunderlich et al., IEEE
Trans. Med. Imaging 34(2), 2015). The non-prewhitening observer has one channel, the signal itself. A detectability d'
is the distance of the mean responses in standard deviations; for Gaussian responses the area under the ROC curve is
Phi(d' / sqrt 2).

**Finite samples.** Estimated from n = K1 + K0 - 2 degrees of freedom, the squared distance of p channels is biased
upwards: E[D^2] = n / (n - p - 1) (d'^2 + p (1/K1 + 1/K0)). `hotelling` corrects this, and its interval is exact for
Gaussian responses: D^2 follows a noncentral F distribution (Wunderlich et al. 2015), which scipy inverts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, special, stats

from lidnet_fast.errors import InputError

Floats = NDArray[np.float64]

GABOR_BANDS: tuple[tuple[float, float], ...] = ((1 / 64, 1 / 32), (1 / 32, 1 / 16), (1 / 16, 1 / 8), (1 / 8, 1 / 4))
"""Octaves of frequency, cycles per pixel."""


@dataclass(frozen=True)
class Detectability:
    """A detectability index with its interval.

    Attributes:
        dprime: corrected for finite samples, at least 0.
        low: lower end of the interval.
        high: upper end.
    """

    dprime: float
    low: float
    high: float

    @property
    def auc(self) -> tuple[float, float, float]:
        """Area under the ROC curve of Gaussian responses: (value, low, high)."""
        value, low, high = special.ndtr(np.array([self.dprime, self.low, self.high]) / math.sqrt(2)).tolist()
        return value, low, high


def laguerre_gauss_channels(size: tuple[int, int], width: float, count: int = 5) -> Floats:
    """Laguerre-Gauss channels, orthonormal on a plane, for signals without direction.

    Args:
        size: (H, W) in pixels; the signal is in the centre, (H - 1) / 2, (W - 1) / 2.
        width: of the Gaussian exp(-pi r^2 / width^2), pixels; near the signal's diameter.
        count: how many.

    Returns:
        [count, H, W].
    """
    y, x = _centred(size)
    argument = 2 * math.pi * (y[:, None] ** 2 + x**2) / width**2
    polynomials = special.eval_laguerre(np.arange(count)[:, None, None], argument)
    return math.sqrt(2) / width * np.exp(-argument / 2) * polynomials


def gabor_channels(
    size: tuple[int, int],
    bands: Sequence[tuple[float, float]] = GABOR_BANDS,
    orientations: int = 4,
    phases: Sequence[float] = (0.0,),
) -> Floats:
    """Gabor channels: a Gaussian of half the band's width, times a cosine of its middle frequency.

    Args:
        size: (H, W) in pixels; the signal is in the centre.
        bands: lowest and highest frequency of each octave, cycles per pixel.
        orientations: directions in half a turn.
        phases: of the cosines, radians.

    Returns:
        [bands x orientations x phases, H, W].
    """
    y, x = (axis.reshape(shape) for axis, shape in zip(_centred(size), ((-1, 1), (1, -1)), strict=True))
    channels = []
    for low, high in bands:
        # Full widths at half maximum of a Gaussian and its transform multiply to 4 ln 2 / pi.
        extent = 4 * math.log(2) / (math.pi * (high - low))
        envelope = np.exp(-4 * math.log(2) * (y**2 + x**2) / extent**2)
        for angle in np.arange(orientations) * math.pi / orientations:
            along = x * math.cos(angle) + y * math.sin(angle)
            channels += [envelope * np.cos(math.pi * (low + high) * along + phase) for phase in phases]
    return np.stack(channels)


def channel_responses(images: ArrayLike, channels: ArrayLike) -> Floats:
    """Inner products of images with channels.

    Args:
        images: [K, H, W], HU.
        channels: [p, H, W].

    Returns:
        [K, p].

    Raises:
        InputError: channels and images differ in size: a signal larger than its field.
    """
    stack, templates = np.asarray(images, np.float64), np.asarray(channels, np.float64)
    if stack.ndim != 3 or templates.ndim != 3 or stack.shape[1:] != templates.shape[1:]:
        raise InputError(f"images [K, H, W] and channels [p, H, W] don't fit: {stack.shape} and {templates.shape}")
    return stack.reshape(len(stack), -1) @ templates.reshape(len(templates), -1).T


def with_internal_noise(responses: ArrayLike, fraction: float, rng: np.random.Generator) -> Floats:
    """Responses [K, p] of an observer that is itself noisy, as people are.

    Args:
        responses: of one class of images.
        fraction: variance of the internal noise over that of each channel's responses.
        rng: source of the noise.
    """
    values = np.asarray(responses, np.float64)
    deviation = np.sqrt(fraction * values.var(0, ddof=1))
    return values + deviation * rng.standard_normal(values.shape)


def needed_realisations(channels: int) -> int:
    """The fewest images of each class that `hotelling` takes for so many channels: 2 K - 2 > channels + 1."""
    return channels // 2 + 2


def hotelling(present: ArrayLike, absent: ArrayLike, confidence: float = 0.95) -> Detectability:
    """Detectability of the Hotelling observer from responses, corrected for finite samples, with its exact interval.

    Args:
        present: [K1, p] responses to images with the signal.
        absent: [K0, p] responses to images without; independent of `present`.
        confidence: of the interval.

    Returns:
        d' with its interval; exact for Gaussian responses of one covariance in both classes.

    Raises:
        InputError: too few images for the channels.
        ValueError: shapes that don't fit.
    """
    with_signal, without = np.asarray(present, np.float64), np.asarray(absent, np.float64)
    if with_signal.ndim != 2 or without.ndim != 2 or with_signal.shape[1] != without.shape[1]:
        raise ValueError(f"responses must be [K1, p] and [K0, p], got {with_signal.shape} and {without.shape}")
    (k1, p), k0 = with_signal.shape, len(without)
    n = k1 + k0 - 2
    if n - p - 1 <= 0 or min(k1, k0) < 2:
        raise InputError(
            f"realisations: {k1} with and {k0} without the signal are too few for {p} channels. "
            f"To fix: give at least {needed_realisations(p)} of each, or fewer channels"
        )
    shift = with_signal.mean(0) - without.mean(0)
    scatter = sum(((one - one.mean(0)).T @ (one - one.mean(0)) for one in (with_signal, without)), np.zeros((p, p)))
    distance = float(shift @ np.linalg.lstsq(scatter / n, shift, rcond=None)[0])
    inverse = 1 / k1 + 1 / k0
    squared = (n - p - 1) / n * distance - p * inverse
    statistic = distance / inverse * (n - p + 1) / (p * n)
    low, high = (
        math.sqrt(_noncentrality(statistic, p, n - p + 1, tail) * inverse)
        for tail in ((1 + confidence) / 2, (1 - confidence) / 2)
    )
    return Detectability(math.sqrt(max(squared, 0.0)), low, high)


def non_prewhitening(
    present: ArrayLike, absent: ArrayLike, template: ArrayLike, confidence: float = 0.95
) -> Detectability:
    """Detectability of the observer that matches images with the signal and doesn't know the noise's correlation.

    Args:
        present: [K1, H, W] images with the signal.
        absent: [K0, H, W] images without.
        template: [H, W], the signal. A mean difference of these same images would bias d' upwards.
        confidence: of the interval.
    """
    channel = np.asarray(template, np.float64)[None]
    return hotelling(channel_responses(present, channel), channel_responses(absent, channel), confidence)


def equal_detectability_dose(doses: ArrayLike, dprimes: ArrayLike, dprime: float) -> float:
    """The dose at which images that nothing denoised have a given detectability.

    Args:
        doses: [n] of those images, any unit, positive.
        dprimes: their detectability [n]. It may only rise with dose: noise of the estimates is taken out by isotonic
            regression (scipy); between doses it is a power of the dose.
        dprime: the detectability that is looked for.

    Returns:
        The dose; NaN where the doses given don't reach `dprime`, on either side.
    """
    x, y = np.asarray(doses, np.float64), np.asarray(dprimes, np.float64)
    order = np.argsort(x)
    x, y = x[order], optimize.isotonic_regression(y[order]).x
    seen = y > 0
    if not seen.any() or not y[seen].min() <= dprime <= y[seen].max():
        return math.nan
    levels, first = np.unique(y[seen], return_index=True)
    return float(np.exp(np.interp(math.log(dprime), np.log(levels), np.log(x[seen][first]))))


def _noncentrality(statistic: float, p: int, freedom: int, tail: float) -> float:
    """The noncentrality at which a noncentral F variable is below `statistic` with probability `tail`; at least 0."""

    def excess(noncentrality: float) -> float:
        return float(stats.ncf.cdf(statistic, p, freedom, noncentrality)) - tail

    if not statistic > 0 or excess(0.0) <= 0:
        return 0.0
    high = max(1.0, 2 * p * statistic)
    while excess(high) > 0:
        high *= 2
    return float(optimize.brentq(excess, 0.0, high))


def _centred(size: tuple[int, int]) -> tuple[Floats, Floats]:
    """Rows and columns of pixel centres, 0 in the middle."""
    height, width = size
    return np.linspace(-0.5, 0.5, height) * (height - 1), np.linspace(-0.5, 0.5, width) * (width - 1)
