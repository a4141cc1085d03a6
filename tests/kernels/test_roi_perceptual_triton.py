"""The Triton kernels against the definition in float64: where they run says conftest.py."""

import pytest
import torch

from lidnet_fast import reference

kernels = pytest.importorskip("lidnet_fast.kernels.roi_perceptual")
pytestmark = pytest.mark.interpreter

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}
SCALE = 0.5
ALLOCATIONS = ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty"))
BOXES = torch.tensor(
    [
        [0, 1.5, 2, 20, 17],
        [1, 0, 0, 26, 20],  # the whole map
        [1, -4, 5, 9, 40],  # leaves it
        [0, 3, 3, 3, 8],  # no width
        [0, 100, 100, 120, 110],  # outside
        [0, 3, 4, 18, 15],  # overlaps
    ]
)
BOXES_3D = torch.tensor([[0, 1.5, 2, 1, 9, 8, 5], [1, -3, 0, 2, 12, 11, 9], [0, 3, 3, 3, 3, 5, 4]])


def features(*shape, dtype=torch.float32, count=2):
    return [torch.randn(*shape, dtype=torch.float64).to(dtype) for _ in range(count)]


def check(
    device,
    inputs,
    targets,
    boxes,
    size,
    *,
    levels=None,
    scales=(SCALE,),
    ratio=2,
    aligned=True,
    criterion="mse",
):
    """Losses and gradients for a random upstream gradient; returns what the kernels gave."""
    dtype = inputs[0].dtype
    rois = boxes.to(torch.float64 if dtype == torch.float64 else torch.float32)
    upstream = torch.randn(len(boxes), dtype=rois.dtype)
    on_device = [[x.to(device) for x in side] for side in (inputs, targets)]
    arguments = (
        *on_device,
        rois.to(device),
        None if levels is None else levels.to(device),
        list(scales),
        list(size),
        ratio,
        aligned,
        criterion,
    )
    losses, gradients = losses_and_gradients(upstream.to(device), *arguments)
    # Not to the bit: the compiler contracts products and sums of the two kernels as it likes.
    alone = kernels.roi_perceptual_loss(*arguments)
    torch.testing.assert_close(alone, losses, rtol=8 * torch.finfo(losses.dtype).eps, atol=0)
    losses, gradients = losses.cpu(), [gradient.cpu() for gradient in gradients]

    leaves = [x.detach().double().requires_grad_() for x in inputs]
    pooling = (rois.double(), levels, scales, size, ratio, aligned)
    expected = reference.roi_perceptual_loss(leaves, [target.double() for target in targets], *pooling, criterion)
    expected_gradients = torch.autograd.grad(expected, leaves, upstream.double(), allow_unused=True)

    assert losses.dtype == rois.dtype
    assert_near(losses, expected, torch.float64 if dtype == torch.float64 else torch.float32)
    for gradient, wanted, input in zip(gradients, expected_gradients, inputs, strict=True):
        assert gradient.dtype == dtype
        assert gradient.stride() == torch.empty_like(input).stride()
        assert_near(gradient, torch.zeros_like(gradient) if wanted is None else wanted, dtype)
    return losses, gradients


def losses_and_gradients(upstream, inputs, targets, rois, *options):
    losses, slopes = kernels.roi_perceptual_loss_and_slopes(inputs, targets, rois, *options)
    *pooling, _ = options
    shapes = [side for level in inputs for side in level.shape]
    layouts = [not torch.empty_like(level).is_contiguous() for level in inputs]
    arguments = (slopes, rois, *pooling, None, "none", shapes, layouts, inputs[0].dtype)
    return losses, kernels.roi_perceptual_loss_backward(upstream, *arguments)


def assert_near(actual, expected, dtype):
    error = (actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)
    assert error <= TOLERANCES[dtype], f"relative L2 error {error:.2e}"


@pytest.fixture(autouse=True)
def _seed(poisoned):
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("criterion", ["mse", "l1", "smooth_l1", "charbonnier"])
def test_criteria_and_dtypes(device, criterion, dtype):
    (input, target) = features(2, 5, 10, 13, dtype=dtype)
    check(device, [input], [target], BOXES, (3, 2), criterion=criterion)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("ratio", [-1, 1, 3])
def test_sampling(device, ratio, aligned):
    input, target = features(2, 3, 10, 13, dtype=torch.float64)
    check(device, [input], [target], BOXES, (2, 3), ratio=ratio, aligned=aligned)


@pytest.mark.parametrize(("bins", "cells"), [(7, 3), (13, 7), (14, 3), (15, 5)])
def test_adaptive_sampling_of_bins_of_whole_cells(device, bins, cells):
    """As many samples as cells, to the last bit: 21 cells make 7 bins of 3, not of a little more than 3."""
    input, target = features(1, 2, 96, 8)
    box = torch.tensor([[0, 8, 8, 12, 8 + 4 * bins * cells]])
    check(device, [input], [target], box, (bins, 1), scales=(0.25,), ratio=-1)


