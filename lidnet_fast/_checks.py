"""Checks of the ops' arguments. Each raises a one-line error that names the argument and the offending value.

Types, shapes, dtypes, devices and options are checked everywhere, before any kernel runs. Values of boxes and weights
are read on CPU tensors only, where the error names the row. Reading them would synchronise an accelerator, and can't
be done while torch.compile or torch.export traces. On CUDA, and in what was traced, an assertion is queued ahead of the
op instead (by the op `check_boxes`, or torch._assert_async); it says that some box is bad, but not which. On other
accelerators nothing looks at the values. Kernels rely on neither: they clamp a batch index into [0, N) and never read
outside the features.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lidnet_fast._plausibility import has_values
from lidnet_fast._tensors import in_forward_mode

FLOAT_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

# Number of dimensions -> what features or images with that many are.
LAYOUTS = {4: "[N, C, H, W]", 5: "[N, C, D, H, W]"}

Boxes = Tensor | Sequence[Tensor]


def check_float(name: str, tensor: Tensor) -> None:
    """`tensor` is a floating-point Tensor."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(tensor).__name__}{to_tensor_remedy(name, tensor)}")
    if tensor.dtype not in FLOAT_DTYPES:
        remedy = "" if tensor.is_complex() else f". To fix: {name}.float()"
        raise TypeError(f"{name} must be float32, float64, float16 or bfloat16, got {tensor.dtype}{remedy}")


def to_tensor_remedy(name: str, value: Any) -> str:
    """The remedy for arrays and lists, which aren't Tensors."""
    if hasattr(value, "__array__"):
        return f". To fix: torch.as_tensor({name})"
    if isinstance(value, list | tuple) and value:
        return f". To fix: torch.{'stack' if isinstance(value[0], Tensor) else 'tensor'}({name})"
    return ""


def check_features(name: str, tensor: Tensor, *, volumes: bool = False) -> None:
    """`tensor` is floating-point [N, C, H, W], or with `volumes` also [N, C, D, H, W], and C, D, H, W > 0."""
    check_float(name, tensor)
    dimensions = tuple(LAYOUTS) if volumes else (4,)
    if tensor.ndim not in dimensions:
        numbers, layouts = " or ".join(map(str, dimensions)), " or ".join(LAYOUTS[n] for n in dimensions)
        raise ValueError(f"{name} must have {numbers} dimensions, {layouts}, got shape {tuple(tensor.shape)}")
    if 0 in tensor.shape[1:]:
        sides = "C, H and W" if tensor.ndim == 4 else "C, D, H and W"
        raise ValueError(f"{name} must have {sides} of at least 1, got shape {tuple(tensor.shape)}")


def check_pair(
    input: Tensor, target: Tensor, input_name: str = "input", target_name: str = "target", *, volumes: bool = False
) -> None:
    """Both are as `check_features` says, alike in shape, dtype and device, and `target` needs no gradient."""
    check_features(input_name, input, volumes=volumes)
    check_features(target_name, target, volumes=volumes)
    if input.shape != target.shape:
        raise ValueError(
            f"{target_name} must have the shape of {input_name}, {tuple(input.shape)}, got {tuple(target.shape)}"
        )
    if input.dtype != target.dtype:
        raise TypeError(f"{target_name} must have the dtype of {input_name}, {input.dtype}, got {target.dtype}")
    if input.device != target.device:
        raise ValueError(f"{target_name} must be on the device of {input_name}, {input.device}, got {target.device}")
    check_constant(target_name, target)


def check_constant(name: str, tensor: Tensor) -> None:
    """Nothing is differentiated in `tensor`, neither backward nor forward."""
    if tensor.requires_grad:
        raise ValueError(f"{name} requires a gradient but never gets one. To fix: pass {name}.detach()")
    if has_tangent(tensor):
        raise NotImplementedError(f"{name} has a tangent, but nothing is differentiated in it. To fix: {name}.detach()")


def has_tangent(tensor: Tensor) -> bool:
    """Whether forward-mode differentiation (torch.func.jvp, dual numbers) moves `tensor`."""
    return in_forward_mode() and forward_ad.unpack_dual(tensor).tangent is not None


