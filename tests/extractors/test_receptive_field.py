import pytest
import torch
import torchvision
from torch import nn

from lidnet_fast.extractors import LayerExtractor, receptive_fields
from tests.extractors.networks import UNet, networks

NETWORKS = networks()


@pytest.mark.parametrize("name", NETWORKS)
def test_a_pixel_reaches_the_cells_that_say_so_and_no_others(name):
    """Pixels are perturbed one by one: outside of its field no cell moves, and the field's ends do reach it."""
    network, layers = NETWORKS[name]
    extractor = LayerExtractor(network, layers)
    sides = (20,) * 3 if extractor.dimensions == 3 else (56, 60)
    fields = receptive_fields(network, layers)
    torch.manual_seed(1)
    image = torch.rand(1, 1, *sides, dtype=torch.float64)
    before = extractor(image)
    for axis, side in enumerate(sides):
        seen = {layer: {"first": [], "last": []} for layer in layers}
        for pixel in range(side // 2 - 4, side // 2 + 4):
            moved = image.clone()
            moved.movedim(2 + axis, 0)[pixel] += 3 * torch.rand(1, 1, *[n for a, n in enumerate(sides) if a != axis])
            after = extractor(moved)
            for layer, field in fields.items():
                other = [d for d in range(before[layer].ndim) if d != 2 + axis]
                changed = (before[layer] != after[layer]).sum(other).nonzero().flatten().tolist()
                stride = field.stride[axis]
                first = [cell * stride - field.before[axis] for cell in changed]
                last = [(cell + 1) * stride - 1 + field.after[axis] for cell in changed]
                assert all(low <= pixel for low in first), (layer, pixel, changed)
                assert all(pixel < high + 1 for high in last), (layer, pixel, changed)
                seen[layer]["first"] += [pixel - low for low in first]
                seen[layer]["last"] += [high - pixel for high in last]
        for layer in layers:
            # Some pixel is the very first, some the very last of a cell's field (one off where cells are interpolated).
            assert min(seen[layer]["first"]) <= (2 if "u-net" in name else 0)
            assert min(seen[layer]["last"]) <= (2 if "u-net" in name else 0)


def test_fields_of_known_networks():
    """relu3_4 of VGG19: 48 pixels, as by hand; layer1 and layer2 of ResNet-18: 43 and 99 (Araujo et al., 2019)."""
    fields = receptive_fields(torchvision.models.vgg19(), ["features.3", "features.17", "features.26"])
    assert {name: field.size for name, field in fields.items()} == {
        "features.3": (5, 5),
        "features.17": (48, 48),
        "features.26": (116, 116),
    }
    assert fields["features.17"].stride == (4, 4)
    assert fields["features.17"].alignment == (4, 4)
    assert fields["features.17"].before == fields["features.17"].after == (22, 22)
    fields = receptive_fields(torchvision.models.resnet18().eval(), ["layer1", "layer2"])
    assert (fields["layer1"].size, fields["layer2"].size) == ((43, 43), (99, 99))
    assert (fields["layer1"].before, fields["layer1"].after) == ((21, 21), (18, 18))


def test_blocks_of_torchvision_are_looked_into():
    models = torchvision.models
    detector = models.detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    for network, layer in (
        (models.mobilenet_v2(), "features.4"),
        (detector.backbone, "body.layer1"),
        (models.video.r3d_18(), "stem"),
        (models.googlenet(init_weights=False), "inception3a"),
        (models.densenet121(), "features.transition1"),
    ):
        assert receptive_fields(network.eval(), layer)[layer].size


class Uses(nn.Module):
    """A module of one expression."""

    def __init__(self, function, **modules):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3, padding=1)
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.function(self, self.conv(x)) * 1.0


POINTS_AT = {
    "global pooling": (nn.Sequential(nn.Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(1)), "1", "AdaptiveAvgPool2d pools over"),
    "mean": (Uses(lambda m, x: x - x.mean((2, 3), keepdim=True)), "mul", "node 'mean': mean pools over"),
    "group norm": (nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4)), "1", "GroupNorm normalises over the whole"),
    "instance norm": (nn.Sequential(nn.InstanceNorm2d(1)), "0", "InstanceNorm2d normalises over the whole image"),
    "statistics": (nn.Sequential(nn.BatchNorm2d(1, track_running_stats=False)), "0", "without running statistics"),
    "circular": (nn.Sequential(nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular")), "0", "circular padding"),
    "transposed": (
        nn.Sequential(nn.ConvTranspose2d(1, 2, 2, 2)),
        "0",
        "ConvTranspose2d isn't supported; upsampling by",
    ),
    "to a size": (Uses(lambda m, x: nn.functional.interpolate(x, size=(8, 8))), "mul", "resizes to a given size"),
    "by a half": (nn.Sequential(nn.Upsample(scale_factor=0.5)), "0", "resizes by 0.5; whole factors"),
    "corners": (
        nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)),
        "0",
        "align_corners=True",
    ),
    "from the end": (Uses(lambda m, x: x[..., -8:]), "mul", "from a place that depends on the image's size"),
    "position": (
        Uses(lambda m, x: x + m.place, place=nn.Parameter(torch.zeros(1, 2, 8, 8))),
        "mul",
        "ties it to one place",
    ),
    "shape": (Uses(lambda m, x: x.view(x.shape[0], 2, -1)), "mul", "view doesn't keep batch and axes"),
    "computed sizes": (Uses(lambda m, x: x * x.shape[2]), "mul", "the size of a map is used"),
    "softmax": (Uses(lambda m, x: x.softmax(-1)), "mul", "softmax mixes places far apart"),
    "along rows": (Uses(lambda m, x: torch.cat((x, x), 2)), "mul", "another dimension than channels"),
    "indices": (nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten()), "1", "node '_1' .1.: Flatten isn't known"),
}


@pytest.mark.parametrize("name", POINTS_AT)
def test_what_has_no_finite_field_is_named(name):
    network, layer, message = POINTS_AT[name]
    with pytest.raises(ValueError, match=rf"layer '{layer}' has no finite receptive field: .*{message}"):
        receptive_fields(network.eval(), layer)


def test_bad_requests():
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU())
    with pytest.raises(
        ValueError, match="'1' is BatchNorm in training mode, which depends on the whole batch; call eval"
    ):
        receptive_fields(network.train(), "2")
    with pytest.raises(ValueError, match="has no layer '11'; near it are 1"):
        receptive_fields(network.eval(), "11")
    with pytest.raises(TypeError, match=r"extractor must be a torch.nn.Module, got str"):
        receptive_fields("vgg19", "relu3_4")


def test_maps_of_different_strides_cannot_be_joined():
    class Joined(UNet):
        def forward(self, x):
            return self.enter(x) + self.down(self.enter(x)).mean(1, keepdim=True)[:, :1]

    class Strides(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.pool = nn.Conv2d(1, 2, 1), nn.MaxPool2d(2)

        def forward(self, x):
            x = self.conv(x)
            return x + self.pool(x)

    with pytest.raises(ValueError, match="node 'add' joins maps of different strides: 'conv' 1 x 1, 'pool' 2 x 2"):
        receptive_fields(Strides(), "add")
    with pytest.raises(ValueError, match="node 'mean'"):
        receptive_fields(Joined(), "add")
