import pytest
import torch
import torchvision

from lidnet_fast.extractors import LayerExtractor, layer_names, load_network
from lidnet_fast.extractors.networks import node_names, outline_network


def test_weights_from_a_file(tmp_path):
    torch.manual_seed(0)
    network = torchvision.models.resnet18()
    path = tmp_path / "resnet18.pt"
    torch.save(network.state_dict(), path)
    loaded = load_network("resnet18", path)
    assert not loaded.training
    assert torch.equal(loaded.conv1.weight, network.conv1.weight)
    assert torch.equal(load_network("resnet18", str(path)).fc.bias, network.fc.bias)
    with pytest.raises(ValueError, match=r"resnet18.pt doesn't hold weights of resnet34: "):
        load_network("resnet34", path)


def test_layers_of_vggs_have_the_papers_names():
    network = load_network("vgg19")
    assert node_names(network, ["conv1_1", "relu3_4", "pool5", "features.2"]) == [
        "features.0",
        "features.17",
        "features.36",
        "features.2",
    ]
    part = network.features[:19]
    assert node_names(part, ["conv1_1", "relu3_4"]) == ["0", "17"]
    assert node_names(network.features[5:19], ["relu3_4"]) == ["relu3_4"]  # where it begins can't be seen
    assert {"relu3_4", "17"} <= set(layer_names(part))
    assert {"relu3_4", "pool5", "features.17", "features"} <= set(layer_names(network))
    image = torch.rand(1, 1, 32, 32)
    of_part, of_whole = (LayerExtractor(net, ["relu3_4"])(image) for net in (part, network))
    assert list(of_part) == ["relu3_4"]
    assert torch.equal(of_part["relu3_4"], of_whole["relu3_4"])
    with_norm = load_network("vgg11_bn")
    assert node_names(with_norm, ["relu2_1"]) == ["features.6"]
    assert node_names(torchvision.models.resnet18(), ["layer1"]) == ["layer1"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("vgg20",), ValueError, "torchvision has no network 'vgg20'; near it are vgg11, vgg11_bn"),
        (("resnet18", "NEWEST"), ValueError, "resnet18 has no weights 'NEWEST'; it has IMAGENET1K_V1, or give a file"),
        (("resnet18", "weights/none.pt"), FileNotFoundError, "weights/none.pt"),
    ],
)
def test_bad_requests(arguments, error, message):
    with pytest.raises(error, match=message):
        load_network(*arguments)


def test_an_outline_checks_the_weights_and_has_no_values(tmp_path, recwarn):
    path = tmp_path / "resnet18.pt"
    torch.save(torchvision.models.resnet18().state_dict(), path)
    for weights in (None, "DEFAULT", path):
        assert {tensor.device.type for tensor in outline_network("resnet18", weights).state_dict().values()} == {"meta"}
    assert not recwarn
    with pytest.raises(ValueError, match=r"resnet18.pt doesn't hold weights of resnet34: "):
        outline_network("resnet34", path)


def test_networks_that_compute_with_tensors_have_an_outline():
    network = outline_network("regnet_x_400mf")
    assert {tensor.device.type for tensor in network.state_dict().values()} == {"meta"}
