"""The public face of the ops: arguments are checked here, then the chosen backend computes.

Every function takes float32, float64, float16 and bfloat16, contiguous or not. Half-precision inputs are computed in
float32 and give a float32 result (their gradients come back in their own dtype); autocast doesn't change that.

Types, shapes, dtypes, devices and options are checked before any kernel runs. Values of boxes and weights are read on
CPU tensors only: NaN, infinities, x2 < x1 and a batch index that isn't there raise a ValueError that names the row. On
CUDA tensors, where reading would wait for the device, and inside torch.compile and torch.export, an assertion is
queued ahead of the op instead. It fails with a RuntimeError, on CUDA at the next synchronisation, as device-side
assertions do. On other accelerators the caller answers for the values. The library's own kernels clamp a batch index
into [0, N), so that a wrong one never reads outside the features.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import backend
from ._checks import (
    LAYOUTS,
    Boxes,
    as_box_weights,
    as_output_size,
    as_rois,
    check_bool,
    check_choice,
    check_corners,
    check_float,
    check_int,
    check_pair,
    check_positive,
    check_sampling_ratio,
    compute_dtype,
    is_finite_number,
)

__all__ = [
    "MultiLossOutput",
    "combine_gradients",
    "gradient_gramian",
    "multi_loss",
    "multi_loss_jacobian",
    "multiscale_roi_perceptual_loss",
    "roi_perceptual_loss",
    "roi_windows",
]

CRITERIA = ("mse", "l1", "smooth_l1", "charbonnier")
REDUCTIONS = ("none", "sum", "mean")

# Term -> the smallest image side that it is defined for: its filter's size; for ms_ssim the window still has to fit
# after four halvings, as pytorch-msssim demands.
SMALLEST_SIDE = {"l1": 1, "mse": 1, "charbonnier": 1, "ssim": 11, "ms_ssim": 161, "edge": 3, "tv": 2}


class MultiLossOutput(NamedTuple):
    """What `multi_loss` returns.

    Attributes:
        total: Scalar, the weighted sum of the terms, differentiable in `input`.
        terms: Name of each term -> its value, unweighted, a detached scalar.
    """

    total: Tensor
    terms: dict[str, Tensor]


def roi_perceptual_loss(
    input: Tensor,
    target: Tensor,
    boxes: Boxes,
    output_size: int | Sequence[int] = 7,
    spatial_scale: float = 1.0,
    sampling_ratio: int = 2,
    aligned: bool = True,
    *,
    criterion: str = "mse",
    box_weights: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Difference of two feature maps, or two feature volumes, inside boxes only.

    With l_k the mean of criterion(roi_align(input) - roi_align(target)) over the C*P*P values of box k (C*P*P*P in
    volumes), and w_k its weight: "none" gives [w_k l_k], "sum" their sum, "mean" their sum over K. Unweighted, the mean
    with "mse" is F.mse_loss of the pooled tensors. RoIAlign is torchvision's (He et al., Mask R-CNN, arXiv:1703.06870,
    section 3), on volumes the same rule on a third axis, with trilinear interpolation; the loss is that of LIDnet
    (Chen et al., arXiv:2104.08845).

    Args:
        input: Features [N, C, H, W], or of volumes [N, C, D, H, W]. Differentiable.
        target: Features of `input`'s shape, dtype and device. Never gets a gradient, so it mustn't require one.
        boxes: As torchvision.ops.roi_align takes them, of any floating-point dtype and with no gradient:
            Tensor[K, 5] of (batch index, x1, y1, x2, y2), or N Tensors [L_i, 4] of (x1, y1, x2, y2). For volumes
            Tensor[K, 7] of (batch index, x1, y1, z1, x2, y2, z2), or N Tensors [L_i, 6]; z is along D. In pixels of
            the image, voxels of the volume; x1 <= x2. Parts outside the map read as torchvision clamps them: the
            border's value within one cell of it, 0 beyond.
        output_size: P, or rows and columns of bins; for volumes P, or depth, rows and columns.
        spatial_scale: Feature cells per pixel of the image, 1 / stride; on volumes the same along all three axes.
        sampling_ratio: Samples per bin and axis; -1 (or 0): ceil(bin size in cells), torchvision's adaptive rule.
        aligned: True for pixel-edge coordinates (a box over pixel column 3 alone is x1=3, x2=4); False for
            torchvision's legacy rule, without the half-cell shift and with sides of at least one cell.
        criterion: "mse", "l1", "smooth_l1" (beta 1) or "charbonnier" (sqrt(d^2 + eps^2), eps 1e-3).
        box_weights: w, floating-point Tensor[K] in the order of the boxes, without gradient. Default: ones.
        reduction: "none", "sum" or "mean".

    Returns:
        Scalar, or Tensor[K] for "none", in float32 (float64 for float64 features). Without boxes 0, or empty, with a
        zero gradient.

    Raises:
        TypeError: For an argument of another type or dtype than above.
        ValueError: For shapes, devices or options that don't fit, a target that requires a gradient, and, on the CPU,
            a box with NaN or infinite coordinates, with x2 < x1, y2 < y1 or z2 < z1 or with a batch index that isn't
            there (naming its row), or a weight that isn't finite.
        RuntimeError: For such a box or weight on CUDA tensors, where the device reports it without a synchronisation
            here, and inside torch.compile and torch.export. Kernels clamp the batch index rather than read outside.
    """
    check_pair(input, target, volumes=True)
    rois = as_rois(boxes, input)
    weights = as_box_weights(box_weights, rois)
    check_positive("spatial_scale", spatial_scale)
    check_bool("aligned", aligned)
    bins = check_pooling(output_size, sampling_ratio, criterion, reduction, dimensions=input.ndim - 2)
    with _without_autocast(input):
        return backend.implementation("roi_perceptual_loss", input.device)(
            input,
            target,
            rois,
            bins,
            float(spatial_scale),
            int(sampling_ratio),
            aligned,
            criterion=criterion,
            box_weights=weights,
            reduction=reduction,
        )


