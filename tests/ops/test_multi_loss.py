import math

import pytest
import torch
from torch.nn import functional as F

from lidnet_fast import MultiLossOutput, multi_loss, multi_loss_jacobian

TERMS = ("l1", "mse", "charbonnier", "ssim", "ms_ssim", "edge", "tv")
WEIGHTS = {"l1": 0.7, "mse": -3.0, "charbonnier": 1.3, "ssim": 0.5, "ms_ssim": 2.0, "edge": 0.2, "tv": 0.1}
SMALL = tuple(term for term in TERMS if term != "ms_ssim")
BOXES = [torch.tensor([[3.0, 5, 9, 8], [4, 6, 20.5, 7.4]]), torch.zeros(0, 4)]


def images(dtype=torch.float64, shape=(2, 2, 24, 21), noise=0.1):
    target = torch.rand(shape, dtype=torch.float64)
    input = target + noise * torch.randn(shape, dtype=torch.float64)
    return input.to(dtype), target.to(dtype)


def gaussian(channels):
    """pytorch-msssim's window in float64 (its own is made in float32)."""
    x = torch.arange(11, dtype=torch.float64) - 5
    window = torch.exp(-(x**2) / (2 * 1.5**2))
    return (window / window.sum()).expand(channels, 1, 1, 11)


def sobel_responses(image):
    kernel = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]], dtype=image.dtype)
    planes = image.reshape(-1, 1, *image.shape[2:])
    return [F.conv2d(planes, k.view(1, 1, 3, 3)) for k in (kernel, kernel.T)]


def expected_terms(input, target, data_range=1.0):
    """By pytorch-msssim, torch.nn.functional and the formulas."""
    pytorch_msssim = pytest.importorskip("pytorch_msssim")
    channels, difference = input.shape[1], input - target
    terms = {
        "l1": F.l1_loss(input, target),
        "mse": F.mse_loss(input, target),
        "charbonnier": (difference**2 + 1e-6).sqrt().mean(),
        "ssim": 1 - pytorch_msssim.ssim(input, target, data_range, win=gaussian(channels)),
        "edge": sum((a - b).abs().mean() for a, b in zip(*map(sobel_responses, (input, target)), strict=True)),
        "tv": input.diff(dim=3).abs().mean() + input.diff(dim=2).abs().mean(),
    }
    if min(input.shape[2:]) > 160:
        terms["ms_ssim"] = 1 - pytorch_msssim.ms_ssim(input, target, data_range, win=gaussian(channels))
    return terms


