"""Parallel-beam projection, filtered back-projection and noise insertion in projections: the low-dose reference.

Lengths are in pixels of the image: detector pitch and reconstruction pixel are the same. View angle ``t`` measures the
ray coordinate ``s = x cos t + y sin t`` from the image centre (x to the right, y downwards), so its noise lies along
the frequency direction ``t``.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK_SAMPLES = 4_000_000
"""Samples of one grid_sample call: bounds the memory of a projection."""


def view_angles(views: int, device: torch.device | str = "cpu") -> Tensor:
    """Return ``views`` angles in radians, float32, at the centres of as many equal parts of [0, pi)."""
    return (torch.arange(views, device=device, dtype=torch.float32) + 0.5) * (math.pi / views)


def detector_count(height: int, width: int) -> int:
    """Return the smallest odd number of detectors, one pixel apart, that sees the whole of an image."""
    return math.ceil(math.hypot(height, width)) | 1


def project(
    image: Tensor, angles: Tensor, detectors: int, pitch: float = 1.0, extent: Sequence[float] | None = None
) -> Tensor:
    """Integrate an image along parallel rays (bilinear sampling of the rotated image).

    Args:
        image: floating-point [N, h, w], attenuation per unit of length.
        angles: [V] view angles in radians.
        detectors: number of rays per view, D, centred on the image centre.
        pitch: distance of neighbouring rays, and of samples along a ray, in units of length.
        extent: height and width of the image in units of length; (h, w), the default, makes the unit a pixel.

    Returns:
        Line integrals [N, V, D]; outside the image there is nothing to integrate.
    """
    samples, _, _ = image.shape
    height, width = extent if extent is not None else image.shape[-2:]
    offsets = (torch.arange(detectors, device=image.device, dtype=image.dtype) - (detectors - 1) / 2) * pitch
    along, across = offsets[:, None], offsets[None, :]
    sinogram = image.new_empty(samples, len(angles), detectors)
    step = max(1, _CHUNK_SAMPLES // (samples * detectors * detectors))
    for start in range(0, len(angles), step):
        part = angles[start : start + step].to(image.dtype)
        cos, sin = part.cos()[:, None, None], part.sin()[:, None, None]
        x, y = across * cos - along * sin, across * sin + along * cos
        grid = torch.stack([x * (2 / width), y * (2 / height)], dim=-1).reshape(1, -1, detectors, 2)
        # The batch rides as channels: the sampling weights are made once for all of its images.
        rays = F.grid_sample(image[None], grid, align_corners=False)
        sums = rays.reshape(samples, len(part), detectors, detectors).sum(2)
        sinogram[:, start : start + len(part)] = sums * pitch
    return sinogram


class ProjectionMatrix(NamedTuple):
    """A sparse matrix [V * D, h * w] by rows: which pixels each ray meets, and over what length."""

    pixels: Tensor
    """int64 [nnz]"""
    lengths: Tensor
    """float32 [nnz]"""
    starts: Tensor
    """int64 [V * D], where each ray's pixels start."""

    def project(self, images: Tensor) -> Tensor:
        """Integrate images [N, h, w] along the rays: [N, V * D]. Unlike a sparse product, repeatable on CUDA."""
        lengths = self.lengths.to(images.dtype)
        columns = images.flatten(1).T.contiguous()
        return F.embedding_bag(self.pixels, columns, self.starts, mode="sum", per_sample_weights=lengths).T


