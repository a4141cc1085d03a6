import pytest
import torch

from lidnet_fast.errors import InputError
from lidnet_fast.models import HUWindow, NetworkConfig, build_denoiser, build_detector
from lidnet_fast.models.backbones import ResNetFPN
from lidnet_fast.models.detectors import DETECTORS
from lidnet_fast.models.files import load_denoiser, load_detector, save_denoiser, save_network
from lidnet_fast.models.hu import HUDenoiser
from lidnet_fast.neighbours import middle, neighbours, stacks

WINDOW = HUWindow()


def test_ends_are_repeated():
    assert neighbours(0, 5, 2).tolist() == [0, 0, 0, 1, 2]
    assert neighbours(4, 5, 1).tolist() == [3, 4, 4]
    assert neighbours(0, 1, 1).tolist() == [0, 0, 0]


def test_stacks():
    slices = torch.rand(4, 3, 2)
    made = stacks(slices, 1)
    assert made.shape == (4, 3, 3, 2)
    assert made[1].equal(slices[:3])
    assert made[0].equal(slices[[0, 0, 1]])
    assert middle(made)[:, 0].equal(slices)
    assert middle(stacks(slices, 2), 1).equal(made)


@pytest.mark.parametrize("name", ["unet", "redcnn", "small"])
def test_denoisers_see_neighbours(name):
    """Each slice of the context changes the result, and only the middle one is passed through."""
    torch.manual_seed(0)
    network = build_denoiser(name, context=1, channels=4)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    images = torch.rand(2, 3, 32, 32, requires_grad=True)
    denoised = network(images)
    assert denoised.shape == (2, 1, 32, 32)
    (gradient,) = torch.autograd.grad(denoised.square().sum(), images)
    assert (gradient.abs().sum((0, 2, 3)) > 0).all()
    if name != "redcnn":
        untrained = build_denoiser(name, context=1, channels=4)
        assert untrained(images).equal(images[:, 1:2])


@pytest.mark.parametrize("name", DETECTORS)
def test_detectors_see_neighbours(name):
    torch.manual_seed(0)
    detector = build_detector(name, context=1).eval()
    images = torch.rand(2, 3, 64, 64, requires_grad=True)
    losses = detector.losses(images, [torch.tensor([[10.0, 10, 20, 20]])] * 2)
    (gradient,) = torch.autograd.grad(sum(losses.values()), images)
    assert (gradient.abs().sum((0, 2, 3)) > 0).all()
    with pytest.raises(ValueError, match=r"\[N, 3, H, W\]"):
        detector.features(images[:, :1])


def test_equal_slices_show_a_resnet_what_one_does():
    kernels = []
    for context in (0, 1):
        torch.manual_seed(0)
        kernels.append(ResNetFPN("resnet18", context=context).conv1.weight)
    assert torch.allclose(kernels[1].sum(1, keepdim=True), kernels[0])
    assert kernels[1][:, 0].equal(kernels[1][:, 2])


def test_a_window_denoises_every_slice_that_has_its_neighbours():
    torch.manual_seed(0)
    network = build_denoiser("small", context=1, channels=4)
    torch.nn.init.normal_(network.body[-1].weight)
    slices = torch.rand(2, 5, 32, 32) * 1000 - 900
    slices[0, 2, 3, 3] = 3000  # metal passes
    denoised = WINDOW.denoise(network, slices, 1)
    assert denoised.shape == (2, 3, 32, 32)
    assert denoised[0, 1, 3, 3] == 3000
    alone = HUDenoiser(network, WINDOW, context=1)(slices[:, 1:4])
    assert torch.allclose(denoised[:, 1:2], alone, atol=1e-3)


def test_files_keep_the_context_and_refuse_another(tmp_path):
    denoiser = HUDenoiser(build_denoiser("small", context=1), WINDOW, context=1)
    save_denoiser(tmp_path / "denoiser.pt", denoiser, NetworkConfig("small"))
    assert load_denoiser(tmp_path / "denoiser.pt").context == 1
    with pytest.raises(InputError, match=r"denoiser.pt holds a denoiser of context 1, which sees 3 slices, but"):
        load_denoiser(tmp_path / "denoiser.pt", context=0)

    config = NetworkConfig("faster_rcnn_small")
    detector = build_detector("faster_rcnn_small", context=2)
    save_network(tmp_path / "detector.pt", "detector", detector, config, WINDOW, {}, context=2)
    assert load_detector(tmp_path / "detector.pt").context == 2
    with pytest.raises(InputError, match=r"detector of context 2, which sees 5 slices, but one of context 1 is needed"):
        load_detector(tmp_path / "detector.pt", context=1)

    content = torch.load(tmp_path / "denoiser.pt", weights_only=True)
    for wrong in (-1, 1.0, 10**9, "1"):
        torch.save({**content, "context": wrong}, tmp_path / "wrong.pt")
        with pytest.raises(InputError, match="its context can't be"):
            load_denoiser(tmp_path / "wrong.pt")


def test_context_is_no_option_of_a_network(tmp_path):
    with pytest.raises(InputError, match=r"denoiser option context: set data.context"):
        save_denoiser(
            tmp_path / "x.pt", HUDenoiser(build_denoiser("small"), WINDOW), NetworkConfig("small", {"context": 1})
        )
