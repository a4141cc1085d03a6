"""Checks of the ops' arguments. Each raises a one-line error that names the argument and the offending value.

Shapes, dtypes, devices and options are checked everywhere. Values of tensors are checked on CPU tensors only, because
looking at them would synchronise an accelerator, and not while torch.compile traces.
"""

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

Boxes = Tensor | Sequence[Tensor]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that an op computes in and returns: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_float(name: str, tensor: Tensor, dimensions: int | None = None) -> None:
    """`tensor` is a floating-point Tensor, with so many dimensions."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be float32, float64, float16 or bfloat16, got {tensor.dtype}")
    if dimensions is not None and tensor.ndim != dimensions:
        raise ValueError(f"{name} must have {dimensions} dimensions, got shape {tuple(tensor.shape)}")


def check_pair(input: Tensor, target: Tensor, input_name: str = "input", target_name: str = "target") -> None:
    """Both are [N, C, H, W] with C, H, W > 0, alike in shape, dtype and device, and `target` needs no gradient."""
    check_float(input_name, input, 4)
    check_float(target_name, target, 4)
    if 0 in input.shape[1:]:
        raise ValueError(f"{input_name} must have C, H and W of at least 1, got shape {tuple(input.shape)}")
    if input.shape != target.shape:
        raise ValueError(
            f"{target_name} must have the shape of {input_name}, {tuple(input.shape)}, got {tuple(target.shape)}"
        )
    if input.dtype != target.dtype:
        raise TypeError(f"{target_name} must have the dtype of {input_name}, {input.dtype}, got {target.dtype}")
    if input.device != target.device:
        raise ValueError(f"{target_name} must be on the device of {input_name}, {input.device}, got {target.device}")
    if target.requires_grad:
        raise ValueError(f"{target_name} requires a gradient but never gets one: pass {target_name}.detach()")


def as_rois(boxes: Boxes, input: Tensor) -> Tensor:
    """Boxes checked against `input` [N, C, H, W] and brought to one form: Tensor[K, 5] in the dtype of the arithmetic.

    Args:
        boxes: Tensor[K, 5] of (batch index, x1, y1, x2, y2), or N Tensors [L_i, 4] of (x1, y1, x2, y2).
        input: Gives the batch size, the device and, by `compute_dtype`, the dtype.
    """
    dtype, images = compute_dtype(input.dtype), input.shape[0]
    if isinstance(boxes, Tensor):
        _check_box_tensor("boxes", boxes, 5, input.device)
        rois = boxes.detach().to(dtype)
        if _values_can_be_read(rois):
            _check_box_values("boxes", rois[:, 1:])
            _check_batch_index(rois[:, 0], images)
        return rois
    if not isinstance(boxes, Sequence):
        raise TypeError(f"boxes must be a Tensor[K, 5] or a list of Tensor[L, 4], got {type(boxes).__name__}")
    if len(boxes) != images:
        raise ValueError(f"boxes must be a list of one Tensor per image, {images}, got {len(boxes)}")
    parts = [input.new_zeros((0, 5), dtype=dtype)]
    for number, of_image in enumerate(boxes):
        _check_box_tensor(f"boxes[{number}]", of_image, 4, input.device)
        corners = of_image.detach().to(dtype)
        if _values_can_be_read(corners):
            _check_box_values(f"boxes[{number}]", corners)
        parts.append(torch.cat((corners.new_full((corners.shape[0], 1), number), corners), dim=1))
    return torch.cat(parts)


def as_box_weights(box_weights: Tensor | None, rois: Tensor) -> Tensor | None:
    """Weights of the boxes checked against `rois` [K, 5]: Tensor[K] in its dtype, or None."""
    if box_weights is None:
        return None
    check_float("box_weights", box_weights, 1)
    if box_weights.shape[0] != rois.shape[0]:
        raise ValueError(f"box_weights must have one value per box, {rois.shape[0]}, got {box_weights.shape[0]}")
    if box_weights.device != rois.device:
        raise ValueError(f"box_weights must be on the device of the features, {rois.device}, got {box_weights.device}")
    if box_weights.requires_grad:
        raise ValueError("box_weights requires a gradient but never gets one: pass box_weights.detach()")
    if _values_can_be_read(box_weights) and not bool(box_weights.isfinite().all()):
        row = int((~box_weights.isfinite()).nonzero()[0])
        raise ValueError(f"box_weights[{row}] must be finite, got {box_weights[row].item()}")
    return box_weights.to(rois.dtype)


def as_output_size(output_size: int | Sequence[int]) -> tuple[int, int]:
    """Rows and columns of bins, both at least 1, from one number or two."""
    pair = tuple(output_size) if isinstance(output_size, Sequence) else (output_size, output_size)
    if len(pair) != 2 or not all(isinstance(size, int) and size >= 1 for size in pair):
        raise ValueError(f"output_size must be an int >= 1 or two of them, got {output_size!r}")
    return pair[0], pair[1]


def check_sampling_ratio(sampling_ratio: int) -> None:
    """Samples per bin and axis, or -1 or 0 for the adaptive rule."""
    if not isinstance(sampling_ratio, int) or sampling_ratio < -1:
        raise ValueError(f"sampling_ratio must be an int >= 1, or -1 or 0 (adaptive), got {sampling_ratio!r}")


def check_choice(name: str, value: str, choices: Collection[str]) -> None:
    """`value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def check_positive(name: str, value: float) -> None:
    """`value` is a finite number above 0."""
    if not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
        raise ValueError(f"{name} must be a finite number above 0, got {value!r}")


def _check_box_tensor(name: str, boxes: Tensor, width: int, device: torch.device) -> None:
    check_float(name, boxes)
    if boxes.ndim != 2 or boxes.shape[1] != width:
        raise ValueError(f"{name} must have shape [boxes, {width}], got {tuple(boxes.shape)}")
    if boxes.device != device:
        raise ValueError(f"{name} must be on the device of the images or features, {device}, got {boxes.device}")


def _values_can_be_read(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _check_box_values(name: str, corners: Tensor) -> None:
    finite = corners.isfinite().all(1)
    ordered = (corners[:, 2:] >= corners[:, :2]).all(1)
    wrong = ~(finite & ordered)
    if not bool(wrong.any()):
        return
    row = int(wrong.nonzero()[0])
    rule = "x2 >= x1 and y2 >= y1" if bool(finite[row]) else "finite coordinates"
    raise ValueError(f"{name}[{row}] must have {rule}, got (x1, y1, x2, y2) = {tuple(corners[row].tolist())}")


def _check_batch_index(index: Tensor, images: int) -> None:
    wrong = ~((index >= 0) & (index < images) & (index == index.floor()))
    if not bool(wrong.any()):
        return
    row = int(wrong.nonzero()[0])
    raise ValueError(f"boxes[{row}] must have an integer batch index in [0, {images}), got {index[row].item()}")
