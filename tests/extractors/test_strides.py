"""Pixels per cell of a layer, whatever the images' sizes."""

import pytest
import torch
import torchvision
from torch import nn

from lidnet_fast import ROIPerceptualLoss, roi_perceptual_loss
from lidnet_fast.extractors import LayerExtractor, receptive_fields
from tests.extractors.networks import networks

NETWORKS = networks()


class Attentive(nn.Module):
    """Cells weighted by a mean over the image: no finite receptive field, and a stride all the same."""

    def __init__(self, stride):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, stride, stride=stride)

    def forward(self, x):
        x = self.conv(x)
        return x * x.mean((2, 3), keepdim=True)


def halving(step, times):
    return nn.Sequential(*(step() for _ in range(times)))


FAMILIES = {
    "rounded up": lambda times: halving(lambda: nn.Conv2d(1, 1, 3, stride=2, padding=1), times),
    "rounded down": lambda times: halving(lambda: nn.MaxPool2d(2), times),
    "ceil_mode": lambda times: halving(lambda: nn.AvgPool2d(2, ceil_mode=True), times),
    "at once": lambda times: nn.Sequential(nn.Conv2d(1, 1, 2**times, stride=2**times)),
    "no finite field": lambda times: Attentive(2**times),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stride", [8, 16, 32])
def test_whole_images_have_the_layers_stride_at_every_size(family, stride):
    torch.manual_seed(0)
    network = FAMILIES[family](stride.bit_length() - 1).eval()
    layer = "mul" if family == "no finite field" else str(len(network) - 1)
    loss = ROIPerceptualLoss(network, layer, "auto" if family == "no finite field" else "whole", output_size=2)
    assert loss.extractor.strides == {layer: (stride, stride)}
    for side in sorted({*range(2 * stride, 513, 5), 136, 255, 272, 511}):
        pair = torch.rand(2, 1, 1, side, side)
        box = side * torch.tensor([[0.2, 0.3, 0.7, 0.8]])
        features = [network(image) for image in pair]
        expected = roi_perceptual_loss(features[0], features[1].detach(), [box], 2, 1 / stride)
        assert torch.allclose(loss(*pair, [box]), expected, rtol=1e-5), side


@pytest.mark.parametrize("name", NETWORKS)
def test_shapes_and_graphs_give_the_same_strides(name):
    network, layers = NETWORKS[name]
    fields = receptive_fields(network, layers)
    assert LayerExtractor(network, layers).strides == {layer: fields[layer].stride for layer in layers}


def test_strides_that_are_no_powers_of_two():
    network = nn.Sequential(nn.Conv2d(1, 1, 3, stride=3), nn.Conv2d(1, 1, 5, stride=5), nn.Upsample(scale_factor=2))
    strides = LayerExtractor(network, ["0", "1", "2"]).strides
    assert {layer: float(stride[0]) for layer, stride in strides.items()} == {"0": 3, "1": 15, "2": 7.5}


def test_networks_of_one_size_fall_back_to_powers_of_two():
    class OneSize(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 4, stride=4)
            self.place = nn.Parameter(torch.rand(1, 1, 16, 16))

        def forward(self, x):
            return self.conv(x) + self.place

    loss = ROIPerceptualLoss(OneSize(), "add", "whole")
    assert loss.extractor.strides == {"add": None}
    pair, box = torch.rand(2, 1, 1, 66, 66), [torch.tensor([[20.0, 22, 40, 43]])]
    features = [loss.extractor(image)["add"] for image in pair]
    assert torch.allclose(loss(*pair, box), roi_perceptual_loss(*features, box, 7, 1 / 4))


@pytest.mark.parametrize("halo", ["exact", "auto", "whole"])
def test_strides_that_differ_are_refused(halo):
    network = nn.Sequential(nn.Conv2d(1, 2, 3, stride=(1, 2), padding=1))
    with pytest.raises(ValueError, match="layer '0' has strides 1 x 2; they must be the same"):
        ROIPerceptualLoss(network, "0", halo)


def test_layers_whose_channels_come_last_have_them_moved_to_the_front():
    network = torchvision.models.swin_t(weights=None).eval()
    images = torch.rand(1, 3, 96, 64)
    for layer, stride in (("features.0", 4), ("features.1", 4), ("features.3", 8)):
        extractor = LayerExtractor(network, [layer])
        assert extractor.strides == {layer: (stride, stride)}
        with torch.no_grad():
            expected = network.features[: int(layer[-1]) + 1](images)
        assert torch.equal(extractor(images)[layer], expected.permute(0, 3, 1, 2))
