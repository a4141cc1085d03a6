"""`python -m tests.conformance.inductor`: one graph of every op, through torch.compile as it comes."""

import torch
from torch import Tensor

from .cases import CASES
from .cells import assert_near, run, upstream_of

COMPILED = [case for case in CASES if case.differentiable and "torch.compile(fullgraph=True)" not in case.refuses]


def main() -> None:
    """Fails unless every value and gradient is right."""
    functions = [case.build() for case in COMPILED]
    given = [case.tensors() for case in COMPILED]
    leaves = [x.requires_grad_() for x, _, _ in given]

    def every_op(given: list[tuple[Tensor, Tensor, Tensor | None]]) -> list[Tensor]:
        return [function(*tensors) for function, tensors in zip(functions, given, strict=True)]

    values = torch.compile(every_op, fullgraph=True)(given)
    gradients = torch.autograd.grad(values, leaves, [upstream_of(value) for value in values])
    for case, value, gradient, (x, t, b) in zip(COMPILED, values, gradients, given, strict=True):
        right, right_gradient = run(case.expected, x.detach().double(), t, b)
        assert_near(value, right, torch.float32, case.name)
        assert_near(gradient, right_gradient, torch.float32, f"gradient of {case.name}")


if __name__ == "__main__":
    main()
