"""Features and losses in windows are those of whole images."""

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from lidnet_fast import ROIPerceptualLoss
from lidnet_fast.extractors import LayerExtractor
from lidnet_fast.extractors.windowed import WindowedExtractor
from lidnet_fast.functional import roi_perceptual_loss
from tests.extractors.networks import networks

NETWORKS = networks()
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def boxes_of(sides, scale=1.0):
    """At corners, on edges, overlapping, one pixel wide, reaching outside, far from others: two images."""
    height, width = sides[-2:]
    first = [[0, 0, 6, 5], [width / 2, 0, width / 2 + 7, 4], [width - 5, height - 6.5, width, height], [30, 31, 31, 47]]
    second = [[40.3, 30.2, 48, 37], [44, 33, 52.5, 41], [-8, height / 2, 3, height / 2 + 4], [20, 20, 20, 20]]
    return [torch.tensor(part, dtype=torch.float64) for part in (first, second)]


def whole(extractor, denoised, normal_dose, boxes, strides, **options):
    """The loss of each box from features of whole images."""
    inputs, targets = extractor(denoised), extractor(normal_dose)
    return sum(
        roi_perceptual_loss(
            inputs[layer], targets[layer].detach(), boxes, spatial_scale=1 / stride, reduction="none", **options
        )
        for layer, stride in strides.items()
    )


def check(network, strides, sides, boxes, *, channels=1, dtype=torch.float64, tolerance=1e-10, images=2, **options):
    """Losses, and gradients for a random upstream gradient, against whole images; returns the plan."""
    torch.manual_seed(0)
    normalisation = {name: options.pop(name) for name in ("mean", "std") if name in options}
    loss = ROIPerceptualLoss(network, list(strides), reduction="none", **normalisation, **options).to(dtype)
    extractor = LayerExtractor(network, list(loss.layer_weights), **normalisation).to(dtype)
    denoised, normal_dose = (torch.rand(images, channels, *sides, dtype=dtype) for _ in range(2))
    denoised.requires_grad_()
    losses = loss(denoised, normal_dose, boxes)
    upstream = torch.randn(losses.shape, dtype=dtype)
    (gradient,) = torch.autograd.grad(losses, denoised, upstream)
    named = dict(zip(loss.layer_weights, strides.values(), strict=True))
    pooling = {
        name: options[name] for name in ("output_size", "sampling_ratio", "aligned", "criterion") if name in options
    }
    expected = whole(extractor, denoised, normal_dose, boxes, named, **pooling)
    (expected_gradient,) = torch.autograd.grad(expected, denoised, upstream)
    assert (losses - expected).norm() <= tolerance * expected.norm()
    assert (gradient - expected_gradient).norm() <= tolerance * expected_gradient.norm()
    return loss.plan(sides, boxes)


STRIDES = {
    "plain": {"0": 1, "2": 1},
    "even kernels": {"1": 2},
    "pooling": {"1": 2, "3": 4},
    "ceil_mode": {"3": 4},
    "uncounted ceil_mode": {"1": 2},
    "divisor": {"1": 2},
    "reflect": {"2": 2},
    "replicate": {"1": 2},
    "padding modules": {"2": 1},
    "anisotropic": {"2": 2},
    "residual": {"relu_1": 4},
    "inception": {"cat_1": 1},
    "u-net": {"down": 2, "leave": 1},
    "u-net, nearest": {"leave": 1},
    "cropping": {"last": 1},
    "functions": {"interpolate": 1},
}


