"""Feature extractors of the detectors: images to dictionaries of feature maps, finest first.

A channel is a slice: the one that is looked at, and with a context its neighbours on both sides.
"""

from collections import OrderedDict
from typing import ClassVar

import torch
from torch import Tensor, nn
from torchvision.models import resnet
from torchvision.ops import FeaturePyramidNetwork

from lidnet_fast.errors import InputError


class Backbone(nn.Module):
    """A feature extractor with what a detector has to know of it.

    Attributes:
        strides: pixels per cell of every feature level, finest first; the levels are named "0", "1", ...
        out_channels: channels of every level.
    """

    strides: ClassVar[tuple[int, ...]]
    out_channels: ClassVar[int]


class ResNetFPN(Backbone):
    """ResNet up to its third stage with a feature pyramid on strides 4, 8 and 16 (P2 to P4), 256 channels each.

    Lesions in CT slices are 5 to 45 pixels wide: the coarser stages of the usual P2-P6 pyramid would find nothing, so
    they aren't built. BatchNorm is the ordinary trainable one, since the default is to train from scratch.

    The first convolution's kernels are the sums of the RGB kernels of `weights`, which equals showing the network the
    same grey image three times at a third of the memory. With a context every slice gets an equal share of them, so
    that equal slices give what one gives (as Carreira and Zisserman inflate kernels, arXiv:1705.07750).

    Args:
        name: "resnet18", "resnet34" or "resnet50".
        weights: name of torchvision weights ("IMAGENET1K_V1", "DEFAULT"), downloaded by torchvision if it doesn't have
            them yet; None initialises at random and touches no network.
        context: neighbouring slices on each side.
    """

    strides = (4, 8, 16)
    out_channels = 256

    def __init__(self, name: str, weights: str | None = None, *, context: int = 0) -> None:
        super().__init__()
        factory = getattr(resnet, name)
        try:
            body = factory(weights=weights)
        except KeyError as error:
            known = ", ".join(w.name for w in getattr(resnet, f"ResNet{name.removeprefix('resnet')}_Weights"))
            raise InputError(f"{name} has no weights {weights!r}; torchvision knows {known}") from error
        rgb = body.conv1
        slices = 2 * context + 1
        self.conv1 = nn.Conv2d(slices, rgb.out_channels, 7, stride=2, padding=3, bias=False)
        with torch.no_grad():
            self.conv1.weight.copy_(rgb.weight.sum(dim=1, keepdim=True) / slices)
        self.bn1, self.relu, self.maxpool = body.bn1, body.relu, body.maxpool
        self.layer1, self.layer2, self.layer3 = body.layer1, body.layer2, body.layer3
        widths = [body.inplanes // 8 * 2**stage for stage in range(3)]
        self.fpn = FeaturePyramidNetwork(widths, self.out_channels)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Feature maps "0", "1", "2" of images [N, C, H, W]."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        p2 = self.layer1(x)
        p3 = self.layer2(p2)
        p4 = self.layer3(p3)
        return self.fpn(OrderedDict([("0", p2), ("1", p3), ("2", p4)]))


def _conv_bn_relu(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


class SmallFPN(Backbone):
    """A small convolutional backbone with a feature pyramid on strides 4, 8 and 16, for CPUs.

    Seven 3x3 convolutions with BatchNorm (16 to 96 channels) and a 48-channel pyramid: 0.25 M parameters.

    Args:
        context: neighbouring slices on each side.
    """

    strides = (4, 8, 16)
    out_channels = 48

    def __init__(self, *, context: int = 0) -> None:
        super().__init__()
        first = _conv_bn_relu(2 * context + 1, 16, 2)
        self.stage1 = nn.Sequential(first, _conv_bn_relu(16, 32, 2), _conv_bn_relu(32, 32))
        self.stage2 = nn.Sequential(_conv_bn_relu(32, 64, 2), _conv_bn_relu(64, 64))
        self.stage3 = nn.Sequential(_conv_bn_relu(64, 96, 2), _conv_bn_relu(96, 96))
        self.fpn = FeaturePyramidNetwork([32, 64, 96], self.out_channels)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Feature maps "0", "1", "2" of images [N, C, H, W]."""
        p2 = self.stage1(images)
        p3 = self.stage2(p2)
        p4 = self.stage3(p3)
        return self.fpn(OrderedDict([("0", p2), ("1", p3), ("2", p4)]))


class _DilatedBlock(nn.Module):
    """Pre-activation residual block of two dilated 3x3 convolutions with GroupNorm and SiLU."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(8, channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=dilation, dilation=dilation),
            nn.GroupNorm(8, channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=dilation, dilation=dilation),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class DilatedBackbone(Backbone):
    """One stride-4 feature map from dilated residual blocks: the independent judge's backbone.

    Deliberately unlike the other backbones (7x7 stem, GroupNorm, SiLU, dilation instead of coarser levels, no pyramid),
    so that a denoiser which merely pleases its training detector isn't rewarded by the judge.

    Args:
        context: neighbouring slices on each side.
    """

    strides = (4,)
    out_channels = 48

    def __init__(self, *, context: int = 0) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(2 * context + 1, 24, 7, stride=2, padding=3),
            nn.GroupNorm(6, 24),
            nn.SiLU(),
            nn.Conv2d(24, 48, 3, stride=2, padding=1),
            _DilatedBlock(48, 1),
            _DilatedBlock(48, 2),
            _DilatedBlock(48, 4),
            nn.GroupNorm(8, 48),
            nn.SiLU(),
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """The feature map "0" of images [N, C, H, W]."""
        return {"0": self.body(images)}
