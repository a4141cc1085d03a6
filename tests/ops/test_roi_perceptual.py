import math

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import roi_align

from lidnet_fast import roi_perceptual_loss
from lidnet_fast.functional._boxes import check_boxes

SCALE = 0.25
BOXES = torch.tensor(
    [
        [0, 3.2, 5.1, 30.7, 22.4],
        [1, 10.0, 8.0, 13.0, 11.5],
        [1, 0.0, 0.0, 64.0, 48.0],
        [0, 3.5, 4.5, 28.0, 25.0],
        [1, -9.0, 30.0, 20.0, 90.0],  # leaves the map
        [0, 200.0, 200.0, 220.0, 230.0],  # outside of it
        [0, 12.0, 12.0, 12.0, 20.0],  # no width
    ]
)
CRITERIA = {
    "mse": F.mse_loss,
    "l1": F.l1_loss,
    "smooth_l1": F.smooth_l1_loss,
    "charbonnier": lambda a, b, reduction: ((a - b) ** 2 + 1e-6).sqrt(),
}


def features(dtype=torch.float64, scale=2.0):
    return [(scale * torch.randn(2, 3, 12, 16, dtype=torch.float64)).to(dtype) for _ in range(2)]


def expected_losses(input, target, boxes=BOXES, *, size=7, ratio=2, aligned=True, criterion="mse"):
    """Per box, in float64, from torchvision and torch.nn.functional."""
    input, target, boxes = input.double(), target.double(), boxes.double()
    pooled = [roi_align(x, boxes, size, SCALE, ratio, aligned) for x in (input, target)]
    return CRITERIA[criterion](*pooled, reduction="none").mean((1, 2, 3))


def test_mean_is_mse_of_torchvision_pooled(assert_near):
    input, target = features()
    pooled = [roi_align(x, BOXES.double(), 7, SCALE, 2, True) for x in (input, target)]
    assert_near(roi_perceptual_loss(input, target, BOXES, spatial_scale=SCALE), F.mse_loss(*pooled))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_losses_and_gradients_with_random_upstream(assert_near, criterion, dtype):
    input, target = features(dtype)
    input.requires_grad_()
    losses = roi_perceptual_loss(
        input, target, BOXES, spatial_scale=SCALE, criterion=criterion, reduction="none", output_size=(5, 3)
    )
    assert losses.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    upstream = torch.randn(len(BOXES), dtype=losses.dtype)
    losses.backward(upstream)
    leaf = input.detach().double().requires_grad_()
    expected = expected_losses(leaf, target, size=(5, 3), criterion=criterion)
    expected.backward(upstream.double())
    assert_near(losses, expected, torch.float32 if dtype != torch.float64 else dtype)
    assert input.grad.dtype == dtype
    assert_near(input.grad, leaf.grad, dtype)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("ratio", [-1, 0, 1, 3])
def test_sampling_follows_torchvision(assert_near, ratio, aligned):
    input, target = features()
    losses = roi_perceptual_loss(input, target, BOXES, 4, SCALE, ratio, aligned, reduction="none")
    assert_near(losses, expected_losses(input, target, size=4, ratio=ratio, aligned=aligned))


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_weights_and_reductions(assert_near, reduction):
    input, target = features()
    weights = torch.rand(len(BOXES))
    weighted = expected_losses(input, target) * weights.double()
    expected = {"none": weighted, "sum": weighted.sum(), "mean": weighted.sum() / len(BOXES)}[reduction]
    loss = roi_perceptual_loss(input, target, BOXES, spatial_scale=SCALE, box_weights=weights, reduction=reduction)
    assert_near(loss, expected)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_gradcheck(criterion):
    input, target = features(scale=1.0)

    def losses(x):
        return roi_perceptual_loss(
            x, target, BOXES[:5], 3, SCALE, criterion=criterion, box_weights=torch.arange(1.0, 6.0), reduction="none"
        )

    assert torch.autograd.gradcheck(losses, input.requires_grad_(), fast_mode=True)


