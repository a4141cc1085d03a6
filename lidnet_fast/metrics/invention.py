"""Structure that a denoiser makes up: blobs in a restored image that neither the truth nor its noise explains.

Images are filtered by differences of Gaussians of the sizes of lesions. Where the filtered image exceeds all that the
filtered truth shows within a radius, the excess is divided by the standard deviation that the noise has there *before*
anything is restored. The radius keeps a vessel that is blurred or moved a little from being an invention. What counts
is an excess that the same noise, unrestored, reaches in a stated fraction of images only.
"""

from collections.abc import Sequence

import numpy as np
import scipy.fft
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

from lidnet_fast.errors import InputError
from lidnet_fast.metrics.noise import Spacing, checked_spacing

Floats = NDArray[np.float32]

_SURROUND = 2.5
"""Width of the surround over that of the blob."""

_SMOOTH = 12.0
"""Pixels over which the noise's deviation is smoothed: it is estimated from few realisations."""


def blobs(images: ArrayLike, diameters: Sequence[float], pixel_spacing: Spacing) -> Floats:
    """Images filtered for blobs: the local mean within about each diameter, minus that of the surroundings.

    Args:
        images: [B, H, W], HU; they are continued periodically.
        diameters: of the blobs [S], mm.
        pixel_spacing: mm.

    Returns:
        [S, B, H, W], HU.
    """
    stack = np.asarray(images, np.float32)
    dy, dx = checked_spacing(pixel_spacing)
    height, width = stack.shape[1:]
    square = (scipy.fft.fftfreq(height, dy)[:, None] ** 2 + scipy.fft.rfftfreq(width, dx) ** 2).astype(np.float32)
    spectrum = scipy.fft.rfft2(stack)
    filtered = np.empty((len(diameters), *stack.shape), np.float32)
    for target, diameter in zip(filtered, diameters, strict=True):
        # A disc of diameter d has the standard deviation d / 4 along each axis.
        exponent = -2 * (np.pi * diameter / 4) ** 2 * square
        target[:] = scipy.fft.irfft2(spectrum * (np.exp(exponent) - np.exp(_SURROUND**2 * exponent)), s=(height, width))
    return filtered


class NoiseFloor:
    """What the noise of one scene looks like through the filter of `blobs`, and what lies above it.

    Args:
        truth: [H, W], the scene without noise, HU.
        noise: [M, H, W], realisations of the noise before anything is restored, HU; at least 4.
        diameters: of the blobs, mm.
        pixel_spacing: mm.

    Attributes:
        peaks: [2 M], the greatest excess of each realisation, bright and dark, in standard deviations.

    Raises:
        InputError: too few realisations, or no noise.
    """

    def __init__(self, truth: ArrayLike, noise: ArrayLike, diameters: Sequence[float], pixel_spacing: Spacing) -> None:
        realisations, scene = np.asarray(noise, np.float32), np.asarray(truth, np.float32)
        if len(realisations) < 4:
            raise InputError(f"realisations of the noise must be at least 4, got {len(realisations)}")
        if not realisations.any():
            raise InputError("the images have no noise. To fix: leave out the dose of the images themselves")
        self._diameters, self._spacing = tuple(diameters), checked_spacing(pixel_spacing)
        (shown,) = blobs(scene[None], self._diameters, self._spacing).swapaxes(0, 1)
        sizes = [[2 * round(d / 2 / side) + 3 for side in self._spacing] for d in self._diameters]
        self._high = np.stack([ndimage.maximum_filter(one, size) for one, size in zip(shown, sizes, strict=True)])
        self._low = np.stack([ndimage.minimum_filter(one, size) for one, size in zip(shown, sizes, strict=True)])
        variance = np.square(blobs(realisations, self._diameters, self._spacing)).mean(1)
        self._deviation = np.sqrt(ndimage.gaussian_filter(variance, (0, _SMOOTH, _SMOOTH)))
        self.peaks = np.concatenate([excess.max((1, 2)) for excess in self.excess(scene + realisations)])

    def excess(self, restored: ArrayLike) -> tuple[Floats, Floats]:
        """How far bright and dark blobs exceed the truth's, in standard deviations of the noise.

        Args:
            restored: [B, H, W], HU.

        Returns:
            Two arrays [B, H, W], each the greatest over all diameters.
        """
        filtered = blobs(restored, self._diameters, self._spacing)
        deviation = self._deviation[:, None]
        bright = ((filtered - self._high[:, None]) / deviation).max(0)
        dark = ((self._low[:, None] - filtered) / deviation).max(0)
        return bright, dark


def threshold(peaks: ArrayLike, false_alarm_rate: float) -> float:
    """The excess that noise alone reaches at a given rate, from calibration on noise that nothing restored.

    Args:
        peaks: of one or several `NoiseFloor`s of one dose, in standard deviations.
        false_alarm_rate: per image, between 0 and 1; of bright and of dark blobs each.

    Raises:
        InputError: there are too few realisations for the rate.
    """
    values = np.asarray(peaks, np.float64)
    if len(values) * false_alarm_rate < 1:
        raise InputError(
            f"false_alarm_rate {false_alarm_rate}: {len(values)} realisations of the noise are too few. "
            f"To fix: give more cases, or a rate of at least {1 / len(values):.2g}"
        )
    return float(np.quantile(values, 1 - false_alarm_rate, method="higher"))
