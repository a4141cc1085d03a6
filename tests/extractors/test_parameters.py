"""Windows compute with the parameters that the loss has when it is called, however it came by them."""

import copy
import pickle
from functools import partial

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from lidnet_fast import ROIPerceptualLoss, roi_windows
from lidnet_fast.extractors import FeatureCache

BOXES = [torch.tensor([[50.0, 52, 62, 63]]), torch.tensor([[0.0, 0, 11, 9], [80, 70, 96, 96]])]


class Network(nn.Module):
    """Convolutions as modules, with a bias and without, and as a function; BatchNorm and a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.pool = nn.MaxPool2d(2)
        self.second = nn.Conv2d(4, 5, 3, padding=1)
        self.scale = nn.Parameter(torch.rand(1, 5, 1, 1))
        self.kernel = nn.Parameter(torch.randn(6, 5, 3, 3))
        for values in (self.norm.weight, self.norm.bias, self.norm.running_mean):
            nn.init.uniform_(values)

    def forward(self, x):
        x = self.second(self.pool(self.norm(self.first(x)).relu())).relu() * self.scale
        return nn.functional.conv2d(x, self.kernel, None, 1, 1)


def losses():
    """The same loss in windows and on whole images."""
    torch.manual_seed(0)
    network = Network().eval()
    normalised = {"mean": (0.4, 0.5, 0.6), "std": (0.1, 0.2, 0.3)}
    return [
        ROIPerceptualLoss(network, "conv2d", halo, reduction="none", **normalised).double()
        for halo in ("exact", "whole")
    ]


def images():
    torch.manual_seed(1)
    return [torch.rand(2, 1, 96, 96, dtype=torch.float64) for _ in range(2)]


def other_state(loss):
    torch.manual_seed(2)
    return {
        name: torch.rand_like(tensor) if tensor.is_floating_point() else tensor
        for name, tensor in loss.state_dict().items()
    }


def assigned(loss):
    loss.load_state_dict(other_state(loss), assign=True)


def loaded(loss):
    loss.load_state_dict(other_state(loss))


def replaced(loss):
    network = loss.extractor.network
    for module, name in ((network.first, "weight"), (network.norm, "bias"), (network, "scale"), (network, "kernel")):
        setattr(module, name, nn.Parameter(2 * getattr(module, name).detach()))


def given_a_bias(loss):
    loss.extractor.network.first.bias = nn.Parameter(torch.arange(4, dtype=torch.float64))


def given_no_bias(loss):
    loss.extractor.network.second.bias = None


def given_data(loss):
    loss.extractor.network.second.weight.data = loss.extractor.network.second.weight.data.flip(0)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def parametrized(loss):
    for module, name in ((loss.extractor.network.first, "weight"), (loss.extractor.network, "kernel")):
        parametrize.register_parametrization(module, name, Doubled())


def weight_normed(loss):
    parametrizations.weight_norm(loss.extractor.network.second)
    with torch.no_grad():
        loss.extractor.network.second.parametrizations.weight.original0.mul_(3)


def with_another_module(loss):
    torch.manual_seed(3)
    loss.extractor.network.second = nn.Conv2d(4, 5, 3, padding=1).double()


def normalised_otherwise(loss):
    loss.extractor.mean = 0.1 * loss.extractor.mean
    loss.extractor.std = 2 * loss.extractor.std


def moved(loss):
    loss.bfloat16()
    loss.double()


CHANGES = (
    *(assigned, loaded, replaced, given_a_bias, given_no_bias, given_data, parametrized, weight_normed),
    *(with_another_module, normalised_otherwise, moved),
)


def check(windows, whole, before=None):
    assert windows.plan((96, 96), BOXES).windows
    values, expected = (loss(*images(), BOXES) for loss in (windows, whole))
    assert torch.allclose(values, expected, rtol=1e-10)
    if before is not None:
        assert not torch.allclose(values, before, rtol=1e-10)
    return values


@pytest.mark.parametrize("change", CHANGES)
def test_parameters_are_read_when_called(change):
    pair = losses()
    before = check(*pair)
    for loss in pair:
        change(loss)
    check(*pair, before)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda loss: pickle.loads(pickle.dumps(loss))])
@pytest.mark.parametrize("change", [assigned, replaced, moved])
def test_duplicates_read_parameters_of_their_own(change, duplicate):
    pair = losses()
    before = check(*pair)
    twins = [duplicate(loss) for loss in pair]
    for twin in twins:
        change(twin)
    check(*twins, before)
    assert torch.equal(check(*pair), before)


@pytest.mark.parametrize("change", [assigned, loaded, moved])
def test_buffers_are_read_when_called(change):
    """Of FrozenBatchNorm2d, which detectors' backbones are made of; what it computes from them isn't kept."""
    torch.manual_seed(0)
    norm = torchvision.ops.FrozenBatchNorm2d(4)
    for buffer in norm.buffers():
        nn.init.uniform_(buffer, 0.3, 1)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), norm, nn.ReLU(), nn.Conv2d(4, 3, 3))
    pair = [ROIPerceptualLoss(network, "3", halo, reduction="none").double() for halo in ("exact", "whole")]
    before = check(*pair)
    for loss in pair:
        change(loss)
    check(*pair, before)


def test_functional_call_and_its_gradients():
    windows, whole = losses()
    before = check(windows, whole)
    gradients = []
    for loss in (windows, whole):
        state = {
            name: 1.5 * tensor if tensor.is_floating_point() else tensor for name, tensor in loss.state_dict().items()
        }

        def value(denoised, loss=loss, state=state):
            return torch.func.functional_call(loss, state, (denoised, images()[1], BOXES))

        denoised = images()[0].requires_grad_()
        values = value(denoised)
        assert not torch.allclose(values, before, rtol=1e-10)
        gradients.append((values, *torch.autograd.grad(values.sum(), denoised)))
    for part, expected in zip(*gradients, strict=True):
        assert torch.allclose(part, expected, rtol=1e-8, atol=1e-14)
    assert torch.equal(check(windows, whole), before)


def test_compiled_networks_read_parameters_when_called(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    pair = losses()
    pair[0].windows.compiled = True
    before = check(*pair)
    for change in (assigned, replaced):
        for loss in pair:
            change(loss)
        before = check(*pair, before)


def test_cached_features_are_those_of_the_weights_of_the_call():
    """Weights that come and go, one set at the address of the one before."""
    cached, _ = losses()
    cached.cache = FeatureCache(1)
    expected, _ = losses()
    state = cached.state_dict()
    for factor in (1.0, 2.0, 3.0, 3.0):
        scaled = {name: factor * tensor if tensor.is_floating_point() else tensor for name, tensor in state.items()}
        arguments = (*images(), BOXES)
        values = torch.func.functional_call(cached, scaled, arguments, {"sample_ids": ["a", "b"]})
        assert torch.allclose(values, torch.func.functional_call(expected, scaled, arguments), rtol=1e-10)
        del scaled


def test_the_cache_holds_nothing_in_copies():
    loss, _ = losses()
    loss.cache = FeatureCache(1)
    loss(*images(), BOXES, sample_ids=["a", "b"])
    assert len(loss.cache)
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert len(twin.cache) == 0
        assert twin.cache.cache_mib == 1


def test_weights_made_in_inference_mode_are_not_cached_for():
    """Nothing says when they change."""
    with torch.inference_mode():
        loss, _ = losses()
        loss.cache = FeatureCache(1)
        before = loss(*images(), BOXES, sample_ids=["a", "b"])
        loss.extractor.network.second.weight.mul_(2)
        assert not torch.allclose(loss(*images(), BOXES, sample_ids=["a", "b"]), before)


def test_captured_outputs_outlive_the_next_call(monkeypatch):
    """As a CUDA graph does, a captured network writes its outputs where those of the call before are."""
    memory = {}

    def captured(network, mode=None):
        assert mode == "reduce-overhead"

        def run(*args):
            return {
                layer: memory.setdefault((layer, values.shape), torch.empty_like(values)).copy_(values)
                for layer, values in network(*args).items()
            }

        return run

    pair = losses()
    expected = check(*pair)
    assert expected.all()
    monkeypatch.setattr(torch, "compile", captured)
    monkeypatch.setattr("lidnet_fast.extractors.windowed.captures", lambda images: True)
    loss, _ = losses()
    loss.load_state_dict(pair[0].state_dict())
    loss.windows.compiled = True
    with torch.no_grad():
        assert torch.allclose(loss(*images(), BOXES), expected, rtol=1e-12)
    assert memory


def test_another_default_dtype():
    loss, _ = losses()
    pair = [image.float() for image in images()]
    expected = loss.float()(*pair, BOXES)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(loss(*pair, BOXES), expected)
        again, _ = losses()
        assert again.float()(*pair, BOXES).dtype == torch.float32
        assert again.extractor.mean.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_another_default_device():
    expected = check(*losses())
    torch.set_default_device("meta")
    try:
        with torch.device("cpu"):
            loss, _ = losses()
        with torch.device("cpu"):
            pair = images()
        assert torch.allclose(loss(*pair, BOXES), expected, rtol=1e-12)
        assert loss.plan((96, 96), BOXES).windows
        loss(*pair, [torch.zeros(0, 4, device="cpu")] * 2)
        corners = torch.tensor([[0, 3, 4]], device="cpu")
        assert torch.equal(roi_windows(pair[0], corners, (5, 6)), pair[0][:1, :, 3:8, 4:10])
    finally:
        torch.set_default_device(None)