def test_list_of_boxes_equals_tensor():
    input, target = features()
    boxes = [BOXES[BOXES[:, 0] == image, 1:] for image in range(2)]
    order = torch.cat([(BOXES[:, 0] == image).nonzero().squeeze(1) for image in range(2)])
    as_list = roi_perceptual_loss(input, target, boxes, spatial_scale=SCALE, reduction="none")
    as_tensor = roi_perceptual_loss(input, target, BOXES, spatial_scale=SCALE, reduction="none")
    assert torch.equal(as_list, as_tensor[order])


@pytest.mark.parametrize("box_dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_boxes_of_any_float_dtype(box_dtype):
    input, target = features(torch.float32)
    boxes = torch.tensor([[0, 4.0, 8.0, 24.0, 20.0], [1, 2.5, 3.0, 9.0, 11.0]])  # exact in every dtype
    losses = [roi_perceptual_loss(input, target, b, spatial_scale=SCALE) for b in (boxes, boxes.to(box_dtype))]
    assert torch.equal(*losses)


@pytest.mark.parametrize("boxes", [BOXES.clone().requires_grad_(), [BOXES[:1, 1:].clone().requires_grad_()] * 2])
def test_boxes_that_require_a_gradient_are_refused(boxes):
    input, target = features()
    with pytest.raises(ValueError, match=r"boxes(\[0\])? requires a gradient but never gets one.*detach\(\)"):
        roi_perceptual_loss(input.requires_grad_(), target, boxes, spatial_scale=SCALE)


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "sliced", "expanded"])
def test_layouts(assert_near, layout):
    input, target = features()

    def arrange(x):
        if layout == "channels_last":
            return x.contiguous(memory_format=torch.channels_last)
        if layout == "transposed":
            return x.transpose(2, 3).contiguous().transpose(2, 3)
        if layout == "sliced":
            return torch.full((2, 6, 14, 34), math.nan, dtype=x.dtype)[:, ::2, 1:13, 1:33:2].copy_(x)
        return x[:, :1].expand(2, 3, 12, 16)

    if layout == "expanded":
        input, target = (x[:, :1].repeat(1, 3, 1, 1) for x in (input, target))
    arranged = arrange(input)
    assert not arranged.is_contiguous()
    leaf, plain = arranged.detach().requires_grad_(), input.clone().requires_grad_()
    upstream = torch.randn(len(BOXES), dtype=torch.float64)
    results = []
    for x, y in ((leaf, arrange(target)), (plain, target)):
        losses = roi_perceptual_loss(x, y, BOXES, spatial_scale=SCALE, reduction="none")
        results.append((losses, torch.autograd.grad(losses, x, upstream)[0]))
    assert_near(results[0][0], results[1][0])
    assert_near(results[0][1], results[1][1])


@pytest.mark.parametrize("boxes", [torch.zeros(0, 5), [torch.zeros(0, 4), torch.zeros(0, 4)]])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_no_boxes_give_zero_and_a_zero_gradient(boxes, reduction):
    input, target = features()
    input[0, 0, 0, 0] = math.nan  # features that no box reads don't matter
    loss = roi_perceptual_loss(input.requires_grad_(), target, boxes, reduction=reduction)
    assert loss.shape == ((0,) if reduction == "none" else ())
    assert loss.sum() == 0
    loss.sum().backward()
    assert torch.equal(input.grad, torch.zeros_like(input))


def test_empty_batch():
    input = torch.zeros(0, 3, 4, 4, requires_grad=True)
    loss = roi_perceptual_loss(input, torch.zeros(0, 3, 4, 4), [])
    loss.backward()
    assert loss == 0
    assert input.grad.shape == input.shape
    expanded = torch.zeros(1, 1, 1, 1).expand(0, 3, 4, 4)  # of strides that no kernel expects
    assert roi_perceptual_loss(expanded, expanded.transpose(2, 3), []) == 0


def test_repeats_bitwise():
    input, target = features(torch.float32)
    input.requires_grad_()
    runs = []
    for _ in range(2):
        loss = roi_perceptual_loss(input, target, BOXES, spatial_scale=SCALE)
        runs.append((loss, torch.autograd.grad(loss, input)[0]))
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])


