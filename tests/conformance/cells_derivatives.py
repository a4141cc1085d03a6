"""Ways to differentiate, and what else has a hand in the graph."""

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from .cases import Case, Function
from .cells import assert_near, cell, check, run, upstream_of, with_float_boxes, with_gradient


@cell("torch.func.grad and vjp", with_gradient)
def _(case: Case) -> None:
    """Value and gradient."""
    x, t, b = case.tensors(torch.float64)
    function = case.build(torch.float64)
    right, right_gradient = run(case.expected, x, t, b)
    value, pull = torch.func.vjp(lambda x: function(x, t, b), x)
    assert_near(value, right, x.dtype)
    assert_near(pull(upstream_of(value))[0], right_gradient, x.dtype, "vjp")
    weights = upstream_of(right)
    gradient = torch.func.grad(lambda x: (function(x, t, b) * weights).sum())(x)
    assert_near(gradient, right_gradient, x.dtype, "grad")


def right_tangent(case: Case, x: Tensor, t: Tensor, b: Tensor | None, tangent: Tensor) -> Tensor:
    jacobian = torch.autograd.functional.jacobian(lambda x: case.expected(x, t, b), x)
    return jacobian.flatten(jacobian.ndim - x.ndim) @ tangent.flatten()


@cell("torch.func.jvp", with_gradient)
def _(case: Case) -> None:
    """Value and tangent."""
    x, t, b = case.tensors(torch.float64)
    tangent = upstream_of(x)
    function = case.build(torch.float64)
    value, actual = torch.func.jvp(lambda x: function(x, t, b), (x,), (tangent,))
    assert_near(value, case.expected(x, t, b), x.dtype)
    assert_near(actual, right_tangent(case, x, t, b, tangent), x.dtype, "tangent")


@cell("torch.autograd.forward_ad", with_gradient)
def _(case: Case) -> None:
    """Value and tangent."""
    x, t, b = case.tensors(torch.float64)
    tangent = upstream_of(x)
    function = case.build(torch.float64)
    with forward_ad.dual_level():
        value, actual = forward_ad.unpack_dual(function(forward_ad.make_dual(x, tangent), t, b))
        assert actual is not None, "tangent: there is none"
    assert_near(value, case.expected(x, t, b), x.dtype)
    assert_near(actual, right_tangent(case, x, t, b, tangent), x.dtype, "tangent")


@cell("torch.vmap")
def _(case: Case) -> None:
    """The value of each of three x."""
    x, t, b = case.tensors(torch.float64)
    function = case.build(torch.float64)
    several = torch.stack((x, x.flip(-1), 2 * x))
    value = torch.vmap(lambda x: function(x, t, b))(several)
    assert_near(value, torch.stack([case.expected(x, t, b) for x in several]), x.dtype)


@cell("torch.vmap of torch.func.grad", with_gradient)
def _(case: Case) -> None:
    """The gradient of each of three x."""
    x, t, b = case.tensors(torch.float64)
    function = case.build(torch.float64)
    several = torch.stack((x, x.flip(-1), 2 * x))
    weights = upstream_of(case.expected(x, t, b))
    gradients = torch.vmap(torch.func.grad(lambda x: (function(x, t, b) * weights).sum()))(several)
    right = torch.stack([run(case.expected, x, t, b)[1] for x in several])
    assert_near(gradients, right, x.dtype, "gradients")


@cell("upstream gradients in batches: is_grads_batched, jacobian(vectorize=True), jacrev", with_gradient)
def _(case: Case) -> None:
    """One gradient for each row; the whole Jacobian."""
    x, t, b = case.tensors(torch.float64)
    function = case.build(torch.float64)
    leaf = x.clone().requires_grad_()
    value = function(leaf, t, b)
    upstream = torch.stack([upstream_of(value, number) for number in range(3)])
    (gradients,) = torch.autograd.grad(value, leaf, upstream, is_grads_batched=True)
    right = case.expected(leaf, t, b)
    rows = [torch.autograd.grad(right, leaf, of_row, retain_graph=True)[0] for of_row in upstream]
    assert_near(gradients, torch.stack(rows), x.dtype, "is_grads_batched")
    right_jacobian = torch.autograd.functional.jacobian(lambda x: case.expected(x, t, b), x)
    jacobian = torch.autograd.functional.jacobian(lambda x: function(x, t, b), x, vectorize=True)
    assert_near(jacobian, right_jacobian, x.dtype, "jacobian(vectorize=True)")
    assert_near(torch.func.jacrev(lambda x: function(x, t, b))(x), right_jacobian, x.dtype, "jacrev")


