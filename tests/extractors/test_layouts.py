"""Maps whose dimensions change places or number, in windows and on whole images."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lidnet_fast import ROIPerceptualLoss
from lidnet_fast.extractors import receptive_fields


class Between(nn.Module):
    """`function(self, x)` between two convolutions of stride 2 and padding."""

    def __init__(self, function, channels=8):
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3, stride=2, padding=1)
        self.last = nn.Conv2d(channels, 3, 3, padding=1)
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8)
        self.attend = nn.Softmax(dim=1)
        self.scale = nn.Parameter(torch.rand(8))
        for parameter in self.norm.parameters():
            nn.init.uniform_(parameter)
        self.function = function

    def forward(self, x):
        return self.last(self.function(self, self.first(x)))


def convnext(m, x):
    x = x.permute(0, 2, 3, 1)
    x = m.down(F.gelu(m.up(m.norm(x))))
    return m.scale.view(-1, 1, 1) * x.permute(0, 3, 1, 2) + x.permute((0, 3, 1, 2))


def functions(m, x):
    x = torch.permute(x, (0, 2, 3, 1))
    x = F.linear(F.layer_norm(x, (8,), m.norm.weight, m.norm.bias), m.up.weight, m.up.bias) * 0.5
    return torch.movedim(F.linear(x, m.down.weight), -1, 1) * 2


def other_order(m, x):
    return m.scale * x.transpose(1, 3).relu().contiguous()


def shuffled(m, x):
    n, c, h, w = x.size()
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


def shuffled_by_shape(m, x):
    shape = x.shape
    x = x.reshape(shape[0], -1, 2, shape[2], shape[3]).swapaxes(1, 2)
    return x.reshape(-1, x.size(1) * x.size(2), shape[2], shape[3])


def gated(m, x):
    first, second = x.chunk(2, dim=1)
    a, b, c = torch.split(first * second.sigmoid(), (1, 2, 1), 1)
    return torch.cat((c, b, a, second), 1)


def channels_last_pieces(m, x):
    value, gate = x.permute(0, 2, 3, 1).chunk(2, -1)
    return torch.cat((gate, value * gate), 3).permute(0, 3, 1, 2)


def over_channels(m, x):
    return m.attend(x) * F.softmax(x, 1) + x.softmax(dim=-3)


EXACT = {
    "ConvNeXt's block": convnext,
    "as functions": functions,
    "there and back": lambda m, x: other_order(m, x).transpose(1, 3),
    "channel shuffle": shuffled,
    "channel shuffle by shape": shuffled_by_shape,
    "pieces": gated,
    "pieces of channels that come last": channels_last_pieces,
    "softmax over channels": over_channels,
}


@pytest.mark.parametrize("name", EXACT)
def test_windows_are_exact(name):
    network = Between(EXACT[name]).double().eval()
    images = [torch.rand(2, 1, 61, 72, dtype=torch.float64) for _ in range(2)]
    boxes = [torch.tensor([[0.0, 0, 6, 5], [63, 50, 72, 61]]), torch.tensor([[30.0, 31, 38, 37]])]
    results = []
    for halo in ("exact", "whole"):
        loss = ROIPerceptualLoss(network, "last", halo, output_size=2, reduction="none")
        denoised = images[0].clone().requires_grad_()
        values = loss(denoised, images[1], boxes)
        results.append((values.detach(), *torch.autograd.grad(values, denoised, torch.tensor([1.0, -0.5, 2]))))
        if halo == "exact":
            assert loss.plan((61, 72), boxes).windows
    for values, expected in zip(*results, strict=True):
        assert (values - expected).norm() <= 1e-10 * expected.norm()


def test_volumes():
    class Volumes(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv3d(1, 4, 3, padding=1), nn.LayerNorm(4)

        def forward(self, x):
            return self.norm(self.conv(x).permute(0, 2, 3, 4, 1))

    boxes = [torch.tensor([[2.0, 3, 4, 6, 8, 9]])]
    pair = torch.rand(2, 1, 1, 20, 24, 28)
    values = [ROIPerceptualLoss(Volumes(), "norm", halo) for halo in ("exact", "whole")]
    values[1].load_state_dict(values[0].state_dict())
    assert values[0].plan((20, 24, 28), boxes).windows
    assert torch.allclose(values[0](*pair, boxes), values[1](*pair, boxes), rtol=1e-5)


REFUSED = {
    "rows and columns in one": (lambda m, x: x.flatten(2).unsqueeze(-1), "'flatten': flatten isn't known"),
    "a view of places": (lambda m, x: x.view(x.size(0), 8, -1, 1), "view doesn't keep batch and axes"),
    "places into channels": (lambda m, x: F.pixel_unshuffle(x, 1), "pixel_unshuffle isn't known"),
    "halves of the image": (lambda m, x: torch.cat(x.chunk(2, dim=2), 1), "chunk divides another dimension"),
    "all pieces": (lambda m, x: torch.stack(x.chunk(2, 1)).sum(0), "takes the pieces of a map together"),
    "a norm over places": (lambda m, x: F.layer_norm(x, x.shape[1:]), "the size of a map is used|normalises"),
    "a norm along rows": (lambda m, x: F.layer_norm(x, (36,)), "layer_norm normalises along axes of the image"),
    "a linear map along rows": (lambda m, x: F.linear(x, torch.ones(36, 36)), "is a linear map along an axis"),
    "orders mixed": (lambda m, x: x + x.transpose(2, 3), "joins maps whose dimensions are in another order"),
    "a convolution of rows": (
        lambda m, x: m.last(x.transpose(2, 3)),
        "isn't supported",
    ),
    "BatchNorm of rows": (lambda m, x: nn.functional.batch_norm(x.transpose(1, 3), None, None), "second dimension"),
    "a constant of one place": (lambda m, x: x + torch.rand(36), "ties it to one place"),
    "a size as a factor": (lambda m, x: x * x.size(3), "the size of a map is used"),
    "a computed size": (lambda m, x: x.view(x.size(0), 8, x.size(2) * 1, x.size(3)), "the size of a map is used"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_mixes_places_is_refused(name):
    function, message = REFUSED[name]
    with pytest.raises(ValueError, match=rf"layer 'last' has no finite receptive field: node .*({message})"):
        receptive_fields(Between(function).eval(), "last")
