"""Pixel losses between two images: l1, mse, charbonnier, ssim, ms_ssim, edge and tv, and their gradients."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lidnet_fast._constants import CHARBONNIER_EPS
from lidnet_fast._tensors import compute_dtype

_WINDOW_SIZE = 11
_WINDOW_SIGMA = 1.5
_K1, _K2 = 0.01, 0.03
# Wang, Simoncelli, Bovik, "Multi-scale structural similarity for image quality assessment", 2003, section 3.2.
_MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)


def pixel_weights(rois: Tensor, images: int, sides: Sequence[int], roi_weight: float) -> Tensor:
    """Weight of each pixel, [N, 1, *sides]: `roi_weight` in the union of the image's boxes and 1 elsewhere.

    A pixel is in a box if its centre is: x1 <= column + 1/2 < x2, and the same along the other axes.

    Args:
        rois: [K, 5], (batch index, x1, y1, x2, y2), or [K, 7], (batch index, x1, y1, z1, x2, y2, z2), in pixel-edge
            coordinates.
        images: N.
        sides: Height and width, or depth, height and width.
        roi_weight: The weight inside.
    """
    inside = []
    for axis, side in enumerate(reversed(sides), start=1):  # x, y, z
        centres = torch.arange(side, device=rois.device, dtype=rois.dtype) + 0.5
        lower, upper = rois[:, axis, None], rois[:, axis + len(sides), None]
        inside.append(((centres >= lower) & (centres < upper)).to(rois.dtype))
    own = (rois[:, :1] == torch.arange(images, device=rois.device, dtype=rois.dtype)).to(rois.dtype)
    equation = "kn,kx,ky->nyx" if len(sides) == 2 else "kn,kx,ky,kz->nzyx"
    covering = torch.einsum(equation, own, *inside)
    return torch.where(covering > 0, roi_weight, 1.0).to(rois.dtype).unsqueeze(1)


def _mean(values: Tensor, weights: Tensor | None) -> Tensor:
    if weights is None:
        return values.mean()
    return (values * weights).sum() / (weights.sum() * values.shape[1])


def _blur(images: Tensor) -> Tensor:
    """Gaussian window of 11 pixels along each axis of [N, C, H, W] or [N, C, D, H, W], valid padding."""
    offsets = torch.arange(_WINDOW_SIZE, device=images.device, dtype=images.dtype) - _WINDOW_SIZE // 2
    window = torch.exp(-offsets.square() / (2 * _WINDOW_SIGMA**2))
    window = window / window.sum()
    planes = images.reshape(-1, 1, *images.shape[2:])
    convolve = F.conv2d if images.ndim == 4 else F.conv3d
    for axis in range(2, images.ndim):
        shape = [1] * images.ndim
        shape[axis] = _WINDOW_SIZE
        planes = convolve(planes, window.view(shape))
    return planes.view(*images.shape[:2], *planes.shape[2:])


def _structural_similarity(input: Tensor, target: Tensor, data_range: float) -> tuple[Tensor, Tensor]:
    """Mean SSIM and mean contrast-structure of each image and channel, both [N, C].

    Wang et al., "Image quality assessment: from error visibility to structural similarity", 2004, eq. 13.
    """
    c1, c2 = (_K1 * data_range) ** 2, (_K2 * data_range) ** 2
    mean_x, mean_y = _blur(input), _blur(target)
    square_x, square_y, product = mean_x.square(), mean_y.square(), mean_x * mean_y
    variances = (_blur(input * input) - square_x) + (_blur(target * target) - square_y)
    contrast = (2 * (_blur(input * target) - product) + c2) / (variances + c2)
    luminance = (2 * product + c1) / (square_x + square_y + c1)
    return (luminance * contrast).flatten(2).mean(2), contrast.flatten(2).mean(2)


def _multi_scale_similarity(input: Tensor, target: Tensor, data_range: float) -> Tensor:
    """MS-SSIM of each image and channel, [N, C] (Wang, Simoncelli, Bovik 2003, eq. 7)."""
    similarity = torch.ones((), device=input.device, dtype=input.dtype)
    pool = F.avg_pool2d if input.ndim == 4 else F.avg_pool3d
    for exponent in _MS_SSIM_WEIGHTS[:-1]:
        contrast = _structural_similarity(input, target, data_range)[1]
        similarity = similarity * contrast.relu() ** exponent
        padding = [size % 2 for size in input.shape[2:]]
        input, target = pool(input, 2, padding=padding), pool(target, 2, padding=padding)
    return similarity * _structural_similarity(input, target, data_range)[0].relu() ** _MS_SSIM_WEIGHTS[-1]


def _edge(difference: Tensor) -> Tensor:
    """Sum over the axes of the mean absolute response to that axis's Sobel filter, valid padding.

    It is [-1 0 1] along the axis and [1 2 1] along the others, unnormalised.
    """
    means = []
    for across in range(2, difference.ndim):
        response = difference
        for axis in range(2, difference.ndim):
            side = response.shape[axis] - 2
            first, middle, last = (response.narrow(axis, start, side) for start in range(3))
            response = last - first if axis == across else first + 2 * middle + last
        means.append(response.abs().mean())
    return torch.stack(means).sum()


def _total_variation(input: Tensor) -> Tensor:
    return torch.stack([input.diff(dim=axis).abs().mean() for axis in range(2, input.ndim)]).sum()


def _term(name: str, input: Tensor, target: Tensor, weights: Tensor | None, data_range: float) -> Tensor:
    if name == "l1":
        return _mean((input - target).abs(), weights)
    if name == "mse":
        return _mean((input - target).square(), weights)
    if name == "charbonnier":
        return _mean(((input - target).square() + CHARBONNIER_EPS**2).sqrt(), weights)
    if name == "ssim":
        return 1 - _structural_similarity(input, target, data_range)[0].mean()
    if name == "ms_ssim":
        return 1 - _multi_scale_similarity(input, target, data_range).mean()
    if name == "edge":
        # Sobel is linear: the difference of the filtered images is the filtered difference.
        return _edge(input - target)
    if name == "tv":
        return _total_variation(input)
    raise ValueError(f"unknown term {name!r}")


def _weights_like(input: Tensor, rois: Tensor | None, roi_weight: float) -> Tensor | None:
    return None if rois is None else pixel_weights(rois, input.shape[0], input.shape[2:], roi_weight)


def multi_loss(
    input: Tensor,
    target: Tensor,
    terms: Sequence[str],
    weights: Sequence[float],
    rois: Tensor | None,
    roi_weight: float,
    data_range: float,
    with_gradient: bool = False,
) -> tuple[Tensor, Tensor]:
    """The definition behind `lidnet_fast.functional.multi_loss`: the sum of weighted terms, and the terms, [T].

    Args:
        input: [N, C, H, W] images or [N, C, D, H, W] volumes.
        target: As `input`; requires no gradient.
        terms: T names of `multi_loss`'s terms.
        weights: Of each term.
        rois: As in `pixel_weights`, in the dtype of the arithmetic, or None for no regions.
        roi_weight: Weight of a pixel inside the boxes.
        data_range: Largest minus smallest possible pixel value, for ssim and ms_ssim.
        with_gradient: Nothing here, where autograd finds the gradient; tells kernels to compute it with the value.
    """
    dtype = compute_dtype(input.dtype)
    input, target = input.to(dtype), target.to(dtype)
    of_pixels = _weights_like(input, rois, roi_weight)
    values = [_term(name, input, target, of_pixels, data_range) for name in terms]
    total = torch.stack([weight * value for weight, value in zip(weights, values, strict=True)]).sum()
    return total, torch.stack(values)


def multi_loss_jacobian(
    input: Tensor,
    target: Tensor,
    terms: Sequence[str],
    rois: Tensor | None,
    roi_weight: float,
    data_range: float,
) -> Tensor:
    """The definition behind `lidnet_fast.functional.multi_loss_jacobian`: the terms' gradients, [T, *input.shape].

    Arguments as in `multi_loss`.
    """
    dtype = compute_dtype(input.dtype)
    images, target = input.detach().to(dtype), target.to(dtype)
    of_pixels = _weights_like(target, rois, roi_weight)

    def gradient(name: str) -> Tensor:
        return torch.func.grad(lambda images: _term(name, images, target, of_pixels, data_range))(images)

    return torch.stack([gradient(name) for name in terms])
