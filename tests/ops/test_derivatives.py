"""Every public op in all of PyTorch's ways to differentiate, on every backend: right or refused, never silently 0."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import lidnet_fast as fast

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")

BOXES = torch.tensor([[0.0, 1.5, 2, 9.25, 8], [1, 0, 0.5, 4, 11], [0, -2, 3, 5, 6.5]], dtype=torch.float64)
VOLUME_BOXES = torch.tensor([[0.0, 1.5, 1, 2, 5.25, 3, 6], [1, 0, 0.5, 1, 4, 4, 5]], dtype=torch.float64)
CORNERS = torch.tensor([[0, 1, 2], [1, 3, 4], [0, 2, 2]])
WEIGHTS = {"mse": 1.0, "charbonnier": 0.5, "ssim": 0.3, "edge": 0.2, "tv": 0.1}
SIZES = [(24, 28)] * 2


@dataclass(frozen=True)
class Op:
    """A function of one tensor, and whether it has a second derivative on the kernels."""

    call: Callable[[Tensor], Tensor]
    shape: tuple[int, ...] = (2, 3, 12, 14)
    twice: bool = True


def target(x: Tensor) -> Tensor:
    """The same for all tensors of a shape, and without their derivatives."""
    return torch.arange(x.numel(), dtype=torch.float64).mul(7).sin().view(x.shape)


def pyramid(x: Tensor) -> dict[str, Tensor]:
    return {"fine": x, "coarse": torch.nn.functional.avg_pool2d(x, 2)}


def on_pyramid(x: Tensor) -> Tensor:
    boxes = BOXES * torch.tensor([1, 2, 2, 2, 2])
    options = {"canonical_scale": 12, "reduction": "none"}
    return fast.multiscale_roi_perceptual_loss(pyramid(x), pyramid(target(x)), boxes, SIZES, 3, **options)


OPS = {
    "multi_loss": Op(lambda x: fast.multi_loss(x, target(x), WEIGHTS, boxes=BOXES, roi_weight=3).total, twice=False),
    "multi_loss of volumes": Op(
        lambda x: fast.multi_loss(x, target(x), {"mse": 1.0, "edge": 0.5}).total, (1, 2, 4, 5, 6), twice=False
    ),
    "roi_align": Op(lambda x: fast.roi_align(x, BOXES, 3, 0.75, 2)),
    "roi_align of volumes": Op(lambda x: fast.roi_align(x, VOLUME_BOXES, 2), (2, 2, 4, 6, 5)),
    "multiscale_roi_align": Op(lambda x: fast.multiscale_roi_align(pyramid(x), BOXES, SIZES, 3, 2, canonical_scale=6)),
    **{
        f"roi_perceptual_loss, {criterion}": Op(
            lambda x, criterion=criterion: fast.roi_perceptual_loss(
                x, target(x), BOXES, 3, criterion=criterion, reduction="none"
            ),
            twice=False,
        )
        for criterion in ("mse", "l1", "smooth_l1", "charbonnier")
    },
    "roi_perceptual_loss of volumes": Op(
        lambda x: fast.roi_perceptual_loss(x, target(x), VOLUME_BOXES, 2), (2, 2, 4, 6, 5), twice=False
    ),
    "multiscale_roi_perceptual_loss": Op(on_pyramid, twice=False),
    "roi_windows": Op(lambda x: fast.roi_windows(x, CORNERS, (4, 5))),
    "gradient_gramian": Op(lambda x: fast.gradient_gramian(x)),
    "gradient_gramian per sample": Op(lambda x: fast.gradient_gramian(x, per_sample=True)),
    "combine_gradients": Op(lambda x: fast.combine_gradients(x, x.flatten(1).sum(1))),
}


@pytest.fixture(params=OPS)
def op(request: pytest.FixtureRequest) -> Op:
    return OPS[request.param]


@pytest.fixture
def x(op: Op) -> Tensor:
    return torch.rand(op.shape, dtype=torch.float64)


@pytest.fixture
def direction(x: Tensor) -> Tensor:
    return torch.randn_like(x)


@pytest.fixture
def jacobian(op: Op, x: Tensor) -> Tensor:
    """[outputs, elements of x], by plain reverse mode, one output at a time; gradcheck has tried that."""
    leaf = x.clone().requires_grad_()
    return torch.stack(
        [torch.autograd.grad(value, leaf, retain_graph=True)[0].flatten() for value in op.call(leaf).flatten()]
    )


def along(jacobian: Tensor, direction: Tensor) -> Tensor:
    return jacobian @ direction.flatten()


def test_jvp(op, x, direction, jacobian, assert_near):
    value, tangent = torch.func.jvp(op.call, (x,), (direction,))
    assert_near(value, op.call(x))
    assert_near(tangent.flatten(), along(jacobian, direction))


def test_forward_mode(op, x, direction, jacobian, assert_near):
    with forward_ad.dual_level():
        value, tangent = forward_ad.unpack_dual(op.call(forward_ad.make_dual(x, direction)))
    assert_near(value, op.call(x))
    assert_near(tangent.flatten(), along(jacobian, direction))


def test_forward_mode_of_a_tensor_that_requires_a_gradient(op, x, direction, jacobian, assert_near):
    leaf = x.clone().requires_grad_()
    with forward_ad.dual_level():
        value, tangent = forward_ad.unpack_dual(op.call(forward_ad.make_dual(leaf, direction)))
    assert_near(tangent.flatten(), along(jacobian, direction))
    (gradient,) = torch.autograd.grad(value.sum(), leaf, retain_graph=True)
    assert_near(gradient.flatten(), jacobian.sum(0))


def test_jacfwd(op, x, jacobian, assert_near):
    entries = 7
    parts = torch.func.jacfwd(lambda part: op.call(torch.cat((part, x.flatten()[entries:])).view(x.shape)))(
        x.flatten()[:entries]
    )
    assert_near(parts.reshape(-1, entries), jacobian[:, :entries])


def test_grad_and_vjp(op, x, jacobian, assert_near):
    gradient = torch.func.grad(lambda x: op.call(x).sum())(x)
    assert_near(gradient.flatten(), jacobian.sum(0))
    value, pull = torch.func.vjp(op.call, x)
    upstream = torch.randn_like(value)
    assert_near(pull(upstream)[0].flatten(), upstream.flatten() @ jacobian)


def test_batched_upstream_gradients(op, x, jacobian, assert_near):
    leaf = x.clone().requires_grad_()
    value = op.call(leaf)
    upstream = torch.randn(3, *value.shape, dtype=torch.float64)
    (gradients,) = torch.autograd.grad(value, leaf, upstream, is_grads_batched=True, retain_graph=True)
    assert_near(gradients.flatten(1), upstream.reshape(3, -1) @ jacobian)
    rows = torch.autograd.functional.jacobian(op.call, x, vectorize=True)
    assert_near(rows.reshape(jacobian.shape), jacobian)


def test_vmap(op, x, assert_near, request):
    if "reference" in request.node.name:
        pytest.skip("torchvision's roi_align and boxes read on the host don't run under vmap")
    batch = torch.stack((x, x.flip(-1), 2 * x))
    values = torch.vmap(op.call)(batch)
    assert_near(values, torch.stack([op.call(one) for one in batch]))
    last = torch.vmap(op.call, in_dims=-1)(batch.movedim(0, -1))
    assert_near(last, values)
    gradients = torch.vmap(torch.func.grad(lambda one: op.call(one).sum()))(batch)
    assert_near(gradients, torch.stack([torch.func.grad(lambda one: op.call(one).sum())(one) for one in batch]))


def differences(function: Callable[[Tensor], Tensor], x: Tensor, direction: Tensor) -> Tensor:
    step = 1e-6
    return (function(x + step * direction) - function(x - step * direction)) / (2 * step)


def gradient_of(op: Op) -> Callable[[Tensor], Tensor]:
    def gradient(x: Tensor) -> Tensor:
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(op.call(leaf).square().sum(), leaf)[0]

    return gradient


def expected_or_refused(op: Op, x: Tensor, direction: Tensor, compute: Callable[[], Tensor], assert_near) -> None:
    """A second derivative is that of finite differences, or refused."""
    smooth = differences(gradient_of(op), x, direction)
    try:
        result = compute()
    except (NotImplementedError, RuntimeError) as error:
        assert not op.twice or fast.backend.current() == "reference"
        assert "differentiated twice" in str(error) or "double backward" in str(error)
    else:
        assert_near(result, smooth, tolerance=1e-5)


def test_forward_over_reverse(op, x, direction, assert_near):
    gradient = torch.func.grad(lambda x: op.call(x).square().sum())
    expected_or_refused(op, x, direction, lambda: torch.func.jvp(gradient, (x,), (direction,))[1], assert_near)


def test_forward_over_reverse_with_dual_numbers(op, x, direction, assert_near):
    def compute() -> Tensor:
        leaf = x.clone().requires_grad_()
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(leaf, direction)
            (gradient,) = torch.autograd.grad(op.call(dual).square().sum(), dual)
            return forward_ad.unpack_dual(gradient).tangent

    expected_or_refused(op, x, direction, compute, assert_near)


def test_reverse_over_forward(op, x, direction, assert_near):
    def compute() -> Tensor:
        return torch.func.grad(lambda x: torch.func.jvp(lambda x: op.call(x).square().sum(), (x,), (direction,))[1])(x)

    expected_or_refused(op, x, direction, compute, assert_near)


def test_reverse_over_reverse(op, x, direction, assert_near):
    def compute() -> Tensor:
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(op.call(leaf).square().sum(), leaf, create_graph=True)
        return torch.autograd.grad(gradient, leaf, direction)[0]

    expected_or_refused(op, x, direction, compute, assert_near)


def test_the_jacobian_has_no_tangent(assert_near):
    x = torch.rand(1, 1, 5, 6, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match="no derivative"):
        torch.func.jvp(lambda x: fast.multi_loss_jacobian(x, target(x), ["mse", "tv"]), (x,), (x,))


def test_torchjd_at_its_defaults(assert_near):
    autojac = pytest.importorskip("torchjd.autojac")
    features = torch.rand(2, 3, 12, 14, dtype=torch.float64)

    def losses(scale: Tensor) -> list[Tensor]:
        image = features * scale
        return [
            fast.multi_loss(image, target(image), {"mse": 1.0, "ssim": 0.1}).total,
            fast.roi_perceptual_loss(image, target(image), BOXES, 3),
        ]

    scale = torch.tensor(0.75, dtype=torch.float64, requires_grad=True)
    autojac.backward(losses(scale))
    expected = [torch.autograd.grad(loss, scale, retain_graph=True)[0] for loss in losses(scale)]
    assert_near(scale.jac, torch.stack(expected))