@pytest.mark.parametrize("layout", ["channels_last", "sliced", "expanded", "mixed"])
def test_layouts(device, layout):
    input, target = features(2, 20, 10, 13)
    arrange = {
        "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
        "sliced": lambda x: torch.zeros(2, 40, 12, 30)[:, ::2, 1:11, 2:28:2].copy_(x),
        "expanded": lambda x: x[:, :1].expand(2, 20, 10, 13),
        "mixed": lambda x: x if x is target else x.contiguous(memory_format=torch.channels_last),
    }[layout]
    check(device, [arrange(input)], [arrange(target)], BOXES[:4], (2, 2))


def test_pyramid_with_a_level_that_no_box_falls_on(device):
    inputs, targets = ([torch.randn(2, c, h, w) for c, h, w in ((5, 20, 26), (3, 10, 13), (4, 5, 7))] for _ in "ab")
    levels = torch.tensor([0, 2, 0, 0, 2, 2])
    _, gradients = check(device, inputs, targets, BOXES, (3, 3), levels=levels, scales=(1.0, 0.5, 0.25))
    assert not gradients[1].any()


@pytest.mark.parametrize("ratio", [2, -1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_volumes(device, dtype, ratio):
    input, target = features(2, 3, 4, 5, 6, dtype=dtype)
    check(device, [input], [target], BOXES_3D, (2, 1, 2), ratio=ratio, criterion="charbonnier")


def test_many_boxes_are_listed_in_several_blocks(device):
    input, target = features(1, 2, 6, 7, dtype=torch.float64)
    boxes = torch.cat((torch.zeros(140, 1), 6 * torch.rand(140, 2), 6 + 8 * torch.rand(140, 2)), dim=1)
    check(device, [input], [target], boxes, (1, 1), ratio=1)


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 3, 3, 4, 5)])
def test_no_boxes(device, shape):
    input, target = (x.to(device) for x in features(*shape))
    axes = len(shape) - 2
    boxes = torch.zeros(0, 1 + 2 * axes, device=device)
    arguments = ([input], [target], boxes, None, [SCALE], [2] * axes, 2, True, "mse")
    assert kernels.roi_perceptual_loss(*arguments).shape == (0,)
    _, (gradient,) = losses_and_gradients(torch.zeros(0, device=device), *arguments)
    assert torch.equal(gradient, torch.zeros_like(input))


def test_repeats_bitwise(device):
    input, target = features(2, 20, 10, 13)
    upstream = torch.randn(len(BOXES), device=device)
    arguments = ([input.to(device)], [target.to(device)], BOXES.to(device), None, [SCALE], [3, 3], 2, True, "l1")
    first, second = (losses_and_gradients(upstream, *arguments)[1][0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("volume", [False, True])
def test_memory(recorded, watched, volume):
    """No access outside the tensors, no element stored by two programs, and traffic within a budget of the floor.

    The floor loads the four (eight) neighbours of each sample from both maps and stores one slope per bin; then stores
    the weights along each axis, loads, per bin, its slope in each tile that the bin touches, and stores the gradient
    once.
    """
    shape = (2, 16, 3, 6, 7) if volume else (2, 16, 10, 13)
    input, target = features(*shape)
    boxes, size = (BOXES_3D, [2, 2, 2]) if volume else (BOXES, [3, 3])
    upstream = torch.ones(len(boxes))
    arguments = ([input], [target], boxes, None, [SCALE], size, 2, True, "mse")
    with recorded(*ALLOCATIONS) as allocated, watched(lambda: [input, target, boxes, upstream, *allocated]) as traffic:
        _, (gradient,) = losses_and_gradients(upstream, *arguments)
    bins, taps = len(boxes) * size[0] ** len(size), 2 ** (2 * len(size))
    slopes = bins * 16 * 4
    weights = len(boxes) * sum(bins * side for bins, side in zip(size, shape[2:], strict=True)) * 4
    floor_loaded, floor_stored = 2 * taps * slopes + slopes, slopes + weights + gradient.nbytes
    assert traffic.loaded <= 1.6 * floor_loaded
    assert traffic.stored <= 1.1 * floor_stored


def test_boxes_that_make_no_sense_stay_inside_the_tensors(recorded, watched):
    """On a GPU nothing looks at the boxes' values before the kernels do."""
    input, target = features(2, 3, 6, 7)
    inf, nan = torch.inf, torch.nan
    boxes = torch.tensor(
        [[9, 1, 1, 5, 5], [-3, 1, 1, 5, 5], [nan, 1, 1, 5, 5], [0, nan, 1, 5, 5], [0, 1, -inf, 5, inf], [0, 5, 5, 1, 1]]
    )
    upstream = torch.ones(len(boxes))
    arguments = ([input], [target], boxes, None, [1.0], [2, 2], 2, True, "mse")
    with recorded(*ALLOCATIONS) as allocated, watched(lambda: [input, target, boxes, upstream, *allocated]):
        losses_and_gradients(upstream, *arguments)
