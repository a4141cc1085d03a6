"""ROIPerceptualLoss on windows against features of whole images, as a careful user computes them.

"whole image" is the extractor on both batches, torchvision's roi_align and mse_loss; the same "compiled" by
torch.compile, and under bfloat16 autocast with channels_last weights and images.
"""

import pytest
import torch
import torchvision
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import roi_align

from benches.boxes import as_rois, lidc_slices
from benches.harness import OURS, Contestant
from lidnet_fast import ROIPerceptualLoss

IMAGES, SIDE = 4, 512
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LAYERS = [
    ("vgg19", "relu2_2", 2),
    ("vgg19", "relu3_4", 4),
    ("vgg19", "relu4_4", 8),
    ("resnet18", "layer1", 4),
    ("resnet18", "layer2", 8),
]


def contestants(name: str, layer: str, stride: int) -> tuple[dict[str, Contestant], tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    network = getattr(torchvision.models, name)()
    loss = ROIPerceptualLoss(network, layer, mean=MEAN, std=STD)
    extractor, node = loss.extractor, next(iter(loss.layer_weights))
    generator = torch.Generator().manual_seed(0)
    denoised, normal_dose = (torch.rand(IMAGES, 1, SIDE, SIDE, generator=generator) for _ in range(2))
    boxes = lidc_slices(IMAGES)
    rois = as_rois(boxes)

    def gradient(value: Tensor, leaf: Tensor) -> tuple[Tensor, Tensor]:
        return value.detach(), torch.autograd.grad(value, leaf)[0]

    def ours() -> tuple[Tensor, Tensor]:
        leaf = denoised.detach().requires_grad_()
        return gradient(loss(leaf, normal_dose, boxes), leaf)

    def whole_loss(leaf: Tensor, target: Tensor) -> Tensor:
        inputs = extractor(leaf)[node]
        with torch.no_grad():
            targets = extractor(target)[node]
        pool = {"output_size": 7, "spatial_scale": 1 / stride, "sampling_ratio": 2, "aligned": True}
        pooled = [roi_align(x, rois.to(x.dtype), **pool) for x in (inputs, targets)]
        return F.mse_loss(pooled[0].to(rois.dtype), pooled[1].to(rois.dtype))

    def whole(function=whole_loss, dtype=torch.float32) -> tuple[Tensor, Tensor]:
        leaf = denoised.detach().to(dtype).requires_grad_()
        return gradient(function(leaf, normal_dose.to(dtype)), leaf)

    def in_half_precision(function) -> tuple[Tensor, Tensor]:
        extractor.to(memory_format=torch.channels_last)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = function()
        extractor.to(memory_format=torch.contiguous_format)
        return result

    loss.double()
    rois = rois.double()
    expected = whole(dtype=torch.float64)
    loss.float()
    rois = rois.float()
    compiled = torch.compile(whole_loss)
    return {
        "ours": ours,
        "ours, bf16": lambda: in_half_precision(ours),
        "whole image": whole,
        "compiled": lambda: whole(compiled),
        "bf16, channels_last": lambda: in_half_precision(whole),
    }, expected


@pytest.mark.parametrize(("name", "layer", "stride"), LAYERS)
def test_exact(race, name, layer, stride):
    torch.compiler.reset()
    runs, expected = contestants(name, layer, stride)
    peers = ("whole image", "compiled", "bf16, channels_last")
    # Rounding flips a few ReLUs and maxima of pools, the more the deeper the layer, and each changes the gradient.
    tolerance = dict.fromkeys((OURS, *peers), 1e-2) | {"bf16, channels_last": 0.5}
    race(
        "ROIPerceptualLoss, forward and backward",
        f"{IMAGES}x1x{SIDE}x{SIDE}, {name} {layer}",
        "float32",
        ours=runs["ours"],
        peers={peer: runs[peer] for peer in peers},
        expected=expected,
        tolerance=tolerance,
    )


@pytest.mark.parametrize(("name", "layer", "stride"), LAYERS)
def test_half_precision(race, name, layer, stride):
    runs, expected = contestants(name, layer, stride)
    race(
        "ROIPerceptualLoss in half precision",
        f"{IMAGES}x1x{SIDE}x{SIDE}, {name} {layer}",
        "bf16, channels_last",
        ours=runs["ours, bf16"],
        peers={"bf16, channels_last": runs["bf16, channels_last"]},
        expected=expected,
        tolerance=0.5,
    )
