import pytest
import torch

from lidnet_fast import backend, combine_gradients, gradient_gramian


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


@pytest.mark.parametrize("shape", [(1, 1), (2, 7), (5, 3, 1000), (6, 2, 17000), (9, 4, 33, 21), (3, 0)])
def test_sizes_that_do_and_do_not_fill_blocks(assert_near, shape):
    gradients, coefficients = torch.randn(shape), torch.randn(shape[0])
    rows = gradients.double().flatten(1)
    assert_near(gradient_gramian(gradients), rows @ rows.T, torch.float32)
    combined = torch.einsum("t,t...->...", coefficients.double(), gradients.double())
    assert_near(combine_gradients(gradients, coefficients), combined, torch.float32)


@pytest.mark.parametrize("shape", [(4, 3, 2, 5, 7), (2, 1, 9), (3, 5, 4000), (3, 0, 8)])
def test_gramians_of_samples(assert_near, shape):
    gradients = torch.randn(shape, dtype=torch.float64)
    gramians = gradient_gramian(gradients, per_sample=True)
    assert gramians.shape == (shape[1], shape[0], shape[0])
    for number, gramian in enumerate(gramians):
        assert_near(gramian, gradient_gramian(gradients[:, number]))


def test_any_number_of_threads_gives_the_same_bits(with_threads):
    gradients, coefficients = torch.randn(5, 3, 70001), torch.randn(5)

    def both():
        return gradient_gramian(gradients, per_sample=True), combine_gradients(gradients, coefficients)

    results = with_threads(both, (1, 2, 5))
    if backend.current() == "fused":
        for result in results:
            assert torch.equal(result[0], results[0][0])
            assert torch.equal(result[1], results[0][1])


def test_sums_of_half_gradients_dont_overflow():
    gradients = torch.full((2, 4, 4), 300.0, dtype=torch.float16)
    assert torch.equal(gradient_gramian(gradients), torch.full((2, 2), 16 * 90000.0))
    combined = combine_gradients(gradients, torch.tensor([1000.0, -999.0]))
    assert torch.equal(combined, torch.full((4, 4), 300.0, dtype=torch.float16))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_to_half_precision_is_torchs(dtype):
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 65504.0])
    first = torch.cat((torch.randn(3000), special)).to(dtype)
    second = torch.cat((torch.randint(-8, 9, (3000,)) / 4, torch.zeros(6))).to(dtype)
    coefficients = torch.tensor([1.0, 2.0**-9])  # ties between two neighbours, and sums that float32 holds exactly
    combined = combine_gradients(torch.stack((first, second)), coefficients)
    torch.testing.assert_close(
        combined, (first.float() + second.float() / 512).to(dtype), rtol=0, atol=0, equal_nan=True
    )


def test_gradcheck():
    gradients = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
    coefficients = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(gradient_gramian, gradients)
    assert torch.autograd.gradcheck(lambda g: gradient_gramian(g[..., None], per_sample=True), gradients)
    assert torch.autograd.gradgradcheck(gradient_gramian, gradients)
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


def test_samples_need_a_dimension():
    with pytest.raises(ValueError, match=r"gradients must have shape \[T, N, ...\] with T >= 1, got \(2, 3\)"):
        gradient_gramian(torch.zeros(2, 3), per_sample=True)
    with pytest.raises(TypeError, match="per_sample must be True or False, got 1"):
        gradient_gramian(torch.zeros(2, 3, 4), per_sample=1)


def test_compiles_as_one_graph(assert_near):
    def combination(gradients):
        return combine_gradients(gradients, gradient_gramian(gradients).sum(0))

    results = []
    for function in (combination, torch.compile(combination, backend="aot_eager", fullgraph=True)):
        gradients = torch.linspace(-1, 1, 60).view(3, 4, 5).requires_grad_()
        result = function(gradients)
        results.append((result, torch.autograd.grad(result.square().sum(), gradients)[0]))
    for ours, eager in zip(*results, strict=True):
        assert_near(ours, eager, torch.float32)


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