@pytest.mark.parametrize(
    ("name", "sides"),
    # The U-Net itself needs multiples of four.
    [(n, sides) for n in STRIDES for sides in ((96, 104), (97, 103)) if sides[0] % 4 == 0 or not n.startswith("u-net")],
)
def test_every_operation_on_windows_is_exact(name, sides):
    network, _ = NETWORKS[name]
    plan = check(network, STRIDES[name], sides, boxes_of(sides))
    assert plan.windows, plan
    kinds = {kind[0] for window in plan.windows for kind in window.kind}
    # Two of them end with what pads at the first edge only.
    assert kinds >= ({"inside", "first"} if name in ("divisor", "padding modules") else {"inside", "first", "last"})


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", STRIDES)
def test_random_boxes_on_random_images(name, seed):
    """Images down to where no window fits, boxes on and beyond their edges, some without an area."""
    generator = np.random.default_rng(seed)
    sides = tuple(
        (4 * generator.integers(10, 30, 2)).tolist() if "u-net" in name else generator.integers(30, 120, 2).tolist()
    )
    boxes = []
    for count in generator.integers(0, 8, 2):
        low = generator.uniform(-15, np.array(sides[::-1]) + 10, (count, 2))
        high = low + generator.uniform(0, 25, (count, 2)) * generator.integers(0, 2, (count, 1))
        boxes.append(torch.from_numpy(np.hstack((low, high))))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # boxes may lie outside
        check(NETWORKS[name][0], STRIDES[name], sides, boxes, output_size=2)


def test_volumes_are_exact():
    network, _ = NETWORKS["volumes"]
    boxes = [
        torch.tensor([[0.0, 0, 0, 5, 4, 6], [20, 22, 10, 24, 26.5, 15]]),
        torch.tensor([[30.0, 20, 27, 40, 28, 36]]),
    ]
    plan = check(network, {"1": 1, "3": 2}, (36, 40, 44), boxes, output_size=3)
    assert plan.windows
    assert plan.relative_cost < 0.5


VGGS = {
    "vgg16": ["relu1_2", "relu2_2", "relu3_3", "relu4_3"],
    "vgg19": ["relu1_1", "relu2_1", "relu3_4", "relu4_1", "relu4_4"],
}


QUICK = [("vgg16", "relu3_3"), ("vgg19", "relu2_1")]


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        pytest.param(name, layer, marks=[] if (name, layer) in QUICK else pytest.mark.slow)
        for name, layers in VGGS.items()
        for layer in layers
    ],
)
def test_vgg_is_exact(name, layer):
    network = getattr(torchvision.models, name)()
    stride = 2 ** (int(layer[4]) - 1)
    sides = (152, 136) if stride < 8 else (280, 264)
    plan = check(network, {layer: stride}, sides, boxes_of(sides), output_size=3, mean=MEAN, std=STD)
    assert plan.windows


@pytest.mark.parametrize(
    ("name", "layers"),
    [("resnet18", {"layer1": 4}), ("resnet18", {"layer1": 4, "layer2": 8}), ("resnet50", {"layer2": 8})],
)
def test_resnet_is_exact(name, layers):
    network = getattr(torchvision.models, name)()
    for module in network.modules():  # else BatchNorm is the identity
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
    sides = (296, 301)
    assert check(network, layers, sides, boxes_of(sides), output_size=3, mean=MEAN, std=STD).windows


def test_three_channels_and_float32():
    network = torchvision.models.vgg16().features[:9]
    options = {"channels": 3, "mean": MEAN, "std": STD}
    check(network, {"8": 2}, (96, 96), boxes_of((96, 96)), **options)
    check(network, {"8": 2}, (96, 96), boxes_of((96, 96)), dtype=torch.float32, tolerance=1e-5, **options)


@pytest.mark.parametrize(
    "options", [{"aligned": False}, {"sampling_ratio": -1}, {"criterion": "l1", "output_size": (2, 5)}]
)
def test_options_of_pooling(options):
    check(NETWORKS["pooling"][0], {"3": 4}, (96, 104), boxes_of((96, 104)), **options)


def test_networks_that_cannot_be_folded():
    """A first operation that isn't a plain convolution gets normalised images."""
    torch.manual_seed(0)
    for first in (
        nn.MaxPool2d(2),
        nn.Conv2d(3, 6, 3, padding=1, groups=3),
        nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect"),
    ):
        channels = 3 if isinstance(first, nn.MaxPool2d) else 6
        network = nn.Sequential(first, nn.ReLU(), nn.Conv2d(channels, 4, 3, padding=1))
        stride = 2 if isinstance(first, nn.MaxPool2d) else 1
        check(network, {"2": stride}, (64, 64), boxes_of((64, 64)), mean=MEAN, std=STD)


