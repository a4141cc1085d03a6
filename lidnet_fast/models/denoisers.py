"""Denoisers: networks from a windowed low-dose slice to a windowed denoised slice, [N, 1, H, W] -> [N, 1, H, W].

With a context of k they also see the k slices on each side, [N, 2 k + 1, H, W] -> [N, 1, H, W].
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lidnet_fast.errors import InputError
from lidnet_fast.models.registry import (
    at_least,
    construct,
    first_line,
    import_module_class,
    is_import_path,
    unknown_name,
)


class REDCNN(nn.Module):
    """RED-CNN, the residual encoder-decoder of Chen et al., "Low-Dose CT with a Residual Encoder-Decoder Convolutional
    Neural Network", IEEE TMI 2017 (arXiv:1702.00288).

    Five valid 5x5 convolutions and five 5x5 transposed convolutions, a ReLU after each; the input and the outputs of
    the second and fourth convolution are added on the way up. The last ReLU is the paper's: the output is never
    negative, so nothing below the window's lower end survives.

    Args:
        channels: filters per layer (the paper's 96).
        context: neighbouring slices on each side that it sees.
    """

    _KERNEL = 5
    _DEPTH = 5
    #: Valid convolutions take 4 pixels each; at least one has to remain.
    MIN_SIZE = (_KERNEL - 1) * _DEPTH + 1

    def __init__(self, channels: int = 96, *, context: int = 0) -> None:
        super().__init__()
        at_least("denoiser 'redcnn'", 1, channels=channels)
        self.context = context
        widths = [channels] * self._DEPTH
        self.encoder = nn.ModuleList(nn.Conv2d(i, o, self._KERNEL) for i, o in pairwise([2 * context + 1, *widths]))
        self.decoder = nn.ModuleList(nn.ConvTranspose2d(i, o, self._KERNEL) for i, o in pairwise([*widths, 1]))

    def forward(self, images: Tensor) -> Tensor:
        """Denoise windowed images [N, 2 context + 1, H, W] with H, W >= 21 (ValueError otherwise)."""
        if min(images.shape[-2:]) < self.MIN_SIZE:
            size = "x".join(map(str, images.shape[-2:]))
            raise ValueError(f"RED-CNN needs images of at least {self.MIN_SIZE}x{self.MIN_SIZE} pixels, got {size}")
        x = images
        skips = []
        for index, layer in enumerate(self.encoder):
            if index % 2 == 0:
                skips.append(_own(x, self.context) if index == 0 else x)
            x = F.relu(layer(x))
        for index, layer in enumerate(self.decoder):
            x = layer(x)
            if index % 2 == 0:
                x = x + skips.pop()
            x = F.relu(x)
        return x


class _ResidualBlock(nn.Module):
    """x + conv(relu(conv(x))), without normalisation: intensities carry meaning here."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.relu(self.first(x)))


class ResidualUNet(nn.Module):
    """A U-Net of residual blocks that predicts the correction to its input.

    Follows DRUNet (Zhang et al., "Plug-and-Play Image Restoration with Deep Denoiser Prior", arXiv:2008.13751):
    residual blocks without normalisation, strided 2x2 convolutions down, transposed ones up, skips added. The last
    layer starts at zero, so that an untrained network is the identity. Any image size: the input is padded by edge
    replication to a multiple of 2**(levels-1) and the result cropped.

    Args:
        channels: channels at full resolution; they double at every level.
        levels: resolutions, the full one included.
        blocks: residual blocks per level and direction.
        context: neighbouring slices on each side that it sees.
    """

    def __init__(self, channels: int = 32, levels: int = 4, blocks: int = 2, *, context: int = 0) -> None:
        super().__init__()
        at_least("denoiser 'unet'", 1, channels=channels, levels=levels, blocks=blocks)
        widths = [channels * 2**level for level in range(levels)]
        self.context, self.multiple = context, 2 ** (levels - 1)
        self.head = nn.Conv2d(2 * context + 1, channels, 3, padding=1)
        self.encoder = nn.ModuleList(self._stage(width, blocks) for width in widths[:-1])
        self.down = nn.ModuleList(nn.Conv2d(fine, coarse, 2, stride=2) for fine, coarse in pairwise(widths))
        self.body = self._stage(widths[-1], blocks)
        self.up = nn.ModuleList(nn.ConvTranspose2d(coarse, fine, 2, stride=2) for fine, coarse in pairwise(widths))
        self.decoder = nn.ModuleList(self._stage(width, blocks) for width in widths[:-1])
        self.tail = nn.Conv2d(channels, 1, 3, padding=1)
        _zero(self.tail)

    @staticmethod
    def _stage(channels: int, blocks: int) -> nn.Sequential:
        return nn.Sequential(*(_ResidualBlock(channels) for _ in range(blocks)))

    def forward(self, images: Tensor) -> Tensor:
        """Denoise windowed images [N, 2 context + 1, H, W] of any size."""
        height, width = images.shape[-2:]
        padded = F.pad(images, (0, -width % self.multiple, 0, -height % self.multiple), mode="replicate")
        x = self.head(padded)
        skips = []
        for stage, down in zip(self.encoder, self.down, strict=True):
            x = stage(x)
            skips.append(x)
            x = down(x)
        x = self.body(x)
        for stage, up in zip(reversed(self.decoder), reversed(self.up), strict=True):
            x = stage(up(x) + skips.pop())
        return _own(images, self.context) + self.tail(x)[..., :height, :width]


class SmallCNN(nn.Module):
    """A plain residual denoiser for CPUs: `layers` 3x3 convolutions, ReLU between, added to the input.

    The last layer starts at zero, so that an untrained network is the identity.

    Args:
        channels: channels of the hidden layers.
        layers: convolutions, at least 2.
        context: neighbouring slices on each side that it sees.
    """

    def __init__(self, channels: int = 32, layers: int = 5, *, context: int = 0) -> None:
        super().__init__()
        at_least("denoiser 'small'", 1, channels=channels)
        at_least("denoiser 'small'", 2, layers=layers)
        self.context = context
        widths = [2 * context + 1] + [channels] * (layers - 1)
        stack: list[nn.Module] = []
        for i, o in pairwise(widths):
            stack += [nn.Conv2d(i, o, 3, padding=1), nn.ReLU(inplace=True)]
        last = nn.Conv2d(channels, 1, 3, padding=1)
        _zero(last)
        self.body = nn.Sequential(*stack, last)

    def forward(self, images: Tensor) -> Tensor:
        """Denoise windowed images [N, 2 context + 1, H, W] of any size."""
        return _own(images, self.context) + self.body(images)


def _own(images: Tensor, context: int) -> Tensor:
    """The slice that is denoised, among its neighbours; without reading shapes, which torch.fx doesn't know."""
    return images[:, context : context + 1] if context else images


def _zero(layer: nn.Conv2d) -> None:
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


#: Denoisers by name.
DENOISERS: dict[str, type[nn.Module]] = {"redcnn": REDCNN, "unet": ResidualUNet, "small": SmallCNN}

_PROBE_SIZE = 64


def build_denoiser(name: str, *, context: int = 0, **options: Any) -> nn.Module:
    """Make a denoiser: an `nn.Module` from windowed images [N, 2 context + 1, H, W] to windowed images [N, 1, H, W].

    Args:
        name: one of `DENOISERS`, or the import path of any `nn.Module` class that maps images so, as
            "package.module:ClassName" or "package.module.ClassName". A class by path is tried on a 64x64 image.
        context: neighbouring slices that it sees on each side of the one that it denoises. A class by path isn't told:
            its options have to make it take that many channels.
        options: the class's own keyword arguments.

    Raises:
        InputError: unknown name, failed import, options the class doesn't take, or a class that changes the shape.
    """
    if name in DENOISERS:
        return construct("denoiser", name, DENOISERS[name], {**options, "context": context} if context else options)
    if not is_import_path(name):
        raise unknown_name("denoiser", name, DENOISERS, ", or an import path 'package.module:ClassName'")
    model = construct("denoiser", name, import_module_class("denoiser", name), options)
    _probe(name, model, 2 * context + 1)
    return model


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """A network as it is used, not trained: what it sees changes no statistics."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _probe(name: str, model: nn.Module, slices: int) -> None:
    """Check on one small image that a user's network takes so many slices, and gives one of their size."""
    shape, wanted = (1, slices, _PROBE_SIZE, _PROBE_SIZE), (1, 1, _PROBE_SIZE, _PROBE_SIZE)
    try:
        with torch.no_grad(), evaluated(model):
            output = model(torch.zeros(shape))
    except Exception as error:
        message = f"denoiser {name!r} failed on an input of shape {list(shape)}: {first_line(error)}"
        raise InputError(message) from error
    if not isinstance(output, Tensor) or output.shape != wanted:
        got = f"shape {list(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise InputError(f"denoiser {name!r} must map {list(shape)} to shape {list(wanted)}, got {got}")
