import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torchvision.models.feature_extraction import get_graph_node_names

from lidnet_fast import ROIPerceptualLoss
from lidnet_fast.extractors import LayerExtractor
from lidnet_fast.extractors.layers import layer_names, spatial_scale
from lidnet_fast.extractors.networks import outline_network


def small_network():
    """conv, BatchNorm, ReLU in place, pooling, conv, ReLU in place; three channels in."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 5, 3, padding=1),
        nn.ReLU(inplace=True),
    )


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = small_network()
        self.head = nn.Linear(5, 2)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


def test_features_are_the_networks_own():
    network = Nested().eval()
    images = torch.rand(2, 3, 8, 10)
    features = LayerExtractor(network, ["body.4", "body.0", "body"])(images)
    assert list(features) == ["body.4", "body.0", "body"]
    # Before the in-place ReLUs, and behind them.
    assert torch.allclose(features["body.0"], network.body[0](images))
    assert torch.allclose(features["body.4"], network.body[:5](images))
    assert torch.allclose(features["body"], network.body(images))


def test_layers_before_an_in_place_activation_keep_their_values():
    network = small_network().eval()
    images = torch.rand(1, 3, 8, 8)
    features = LayerExtractor(network, ["1", "2"])(images)
    assert (features["1"] < 0).any()
    assert torch.equal(features["1"].relu(), features["2"])
    assert network[2].inplace


def test_the_copy_is_frozen_and_the_network_untouched():
    network = small_network().train()
    extractor = LayerExtractor(network, ["2"]).train()
    images = torch.rand(2, 3, 8, 8, requires_grad=True)
    before = extractor(images)["2"]
    with torch.no_grad():
        network[0].weight.zero_()
    assert torch.equal(extractor(images)["2"], before)
    assert not any(module.training for module in extractor.modules())
    assert not any(parameter.requires_grad for parameter in extractor.parameters())
    assert network.training
    assert network[0].weight.requires_grad
    before.sum().backward()
    assert images.grad.abs().sum() > 0


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda extractor: pickle.loads(pickle.dumps(extractor))])
def test_duplicates_stay_in_evaluation_mode(duplicate):
    extractor = LayerExtractor(Nested().train(), ["body.1", "body.2"])
    images = torch.rand(2, 3, 8, 8)
    twin = duplicate(extractor)
    assert not any(module.training for module in twin.modules())
    assert torch.equal(twin(images)["body.2"], extractor(images)["body.2"])
    twin.load_state_dict(extractor.state_dict())


def test_one_channel_is_repeated_and_normalised():
    network = small_network().eval()
    mean, std = (0.4, 0.5, 0.6), (0.1, 0.2, 0.3)
    images = torch.rand(2, 1, 8, 8)
    features = LayerExtractor(network, ["0"], mean=mean, std=std)(images)["0"]
    normalised = (images.repeat(1, 3, 1, 1) - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert torch.allclose(features, network[0](normalised), atol=1e-6)


@pytest.mark.parametrize(
    ("feature_size", "image_size", "scale"),
    [
        ((32, 64), (128, 256), 1 / 4),
        ((8, 8), (136, 136), 1 / 16),  # not 1 / 17
        ((9, 9), (135, 135), 1 / 16),  # not 1 / 15
        ((65, 33), (129, 65), 1 / 2),  # rounded up, as padded convolutions do
        ((64, 37), (129, 75), 1 / 2),  # rounded down, as pooling does
        ((58, 60), (64, 66), 1.0),  # valid padding
        ((128, 64), (64, 32), 2.0),
    ],
)
def test_spatial_scale(feature_size, image_size, scale):
    assert spatial_scale(feature_size, image_size) == scale


def test_spatial_scale_must_be_the_same_on_both_axes():
    with pytest.raises(ValueError, match="one scale along all axes, got 32 x 16 features of 64 x 64 images"):
        spatial_scale((32, 16), (64, 64))


def test_layer_names_hold_nodes_and_modules():
    names = layer_names(Nested())
    assert {"x", "body", "body.0", "body.5", "mean", "head"} <= set(names)
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "googlenet", "densenet121", "shufflenet_v2_x1_0"])
def test_layers_have_torchvisions_names(name):
    network = outline_network(name)
    names = get_graph_node_names(network, suppress_diff_warning=True)[1]
    assert set(names) <= set(layer_names(network))


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("vgg19", ["0"]), TypeError, "extractor must be a torch.nn.Module, got str"),
        ((Branching(), ["x"]), ValueError, "extractor Branching can't be traced by torch.fx"),
        ((Nested(), []), ValueError, "layers must name at least one layer"),
        ((Nested(), ["body.44"]), ValueError, r"has no layer 'body.44'; near it are body.4"),
        ((Nested(), ["zzzzzzzz"]), ValueError, r"has no layer 'zzzzzzzz'; there are x, body"),
    ],
)
def test_bad_construction(arguments, error, message):
    with pytest.raises(error, match=message):
        LayerExtractor(*arguments)


@pytest.mark.parametrize(
    ("network", "images", "accepted"),
    [
        (torch.float32, torch.float32, torch.float32),
        (torch.float32, torch.float16, torch.float32),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.float64, torch.float32, torch.float64),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    ],
)
def test_shorter_dtypes_are_converted_to_the_networks(network, images, accepted):
    extractor = LayerExtractor(small_network(), ["4"], mean=[0.5] * 3).to(network)
    values = torch.rand(1, 1, 8, 8).to(images).requires_grad_()
    features = extractor(values)["4"]
    assert features.dtype == accepted
    assert torch.equal(features, extractor(values.to(accepted))["4"])
    features.sum().backward()
    assert values.grad.dtype == images


@pytest.mark.parametrize(
    ("network", "images"),
    [(torch.float32, torch.float64), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.float16)],
)
def test_longer_dtypes_are_refused(network, images):
    extractor = LayerExtractor(small_network(), ["4"]).to(network)
    message = f"images must be of the extractor's dtype, {network}, .* got {images}. To fix: "
    with pytest.raises(TypeError, match=message):
        extractor(torch.rand(1, 1, 8, 8).to(images))


@pytest.mark.parametrize("images", [torch.float32, torch.bfloat16, torch.float16])
def test_autocast_converts_by_its_own_rules(images):
    extractor = LayerExtractor(small_network(), ["4"])
    with torch.autocast("cpu", torch.bfloat16):
        assert extractor(torch.rand(1, 1, 8, 8).to(images))["4"].dtype == torch.bfloat16
        with pytest.raises(TypeError, match=r"got torch\.float64"):
            extractor(torch.rand(1, 1, 8, 8).double())
        assert extractor.double()(torch.rand(1, 1, 8, 8).to(images))["4"].dtype == torch.float64


def test_weights_that_hooks_compute_are_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and in use
        network = nn.Sequential(nn.utils.weight_norm(nn.Conv2d(1, 2, 3)))
    with pytest.raises(ValueError, match=r"extractor Sequential can't be copied .* To fix: weights that hooks compute"):
        LayerExtractor(network, ["0"])


def test_bad_normalisation():
    with pytest.raises(ValueError, match="mean must have one value per channel of the extractor, 3, got 1"):
        LayerExtractor(small_network(), ["0"], mean=[0.5])
    with pytest.raises(ValueError, match="std must be above 0"):
        LayerExtractor(small_network(), ["0"], std=[1.0, 0.0, 1.0])


def test_bad_images():
    with pytest.raises(ValueError, match="images must have 1 or 3 channels, got 2"):
        LayerExtractor(small_network(), ["0"])(torch.zeros(1, 2, 8, 8))
    with pytest.raises(ValueError, match=r"images must have shape \[N, C, H, W\], got \(3, 8, 8\)"):
        LayerExtractor(small_network(), ["0"])(torch.zeros(3, 8, 8))
    with pytest.raises(ValueError, match=r"layer 'head' must give features \[N, C, h, w\], got shape \(1, 2\)"):
        LayerExtractor(Nested(), ["head"])(torch.zeros(1, 3, 8, 8))


class SamePadded(nn.Conv2d):
    """As segmentation-models-pytorch's EfficientNet has them: torch.fx sees the function, not the module."""

    def forward(self, x):
        return nn.functional.conv2d(nn.functional.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride)


