"""What holds for the kernel beyond its agreement with torchvision, which test_roi_align.py shows."""

import pytest
import torch
import torchvision
from torch.library import opcheck

from lidnet_fast import backend, multiscale_roi_align, reference, roi_align

pytestmark = pytest.mark.skipif("fused" not in backend.available(), reason="the extension isn't built")

BOXES = torch.tensor([[0, 1.5, 2, 20, 17], [1, 0, 0, 22, 18], [1, -4, 5, 9, 40], [0, 3, 3, 3, 3]])
POOLING = (BOXES, torch.tensor([0, 1, 1, 0]), [1.0, 0.5], [3, 2], 2, True)


@pytest.fixture(autouse=True)
def _backend():
    backend.use("fused")
    yield
    backend.use(None)


def features(*shape, dtype=torch.float32, channels_last=False):
    form = torch.channels_last if channels_last else torch.contiguous_format
    return torch.randn(*shape, dtype=torch.float64).to(dtype).contiguous(memory_format=form)


def many_boxes(count, images, width, height):
    corner = torch.rand(count, 2) * torch.tensor([width, height]) * 1.2 - 0.1 * width
    side = torch.tensor([width, height]) ** torch.rand(count, 2)
    index = torch.randint(images, (count, 1)).float()
    return torch.cat((index, corner, corner + side), dim=1)


def pooled_and_gradient(pool, input, boxes, upstream, *arguments):
    leaf = input.detach().requires_grad_()
    pooled = pool(leaf, boxes, *arguments)
    return pooled.detach(), torch.autograd.grad(pooled, leaf, upstream.to(pooled.dtype))[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("channels", "height", "width", "bins"),
    [(8, 40, 33, 7), (37, 19, 64, (9, 2)), (70, 5, 7, (2, 17)), (1, 30, 8, 1), (33, 9, 9, 16)],
)
def test_shapes_that_do_and_do_not_fill_the_vectors(assert_near, dtype, channels_last, channels, height, width, bins):
    input = features(2, channels, height, width, dtype=dtype, channels_last=channels_last)
    boxes = many_boxes(25, 2, width, height)
    expected = torchvision.ops.roi_align(input.double(), boxes.double(), bins, 0.9)
    upstream = torch.randn(expected.shape).to(dtype)
    ours = pooled_and_gradient(roi_align, input, boxes, upstream, bins, 0.9)
    theirs = pooled_and_gradient(torchvision.ops.roi_align, input.double(), boxes.double(), upstream, bins, 0.9)
    assert_near(ours[0], theirs[0], dtype)
    assert ours[1].stride() == input.stride()
    assert_near(ours[1], theirs[1], dtype)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("bins", [1, 3, 7])
def test_nothing_is_written_beside_the_bins_and_all_of_them_are(channels_last, bins):
    """Freed memory full of NaN mustn't shine through, and each box and channel has the value of its own."""
    input = torch.arange(2 * 33).view(2, 33, 1, 1).float().expand(2, 33, 12, 12)
    input = input.contiguous(memory_format=torch.channels_last) if channels_last else input.contiguous()
    boxes = torch.tensor([[1.0, 2, 2, 9, 9], [0, 3, 3, 8, 8], [1, 4, 4, 10, 10]])
    for _ in range(3):
        poison = [torch.full((3, 33, bins, bins), torch.nan) for _ in range(4)]
        del poison
        pooled = roi_align(input, boxes, bins, sampling_ratio=2)
        torch.testing.assert_close(pooled, input[boxes[:, 0].long(), :, :1, :1].expand(-1, -1, bins, bins))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_cell_of_the_gradient_is_written(dtype, channels_last):
    input = features(2, 33, 64, 64, dtype=dtype, channels_last=channels_last)
    boxes = torch.tensor([[1.0, 5, 5, 9, 9]])
    for _ in range(3):
        poison = [torch.full_like(input, torch.nan) for _ in range(4)]
        del poison
        _, gradient = pooled_and_gradient(roi_align, input, boxes, torch.ones(1, 33, 7, 7), 7)
        assert gradient.isfinite().all()
        assert not gradient[0].any()
        assert not gradient[1, :, 20:].any()


@pytest.mark.parametrize("channels_last", [False, True])
def test_any_number_of_threads_gives_the_same_bits(with_threads, channels_last):
    input = features(3, 50, 40, 40, channels_last=channels_last)
    boxes, upstream = many_boxes(60, 3, 40, 40), torch.randn(60, 50, 5, 5)
    first, *others = with_threads(lambda: pooled_and_gradient(roi_align, input, boxes, upstream, 5), (1, 2, 3, 7, 2))
    for pooled, gradient in others:
        assert torch.equal(pooled, first[0])
        assert torch.equal(gradient, first[1])


def test_overlapping_boxes_in_half_precision_are_summed_in_float32():
    """Summed in bfloat16, 3000 equal contributions would stop growing at 256 times the first."""
    input = features(1, 8, 8, 8, dtype=torch.bfloat16)
    boxes = torch.tensor([[0.0, 1, 1, 2, 2]]).repeat(3000, 1)
    _, gradient = pooled_and_gradient(roi_align, input, boxes, torch.ones(3000, 8, 1, 1), 1, 1.0, 1, True)
    assert torch.equal(gradient[0, :, 1, 1], torch.full((8,), 3000.0).bfloat16())


