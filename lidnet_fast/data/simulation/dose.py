"""Low-dose CT from normal-dose images: the noise that a scan at a fraction of the dose would have had on top.

Reference (:func:`insert_noise_in_projections`): project the image, add the noise of Yu, Shiung, Jondal and McCollough,
"Development and validation of a practical lower-dose-simulation tool for optimizing computed tomography scan
protocols", J. Comput. Assist. Tomogr. 36(4), 2012, reconstruct. Fast default (:func:`simulate_low_dose`, or its two
halves :func:`noise_variance_maps` and :func:`sector_noise` for patches): take the noise of all the views in an angular
sector together. Locally it has the power spectrum of filtered back-projection, restricted to that sector of directions,
and their mean insertion variance. So a coarse projection gives one smooth variance map per sector. White noise is
shaped by each sector's spectrum and multiplied by the map's root. Summed over sectors, it has the right strength,
frequency and direction (streaks) at every place, for the price of a few small FFTs.

The geometry is parallel-beam with a detector pitch of one pixel and no bow-tie filter.
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from scipy.fft import next_fast_len
from torch import Tensor

from lidnet_fast.data.simulation import projection
from lidnet_fast.errors import InputError

WATER_ATTENUATION = 0.0193
"""Linear attenuation of water at 70 keV (the mean energy of a 120 kVp beam), 1/mm."""

_MAP_VIEWS = 64
"""Views, at least, of the coarse projection behind the variance maps."""

_MARGIN = 16
"""Pixels of shaped noise thrown away at a patch's edge, so that its opposite edges aren't periodic neighbours."""


@dataclasses.dataclass(frozen=True)
class DoseSimulation:
    """How a low-dose scan is simulated.

    Attributes:
        dose_fraction: dose of the simulated scan over the dose of the image given, in (0, 1]; at 1 nothing is added.
        photons: incident photons per ray at the dose of the image given.
        electronic_noise: variance of the detector's electronic noise, photons squared.
        sectors: number of angular sectors of the fast synthesis; more follow streaks more closely and cost more.
        views: projections in half a turn of the simulated scanner.
        map_size: pixels along the longer side of the variance maps.

    Raises:
        InputError: a value is out of its range.
    """

    dose_fraction: float = 0.25
    photons: float = 2e5
    electronic_noise: float = 100.0
    sectors: int = 8
    views: int = 720
    map_size: int = 64

    def __post_init__(self) -> None:
        if not 0 < self.dose_fraction <= 1:
            raise InputError(f"dose_fraction must be in (0, 1], got {self.dose_fraction}")
        if not (self.photons > 0 and math.isfinite(self.photons)):
            raise InputError(f"photons must be positive and finite, got {self.photons}")
        if not (self.electronic_noise >= 0 and math.isfinite(self.electronic_noise)):
            raise InputError(f"electronic_noise must be finite and not negative, got {self.electronic_noise}")
        for name, smallest in (("sectors", 1), ("views", 2), ("map_size", 8)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < smallest:
                raise InputError(f"{name} must be an integer of at least {smallest}, got {value!r}")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dict of plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "DoseSimulation":
        """Make a simulation from the dict of :meth:`to_dict`; anything else is an InputError."""
        if not isinstance(values, dict):
            raise InputError(f"a dose simulation is a set of named settings, got {values!r}")
        unknown = sorted(set(values) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise InputError(f"no such dose simulation setting: {', '.join(unknown)}")
        try:
            return cls(**values)
        except TypeError as error:
            raise InputError(f"dose simulation: {error}") from error


def sample_generator(*key: int) -> torch.Generator:
    """Return the CPU generator that belongs to a key, such as (seed, epoch, sample).

    A pure function of the key (a 64-bit BLAKE2b hash of it is the seed), so noise does not depend on batches, workers
    or ranks, and is the same after a resume.
    """
    text = ",".join(map(str, key)).encode()
    digest = hashlib.blake2b(text, digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))


def insertion_variance(line_integrals: Tensor, simulation: DoseSimulation) -> Tensor:
    """Variance to add to a normal-dose log-sinogram so that it has the simulated dose (Yu et al. 2012).

    Args:
        line_integrals: p = -log(I / I0), any shape.
        simulation: dose fraction, photons and electronic noise.

    Returns:
        Variance of p, the same shape. Rays with less than one photon expected at the low dose count as having one:
        scanners clip what they can't take the logarithm of.
    """
    fraction, photons = simulation.dose_fraction, simulation.photons
    inverse = line_integrals.exp().clamp(max=photons * fraction) / photons  # 1 / expected photons at normal dose
    electronic = (1 + fraction) / fraction * simulation.electronic_noise * inverse
    return (1 - fraction) / fraction * inverse * (1 + electronic)


def _checked(hu: Tensor, pixel_spacing: float | Tensor) -> tuple[Tensor, Tensor]:
    """Return HU as float [N, H, W] and the pixel spacing as [N, 1, 1], or raise ValueError."""
    if hu.dim() != 3 or 0 in hu.shape:
        raise ValueError(f"hu must be [N, H, W] and not empty, got shape {tuple(hu.shape)}")
    hu = hu if hu.is_floating_point() else hu.float()
    spacing = torch.as_tensor(pixel_spacing, dtype=hu.dtype)
    if spacing.dim() > 1 or (spacing.dim() == 1 and len(spacing) != len(hu)):
        raise ValueError(f"pixel_spacing must be a number or [N={len(hu)}], got shape {tuple(spacing.shape)}")
    if not bool((torch.isfinite(spacing) & (spacing > 0)).all()):
        raise ValueError(f"pixel_spacing must be positive and finite, got {pixel_spacing}")
    return hu, spacing.to(hu.device).expand(len(hu))[:, None, None]


def _attenuation_per_pixel(hu: Tensor, spacing: Tensor) -> Tensor:
    return ((hu + 1000) * (WATER_ATTENUATION / 1000) * spacing).clamp(min=0)


def _hu_per_attenuation(spacing: Tensor) -> Tensor:
    return 1000 / (WATER_ATTENUATION * spacing)


@functools.cache
def _kernel_energy() -> float:
    """Variance gain of filtering white noise with the kernel and interpolating it linearly between detectors."""
    length = 4096
    response = projection.kernel_response(length).double()
    # Averaged over its phase w, (1-w)^2 + w^2 and 2w(1-w) weigh the autocorrelation at lags 0 and 1.
    interpolation = 2 / 3 + torch.cos(2 * math.pi * torch.fft.rfftfreq(length, dtype=torch.float64)) / 3
    power = response.square() * interpolation
    return float((2 * power.sum() - power[0] - power[-1]) / length)


def noise_variance_maps(hu: Tensor, pixel_spacing: float | Tensor, simulation: DoseSimulation) -> Tensor:
    """Variance of the noise to add, per place and angular sector, from a coarse projection of whole slices.

    Args:
        hu: [N, H, W] normal-dose slices in HU, whole (the noise depends on all that a ray passes); integers are fine.
        pixel_spacing: mm, one number or [N].
        simulation: dose, scanner, number of sectors K and map size.

    Returns:
        [N, K, h, w] variances in HU^2, float; the longer of h and w is ``simulation.map_size`` (or the image's side if
        that is smaller) and the maps span the whole slice. Sector k holds the noise whose frequency vector points
        within pi / 2K of the direction k pi / K (x to the right, y downwards).

    Raises:
        ValueError: ``hu`` is not [N, H, W], or a spacing is not positive.
    """
    attenuation = coarse_attenuation(hu, pixel_spacing, simulation)
    return variance_maps(attenuation, (hu.shape[1], hu.shape[2]), pixel_spacing, simulation)


def coarse_attenuation(hu: Tensor, pixel_spacing: float | Tensor, simulation: DoseSimulation) -> Tensor:
    """Do the first half of `noise_variance_maps`, all that reads the slices: their mean attenuation, [N, h, w]."""
    # Attenuation is linear in HU from -1000 on: the mean can come first, and the clamp is cheaper on integers.
    hu, spacing = _checked(hu.clamp(min=-1000), pixel_spacing)
    _, size = _coarse_grid((hu.shape[1], hu.shape[2]), simulation)
    return _attenuation_per_pixel(F.interpolate(hu[None], size=size, mode="area")[0], spacing)


def variance_maps(
    attenuation: Tensor, image_size: tuple[int, int], pixel_spacing: float | Tensor, simulation: DoseSimulation
) -> Tensor:
    """Do the second half of `noise_variance_maps`: the maps, from the `coarse_attenuation` of slices of one size."""
    attenuation, spacing = _checked(attenuation, pixel_spacing)
    pitch, size = _coarse_grid(image_size, simulation)
    sectors = simulation.sectors
    per_sector = -(-_MAP_VIEWS // sectors)
    matrix, rays = _coarse_geometry(*image_size, size, pitch, sectors, per_sector, attenuation.device)
    variance = insertion_variance(matrix.project(attenuation), simulation)
    # Mean over a sector's views of the variance of the ray through each place.
    maps = variance.index_select(1, rays).reshape(-1, sectors, per_sector, *size).mean(2)
    scale = (math.pi / simulation.views) ** 2 * (simulation.views / sectors) * _kernel_energy()
    return maps * scale * _hu_per_attenuation(spacing).square()[..., None]


def _coarse_grid(image_size: tuple[int, int], simulation: DoseSimulation) -> tuple[float, tuple[int, int]]:
    """Return the pixels of an image per side of a map's pixel, and the map's height and width."""
    height, width = image_size
    pitch = max(height, width) / min(simulation.map_size, max(height, width))
    return pitch, (max(1, round(height / pitch)), max(1, round(width / pitch)))


@functools.lru_cache(maxsize=16)
def _coarse_geometry(
    height: int,
    width: int,
    size: tuple[int, int],
    pitch: float,
    sectors: int,
    per_sector: int,
    device: torch.device,
) -> tuple[projection.ProjectionMatrix, Tensor]:
    """Return the coarse views' projection matrix, sector by sector, and each map pixel's nearest ray [V * h * w]."""
    views = sectors * per_sector
    # Shifted by half a sector, so that the first sector is centred on the x direction.
    angles = projection.view_angles(views, device) - math.pi / (2 * sectors)
    detectors = projection.detector_count(math.ceil(height / pitch), math.ceil(width / pitch))
    y = ((torch.arange(size[0], device=device) + 0.5) / size[0] - 0.5) * height / pitch
    x = ((torch.arange(size[1], device=device) + 0.5) / size[1] - 0.5) * width / pitch
    ray = x[None, None, :] * angles.cos()[:, None, None] + y[None, :, None] * angles.sin()[:, None, None]
    nearest = (ray + (detectors - 1) / 2).round().clamp(0, detectors - 1).long()
    nearest += torch.arange(views, device=device)[:, None, None] * detectors
    return projection.projection_matrix(size, angles, detectors, pitch, (height, width)), nearest.reshape(-1)


@functools.lru_cache(maxsize=16)
def _sector_filters(height: int, width: int, sectors: int, device: torch.device) -> Tensor:
    """Return amplitude filters [K, height, width // 2 + 1] for rfft2 that turn white noise into each sector's noise.

    The power spectrum of filtered back-projection is |kernel|^2 / |f| times the interpolation's sinc^4 (Riederer,
    Pelc and Chesler, Phys. Med. Biol. 23, 1978), the kernel being periodic; each filter has unit variance gain.
    Sectors are disjoint, so the shares of one white draw are uncorrelated.
    """
    fy = torch.fft.fftfreq(height, dtype=torch.float64)[:, None]
    fx = torch.fft.rfftfreq(width, dtype=torch.float64)[None, :]
    power = torch.zeros(1, dtype=torch.float64)
    # What interpolation leaves beyond the pixel grid's band folds back into it.
    for shift_y in (-1, 0, 1):
        for shift_x in (-1, 0, 1):
            frequency = torch.hypot(fy + shift_y, fx + shift_x)
            ramp = (frequency - frequency.round()).abs()
            window = 0.5 + 0.5 * torch.cos(2 * math.pi * frequency)
            power = power + ramp**2 / frequency.clamp(min=1e-9) * window * torch.sinc(frequency) ** 4
    sector = (torch.atan2(fy, fx) * (sectors / math.pi)).round().long() % sectors
    share = F.one_hot(sector, sectors).movedim(-1, 0) * power
    # A half spectrum: inner columns stand for two frequencies each.
    count = torch.full((fx.shape[1],), 2.0, dtype=torch.float64)
    count[0] = 1
    if width % 2 == 0:
        count[-1] = 1
    gain = (share * count).sum((1, 2), keepdim=True) / (height * width)
    return (share / gain.clamp(min=1e-300)).sqrt().float().to(device)


def _fft_size(length: int) -> int:
    """Return the next even size of at least `length` that has only the factors 2, 3 and 5."""
    return 2 * next_fast_len((length + 1) // 2, real=True)


@functools.lru_cache(maxsize=16)
def _whole_sector_filters(height: int, width: int, sectors: int, device: torch.device) -> Tensor:
    """The same filters on the whole spectrum, [K, height, width], for even widths: what fft2 needs of two fields."""
    half = _sector_filters(height, width, sectors, device)
    opposite = half[:, -torch.arange(height, device=device)]
    # The first and the last column hold opposite frequencies, of whose filters the inverse of rfft2 sees the mean.
    mean, last = (half + opposite) / 2, width // 2
    columns = (mean[..., :1], half[..., 1:last], mean[..., last:], opposite[..., 1:last].flip(-1))
    return torch.cat(columns, -1)


def sector_noise(
    maps: Tensor,
    image_size: tuple[int, int],
    windows: Tensor | Sequence[Sequence[int]],
    generators: Sequence[torch.Generator],
) -> Tensor:
    """Draw the noise of one window per slice, without making that of the whole slice.

    Args:
        maps: [N, K, h, w] variances in HU^2 from :func:`noise_variance_maps`.
        image_size: (H, W) of the slices the maps were made from.
        windows: N rows of integers (y0, x0, height, width), inside the slice, all of one height and width.
        generators: one per sample; sample n's noise depends on ``generators[n]`` and its own maps and window alone.

    Returns:
        Noise [N, height, width] in HU, zero mean, on the device and of the dtype of ``maps``.

    Raises:
        ValueError: shapes or counts disagree, or a window leaves the slice.
    """
    if maps.dim() != 4:
        raise ValueError(f"maps must be [N, K, h, w], got shape {tuple(maps.shape)}")
    return stack_noise(maps[:, None], image_size, windows, [[generator] for generator in generators])[:, 0]


def stack_noise(
    maps: Tensor,
    image_size: tuple[int, int],
    windows: Tensor | Sequence[Sequence[int]],
    generators: Sequence[Sequence[torch.Generator]],
) -> Tensor:
    """Draw the noise of one window per stack of slices: as :func:`sector_noise`, and cheaper than slice by slice.

    Args:
        maps: [N, C, K, h, w] variances in HU^2.
        image_size: (H, W) of the slices.
        windows: N rows of integers (y0, x0, height, width).
        generators: N rows of C; the noise of a slice follows from its own, up to rounding wherever it lies in a stack.

    Returns:
        Noise [N, C, height, width] in HU.

    Raises:
        ValueError: as :func:`sector_noise`.
    """
    rows = [tuple(int(value) for value in row) for row in windows]
    if not len(rows) == len(generators) == len(maps):
        raise ValueError(f"{len(maps)} maps need as many windows and generators, got {len(rows)} and {len(generators)}")
    if not rows:
        raise ValueError("maps must hold at least one sample")
    height, width = rows[0][2:]
    for row in rows:
        y0, x0, *size = row
        inside = 0 <= y0 <= image_size[0] - height and 0 <= x0 <= image_size[1] - width
        if size != [height, width] or height < 1 or width < 1 or not inside:
            raise ValueError(f"windows must be of one size and inside the {image_size} slice, got {row}")
    # Standard deviations at the window's pixel centres; maps and slice share their outer edges.
    corners = torch.tensor(rows, device=maps.device, dtype=maps.dtype)
    y = (torch.arange(height, device=maps.device) + 0.5 + corners[:, :1]) * (2 / image_size[0]) - 1
    x = (torch.arange(width, device=maps.device) + 0.5 + corners[:, 1:2]) * (2 / image_size[1]) - 1
    grid = torch.stack([x[:, None, :].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)], dim=-1)
    noise = maps.new_empty(len(maps), maps.shape[1], height, width)
    full = (_fft_size(height + _MARGIN), _fft_size(width + _MARGIN))
    for first in range(0, maps.shape[1], 2):
        white = [
            torch.stack([torch.randn(full, generator=g, device=g.device) for g in of_slice]).to(maps.device)
            for of_slice in zip(*(of_stack[first : first + 2] for of_stack in generators), strict=True)
        ]
        for channel, shaped in enumerate(_shaped(white, maps.shape[2]), first):
            deviation = F.grid_sample(maps[:, channel].sqrt(), grid, padding_mode="border", align_corners=False)
            noise[:, channel] = (shaped[..., :height, :width].to(maps.dtype) * deviation).sum(1)
    return noise


def _shaped(white: Sequence[Tensor], sectors: int) -> tuple[Tensor, ...]:
    """White noise [N, H, W] of a slice, or of two as one complex image, shaped by each sector: of each [N, K, H, W]."""
    size, device = white[0].shape[1:], white[0].device
    if len(white) == 1:
        spectrum = torch.fft.rfft2(white[0])[:, None] * _sector_filters(*size, sectors, device)
        return (torch.fft.irfft2(spectrum, s=size),)
    spectrum = torch.fft.fft2(torch.complex(*white))[:, None] * _whole_sector_filters(*size, sectors, device)
    both = torch.fft.ifft2(spectrum)
    return both.real, both.imag


def simulate_low_dose(
    hu: Tensor, pixel_spacing: float | Tensor, simulation: DoseSimulation, generators: Sequence[torch.Generator]
) -> Tensor:
    """Add to whole slices the noise that makes them slices of the simulated dose (angular-sector synthesis).

    Args:
        hu: [N, H, W] normal-dose slices in HU.
        pixel_spacing: mm, one number or [N].
        simulation: the dose and the scanner.
        generators: one per slice.

    Returns:
        Low-dose slices [N, H, W] in HU, float.

    Raises:
        ValueError: ``hu`` is not [N, H, W], a spacing is not positive, or there is not one generator per slice.
    """
    maps = noise_variance_maps(hu, pixel_spacing, simulation)
    height, width = hu.shape[1:]
    return hu + sector_noise(maps, (height, width), [(0, 0, height, width)] * len(hu), generators)


def insert_noise_in_projections(
    hu: Tensor, pixel_spacing: float | Tensor, simulation: DoseSimulation, generator: torch.Generator
) -> Tensor:
    """Add noise in the projections and reconstruct it (Yu et al. 2012): the slow reference of the synthesis.

    Args:
        hu: [N, H, W] normal-dose slices in HU, whole.
        pixel_spacing: mm, one number or [N].
        simulation: the dose and the scanner.
        generator: source of the noise of all slices.

    Returns:
        Low-dose slices [N, H, W] in HU. Reconstruction is linear, so only the noise passes through it and the image
        keeps its resolution.

    Raises:
        ValueError: ``hu`` is not [N, H, W] or a spacing is not positive.
    """
    hu, spacing = _checked(hu, pixel_spacing)
    height, width = hu.shape[1:]
    angles = projection.view_angles(simulation.views, hu.device)
    attenuation = _attenuation_per_pixel(hu, spacing)
    line_integrals = projection.project(attenuation, angles, projection.detector_count(height, width))
    white = torch.randn(line_integrals.shape, generator=generator, device=generator.device).to(hu)
    noise = insertion_variance(line_integrals, simulation).sqrt() * white
    return hu + projection.reconstruct(noise, angles, height, width) * _hu_per_attenuation(spacing)
