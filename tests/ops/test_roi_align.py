"""Against torchvision's own roi_align and MultiScaleRoIAlign, on every backend."""

import pytest
import torch
import torchvision
from torchvision.ops import MultiScaleRoIAlign

from lidnet_fast import multiscale_roi_align, roi_align
from lidnet_fast.reference.roi_align_3d import roi_align_3d

# Inside, over two edges, far outside, without area, over the whole map.
BOXES = torch.tensor(
    [
        [0, 1.5, 2, 20, 17],
        [1, -4, 5, 9, 40],
        [1, 90, 90, 99, 99],
        [0, 3, 3, 3, 3],
        [1, 0, 0, 24, 18],
        [0, -9, -9, -5, -5],
    ]
)
BOXES_3D = torch.tensor([[1, 1.5, 2, 1, 9, 7, 4], [0, -3, 0, -1, 4, 30, 3], [0, 2, 2, 2, 2, 2, 2]])
GOOD = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
GOOD_BOX = torch.tensor([[1.0, 1, 1, 5, 6]])


def pooled_and_gradient(pool, input, boxes, upstream, *arguments):
    leaf = input.detach().requires_grad_()
    pooled = pool(leaf, boxes, *arguments)
    return pooled.detach(), torch.autograd.grad(pooled, leaf, upstream.to(pooled.dtype))[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("ratio", [-1, 0, 2])
def test_values_and_gradients_are_torchvisions(assert_near, dtype, aligned, ratio):
    input = torch.randn(2, 11, 18, 24, dtype=torch.float64).to(dtype)
    upstream = torch.randn(6, 11, 7, 5, dtype=torch.float64).to(dtype)
    arguments = ((7, 5), 0.9, ratio, aligned)
    ours = pooled_and_gradient(roi_align, input, BOXES, upstream, *arguments)
    theirs = pooled_and_gradient(torchvision.ops.roi_align, input.double(), BOXES.double(), upstream, *arguments)
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == dtype
        assert_near(one, other, dtype)


def test_defaults_are_torchvisions(assert_near):
    input = torch.randn(2, 3, 18, 24, dtype=torch.float64)
    assert_near(roi_align(input, BOXES, 4), torchvision.ops.roi_align(input, BOXES.double(), 4))


def test_lists_of_boxes():
    input = torch.randn(2, 3, 18, 24)
    lists = [BOXES[BOXES[:, 0] == image, 1:] for image in range(2)]
    rows = torch.cat([(BOXES[:, 0] == image).nonzero()[:, 0] for image in range(2)])
    assert torch.equal(roi_align(input, lists, 3), roi_align(input, BOXES, 3)[rows])


@pytest.mark.parametrize(
    "arrange",
    [
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x.mT,
        lambda x: x[:, 1::2, ::2],
        lambda x: x[:1].expand(2, -1, -1, -1),
        lambda x: x[..., :1, :1],
    ],
)
def test_layouts(assert_near, arrange):
    input = arrange(torch.randn(2, 40, 20, 20, dtype=torch.float64))
    upstream = torch.randn(6, input.shape[1], 3, 3, dtype=torch.float64)
    arguments = (3, 0.7, 2, True)
    ours = pooled_and_gradient(roi_align, input, BOXES, upstream, *arguments)
    theirs = pooled_and_gradient(torchvision.ops.roi_align, input, BOXES.double(), upstream, *arguments)
    assert ours[0].is_contiguous()
    assert_near(ours[0], theirs[0])
    assert_near(ours[1], theirs[1])


def test_strided_upstream(assert_near):
    input = torch.randn(2, 3, 18, 24, dtype=torch.float64)
    upstream = torch.randn(1, 1, 3, 3, dtype=torch.float64).mT.expand(6, 3, -1, -1)
    ours = pooled_and_gradient(roi_align, input, BOXES, upstream, 3)
    theirs = pooled_and_gradient(torchvision.ops.roi_align, input, BOXES.double(), upstream, 3)
    assert_near(ours[1], theirs[1])


@pytest.mark.parametrize("shape", [(2, 3, 8, 9), (0, 3, 8, 9), (2, 3, 4, 8, 9)])
def test_no_boxes(shape):
    input = torch.randn(shape, requires_grad=True)
    pooled = roi_align(input, torch.empty(0, 2 * len(shape) - 3), 4)
    assert pooled.shape == (0, 3, *(4 for _ in shape[2:]))
    pooled.sum().backward()
    assert torch.equal(input.grad, torch.zeros(shape))


@pytest.mark.parametrize("aligned", [False, True])
def test_volumes(assert_near, aligned):
    input = torch.randn(2, 9, 5, 8, 10, dtype=torch.float64)
    upstream = torch.randn(3, 9, 2, 3, 4, dtype=torch.float64)
    arguments = ((2, 3, 4), 0.9, 2, aligned)
    ours = pooled_and_gradient(roi_align, input, BOXES_3D, upstream, *arguments)
    theirs = pooled_and_gradient(roi_align_3d, input, BOXES_3D.double(), upstream, *arguments)
    assert_near(ours[0], theirs[0])
    assert_near(ours[1], theirs[1])


@pytest.mark.parametrize("shape", [(2, 2, 6, 7), (1, 2, 3, 4, 5)])
def test_gradients_are_derivatives(shape):
    input = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    boxes = (BOXES if len(shape) == 4 else BOXES_3D[1:]) * 0.4
    boxes[:, 0] = torch.arange(len(boxes)) % shape[0]
    assert torch.autograd.gradcheck(lambda x: roi_align(x, boxes, 2, sampling_ratio=2), input)


def pyramid(dtype=torch.float64, channels_last=False):
    form = torch.channels_last if channels_last else torch.contiguous_format
    return {
        name: torch.randn(2, 5, 128 >> k, 104 >> k, dtype=torch.float64).to(dtype, memory_format=form)
        for k, name in enumerate("abc", start=2)
    }


def pyramid_boxes(count=20):
    """Per image boxes whose sides run from 2 to 90 pixels, so that every level gets some."""
    corners, sides = 30 * torch.rand(2, count, 2), 2 * 45 ** torch.rand(2, count, 2)
    return list(torch.cat((corners, corners + sides), dim=2))


SIZES = [(120, 100), (128, 96)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("scale", "level"), [(24, 3), (224, 4)])
def test_pyramids_are_pooled_as_torchvision_does(assert_near, dtype, channels_last, scale, level):
    inputs, boxes = pyramid(dtype, channels_last), pyramid_boxes()
    options = {"canonical_scale": scale, "canonical_level": level}
    upstream = torch.randn(40, 5, 7, 7, dtype=torch.float64).to(dtype)
    results = []
    for double in (False, True):
        leaves = {name: (x.double() if double else x.detach()).requires_grad_() for name, x in inputs.items()}
        if double:
            pool = MultiScaleRoIAlign(list(inputs), 7, 2, **options)
            pooled = pool(leaves, [x.double() for x in boxes], SIZES)
            assert scale == 224 or set(pool.map_levels(boxes).tolist()) == {0, 1, 2}
        else:
            pooled = multiscale_roi_align(leaves, boxes, SIZES, 7, 2, **options)
            assert pooled.dtype == dtype
        pooled.backward(upstream.to(pooled.dtype))
        results.append((pooled, *(torch.zeros_like(x) if x.grad is None else x.grad for x in leaves.values())))
    for ours, theirs in zip(*results, strict=True):
        assert_near(ours, theirs, dtype)


def test_autocast_leaves_the_dtype_of_the_features():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for dtype in (torch.float32, torch.bfloat16):
            input = torch.randn(2, 3, 18, 24).to(dtype).requires_grad_()
            pooled = roi_align(input, BOXES, 3)
            pooled.sum().backward()
            assert pooled.dtype == input.grad.dtype == dtype


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input": GOOD.int()}, TypeError, "input must be float32"),
        ({"input": GOOD[0]}, ValueError, r"input must have 4 or 5 dimensions, .*got shape \(3, 8, 8\)"),
        ({"input": GOOD[:, :0]}, ValueError, "input must have C, H and W of at least 1"),
        ({"boxes": GOOD_BOX * torch.nan}, ValueError, r"boxes\[0\] must have finite coordinates"),
        ({"boxes": GOOD_BOX.flip(1)}, ValueError, r"boxes\[0\] must have x2 >= x1 and y2 >= y1, got .*= \(5.0, 1.0"),
        ({"boxes": GOOD_BOX + 1}, ValueError, r"boxes\[0\] must have an integer batch index in \[0, 2\), got 2.0"),
        ({"boxes": [GOOD_BOX[:, 1:]]}, ValueError, "boxes must be a list of 2 Tensors, one per image, got 1"),
        (
            {"boxes": [GOOD_BOX[:, 1:], GOOD_BOX[:, 1:] / 0]},
            ValueError,
            r"boxes\[1\]\[0\] must have finite coordinates",
        ),
        ({"output_size": (3, 3, 3)}, ValueError, "output_size must be an int >= 1 or two of them"),
        ({"spatial_scale": 1e300}, ValueError, r"boxes\[0\] must have finite coordinates \(once times spatial_sc"),
        ({"spatial_scale": 0}, ValueError, "spatial_scale must be a finite number above 0, got 0"),
        ({"sampling_ratio": -2}, ValueError, "sampling_ratio must be an int >= 1, or -1 or 0"),
        ({"aligned": 1}, TypeError, "aligned must be True or False, got 1"),
    ],
)
def test_bad_arguments(change, error, message):
    arguments = {"input": GOOD, "boxes": GOOD_BOX, "output_size": 3, **change}
    with pytest.raises(error, match=message):
        roi_align(**arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"inputs": {}}, ValueError, "inputs must hold at least one level"),
        (
            {"inputs": {"a": GOOD, "b": GOOD[:, :2, ::2]}},
            ValueError,
            r"inputs\['b'\] must have the channels of .* 3, got",
        ),
        (
            {"inputs": {"a": GOOD, "b": GOOD[:, :, ::2].double()}},
            ValueError,
            r"inputs\['b'\] must share batch size, dty",
        ),
        ({"inputs": {"a": GOOD, "b": GOOD}}, ValueError, "doubling strides, finest first, got 'a': 2.0, 'b': 2.0"),
        ({"image_sizes": [(8, 8)]}, ValueError, "image_sizes must have one .* per image, 2, got 1"),
        ({"canonical_scale": 0}, ValueError, "canonical_scale must be a finite number above 0"),
        ({"canonical_level": 1.5}, ValueError, "canonical_level must be an int, got 1.5"),
    ],
)
def test_bad_arguments_of_pyramids(change, error, message):
    sizes = [(8, 8), (8, 8)]
    arguments = {"inputs": {"a": GOOD}, "boxes": GOOD_BOX, "image_sizes": sizes, "output_size": 3, "sampling_ratio": 2}
    with pytest.raises(error, match=message):
        multiscale_roi_align(**{**arguments, **change})
