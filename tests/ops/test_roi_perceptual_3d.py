import itertools
import math

import numpy as np
import pytest
import torch
from torchvision.ops import roi_align

from lidnet_fast import multi_loss, multiscale_roi_perceptual_loss, roi_perceptual_loss

SCALE = 0.5
SIZE = (5, 7, 9)  # cells of depth, height and width: 18 x 14 x 10 voxels in x, y, z
BINS = (3, 2, 4)
BOXES = torch.tensor(
    [
        [0, 2.3, 1.1, 0.7, 13.6, 9.2, 7.9],
        [1, 5.0, 4.0, 3.0, 6.5, 6.0, 4.5],
        [1, 0.0, 0.0, 0.0, 18.0, 14.0, 10.0],  # the whole volume
        [0, -5.0, 8.0, 6.5, 7.0, 30.0, 14.0],  # leaves it on every axis
        [0, 50.0, 50.0, 50.0, 60.0, 60.0, 60.0],  # outside of it
        [1, 7.5, 2.5, 20.0, 9.0, 4.0, 26.0],  # outside of it along z alone
        [1, 4.0, 6.0, 2.0, 4.0, 9.0, 2.0],  # neither width nor depth
        [0, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0],  # a point
    ]
)
CRITERIA = {
    "mse": lambda d: d * d,
    "l1": torch.abs,
    "smooth_l1": lambda d: torch.where(d.abs() < 1, 0.5 * d * d, d.abs() - 0.5),
    "charbonnier": lambda d: (d * d + 1e-6).sqrt(),
}


def features(dtype=torch.float64, scale=2.0):
    return [(scale * torch.randn(2, 3, *SIZE, dtype=torch.float64)).to(dtype) for _ in range(2)]


def taps(position, cells):
    """The two cells that a sample interpolates along one axis, with their weights; none beyond a cell outside."""
    if position < -1 or position > cells:
        return []
    position = min(max(position, 0.0), cells - 1.0)
    low = math.floor(position)
    high = min(low + 1, cells - 1)
    return [(low, 1 - (position - low)), (high, position - low)]


def pooling_matrix(box, size, bins, ratio, aligned):
    """What each cell of the volume counts in each bin of one box, by the definition: a loop over bins and samples."""
    starts, bin_sizes, counts = [], [], []
    for axis, bins_of_axis in zip((2, 1, 0), bins, strict=True):
        start, stop = (float(box[axis + end]) * SCALE - (0.5 if aligned else 0.0) for end in (0, 3))
        side = stop - start if aligned else max(stop - start, 1.0)
        starts.append(start)
        bin_sizes.append(side / bins_of_axis)
        counts.append(ratio if ratio > 0 else math.ceil(side / bins_of_axis))
    matrix = np.zeros((*bins, *size))
    for bin_ in itertools.product(*map(range, bins)):
        for sample in itertools.product(*map(range, counts)):
            z, y, x = (
                taps(start + (b + (s + 0.5) / count) * bin_size, cells)
                for start, b, s, count, bin_size, cells in zip(
                    starts, bin_, sample, counts, bin_sizes, size, strict=True
                )
            )
            for (z_cell, z_weight), (y_cell, y_weight), (x_cell, x_weight) in itertools.product(z, y, x):
                matrix[(*bin_, z_cell, y_cell, x_cell)] += z_weight * y_weight * x_weight / math.prod(counts)
    return torch.from_numpy(matrix).reshape(math.prod(bins), math.prod(size))


