"""Warnings of arguments that work but are probably a mistake: boxes outside the image, values of another unit.

They look at plain tensors on the CPU only, so they never wait for a device, and at nothing while PyTorch traces
(torch.compile, torch.export, torch.func, torch.jit). Of images they read about a hundred pixels.
"""

import sys
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lidnet_fast.errors import InputWarning

_PIXELS = 128
_WINDOWED = 4.0  # images in 0..1, or normalised, lie within -4..4
_MOST_SPAN = 1.5  # of the range: windowed images reach beyond it where they aren't clipped
_WIDE_RANGE = 100.0  # such as 0..255, or HU


def has_values(tensor: Tensor) -> bool:
    """Whether the values of `tensor` are on the CPU and nothing records what is asked of them."""
    return (
        not torch.compiler.is_compiling()
        and tensor.device.type == "cpu"
        and type(tensor) in (Tensor, nn.Parameter)
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._is_tracing()
    )


def boxes_inside(rois: Tensor, size: Sequence[int], spatial_scale: float = 1.0) -> Tensor:
    """Which boxes share an area with the map that they are on: bool [K].

    Args:
        rois: [K, 5], (batch index, x1, y1, x2, y2), or [K, 7] with z1 and z2.
        size: Of the map in cells: (height, width), or (depth, height, width).
        spatial_scale: Cells per unit of the boxes.
    """
    axes = len(size)
    inside = torch.ones_like(rois[:, 0], dtype=torch.bool)
    for axis, side in enumerate(reversed(size), start=1):
        inside = inside & (rois[:, axis] * spatial_scale < side) & (rois[:, axis + axes] > 0)
    return inside


def warn_of_boxes(
    rois: Tensor,
    ends: tuple[Sequence[float], Sequence[float]],
    size: Sequence[int],
    spatial_scale: float = 1.0,
    *,
    outside: bool = True,
    doubt: str = "",
) -> None:
    """Warn of boxes that lie outside the map, and of boxes in fractions of the image.

    Args:
        rois: As in `boxes_inside`, at least one, all finite, in memory that can be read.
        ends: The least and the largest value of each column.
        size: As in `boxes_inside`.
        spatial_scale: As in `boxes_inside`.
        outside: Whether boxes outside are worth a warning.
        doubt: What else than their unit to ask about boxes outside.
    """
    axes, sides, (least, most) = len(size), [side / spatial_scale for side in size], ends
    pixels = " x ".join(f"{side:.6g}" for side in sides)
    if max(most[1 + axes :]) <= 1 and min(sides) > 2:
        _warn(
            "boxes in fractions",
            f"every box lies within one pixel of the origin, the first is {_corners(rois[0])}, in images of {pixels} "
            "pixels. Are they in fractions of the image? To fix: multiply boxes by its width and height",
        )
    elif outside and not all(
        most[axis] < side and least[axis + axes] > 0 for axis, side in enumerate(reversed(sides), start=1)
    ):
        beyond = ~boxes_inside(rois, size, spatial_scale)
        _warn(
            "boxes outside",
            f"{int(beyond.sum())} of {len(rois)} boxes lie outside the images of {pixels} pixels, the first of them at "
            f"{_corners(rois[beyond][0])}. Are boxes in pixels of these images? {doubt}".rstrip(),
        )


def warn_of_range(images: Tensor, name: str, span: float, what: str, remedy: str) -> None:
    """Warn of images that hold far more than a range, or nearly nothing of a wide one.

    Args:
        images: [..., H, W].
        name: Of the argument.
        span: Largest less smallest value of the range.
        what: Where the range is from, "{}" for its span.
        remedy: What to do.
    """
    if not has_values(images) or not images.numel():
        return
    pixels = _sample(images)
    low, high = min(pixels), max(pixels)
    if high - low > _MOST_SPAN * span:
        ordered, few = sorted(pixels), len(pixels) // 50
        low, high = ordered[few], ordered[-1 - few]
        wrong = high - low > _MOST_SPAN * span
    else:
        wrong = span >= _WIDE_RANGE and _is_windowed(low, high)
    if wrong:
        sentence = f"{name} has values from {low:.4g} to {high:.4g}, but {what.format(f'{span:.4g}')}"
        _warn(what, f"{sentence}. To fix: {remedy}")


def warn_of_hu(images: Tensor) -> None:
    """Warn of images, [..., H, W], that can't be HU of a body: windowed ones, and a scanner's raw values."""
    if not has_values(images) or not images.numel():
        return
    pixels = _sample(images)
    low, high = min(pixels), max(pixels)
    raw = low >= -200 and sorted(pixels)[3 * len(pixels) // 4] > 500
    if raw or _is_windowed(low, high):
        cause = "raw DICOM values" if raw else "windowed"
        remedy = "apply RescaleSlope and RescaleIntercept" if raw else "undo the window"
        _warn(
            "values that aren't HU",
            f"hu has values from {low:.4g} to {high:.4g}, which can't be HU of a body. Are they {cause}? "
            f"To fix: {remedy}",
        )


def _sample(images: Tensor) -> list[float]:
    """Pixels from all over the images."""
    width = images.shape[-1]
    if not images.is_contiguous():
        step = max(1, int((images.numel() / _PIXELS) ** 0.5))
        return images[..., ::step, ::step].flatten().tolist()
    # In another column each time, by the golden ratio.
    step = max(1, images.numel() // _PIXELS // width * width + int(0.618 * width))
    return images.as_strided((-(-images.numel() // step),), (step,)).tolist()


def _is_windowed(low: float, high: float) -> bool:
    return -_WINDOWED <= low < high <= _WINDOWED


def _corners(roi: Tensor) -> str:
    return f"({', '.join(f'{corner:.6g}' for corner in roi[1:].tolist())})"


# (kind, file, line) -> the registry in which Python's warnings note what they have shown.
_registries: dict[tuple[str, str, int], dict] = {}


def _warn(kind: str, sentence: str) -> None:
    """Warn at the line that called the library; sentences of one kind count as one, whatever numbers they name."""
    frame = sys._getframe()
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in ("lidnet_fast", "torch"):
        frame = frame.f_back
    file, line, module = frame.f_code.co_filename, frame.f_lineno, frame.f_globals.get("__name__")
    registry = _registries.setdefault((kind, file, line), {})
    for shown in [key for key in registry if key != "version"]:
        registry[(sentence, *shown[1:])] = registry.pop(shown)
    warnings.warn_explicit(sentence, InputWarning, file, line, module, registry)
