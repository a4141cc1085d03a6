import pytest
import torch
from torch.nn import functional as F

from lidnet_fast import multi_loss, multi_loss_jacobian

WEIGHTS = {"l1": 0.7, "mse": -3.0, "charbonnier": 1.3, "ssim": 0.5, "edge": 0.2, "tv": 0.1}
BOXES = torch.tensor([[0, 2.0, 3, 1, 9, 8.4, 6], [0, 5, 5, 5, 30, 7, 30], [1, -4, -4, -4, 3, 3, 2.5]])


def volumes(dtype=torch.float64, shape=(2, 2, 13, 16, 15)):
    target = torch.rand(shape, dtype=torch.float64)
    return (target + 0.1 * torch.randn(shape, dtype=torch.float64)).to(dtype), target.to(dtype)


def sobel(image, axis):
    """SciPy's Sobel filter, without the border that it pads."""
    ndimage = pytest.importorskip("scipy.ndimage")
    responses = [ndimage.sobel(volume, axis) for volume in image.flatten(0, 1).numpy()]
    return torch.stack([torch.from_numpy(r)[1:-1, 1:-1, 1:-1] for r in responses])


def window(channels):
    x = torch.arange(11, dtype=torch.float64) - 5
    weights = torch.exp(-(x**2) / (2 * 1.5**2))
    return (weights / weights.sum()).expand(channels, 1, 1, 1, 11)


def test_terms_are_the_peers():
    pytorch_msssim = pytest.importorskip("pytorch_msssim")
    input, target = volumes()
    terms = multi_loss(input, target, WEIGHTS, data_range=1.5).terms
    expected = {
        "l1": F.l1_loss(input, target),
        "mse": F.mse_loss(input, target),
        "charbonnier": ((input - target) ** 2 + 1e-6).sqrt().mean(),
        "ssim": 1 - pytorch_msssim.ssim(input, target, 1.5, win=window(2)),
        "edge": sum(sobel(input - target, axis).abs().mean() for axis in range(3)),
        "tv": sum(input.diff(dim=axis).abs().mean() for axis in (2, 3, 4)),
    }
    for name, value in expected.items():
        assert abs(terms[name] - value) < 1e-12, name


def test_boxes_weight_voxels(assert_near):
    input, target = volumes()
    weights = torch.ones(2, 1, 13, 16, 15, dtype=torch.float64)
    weights[0, 0, 1:6, 3:8, 2:9] = 4.0  # z, y, x; the centre of row 8 is at 8.5, beyond 8.4
    weights[0, 0, 5:, 5:7, 5:] = 4.0
    weights[1, 0, :2, :3, :3] = 4.0  # the centre of slice 2 is on the edge, which is outside
    terms = multi_loss(input, target, {"mse": 1.0}, boxes=BOXES, roi_weight=4.0).terms
    assert_near(terms["mse"], ((input - target) ** 2 * weights).sum() / (2 * weights.sum()))


def test_gradients(assert_near):
    input, target = volumes(shape=(2, 1, 12, 11, 13))

    def total(x):
        return multi_loss(x, target, WEIGHTS, boxes=BOXES, roi_weight=3.0).total * 100

    assert torch.autograd.gradcheck(total, input.clone().requires_grad_(), fast_mode=True)
    leaf = input.requires_grad_()
    (gradient,) = torch.autograd.grad(total(leaf), leaf)
    jacobian = multi_loss_jacobian(leaf, target, list(WEIGHTS), boxes=BOXES, roi_weight=3.0)
    assert jacobian.shape == (len(WEIGHTS), *input.shape)
    weights = 100 * torch.tensor(list(WEIGHTS.values()), dtype=torch.float64)
    assert_near(torch.einsum("t,t...->...", weights, jacobian), gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(assert_near, dtype):
    input, target = volumes(dtype)
    output = multi_loss(input.requires_grad_(), target, {name: abs(weight) for name, weight in WEIGHTS.items()})
    exact = multi_loss(input.double(), target.double(), {name: abs(weight) for name, weight in WEIGHTS.items()})
    output.total.backward()
    assert output.total.dtype == torch.float32
    assert input.grad.dtype == dtype
    assert_near(output.total.detach(), exact.total.detach(), torch.float32)


@pytest.mark.parametrize(("term", "side"), [("ssim", 11), ("ms_ssim", 161), ("edge", 3), ("tv", 2)])
def test_the_depth_counts_as_a_side(term, side):
    volume = torch.rand(1, 1, side - 1, 200, 200)
    message = f"term '{term}' needs images of at least {side} pixels a side, got {side - 1} x 200 x 200"
    with pytest.raises(ValueError, match=message):
        multi_loss(volume, volume, {term: 1.0})


def test_boxes_of_images_are_refused():
    volume = torch.rand(1, 1, 4, 4, 4)
    with pytest.raises(ValueError, match=r"boxes must have shape \[boxes, 7\] for volumes"):
        multi_loss(volume, volume, {"l1": 1.0}, boxes=BOXES[:, :5], roi_weight=2.0)