def multiscale_roi_perceptual_loss(
    inputs: Mapping[str, Tensor],
    targets: Mapping[str, Tensor],
    boxes: Boxes,
    image_sizes: Sequence[tuple[int, int]],
    output_size: int | Sequence[int] = 7,
    sampling_ratio: int = 2,
    aligned: bool = True,
    *,
    canonical_scale: float = 224,
    canonical_level: int = 4,
    criterion: str = "mse",
    box_weights: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """`roi_perceptual_loss` on a feature pyramid, each box on the one level that suits its size.

    Strides and levels are those of torchvision.ops.MultiScaleRoIAlign: a level's stride is the power of two nearest to
    the image's height over the level's, and a box w x h belongs to level floor(k0 + log2(sqrt(w h) / s0)) (stride 2^k;
    Lin et al., arXiv:1612.03144, eq. 1), clamped to the levels given. s0 = 224 puts every lesion on the finest level:
    choose `canonical_scale` for the sizes at hand. One thing differs by default: MultiScaleRoIAlign pools with
    aligned=False; here `aligned` is True as in `roi_perceptual_loss`, and aligned=False reproduces torchvision.

    Args:
        inputs: Name -> features [N, C_l, H_l, W_l], finest first, each level of twice the stride of the one before.
            Differentiable; a level that no box falls on gets a zero gradient.
        targets: The same names and shapes. Never get a gradient, so they mustn't require one.
        boxes: As in `roi_perceptual_loss`, in pixels of the images.
        image_sizes: (height, width) of each image; features are of a batch padded to the largest of them.
        output_size: As in `roi_perceptual_loss`.
        sampling_ratio: As in `roi_perceptual_loss`.
        aligned: As in `roi_perceptual_loss`.
        canonical_scale: s0, in pixels.
        canonical_level: k0, the level of a box of s0 x s0.
        criterion: As in `roi_perceptual_loss`.
        box_weights: As in `roi_perceptual_loss`.
        reduction: As in `roi_perceptual_loss`.

    Returns:
        As `roi_perceptual_loss`; "none" in the order of the boxes.

    Raises:
        TypeError: As `roi_perceptual_loss`.
        ValueError: As `roi_perceptual_loss`, and for no levels, names that differ, image sizes that don't number N, or
            strides that don't double from level to level.
    """
    if not inputs:
        raise ValueError("inputs must hold at least one level, got none")
    if set(inputs) != set(targets):
        raise ValueError(f"targets must have the levels of inputs, {sorted(inputs)}, got {sorted(targets)}")
    first_name, first = next(iter(inputs.items()))
    for name, level in inputs.items():
        check_pair(level, targets[name], f"inputs[{name!r}]", f"targets[{name!r}]")
        if (level.shape[0], level.dtype, level.device) != (first.shape[0], first.dtype, first.device):
            raise ValueError(
                f"inputs[{name!r}] must share batch size, dtype and device with inputs[{first_name!r}], "
                f"{first.shape[0]}, {first.dtype}, {first.device}, got {level.shape[0]}, {level.dtype}, {level.device}"
            )
    rois = as_rois(boxes, first)
    weights = as_box_weights(box_weights, rois)
    image_height = _check_pyramid(inputs, image_sizes)
    check_positive("canonical_scale", canonical_scale)
    check_int("canonical_level", canonical_level)
    check_bool("aligned", aligned)
    bins = check_pooling(output_size, sampling_ratio, criterion, reduction)
    with _without_autocast(first):
        return backend.implementation("multiscale_roi_perceptual_loss", first.device)(
            list(inputs.values()),
            [targets[name] for name in inputs],
            rois,
            image_height,
            bins,
            int(sampling_ratio),
            aligned,
            canonical_scale=float(canonical_scale),
            canonical_level=int(canonical_level),
            criterion=criterion,
            box_weights=weights,
            reduction=reduction,
        )


def roi_windows(images: Tensor, corners: Tensor, size: Sequence[int]) -> Tensor:
    """Windows of one size cut out of images; they may overlap.

    The gradient of a pixel is the sum over the windows that hold it, in their order: the same bits every time.

    Args:
        images: [N, C, H, W], or volumes [N, C, D, H, W]. Differentiable.
        corners: int64 [K, 3], (image, first row, first column), or [K, 4], (image, first slice, row, column); on the
            images' device or on the CPU, from where it is copied.
        size: Rows and columns of the windows, or slices, rows and columns.

    Returns:
        [K, C, *size], of the images' dtype.

    Raises:
        TypeError: For images that aren't floating-point, or corners that aren't int64.
        ValueError: For shapes that don't fit, a size that isn't at least 1 and at most the images', and, for corners
            on the CPU, a window that leaves the images (naming its row). On CUDA such a window is moved inside.
    """
    check_float("images", images)
    if images.ndim not in LAYOUTS:
        raise ValueError(f"images must be {' or '.join(LAYOUTS.values())}, got shape {tuple(images.shape)}")
    lengths = as_output_size(size, images.ndim - 2, "size")
    if any(length > side for length, side in zip(lengths, images.shape[2:], strict=True)):
        raise ValueError(f"size must be at most the images', {tuple(images.shape[2:])}, got {lengths}")
    check_corners(corners, images, lengths)
    return backend.implementation("roi_windows", images.device)(images, corners.to(images.device), lengths)


def multi_loss(
    input: Tensor,
    target: Tensor,
    weights: Mapping[str, float],
    *,
    boxes: Boxes | None = None,
    roi_weight: float = 1.0,
    data_range: float = 1.0,
) -> MultiLossOutput:
    """Several pixel losses of one pair of images at once, total = sum over terms of weight * term.

    Terms, with d = input - target and means over all elements:

    - "l1": mean |d|; "mse": mean d^2; "charbonnier": mean sqrt(d^2 + 1e-6).
    - "ssim": 1 - SSIM (Wang et al. 2004, eq. 13), Gaussian window 11x11, sigma 1.5, valid padding, K1 .01, K2 .03,
      averaged over images and channels: pytorch_msssim.ssim with size_average. torchmetrics pads by reflection
      instead; the two agree on the pixels at least 5 from the border.
    - "ms_ssim": 1 - MS-SSIM (Wang, Simoncelli, Bovik 2003, eq. 7), five scales, weights .0448, .2856, .3001, .2363,
      .1333, 2x2 average pooling (zero-padded on both sides where a side is odd), negative similarities cut to
      0, where the gradient is 0 too: pytorch_msssim.ms_ssim.
    - "edge": mean |Sx d| + mean |Sy d|, 3x3 Sobel filters ([1 2 1] x [-1 0 1], unnormalised), valid padding.
    - "tv": mean |horizontal differences| + mean |vertical differences| of the input alone.

    With boxes, l1, mse and charbonnier become weighted means, sum(w v) / sum(w) over the whole batch, with w =
    `roi_weight` for a pixel whose centre lies in the union of its image's boxes and 1 elsewhere.

    On volumes every window and filter has a third axis: SSIM's window is 11x11x11, "edge" sums the means of three Sobel
    filters ([-1 0 1] along one axis, [1 2 1] along the other two), "tv" those of three differences.

    Args:
        input: Images [N, C, H, W] or volumes [N, C, D, H, W]. Differentiable.
        target: Images of `input`'s shape, dtype and device. Never gets a gradient, so it mustn't require one. NaN in
            either image makes the total and the terms that read the pixel NaN.
        weights: Term -> finite weight. A term of weight 0 is measured without contributing.
        boxes: As in `roi_perceptual_loss`, in pixel-edge coordinates; no minimal size.
        roi_weight: Weight of a pixel inside the boxes, above 0.
        data_range: Largest minus smallest possible pixel value (1 for windowed images), for ssim and ms_ssim.

    Returns:
        MultiLossOutput(total, terms), scalars in float32 (float64 for float64 images).

    Raises:
        TypeError: For an argument of another type or dtype than above.
        ValueError: For shapes, devices or options that don't fit, an unknown term, an image too small for a term
            (naming it), a target that requires a gradient, and boxes as in `roi_perceptual_loss`.
    """
    if not isinstance(weights, Mapping):
        raise TypeError(f"weights must map terms to numbers, got {type(weights).__name__}")
    check_term_weights(weights)
    rois = _check_images(input, target, tuple(weights), boxes, roi_weight, data_range)
    with _without_autocast(input):
        total, terms = backend.implementation("multi_loss", input.device)(
            input,
            target,
            weights,
            rois=rois,
            roi_weight=float(roi_weight),
            data_range=float(data_range),
            dtype=compute_dtype(input.dtype),
        )
    return MultiLossOutput(total, terms)


def multi_loss_jacobian(
    input: Tensor,
    target: Tensor,
    terms: Sequence[str],
    *,
    boxes: Boxes | None = None,
    roi_weight: float = 1.0,
    data_range: float = 1.0,
) -> Tensor:
    """The gradient in `input` of each term of `multi_loss` by itself, unweighted.

    Args:
        input: As in `multi_loss`; the result isn't differentiable in it.
        target: As in `multi_loss`.
        terms: T names of terms.
        boxes: As in `multi_loss`.
        roi_weight: As in `multi_loss`.
        data_range: As in `multi_loss`.

    Returns:
        Tensor[T, *input.shape] in the order of `terms`, in float32 (float64 for float64 images): the gradient of a mean
        over millions of pixels would vanish in half precision.

    Raises:
        TypeError: As `multi_loss`.
        ValueError: As `multi_loss`.
    """
    if isinstance(terms, str):
        raise TypeError(f"terms must be a sequence of names, got the string {terms!r}")
    _check_terms("terms", terms)
    rois = _check_images(input, target, terms, boxes, roi_weight, data_range)
    with _without_autocast(input):
        return backend.implementation("multi_loss_jacobian", input.device)(
            input,
            target,
            terms,
            rois=rois,
            roi_weight=float(roi_weight),
            data_range=float(data_range),
            dtype=compute_dtype(input.dtype),
        )


def gradient_gramian(gradients: Tensor, *, per_sample: bool = False) -> Tensor:
    """Inner products of T gradients of one tensor, G[i, j] = <g_i, g_j> over all elements, or over each sample's.

    Args:
        gradients: Tensor[T, ...], at least two dimensions, T >= 1; for example from `multi_loss_jacobian`. With
            `per_sample` Tensor[T, N, ...], at least three.
        per_sample: Whether each of N samples gets a Gramian of its own.

    Returns:
        Tensor[T, T], with `per_sample` Tensor[N, T, T], in float32 (float64 for float64 gradients). Differentiable.

    Raises:
        TypeError: If `gradients` isn't a floating-point Tensor, or `per_sample` not a bool.
        ValueError: If it has too few dimensions or no gradient in it.
    """
    check_bool("per_sample", per_sample)
    _check_gradients(gradients, "[T, N, ...]" if per_sample else "[T, ...]")
    with _without_autocast(gradients):
        return backend.implementation("gradient_gramian", gradients.device)(
            gradients, compute_dtype(gradients.dtype), per_sample
        )


def combine_gradients(gradients: Tensor, coefficients: Tensor) -> Tensor:
    """Linear combination of T gradients, sum over t of coefficients[t] * gradients[t].

    Args:
        gradients: Tensor[T, ...], at least two dimensions, T >= 1.
        coefficients: Floating-point Tensor[T] on the same device.

    Returns:
        Tensor[...] in the dtype of `gradients`, summed in float32 (float64 for float64 gradients).

    Raises:
        TypeError: If an argument isn't a floating-point Tensor.
        ValueError: If the shapes or devices don't fit.
    """
    _check_gradients(gradients)
    check_float("coefficients", coefficients)
    if coefficients.shape != gradients.shape[:1]:
        raise ValueError(
            f"coefficients must have shape ({gradients.shape[0]},), one per gradient, got {tuple(coefficients.shape)}"
        )
    if coefficients.device != gradients.device:
        raise ValueError(
            f"coefficients must be on the device of gradients, {gradients.device}, got {coefficients.device}"
        )
    with _without_autocast(gradients):
        return backend.implementation("combine_gradients", gradients.device)(
            gradients, coefficients, compute_dtype(gradients.dtype)
        )


def check_term_weights(weights: Mapping[str, float]) -> None:
    """Weights of `multi_loss`: at least one, known terms, finite numbers.

    Raises:
        ValueError: Naming the term that isn't.
    """
    _check_terms("weights", tuple(weights))
    for name, weight in weights.items():
        if not is_finite_number(weight):
            raise ValueError(f"weights[{name!r}] must be a finite number, got {weight!r}")


def check_pooling(
    output_size: int | Sequence[int], sampling_ratio: int, criterion: str, reduction: str, *, dimensions: int = 2
) -> tuple[int, ...]:
    """Options of `roi_perceptual_loss` that need no tensors; returns the number of bins along each of the dimensions.

    Raises:
        ValueError: Naming the option that isn't one.
    """
    check_sampling_ratio(sampling_ratio)
    check_choice("criterion", criterion, CRITERIA)
    check_choice("reduction", reduction, REDUCTIONS)
    return as_output_size(output_size, dimensions)


def _check_terms(argument: str, names: Sequence[str]) -> None:
    if not names:
        raise ValueError(f"{argument} must name at least one term, got none")
    for name in names:
        check_choice(f"a term of {argument}", name, SMALLEST_SIDE)


def _check_images(
    input: Tensor, target: Tensor, terms: Sequence[str], boxes: Boxes | None, roi_weight: float, data_range: float
) -> Tensor | None:
    check_pair(input, target, volumes=True)
    if input.shape[0] == 0:
        raise ValueError(f"input must hold at least one image, got shape {tuple(input.shape)}")
    for name in terms:
        if min(input.shape[2:]) < SMALLEST_SIDE[name]:
            sides = " x ".join(map(str, input.shape[2:]))
            raise ValueError(f"term {name!r} needs images of at least {SMALLEST_SIDE[name]} pixels a side, got {sides}")
    check_positive("roi_weight", roi_weight)
    check_positive("data_range", data_range)
    return None if boxes is None else as_rois(boxes, input)


def _check_pyramid(inputs: Mapping[str, Tensor], image_sizes: Sequence[tuple[int, int]]) -> int:
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


def _check_gradients(gradients: Tensor, shape: str = "[T, ...]") -> None:
    check_float("gradients", gradients)
    if gradients.ndim <= shape.count(",") or gradients.shape[0] == 0:
        raise ValueError(f"gradients must have shape {shape} with T >= 1, got {tuple(gradients.shape)}")


def _without_autocast(tensor: Tensor) -> torch.autocast:
    """Autocast off: the ops choose the dtype of their arithmetic themselves."""
    return torch.autocast(tensor.device.type, enabled=False)