def projection_matrix(
    size: tuple[int, int], angles: Tensor, detectors: int, pitch: float, extent: Sequence[float]
) -> ProjectionMatrix:
    """Return the matrix of what `project` does to images of one size.

    A ray meets few pixels of a small image, so for one image after another this is an order of magnitude cheaper than
    sampling each again.
    """
    height, width = size
    offsets = (torch.arange(detectors, device=angles.device) - (detectors - 1) / 2) * pitch
    along, across = offsets[None, :, None], offsets[None, None, :]
    cos, sin = angles.cos()[:, None, None], angles.sin()[:, None, None]
    # Places of the samples along the rays, in pixels of the image.
    column = (across * cos - along * sin + extent[1] / 2) * (width / extent[1]) - 0.5
    row = (across * sin + along * cos + extent[0] / 2) * (height / extent[0]) - 0.5
    ray = torch.arange(len(angles) * detectors, device=angles.device).reshape(-1, 1, detectors).expand(column.shape)
    places, lengths = [], []
    for y in (row.floor(), row.floor() + 1):
        for x in (column.floor(), column.floor() + 1):
            length = (1 - (row - y).abs()) * (1 - (column - x).abs()) * pitch
            met = (length > 0) & (y >= 0) & (y < height) & (x >= 0) & (x < width)
            places.append(torch.stack([ray[met], (y * width + x)[met].long()]))
            lengths.append(length[met])
    shape = (len(angles) * detectors, height * width)
    matrix = torch.sparse_coo_tensor(torch.cat(places, 1), torch.cat(lengths), shape, check_invariants=True).coalesce()
    rays, pixels = matrix.indices()
    starts = torch.searchsorted(rays.contiguous(), torch.arange(shape[0], device=angles.device))
    return ProjectionMatrix(pixels.contiguous(), matrix.values(), starts)


def back_project(sinogram: Tensor, angles: Tensor, height: int, width: int) -> Tensor:
    """Sum filtered projections [N, V, D] over the rays through each pixel, interpolated: [N, height, width]."""
    detectors = sinogram.shape[-1]
    x = torch.arange(width, device=sinogram.device) - (width - 1) / 2
    y = torch.arange(height, device=sinogram.device) - (height - 1) / 2
    image = sinogram.new_zeros(len(sinogram), height * width)
    for view, angle in enumerate(angles.tolist()):
        ray = (x[None, :] * math.cos(angle) + y[:, None] * math.sin(angle) + (detectors - 1) / 2).reshape(-1)
        left = ray.floor().clamp(0, detectors - 2)
        fraction = (ray - left).to(sinogram.dtype)
        index = left.long()
        row = sinogram[:, view]
        image += row[:, index] + fraction * (row[:, 1:] - row[:, :-1])[:, index]
    return image.reshape(-1, height, width)


@functools.cache
def kernel_response(length: int) -> Tensor:
    """Return the reconstruction kernel at ``torch.fft.rfftfreq(length)``: band-limited ramp times a root-Hann window.

    The ramp is Kak and Slaney's discrete one (Principles of Computerized Tomographic Imaging, 1988, eq. 3.61) and the
    window a soft-tissue one: sqrt((1 + cos 2 pi f) / 2), f in cycles per pixel.
    """
    tap = torch.fft.fftfreq(length, dtype=torch.float64) * length
    odd = tap.abs() % 2 == 1
    ramp = torch.zeros_like(tap)
    ramp[odd] = -1 / (math.pi * tap[odd]) ** 2
    ramp[0] = 0.25
    frequency = torch.fft.rfftfreq(length, dtype=torch.float64)
    window = (0.5 + 0.5 * torch.cos(2 * math.pi * frequency)).clamp(min=0).sqrt()
    return (torch.fft.rfft(ramp).real * window).float()


def reconstruction_transfer(frequency: np.ndarray) -> np.ndarray:
    """The modulation transfer function of `reconstruct`, at frequencies in cycles per pixel of any shape.

    The kernel's window times linear interpolation between detectors; nothing passes beyond half a cycle.
    """
    window = np.where(np.abs(frequency) < 0.5, np.cos(np.pi * frequency), 0.0)
    return window * np.sinc(frequency) ** 2


def filter_projections(sinogram: Tensor) -> Tensor:
    """Convolve projections [N, V, D] with the reconstruction kernel along the detector; the same shape."""
    detectors = sinogram.shape[-1]
    length = 1 << (2 * detectors - 1).bit_length()
    response = kernel_response(length).to(sinogram)
    return torch.fft.irfft(torch.fft.rfft(sinogram, n=length) * response, n=length)[..., :detectors]


def reconstruct(sinogram: Tensor, angles: Tensor, height: int, width: int) -> Tensor:
    """Filtered back-projection of line integrals [N, V, D]: attenuation per pixel [N, height, width]."""
    return back_project(filter_projections(sinogram), angles, height, width) * (math.pi / len(angles))
