"""What a network computes in place: its layers keep their values, and later ones see what was overwritten."""

import operator

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from lidnet_fast import ROIPerceptualLoss
from lidnet_fast.extractors import LayerExtractor
from tests.extractors.networks import hooked


class Uses(nn.Module):
    """conv, then `function(self, its result)`, then another conv."""

    def __init__(self, function, module=None):
        super().__init__()
        self.conv, self.last = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 3, 3, padding=1)
        self.module = module
        self.scale = nn.Parameter(torch.rand(1, 4, 1, 1))
        self.function = function

    def forward(self, x):
        return self.last(self.function(self, self.conv(x)))


def relu_of_the_map_itself(m, x):
    x.relu_()
    return x


def seen_under_another_name(m, x):
    same = x
    x += 1.0
    return same


def overwritten_twice(m, x):
    same = x
    x.mul_(2)
    F.relu(x, inplace=True)
    return same - 0.1


def before_an_addition(m, x):
    return m.module(x) + x  # both of them after the activation


def operator_in_place(m, x):
    same = x
    operator.imul(x, m.scale)
    return same


def with_a_number(m, x):
    height = x.shape[2]
    same = height
    height += 1
    return x * (height - same)


def through_a_view_that_is_not_read_again(m, x):
    return x.permute(0, 1, 3, 2).relu_().permute(0, 1, 3, 2)


REWRITTEN = {
    "F.relu": lambda m, x: F.relu(x, inplace=True),
    "F.relu, by position": lambda m, x: F.relu(x, True),
    "F.relu_": lambda m, x: F.relu_(x),
    "F.hardtanh_": lambda m, x: F.hardtanh_(x, -0.2, 0.2),
    "F.hardtanh, by position": lambda m, x: F.hardtanh(x, -0.2, 0.2, True),
    "F.elu_": lambda m, x: F.elu_(x, 0.5),
    "F.leaky_relu": lambda m, x: F.leaky_relu(x, 0.3, inplace=True),
    "F.silu": lambda m, x: F.silu(x, inplace=True),
    "torch.clamp_": lambda m, x: torch.clamp_(x, -0.1, 0.1),
    "relu_": lambda m, x: x.relu_(),
    "relu_, x again": relu_of_the_map_itself,
    "clamp_": lambda m, x: x.clamp_(min=-0.1),
    "sub_, div_": lambda m, x: x.sub_(0.1).div_(0.3),
    "+=, another name": seen_under_another_name,
    "twice": overwritten_twice,
    "operator.imul": operator_in_place,
    "a number": with_a_number,
    "a view": through_a_view_that_is_not_read_again,
}
MODULES = {
    "ReLU": nn.ReLU(inplace=True),
    "Hardswish": nn.Hardswish(inplace=True),
    "LeakyReLU": nn.LeakyReLU(0.2, inplace=True),
}


def check(network):
    network = network.double().eval()
    images = torch.rand(2, 1, 24, 28, dtype=torch.float64)
    layers = ["conv", "last"]
    expected = hooked(network, images, layers)
    original = images.clone()
    features = LayerExtractor(network, layers)(images)
    for layer in layers:
        assert torch.allclose(features[layer], expected[layer], rtol=1e-12, atol=1e-14), layer
    assert torch.equal(images, original)


@pytest.mark.parametrize("name", REWRITTEN)
def test_operations_in_place_are_rewritten(name):
    check(Uses(REWRITTEN[name]))


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("function", [lambda m, x: m.module(x), before_an_addition])
def test_modules_in_place_are_rewritten(name, function):
    check(Uses(function, MODULES[name]))


def test_the_images_are_left_alone():
    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 3)

        def forward(self, x):
            x -= 0.5
            return self.conv(x)

    network, images = Centred(), torch.rand(1, 1, 8, 8)
    original = images.clone()
    features = LayerExtractor(network, ["conv"])(images)["conv"]
    assert torch.equal(images, original)
    assert torch.allclose(features, network(images))


def test_a_modules_name_stands_for_what_it_returns():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 3)

        def forward(self, x):
            x = self.conv(x)
            x.relu_()
            return x

    network, images = nn.Sequential(Block(), nn.Conv2d(2, 1, 3)), torch.rand(1, 1, 9, 9)
    features = LayerExtractor(network, ["0", "0.conv"])(images)
    assert torch.equal(features["0.conv"], network[0].conv(images))
    assert torch.equal(features["0"], network[0](images))
    both = LayerExtractor(nn.Sequential(network), ["0", "0.1"])(images)
    assert torch.equal(both["0"], both["0.1"])


def the_base_of_a_view(m, x):
    x[:, :2].relu_()
    return x


def a_view_of_the_base(m, x):
    first = x[:, :4]
    x.relu_()
    return first


def into_an_output(m, x):
    y = x * 1.0
    torch.add(x, 1.0, out=y)
    return y


def a_parameter(m, x):
    return x * m.scale.clamp_(0, 0.5)


def by_an_operator_of_aten(m, x):
    torch.ops.aten.relu_(x)
    return x


REFUSED = {
    "base": (the_base_of_a_view, "'relu_' .relu_. changes 'getitem' in place, and others read it through a view"),
    "view": (a_view_of_the_base, "'relu_' .relu_. changes 'conv' in place, and others read it through a view"),
    "out": (into_an_output, "'add' .add. changes 'mul' in place, which can't be rewritten"),
    "copy_": (lambda m, x: x.copy_(x + 1), "'copy_' .copy_. changes 'conv' in place, which can't be rewritten"),
    "parameter": (a_parameter, "'clamp_' .clamp_. changes a parameter or buffer in place"),
    "aten": (by_an_operator_of_aten, "'relu_' .relu_. changes 'conv' in place, which can't be rewritten"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_rewritten_is_refused_by_name(name):
    function, message = REFUSED[name]
    with pytest.raises(ValueError, match=rf"extractor: node {message}.* To fix: "):
        LayerExtractor(Uses(function), ["last"])
    images = torch.rand(1, 1, 8, 8)
    network = Uses(function)
    assert torch.equal(LayerExtractor(network, ["conv"])(images)["conv"], network.conv(images))


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("googlenet", ["conv1.bn", "conv2.bn", "conv3", "inception3a"]),
        ("inception_v3", ["Conv2d_1a_3x3.bn", "Mixed_5b"]),
    ],
)
def test_torchvisions_networks(name, layers):
    torch.manual_seed(0)
    network = getattr(torchvision.models, name)(weights=None, init_weights=False).double().eval()
    images = torch.rand(1, 3, 96, 96, dtype=torch.float64)
    expected = hooked(network, images, layers)
    features = LayerExtractor(network, layers)(images)
    for layer in layers:
        assert torch.allclose(features[layer], expected[layer], rtol=1e-10), layer


def test_losses_of_layers_before_an_operation_in_place():
    """In windows and on whole images, the loss of the features before it."""
    network = Uses(lambda m, x: F.relu(x, inplace=True)).double()
    images = [torch.rand(1, 1, 96, 96, dtype=torch.float64) for _ in range(2)]
    boxes = [torch.tensor([[30.0, 40, 42, 50]])]
    values = [ROIPerceptualLoss(network, "conv", halo)(*images, boxes) for halo in ("exact", "whole")]
    expected = ROIPerceptualLoss(nn.Sequential(network.conv), "0", "whole")(*images, boxes)
    assert torch.allclose(torch.stack(values), expected, rtol=1e-10)