@cell("torchjd.autojac.backward", with_gradient)
def _(case: Case) -> None:
    """The Jacobian of two losses, at TorchJD's defaults."""
    autojac = pytest.importorskip("torchjd.autojac")
    x, t, b = case.tensors(torch.float64)
    function = case.build(torch.float64)

    def losses(function: Function, leaf: Tensor) -> list[Tensor]:
        value = function(leaf, t, b)
        return [(value * upstream_of(value, number)).sum() for number in range(2)]

    leaf = x.clone().requires_grad_()
    autojac.backward(losses(function, leaf))
    same = x.clone().requires_grad_()
    rows = [torch.autograd.grad(loss, same, retain_graph=True)[0] for loss in losses(case.expected, same)]
    assert_near(leaf.jac, torch.stack(rows), x.dtype, "Jacobian")


@cell("double backward", with_gradient)
def _(case: Case) -> None:
    """The second derivative, against central differences of the first."""
    x, t, b = case.tensors(torch.float64)
    function = case.build(torch.float64)

    def gradient(x: Tensor, weights: Tensor) -> Tensor:
        return torch.autograd.grad(function(x, t, b), x, weights, create_graph=True)[0]

    leaf = x.clone().requires_grad_()
    value = function(leaf, t, b)
    weights = upstream_of(value).requires_grad_()
    first = gradient(leaf, weights)
    for place, direction in ((0, upstream_of(x, 1)), (1, upstream_of(value, 2))):
        places = [leaf, weights]
        (actual,) = torch.autograd.grad(first, places[place], upstream_of(first), retain_graph=True, allow_unused=True)
        actual = torch.zeros(()) if actual is None else (actual * direction).sum()
        step = 1e-5 * direction.detach()
        moved = [[other.detach() for other in places] for _ in range(2)]
        moved[0][place], moved[1][place] = places[place].detach() + step, places[place].detach() - step
        after, before = (gradient(at.requires_grad_(), of).detach() for at, of in moved)
        right = ((after - before) * upstream_of(first)).sum() / 2e-5
        assert abs(float(actual - right)) <= 1e-5 * max(float(right.abs()), 1e-3), "second derivative"


@cell("torch.inference_mode and no_grad")
def _(case: Case) -> None:
    """The value, and afterwards value and gradient outside of it."""
    x, t, b = case.tensors(torch.float64)
    function = case.build(torch.float64)
    right = case.expected(x, t, b).detach()
    with torch.inference_mode():
        assert_near(function(*case.tensors(torch.float64)), right, x.dtype, "tensors of inference")
        assert_near(function(x.requires_grad_(), t, b), right, x.dtype, "tensors from outside")
    with torch.no_grad():
        value = function(x, t, b)
    assert not value.requires_grad
    assert_near(value, right, x.dtype)
    check(case, function, x, t, b)  # what was kept in inference mode may be part of a graph now


@cell("torch.utils.checkpoint", with_gradient)
def _(case: Case) -> None:
    """Value and gradient, reentrant and not."""
    x, t, b = case.tensors(torch.float64)
    function = case.build(torch.float64)
    right, right_gradient = run(case.expected, x, t, b)
    for use_reentrant in (False, True):
        leaf = x.clone().requires_grad_()
        value = checkpoint(function, leaf, t, b, use_reentrant=use_reentrant)
        value.backward(upstream_of(value))
        assert_near(value, right, x.dtype)
        assert_near(leaf.grad, right_gradient, x.dtype, "gradient")


@cell("torch.autograd.graph.saved_tensors_hooks", with_gradient)
def _(case: Case) -> None:
    """Value and gradient, with everything kept elsewhere between them."""
    x, t, b = case.tensors(torch.float64)
    function = case.build(torch.float64)
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.numpy().copy(), torch.from_numpy)

    def hooked(*tensors: Tensor) -> Tensor:
        with hooks:
            return function(*tensors)

    check(case, hooked, x, t, b)


@cell("torch.vmap of the boxes", with_float_boxes)
def _(case: Case) -> None:
    """The value for each of three sets of boxes."""
    x, t, _ = case.tensors(torch.float64)
    several = torch.stack([case.tensors(torch.float64, seed=seed)[2] for seed in range(3)])
    function = case.build(torch.float64)
    value = torch.vmap(lambda b: function(x, t, b))(several)
    assert_near(value, torch.stack([case.expected(x, t, b) for b in several]), x.dtype)
