"""`multi_loss`, several pixel losses at once, and its Jacobian."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lidnet_fast import backend
from lidnet_fast._checks import Boxes, check_choice, check_finite, check_pair, check_positive, has_tangent
from lidnet_fast._plausibility import warn_of_range
from lidnet_fast._tensors import in_forward_mode

from ._autocast import promote, without_autocast
from ._boxes import check_boxes

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

    def backward(self, *args: Any, **kwargs: Any) -> None:
        """`total.backward`."""
        self.total.backward(*args, **kwargs)


def multi_loss(
    input: Tensor,
    target: Tensor,
    weights: Mapping[str, float],
    *,
    boxes: Boxes | None = None,
    roi_weight: float | None = None,
    data_range: float = 1.0,
) -> MultiLossOutput:
    """Several pixel losses of one pair of images at once, total = sum over terms of weight * term.

    Terms, with d = input - target and means over all elements:

    - "l1": mean |d|; "mse": mean d^2; "charbonnier": mean sqrt(d^2 + 1e-6).
    - "ssim": 1 - SSIM (Wang et al. 2004, eq. 13), Gaussian window 11x11, sigma 1.5, valid padding, K1 .01, K2 .03,
      averaged over images and channels: pytorch_msssim.ssim with size_average. (torchmetrics pads by reflection
      instead; the two agree on the pixels at least 5 from the border.)
    - "ms_ssim": 1 - MS-SSIM (Wang, Simoncelli, Bovik 2003, eq. 7), five scales, weights .0448, .2856, .3001, .2363,
      .1333: pytorch_msssim.ms_ssim. Scales are 2x2 average pooling, zero-padded on both sides where a side is odd.
      Negative similarities are cut to 0, where the gradient is 0 too.
    - "edge": mean |Sx d| + mean |Sy d|, 3x3 Sobel filters ([1 2 1] x [-1 0 1], unnormalised), valid padding.
    - "tv": mean |horizontal differences| + mean |vertical differences| of the input alone.

    With boxes, l1, mse and charbonnier become weighted means, sum(w v) / sum(w) over the whole batch, with w =
    `roi_weight` for a pixel whose centre lies in the union of its image's boxes and 1 elsewhere.

    On volumes every window and filter has a third axis: SSIM's window is 11x11x11, "edge" sums the means of three Sobel
    filters ([-1 0 1] along one axis, [1 2 1] along the other two), "tv" those of three differences.

    Args:
        input: Images [N, C, H, W] or volumes [N, C, D, H, W]. Differentiable.
        target: Images of `input`'s shape, dtype (within autocast of any) and device. Never gets a gradient, so it
            mustn't require one. NaN in either image makes the total and the terms that read the pixel NaN.
        weights: Term -> finite weight. A term of weight 0 is measured without contributing.
        boxes: As in `roi_perceptual_loss`, in pixel-edge coordinates; no minimal size. Goes with `roi_weight`.
        roi_weight: Weight of a pixel inside the boxes, above 0. Goes with `boxes`.
        data_range: Largest minus smallest possible pixel value (1 for windowed images), for ssim and ms_ssim. On the
            CPU an `InputWarning` tells if the target is far from it.

    Returns:
        MultiLossOutput(total, terms), scalars in float32 (float64 for float64 images).

    Raises:
        TypeError: For an argument of another type or dtype than above.
        ValueError: For shapes, devices or options that don't fit, an unknown term, an image too small for a term
            (naming it), a target that requires a gradient, boxes without `roi_weight` or the reverse, and boxes as in
            `roi_perceptual_loss`.
    """
    if not isinstance(weights, Mapping):
        raise TypeError(f"weights must map terms to numbers, got {type(weights).__name__}")
    check_term_weights(weights)
    input, target = promote(input, target)
    rois = _check_images(input, target, tuple(weights), boxes, roi_weight, data_range)
    terms, factors = list(weights), [float(weight) for weight in weights.values()]
    with_gradient = in_forward_mode() or (torch.is_grad_enabled() and input.requires_grad)
    with without_autocast(input):
        total, values, *_ = _implementation("multi_loss", input, terms)(
            input, target, terms, factors, rois, float(roi_weight or 1), float(data_range), with_gradient
        )
    return MultiLossOutput(total, dict(zip(terms, values.detach().unbind(), strict=True)))


def multi_loss_jacobian(
    input: Tensor,
    target: Tensor,
    terms: Sequence[str],
    *,
    boxes: Boxes | None = None,
    roi_weight: float | None = None,
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
    input, target = promote(input, target)
    rois = _check_images(input, target, terms, boxes, roi_weight, data_range)
    if has_tangent(input):
        raise NotImplementedError("multi_loss_jacobian has no derivative in input. To fix: pass input.detach()")
    with without_autocast(input):
        return _implementation("multi_loss_jacobian", input, terms)(
            input, target, list(terms), rois, float(roi_weight or 1), float(data_range)
        )


def check_term_weights(weights: Mapping[str, float]) -> None:
    """Weights of `multi_loss`: at least one, known terms, finite numbers.

    Raises:
        ValueError: Naming the term that isn't.
    """
    _check_terms("weights", tuple(weights))
    for name, weight in weights.items():
        check_finite(f"weights[{name!r}]", weight)


def _check_terms(argument: str, names: Sequence[str]) -> None:
    if not names:
        raise ValueError(f"{argument} must name at least one term, got none")
    for name in names:
        check_choice(f"a term of {argument}", name, SMALLEST_SIDE)


def _check_images(
    input: Tensor,
    target: Tensor,
    terms: Sequence[str],
    boxes: Boxes | None,
    roi_weight: float | None,
    data_range: float,
) -> Tensor | None:
    check_pair(input, target, volumes=True)
    if input.shape[0] == 0:
        raise ValueError(f"input must hold at least one image, got shape {tuple(input.shape)}")
    for name in terms:
        if min(input.shape[2:]) < SMALLEST_SIDE[name]:
            sides = " x ".join(map(str, input.shape[2:]))
            raise ValueError(f"term {name!r} needs images of at least {SMALLEST_SIDE[name]} pixels a side, got {sides}")
    check_positive("data_range", data_range)
    if any(name in ("ssim", "ms_ssim") for name in terms):
        remedy = "give data_range as the images' largest minus smallest possible value"
        warn_of_range(target, "target", float(data_range), "data_range is {}", remedy)
    if boxes is None and roi_weight is None:
        return None
    if roi_weight is None:
        raise ValueError(
            "boxes need a roi_weight, the weight of a pixel inside them. To fix: give roi_weight, or no boxes"
        )
    check_positive("roi_weight", roi_weight)
    if boxes is None:
        raise ValueError(
            f"roi_weight {float(roi_weight):g} needs boxes. To fix: give boxes (without lesions empty ones, "
            "Tensor[0, 4] for each image), or no roi_weight"
        )
    return check_boxes(boxes, input).rois


def _implementation(op: str, input: Tensor, terms: Sequence[str]) -> Callable[..., Any]:
    # ms_ssim of volumes, which needs 161 slices, has no kernel.
    without_kernel = input.ndim == 5 and "ms_ssim" in terms
    return backend.definition(op) if without_kernel else backend.implementation(op, input.device)
