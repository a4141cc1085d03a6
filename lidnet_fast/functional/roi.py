"""Features and images inside boxes: RoIAlign, the ROI perceptual losses, windows."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lidnet_fast import backend
from lidnet_fast._checks import (
    LAYOUTS,
    Boxes,
    as_output_size,
    check_bool,
    check_choice,
    check_corners,
    check_features,
    check_float,
    check_int,
    check_levels,
    check_pair,
    check_positive,
    check_pyramid,
    check_sampling_ratio,
)
from lidnet_fast._plausibility import boxes_inside
from lidnet_fast._tensors import reduce_boxes

from ._autocast import promote, without_autocast
from ._boxes import CheckedBoxes, check_boxes
from ._pooling import Pooling, level_areas, level_scale

CRITERIA = ("mse", "l1", "smooth_l1", "charbonnier")
REDUCTIONS = ("none", "sum", "mean")
OUTSIDE = ("keep", "ignore")
_MOST_KINDS = 32  # of windows that one launch cuts: their addresses are its arguments
_DOUBT_OF_SCALE = "Of features, is spatial_scale 1 / stride?"
_DOUBT_OF_SIZES = "Are image_sizes those of the images?"
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


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
    outside: str = "keep",
) -> Tensor:
    """Difference of two feature maps inside boxes; for torchvision's RoIAlign give aligned=False, sampling_ratio=-1.

    Those are the defaults of torchvision.ops.roi_align; here they are True and 2. Feature volumes are taken, too.

    With l_k the mean of criterion(roi_align(input) - roi_align(target)) over the C*P*P values of box k (C*P*P*P in
    volumes), and w_k its weight: "none" gives [w_k l_k], "sum" their sum, "mean" their sum over K. Unweighted, the mean
    with "mse" is F.mse_loss of the pooled tensors. RoIAlign is torchvision's (He et al., Mask R-CNN, arXiv:1703.06870,
    section 3), on volumes the same rule on a third axis, with trilinear interpolation; the loss is that of LIDnet
    (Chen et al., arXiv:2104.08845).

    Args:
        input: Features [N, C, H, W], or of volumes [N, C, D, H, W]. Differentiable.
        target: Features of `input`'s shape, dtype (within autocast of any) and device. Never gets a gradient, so it
            mustn't require one.
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
        outside: What becomes of boxes that share no area with the image. "keep": they count in the mean, and on the CPU
            an `InputWarning` tells how many they are. "ignore": they count for nothing; "none" gives 0.

    Returns:
        Scalar, or Tensor[K] for "none", in float32 (float64 for float64 features). Without boxes 0, or empty, with a
        zero gradient.

    Raises:
        TypeError: For an argument of another type or dtype than above.
        ValueError: For shapes, devices or options that don't fit, a target that requires a gradient, and, on the CPU,
            a box with NaN or infinite coordinates (also once times spatial_scale), with x2 < x1, y2 < y1 or z2 < z1 or
            with a batch index that isn't there (naming its row), or a weight that isn't finite.
        RuntimeError: For such a box or weight on CUDA tensors, where the device reports it without a synchronisation
            here, and inside torch.compile and torch.export. Kernels clamp the batch index rather than read outside.
    """
    input, target = promote(input, target)
    check_pair(input, target, volumes=True)
    check_positive("spatial_scale", spatial_scale)
    check_choice("outside", outside, OUTSIDE)
    check_bool("aligned", aligned)
    bins = check_pooling(output_size, sampling_ratio, criterion, reduction, dimensions=input.ndim - 2)
    checked = check_boxes(boxes, input, spatial_scale, box_weights=box_weights, outside=outside, doubt=_DOUBT_OF_SCALE)
    pooling = Pooling(None, [float(spatial_scale)], bins, int(sampling_ratio), aligned)
    return _loss([input], [target], checked, pooling, criterion, reduction, outside)


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
    outside: str = "keep",
) -> Tensor:
    """`roi_perceptual_loss` on a feature pyramid, each box on the one level that suits its size.

    Strides and levels are those of torchvision.ops.MultiScaleRoIAlign. A level's stride is the power of two nearest to
    the image's height over the level's. A box w x h belongs to level floor(k0 + log2(sqrt(w h) / s0)), of stride 2^k
    (Lin et al., arXiv:1612.03144, eq. 1), clamped to the levels given. With s0 = 224 every lesion is on the finest
    level: choose `canonical_scale` for the sizes at hand. One thing differs by default: MultiScaleRoIAlign pools with
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
        outside: As in `roi_perceptual_loss`.

    Returns:
        As `roi_perceptual_loss`; "none" in the order of the boxes.

    Raises:
        TypeError: As `roi_perceptual_loss`.
        ValueError: As `roi_perceptual_loss`, and for no levels, names that differ, image sizes that don't number N, or
            strides that don't double from level to level.
    """
    if inputs and set(inputs) != set(targets):
        raise ValueError(f"targets must have the levels of inputs, {sorted(inputs)}, got {sorted(targets)}")
    pairs = {name: promote(level, targets[name]) for name, level in inputs.items()}
    inputs, targets = ({name: pair[place] for name, pair in pairs.items()} for place in (0, 1))
    first = check_levels(inputs)
    for name, level in inputs.items():
        check_pair(level, targets[name], f"inputs[{name!r}]", f"targets[{name!r}]")
    check_choice("outside", outside, OUTSIDE)
    image_height = check_pyramid(inputs, image_sizes)
    check_positive("canonical_scale", canonical_scale)
    check_int("canonical_level", canonical_level)
    check_bool("aligned", aligned)
    bins = check_pooling(output_size, sampling_ratio, criterion, reduction)
    levels, scales = list(inputs.values()), [level_scale(level, image_height) for level in inputs.values()]
    checked = check_boxes(
        boxes,
        first,
        scales[0],
        box_weights=box_weights,
        level_areas=level_areas(scales, float(canonical_scale), int(canonical_level)),
        outside=outside,
        doubt=_DOUBT_OF_SIZES,
    )
    pooling = Pooling(checked.levels, scales, bins, int(sampling_ratio), aligned)
    return _loss(levels, [targets[name] for name in inputs], checked, pooling, criterion, reduction, outside)


def roi_align(
    input: Tensor,
    boxes: Boxes,
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
) -> Tensor:
    """Features pooled inside boxes: torchvision.ops.roi_align (He et al., Mask R-CNN, arXiv:1703.06870, section 3).

    Arguments, defaults and values are torchvision's; on volumes it is the same rule on a third axis. On the CPU the
    gradient is the same, bit by bit, every time and on any number of threads; on CUDA, where torchvision's kernel
    runs, it is summed in any order. Unlike torchvision's it goes to `input` only.

    Args:
        input: Features [N, C, H, W], or of volumes [N, C, D, H, W]. Differentiable.
        boxes: As in `roi_perceptual_loss`.
        output_size: P, or rows and columns of bins; for volumes P, or depth, rows and columns.
        spatial_scale: Feature cells per pixel of the image, 1 / stride; on volumes the same along all three axes.
        sampling_ratio: As in `roi_perceptual_loss`.
        aligned: As in `roi_perceptual_loss`.

    Returns:
        [K, C, P, P], or [K, C, P, P, P] of volumes, contiguous, in the dtype of `input`.

    Raises:
        TypeError: As `roi_perceptual_loss`.
        ValueError: As `roi_perceptual_loss`.
        RuntimeError: As `roi_perceptual_loss`.
    """
    check_features("input", input, volumes=True)
    check_positive("spatial_scale", spatial_scale)
    check_sampling_ratio(sampling_ratio)
    check_bool("aligned", aligned)
    bins = as_output_size(output_size, input.ndim - 2)
    rois = check_boxes(boxes, input, spatial_scale, doubt=_DOUBT_OF_SCALE).rois
    return _pool([input], rois, Pooling(None, [float(spatial_scale)], bins, int(sampling_ratio), aligned))


def multiscale_roi_align(
    inputs: Mapping[str, Tensor],
    boxes: Boxes,
    image_sizes: Sequence[tuple[int, int]],
    output_size: int | Sequence[int],
    sampling_ratio: int,
    *,
    canonical_scale: float = 224,
    canonical_level: int = 4,
) -> Tensor:
    """`roi_align` on a feature pyramid, each box on the one level that suits its size: MultiScaleRoIAlign's result.

    Strides and levels are found as in `multiscale_roi_perceptual_loss`; aligned is False, as in torchvision.

    Args:
        inputs: Name -> features [N, C, H_l, W_l], finest first, each level of twice the stride of the one before.
            Differentiable; a level that no box falls on gets a zero gradient.
        boxes: As in `roi_perceptual_loss`, in pixels of the images.
        image_sizes: (height, width) of each image; features are of a batch padded to the largest of them.
        output_size: P, or rows and columns of bins.
        sampling_ratio: As in `roi_perceptual_loss`.
        canonical_scale: s0, in pixels.
        canonical_level: k0, the level of a box of s0 x s0.

    Returns:
        [K, C, P, P] in the order of the boxes, in the dtype of `inputs`.

    Raises:
        TypeError: As `roi_perceptual_loss`.
        ValueError: As `roi_perceptual_loss`, and for no levels, levels that differ in batch size, channels, dtype or
            device, image sizes that don't number N, or strides that don't double from level to level.
        RuntimeError: As `roi_perceptual_loss`.
    """
    first = check_levels(inputs, same_channels=True)
    image_height = check_pyramid(inputs, image_sizes)
    check_sampling_ratio(sampling_ratio)
    check_positive("canonical_scale", canonical_scale)
    check_int("canonical_level", canonical_level)
    bins = as_output_size(output_size)
    levels, scales = list(inputs.values()), [level_scale(level, image_height) for level in inputs.values()]
    areas = level_areas(scales, float(canonical_scale), int(canonical_level))
    checked = check_boxes(boxes, first, scales[0], level_areas=areas, doubt=_DOUBT_OF_SIZES)
    return _pool(levels, checked.rois, Pooling(checked.levels, scales, bins, int(sampling_ratio), False))


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


def windows_of_pair(
    images: Tensor, targets: Tensor | None, corners: Tensor, counts: Sequence[int], sizes: Sequence[Sequence[int]]
) -> tuple[list[Tensor], list[Tensor]]:
    """Windows of arguments that are checked, kind by kind: of the images, and of targets, which get no gradient.

    On CUDA all are cut by one launch, and one adds their gradients.

    Args:
        images: As in `roi_windows`.
        targets: Of the shape and dtype of `images`, or None for no windows of theirs.
        corners: As in `roi_windows`, of all kinds, one after the other.
        counts: Windows of each kind.
        sizes: Of the windows of each kind.
    """
    of_pair: tuple[list[Tensor], list[Tensor]] = ([], [])
    fused = backend.kernel("windows_of_pair", images.device)
    if fused is None:
        cut = backend.implementation("roi_windows", images.device)
        kinds = list(zip(corners.split(list(counts)), sizes, strict=True))
        of_pair[0].extend(cut(images, of_kind, size) for of_kind, size in kinds)
        with torch.no_grad():
            of_pair[1].extend(cut(targets, of_kind, size) for of_kind, size in kinds if targets is not None)
        return of_pair
    first = 0
    for kind in range(0, len(counts), _MOST_KINDS):
        number, lengths = list(counts[kind : kind + _MOST_KINDS]), sizes[kind : kind + _MOST_KINDS]
        flat = [side for size in lengths for side in size]
        windows = fused(images, targets, corners[first : first + sum(number)], number, flat)
        of_pair[0].extend(windows[: len(number)])
        of_pair[1].extend(windows[len(number) :])
        first += sum(number)
    return of_pair


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


def _pool(inputs: list[Tensor], rois: Tensor, pooling: Pooling) -> Tensor:
    with without_autocast(inputs[0]):
        return backend.implementation("roi_align", inputs[0].device)(_dense(inputs, inputs), rois, *pooling)


def compare_boxes(
    inputs: list[Tensor],
    targets: list[Tensor],
    rois: Tensor,
    pooling: Pooling,
    criterion: str,
    box_weights: Tensor | None = None,
    reduction: str = "none",
) -> Tensor:
    """The loss of arguments that are checked, or of each box, [K]."""
    with without_autocast(inputs[0]):
        return backend.implementation("roi_perceptual_loss", inputs[0].device)(
            _dense(inputs, inputs), _dense(targets, inputs), rois, *pooling, criterion, box_weights, reduction
        )


def _loss(
    inputs: list[Tensor],
    targets: list[Tensor],
    boxes: CheckedBoxes,
    pooling: Pooling,
    criterion: str,
    reduction: str,
    outside: str,
) -> Tensor:
    if outside == "keep":
        return compare_boxes(inputs, targets, boxes.rois, pooling, criterion, boxes.weights, reduction)
    counted = boxes_inside(boxes.rois, inputs[0].shape[2:], pooling.spatial_scales[0])
    return reduce_boxes(
        compare_boxes(inputs, targets, boxes.rois, pooling, criterion), boxes.weights, reduction, counted
    )


def _dense(features: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    """Features laid out as kernels read them: channels_last where `like` has its channels last, else contiguous."""
    forms = (
        torch.contiguous_format if level.is_contiguous() or level.stride(1) != 1 else _CHANNELS_LAST[level.ndim]
        for level in like
    )
    return [level.contiguous(memory_format=form) for level, form in zip(features, forms, strict=True)]