def test_strides_that_are_no_power_of_two_shift_boxes_exactly():
    network = nn.Sequential(nn.Conv2d(1, 3, 7, stride=7), nn.ReLU(), nn.Conv2d(3, 4, 3, padding=1))
    sides = (203, 217)
    assert check(network, {"2": 7}, sides, boxes_of(sides), tolerance=1e-12).windows


def test_boxes_larger_than_the_image_fall_back_to_it():
    boxes = [torch.tensor([[-10.0, -10, 120, 130]]), torch.tensor([[30.0, 30, 36, 36]])]
    plan = check(NETWORKS["pooling"][0], {"3": 4}, (96, 104), boxes)
    assert list(plan.whole) == [0]
    assert len(plan.windows) == 1


def test_an_image_as_small_as_the_receptive_field():
    check(NETWORKS["residual"][0], {"relu_1": 4}, (24, 30), [torch.tensor([[3.0, 4, 9, 8]])] * 2)


def test_images_of_different_sizes():
    network = NETWORKS["pooling"][0]
    loss = ROIPerceptualLoss(network, "3", reduction="sum").double()
    sizes, boxes = [(96, 104), (80, 90), (96, 104), (64, 64)], [*boxes_of((96, 104)), *boxes_of((80, 90))]
    boxes[1], boxes[3] = boxes[3], torch.zeros(0, 4)
    images = [[torch.rand(1, *size, dtype=torch.float64) for size in sizes] for _ in range(2)]
    weights = torch.rand(sum(map(len, boxes)))
    value = loss(*images, boxes, weights)
    parts, start = [], 0
    for image, target, of_image in zip(*images, boxes, strict=True):
        parts.append(loss(image[None], target[None], [of_image], weights[start : start + len(of_image)]))
        start += len(of_image)
    assert torch.allclose(value, torch.stack(parts).sum())
    with pytest.raises(ValueError, match="lists of images need as many normal-dose images and Tensors of boxes"):
        loss(images[0], images[1][:3], boxes)
    with pytest.raises(ValueError, match=r"normal_dose\[0\] must have the shape of denoised\[0\], .* got \(1, 1, 64"):
        loss(images[0], images[1][::-1], boxes)
    with pytest.raises(TypeError, match=r"denoised\[0\] must be a Tensor, got str"):
        loss(["image"], images[1][:1], boxes[:1])
    with pytest.raises(TypeError, match="denoised must be a Tensor, got str"):
        loss("image", images[1][0], boxes[:1])


def test_images_without_boxes_cost_nothing():
    """Not even their pixels are looked at."""
    network = NETWORKS["pooling"][0]
    loss = ROIPerceptualLoss(network, "3").double()
    images = torch.rand(3, 1, 96, 104, dtype=torch.float64)
    images[[0, 2]] = torch.nan
    images.requires_grad_()
    value = loss(images, torch.rand_like(images), [torch.zeros(0, 4), boxes_of((96, 104))[0], torch.zeros(0, 4)])
    value.backward()
    assert value.isfinite()
    assert not images.grad[[0, 2]].any()
    assert images.grad[1].any()


class Pooled(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, padding=1)

    def forward(self, x):
        x = self.conv(x)
        return x * x.mean((2, 3), keepdim=True)


def test_layers_without_a_finite_field_are_refused_or_computed_whole():
    with pytest.raises(
        ValueError, match=r'node .mean.: mean pools over .* choose a layer before it .halo="auto" computes'
    ):
        ROIPerceptualLoss(Pooled(), "mul")
    network, images = Pooled(), [torch.rand(2, 1, 32, 32) for _ in range(2)]
    boxes = [torch.zeros(0, 4), torch.tensor([[3.0, 4, 9, 8]])]
    loss = ROIPerceptualLoss(network, "mul", "auto")
    assert "mean pools over" in loss.plan((32, 32), boxes).whole[1]
    features = [network(image[1:]) for image in images]
    assert torch.allclose(loss(*images, boxes), roi_perceptual_loss(features[0], features[1].detach(), boxes[1:]))