@pytest.mark.parametrize("as_list", [False, True])
def test_compiles_as_one_graph(assert_near, as_list):
    input, target = features()
    boxes = [BOXES[:2, 1:], BOXES[2:, 1:]] if as_list else BOXES

    def loss(x):
        return roi_perceptual_loss(x, target, boxes, spatial_scale=SCALE, criterion="smooth_l1")

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    results = []
    for function in (compiled, loss):
        leaf = input.clone().requires_grad_()
        value = function(leaf)
        results.append((value, torch.autograd.grad(value, leaf)[0]))
    assert_near(results[0][0], results[1][0])
    assert_near(results[0][1], results[1][1])


def test_autocast_changes_nothing():
    input, target = features(torch.bfloat16)
    outside = roi_perceptual_loss(input, target, BOXES, spatial_scale=SCALE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = roi_perceptual_loss(input, target, BOXES, spatial_scale=SCALE)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, outside)


GOOD = torch.zeros(2, 3, 8, 8)
BOX = torch.tensor([[0.0, 1, 1, 4, 4]])


def with_row(*row):
    return torch.cat((BOX, torch.tensor([row], dtype=torch.float32)))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"input": "features"}, TypeError, "input must be a Tensor, got str"),
        ({"input": GOOD.long()}, TypeError, "input must be float32.*int64"),
        ({"input": GOOD[0]}, ValueError, r"input must have 4 or 5 dimensions, .*got shape \(3, 8, 8\)"),
        ({"input": GOOD[:, :0], "target": GOOD[:, :0]}, ValueError, r"input must have C, H and W of at least 1"),
        ({"target": GOOD[:, :2]}, ValueError, r"target must have the shape of input, .*got \(2, 2, 8, 8\)"),
        ({"target": GOOD.double()}, TypeError, "target must have the dtype of input.*float64"),
        ({"target": GOOD.to("meta")}, ValueError, "target must be on the device of input, cpu, got meta"),
        ({"target": GOOD.clone().requires_grad_()}, ValueError, r"target requires a gradient.*detach"),
        ({"boxes": None}, TypeError, "boxes must be a Tensor.*NoneType"),
        ({"boxes": BOX.long()}, TypeError, r"boxes must be float32.*int64. To fix: boxes.float\(\)$"),
        (
            {"boxes": BOX[:, 1:]},
            ValueError,
            r"\[boxes, 5\] .* got \(1, 4\). To fix: put the batch index into column 0, or",
        ),
        ({"boxes": BOX.numpy()}, TypeError, r"boxes must be .* got ndarray. To fix: torch.as_tensor\(boxes\)"),
        ({"boxes": [BOX[:, 1:].numpy()] * 2}, TypeError, r"boxes\[0\] must be .*: torch.as_tensor\(boxes\[0\]\)"),
        (
            {"boxes": [[[1.0, 1, 2, 2]]] * 2},
            TypeError,
            r"boxes\[0\] must be .* list. To fix: torch.tensor\(boxes\[0\]\)",
        ),
        ({"boxes": BOX[:, [0, 1, 2, 2, 3, 4, 4]]}, ValueError, r"\[boxes, 5\] for images, got \(1, 7\)"),
        ({"boxes": BOX[0]}, ValueError, r"boxes must have shape \[boxes, 5\] for images, got \(5,\)"),
        ({"boxes": BOX.to("meta")}, ValueError, "boxes must be on the device.*cpu, got meta"),
        ({"boxes": [BOX[:, 1:]]}, ValueError, r"2 Tensors, one per image, got 1; .* torch.zeros\(0, 4\)$"),
        ({"boxes": [BOX[:, 1:], BOX]}, ValueError, r"boxes\[1\] must have shape \[boxes, 4\] .*got \(1, 5\)"),
        ({"boxes": [BOX[:, 1:], torch.zeros(0)]}, ValueError, r"boxes\[1\] must .* torch.zeros\(0, 4\)$"),
        ({"boxes": with_row(0, math.nan, 1, 4, 4)}, ValueError, r"boxes\[1\] must have finite coordinates.*nan"),
        ({"boxes": with_row(0, 1, 1, math.inf, 4)}, ValueError, r"boxes\[1\] must have finite coordinates.*inf"),
        ({"boxes": with_row(0, 1, -math.inf, 4, 4)}, ValueError, r"boxes\[1\] must have finite coordinates.*-inf"),
        ({"boxes": with_row(0, 4, 1, 3, 4)}, ValueError, r"boxes\[1\] must have x2 >= x1.*4.0, 1.0, 3.0, 4.0"),
        ({"boxes": with_row(0, 1, 4, 4, 3)}, ValueError, r"boxes\[1\] must have .*y2 >= y1"),
        (
            {"boxes": [BOX[:, 1:], torch.tensor([[1.0, 1, 2, 2], [math.nan, 1, 2, 2]])]},
            ValueError,
            r"boxes\[1\]\[1\] must have finite coordinates",
        ),
        ({"boxes": with_row(2, 1, 1, 4, 4)}, ValueError, r"boxes\[1\] must have an integer batch index.*2\), got 2.0"),
        ({"boxes": with_row(-1, 1, 1, 4, 4)}, ValueError, r"boxes\[1\] must have an integer batch index.*got -1.0"),
        ({"boxes": with_row(0.5, 1, 1, 4, 4)}, ValueError, r"boxes\[1\] must have an integer batch index.*got 0.5"),
        ({"boxes": with_row(math.nan, 1, 1, 4, 4)}, ValueError, r"boxes\[1\] must have an integer batch index.*nan"),
        ({"output_size": 0}, ValueError, r"output_size must be an int >= 1 or two of them \(rows, columns\), got 0"),
        ({"output_size": -7}, ValueError, "output_size .*got -7"),
        ({"output_size": (7, 0)}, ValueError, r"output_size .*got \(7, 0\)"),
        ({"output_size": (7, 7, 7)}, ValueError, r"output_size .*got \(7, 7, 7\)"),
        ({"output_size": 7.0}, ValueError, "output_size .*got 7.0"),
        ({"output_size": True}, ValueError, "output_size .*got True"),
        ({"output_size": ()}, ValueError, r"output_size .*got \(\)"),
        ({"output_size": None}, ValueError, "output_size .*got None"),
        ({"spatial_scale": 0.0}, ValueError, "spatial_scale must be a finite number above 0, got 0.0"),
        ({"spatial_scale": math.nan}, ValueError, "spatial_scale must be .*got nan"),
        ({"spatial_scale": 10**400}, ValueError, "spatial_scale must be .*got 1000"),
        ({"spatial_scale": True}, ValueError, "spatial_scale must be .*got True"),
        ({"spatial_scale": 1e300}, ValueError, r"boxes\[0\] must have finite coordinates \(once times spatial_sc"),
        ({"spatial_scale": 1e37, "boxes": BOX * 9}, ValueError, r"boxes\[0\] must have finite coordinates \(once"),
        ({"spatial_scale": "1/4"}, ValueError, "spatial_scale must be .*got '1/4'"),
        ({"sampling_ratio": -2}, ValueError, "sampling_ratio must be .*got -2"),
        ({"sampling_ratio": 2.0}, ValueError, "sampling_ratio must be .*got 2.0"),
        ({"sampling_ratio": True}, ValueError, "sampling_ratio must be .*got True"),
        ({"aligned": 1}, TypeError, "aligned must be True or False, got 1"),
        ({"criterion": "l2"}, ValueError, "criterion must be one of mse, l1, smooth_l1, charbonnier, got 'l2'"),
        ({"reduction": "average"}, ValueError, "reduction must be one of none, sum, mean, got 'average'"),
        ({"box_weights": torch.ones(2)}, ValueError, "box_weights must have one value per box, 1, got 2"),
        ({"box_weights": torch.ones(1, 1)}, ValueError, r"box_weights must have 1 dimension, got shape \(1, 1\)"),
        ({"box_weights": [1.0]}, TypeError, "box_weights must be a Tensor, got list"),
        ({"box_weights": torch.ones(1, dtype=torch.int32)}, TypeError, "box_weights must be float32.*int32"),
        ({"box_weights": torch.ones(1, device="meta")}, ValueError, "box_weights must be on the device.*got meta"),
        ({"box_weights": torch.tensor([math.inf])}, ValueError, r"box_weights\[0\] must be finite, got inf"),
        ({"box_weights": torch.ones(1, requires_grad=True)}, ValueError, "box_weights requires a gradient"),
    ],
)
def test_bad_input(changes, error, message):
    arguments = {"input": GOOD, "target": GOOD, "boxes": BOX, **changes}
    with pytest.raises(error, match=message) as caught:
        roi_perceptual_loss(**arguments)
    assert "\n" not in str(caught.value)


