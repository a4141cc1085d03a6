"""Feature pyramids: the levels' strides, and which level a box belongs to."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def pyramid_exponents(feature_heights: Sequence[int], image_height: int) -> list[int]:
    """k of each level, whose stride is 2**k: the nearest power of two, from the heights, as torchvision infers it."""
    return [-round(math.log2(height / image_height)) for height in feature_heights]


def assign_levels(
    rois: Tensor, k_min: int, k_max: int, canonical_scale: float, canonical_level: int, eps: float = 1e-6
) -> Tensor:
    """The level of each box, counted from the finest: int64 Tensor[K] in [0, k_max - k_min].

    k = floor(k0 + log2(sqrt(w h) / s0)), clamped to the levels there are (Lin et al., Feature Pyramid Networks,
    arXiv:1612.03144, eq. 1, with torchvision's eps inside the floor).

    Args:
        rois: [K, 5], (batch index, x1, y1, x2, y2).
        k_min: log2 of the finest level's stride.
        k_max: log2 of the coarsest level's stride.
        canonical_scale: s0, the side of the square that belongs to `canonical_level`.
        canonical_level: k0.
        eps: Keeps a square of just the canonical side on its level in spite of rounding.
    """
    side = ((rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2])).sqrt()
    level = torch.floor(canonical_level + torch.log2(side / canonical_scale) + eps)
    return level.clamp(k_min, k_max).to(torch.int64) - k_min
