"""The ROI perceptual losses against torchvision's RoIAlign, twice, with a mean squared error.

No other library pools volumes: there the peer is the nearest thing in PyTorch, grid_sample at every sample of each bin,
averaged (the same numbers for boxes inside the volume), and for few boxes also the definition in lidnet_fast/reference.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import MultiScaleRoIAlign, roi_align

from benches.boxes import as_rois, lesions, proposals
from benches.harness import Contestant
from lidnet_fast import multiscale_roi_perceptual_loss, reference, roi_perceptual_loss

BINS = 7
SAMPLES = 2
# Coordinates near 512 are rounded by 3e-5 in float32: torchvision's own gradient is up to 2.4e-5 from float64's here.
TOLERANCES = {torch.float32: 5e-5, torch.bfloat16: 1e-2}

# (inputs, targets, reduction) -> loss; one Tensor per level
Loss = Callable[[Sequence[Tensor], Sequence[Tensor], str], Tensor]


@dataclass(frozen=True)
class Problem:
    """Features on which a loss is computed in boxes."""

    op: str
    case: str
    inputs: list[Tensor]
    targets: list[Tensor]
    ours: Loss
    definition: Loss
    peers: dict[str, Loss]

    @functools.cached_property
    def elements_read(self) -> int:
        """Elements of one map that some box reads: where the gradient of ones against zeros isn't 0."""
        ones, zeros = ([f(x.shape[0], 1, *x.shape[2:]) for x in self.inputs] for f in (torch.ones, torch.zeros))
        _, *gradients = contestant(self.definition, ones, zeros, BACKWARD, None)()
        return sum(int(g.count_nonzero()) * x.shape[1] for x, g in zip(self.inputs, gradients, strict=True))


@dataclass(frozen=True)
class Mode:
    """What is computed, and on which kind of Tensors."""

    name: str
    backward: bool = True
    reduction: str = "mean"
    dtype: torch.dtype = torch.float32
    memory_format: torch.memory_format = torch.contiguous_format


FORWARD = Mode("forward", backward=False)
BACKWARD = Mode("fwd+bwd")
OTHER_MODES = (
    Mode("forward channels_last", backward=False, memory_format=torch.channels_last),
    Mode("fwd+bwd channels_last", memory_format=torch.channels_last),
    Mode("forward bf16", backward=False, dtype=torch.bfloat16),
    Mode("fwd+bwd bf16", dtype=torch.bfloat16),
    Mode("fwd+bwd random upstream", reduction="none"),
)


def make_boxes(kind: str, extent: Sequence[int], images: int) -> tuple[str, list[Tensor]]:
    if kind == "lidc":
        boxes = lesions(extent, images)
        return f"{sum(map(len, boxes))} lesions", boxes
    return f"{kind} proposals", proposals(extent, images, int(kind))


def make_features(shapes: Sequence[Sequence[int]]) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    inputs, targets = ([torch.randn(*shape, generator=generator) for shape in shapes] for _ in range(2))
    return inputs, targets


def mean_squares(pooled_input: Tensor, pooled_target: Tensor, reduction: str) -> Tensor:
    if reduction == "mean":
        return F.mse_loss(pooled_input, pooled_target)
    return (pooled_input - pooled_target).square().flatten(1).mean(1)


def of_feature_map(shape: Sequence[int], stride: int, kind: str) -> Problem:
    label, boxes = make_boxes(kind, (stride * shape[3], stride * shape[2]), shape[0])
    rois = as_rois(boxes)

    def ours(inputs, targets, reduction):
        return roi_perceptual_loss(inputs[0], targets[0], rois, BINS, 1 / stride, SAMPLES, reduction=reduction)

    def torchvision(inputs, targets, reduction):
        # It wants features and boxes of one dtype, and has no bfloat16 on CPU.
        dtype = torch.promote_types(inputs[0].dtype, torch.float32)
        pooled = [roi_align(x[0].to(dtype), rois.to(dtype), BINS, 1 / stride, SAMPLES, True) for x in (inputs, targets)]
        return mean_squares(*pooled, reduction)

    case = f"{'x'.join(map(str, shape))} stride {stride}, {label}"
    peers = {"torchvision": torchvision, "compiled": torch.compile(torchvision)}
    return Problem("roi_perceptual_loss", case, *make_features([shape]), ours, torchvision, peers)


