"""What holds for the kernels beyond their agreement with the definition, which test_multi_loss.py shows."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck

from lidnet_fast import backend, multi_loss, multi_loss_jacobian, reference

pytestmark = pytest.mark.skipif("fused" not in backend.available(), reason="the extension isn't built")

WEIGHTS = {"l1": 0.7, "mse": -3.0, "charbonnier": 1.3, "ssim": 0.5, "edge": 0.2, "tv": 0.1}
WITH_MS_SSIM = {**WEIGHTS, "ms_ssim": 2.0}
BOXES = torch.tensor([[0, 1.5, 2, 9, 7.5], [0, 4, 4, 30, 6], [1, -4, 5, 9, 40], [0, 3, 3, 3, 3]])

VOLUME_BOXES = torch.tensor([[0, 1.5, 2, 3, 9, 7.5, 8], [0, 4, 4, 0, 30, 6, 2], [1, -4, 5, -4, 9, 40, 40]])


@pytest.fixture(autouse=True)
def _backend():
    backend.use("fused")
    yield
    backend.use(None)


def images(*shape, dtype=torch.float32):
    target = torch.rand(shape, dtype=torch.float64)
    return (target + 0.1 * torch.randn(shape, dtype=torch.float64)).to(dtype), target.to(dtype)


def evaluate(input, target, weights, **options):
    leaf = input.detach().requires_grad_()
    total, values = multi_loss(leaf, target, weights, **options)
    return total.detach(), torch.stack(list(values.values())), torch.autograd.grad(total, leaf)[0]


def expected(input, target, weights, boxes=None, roi_weight=1.0, data_range=1.0):
    """The definition in float64, of the images in the precision that they are stored in."""
    leaf = input.detach().double().requires_grad_()
    options = (None if boxes is None else boxes.double(), roi_weight, data_range)
    total, values = reference.multi_loss(leaf, target.double(), list(weights), list(weights.values()), *options)
    return total.detach(), values.detach(), torch.autograd.grad(total, leaf)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 11, 11), (2, 1, 12, 75), (2, 2, 19, 64), (1, 3, 64, 54), (1, 1, 26, 118), (2, 1, 9, 3), (1, 1, 2, 200)],
)
def test_sides_that_do_and_do_not_fill_strips_and_panels(assert_near, dtype, shape):
    smallest = {"ssim": 11, "edge": 3}
    weights = {name: weight for name, weight in WEIGHTS.items() if min(shape[2:]) >= smallest.get(name, 1)}
    pair, boxes = images(*shape, dtype=dtype), BOXES[BOXES[:, 0] < shape[0]]
    options = {"boxes": boxes, "roi_weight": 3.0, "data_range": 0.8}
    ours, theirs = evaluate(*pair, weights, **options), expected(*pair, weights, **options)
    for actual, exact, tolerance in zip(ours, theirs, (torch.float32, torch.float32, dtype), strict=True):
        assert_near(actual, exact, dtype if dtype == torch.float64 else tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1, 11, 11, 11), (2, 2, 12, 19, 70), (1, 1, 25, 17, 12), (2, 1, 4, 3, 9)])
def test_volumes_that_do_and_do_not_fill_strips_and_panels(assert_near, dtype, shape):
    weights = {name: weight for name, weight in WEIGHTS.items() if min(shape[2:]) >= 11 or name != "ssim"}
    pair, boxes = images(*shape, dtype=dtype), VOLUME_BOXES[VOLUME_BOXES[:, 0] < shape[0]]
    options = {"boxes": boxes, "roi_weight": 3.0, "data_range": 0.8}
    ours, theirs = evaluate(*pair, weights, **options), expected(*pair, weights, **options)
    for actual, exact, tolerance in zip(ours, theirs, (torch.float32, torch.float32, dtype), strict=True):
        assert_near(actual, exact, dtype if dtype == torch.float64 else tolerance)
    for name, row in zip(weights, multi_loss_jacobian(*pair, list(weights), **options), strict=True):
        of_term = expected(*pair, {name: 1.0}, **options)[2]
        assert_near(row, of_term, torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("shape", [(2, 1, 161, 163), (1, 2, 176, 250)])
def test_all_scales(assert_near, dtype, shape):
    pair = images(*shape, dtype=dtype)
    ours, theirs = evaluate(*pair, WITH_MS_SSIM), expected(*pair, WITH_MS_SSIM)
    for actual, exact in zip(ours, theirs, strict=True):
        assert_near(actual, exact, dtype)
    jacobian = multi_loss_jacobian(*pair, list(WITH_MS_SSIM))
    for name, row in zip(WITH_MS_SSIM, jacobian, strict=True):
        assert_near(row, expected(*pair, {name: 1.0})[2], torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 2000.0])
@pytest.mark.parametrize("noise", [1e-4, 0.1])
def test_alike_images_lose_no_digits(assert_near, scale, noise):
    """HU-like offsets and images that nearly agree, where x^2 - mean^2 and 1 - SSIM would cancel in float32."""
    smooth = torch.nn.functional.avg_pool2d(torch.rand(1, 1, 80, 80, dtype=torch.float64), 9, 1, 4)
    target = (scale * (3 + smooth)).float()
    input = (target.double() * (1 + noise * torch.randn_like(smooth) / 3)).float()
    ours = evaluate(input, target, {"ssim": 1.0}, data_range=scale)
    theirs = expected(input, target, {"ssim": 1.0}, data_range=scale)
    assert_near(ours[0], theirs[0], None, 1e-5)
    assert_near(ours[2], theirs[2], None, 1e-4)


@pytest.mark.parametrize(("shape", "weights"), [((1, 1, 170, 170), WITH_MS_SSIM), ((1, 1, 15, 15, 15), WEIGHTS)])
def test_constant_images_give_numbers(shape, weights):
    for level, other in ((0.0, 0.0), (0.7, 0.7), (1000.0, 0.0)):
        input, target = torch.full(shape, level), torch.full(shape, other)
        for result in evaluate(input, target, weights):
            assert result.isfinite().all()


@pytest.mark.parametrize("name", list(WITH_MS_SSIM))
def test_nan_reaches_the_value_of_its_term(name):
    input, target = images(1, 1, 170, 170)
    input[0, 0, 100, 169] = torch.nan
    total, _, gradient = evaluate(input, target, {name: 1.0})
    assert total.isnan()
    assert gradient[0, 0, 100, 169].isnan()
    if name != "ms_ssim":
        assert gradient[0, 0, :80].isfinite().all()


@pytest.mark.parametrize(
    ("shape", "weights"),
    [((3, 1, 250, 170), w) for w in (WITH_MS_SSIM, {"ssim": 1.0}, {"edge": 1.0}, {"tv": 1.0})]
    + [((2, 1, 37, 50, 40), w) for w in (WEIGHTS, {"ssim": 1.0}, {"edge": 1.0}, {"tv": 1.0})],
)
def test_any_number_of_threads_gives_the_same_bits(with_threads, shape, weights):
    pair = images(*shape)
    boxes = VOLUME_BOXES if len(shape) == 5 else torch.tensor([[1.0, 3, 4, 90, 80], [1, 30, 30, 170, 33]])
    options = {"boxes": boxes, "roi_weight": 5.0}

    def everything():
        return *evaluate(*pair, weights, **options), multi_loss_jacobian(*pair, list(weights), **options)

    results = with_threads(everything, (1, 2, 3, 7))
    for result in results[1:]:
        for actual, first in zip(result, results[0], strict=True):
            assert torch.equal(actual, first)


def test_every_pixel_of_a_gradient_is_written():
    """Gradients are allocated empty: freed memory full of NaN mustn't shine through."""
    for shape, weights in (((2, 1, 181, 173), WITH_MS_SSIM), ((1, 1, 20, 50, 60), WEIGHTS)):
        pair = images(*shape)
        for _ in range(3):
            poison = [torch.full((6, *shape), torch.nan) for _ in range(4)]
            del poison
            assert evaluate(*pair, weights)[2].isfinite().all()
            assert multi_loss_jacobian(*pair, list(weights)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rois", [None, BOXES])
def test_opcheck(dtype, rois):
    input, target = images(2, 1, 14, 20, dtype=dtype)
    arguments = (list(WEIGHTS), list(WEIGHTS.values()), rois, 2.0, 1.0)
    opcheck(torch.ops.lidnet_fast.multi_loss.default, (input, target, *arguments, False))
    opcheck(torch.ops.lidnet_fast.multi_loss.default, (input.clone().requires_grad_(), target, *arguments, True))
    opcheck(torch.ops.lidnet_fast.multi_loss_jacobian.default, (input, target, list(WEIGHTS), rois, 2.0, 1.0))
    opcheck(torch.ops.lidnet_fast.multi_loss_backward.default, (torch.tensor(2.0), torch.randn(2, 1, 14, 20), input))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({1: torch.zeros(2, 1, 14, 21)}, "target must have the shape of input, differs in dimension 3"),
        ({1: torch.zeros(2, 1, 14, 20).double()}, "target must have the shape and dtype of input"),
        ({2: ["l1", "psnr"]}, "terms must be of .*got psnr"),
        ({2: ["l1", "ms_ssim"]}, "term ms_ssim needs images of at least 161 pixels a side, got 14 in dimension 2"),
        ({3: [1.0]}, "weights must have one value per term"),
        ({4: BOXES.index_fill(1, torch.tensor([0]), 2)}, r"boxes\[0\] must have an integer batch index in \[0, 2\)"),
        ({4: BOXES.double()}, "rois must be float64 for float64 images, else float32"),
        ({4: BOXES[:, 1:]}, r"rois must have shape \[K, 5\]"),
        ({0: torch.zeros(1, 1, 1, 1, 14, 20)}, "input must have 4 or 5 dimensions, got 6"),
    ],
)
def test_the_kernel_checks_what_compiled_code_could_not(change, message):
    arguments = [*images(2, 1, 14, 20), ["l1", "ssim"], [1.0, 1.0], None, 1.0, 1.0, True]
    for place, value in change.items():
        arguments[place] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.lidnet_fast.multi_loss(*arguments)


