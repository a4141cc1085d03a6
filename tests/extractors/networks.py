"""Networks with everything that a receptive field can be made of."""

import torch
from torch import nn
from torch.nn import functional as F


class Residual(nn.Module):
    """A sum of a strided and a dilated branch, as in a residual network, with evaluation BatchNorm."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 4, 7, stride=2, padding=3, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        self.dilated = nn.Conv2d(4, 6, 3, padding=2, dilation=2, groups=2)
        self.shortcut = nn.Conv2d(4, 6, 1)

    def forward(self, x):
        x = self.pool(self.norm(self.first(x)).relu())
        return F.relu(self.dilated(x) + self.shortcut(x))


class Inception(nn.Module):
    """Branches of different reach, concatenated."""

    def __init__(self):
        super().__init__()
        self.enter = nn.Conv2d(1, 1, 1)
        self.one = nn.Conv2d(2, 3, 1)
        self.wide = nn.Sequential(nn.Conv2d(2, 3, (1, 7), padding=(0, 3)), nn.Conv2d(3, 3, (5, 1), padding=(2, 0)))
        self.pool = nn.AvgPool2d(3, stride=1, padding=1)
        self.uncounted = nn.AvgPool2d(5, stride=1, padding=2, count_include_pad=False)

    def forward(self, x):
        x = torch.cat((x, self.enter(x)), 1)
        return torch.cat([self.one(x), self.wide(x), self.pool(x), self.uncounted(x)], dim=1)


class UNet(nn.Module):
    """A user's U-Net: an encoder of two levels, and up again by bilinear and nearest interpolation."""

    def __init__(self, mode="bilinear"):
        super().__init__()
        self.mode = mode
        self.enter = nn.Conv2d(1, 4, 3, padding=1)
        self.down = nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.deep = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.middle = nn.Conv2d(16, 8, 3, padding=1)
        self.leave = nn.Conv2d(12, 5, 3, padding=1)

    def forward(self, x):
        enter = F.leaky_relu(self.enter(x), 0.1)
        down = F.silu(self.down(enter))
        deep = torch.tanh(self.deep(down))
        up = F.interpolate(deep, scale_factor=2, mode=self.mode)
        middle = self.middle(torch.cat((up, down), 1))
        return self.leave(torch.cat((F.interpolate(middle, scale_factor=2, mode=self.mode), enter), 1))


class Cropping(nn.Module):
    """Convolutions without padding, and a shortcut that is cropped to them."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 3, 3)
        self.second = nn.Conv2d(3, 3, 3)
        self.last = nn.Conv2d(6, 4, 3, padding=1)

    def forward(self, x):
        first = self.first(x)
        second = self.second(first).abs()
        return self.last(torch.cat((first[:, :, 1:-1, 1:-1], second), 1))


class Functions(nn.Module):
    """The same operations as functions, with weights of the module's own."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(3, 1, 3, 3)), nn.Parameter(torch.randn(3))
        self.scale = nn.Parameter(torch.rand(1, 3, 1, 1))

    def forward(self, x):
        x = F.max_pool2d(F.relu(F.conv2d(x, self.weight, bias=self.bias, padding=1)) * self.scale, 2)
        x = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
        x = F.dropout(torch.max_pool2d(x, 3, stride=1, padding=1), 0.5, self.training)
        return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


def networks():
    """Name -> (network, layers, image sizes), in evaluation mode and with weights that let every path be seen."""
    torch.manual_seed(0)
    reflect = {"padding": 2, "padding_mode": "reflect"}
    replicate = {"padding": 1, "padding_mode": "replicate"}
    found = {
        "plain": (nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 4, 5, padding=2)), ["0", "2"]),
        "even kernels": (
            nn.Sequential(nn.Conv2d(1, 3, 4, stride=2, padding=1), nn.Conv2d(3, 4, 2, padding="same")),
            ["1"],
        ),
        "pooling": (
            nn.Sequential(
                nn.Conv2d(1, 3, 3, padding=1), nn.MaxPool2d(2), nn.AvgPool2d(3, 2), nn.Conv2d(3, 3, 3, padding=1)
            ),
            ["1", "3"],
        ),
        "ceil_mode": (
            nn.Sequential(
                *(nn.MaxPool2d(3, 2, ceil_mode=True), nn.Conv2d(1, 3, 3, padding=1)),
                *(nn.AvgPool2d(3, 2, padding=1, ceil_mode=True), nn.Conv2d(3, 3, 3, padding=1)),
            ),
            ["3"],
        ),
        "uncounted ceil_mode": (
            nn.Sequential(nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False), nn.Conv2d(1, 3, 3, padding=1)),
            ["1"],
        ),
        "divisor": (nn.Sequential(nn.AvgPool2d(3, 2, padding=1, divisor_override=5), nn.Conv2d(1, 2, 3)), ["1"]),
        "reflect": (
            nn.Sequential(nn.Conv2d(1, 3, 3, **reflect), nn.MaxPool2d(2), nn.Conv2d(3, 3, 5, **reflect)),
            ["2"],
        ),
        "replicate": (nn.Sequential(nn.Conv2d(1, 3, 3, **replicate), nn.Conv2d(3, 3, 3, stride=2, **replicate)), ["1"]),
        "padding modules": (
            nn.Sequential(nn.ReflectionPad2d((1, 2, 3, 0)), nn.Conv2d(1, 3, 3), nn.ConstantPad2d((2, 0, 0, -1), 0.7)),
            ["2"],
        ),
        "anisotropic": (
            nn.Sequential(
                nn.Conv2d(1, 3, (3, 5), padding=(1, 2)), nn.MaxPool2d((2, 2)), nn.Conv2d(3, 3, (5, 1), padding=(2, 0))
            ),
            ["2"],
        ),
        "residual": (Residual(), ["relu_1"]),
        "inception": (Inception(), ["cat_1"]),
        "u-net": (UNet(), ["down", "leave"]),
        "u-net, nearest": (UNet("nearest"), ["leave"]),
        "cropping": (Cropping(), ["last"]),
        "functions": (Functions(), ["interpolate"]),
        "volumes": (
            nn.Sequential(nn.Conv3d(1, 3, 3, padding=1), nn.ReLU(), nn.MaxPool3d(2), nn.Conv3d(3, 4, 3, padding=1)),
            ["1", "3"],
        ),
    }
    return {name: (network.double().eval(), layers) for name, (network, layers) in found.items()}


def hooked(network, images, layers):
    """Layer -> what its module gave on the unmodified network, before anything overwrote it."""
    features = {}
    handles = [
        network.get_submodule(layer).register_forward_hook(
            lambda module, args, result, layer=layer: features.__setitem__(layer, result.clone())
        )
        for layer in layers
    ]
    with torch.no_grad():
        network(images)
    for handle in handles:
        handle.remove()
    return features