@pytest.mark.parametrize("halo", ["exact", "whole"])
def test_synchronised_batch_norm_is_batch_norm(halo):
    network = torchvision.models.resnet18()
    for module in network.modules():  # else BatchNorm is the identity
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
    images = [torch.rand(1, 1, 128, 128, dtype=torch.float64) for _ in range(2)]
    boxes = [torch.tensor([[50.0, 52, 62, 63]])]
    loss = ROIPerceptualLoss(network, "layer1", halo, output_size=3).double()
    expected = loss(*images, boxes)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(nn.ModuleList([loss]))[0]
    assert any(isinstance(module, nn.SyncBatchNorm) for module in converted.modules())
    for twin in (
        converted,
        converted.to(torch.float64),
        copy.deepcopy(converted),
        pickle.loads(pickle.dumps(converted)),
    ):
        assert torch.allclose(twin(*images, boxes), expected, rtol=1e-12)
    of_converted = ROIPerceptualLoss(nn.SyncBatchNorm.convert_sync_batchnorm(network), "layer1", halo, output_size=3)
    assert torch.allclose(of_converted.double()(*images, boxes), expected, rtol=1e-12)


def test_duplicates_and_moves_keep_working():
    network = torchvision.models.resnet18()
    loss = ROIPerceptualLoss(network, "layer1", mean=MEAN, std=STD, output_size=3)
    images = [torch.rand(1, 1, 128, 128) for _ in range(2)]
    boxes = [torch.tensor([[50.0, 52, 62, 63]])]
    value = loss(*images, boxes)
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert torch.equal(twin(*images, boxes), value)
        twin.load_state_dict(loss.state_dict())
        doubled = twin.double()(*(image.double() for image in images), boxes)
        assert doubled.dtype == torch.float64
        assert torch.allclose(doubled, value.double(), rtol=1e-4)
    assert not any(name.startswith("windows") for name in loss.state_dict())


def test_new_weights_are_used_at_once():
    network = NETWORKS["pooling"][0]
    loss = ROIPerceptualLoss(network, "3").double()
    images = [torch.rand(1, 1, 96, 96, dtype=torch.float64) for _ in range(2)]
    boxes = [torch.tensor([[50.0, 52, 62, 63]])]
    value = loss(*images, boxes)
    state = {name: 2 * tensor for name, tensor in loss.state_dict().items()}
    loss.load_state_dict(state)
    assert not torch.allclose(loss(*images, boxes), value)


def test_normal_dose_features_are_cached(caplog):
    caplog.set_level("DEBUG", logger="lidnet_fast.losses")
    loss = ROIPerceptualLoss(NETWORKS["pooling"][0], ["1", "3"], cache_mib=1, reduction="none").double()
    sides = (96, 104)
    boxes = boxes_of(sides)
    denoised, normal_dose = (torch.rand(2, 1, *sides, dtype=torch.float64) for _ in range(2))
    expected = loss(denoised, normal_dose, boxes)
    assert len(loss.cache) == 0
    assert torch.equal(loss(denoised, normal_dose, boxes, sample_ids=["a", "b"]), expected)
    windows = len(loss.plan(sides, boxes).windows)
    assert (len(loss.cache), loss.cache.hits, loss.cache.misses) == (windows, 0, windows)
    # The other way round, and with normal doses that must not be looked at.
    swapped = loss(denoised.flip(0), torch.full_like(denoised, torch.nan), boxes[::-1], sample_ids=["b", "a"])
    assert torch.allclose(swapped, torch.cat((expected[len(boxes[0]) :], expected[: len(boxes[0])])), rtol=1e-12)
    assert loss.cache.hit_rate == 0.5
    assert "windows kept" in caplog.text and "hit rate 50.0 %" in caplog.text
    fresh = loss(denoised, normal_dose, boxes, sample_ids=["a", "c"])
    assert torch.allclose(fresh, expected, rtol=1e-12)
    with pytest.raises(ValueError, match="sample_ids must have one for each image, 2, got 1"):
        loss(denoised, normal_dose, boxes, sample_ids=["a"])


