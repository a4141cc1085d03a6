"""The ways in which PyTorch uses an op, and what is right in each: `CELLS`, a function of a `Case` each."""

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor

from lidnet_fast.extractors import windows

from .cases import Case, Function

# Relative L2 error allowed against the float64 definition, by the dtype of x.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Cell:
    """One way to use an op.

    Attributes:
        name: Of the row in docs/operators.md.
        check: Fails for a case that isn't right.
        applies: Whether there is such a use of a case; its docstring says of which.
        fresh: Whether it runs in a process of its own that has imported lidnet_fast and called nothing of it.
        together: Whether `check` takes all cases at once, and returns their errors, for one set of processes.
        refuses: The sentence of the error with which every case refuses.
    """

    name: str
    check: Callable
    applies: Callable[[Case], bool]
    fresh: bool
    together: bool
    refuses: str | None


CELLS: dict[str, Cell] = {}
REFUSALS = (NotImplementedError, RuntimeError, TypeError, ValueError)


def refusal(case: Case, cell: Cell) -> str | None:
    """The sentence with which the case refuses, if it does."""
    return case.refuses.get(cell.name, cell.refuses)


def examine(cases: Sequence[Case], cell: Cell) -> list[str]:
    """What is wrong with each of the cases in the cell: nothing for one that is right, or refuses with its sentence."""
    # Networks and images of cases are so small that windows wouldn't pay.
    with mock.patch.multiple(windows, COST_PER_CALL=0, COST_PER_WEIGHT=0, WINDOW_PENALTY=1):
        if cell.together:
            return cell.check(cases)
        return [_examine(case, cell) for case in cases]


def _examine(case: Case, cell: Cell) -> str:
    sentence = refusal(case, cell)
    try:
        cell.check(case)
    except Exception as error:
        refused = isinstance(error, REFUSALS) and sentence is not None
        return "" if refused and sentence in " ".join(str(error).split()) else traceback.format_exc()
    return f"not refused: {sentence}" if sentence else ""


def anything(case: Case) -> bool:
    """"""
    return True


def with_gradient(case: Case) -> bool:
    """with a gradient"""
    return case.differentiable


def with_boxes(case: Case) -> bool:
    """with boxes"""
    return case.stride > 0


def with_module(case: Case) -> bool:
    """that are modules"""
    return case.module is not None


def with_float_boxes(case: Case) -> bool:
    """with boxes that aren't whole numbers"""
    return case.stride > 0 and case.name != "roi_windows"


def cell(
    name: str,
    applies: Callable[[Case], bool] = anything,
    *,
    fresh: bool = False,
    together: bool = False,
    refuses: str | None = None,
) -> Callable:
    """Adds a function to `CELLS`."""

    def add(check: Callable) -> Callable:
        CELLS[name] = Cell(name, check, applies, fresh or together, together, refuses)
        return check

    return add


def assert_near(actual: Tensor, expected: Tensor, dtype: torch.dtype, what: str = "value") -> None:
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
    expected = expected.detach()
    scale = expected.double().norm().clamp(min=1e-30)
    error = float((actual.detach().double() - expected.double()).norm() / scale)
    assert error <= TOLERANCES[dtype], f"{what}: relative L2 error {error:.2e}, allowed are {TOLERANCES[dtype]:.0e}"


def upstream_of(value: Tensor, number: int = 0) -> Tensor:
    """An upstream gradient that is different everywhere, in the value's dtype."""
    random = torch.Generator("cpu").manual_seed(100 + number)
    return torch.randn(value.shape, generator=random, dtype=torch.float64, device="cpu").to(value.dtype)


def run(function: Function, x: Tensor, t: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The value, and its gradient in x for `upstream_of` it."""
    leaf = x.detach().requires_grad_()
    value = function(leaf, t, b)
    if not value.requires_grad:
        return value, None
    (gradient,) = torch.autograd.grad(value, leaf, upstream_of(value))
    return value.detach(), gradient


def check(case: Case, function: Function, x: Tensor, t: Tensor, b: Tensor | None, dtype: torch.dtype | None = None):
    """Value and gradient of a function are those of the case's definition."""
    value, gradient = run(function, x, t, b)
    right, right_gradient = run(case.expected, x.double(), t, b)
    dtype = x.dtype if dtype is None else dtype
    assert_near(value, right, dtype)
    assert (gradient is not None) == case.differentiable, "gradient: there is none" if gradient is None else "gradient"
    if gradient is not None:
        assert gradient.dtype == x.dtype, f"gradient: {gradient.dtype}, not {x.dtype}"
        assert_near(gradient, right_gradient, dtype, "gradient")
