"""Boxes to measure with: lesions of real sizes, and what a detector proposes around them."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lidnet_fast.data.phantoms.lidc import boxes_of_slices, lesion_geometry

LESIONS_PER_IMAGE = 10
ANCHOR_SIDES = (16, 32, 64, 128, 256)
# How far proposals scatter around a lesion, and their sides around an anchor's: standard deviations, in anchors' sides.
SCATTER, SPREAD = 0.15, 0.2


def lesions(extent: Sequence[int], images: int, per_image: int = LESIONS_PER_IMAGE, seed: int = 0) -> list[Tensor]:
    """Lesions of LIDC-IDRI's sizes, anywhere in images of `extent`, (x, y) or (x, y, z): per image [per_image, 4 or 6].

    On a third axis, for which the table has no size, a lesion is as long as the geometric mean of the other two.
    """
    generator = np.random.default_rng(seed)
    size = np.array(extent)
    boxes: list[Tensor] = []
    for _ in range(images):
        sides = generator.choice(lesion_geometry(), per_image)[:, :2]
        if len(extent) == 3:
            sides = np.column_stack((sides, np.sqrt(sides.prod(1))))
        sides = np.minimum(sides, size)
        starts = generator.uniform(0, size - sides)
        boxes.append(torch.from_numpy(np.hstack((starts, starts + sides)).astype(np.float32)))
    return boxes


def lidc_slices(images: int, seed: int = 0) -> list[Tensor]:
    """The boxes of slices of LIDC-IDRI, 512x512, drawn from those that two radiologists found a nodule on."""
    slices = boxes_of_slices()
    drawn = np.random.default_rng(seed).choice(len(slices), images, replace=False)
    return [torch.from_numpy(slices[number].astype(np.float32)) for number in drawn]


def proposals(extent: Sequence[int], images: int, total: int, seed: int = 0) -> list[Tensor]:
    """Proposals around lesions, `total` in all images together: many at each lesion, of all anchors' sizes, clipped."""
    generator = np.random.default_rng(seed)
    size = np.array(extent)
    boxes: list[Tensor] = []
    for of_image in lesions(extent, images, LESIONS_PER_IMAGE, seed):
        count = total // images + (len(boxes) < total % images)
        lesion = generator.choice(of_image.numpy(), count)
        centres = (lesion[:, : len(extent)] + lesion[:, len(extent) :]) / 2
        anchors = generator.choice(ANCHOR_SIDES, (count, 1))
        centres = np.clip(centres + generator.normal(0, SCATTER, centres.shape) * anchors, 0, size)
        sides = anchors * np.exp(generator.normal(0, SPREAD, centres.shape))
        corners = np.hstack((np.maximum(centres - sides / 2, 0), np.minimum(centres + sides / 2, size)))
        boxes.append(torch.from_numpy(corners.astype(np.float32)))
    return boxes


def as_rois(boxes: Sequence[Tensor]) -> Tensor:
    """One Tensor of (image's index, corners) from one Tensor of corners per image."""
    return torch.cat([F.pad(of_image, (1, 0), value=n) for n, of_image in enumerate(boxes)])