def expected_losses(input, target, boxes=BOXES, *, bins=BINS, ratio=2, aligned=True, criterion="mse"):
    """Per box, in float64."""
    losses = []
    for index, *corners in boxes.double().tolist():
        matrix = pooling_matrix(corners, input.shape[2:], bins, ratio, aligned)
        pooled = [x[int(index)].double().flatten(1) @ matrix.T for x in (input, target)]
        losses.append(CRITERIA[criterion](pooled[0] - pooled[1]).mean())
    return torch.stack(losses)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_losses_and_gradients_with_random_upstream(assert_near, criterion, dtype):
    input, target = features(dtype)
    input.requires_grad_()
    losses = roi_perceptual_loss(input, target, BOXES, BINS, SCALE, criterion=criterion, reduction="none")
    assert losses.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    upstream = torch.randn(len(BOXES), dtype=losses.dtype)
    losses.backward(upstream)
    leaf = input.detach().double().requires_grad_()
    expected = expected_losses(leaf, target, criterion=criterion)
    expected.backward(upstream.double())
    assert_near(losses, expected, torch.float32 if dtype != torch.float64 else dtype)
    assert input.grad.dtype == dtype
    assert_near(input.grad, leaf.grad, dtype)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("ratio", [-1, 0, 1, 2, 3])
def test_sampling(assert_near, ratio, aligned):
    input, target = features()
    leaf = input.clone().requires_grad_()
    losses = roi_perceptual_loss(
        input.requires_grad_(), target, BOXES, BINS, SCALE, ratio, aligned, criterion="smooth_l1", reduction="none"
    )
    expected = expected_losses(leaf, target, ratio=ratio, aligned=aligned, criterion="smooth_l1")
    upstream = torch.randn(len(BOXES), dtype=torch.float64)
    losses.backward(upstream)
    expected.backward(upstream)
    assert_near(losses, expected)
    assert_near(input.grad, leaf.grad)


@pytest.mark.parametrize("bins", [1, 3, (1, 4, 2)])
def test_output_sizes(assert_near, bins):
    input, target = features()
    losses = roi_perceptual_loss(input, target, BOXES, bins, SCALE, reduction="none")
    expected = expected_losses(input, target, bins=(bins,) * 3 if isinstance(bins, int) else bins)
    assert_near(losses, expected)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("ratio", [-1, 1, 2])
def test_one_slice_is_torchvisions_roi_align(assert_near, ratio, aligned):
    input, target = (torch.randn(2, 3, 1, 12, 16, dtype=torch.float64) for _ in range(2))
    flat = torch.tensor([[0, 3.2, 5.1, 30.7, 22.4], [1, -9, 4, 20, 90], [1, 0, 0, 32, 24], [0, 5, 5, 5, 9]])
    boxes = torch.cat((flat[:, :3], torch.zeros(4, 1), flat[:, 3:], torch.full((4, 1), 1 / SCALE)), dim=1)
    losses = roi_perceptual_loss(input, target, boxes, (1, 4, 3), SCALE, ratio, aligned, reduction="none")
    pooled = [roi_align(x[:, :, 0], flat.double(), (4, 3), SCALE, ratio, aligned) for x in (input, target)]
    assert_near(losses, (pooled[0] - pooled[1]).square().mean((1, 2, 3)))


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_weights_and_reductions(assert_near, reduction):
    input, target = features()
    weights = torch.rand(len(BOXES))
    weighted = expected_losses(input, target) * weights.double()
    expected = {"none": weighted, "sum": weighted.sum(), "mean": weighted.sum() / len(BOXES)}[reduction]
    loss = roi_perceptual_loss(input, target, BOXES, BINS, SCALE, box_weights=weights, reduction=reduction)
    assert_near(loss, expected)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_gradcheck(criterion):
    input, target = features(scale=1.0)

    def losses(x):
        weights = torch.arange(1.0, 5.0)
        return roi_perceptual_loss(
            x, target, BOXES[:4], 2, SCALE, criterion=criterion, box_weights=weights, reduction="none"
        )

    assert torch.autograd.gradcheck(losses, input.requires_grad_(), fast_mode=True)


