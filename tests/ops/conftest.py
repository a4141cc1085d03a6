from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lidnet_fast import backend

# Relative L2 error allowed against the float64 result, by the dtype of the op's input.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}


@pytest.fixture
def assert_near() -> Callable[..., None]:
    def check(actual: Tensor, expected: Tensor, dtype: torch.dtype = torch.float64, tolerance: float | None = None):
        assert actual.shape == expected.shape
        tolerance = TOLERANCES[dtype] if tolerance is None else tolerance
        error = (actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)
        assert error <= tolerance, f"relative L2 error {error:.2e} > {tolerance:.0e}"

    return check


@pytest.fixture
def with_threads() -> Iterator[Callable[[Callable[[], Any], Sequence[int]], list[Any]]]:
    """What a function gives on each of these numbers of threads."""
    threads = torch.get_num_threads()

    def run(function: Callable[[], Any], counts: Sequence[int]) -> list[Any]:
        results = []
        for count in counts:
            torch.set_num_threads(count)
            results.append(function())
        return results

    yield run
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests of an op that has kernels run on every backend there is here.

    Those named test_bad_... run on one, as arguments are checked before a backend is chosen; test_fused_... on kernels.
    """
    module, test = metafunc.module.__name__, metafunc.function.__name__
    ops = ("roi_align", "roi_perceptual", "roi_windows", "multi_loss", "gradients", "derivatives", "arguments")
    if any(op in module for op in ops) and "fused" not in module:
        names = backend.available()
        if test.startswith("test_bad_"):
            names = names[-1:]
        elif test.startswith("test_fused_"):
            names = tuple(name for name in names if name != "reference")
        metafunc.parametrize("_backend", names, indirect=True)


@pytest.fixture(autouse=True)
def _backend(request: pytest.FixtureRequest) -> Iterator[None]:
    backend.use(getattr(request, "param", None))
    yield
    backend.use(None)