def check_levels(inputs: Mapping[str, Tensor], *, same_channels: bool = False) -> Tensor:
    """Levels [N, C_l, H_l, W_l] that share batch size, dtype, device and, if told so, channels; returns the first."""
    if not inputs:
        raise ValueError("inputs must hold at least one level, got none")
    first_name, first = next(iter(inputs.items()))
    for name, level in inputs.items():
        check_features(f"inputs[{name!r}]", level)
        if (level.shape[0], level.dtype, level.device) != (first.shape[0], first.dtype, first.device):
            raise ValueError(
                f"inputs[{name!r}] must share batch size, dtype and device with inputs[{first_name!r}], "
                f"{first.shape[0]}, {first.dtype}, {first.device}, got {level.shape[0]}, {level.dtype}, {level.device}"
            )
        if same_channels and level.shape[1] != first.shape[1]:
            raise ValueError(
                f"inputs[{name!r}] must have the channels of inputs[{first_name!r}], {first.shape[1]}, "
                f"got {level.shape[1]}"
            )
    return first


def check_pyramid(inputs: Mapping[str, Tensor], image_sizes: Sequence[tuple[int, int]]) -> int:
    """Levels of doubling strides, finest first, of as many images as there are sizes; returns the largest height."""
    images = next(iter(inputs.values())).shape[0]
    if images == 0:
        raise ValueError("inputs must hold at least one image, got a batch of 0")
    if len(image_sizes) != images:
        raise ValueError(f"image_sizes must have one (height, width) per image, {images}, got {len(image_sizes)}")
    for number, size in enumerate(image_sizes):
        if not isinstance(size, Sequence):
            raise TypeError(f"image_sizes[{number}] must be (height, width), got {size!r}")
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"image_sizes[{number}] must be (height, width), both at least 1, got {tuple(size)}")
    height = max(int(size[0]) for size in image_sizes)
    strides = [round(math.log2(height / level.shape[2])) for level in inputs.values()]
    if strides != list(range(strides[0], strides[0] + len(strides))):
        powers = ", ".join(f"{name!r}: 2^{stride}" for name, stride in zip(inputs, strides, strict=True))
        raise ValueError(f"inputs must be levels of doubling strides, finest first, got {powers}")
    return height


def as_output_size(output_size: int | Sequence[int], dimensions: int = 2, name: str = "output_size") -> tuple[int, ...]:
    """Rows and columns, or depth, rows and columns, all at least 1, from one number or one of each."""
    sizes = tuple(output_size) if isinstance(output_size, Sequence) else (output_size,) * dimensions
    if len(sizes) != dimensions or not all(_is_integer(size) and size >= 1 for size in sizes):
        several = {2: "two of them (rows, columns)", 3: "three of them (depth, rows, columns)"}[dimensions]
        raise ValueError(f"{name} must be an int >= 1 or {several}, got {output_size!r}")
    return tuple(int(size) for size in sizes)


def check_corners(corners: Tensor, images: Tensor, size: Sequence[int]) -> None:
    """int64 [K, 1 + axes], (image, first cell along each axis), of windows of `size` inside `images`."""
    if not isinstance(corners, Tensor) or corners.dtype != torch.int64:
        kind = corners.dtype if isinstance(corners, Tensor) else type(corners).__name__
        raise TypeError(f"corners must be an int64 Tensor, got {kind}")
    if corners.ndim != 2 or corners.shape[1] != images.ndim - 1:
        raise ValueError(f"corners must have shape [windows, {images.ndim - 1}], got {tuple(corners.shape)}")
    if corners.device.type != "cpu" and corners.device != images.device:
        raise ValueError(f"corners must be on the CPU or on {images.device}, got {corners.device}")
    if not _values_can_be_read(corners):
        return
    most = torch.tensor(
        [images.shape[0] - 1, *(side - n for side, n in zip(images.shape[2:], size, strict=True))], device="cpu"
    )
    inside = ((corners >= 0) & (corners <= most)).all(1)
    if not bool(inside.all()):
        row = int((~inside).nonzero()[0])
        raise ValueError(
            f"corners[{row}] must lie between 0 and {tuple(most.tolist())} for windows of {tuple(size)}, "
            f"got {tuple(corners[row].tolist())}"
        )