@pytest.mark.parametrize("data_range", [1.0, 2.5])
@pytest.mark.parametrize("shape", [(2, 2, 24, 21), (1, 3, 161, 170)])
def test_terms_and_gradients(assert_near, shape, data_range):
    input, target = images(shape=shape)
    leaf = input.clone().requires_grad_()
    expected = expected_terms(leaf, target, data_range)
    weights = {name: WEIGHTS[name] for name in expected}
    output = multi_loss(input.requires_grad_(), target, weights, data_range=data_range)
    assert isinstance(output, MultiLossOutput)
    assert list(output.terms) == list(weights)
    for name, value in expected.items():
        assert_near(output.terms[name], value)
        assert not output.terms[name].requires_grad
    total = sum(weights[name] * value for name, value in expected.items())
    assert_near(output.total, total)
    # The upstream gradient of a loss is rarely 1 (loss scaling, a weight outside).
    (1.7 * output.total).backward()
    (1.7 * total).backward()
    assert_near(input.grad, leaf.grad)
    jacobian = multi_loss_jacobian(input, target, tuple(expected), data_range=data_range)
    for row, value in zip(jacobian, expected_terms(leaf, target, data_range).values(), strict=True):
        assert_near(row, torch.autograd.grad(value, leaf)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(assert_near, dtype):
    input, target = images(dtype)
    input.requires_grad_()
    leaf = input.detach().double().requires_grad_()
    weights = {name: abs(WEIGHTS[name]) for name in SMALL}
    output = multi_loss(input, target, weights)
    exact = multi_loss(leaf, target.double(), weights)
    assert output.total.dtype == torch.float32
    assert_near(output.total, exact.total, torch.float32)
    # Larger than the mean's 1e-3 per pixel, so that a gradient in half precision isn't subnormal.
    (output.total * 100).backward()
    (exact.total * 100).backward()
    assert input.grad.dtype == dtype
    assert_near(input.grad, leaf.grad, dtype)
    jacobian = multi_loss_jacobian(input, target, SMALL)
    assert jacobian.dtype == torch.float32
    assert_near(jacobian, multi_loss_jacobian(leaf, target.double(), SMALL), torch.float32)


def test_ssim_in_float32_is_pytorch_msssims():
    pytorch_msssim = pytest.importorskip("pytorch_msssim")
    input, target = images(torch.float32, (2, 1, 180, 175))
    terms = multi_loss(input, target, {"ssim": 1.0, "ms_ssim": 1.0}).terms
    assert abs(terms["ssim"] - (1 - pytorch_msssim.ssim(input, target, 1.0))) < 1e-5
    assert abs(terms["ms_ssim"] - (1 - pytorch_msssim.ms_ssim(input, target, 1.0))) < 1e-5


def test_ssim_is_torchmetrics_away_from_the_border():
    input, target = images(shape=(2, 1, 40, 33))
    peer = pytest.importorskip("torchmetrics.functional.image")
    _, full = peer.structural_similarity_index_measure(input, target, data_range=1.0, return_full_image=True)
    inner = full[..., 5:-5, 5:-5].mean()
    assert abs(multi_loss(input, target, {"ssim": 1.0}).terms["ssim"] - (1 - inner)) < 1e-5


def test_ms_ssim_of_opposed_images_has_no_gradient():
    _, target = images(shape=(2, 1, 161, 161))
    input = torch.stack((1 - target[0], target[1] * 0.9)).requires_grad_()
    output = multi_loss(input, target, {"ms_ssim": 1.0})
    output.total.backward()
    assert 0.5 <= output.terms["ms_ssim"] < 1  # the first image is cut to similarity 0
    assert torch.equal(input.grad[0], torch.zeros_like(input.grad[0]))
    assert input.grad[1].isfinite().all()
    assert input.grad[1].abs().sum() > 0


def test_identical_images():
    _, target = images(shape=(1, 1, 161, 161))
    input = target.clone().requires_grad_()
    output = multi_loss(input, target, dict.fromkeys(TERMS, 1.0))
    output.total.backward()
    assert input.grad.isfinite().all()
    for name in ("l1", "mse", "ssim", "ms_ssim", "edge"):
        assert abs(output.terms[name]) < 1e-12
    assert abs(output.terms["charbonnier"] - 1e-3) < 1e-12


@pytest.mark.parametrize("as_list", [True, False])
def test_boxes_weight_pixels(assert_near, as_list):
    input, target = images()
    # Columns 3..8 of rows 5..7, and columns 4..19 of row 6 (pixel centres inside), of the first image.
    weights = torch.ones(2, 1, 24, 21, dtype=torch.float64)
    weights[0, 0, 5:8, 3:9] = 4.0
    weights[0, 0, 6, 4:20] = 4.0
    difference = input - target
    boxes = BOXES if as_list else F.pad(BOXES[0], (1, 0))
    names = dict.fromkeys(SMALL, 1.0)
    terms = multi_loss(input, target, names, boxes=boxes, roi_weight=4.0).terms
    plain = multi_loss(input, target, names).terms
    values = {"l1": difference.abs(), "mse": difference**2, "charbonnier": (difference**2 + 1e-6).sqrt()}
    for name in SMALL:
        expected = (values[name] * weights).sum() / weights.expand_as(difference).sum() if name in values else None
        assert_near(terms[name], plain[name] if expected is None else expected)
        assert name not in values or terms[name] != plain[name]


@pytest.mark.parametrize(
    "boxes", [[torch.zeros(0, 4)] * 2, torch.tensor([[0.0, 100, 100, 120, 120], [1, 4, 4, 4, 9], [1, -9, -9, -1, -1]])]
)
def test_boxes_without_a_pixel_change_nothing(assert_near, boxes):
    input, target = images()
    weights = dict.fromkeys(SMALL, 1.0)
    weighted = multi_loss(input, target, weights, boxes=boxes, roi_weight=9.0)
    assert_near(weighted.total, multi_loss(input, target, weights).total)


@pytest.mark.parametrize("options", [{}, {"boxes": BOXES, "roi_weight": 3.0}])
def test_gradcheck(options):
    input, target = images(shape=(2, 1, 14, 23))

    def total(x):
        return multi_loss(x, target, {name: WEIGHTS[name] for name in SMALL}, **options).total * 100

    assert torch.autograd.gradcheck(total, input.requires_grad_(), fast_mode=True)


def test_jacobian_rows_sum_to_the_total_gradient(assert_near):
    input, target = images()
    input.requires_grad_()
    weights = {name: WEIGHTS[name] for name in SMALL}
    (gradient,) = torch.autograd.grad(multi_loss(input, target, weights, boxes=BOXES, roi_weight=2.0).total, input)
    with torch.no_grad():
        jacobian = multi_loss_jacobian(input, target, SMALL, boxes=BOXES, roi_weight=2.0)
    assert jacobian.shape == (len(SMALL), *input.shape)
    assert not jacobian.requires_grad
    assert_near(
        torch.einsum("t,tnchw->nchw", torch.tensor(list(weights.values())).double(), jacobian), gradient, None, 1e-7
    )


@pytest.mark.parametrize("layout", ["channels_last", "sliced"])
def test_layouts(assert_near, layout):
    input, target = images()

    def arrange(x):
        if layout == "channels_last":
            return x.contiguous(memory_format=torch.channels_last)
        return torch.full((2, 2, 30, 42), math.nan, dtype=x.dtype)[:, :, 3:27, ::2].copy_(x)

    assert not arrange(input).is_contiguous()
    weights = dict.fromkeys(SMALL, 1.0)
    results = []
    for x, y in ((arrange(input), arrange(target)), (input, target)):
        leaf = x.detach().requires_grad_()
        total = multi_loss(leaf, y, weights).total
        results.append((total, torch.autograd.grad(total, leaf)[0]))
    assert_near(results[0][0], results[1][0])
    assert_near(results[0][1], results[1][1])


def test_repeats_bitwise():
    input, target = images(torch.float32)
    jacobians = [multi_loss_jacobian(input, target, SMALL, boxes=BOXES, roi_weight=2.0) for _ in range(2)]
    assert torch.equal(*jacobians)


def test_weight_zero_only_measures(assert_near):
    input, target = images()
    input.requires_grad_()
    output = multi_loss(input, target, {"mse": 1, "ssim": 0})
    output.total.backward()
    assert_near(output.total, F.mse_loss(input, target))
    assert_near(output.terms["ssim"], expected_terms(input, target)["ssim"])
    assert_near(input.grad, 2 * (input - target) / input.numel())


def test_autocast_changes_nothing():
    input, target = images(torch.float32)
    weights = dict.fromkeys(SMALL, 1.0)
    outside = multi_loss(input, target, weights, boxes=BOXES, roi_weight=2.0).total
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = multi_loss(input, target, weights, boxes=BOXES, roi_weight=2.0).total
    assert torch.equal(inside, outside)


def test_compiles_as_one_graph(assert_near):
    input, target = images()
    weights = {name: WEIGHTS[name] for name in SMALL}

    def loss(x):
        return multi_loss(x, target, weights, boxes=BOXES, roi_weight=2.0)

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    results = []
    for function in (compiled, loss):
        leaf = input.clone().requires_grad_()
        output = function(leaf)
        results.append((output.total, torch.autograd.grad(output.total, leaf)[0], output.terms["ssim"]))
    for actual, expected in zip(*results, strict=True):
        assert_near(actual, expected)


GOOD = torch.zeros(2, 1, 16, 16)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"input": None}, TypeError, "input must be a Tensor, got NoneType"),
        ({"input": GOOD.int(), "target": GOOD.int()}, TypeError, "input must be float32.*int32"),
        ({"input": GOOD[0], "target": GOOD[0]}, ValueError, "input must have 4 or 5 dimensions"),
        ({"input": GOOD[:0], "target": GOOD[:0]}, ValueError, "input must hold at least one image"),
        ({"target": GOOD[..., 1:]}, ValueError, "target must have the shape of input"),
        ({"target": GOOD.half()}, TypeError, "target must have the dtype of input"),
        ({"target": GOOD.clone().requires_grad_()}, ValueError, "target requires a gradient.*detach"),
        ({"weights": {}}, ValueError, "weights must name at least one term"),
        ({"weights": {"mse": 1.0, "psnr": 1.0}}, ValueError, "a term of weights must be one of .*got 'psnr'"),
        ({"weights": {"mse": math.nan}}, ValueError, r"weights\['mse'\] must be a finite number, got nan"),
        ({"weights": {"mse": True}}, ValueError, r"weights\['mse'\] must be a finite number, got True"),
        ({"weights": {"mse": "1"}}, ValueError, r"weights\['mse'\] must be a finite number, got '1'"),
        ({"weights": ["mse"]}, TypeError, "weights must map terms to numbers, got list"),
        ({"weights": {"l1": 1.0, "ms_ssim": 1.0}}, ValueError, "'ms_ssim' needs images of at least 161 .*16 x 16"),
        ({"roi_weight": 0.0}, ValueError, "roi_weight must be a finite number above 0"),
        ({"data_range": -1.0}, ValueError, "data_range must be a finite number above 0, got -1.0"),
        (
            {"boxes": [torch.zeros(1, 4)], "roi_weight": 2},
            ValueError,
            "boxes must be a list of . Tensors, one per image",
        ),
        (
            {"boxes": torch.tensor([[0, 1, 1, math.nan, 2]]), "roi_weight": 2},
            ValueError,
            r"boxes\[0\] must have finite coordinates",
        ),
        ({"boxes": BOXES}, ValueError, "boxes need a roi_weight, .* To fix: give roi_weight, or no boxes"),
        ({"roi_weight": 2.0}, ValueError, r"roi_weight 2 needs boxes. To fix: give boxes \(without lesions empty ones"),
    ],
)
def test_bad_input(changes, error, message):
    arguments = {"input": GOOD, "target": GOOD, "weights": {"mse": 1.0}, **changes}
    with pytest.raises(error, match=message):
        multi_loss(**arguments)
    if "weights" not in changes:
        arguments["terms"] = list(arguments.pop("weights"))
        with pytest.raises(error, match=message):
            multi_loss_jacobian(**arguments)


@pytest.mark.parametrize(("term", "side"), [("ssim", 11), ("ms_ssim", 161), ("edge", 3), ("tv", 2)])
def test_smallest_image_of_a_term(term, side):
    image = torch.rand(1, 1, side, side + 1)
    assert multi_loss(image, image, {term: 1.0}).total.isfinite()
    with pytest.raises(ValueError, match=f"term '{term}' needs images of at least {side} pixels a side"):
        multi_loss(image[..., 1:, :], image[..., 1:, :], {term: 1.0})


def test_bad_terms_of_the_jacobian():
    with pytest.raises(TypeError, match="terms must be a sequence of names, got the string 'mse'"):
        multi_loss_jacobian(GOOD, GOOD, "mse")
    with pytest.raises(ValueError, match=r"a term of terms must be one of .*got 'psnr'"):
        multi_loss_jacobian(GOOD, GOOD, ["psnr"])
    with pytest.raises(ValueError, match="terms must name at least one term"):
        multi_loss_jacobian(GOOD, GOOD, [])
