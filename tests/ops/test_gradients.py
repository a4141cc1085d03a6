import pytest
import torch

from lidnet_fast import combine_gradients, gradient_gramian


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("contiguous", [True, False])
def test_gramian_and_combination(assert_near, dtype, contiguous):
    gradients = torch.randn(4, 2, 3, 5, 7, dtype=torch.float64).to(dtype)
    if not contiguous:
        gradients = gradients.transpose(0, 4)[:4]
    exact = gradients.double()
    gramian = gradient_gramian(gradients)
    assert gramian.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = torch.stack([torch.stack([(a * b).sum() for b in exact]) for a in exact])
    assert_near(gramian, expected, torch.float32 if dtype != torch.float64 else dtype)
    coefficients = torch.randn(4)
    combined = combine_gradients(gradients, coefficients)
    assert combined.dtype == dtype
    assert_near(combined, sum(c * g for c, g in zip(coefficients.double(), exact, strict=True)), dtype)


def test_sums_of_half_gradients_dont_overflow():
    gradients = torch.full((2, 4, 4), 300.0, dtype=torch.float16)
    assert torch.equal(gradient_gramian(gradients), torch.full((2, 2), 16 * 90000.0))
    combined = combine_gradients(gradients, torch.tensor([1000.0, -999.0]))
    assert torch.equal(combined, torch.full((4, 4), 300.0, dtype=torch.float16))


def test_gradcheck():
    gradients = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
    coefficients = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(gradient_gramian, gradients)
    assert torch.autograd.gradcheck(combine_gradients, (gradients, coefficients))


def test_autocast_changes_nothing():
    gradients, coefficients = torch.randn(3, 100), torch.randn(3)
    outside = gradient_gramian(gradients), combine_gradients(gradients, coefficients)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = gradient_gramian(gradients), combine_gradients(gradients, coefficients)
    assert torch.equal(outside[0], inside[0])
    assert torch.equal(outside[1], inside[1])


@pytest.mark.parametrize(
    ("gradients", "error", "message"),
    [
        ([torch.zeros(2)], TypeError, "gradients must be a Tensor, got list"),
        (torch.zeros(2, 2, dtype=torch.int64), TypeError, "gradients must be float32.*int64"),
        (torch.zeros(2), ValueError, r"gradients must have shape \[T, ...\] with T >= 1, got \(2,\)"),
        (torch.zeros(0, 2), ValueError, r"gradients must have shape .*got \(0, 2\)"),
    ],
)
def test_bad_gradients(gradients, error, message):
    with pytest.raises(error, match=message):
        gradient_gramian(gradients)
    with pytest.raises(error, match=message):
        combine_gradients(gradients, torch.ones(2))


@pytest.mark.parametrize(
    ("coefficients", "error", "message"),
    [
        ([1.0, 1.0], TypeError, "coefficients must be a Tensor, got list"),
        (torch.ones(3), ValueError, r"coefficients must have shape \(2,\), one per gradient, got \(3,\)"),
        (torch.ones(2, device="meta"), ValueError, "coefficients must be on the device of gradients, cpu, got meta"),
    ],
)
def test_bad_coefficients(coefficients, error, message):
    with pytest.raises(error, match=message):
        combine_gradients(torch.zeros(2, 3), coefficients)
