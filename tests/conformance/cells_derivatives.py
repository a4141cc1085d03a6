"""Ways to differentiate, and what else has a hand in the graph."""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .cases import Case
from .cells import assert_near, cell, check, run, upstream_of, with_gradient


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
