import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lidnet_fast.errors import InputError
from lidnet_fast.models import DENOISERS, build_denoiser


class TwiceAsLarge(nn.Module):
    def forward(self, x):
        return F.interpolate(x, scale_factor=2)


class Scale(nn.Module):
    def __init__(self, factor=2.0):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))
        self.norm = nn.BatchNorm2d(1)

    def forward(self, x):
        return self.norm(x) * self.factor


class ThreeChannels(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 1, 1)

    def forward(self, x):
        return self.conv(x)


class Pair(nn.Module):
    def forward(self, x):
        return x, x


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.setitem(sys.modules, "user_networks", sys.modules[__name__])


SMALLEST = {"redcnn": {"channels": 4}, "unet": {"channels": 4}, "small": {"channels": 4}}


@pytest.mark.parametrize("size", [(21, 21), (32, 32), (37, 50), (64, 23)])
@pytest.mark.parametrize("name", DENOISERS)
def test_shape_is_kept_for_any_size(name, size):
    torch.manual_seed(0)
    x = torch.rand(2, 1, *size)
    assert build_denoiser(name, **SMALLEST[name])(x).shape == x.shape


@pytest.mark.parametrize("size", [(1, 1), (5, 7)])
@pytest.mark.parametrize("name", ["unet", "small"])
def test_tiny_images(name, size):
    x = torch.rand(1, 1, *size)
    assert build_denoiser(name, **SMALLEST[name])(x).shape == x.shape


@pytest.mark.parametrize("name", DENOISERS)
def test_every_parameter_learns(name):
    """After one step (the last layers start at zero) every parameter gets a gradient."""
    torch.manual_seed(0)
    model = build_denoiser(name, **SMALLEST[name])
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    x, y = torch.rand(2, 1, 40, 40), torch.rand(2, 1, 40, 40)
    for _ in range(2):
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()
    silent = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not silent


@pytest.mark.parametrize("name", ["unet", "small"])
def test_untrained_residual_networks_are_the_identity(name):
    x = torch.randn(1, 1, 33, 35)
    assert torch.equal(build_denoiser(name)(x), x)


def test_unet_result_does_not_depend_on_padding_in_the_middle():
    """A 40x40 image and the same image continued agree where neither sees the other's edge."""
    torch.manual_seed(0)
    model = build_denoiser("unet", channels=4, levels=2, blocks=1)
    nn.init.normal_(model.tail.weight)
    wide = torch.rand(1, 1, 40, 81)
    torch.testing.assert_close(model(wide[..., :41])[..., :20], model(wide)[..., :20])


def test_redcnn_is_the_papers():
    """Layer by layer against the paper's figure: ten 5x5 layers of 96 filters, three shortcuts."""
    torch.manual_seed(0)
    model = build_denoiser("redcnn").double()
    weights = [p for p in model.parameters() if p.dim() == 4]
    assert len(weights) == 10 and all(w.shape[-2:] == (5, 5) for w in weights)
    assert sum(p.numel() for p in model.parameters()) == 2 * 96 * 25 + 96 + 1 + 8 * (96 * 96 * 25 + 96)

    x = torch.rand(1, 1, 30, 30, dtype=torch.float64)
    w, b = [p for p in model.parameters() if p.dim() == 4], [p for p in model.parameters() if p.dim() == 1]
    conv = [x]
    for k in range(5):
        conv.append(F.relu(F.conv2d(conv[-1], w[k], b[k])))
    y = F.relu(F.conv_transpose2d(conv[5], w[5], b[5]) + conv[4])
    y = F.relu(F.conv_transpose2d(y, w[6], b[6]))
    y = F.relu(F.conv_transpose2d(y, w[7], b[7]) + conv[2])
    y = F.relu(F.conv_transpose2d(y, w[8], b[8]))
    y = F.relu(F.conv_transpose2d(y, w[9], b[9]) + x)
    torch.testing.assert_close(model(x), y)


def test_redcnn_refuses_images_smaller_than_its_valid_convolutions():
    with pytest.raises(ValueError, match="21x21 pixels, got 20x40"):
        build_denoiser("redcnn", channels=2)(torch.rand(1, 1, 20, 40))


@pytest.mark.parametrize("path", ["user_networks:Scale", "user_networks.Scale"])
def test_import_path(path):
    model = build_denoiser(path, factor=3.0)
    assert isinstance(model, Scale) and model.factor == 3.0
    assert model.training
    assert model.norm.num_batches_tracked == 0


def test_import_path_inside_a_package():
    assert type(build_denoiser("lidnet_fast.models.denoisers.SmallCNN")).__name__ == "SmallCNN"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("redcn", r"unknown denoiser 'redcn'; did you mean 'redcnn'\? Known: redcnn, unet, small, or an import path"),
        ("xyz", r"unknown denoiser 'xyz'. Known: redcnn, unet, small"),
        ("no_such_module:Net", "can't import module 'no_such_module'"),
        ("user_networks:Missing", "module 'user_networks' has no 'Missing'"),
        ("user_networks:sys", "'sys' isn't a torch.nn.Module class"),
        (":Net", "can't import module ''"),
        ("user_networks:", "has no ''"),
        (
            "user_networks:TwiceAsLarge",
            r"must map \[1, 1, 64, 64\] to shape \[1, 1, 64, 64\], got shape \[1, 1, 128, 128\]",
        ),
        ("user_networks:Pair", r"must map \[1, 1, 64, 64\] to shape \[1, 1, 64, 64\], got tuple"),
        ("user_networks:ThreeChannels", "'user_networks:ThreeChannels' failed on an input of shape"),
    ],
)
def test_bad_names(name, message):
    with pytest.raises(InputError, match=message) as error:
        build_denoiser(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["redcnn", "user_networks:Scale"])
def test_unknown_options_name_the_known_ones(name):
    with pytest.raises(InputError, match=r"got an unexpected keyword argument 'widht'; its options: (channels|factor)"):
        build_denoiser(name, widht=3)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("small", {"layers": 1}, "'small': layers must be at least 2, got 1"),
        ("small", {"channels": 0}, "'small': channels must be at least 1, got 0"),
        ("unet", {"levels": 0}, "'unet': levels must be at least 1, got 0"),
        ("redcnn", {"channels": -1}, "'redcnn': channels must be at least 1, got -1"),
        ("redcnn", {"channels": "many"}, r"'redcnn' can't be made with \{'channels': 'many'\}: "),
        ("user_networks:Scale", {"factor": "much"}, "'user_networks:Scale' can't be made with"),
    ],
)
def test_options_out_of_range(name, options, message):
    with pytest.raises(InputError, match=message) as error:
        build_denoiser(name, **options)
    assert "\n" not in str(error.value)
