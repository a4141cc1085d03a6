"""torch.compile, torch.export and the defaults of dtype and device, in fresh processes."""

import io

import torch
from torch import nn

from .cases import Bound, Case
from .cells import assert_near, cell, check, run, with_boxes


@cell("torch.compile(fullgraph=True)", fresh=True)
def _(case: Case) -> None:
    """Value and gradient of one graph, the first call in its process."""
    check(case, torch.compile(case.build(), fullgraph=True, backend="aot_eager"), *case.tensors())


@cell("torch.compile, boxes in changing numbers", with_boxes, fresh=True)
def _(case: Case) -> None:
    """Value and gradient for seven calls, in at most four graphs."""
    function = case.build()
    compiled = torch.compile(function, backend="aot_eager")
    counts = (3, 5, 0, 7, 1, 4, 9)
    for boxes in counts:
        check(case, compiled, *case.tensors(boxes=boxes, seed=boxes))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    # One for the first number, one for any, one each for none and for a single box.
    assert graphs <= 4, f"{graphs} graphs for {len(counts)} numbers of boxes"


@cell("torch.export", fresh=True)
def _(case: Case) -> None:
    """The value of the saved and loaded program, for other numbers of boxes too."""
    x, t, b = case.tensors()
    function = case.build()
    if not isinstance(function, nn.Module):
        function = Bound(lambda _, *tensors: case.call(*tensors), nn.Identity())
    boxes = None if b is None else {0: torch.export.Dim("boxes")}
    program = torch.export.export(function, (x, t, b), dynamic_shapes=(None, None, boxes))
    saved = io.BytesIO()
    torch.export.save(program, saved)
    saved.seek(0)
    loaded = torch.export.load(saved).module()
    for count in (4, 7):
        x, t, b = case.tensors(boxes=count, seed=count)
        assert_near(loaded(x, t, b), case.expected(x, t, b), x.dtype)


@cell("torch.set_default_dtype(torch.float64)", fresh=True)
def _(case: Case) -> None:
    """Value, gradient and their dtypes, which the inputs decide."""
    x, t, b = case.tensors()
    dtype = case.build()(x, t, b).dtype
    torch.set_default_dtype(torch.float64)
    try:
        check(case, case.build(), x, t, b)
        assert case.build()(x, t, b).dtype == dtype, "dtype: the default dtype decides"
    finally:
        torch.set_default_dtype(torch.float32)


@cell("torch.set_default_device of another device", fresh=True)
def _(case: Case) -> None:
    """Value and gradient on the inputs' device."""
    x, t, b = case.tensors()
    with torch.device("meta"):
        function = case.build()
        value, gradient = run(function, x, t, b)
    right, right_gradient = run(case.expected, x.double(), t, b)
    assert_near(value, right, x.dtype)
    if case.differentiable:
        assert_near(gradient, right_gradient, x.dtype, "gradient")