def test_boxes_of_any_size_take_no_time_and_no_memory(assert_near):
    pair = images(1, 1, 20, 20)
    boxes = torch.tensor([[0, -1e30, -1e30, 1e30, 1e30], [0, 1e9, 1e9, 2e9, 2e9], [0, -3e38, 0, 3e38, 3]])
    results = [evaluate(*pair, {"l1": 1.0}, **options) for options in ({"boxes": boxes, "roi_weight": 4.0}, {})]
    for ours, plain in zip(*results, strict=True):
        assert_near(ours, plain, torch.float32)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_as_one_graph(assert_near, compiler):
    input, target = images(2, 1, 24, 21)

    def loss(x, boxes):
        return multi_loss(x, target, WEIGHTS, boxes=boxes, roi_weight=2.0)

    results = []
    for function in (loss, torch.compile(loss, backend=compiler, fullgraph=True)):
        leaf = input.clone().requires_grad_()
        output = function(leaf, BOXES)
        results.append((output.total, output.terms["ssim"], torch.autograd.grad(3 * output.total, leaf)[0]))
    for ours, eager in zip(*results, strict=True):
        assert_near(ours, eager, torch.float32)


def test_export(assert_near):
    class Loss(torch.nn.Module):
        def forward(self, input, target):
            return multi_loss(input, target, WEIGHTS).total

    program = torch.export.export(Loss(), images(2, 1, 14, 20))
    assert "lidnet_fast.multi_loss" in program.graph_module.print_readable(print_output=False)
    other = images(2, 1, 14, 20)
    assert_near(program.module()(*other), Loss()(*other), torch.float32)