def test_the_input_may_be_changed_before_the_backward(assert_near):
    leaf = features(2, 3, 9, 12, dtype=torch.float64).requires_grad_()
    input = leaf.clone()
    pooled = roi_align(input, BOXES, 3, 0.5)
    input.zero_()
    (gradient,) = torch.autograd.grad(pooled.sum(), leaf)
    _, expected = pooled_and_gradient(torchvision.ops.roi_align, leaf, BOXES.double(), torch.ones(4, 3, 3, 3), 3, 0.5)
    assert_near(gradient, expected)


@pytest.mark.parametrize("channels_last", [False, True])
def test_derivatives_of_derivatives(channels_last):
    input = features(2, 2, 5, 6, dtype=torch.float64, channels_last=channels_last).requires_grad_()
    boxes = BOXES * torch.tensor([1, 0.25, 0.25, 0.25, 0.25])
    assert torch.autograd.gradgradcheck(lambda x: roi_align(x, boxes, 2).square(), input)


def test_boxes_as_large_as_numbers_go_take_no_time_and_no_memory():
    boxes = torch.tensor([[0, -1e30, -1e30, 1e30, 1e30], [0, 1e9, 1e9, 2e9, 2e9], [0, -3e38, 0, 3e38, 3]])
    pooled, gradient = pooled_and_gradient(roi_align, features(1, 2, 8, 8), boxes, torch.ones(3, 2, 7, 7), 7)
    assert pooled.isfinite().all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_opcheck(dtype, channels_last):
    inputs = [features(2, 5, 18 >> k, 24 >> k, dtype=dtype, channels_last=channels_last) for k in range(2)]
    shapes = [side for x in inputs for side in x.shape]
    opcheck(torch.ops.lidnet_fast.roi_align.default, ([x.requires_grad_() for x in inputs], *POOLING))
    upstream = torch.randn(4, 5, 3, 2).to(dtype).requires_grad_()
    opcheck(torch.ops.lidnet_fast.roi_align_backward.default, (upstream, *POOLING, shapes, channels_last))


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (1, BOXES.index_fill(1, torch.tensor([0]), 7), r"boxes\[0\] must have an integer batch index in \[0, 2\)"),
        (1, BOXES * torch.nan, r"boxes\[0\] must have an integer batch index"),
        (1, BOXES.flip(1).index_fill(1, torch.tensor([0]), 0), r"boxes\[0\] must have finite, ordered coordinates"),
        (1, BOXES.double(), "rois must be float64 for float64 features, else float32"),
        (1, BOXES[:, 1:], r"rois must have shape \[K, 5\]"),
        (2, torch.tensor([0, 1, 2, 0]), r"box_levels\[2\] must be a level, got 2"),
        (2, None, "box_levels is needed for more than one level"),
        (3, [1.0], "one entry per level"),
        (4, [3, 3, 3], "output_size must have 2 entries"),
        (0, [torch.zeros(2, 5, 8, 8), torch.zeros(2, 4, 4, 4)], "levels must have as many channels, got 4 and 5"),
        (0, [torch.zeros(2, 5, 8, 8), torch.zeros(1, 5, 4, 4)], "levels must share dimensions, batch size and dtype"),
        (0, [torch.zeros(2, 5, 8, 8), torch.zeros(2, 5, 4, 4).mT[..., ::2]], "must be contiguous or channels_last"),
    ],
)
def test_the_kernel_checks_what_compiled_code_could_not(place, value, message):
    """Values of boxes can't be looked at while torch.compile traces; memory stays safe all the same."""
    arguments = [[features(2, 5, 18, 24), features(2, 5, 9, 12)], *POOLING]
    arguments[place] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.lidnet_fast.roi_align(*arguments)


@pytest.mark.parametrize(
    ("upstream", "shapes", "message"),
    [
        (torch.zeros(4, 5, 3, 3), [2, 5, 8, 8, 2, 5, 4, 4], "grad_pooled must have the bins' shape"),
        (torch.zeros(4, 5, 3, 2), [2, 5, 8, 8], "shapes must have 4 numbers per level"),
        (torch.zeros(4, 5, 3, 2), [2, 5, 8, 8, 1, 5, 4, 4], "levels must share the batch size"),
    ],
)
def test_the_backward_checks_its_shapes(upstream, shapes, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.lidnet_fast.roi_align_backward(upstream, *POOLING, shapes, False)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_a_pyramid_compiles_as_one_graph(assert_near, compiler):
    def pool(a, b, boxes):
        sizes = [(36, 48)] * 2
        pooled = multiscale_roi_align({"a": a, "b": b}, boxes, sizes, 3, 2, canonical_scale=16, canonical_level=1)
        return pooled.square().mean()

    inputs = features(2, 5, 18, 24), features(2, 5, 9, 12, channels_last=True)
    results = []
    for function in (pool, torch.compile(pool, backend=compiler, fullgraph=True)):
        leaves = [x.clone().requires_grad_() for x in inputs]
        value = function(*leaves, BOXES * torch.tensor([1, 2, 2, 2, 2]))
        results.append((value, *torch.autograd.grad(value, leaves)))
    for ours, expected in zip(*results, strict=True):
        assert_near(ours, expected, torch.float32)


def test_devices_without_kernels_run_on_the_definition():
    assert backend.implementation("roi_align", torch.device("cpu")) is not reference.roi_align
    assert backend.implementation("roi_align", torch.device("mps")) is reference.roi_align
