"""Torchvision's networks, three layers of each, against forward hooks on the unmodified network in float64."""

import pytest
import torch

from lidnet_fast import ROIPerceptualLoss
from lidnet_fast.extractors import LayerExtractor
from tests.extractors.networks import hooked
from tests.extractors.zoo import DOCUMENT, LAYERS, random_network, receptive_field, rows

# One of each kind; the others take longer.
FAST = ("resnet18", "googlenet", "shufflenet_v2_x1_0", "mobilenet_v3_large", "squeezenet1_1")
NETWORKS = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in LAYERS]


@pytest.mark.parametrize("name", NETWORKS)
def test_features_are_those_of_the_unmodified_network(name):
    network = random_network(name).double()
    sides = (224, 224) if name == "maxvit_t" else (128, 160)  # it takes one size only
    images = torch.rand(1, 3, *sides, dtype=torch.float64)
    expected = hooked(network, images, LAYERS[name])
    features = LayerExtractor(network, LAYERS[name])(images)
    for layer in LAYERS[name]:
        wanted = expected[layer]
        if name == "swin_t":  # whose channels come last
            wanted = wanted.permute(0, 3, 1, 2)
        assert features[layer].shape == wanted.shape, layer
        assert (features[layer] - wanted).norm() <= 1e-12 * wanted.norm(), layer


@pytest.mark.parametrize("name", NETWORKS)
def test_windows_are_exact(name):
    """Values and gradients, of a box at a corner and one at the opposite edges."""
    network = random_network(name).double()
    extractor = LayerExtractor(network, LAYERS[name])
    for layer in LAYERS[name]:
        field = receptive_field(extractor, layer)
        if isinstance(field, str):
            with pytest.raises(ValueError, match=r"has no finite receptive field: .* computes whole images"):
                ROIPerceptualLoss(network, layer)
            continue
        stride = int(field.stride[0])
        side = max(field.size[0] + 9 * stride + 3, 64)
        images = [torch.rand(1, 3, side, side + stride, dtype=torch.float64) for _ in range(2)]
        boxes = [torch.tensor([[0.0, 0, 6, 5], [side - 7, side - 8, side + stride, side]])]
        results = []
        for halo in ("exact", "whole"):
            loss = ROIPerceptualLoss(network, layer, halo, output_size=2, reduction="none").double()
            denoised = images[0].clone().requires_grad_()
            values = loss(denoised, images[1], boxes)
            results.append((values.detach(), *torch.autograd.grad(values, denoised, torch.tensor([1.0, -0.7]))))
            if halo == "exact":
                assert loss.plan(images[0].shape[2:], boxes).windows, layer
        for values, expected in zip(*results, strict=True):
            assert (values - expected).norm() <= 1e-10 * expected.norm(), layer


@pytest.mark.parametrize("name", NETWORKS)
def test_the_table_is_current(name):
    lines = [line for line in DOCUMENT.read_text().split("\n") if line.startswith(f"| {name} |")]
    assert lines == rows(name), "To fix: python -m tests.extractors.zoo --write"


def test_the_table_holds_all_networks():
    found = [line.split(" | ")[0][2:] for line in DOCUMENT.read_text().split("\n") if line.startswith("| ")]
    assert list(dict.fromkeys(found)) == ["network", "---", *LAYERS]
