"""gradient_gramian and combine_gradients against matrix products of the flattened gradients."""

import pytest
import torch

from lidnet_fast import combine_gradients, gradient_gramian

SHAPE = (6, 4, 1, 512, 512)
DTYPES = [torch.float32, torch.bfloat16]
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def case(dtype: torch.dtype) -> tuple[torch.Tensor, str]:
    gradients = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(dtype)
    return gradients, str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gramian(race, dtype, per_sample):
    gradients, name = case(dtype)

    def products(values: torch.Tensor) -> tuple[torch.Tensor]:
        rows = values.flatten(2).transpose(0, 1) if per_sample else values.flatten(1)
        return (rows @ rows.mT,)

    race(
        "gradient_gramian",
        "x".join(map(str, SHAPE)),
        f"{name}, per sample" if per_sample else name,
        ours=lambda: (gradient_gramian(gradients, per_sample=per_sample),),
        peers={"matmul": lambda: products(gradients.float())},
        expected=products(gradients.double()),
        tolerance=1e-3,  # a plain sum of a million products in float32
        floor_bytes=gradients.nbytes,
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_combination(race, dtype):
    gradients, name = case(dtype)
    coefficients = torch.linspace(-1, 1, SHAPE[0])
    race(
        "combine_gradients",
        "x".join(map(str, SHAPE)),
        name,
        ours=lambda: (combine_gradients(gradients, coefficients),),
        peers={"tensordot": lambda: (torch.tensordot(coefficients.to(dtype), gradients, dims=1),)},
        expected=[torch.tensordot(coefficients.double(), gradients.double(), dims=1)],
        tolerance=TOLERANCES[dtype],
        floor_bytes=gradients.nbytes + gradients[0].nbytes,
    )
