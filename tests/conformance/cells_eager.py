"""Eager mode: dtypes, layouts, devices, modes."""

import torch
from torch import Tensor, nn

from .cases import BOXES, Case
from .cells import TOLERANCES, assert_near, cell, check, run, upstream_of, with_boxes, with_float_boxes, with_gradient


@cell("eager, float64 to bfloat16")
def _(case: Case) -> None:
    """Value and gradient for random upstream gradients, in every dtype."""
    for dtype in TOLERANCES:
        check(case, case.build(dtype), *case.tensors(dtype))


@cell("channels last, strided and expanded inputs")
def _(case: Case) -> None:
    """Value and gradient of tensors that aren't contiguous."""
    x, t, b = case.tensors()
    function = case.build()
    layout = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
    check(case, function, x.to(memory_format=layout), t.to(memory_format=layout), b)
    check(case, function, x.transpose(-1, -2).contiguous().transpose(-1, -2), t.flip(-1).flip(-1), b)
    every_other = torch.stack((x, -x), -1)[..., 0]
    check(case, function, every_other, t[:1].expand_as(t), None if b is None else torch.stack((b, -b), -1)[..., 0])


@cell("no boxes", with_boxes)
def _(case: Case) -> None:
    """Value and gradient without boxes, and with a single one."""
    function = case.build()
    x, t, b = case.tensors(boxes=0)
    check(case, function, x, t, b)
    x, t, b = case.tensors(boxes=1)
    check(case, function, x, t, b)


@cell("a gradient in the boxes", with_float_boxes, refuses=BOXES)
def _(case: Case) -> None:
    """Boxes get no gradient."""
    x, t, b = case.tensors()
    case.build()(x, t, b.requires_grad_())


@cell("a graph walked twice", with_gradient)
def _(case: Case) -> None:
    """The gradients of two walks with `retain_graph`."""
    x, t, b = case.tensors(torch.float64)
    leaf = x.clone().requires_grad_()
    value = case.build(torch.float64)(leaf, t, b)
    for number in range(2):
        (gradient,) = torch.autograd.grad(value, leaf, upstream_of(value, number), retain_graph=True)
        right = case.expected(leaf, t, b)
        (right_gradient,) = torch.autograd.grad(right, leaf, upstream_of(right, number))
        assert_near(gradient, right_gradient, x.dtype, f"gradient {number + 1}")


@cell("autocast, x in bfloat16 and targets in float32")
def _(case: Case) -> None:
    """Value and gradient as if both came in float32, and the other way round."""
    x, t, b = case.tensors()
    x = x.to(torch.bfloat16)
    function = case.build()
    with torch.autocast("cpu", torch.bfloat16):
        check(case, function, x, t, b, torch.bfloat16)
        check(case, function, x.float(), t.to(torch.bfloat16), b, torch.bfloat16)


@cell("tensors of the meta device")
def _(case: Case) -> None:
    """Shape, dtype and device of the result."""
    x, t, b = case.tensors()
    right = case.build()(x, t, b)
    x, t, b = (None if tensor is None else tensor.to("meta") for tensor in (x, t, b))
    function = case.build()
    if isinstance(function, nn.Module):
        function.to("meta")
    value = function(x.requires_grad_(), t, b)
    assert (value.device.type, value.shape, value.dtype) == ("meta", right.shape, right.dtype)


@cell("torch.use_deterministic_algorithms(True)")
def _(case: Case) -> None:
    """Value and gradient, the same bits twice."""
    torch.use_deterministic_algorithms(True)
    try:
        function = case.build()
        results = [run(function, *case.tensors()) for _ in range(2)]
        check(case, function, *case.tensors())
    finally:
        torch.use_deterministic_algorithms(False)
    for first, second in zip(*results, strict=True):
        assert (first is None and second is None) or torch.equal(first, second), "not the same bits"


@cell("dispatch modes, parameters and anomaly mode")
def _(case: Case) -> None:
    """Value and gradient under `FlopCounterMode` and `set_detect_anomaly`, and of an `nn.Parameter`."""
    from torch.utils.flop_counter import FlopCounterMode

    x, t, b = case.tensors()
    function = case.build()

    def in_mode(x: Tensor, t: Tensor, b: Tensor | None) -> Tensor:
        with FlopCounterMode(display=False), torch.autograd.set_detect_anomaly(True):
            return function(x, t, b)

    check(case, in_mode, x, t, b)
    parameter = nn.Parameter(x.clone())
    value = function(parameter, t, b)
    assert type(value) is Tensor
    if case.differentiable:
        value.backward(upstream_of(value))
        assert_near(parameter.grad, run(case.expected, x.double(), t, b)[1], x.dtype, "gradient")
