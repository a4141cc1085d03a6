"""What is done to modules."""

import copy
import io
import pickle

import torch
from torch import Tensor, nn

from .cases import Bound, Case, Function
from .cells import assert_near, cell, check, run, with_module


def halved(function: Function) -> dict[str, Tensor]:
    """Other weights for the case's module."""
    return {name: value / 2 if value.is_floating_point() else value for name, value in function.state_dict().items()}


def expected_of(case: Case, function: Bound, x: Tensor, t: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Value and gradient of a module that is made new with these weights."""
    new = case.build(x.dtype)
    new.load_state_dict(function.state_dict())
    return run(new, x, t, b)


@cell("torch.func.functional_call", with_module)
def _(case: Case) -> None:
    """Value and gradient with other weights, and afterwards with the module's own."""
    x, t, b = case.tensors(torch.float64)
    function = case.build(torch.float64)
    before = run(function, x, t, b)
    other = halved(function)
    actual = run(lambda *tensors: torch.func.functional_call(function, other, tensors), x, t, b)
    again = run(function, x, t, b)
    function.load_state_dict(other)
    for got, right, what in (
        *zip(actual, expected_of(case, function, x, t, b), ("value", "gradient"), strict=True),
        *zip(again, before, ("value afterwards", "gradient afterwards"), strict=True),
    ):
        assert_near(got, right, x.dtype, what)


@cell("load_state_dict, assign=False and True", with_module)
def _(case: Case) -> None:
    """Value and gradient with the weights loaded after use."""
    x, t, b = case.tensors(torch.float64)
    for assign in (False, True):
        function = case.build(torch.float64)
        before = run(function, x, t, b)[0]
        function.load_state_dict(halved(function), assign=assign)
        actual = run(function, x, t, b)
        assert not function.state_dict() or not torch.equal(actual[0], before), "the weights aren't read"
        for got, right in zip(actual, expected_of(case, function, x, t, b), strict=True):
            assert_near(got, right, x.dtype, f"assign={assign}")


@cell("deepcopy, pickle and torch.save after use", with_module)
def _(case: Case) -> None:
    """Value and gradient of the copies, which share no parameter."""
    x, t, b = case.tensors(torch.float64)
    module = case.module().double()
    saved = io.BytesIO()
    run(Bound(case.call, module), x, t, b)
    torch.save(module, saved)
    saved.seek(0)
    for again in (
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(saved, weights_only=False),
    ):
        check(case, Bound(case.call, again), x, t, b)
        assert not {id(value) for value in again.parameters()} & {id(value) for value in module.parameters()}


@cell(".to(dtype) after use", with_module)
def _(case: Case) -> None:
    """Value and gradient after `half()`, `float()` and `double()`."""
    x, t, b = case.tensors(torch.float64)
    function = case.build(torch.float32)
    run(function, *case.tensors(torch.float32))
    function.half()
    function.to(torch.float32)
    check(case, function, *case.tensors(torch.float32), torch.float16)
    function = case.build(torch.float32)
    run(function, *case.tensors(torch.float32))
    new = case.build(torch.float32).double()
    for got, right in zip(run(function.double(), x, t, b), run(new, x, t, b), strict=True):
        assert_near(got, right, x.dtype)


@cell("SyncBatchNorm.convert_sync_batchnorm, used and moved", with_module)
def _(case: Case) -> None:
    """Value and gradient, and of a deep copy that was moved."""
    x, t, b = case.tensors(torch.float64)
    function = nn.SyncBatchNorm.convert_sync_batchnorm(case.build(torch.float64))
    check(case, function, x, t, b)
    check(case, copy.deepcopy(function).to(torch.float64), x, t, b)


@cell("requires_grad_ and train() of the module", with_module)
def _(case: Case) -> None:
    """Value and gradient: a frozen network stays in evaluation mode."""
    x, t, b = case.tensors(torch.float64)
    function = case.build(torch.float64)
    function.train().requires_grad_(True)
    check(case, function, x, t, b)