def test_list_of_boxes_equals_tensor():
    input, target = features()
    boxes = [BOXES[BOXES[:, 0] == image, 1:] for image in range(2)]
    order = torch.cat([(BOXES[:, 0] == image).nonzero().squeeze(1) for image in range(2)])
    as_list = roi_perceptual_loss(input, target, boxes, BINS, SCALE, reduction="none")
    as_tensor = roi_perceptual_loss(input, target, BOXES, BINS, SCALE, reduction="none")
    assert torch.equal(as_list, as_tensor[order])


@pytest.mark.parametrize("box_dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_boxes_of_any_float_dtype(box_dtype):
    input, target = features(torch.float32)
    boxes = torch.tensor([[0, 4.0, 8.0, 1.5, 17.0, 10.0, 8.0], [1, 2.5, 3.0, 2.0, 9.0, 11.0, 3.0]])  # exact in all
    losses = [roi_perceptual_loss(input, target, b, BINS, SCALE) for b in (boxes, boxes.to(box_dtype))]
    assert torch.equal(*losses)


@pytest.mark.parametrize("layout", ["channels_last_3d", "transposed", "sliced", "expanded"])
def test_layouts(assert_near, layout):
    input, target = features()

    def arrange(x):
        if layout == "channels_last_3d":
            return x.contiguous(memory_format=torch.channels_last_3d)
        if layout == "transposed":
            return x.transpose(2, 4).contiguous().transpose(2, 4)
        if layout == "sliced":
            return torch.full((2, 6, 7, 7, 20), math.nan, dtype=x.dtype)[:, ::2, 1:6, :, 1:19:2].copy_(x)
        return x[:, :1].expand(2, 3, *SIZE)

    if layout == "expanded":
        input, target = (x[:, :1].repeat(1, 3, 1, 1, 1) for x in (input, target))
    arranged = arrange(input)
    assert not arranged.is_contiguous()
    leaf, plain = arranged.detach().requires_grad_(), input.clone().requires_grad_()
    upstream = torch.randn(len(BOXES), dtype=torch.float64)
    results = []
    for x, y in ((leaf, arrange(target)), (plain, target)):
        losses = roi_perceptual_loss(x, y, BOXES, BINS, SCALE, reduction="none")
        results.append((losses, torch.autograd.grad(losses, x, upstream)[0]))
    assert_near(results[0][0], results[1][0])
    assert_near(results[0][1], results[1][1])


@pytest.mark.parametrize("boxes", [torch.zeros(0, 7), [torch.zeros(0, 6), torch.zeros(0, 6)]])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_no_boxes_give_zero_and_a_zero_gradient(boxes, reduction):
    input, target = features()
    input[0, 0, 0, 0] = math.nan
    loss = roi_perceptual_loss(input.requires_grad_(), target, boxes, reduction=reduction)
    assert loss.shape == ((0,) if reduction == "none" else ())
    assert loss.sum() == 0
    loss.sum().backward()
    assert torch.equal(input.grad, torch.zeros_like(input))


def test_empty_batch():
    input = torch.zeros(0, 3, *SIZE, requires_grad=True)
    loss = roi_perceptual_loss(input, torch.zeros(0, 3, *SIZE), [])
    loss.backward()
    assert loss == 0
    assert input.grad.shape == input.shape


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_features_that_no_box_reads_do_not_matter(value):
    input, target = features()
    box = torch.tensor([[0, 4.0, 4.0, 2.0, 8.0, 8.0, 5.0]])  # cells 2..3 of x and y, 1..2 of z, and their neighbours
    results = []
    for _ in range(2):
        leaf = input.clone().requires_grad_()
        loss = roi_perceptual_loss(leaf, target, box, BINS, SCALE)
        results.append((loss, torch.autograd.grad(loss, leaf)[0]))
        input[1] = input[0, :, 4] = input[0, :, :, 6] = input[0, ..., 6:] = value
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_repeats_bitwise():
    input, target = features(torch.float32)
    input.requires_grad_()
    runs = []
    for _ in range(2):
        loss = roi_perceptual_loss(input, target, BOXES, BINS, SCALE)
        runs.append((loss, torch.autograd.grad(loss, input)[0]))
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])