def check_sampling_ratio(sampling_ratio: int) -> None:
    """Samples per bin and axis, or -1 or 0 for the adaptive rule."""
    if not _is_integer(sampling_ratio) or sampling_ratio < -1:
        raise ValueError(f"sampling_ratio must be an int >= 1, or -1 or 0 (adaptive), got {sampling_ratio!r}")


def check_int(name: str, value: int) -> None:
    """`value` is an integer, and not a truth value."""
    if not _is_integer(value):
        raise ValueError(f"{name} must be an int, got {value!r}")


def check_bool(name: str, value: bool) -> None:
    """`value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_choice(name: str, value: str, choices: Collection[str]) -> None:
    """`value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def check_positive(name: str, value: float) -> None:
    """`value` is a finite number above 0."""
    _check_scalar(name, value)
    if not is_finite_number(value) or value <= 0:
        raise ValueError(f"{name} must be a finite number above 0, got {value!r}")


def check_finite(name: str, value: float) -> None:
    """`value` is a finite number."""
    _check_scalar(name, value)
    if not is_finite_number(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")


def is_finite_number(value: Any) -> bool:
    """Whether `value` is a number, NumPy's and a Tensor's included, that a float can hold; True and False aren't."""
    if isinstance(value, Tensor):
        value = value.item() if value.ndim == 0 else None
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


def _check_scalar(name: str, value: Any) -> None:
    if isinstance(value, Tensor):
        check_constant(name, value)


def _is_integer(value: Any) -> bool:
    """Whether `value` is an int, or an integer of NumPy or in a Tensor; True and False aren't."""
    if isinstance(value, Tensor):
        value = value.item() if value.ndim == 0 else None
    return isinstance(value, Integral) and not isinstance(value, bool)


def _check_format(name: str, boxes: Tensor) -> None:
    from torchvision.tv_tensors import BoundingBoxes, BoundingBoxFormat  # not needed by most who import this module

    if isinstance(boxes, BoundingBoxes) and boxes.format is not BoundingBoxFormat.XYXY:
        raise ValueError(
            f"{name} must have the format XYXY, got {boxes.format.value}. "
            f"To fix: torchvision.transforms.v2.functional.convert_bounding_box_format({name}, new_format='XYXY')"
        )


def check_box_tensor(name: str, boxes: Tensor, width: int, input: Tensor) -> None:
    """Boxes are floating-point [boxes, width] on the device of `input`, and nothing is differentiated in them.

    Those that say in which order their coordinates are, as torchvision's do, say x1, y1, x2, y2.
    """
    check_float(name, boxes)
    if boxes.ndim != 2 or boxes.shape[1] != width:
        kind = "images" if input.ndim == 4 else "volumes"
        remedy = ""
        if width % 2 and boxes.ndim == 2 and boxes.shape[1] == width - 1:
            remedy = f". To fix: put the batch index into column 0, or pass a list of one [L, {width - 1}] per image"
        elif boxes.shape == (0,):
            remedy = f". To fix: without boxes, torch.zeros(0, {width})"
        raise ValueError(f"{name} must have shape [boxes, {width}] for {kind}, got {tuple(boxes.shape)}{remedy}")
    if type(boxes) is not Tensor:
        _check_format(name, boxes)
    if boxes.device != input.device:
        raise ValueError(f"{name} must be on the device of the images or features, {input.device}, got {boxes.device}")
    check_constant(name, boxes)


def check_box_weights(box_weights: Tensor, boxes: int, device: torch.device) -> None:
    """Weights are floating-point [boxes] on the device, and nothing is differentiated in them."""
    check_float("box_weights", box_weights)
    if box_weights.ndim != 1:
        raise ValueError(f"box_weights must have 1 dimension, got shape {tuple(box_weights.shape)}")
    if box_weights.shape[0] != boxes:
        raise ValueError(f"box_weights must have one value per box, {boxes}, got {box_weights.shape[0]}")
    if box_weights.device != device:
        raise ValueError(f"box_weights must be on the device of the features, {device}, got {box_weights.device}")
    check_constant("box_weights", box_weights)


WEIGHTS_RULE = "box_weights must be finite"


def boxes_rule(axes: int) -> str:
    """What `check_box_values` asks of boxes along so many axes, in words."""
    return f"boxes must have finite coordinates, {_order(axes)} and integer batch indices of the input"


def largest_coordinate(dtype: torch.dtype, spatial_scale: float) -> float:
    """What coordinates have to be less than, so that they stay finite once times `spatial_scale`."""
    return torch.finfo(dtype).max / max(spatial_scale, 1.0)


def _order(axes: int) -> str:
    return " and ".join(f"{axis}2 >= {axis}1" for axis in "xyz"[:axes])


def check_weight_values(box_weights: Tensor) -> None:
    """Weights [K] are finite."""
    finite = box_weights.isfinite()
    if not _values_can_be_read(box_weights):
        _assert_on_device(finite.all(), WEIGHTS_RULE)
    elif not bool(finite.all()):
        row = int((~finite).nonzero()[0])
        raise ValueError(f"box_weights[{row}] must be finite, got {box_weights[row].item()}")


def check_box_values(
    rois: Tensor, images: int, spatial_scale: float, lengths: Sequence[int] | None
) -> tuple[list[float], list[float]] | None:
    """Boxes [K, 5] or [K, 7] have finite coordinates, in order, and the batch index of an image.

    Args:
        rois: The boxes.
        images: In the batch.
        spatial_scale: What the op multiplies coordinates by; they must stay finite.
        lengths: How many boxes each image gave, if they came as a list.

    Returns:
        The least and the largest value of each column, where they can be read and there are some.
    """
    largest, axes = largest_coordinate(rois.dtype, spatial_scale), rois.shape[1] // 2
    index, lower, upper = rois[:, 0], rois[:, 1 : 1 + axes], rois[:, 1 + axes :]
    # The rules below, of the columns' ends alone, in half the time; NaN fails every comparison.
    if has_values(rois) and len(rois):
        least, most = (ends.tolist() for ends in torch.aminmax(rois, dim=0))
        finite_ends = min(least[1:]) > -largest and max(most[1:]) < largest
        whole = lengths is not None or torch.equal(index, index.floor())
        if finite_ends and least[0] >= 0 and most[0] < images and whole and float((upper - lower).min()) >= 0:
            return least, most
    ordered, finite = upper >= lower, rois[:, 1:].abs() < largest
    present = (index >= 0) & (index < images) & (index == index.floor())
    sound = ordered.all() & finite.all() & present.all()
    if not _values_can_be_read(rois):
        _assert_on_device(sound, boxes_rule(axes))
        return None
    if bool(sound):
        return None
    finite = finite.all(1)
    wrong = ~(finite & ordered.all(1))
    row = int((wrong if bool(wrong.any()) else ~present).nonzero()[0])
    name = f"boxes[{row}]"
    if lengths is not None:
        image = int(index[row])
        name = f"boxes[{image}][{row - sum(lengths[:image])}]"
    if not bool(wrong[row]):
        raise ValueError(f"{name} must have an integer batch index in [0, {images}), got {index[row].item()}")
    corners = ", ".join(f"{axis}{end}" for end in (1, 2) for axis in "xyz"[:axes])
    scaled = "" if spatial_scale == 1 else f" (once times spatial_scale, {spatial_scale})"
    need = _order(axes) if bool(finite[row]) else f"finite coordinates{scaled}"
    raise ValueError(f"{name} must have {need}, got ({corners}) = {tuple(rois[row, 1:].tolist())}")


def _values_can_be_read(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and not _is_batched(tensor)


def _assert_on_device(sound: Tensor, message: str) -> None:
    """Has the device fail with `message` if `sound` is false, without waiting for it; not on every kind of device."""
    if sound.device.type in ("cpu", "cuda") and (torch.compiler.is_compiling() or not _is_batched(sound)):
        torch._assert_async(sound, message)


def _is_batched(tensor: Tensor) -> bool:
    """Whether torch.vmap batches `tensor`, at any level: it has no values to read then, and the op refuses it."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        if torch._C._functorch.is_batchedtensor(tensor):
            return True
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return False
