"""What the conformance tests run: every public op and module once, each by one entry of `CASES`.

A case is a function of three tensors: x (which gets gradients), t (a target of x's shape) and b (boxes, or None). The
right result is what the same function gives on the definitions (`lidnet_fast.reference`) in float64; a case whose code
is more than one op brings a `definition` of its own.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lidnet_fast as fast
from lidnet_fast import backend
from lidnet_fast.extractors import LayerExtractor

Function = Callable[..., Tensor]

# The sentences with which the library refuses, one for each reason.
TWICE = "the fused losses can't be differentiated twice. To fix:"
BOXES = "pass boxes.detach()"
OF_INFERENCE = "must depend on shared, got one without a graph"


PLANS = (
    "ROIPerceptualLoss plans its windows from the boxes' values, outside of graphs. To fix: leave fullgraph=True out",
    "ROIPerceptualLoss plans its windows from the boxes' values, which torch.export hasn't got. "
    "To fix: export extractors.LayerExtractor and roi_perceptual_loss",
)
HIDDEN = (
    "ROIPerceptualLoss plans its windows from the boxes' values, which torch.vmap hides. To fix: pass boxes on the CPU"
)
NO_VALUES = (
    "ROIPerceptualLoss plans its windows from the boxes' values, which meta tensors don't have. "
    "To fix: pass boxes on the CPU"
)
INSIDE = "You are attempting to call Tensor.requires_grad_()"
WALKS = "torch.autograd.grad", "set torch._functorch.config.donated_buffer=False"


def refuses(sentence: str, *cells: str) -> dict[str, str]:
    """The cells' names with the sentence."""
    return dict.fromkeys(cells, sentence)


LOSS = refuses(TWICE, "double backward")
PERCEPTUAL = LOSS | refuses(PLANS[0], "torch.compile(fullgraph=True)") | refuses(PLANS[1], "torch.export")
PERCEPTUAL |= refuses(HIDDEN, "torch.vmap of the boxes") | refuses(NO_VALUES, "tensors of the meta device")
MULTITASK = (
    refuses(OF_INFERENCE, "torch.inference_mode and no_grad")
    | refuses(INSIDE, "torch.vmap", "torch.vmap of the boxes")
    | refuses(WALKS[0], "torch.compile(fullgraph=True)")
    | refuses(WALKS[1], "torch.compile, boxes in changing numbers")
)