def test_a_traced_call_holds_for_other_images():
    def gradient(input, target):
        return evaluate(input, target, WEIGHTS)[2]

    graph = make_fx(gradient)(*images(1, 1, 20, 20))
    other = images(1, 1, 20, 20)
    assert torch.equal(graph(*other), gradient(*other))


def test_no_gradient_is_made_where_none_is_asked_for():
    input, target = images(1, 1, 20, 20)
    assert multi_loss(input, target, WEIGHTS).total.grad_fn is None
    with torch.no_grad():
        assert multi_loss(input.requires_grad_(), target, WEIGHTS).total.grad_fn is None


def test_the_graph_can_be_walked_twice(assert_near):
    input, target = images(1, 1, 20, 20)
    total = multi_loss(input.requires_grad_(), target, WEIGHTS).total
    first, second = (torch.autograd.grad(total, input, torch.tensor(f), retain_graph=True)[0] for f in (1.0, 3.0))
    assert_near(second, 3 * first, torch.float32)


def test_a_second_derivative_is_refused():
    input, target = images(1, 1, 20, 20)
    total = multi_loss(input.requires_grad_(), target, WEIGHTS).total
    (gradient,) = torch.autograd.grad(total, input, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"can't be differentiated twice.*reference"):
        gradient.sum().backward()