def test_convolutions_with_a_forward_of_their_own_have_channels():
    network = nn.Sequential(SamePadded(3, 4, 2), nn.ReLU())
    image = torch.rand(1, 1, 8, 8)
    extractor = LayerExtractor(network, ["1"], mean="imagenet")
    assert extractor.channels == 3
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    assert torch.allclose(extractor(image)["1"], network((image.expand(-1, 3, -1, -1) - mean) / std))


# Encoders of other packages, at the levels that docs/extractors.md names: name, layer, whether windows will do.
ENCODERS = [
    ("timm", "resnet18", "layer1", True),
    ("timm", "convnext_atto", "stages.0", True),
    ("timm", "densenet121", "features.denseblock1", True),
    ("timm", "efficientnet_b0", "blocks.1", False),
    ("segmentation_models_pytorch", "resnet34", "layer1", True),
    ("segmentation_models_pytorch", "mobilenet_v2", "features.3", True),
    ("segmentation_models_pytorch", "efficientnet-b0", "_blocks.2", False),
]


@pytest.mark.parametrize(("package", "name", "layer", "in_windows"), ENCODERS, ids=lambda value: str(value))
def test_encoders_of_other_packages(package, name, layer, in_windows):
    other = pytest.importorskip(package, exc_type=ImportError)
    torch.manual_seed(0)
    network = other.create_model(name) if package == "timm" else other.encoders.get_encoder(name, weights=None)
    given = []
    network.eval().get_submodule(layer).register_forward_hook(lambda module, inputs, output: given.append(output))
    loss = ROIPerceptualLoss(network, layer, "auto")
    image = torch.rand(1, 1, 64, 96)
    with torch.no_grad():
        network(image.expand(-1, 3, -1, -1))
        assert torch.allclose(loss.extractor(image)[layer], given[-1], atol=1e-5)
    assert (loss.windows is not None) == in_windows


@pytest.mark.slow
def test_volumetric_encoders_of_monai():
    """Those that docs/extractors.md names: windows give what whole volumes give."""
    nets = pytest.importorskip("monai.networks.nets", exc_type=ImportError)
    torch.manual_seed(0)
    encoders = {
        "layer1": nets.resnet10(n_input_channels=1, feed_forward=False, bias_downsample=False),
        "features.denseblock1": nets.DenseNet121(spatial_dims=3, in_channels=1, out_channels=2),
        "down_layers.1": nets.SegResNet(spatial_dims=3, in_channels=1, norm="batch"),
    }
    denoised, normal_dose = torch.rand(2, 1, 1, 24, 48, 48)
    boxes = [torch.tensor([[20.0, 21, 8, 24, 26, 11]])]
    for layer, network in encoders.items():
        windows, whole = (ROIPerceptualLoss(network, layer, halo) for halo in ("exact", "whole"))
        assert torch.allclose(windows(denoised, normal_dose, boxes), whole(denoised, normal_dose, boxes), rtol=1e-4)
    with pytest.raises(ValueError, match="can't be traced"):
        ROIPerceptualLoss(nets.resnet18(n_input_channels=1, shortcut_type="A"), "layer1")