def test_compiles(assert_near):
    input, target = features()

    def loss(x):
        return roi_perceptual_loss(2 * x, target, BOXES[:3], BINS, SCALE, criterion="smooth_l1")

    results = []
    for function in (torch.compile(loss, backend="aot_eager"), loss):
        leaf = input.clone().requires_grad_()
        value = function(leaf)
        results.append((value, torch.autograd.grad(value, leaf)[0]))
    assert_near(results[0][0], results[1][0])
    assert_near(results[0][1], results[1][1])


def test_autocast_changes_nothing():
    input, target = features(torch.bfloat16)
    outside = roi_perceptual_loss(input, target, BOXES, BINS, SCALE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = roi_perceptual_loss(input, target, BOXES, BINS, SCALE)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, outside)


GOOD = torch.zeros(2, 3, 4, 8, 8)
BOX = torch.tensor([[0.0, 1, 1, 1, 4, 4, 3]])


def with_row(*row):
    return torch.cat((BOX, torch.tensor([row], dtype=torch.float32)))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"input": GOOD[None]}, ValueError, r"input must have 4 or 5 dimensions, .*, got shape \(1, 2, 3, 4, 8, 8\)"),
        ({"input": GOOD[:, :, 0]}, ValueError, r"target must have the shape of input, .*got \(2, 3, 4, 8, 8\)"),
        ({"input": GOOD[:, :, 0], "target": GOOD[:, :, 0]}, ValueError, r"\[boxes, 5\] for images, got \(1, 7\)"),
        ({"input": GOOD.int()}, TypeError, "input must be float32.*int32"),
        ({"input": GOOD[:, :, :0], "target": GOOD[:, :, :0]}, ValueError, "input must have C, D, H and W of at least"),
        ({"target": GOOD[:, :2]}, ValueError, r"target must have the shape of input, .*got \(2, 2, 4, 8, 8\)"),
        ({"target": GOOD[:, :, :2]}, ValueError, r"target must have the shape of input, .*got \(2, 3, 2, 8, 8\)"),
        ({"target": GOOD.half()}, TypeError, "target must have the dtype of input.*float16"),
        ({"target": GOOD.to("meta")}, ValueError, "target must be on the device of input, cpu, got meta"),
        ({"target": GOOD.clone().requires_grad_()}, ValueError, r"target requires a gradient.*detach"),
        ({"boxes": None}, TypeError, r"boxes must be a Tensor\[K, 7\] or a list of Tensor\[L, 6\], got NoneType"),
        ({"boxes": BOX.int()}, TypeError, "boxes must be float32.*int32"),
        ({"boxes": BOX[:, :5]}, ValueError, r"boxes must have shape \[boxes, 7\] for volumes, got \(1, 5\)"),
        ({"boxes": BOX[:, 1:]}, ValueError, r"boxes must have shape \[boxes, 7\] for volumes, got \(1, 6\)"),
        ({"boxes": BOX[0]}, ValueError, r"boxes must have shape \[boxes, 7\] for volumes, got \(7,\)"),
        ({"boxes": BOX.to("meta")}, ValueError, "boxes must be on the device.*cpu, got meta"),
        ({"boxes": [BOX[:, 1:]]}, ValueError, "boxes must be a list of 2 Tensors, one per image, got 1"),
        ({"boxes": [BOX[:, 1:], BOX[:, 1:5]]}, ValueError, r"boxes\[1\] must have shape \[boxes, 6\] for volumes"),
        ({"boxes": [BOX[:, 1:], BOX]}, ValueError, r"boxes\[1\] must have shape \[boxes, 6\] .*got \(1, 7\)"),
        (
            {"boxes": with_row(0, 1, 1, math.nan, 4, 4, 3)},
            ValueError,
            r"boxes\[1\] must have finite .*z2\) = .*nan",
        ),
        ({"boxes": with_row(0, 1, 1, 1, 4, 4, math.inf)}, ValueError, r"boxes\[1\] must have finite coordinates.*inf"),
        ({"boxes": with_row(0, 1, 1, -math.inf, 4, 4, 3)}, ValueError, r"boxes\[1\] must have finite coordinates.*inf"),
        ({"boxes": with_row(0, 4, 1, 1, 3, 4, 3)}, ValueError, r"boxes\[1\] must have x2 >= x1 and y2 >= y1 and z2 >="),
        ({"boxes": with_row(0, 1, 4, 1, 4, 3, 3)}, ValueError, r"boxes\[1\] must have x2 >= x1"),
        ({"boxes": with_row(0, 1, 1, 3, 4, 4, 1)}, ValueError, r"\(x1, y1, z1, x2, y2, z2\) = \(1.0, 1.0, 3.0, 4.0, 4"),
        (
            {"boxes": [BOX[:, 1:], torch.tensor([[1.0, 1, 1, 2, 2, 2], [1, 1, 2, 2, 2, 1]])]},
            ValueError,
            r"boxes\[1\]\[1\] must have .*z2 >= z1",
        ),
        ({"boxes": with_row(2, 1, 1, 1, 4, 4, 3)}, ValueError, r"boxes\[1\] must have an integer batch index.*got 2.0"),
        ({"boxes": with_row(-1, 1, 1, 1, 4, 4, 3)}, ValueError, r"boxes\[1\] must have an integer batch .*got -1.0"),
        ({"boxes": with_row(0.5, 1, 1, 1, 4, 4, 3)}, ValueError, r"boxes\[1\] must have an integer batch .*got 0.5"),
        ({"output_size": 0}, ValueError, r"output_size must be an int >= 1 or three of them \(depth, rows, columns\)"),
        ({"output_size": (7, 7)}, ValueError, r"output_size .*got \(7, 7\)"),
        ({"output_size": (7, 7, 7, 7)}, ValueError, r"output_size .*got \(7, 7, 7, 7\)"),
        ({"output_size": (7, -1, 7)}, ValueError, r"output_size .*got \(7, -1, 7\)"),
        ({"output_size": (True, 7, 7)}, ValueError, r"output_size .*got \(True, 7, 7\)"),
        ({"spatial_scale": (0.5, 0.5, 0.5)}, ValueError, r"spatial_scale must be a finite number .*got \(0.5"),
        ({"sampling_ratio": -2}, ValueError, "sampling_ratio must be .*got -2"),
        ({"box_weights": torch.ones(2)}, ValueError, "box_weights must have one value per box, 1, got 2"),
        ({"box_weights": torch.tensor([math.nan])}, ValueError, r"box_weights\[0\] must be finite, got nan"),
    ],
)
def test_bad_input(changes, error, message):
    arguments = {"input": GOOD, "target": GOOD, "boxes": BOX, **changes}
    with pytest.raises(error, match=message) as caught:
        roi_perceptual_loss(**arguments)
    assert "\n" not in str(caught.value)


def test_pyramids_refuse_volumes_and_images_their_boxes():
    image = GOOD[:, :, 0]
    with pytest.raises(ValueError, match=r"boxes must have shape \[boxes, 5\] for images, got \(1, 7\)"):
        multi_loss(image, image, {"mse": 1.0}, boxes=BOX, roi_weight=2.0)
    with pytest.raises(ValueError, match=r"inputs\['p2'\] must have 4 dimensions, \[N, C, H, W\], got shape \(2"):
        multiscale_roi_perceptual_loss({"p2": GOOD}, {"p2": GOOD}, BOX, [(32, 32)] * 2)
    with pytest.raises(ValueError, match=r"boxes must have shape \[boxes, 5\] for images, got \(1, 7\)"):
        multiscale_roi_perceptual_loss({"p2": image}, {"p2": image}, BOX, [(32, 32)] * 2)
