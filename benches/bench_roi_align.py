"""RoIAlign against torchvision's, of proposals as a box head samples them: on one map, and on a detector's pyramid."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torchvision.ops import MultiScaleRoIAlign, roi_align

from benches.boxes import as_rois, proposals
from benches.harness import Contestant
from lidnet_fast import functional

BINS = 7
SAMPLES = 2
IMAGES, CHANNELS, BOXES = 4, 256, 1024
# Coordinates near 512 are rounded by 3e-5 in float32: torchvision's own result is as far from float64's.
TOLERANCES = {torch.float32: 5e-5, torch.bfloat16: 1e-2}

# levels -> pooled boxes
Pool = Callable[[Sequence[Tensor]], Tensor]


@dataclass(frozen=True)
class Problem:
    """Feature maps, and how each contestant pools boxes from them."""

    case: str
    shapes: list[tuple[int, ...]]
    ours: Pool
    torchvision: Pool

    @functools.cached_property
    def maps(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        return [torch.randn(shape, generator=generator) for shape in self.shapes]


def of_feature_map() -> Problem:
    rois = as_rois(proposals((512, 512), IMAGES, BOXES))

    def ours(levels):
        return functional.roi_align(levels[0], rois, BINS, 0.25, SAMPLES)

    def torchvision(levels):
        # It wants features and boxes of one dtype, and has no bfloat16 on CPU.
        dtype = torch.promote_types(levels[0].dtype, torch.float32)
        return roi_align(levels[0].to(dtype), rois.to(dtype), BINS, 0.25, SAMPLES).to(levels[0].dtype)

    shape = (IMAGES, CHANNELS, 128, 128)
    return Problem(f"{'x'.join(map(str, shape))} stride 4, {BOXES} proposals", [shape], ours, torchvision)


def of_pyramid() -> Problem:
    size, strides = 256, (4, 8, 16)
    names = [str(level) for level in range(len(strides))]
    boxes, sizes = proposals((size, size), IMAGES, BOXES), [(size, size)] * IMAGES
    scale = {"canonical_scale": 28, "canonical_level": 3}  # the detectors'
    pooler = MultiScaleRoIAlign(names, BINS, SAMPLES, **scale)

    def ours(levels):
        named = dict(zip(names, levels, strict=True))
        return functional.multiscale_roi_align(named, boxes, sizes, BINS, SAMPLES, **scale)

    def torchvision(levels):
        dtype = torch.promote_types(levels[0].dtype, torch.float32)
        named = {name: level.to(dtype) for name, level in zip(names, levels, strict=True)}
        return pooler(named, [of_image.to(dtype) for of_image in boxes], sizes).to(levels[0].dtype)

    shapes = [(IMAGES, CHANNELS, size // stride, size // stride) for stride in strides]
    case = f"{IMAGES}x{CHANNELS}, strides 4 to 16 of {size}x{size}, {BOXES} proposals"
    return Problem(case, shapes, ours, torchvision)


PROBLEMS = {"map": of_feature_map, "pyramid": of_pyramid}


@functools.lru_cache(maxsize=1)
def make_problem(name: str) -> Problem:
    torch.compiler.reset()
    return PROBLEMS[name]()


def contestant(pool: Pool, maps: Sequence[Tensor], upstream: Tensor | None) -> Contestant:
    """The pooled boxes; with `upstream` the gradients of the maps as well."""
    if upstream is None:
        return torch.no_grad()(lambda: (pool(maps),))
    leaves = [level.detach().requires_grad_() for level in maps]

    def forward_and_backward():
        pooled = pool(leaves)
        return pooled.detach(), *torch.autograd.grad(pooled, leaves, upstream.to(pooled.dtype))

    return forward_and_backward


def mode(dtype: torch.dtype, channels_last: bool, backward: bool) -> str:
    parts = ["fwd+bwd" if backward else "forward"]
    parts += ["channels_last"] * channels_last + ["bf16"] * (dtype == torch.bfloat16)
    return " ".join(parts)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "fwd+bwd"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["planar", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_speed(race, name, dtype, channels_last, backward):
    problem = make_problem(name)
    form = torch.channels_last if channels_last else torch.contiguous_format
    maps = [level.to(dtype, memory_format=form) for level in problem.maps]
    upstream = torch.randn(BOXES, CHANNELS, BINS, BINS).to(dtype) if backward else None
    expected = contestant(problem.torchvision, [level.double() for level in maps], upstream)()
    peers = {"torchvision": problem.torchvision, "compiled": torch.compile(problem.torchvision)}
    features = sum(level.nbytes for level in maps)
    race(
        "roi_align",
        problem.case,
        mode(dtype, channels_last, backward),
        ours=contestant(problem.ours, maps, upstream),
        peers={name: contestant(peer, maps, upstream) for name, peer in peers.items()},
        expected=expected,
        tolerance=TOLERANCES[dtype],
        # The maps read and the bins written, and the same of their gradients.
        floor_bytes=(1 + backward) * (features + expected[0].numel() * dtype.itemsize),
    )
