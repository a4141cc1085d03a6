"""Where the samples of a box's bins lie, and what a feature map's cells weigh in them: RoIAlign's rule.

The weight of cell x in a bin is the mean over the bin's samples of max(0, 1 - |x - sample|), with samples clamped into
the map and those beyond its border left out (csrc/roi_align.h has the CPU's form of the same). Samples at NaN are left
out: whatever the boxes hold, reads stay inside.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Pooling(NamedTuple):
    """How boxes are pooled; the kernels are compiled for it."""

    scales: tuple[float, ...]  # of the levels
    bins: tuple[int, int, int]  # z, y, x; images have one along z
    samples: int  # per bin and axis; 0: adaptive
    aligned: bool
    volumes: bool


class Boxes(NamedTuple):
    """The boxes of a call."""

    rois: Tensor  # [count, 5], or 7 for volumes
    levels: Tensor | None
    count: int
    images: int  # in the batch


class Level(NamedTuple):
    """The feature maps of one level, or their gradient."""

    maps: Tensor
    stride: tuple[int, ...]  # image, channel, slice, row, cell
    size: tuple[int, ...]  # slices, rows, cells; images have one slice
    channels: int


# Adaptive sampling takes ceil(bin) samples; a bin beyond this many cells is a broken box.
_MOST_SAMPLES = tl.constexpr(1 << 16)


@triton.jit
def image_number(index, images):
    """The image that a box's batch index names, clamped into the batch; NaN is the first."""
    return tl.minimum(tl.maximum(tl.where(index == index, index, 0.0).to(tl.int32), 0), images - 1)


@triton.jit
def divide(a, b):
    """a / b, rounded to nearest, for what becomes a number of samples or a place in the map.

    On NVIDIA GPUs a float32 `/` multiplies by the reciprocal: 21 / 7 is more than 3 there, and its ceiling 4.
    """
    if a.dtype == tl.float32:
        return tl.div_rn(a, tl.cast(b, tl.float32))
    else:
        return a / b


@triton.jit
def axis_bins(rois, box, axis: tl.constexpr, number: tl.constexpr, POOLING: tl.constexpr):
    """On level `number`, where a box starts along x, y or z (axis 0, 1, 2), and the size of its bins, in cells."""
    axes: tl.constexpr = 3 if POOLING.volumes else 2
    row = rois + box * (1 + 2 * axes) + 1
    shift: tl.constexpr = 0.5 if POOLING.aligned else 0.0
    start = tl.load(row + axis) * POOLING.scales[number] - shift
    side = tl.load(row + axes + axis) * POOLING.scales[number] - shift - start
    if not POOLING.aligned:
        side = tl.maximum(side, 1.0)
    return start, divide(side, POOLING.bins[2 - axis])


@triton.jit
def sample_count(bin, POOLING: tl.constexpr):
    """Samples per bin."""
    if POOLING.samples > 0:
        return bin.to(tl.int32) * 0 + POOLING.samples
    count = tl.minimum(tl.maximum(tl.ceil(bin), 0.0), _MOST_SAMPLES * 1.0)
    return tl.where(count == count, count, 0.0).to(tl.int32)


@triton.jit
def sample_corners(start, bin, index, sample, samples, size):
    """A sample between two cells: both cells and their weights, 0 where the sample lies beyond the map."""
    position = start + index * bin + divide((sample + 0.5) * bin, samples)
    valid = (position >= -1.0) & (position <= size)
    position = tl.where(valid, tl.maximum(position, 0.0), 0.0)
    low = tl.minimum(position.to(tl.int32), size - 1)
    high = tl.minimum(low + 1, size - 1)
    fraction = tl.where(low == size - 1, 0.0, position - low)
    return low, high, tl.where(valid, 1.0 - fraction, 0.0), tl.where(valid, fraction, 0.0)


@triton.jit
def cell_weights(cells, start, bin, index, samples, size):
    """The weight of each cell in a bin."""
    total = cells.to(start.dtype) * 0.0
    for sample in range(samples):
        position = start + index * bin + divide((sample + 0.5) * bin, samples)
        inside = tl.minimum(tl.maximum(position, 0.0), size - 1.0)
        tent = tl.maximum(1.0 - tl.abs(cells - inside), 0.0)
        total += tl.where((position >= -1.0) & (position <= size), tent, 0.0)
    return total / tl.maximum(samples, 1)