def test_boxes_of_an_empty_batch():
    nothing = torch.zeros(0, 3, 8, 8)
    for index in (-1, 0):
        boxes = torch.tensor([[index, 1.0, 1, 4, 4]])
        with pytest.raises(ValueError, match=rf"boxes\[0\] must have an integer batch index in \[0, 0\), got {index}"):
            roi_perceptual_loss(nothing, nothing, boxes)


def test_numbers_of_numpy():
    input, target = features()
    plain = roi_perceptual_loss(input, target, BOXES, (5, 3), SCALE, 1)
    numpys = (np.int64(5), np.int32(3)), np.float32(SCALE), np.int64(1)
    assert torch.equal(roi_perceptual_loss(input, target, BOXES, *numpys), plain)


BAD_VALUES = {
    "nan": {"boxes": with_row(0, math.nan, 1, 4, 4)},
    "infinite": {"boxes": with_row(0, 1, 1, math.inf, 4)},
    "unordered": {"boxes": with_row(0, 4, 1, 3, 4)},
    "index": {"boxes": with_row(2, 1, 1, 4, 4)},
    "unordered in a list": {"boxes": [BOX[:, 1:], torch.tensor([[1.0, 4, 4, 3]])]},
    "weight": {"boxes": BOX, "box_weights": torch.tensor([math.nan])},
}