def test_windows_are_computed_one_by_one_for_the_cache(monkeypatch):
    """How a batch rounds depends on its size, which would depend on what is kept."""
    loss = ROIPerceptualLoss(NETWORKS["pooling"][0], "3", cache_mib=1).double()
    normal_dose, denoised = torch.rand(2, 2, 1, 96, 104, dtype=torch.float64)
    boxes = [torch.tensor([[50.0, 52, 62, 63]])] * 2  # windows of one kind
    features, computed = WindowedExtractor.features, []

    def counted(self, images, batch):
        if images is normal_dose:
            computed.append(len(batch.corners))
        return features(self, images, batch)

    monkeypatch.setattr(WindowedExtractor, "features", counted)
    loss(denoised, normal_dose, boxes, sample_ids=["a", "b"])
    assert computed == [1, 1]
    loss(denoised, normal_dose, boxes, sample_ids=["c", "b"])
    assert computed == [1, 1, 1]


def test_the_cache_keeps_to_its_bytes_and_to_its_weights():
    loss = ROIPerceptualLoss(NETWORKS["pooling"][0], "3", cache_mib=3000 / 2**20).double()
    image = torch.rand(1, 1, 96, 96, dtype=torch.float64)
    for number in range(20):
        place = 30.0 + number
        loss(image, image, [torch.tensor([[place, place, place + 8, place + 8]])], sample_ids=[number])
        assert 0 < loss.cache.bytes <= 3000
    assert 0 < len(loss.cache) < 20
    box = [torch.tensor([[49.0, 49, 57, 57]])]
    assert loss(image, image, box, sample_ids=[19]) == 0
    assert loss.cache.hits == 1
    with torch.no_grad():
        loss.extractor.network.get_parameter("0.weight").add_(1.0)
    assert loss(image, image, box, sample_ids=[19]) == 0
    assert loss.cache.hits == 1


@pytest.mark.slow
def test_compiled_networks_give_the_same():
    network = NETWORKS["pooling"][0]
    images = [torch.rand(2, 1, 96, 104, dtype=torch.float64) for _ in range(2)]
    boxes = [torch.tensor([[50.0, 52, 62, 63]]), torch.tensor([[20.0, 22, 31, 33], [70, 70, 81, 82]])]
    gradients, values = [], []
    for compiled in (False, True):
        loss = ROIPerceptualLoss(network, "3", compiled=compiled).double()
        images[0].grad = None
        values.append(loss(images[0].requires_grad_(), images[1], boxes))
        values[-1].backward()
        gradients.append(images[0].grad)
    assert torch.allclose(*values, rtol=1e-10)
    assert torch.allclose(*gradients, rtol=1e-8, atol=1e-14)


def test_kinds_of_windows_share_one_network():
    extractor = LayerExtractor(NETWORKS["pooling"][0], ["3"]).double()
    windowed = WindowedExtractor(extractor)
    planner = windowed.planner((200, 200))
    boxes = torch.tensor([[0, 60.0, 60, 70, 70], [0, 120, 60, 130, 70], [1, 100, 100, 110, 110]]).numpy()
    plan = planner.plan(boxes, 2)
    images = torch.empty(2, 1, 200, 200)
    ((numbers, batch),) = windowed.batches(plan, images)
    assert numbers == [0, 1, 2]
    assert batch.corners[:, 0].tolist() == [0, 0, 1]
    again = windowed.batches(plan, images)[0][1]
    assert again.network is batch.network
