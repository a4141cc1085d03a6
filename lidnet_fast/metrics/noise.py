"""The noise of images: its magnitude, and its power spectrum in two dimensions and by radius.

Definitions and normalisation are those of AAPM Task Group 233 (Samei et al., "Performance evaluation of computed
tomography systems", Med. Phys. 46(11), 2019) and ICRU Report 87 (2012): for an image of H x W pixels dy x dx apart,

    NPS(fy, fx) = dy dx / (H W) * E |DFT(image - its mean over realisations)|^2,    HU^2 mm^2,

so that the integral over frequency is the variance. The mean over realisations of one scene is subtracted, and not the
mean over a region: structure cancels whatever it is, which makes the measure valid for denoisers that adapt to it.
"""

import math
from dataclasses import dataclass

import numpy as np
import scipy.fft
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from lidnet_fast.errors import InputError

Floats = NDArray[np.float64]
Spacing = float | tuple[float, float]
"""Distance of pixels in mm: one number, or (rows, columns)."""


class RunningMoments:
    """Mean and sum of squared deviations of arrays that come in batches (Chan, Golub and LeVeque 1983).

    Attributes:
        count: arrays so far.
        mean: their mean, real or complex.
        scatter: sum of |array - mean|^2, element by element.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean: NDArray = np.zeros(())
        self.scatter: NDArray = np.zeros(())

    def update(self, batch: ArrayLike) -> None:
        """Add arrays [B, ...]."""
        values = np.asarray(batch)
        if not len(values):
            return
        mean = values.mean(0, dtype=np.result_type(values.dtype, np.float64))
        scatter = (np.abs(values - mean) ** 2).sum(0)
        shift, total = mean - self.mean, self.count + len(values)
        self.scatter = self.scatter + scatter + np.abs(shift) ** 2 * (self.count * len(values) / total)
        self.mean = self.mean + shift * (len(values) / total)
        self.count = total

    @property
    def variance(self) -> Floats:
        """The unbiased variance, element by element."""
        return self.scatter / (self.count - 1)


@dataclass(frozen=True, eq=False)
class NoiseSpectrum:
    """A noise power spectrum.

    Attributes:
        power: [H, W], HU^2 mm^2, zero frequency in the centre.
        frequency_y: [H], cycles per mm, increasing.
        frequency_x: [W], likewise.
        realisations: how many it was estimated from.
    """

    power: Floats
    frequency_y: Floats
    frequency_x: Floats
    realisations: int

    @property
    def magnitude(self) -> float:
        """The standard deviation of a pixel, HU: the root of the integral over frequency."""
        return math.sqrt(self.power.sum() * self._cell)

    def magnitude_interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Interval of `magnitude` for Gaussian noise, HU.

        The estimate of every frequency follows chi-square; that of their sum nearly does, with as many degrees of
        freedom as give it the variance that it has (Satterthwaite 1946).
        """
        freedom = (self.realisations - 1) * self.power.sum() ** 2 / np.square(self.power).sum()
        ends = stats.chi2.ppf([(1 + confidence) / 2, (1 - confidence) / 2], freedom)
        low, high = self.magnitude * np.sqrt(freedom / ends)
        return float(low), float(high)

    def radial(self) -> tuple[Floats, Floats]:
        """Frequency [n] in cycles per mm and mean power [n] of rings up to the lower Nyquist frequency.

        Rings are as wide as the coarser step of frequency, the first is centred on one step; frequency zero is left
        out.
        """
        step = max(self.frequency_y[1] - self.frequency_y[0], self.frequency_x[1] - self.frequency_x[0])
        count = int(min(-self.frequency_y[0], -self.frequency_x[0]) / step + 1e-6)
        ring = np.rint(np.hypot(self.frequency_y[:, None], self.frequency_x) / step).astype(int)
        inside = (ring >= 1) & (ring <= count)
        cells = np.bincount(ring[inside], minlength=count + 1)[1:]
        return np.arange(1, count + 1) * step, np.bincount(ring[inside], self.power[inside])[1:] / cells

    @property
    def mean_frequency(self) -> float:
        """Mean of the radial spectrum's frequencies, weighed by power (TG-233), cycles per mm."""
        frequency, power = self.radial()
        return float((frequency * power).sum() / power.sum())

    @property
    def peak_frequency(self) -> float:
        """Where the radial spectrum is highest, cycles per mm."""
        frequency, power = self.radial()
        return float(frequency[power.argmax()])

    @property
    def _cell(self) -> float:
        return float((self.frequency_y[1] - self.frequency_y[0]) * (self.frequency_x[1] - self.frequency_x[0]))


class EnsembleNoise:
    """The noise power spectrum of realisations that come in batches; memory doesn't grow with their number.

    Args:
        pixel_spacing: mm.

    Raises:
        InputError: it isn't positive and finite.
    """

    def __init__(self, pixel_spacing: Spacing) -> None:
        self._spacing = checked_spacing(pixel_spacing)
        self._moments = RunningMoments()

    def update(self, images: ArrayLike) -> None:
        """Add realisations [B, H, W] of one scene, HU.

        Raises:
            ValueError: they aren't [B, H, W] of at least 2x2 pixels, or not of the size of those before.
        """
        batch = np.asarray(images, np.float64)
        if batch.ndim != 3 or min(batch.shape[1:]) < 2:
            raise ValueError(f"images must be [B, H, W] of at least 2x2 pixels, got shape {batch.shape}")
        if self._moments.count and batch.shape[1:] != self._moments.mean.shape:
            raise ValueError(f"images must be of one size, got {batch.shape[1:]} after {self._moments.mean.shape}")
        self._moments.update(scipy.fft.fft2(batch))

    def spectrum(self) -> NoiseSpectrum:
        """The spectrum of what came so far.

        Raises:
            InputError: that were fewer than two realisations.
        """
        if self._moments.count < 2:
            raise InputError(f"realisations: noise takes at least two, got {self._moments.count}")
        (height, width), (dy, dx) = self._moments.mean.shape, self._spacing
        power = scipy.fft.fftshift(self._moments.variance) * (dy * dx / (height * width))
        y, x = (scipy.fft.fftshift(scipy.fft.fftfreq(n, d)) for n, d in ((height, dy), (width, dx)))
        return NoiseSpectrum(power, y, x, self._moments.count)


def noise_power_spectrum(images: ArrayLike, pixel_spacing: Spacing) -> NoiseSpectrum:
    """The noise power spectrum of realisations of one scene; see `EnsembleNoise` for batches of them.

    Args:
        images: [K, H, W], HU, that differ in their noise only; K at least 2.
        pixel_spacing: mm.

    Raises:
        InputError: too few realisations, or the spacing isn't positive and finite.
        ValueError: `images` has another shape.
    """
    noise = EnsembleNoise(pixel_spacing)
    noise.update(images)
    return noise.spectrum()


def checked_spacing(pixel_spacing: Spacing) -> tuple[float, float]:
    """Pixel spacing as (rows, columns).

    Raises:
        InputError: it isn't positive and finite.
    """
    rows, columns = (
        pixel_spacing if isinstance(pixel_spacing, tuple | list) else (float(pixel_spacing), float(pixel_spacing))
    )
    if not (math.isfinite(rows) and math.isfinite(columns) and rows > 0 and columns > 0):
        raise InputError(f"pixel_spacing must be positive and finite, in mm, got {pixel_spacing}")
    return float(rows), float(columns)
