"""What is done to modules."""

import copy
import io
import pickle

import torch

from .cases import Bound, Case
from .cells import assert_near, cell, check, run, with_module


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


@cell("requires_grad_ and train() of the module", with_module)
def _(case: Case) -> None:
    """Value and gradient: a frozen network stays in evaluation mode."""
    x, t, b = case.tensors(torch.float64)
    function = case.build(torch.float64)
    function.train().requires_grad_(True)
    check(case, function, x, t, b)