@pytest.mark.parametrize("bad", BAD_VALUES.values(), ids=BAD_VALUES)
def test_compiled_code_asserts_what_eager_code_checks(bad):
    def loss(input, target, **values):
        return roi_perceptual_loss(input, target, **values)

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    with pytest.raises(RuntimeError, match=r"must (have|be) finite"):
        compiled(GOOD, GOOD, **bad)


class Calls(TorchDispatchMode):
    """Records which operators run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("as_list", [False, True])
@pytest.mark.parametrize("dimensions", [2, 3])
def test_no_value_is_read_on_cuda(dimensions, as_list):
    """Fake tensors have no values: reading one raises. They need no device either."""
    with FakeTensorMode(), Calls() as calls:
        input = torch.empty(2, 3, *[8] * dimensions, device="cuda")
        boxes = torch.empty(4, 1 + 2 * dimensions, device="cuda", dtype=torch.float64)
        boxes = [boxes[:3, 1:], boxes[3:, 1:]] if as_list else boxes
        rois, weights, _ = check_boxes(boxes, input, box_weights=torch.empty(4, device="cuda"))
    assert (rois.shape, rois.dtype, rois.device) == ((4, 1 + 2 * dimensions), torch.float32, input.device)
    assert weights.shape == (4,)
    assert calls.names.count("_assert_async") == 2
    assert not {"_local_scalar_dense", "nonzero"} & set(calls.names)


def test_vmapped_boxes_reach_the_op():
    """Their values can't be read; whether an implementation can map over them is its own business."""
    boxes, weights = BOX.expand(5, 1, 5), torch.ones(5, 1)

    def checked(boxes, weights):
        return check_boxes(boxes, GOOD, box_weights=weights)[:2]

    rois, kept = torch.vmap(checked)(boxes, weights)
    assert torch.equal(rois, boxes)
    assert torch.equal(kept, weights)
    scaled = torch.func.grad(lambda x, *values: (x * checked(*values)[0]).sum())  # wraps what vmap has wrapped
    assert torch.equal(torch.vmap(scaled)(torch.ones(5), boxes, weights), BOX.sum().expand(5))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_agrees_and_does_not_synchronise(assert_near, dtype):
    input, target = features(dtype)
    device_input, device_target, device_boxes = (x.cuda() for x in (input, target, BOXES))
    device_input.requires_grad_()
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = roi_perceptual_loss(device_input, device_target, device_boxes, spatial_scale=SCALE, reduction="none")
        losses.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    leaf = input.double().requires_grad_()
    expected = expected_losses(leaf, target)
    expected.sum().backward()
    assert_near(losses.cpu(), expected, torch.float32)
    assert_near(device_input.grad.cpu(), leaf.grad, dtype)
