"""Boxes and their weights, checked and brought to one form."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lidnet_fast import backend
from lidnet_fast._checks import (
    WEIGHTS_RULE,
    Boxes,
    boxes_rule,
    check_box_tensor,
    check_box_values,
    check_box_weights,
    check_weight_values,
    largest_coordinate,
    to_tensor_remedy,
)
from lidnet_fast._plausibility import warn_of_boxes
from lidnet_fast._tensors import compute_dtype

from ._pooling import assign_levels


class CheckedBoxes(NamedTuple):
    """Boxes as the ops take them: contiguous, in the dtype of the arithmetic.

    Attributes:
        rois: [K, 5], (batch index, x1, y1, x2, y2), or [K, 7], (batch index, x1, y1, z1, x2, y2, z2).
        weights: [K], or None for ones.
        levels: int64 [K], the level of a pyramid that each box is on, or None where there is one.
    """

    rois: Tensor
    weights: Tensor | None
    levels: Tensor | None


def check_boxes(
    boxes: Boxes,
    input: Tensor,
    spatial_scale: float = 1.0,
    *,
    box_weights: Tensor | None = None,
    level_areas: Sequence[float] = (),
    outside: str = "keep",
    doubt: str = "",
) -> CheckedBoxes:
    """Boxes and weights checked against `input`; warns of boxes that hardly lie where they were meant to.

    On CUDA one kernel does all that is done to their values.

    Args:
        boxes: For `input` [N, C, H, W] Tensor[K, 5] of (batch index, x1, y1, x2, y2), or N Tensors [L_i, 4] of
            (x1, y1, x2, y2); for [N, C, D, H, W] Tensor[K, 7] of (batch index, x1, y1, z1, x2, y2, z2), or N Tensors
            [L_i, 6].
        input: Gives the batch size, the device and, by `compute_dtype`, the dtype.
        spatial_scale: What the op multiplies coordinates by; they must stay finite.
        box_weights: Of each box, or None.
        level_areas: As in `assign_levels`; none without a pyramid.
        outside: "keep" or "ignore"; the second needs no warning of boxes outside.
        doubt: As in `warn_of_boxes`.
    """
    images, axes = input.shape[0], input.ndim - 2
    dtype = compute_dtype(input.dtype)
    parts, lengths = _as_list(boxes, input)
    if box_weights is not None:
        check_box_weights(box_weights, sum(of_image.shape[0] for of_image in parts), input.device)
    on_device = backend.kernel("check_boxes", input.device)
    if on_device is not None and parts:
        largest, rules = largest_coordinate(dtype, spatial_scale), [boxes_rule(axes), WEIGHTS_RULE]
        rois, levels = on_device(parts, box_weights, images, largest, list(level_areas), rules, dtype)
        levels = levels if level_areas else None
    else:
        rois = _join(parts, lengths, 2 * axes, dtype, input.device)
        ends = check_box_values(rois, images, spatial_scale, lengths)
        if ends is not None:
            warn_of_boxes(rois, ends, input.shape[2:], spatial_scale, outside=outside == "keep", doubt=doubt)
        if box_weights is not None:
            check_weight_values(box_weights)
        levels = assign_levels(rois, level_areas) if level_areas else None
    return CheckedBoxes(rois, None if box_weights is None else box_weights.to(dtype), levels)


def as_box_weights(box_weights: Tensor | None, boxes: int, device: torch.device, dtype: torch.dtype) -> Tensor | None:
    """Weights of boxes that were checked elsewhere, checked themselves, in the dtype of the arithmetic.

    They may be on the CPU, and then stay there.
    """
    if box_weights is None:
        return None
    on_host = isinstance(box_weights, Tensor) and box_weights.device.type == "cpu"
    check_box_weights(box_weights, boxes, torch.device("cpu") if on_host else device)
    on_device = backend.kernel("check_boxes", box_weights.device)
    if on_device is None:
        check_weight_values(box_weights)
    else:  # of boxes without coordinates, so that one launch looks at the weights alone
        on_device([box_weights.new_empty(boxes, 0)], box_weights, 1, 1.0, [], ["", WEIGHTS_RULE], dtype)
    return box_weights.to(dtype)


def _as_list(boxes: Boxes, input: Tensor) -> tuple[list[Tensor], list[int] | None]:
    """The Tensors of `boxes`, and the lengths of those that are of one image each."""
    width = 2 * input.ndim - 3
    if isinstance(boxes, Tensor):
        check_box_tensor("boxes", boxes, width, input)
        return [boxes.detach()], None
    if not isinstance(boxes, Sequence):
        raise TypeError(
            f"boxes must be a Tensor[K, {width}] or a list of Tensor[L, {width - 1}], got {type(boxes).__name__}"
            f"{to_tensor_remedy('boxes', boxes)}"
        )
    if len(boxes) != input.shape[0]:
        raise ValueError(
            f"boxes must be a list of {input.shape[0]} Tensors, one per image, got {len(boxes)}; an image without "
            f"boxes has torch.zeros(0, {width - 1})"
        )
    for number, of_image in enumerate(boxes):
        check_box_tensor(f"boxes[{number}]", of_image, width - 1, input)
    return [of_image.detach() for of_image in boxes], [of_image.shape[0] for of_image in boxes]


def _join(
    parts: Sequence[Tensor], lengths: Sequence[int] | None, corners: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Boxes of all images, with their batch index: [K, 1 + corners]."""
    if lengths is None:
        return parts[0].to(dtype).contiguous()
    joined = [torch.empty((0, 1 + corners), dtype=dtype, device=device)]
    for number, of_image in enumerate(parts):
        of_image = of_image.to(dtype)
        joined.append(torch.cat((of_image.new_full((of_image.shape[0], 1), number), of_image), dim=1))
    return torch.cat(joined)
