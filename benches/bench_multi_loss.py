"""multi_loss against the sum of the usual implementations of its terms.

F.l1_loss, F.mse_loss, pytorch-msssim's SSIM, Sobel filters by conv2d, total variation by diff: eager, as most
training scripts have it, and under torch.compile. The jacobian's peer is autograd, term by term, through the same
functions.
"""

import functools
from collections.abc import Callable

import pytest
import pytorch_msssim
import torch
from torch import Tensor
from torch.nn import functional as F

from lidnet_fast import multi_loss, multi_loss_jacobian

SHAPES = ((4, 1, 512, 512), (1, 1, 512, 512), (16, 1, 64, 64), (1, 1, 64, 256, 256))
SIX = {"l1": 0.5, "mse": 1.0, "charbonnier": 0.3, "ssim": 0.4, "edge": 0.2, "tv": 0.1}
CHOICES = {"six terms": SIX, "ssim": {"ssim": 1.0}, "l1, mse": {"l1": 0.5, "mse": 1.0}, "ms_ssim": {"ms_ssim": 1.0}}
# Where d is nearly 0, rounding decides the sign that l1, edge and tv hand back.
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 1e-2}

Loss = Callable[[Tensor, Tensor], Tensor]


def edge(input: Tensor, target: Tensor) -> Tensor:
    axes = input.ndim - 2
    slope, smooth = torch.tensor([-1.0, 0, 1], dtype=input.dtype), torch.tensor([1.0, 2, 1], dtype=input.dtype)
    kernels = []
    for across in range(axes):
        factors = [(slope if axis == across else smooth).view([-1] + [1] * (axes - 1 - axis)) for axis in range(axes)]
        kernels.append(functools.reduce(torch.mul, factors))
    filters = torch.stack(kernels).unsqueeze(1)
    convolve = F.conv2d if axes == 2 else F.conv3d
    return axes * (convolve(input, filters) - convolve(target, filters)).abs().mean()


def total_variation(image: Tensor) -> Tensor:
    return sum(image.diff(dim=axis).abs().mean() for axis in range(2, image.ndim))


def window(input: Tensor) -> Tensor:
    """pytorch-msssim's, in float64 where the images are: it makes its own in float32."""
    offsets = torch.arange(11, dtype=input.dtype) - 5
    weights = torch.exp(-offsets.square() / (2 * 1.5**2))
    return (weights / weights.sum()).expand(input.shape[1], *[1] * (input.ndim - 2), 11)


TERMS: dict[str, Loss] = {
    "l1": F.l1_loss,
    "mse": F.mse_loss,
    "charbonnier": lambda x, y: ((x - y) ** 2 + 1e-6).sqrt().mean(),
    "ssim": lambda x, y: 1 - pytorch_msssim.ssim(x, y, data_range=1.0, win=window(x)),
    "ms_ssim": lambda x, y: 1 - pytorch_msssim.ms_ssim(x, y, data_range=1.0, win=window(x)),
    "edge": edge,
    "tv": lambda x, y: total_variation(x),
}


def usual(weights: dict[str, float]) -> Loss:
    # pytorch-msssim has no bfloat16 on CPU.
    return lambda x, y: sum(weight * TERMS[name](x.float(), y.float()) for name, weight in weights.items())


def value_and_gradient(loss: Loss, input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    leaf = input.detach().requires_grad_()
    value = loss(leaf, target)
    value.backward()
    return value.detach(), leaf.grad


@functools.lru_cache(maxsize=1)
def images(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    pool = F.avg_pool2d if len(shape) == 4 else F.avg_pool3d
    target = pool(torch.rand(shape, generator=generator), 5, 1, 2)
    return (target + 0.05 * torch.randn(shape, generator=generator)).to(dtype), target.to(dtype)


def in_double(name: str, input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return value_and_gradient(TERMS[name], input.double(), target.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("shape", SHAPES)
def test_multi_loss(race, shape, choice, dtype):
    weights = CHOICES[choice]
    if "ms_ssim" in weights and min(shape[2:]) < 161:
        pytest.skip("too small for five scales")
    if dtype != torch.float32 and (shape, choice) != (SHAPES[0], "six terms"):
        pytest.skip("half precision is raced once")
    torch.compiler.reset()
    input, target = images(shape, dtype)
    peers = {"eager": usual(weights), "compiled": torch.compile(usual(weights))}
    exact = [in_double(name, input, target) for name in weights]
    race(
        "multi_loss, forward and backward",
        f"{'x'.join(map(str, shape))}",
        choice if dtype == torch.float32 else f"{choice}, bf16",
        ours=lambda: value_and_gradient(lambda x, y: multi_loss(x, y, weights).total, input, target),
        peers={name: functools.partial(value_and_gradient, peer, input, target) for name, peer in peers.items()},
        expected=[sum(weights[n] * e[i] for n, e in zip(weights, exact, strict=True)) for i in range(2)],
        tolerance=TOLERANCES[dtype],
        floor_bytes=3 * input.nbytes,
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_jacobian(race, shape):
    input, target = images(shape, torch.float32)

    def by_autograd() -> tuple[Tensor]:
        return (torch.stack([value_and_gradient(TERMS[name], input, target)[1] for name in SIX]),)

    race(
        "multi_loss_jacobian",
        f"{'x'.join(map(str, shape))}",
        "six terms",
        ours=lambda: (multi_loss_jacobian(input, target, list(SIX)),),
        peers={"eager": by_autograd},
        expected=[torch.stack([in_double(name, input, target)[1] for name in SIX])],
        tolerance=TOLERANCES[torch.float32],
        floor_bytes=(2 + len(SIX)) * input.nbytes,
    )