@dataclass(frozen=True)
class Case:
    """One public op or module.

    Attributes:
        name: Of the op or module, and what of it.
        call: (x, t, b) -> Tensor; of a module (module, x, t, b) -> Tensor.
        shape: Of x and t.
        stride: Pixels of the boxes' image per cell of x; 0 for a case without boxes.
        module: Makes the module.
        definition: (module, x, t, b) -> Tensor in plain PyTorch and on definitions, where `call` isn't one.
        differentiable: Whether the result has a gradient in x.
        refuses: Name of a cell -> the sentence of the error.
    """

    name: str
    call: Function
    shape: tuple[int, ...]
    stride: float = 0
    module: Callable[[], nn.Module] | None = None
    definition: Function | None = None
    differentiable: bool = True
    refuses: Mapping[str, str] = field(default_factory=dict)

    def tensors(
        self, dtype: torch.dtype = torch.float32, *, boxes: int = 4, seed: int = 0
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """x, t and b, the same for the same arguments; x and t in `dtype`, b in float32 where that is shorter."""
        random = torch.Generator("cpu").manual_seed(seed)
        options = {"generator": random, "dtype": torch.float64, "device": "cpu"}
        x, t = (torch.rand(self.shape, **options).to(dtype) for _ in range(2))
        if not self.stride:
            return x, t, None
        sides = torch.tensor(self.shape[:1:-1], dtype=torch.float64, device="cpu") * self.stride
        lower = torch.rand(boxes, len(sides), **options) * (sides - 4)
        upper = lower + 1 + torch.rand(boxes, len(sides), **options) * 5
        image = torch.arange(boxes, dtype=torch.float64, device="cpu")[:, None] % self.shape[0]
        return x, t, torch.hstack((image, lower, upper)).to(dtype if dtype.itemsize > 2 else torch.float32)

    def build(self, dtype: torch.dtype = torch.float32) -> Function:
        """The function of x, t and b, its module in `dtype`."""
        return self.call if self.module is None else Bound(self.call, self.module().to(dtype))

    def expected(self, x: Tensor, t: Tensor, b: Tensor | None) -> Tensor:
        """The right result for the values of these tensors, in float64."""
        wide = [None if tensor is None else tensor.double() for tensor in (x, t, b)]
        function = self.build(torch.float64)
        backend.use("reference")
        try:
            return function(*wide) if self.definition is None else self.definition(function.module, *wide)
        finally:
            backend.use(None)


class Bound(nn.Module):
    """A case's function with its module."""

    def __init__(self, call: Function, module: nn.Module) -> None:
        super().__init__()
        self.call = call
        self.module = module

    def forward(self, x: Tensor, t: Tensor, b: Tensor | None) -> Tensor:
        return self.call(self.module, x, t, b)


def network() -> nn.Module:
    """A small network with everything that has state: convolutions with and without bias, BatchNorm after training."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        layers = nn.Sequential(
            *(nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.Softplus()),
            *(nn.AvgPool2d(2), nn.Conv2d(6, 5, 3, padding=1), nn.Softplus()),
        ).float()
        with torch.no_grad():
            layers(torch.rand(8, 3, 16, 16, dtype=torch.float32))
    return layers.eval()


MEAN, STD = (0.375, 0.5, 0.625), (0.25, 0.375, 0.5)  # the same in float32 and float64
LAYERS = {"1": 0.5, "5": 1.0}


def perceptual(halo: str) -> Callable[[], nn.Module]:
    return lambda: fast.ROIPerceptualLoss(network(), LAYERS, halo, output_size=3, mean=MEAN, std=STD)


def normalised(images: Tensor) -> Tensor:
    mean, std = (images.new_tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (images - mean) / std


def features_by_hand(module: nn.Module, x: Tensor, t: Tensor, b: Tensor | None) -> Tensor:
    """The last layer's features from the network itself."""
    return network().to(x)(normalised(x))


def perceptual_by_hand(module: nn.Module, x: Tensor, t: Tensor, b: Tensor) -> Tensor:
    """The features of whole images from the network itself, compared by the definition of the loss."""
    layers = network().to(x)
    total = x.new_zeros(())
    for layer, weight in LAYERS.items():
        features = [layers[: int(layer) + 1](normalised(images)) for images in (x, t)]
        features[1] = features[1].detach()
        total = total + weight * fast.roi_perceptual_loss(*features, b, 3, features[0].shape[2] / x.shape[2])
    return total


def levels(x: Tensor) -> dict[str, Tensor]:
    """A feature pyramid of two levels."""
    return {"fine": x, "coarse": F.avg_pool2d(x, 2)}


def terms(output: fast.MultiLossOutput) -> Tensor:
    """All that `multi_loss` gives."""
    return torch.stack((output.total, *output.terms.values()))


def corners(x: Tensor, b: Tensor, size: tuple[int, ...]) -> Tensor:
    """Windows of a size that begin where the boxes do."""
    axes = len(size)
    first = b[:, [0, *range(axes, 0, -1)]].long()
    most = torch.tensor([x.shape[0], *x.shape[2:]], device=b.device) - torch.tensor([1, *size], device=b.device)
    return first.clamp(min=0).minimum(most)


def multitask(x: Tensor, t: Tensor, b: Tensor) -> Tensor:
    """The gradient that `mtl_backward` leaves at the shared tensor."""
    shared = x.detach().clone().requires_grad_()
    with torch.enable_grad():
        losses = fast.roi_perceptual_loss(shared, t, b, 3), fast.multi_loss(shared, t, {"mse": 1.0}).total
        fast.mtl_backward(losses, shared, "mean")
    return shared.grad


PIXEL_TERMS = {"mse": 1.0, "charbonnier": 0.3, "ssim": 0.2, "edge": 0.1, "tv": 0.0}
SIZES = ((32, 40),) * 2  # of the images that the pyramids are of

CASES = (
    Case(
        "roi_perceptual_loss", lambda x, t, b: fast.roi_perceptual_loss(x, t, b, 3, 0.5), (2, 3, 9, 11), 2, refuses=LOSS
    ),
    Case(
        "roi_perceptual_loss, volumes",
        lambda x, t, b: fast.roi_perceptual_loss(x, t, b, 2, criterion="charbonnier", reduction="none"),
        (2, 3, 5, 7, 6),
        1,
        refuses=LOSS,
    ),
    Case(
        "multiscale_roi_perceptual_loss",
        lambda x, t, b: fast.multiscale_roi_perceptual_loss(levels(x), levels(t), b, SIZES, 3, canonical_scale=12),
        (2, 3, 16, 20),
        2,
        refuses=LOSS,
    ),
    Case("roi_align", lambda x, t, b: fast.roi_align(x, b, 3, 0.5, 2), (2, 3, 9, 11), 2),
    Case("roi_align, volumes", lambda x, t, b: fast.roi_align(x, b, 2, aligned=True), (2, 3, 5, 7, 6), 1),
    Case(
        "multiscale_roi_align",
        lambda x, t, b: fast.multiscale_roi_align(levels(x), b, SIZES, 3, 2, canonical_scale=12),
        (2, 3, 16, 20),
        2,
    ),
    Case("roi_windows", lambda x, t, b: fast.roi_windows(x, corners(x, b, (4, 3)), (4, 3)), (2, 3, 9, 11), 1),
    Case(
        "multi_loss",
        lambda x, t, b: terms(fast.multi_loss(x, t, PIXEL_TERMS, boxes=b, roi_weight=3.0)),
        (2, 2, 13, 17),
        1,
        refuses=LOSS,
    ),
    Case(
        "multi_loss, volumes",
        lambda x, t, b: terms(fast.multi_loss(x, t, PIXEL_TERMS)),
        (1, 2, 11, 12, 13),
        refuses=LOSS,
    ),
    Case(
        "multi_loss_jacobian",
        lambda x, t, b: fast.multi_loss_jacobian(x, t, ["mse", "ssim", "edge"], boxes=b, roi_weight=3.0),
        (2, 2, 13, 17),
        1,
        differentiable=False,
    ),
    Case("gradient_gramian", lambda x, t, b: fast.gradient_gramian(x), (3, 2, 4, 5)),
    Case("gradient_gramian, per sample", lambda x, t, b: fast.gradient_gramian(x, per_sample=True), (3, 2, 4, 5)),
    Case("combine_gradients", lambda x, t, b: fast.combine_gradients(x, x.flatten(1).sum(1)), (3, 2, 4, 5)),
    Case(
        "mtl_backward",
        multitask,
        (2, 1, 13, 17),
        1,
        differentiable=False,
        refuses=MULTITASK,
    ),
    Case(
        "MultiLoss",
        lambda module, x, t, b: terms(module(x, t, b)),
        (2, 2, 13, 17),
        1,
        module=lambda: fast.MultiLoss(PIXEL_TERMS, roi_weight=3.0),
        refuses=LOSS,
    ),
    Case(
        "ROIPerceptualLoss",
        lambda module, x, t, b: module(x, t, b),
        (2, 3, 96, 96),
        1,
        module=perceptual("exact"),
        definition=perceptual_by_hand,
        refuses=PERCEPTUAL,
    ),
    Case(
        'ROIPerceptualLoss, halo="whole"',
        lambda module, x, t, b: module(x, t, b),
        (2, 3, 32, 32),
        1,
        module=perceptual("whole"),
        definition=perceptual_by_hand,
        refuses=PERCEPTUAL,
    ),
    Case(
        "LayerExtractor",
        lambda module, x, t, b: module(x)["5"],
        (2, 3, 16, 16),
        module=lambda: LayerExtractor(network(), LAYERS, mean=MEAN, std=STD),
        definition=features_by_hand,
    ),
)
