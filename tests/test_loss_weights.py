"""What docs/loss_weights.md says is what is measured."""

import re
from pathlib import Path

import pytest
import torch

import lidnet_fast
from tools.loss_weights import WINDOW, scan, tables

PAGE = Path(__file__).parents[1] / "docs" / "loss_weights.md"


def cells(text: str) -> dict[str, list[float]]:
    """The tables' rows of numbers, by their first cell."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return {name: [float(cell) for cell in row] for name, *row in rows if re.fullmatch(r"[\d.e+-]*\d", row[0])}


@pytest.mark.slow
def test_the_tables_are_measured():
    """To a fifth: PyTorch's versions differ in how they draw random weights' features, and tables have two digits."""
    written, measured = cells(PAGE.read_text()), cells(tables())
    assert list(written) == list(measured)
    for name, row in written.items():
        assert row == pytest.approx(measured[name], rel=0.2), name


@pytest.fixture(scope="module")
def images():
    low, normal, _ = scan(0.25)
    return low, normal


def test_ssim_of_shifted_hu_is_that_of_the_window(images):
    low, normal = images
    of_window = lidnet_fast.multi_loss(WINDOW.scale(low), WINDOW.scale(normal), {"ssim": 1.0}).total
    shifted = lidnet_fast.multi_loss(low + 1000, normal + 1000, {"ssim": 1.0}, data_range=WINDOW.width).total
    torch.testing.assert_close(shifted, of_window, rtol=1e-3, atol=0)


@pytest.mark.parametrize("weights", [{"l1": 1.0, "ssim": 0.05, "edge": 0.05}, {"l1": 1.0, "ssim": 5.0}])
def test_upgrad_is_the_mean_without_conflict(images, weights):
    pytest.importorskip("quadprog")
    low, normal = (WINDOW.scale(hu) for hu in images)
    low.requires_grad_()
    losses = {term: lidnet_fast.multi_loss(low, normal, {term: weight}).total for term, weight in weights.items()}
    found = lidnet_fast.mtl_backward(losses, low, "upgrad")
    assert (found.cosines > 0).all()
    assert found.weights.tolist() == pytest.approx([1 / len(weights)] * len(weights), abs=1e-4)


def test_upgrad_weighs_more_in_conflict():
    pytest.importorskip("quadprog")
    shared = torch.zeros(2, requires_grad=True)
    found = lidnet_fast.mtl_backward([shared[0], shared[1] - 0.5 * shared[0]], shared, "upgrad")
    assert found.cosines[0, 1] < 0
    assert (found.weights > 0.55).all()