def of_pyramid(kind: str) -> Problem:
    images, channels, size, strides = 2, 256, 512, (4, 8, 16, 32, 64)
    label, boxes = make_boxes(kind, (size, size), images)
    sizes = [(size, size)] * images
    names = [str(level) for level in range(len(strides))]

    # MultiScaleRoIAlign pools with aligned=False; its canonical scale of 224 pixels is our default.
    def ours(inputs, targets, reduction):
        levels = (dict(zip(names, x, strict=True)) for x in (inputs, targets))
        return multiscale_roi_perceptual_loss(*levels, boxes, sizes, BINS, SAMPLES, aligned=False, reduction=reduction)

    pooler = MultiScaleRoIAlign(names, BINS, SAMPLES)

    def torchvision(inputs, targets, reduction):
        rois = [of_image.to(inputs[0].dtype) for of_image in boxes]
        pooled = [pooler(dict(zip(names, x, strict=True)), rois, sizes) for x in (inputs, targets)]
        return mean_squares(*pooled, reduction)

    shapes = [(images, channels, size // stride, size // stride) for stride in strides]
    case = f"{images}x{channels}, strides 4 to 64 of {size}x{size}, {label}"
    peers = {"torchvision": torchvision, "compiled": torch.compile(torchvision)}
    return Problem("multiscale_roi_perceptual_loss", case, *make_features(shapes), ours, torchvision, peers)


def of_volume(kind: str) -> Problem:
    shape = (1, 32, 64, 128, 128)
    label, boxes = make_boxes(kind, shape[:1:-1], shape[0])
    rois = as_rois(boxes)

    def ours(inputs, targets, reduction):
        return roi_perceptual_loss(inputs[0], targets[0], rois, BINS, 1.0, SAMPLES, reduction=reduction)

    corners = rois[:, 1:].view(-1, 2, 3)
    steps = (torch.arange(BINS * SAMPLES) + 0.5) / (BINS * SAMPLES)
    # Of every sample, per box and axis, (x, y, z): the corners are voxels' edges, grid_sample's -1 and 1 the volume's.
    along = corners[:, :1] + steps[:, None] * (corners[:, 1:] - corners[:, :1])
    along = along / torch.tensor(shape[:1:-1]) * 2 - 1

    def grid_sample(inputs, targets, reduction):
        x, y, z = along.to(inputs[0].dtype).unbind(2)
        points = x.shape[1]
        axes = (x[:, None, None], y[:, None, :, None], z[:, :, None, None])
        grid = torch.stack([axis.expand(-1, points, points, points) for axis in axes], dim=4)
        sampled = [
            F.grid_sample(maps[0], grid.view(1, -1, points, points, 3), padding_mode="border", align_corners=False)
            for maps in (inputs, targets)
        ]
        # The boxes lie one after another along the depth.
        pooled = [F.avg_pool3d(values, SAMPLES).unflatten(2, (-1, BINS)).transpose(1, 2)[0] for values in sampled]
        return mean_squares(*pooled, reduction)

    def definition(inputs, targets, reduction):
        pooling = (rois, None, [1.0], (BINS, BINS, BINS), SAMPLES, True)
        losses = reference.roi_perceptual_loss(inputs, targets, *pooling, "mse")
        return losses if reduction == "none" else losses.mean()

    peers = {"grid_sample": grid_sample, "compiled": torch.compile(grid_sample)}
    if kind == "lidc":  # more boxes would take it minutes
        peers["our definition"] = definition
    op = "roi_perceptual_loss on volumes"
    case = f"{'x'.join(map(str, shape))} stride 1, {label}"
    return Problem(op, case, *make_features([shape]), ours, grid_sample, peers)


PROBLEMS = {
    "stride4": functools.partial(of_feature_map, (4, 256, 128, 128), 4),
    "stride1": functools.partial(of_feature_map, (1, 64, 512, 512), 1),
    "pyramid": of_pyramid,
    "volume": of_volume,
}


@functools.lru_cache(maxsize=1)
def make_problem(name: str, kind: str) -> Problem:
    torch.compiler.reset()
    return PROBLEMS[name](kind)


def contestant(
    loss: Loss, inputs: Sequence[Tensor], targets: Sequence[Tensor], mode: Mode, upstream: Tensor | None
) -> Contestant:
    if not mode.backward:
        return torch.no_grad()(lambda: (loss(inputs, targets, mode.reduction),))
    leaves = [x.detach().requires_grad_() for x in inputs]

    def forward_and_backward():
        value = loss(leaves, targets, mode.reduction)
        return value.detach(), *torch.autograd.grad(value, leaves, upstream)

    return forward_and_backward


def floor_bytes(problem: Problem, mode: Mode) -> int:
    """What some box reads, once from both maps; and the gradient, dense, written once."""
    gradient = sum(x.numel() for x in problem.inputs) if mode.backward else 0
    return (2 * problem.elements_read + gradient) * mode.dtype.itemsize


def cases():
    for name in PROBLEMS:
        for kind in ("lidc", "256") if name == "volume" else ("lidc", "256", "1000"):
            modes = (FORWARD, BACKWARD, *OTHER_MODES) if (name, kind) == ("stride4", "256") else (FORWARD, BACKWARD)
            for mode in modes:
                yield pytest.param(name, kind, mode, id="-".join((name, kind, mode.name.replace(" ", "-"))))


@pytest.mark.parametrize(("name", "kind", "mode"), list(cases()))
def test_speed(race, name, kind, mode):
    problem = make_problem(name, kind)
    inputs, targets = (
        [x.to(mode.dtype, memory_format=mode.memory_format) for x in maps] for maps in (problem.inputs, problem.targets)
    )
    doubles = [[x.double() for x in maps] for maps in (inputs, targets)]
    upstream = None
    if mode.reduction == "none":
        upstream = torch.randn(problem.definition(inputs, targets, "none").shape)
    expected = contestant(problem.definition, *doubles, mode, None if upstream is None else upstream.double())()
    race(
        problem.op,
        problem.case,
        mode.name,
        ours=contestant(problem.ours, inputs, targets, mode, upstream),
        peers={name: contestant(peer, inputs, targets, mode, upstream) for name, peer in problem.peers.items()},
        expected=expected,
        tolerance=TOLERANCES[mode.dtype],
        floor_bytes=floor_bytes(problem, mode),
    )


@pytest.mark.parametrize("name", PROBLEMS)
def test_gradient_allocation(race, name):
    inputs = make_problem(name, "lidc").inputs
    race(
        "the dense gradient's allocation, part of every fwd+bwd",
        " ".join("x".join(map(str, x.shape)) for x in inputs[:1]) + (" and coarser" if len(inputs) > 1 else ""),
        "torch.zeros_like",
        ours=lambda: [torch.zeros_like(x) for x in inputs],
        peers={},
        expected=[torch.zeros_like(x) for x in inputs],
        tolerance=0.0,
        floor_bytes=sum(x.nbytes for x in inputs),
    )
