"""Whole calls take the way that they take on CUDA, on a GPU that is pretended (pretended.py)."""

from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lidnet_fast import ROIPerceptualLoss, multi_loss, multiscale_roi_perceptual_loss, roi_perceptual_loss
from lidnet_fast.extractors import windows
from lidnet_fast.functional import roi
from tests.test_docs import python_examples

from .emulated import build, load

pytest.importorskip("triton")
from .pretended import on_held, pretending

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here, and none is pretended"),
]
BOXES = torch.tensor(
    [[0, 1.5, 2, 20, 17], [0, 3, 4, 18, 15], [1, 0, 0, 26, 20], [1, -4, 5, 9, 40], [2, 3, 3, 9, 8], [3, 1, 1, 9, 8]]
)
LISTS = [BOXES[BOXES[:, 0] == image, 1:] for image in range(4)]
WEIGHTS = torch.linspace(0.5, 2, len(BOXES))


def of_features(place, boxes, **options):
    input, target = torch.randn(2, 4, 3, 8, 9, generator=torch.Generator().manual_seed(0))
    input = place(input).requires_grad_()
    return roi_perceptual_loss(input, place(target), boxes, 2, spatial_scale=0.5, **options), [input]


def of_pyramid(place, boxes, **options):
    generator = torch.Generator().manual_seed(0)
    inputs, targets = (
        {str(level): place(torch.randn(4, 3, 8 >> level, 16 >> level, generator=generator)) for level in range(3)}
        for _ in range(2)
    )
    leaves = [level.requires_grad_() for level in inputs.values()]
    sizes = [(16, 32)] * 4
    return multiscale_roi_perceptual_loss(inputs, targets, boxes, sizes, 2, canonical_scale=8, **options), leaves


CALLS = {
    "boxes of a Tensor": lambda place: of_features(place, place(BOXES)),
    "boxes of a list": lambda place: of_features(place, [place(of_image) for of_image in LISTS]),
    "weights": lambda place: of_features(place, place(BOXES), box_weights=place(WEIGHTS)),
    "weights, sum": lambda place: of_features(place, place(BOXES), box_weights=place(WEIGHTS), reduction="sum"),
    "pyramid": lambda place: of_pyramid(place, place(BOXES)),
    "pyramid, list, weights": lambda place: of_pyramid(place, [place(x) for x in LISTS], box_weights=place(WEIGHTS)),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_loss_and_its_gradient_take_seven_launches(call):
    """One of them is autograd's, of the first upstream gradient; and nothing waits for the device."""
    loss, leaves = call(lambda tensor: tensor)
    loss.backward()
    with pretending() as pretence:
        on_device, leaves_there = call(pretence.on_device)
        on_device.backward()
    assert on_device.device.type == "cuda"
    assert torch.allclose(on_device.held, loss, rtol=1e-5)
    for there, here in zip(leaves_there, leaves, strict=True):
        assert torch.allclose(there.grad.held, here.grad, atol=1e-7)
    assert pretence.launches.total() <= 7, pretence.launches
    assert (pretence.uploads, pretence.waits) == (0, {})


@pytest.fixture(scope="module")
def emulation():
    try:
        return load(build())
    except FileNotFoundError as error:
        pytest.skip(str(error))


def test_pixel_losses_with_boxes_take_eight_launches(emulation):
    weights = {"l1": 1.0, "mse": 0.5, "charbonnier": 0.3, "ssim": 0.2, "edge": 0.1, "tv": 0.1}
    pair = torch.rand(2, 4, 1, 14, 40, generator=torch.Generator().manual_seed(0))

    def call(place):
        input, target = (place(images.clone()) for images in pair)
        boxes = [place(of_image) for of_image in LISTS]
        loss = multi_loss(input.requires_grad_(), target, weights, boxes=boxes, roi_weight=3.0)
        loss.backward()
        return loss.total.detach(), input.grad

    expected = call(torch.clone)
    emulation.reset()
    with pretending(multi_loss=on_held(torch.ops.lidnet_fast_emulated.multi_loss)) as pretence:
        got = call(pretence.on_device)
    for there, here in zip(got, expected, strict=True):
        assert torch.allclose(there.held, here, rtol=1e-4, atol=1e-7)
    assert emulation.launches() + pretence.launches.total() <= 8, pretence.launches
    assert (pretence.uploads, pretence.waits) == (0, {})


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_boxes_that_are_ignored(weights, reduction):
    boxes = torch.cat((BOXES[:-1], torch.tensor([[3, 200, 200, 220, 220.0]])))
    expected, _ = of_features(lambda x: x, boxes, box_weights=weights, outside="ignore", reduction=reduction)
    with pretending() as pretence:
        place = pretence.on_device
        options = {"box_weights": None if weights is None else place(weights), "reduction": reduction}
        loss, _ = of_features(place, place(boxes), outside="ignore", **options)
    assert torch.allclose(loss.held, expected.detach(), rtol=1e-5)
    assert not pretence.waits


BAD = {
    "nan": {"boxes": BOXES.index_fill(1, torch.tensor([2]), torch.nan)},
    "unordered": {"boxes": BOXES.flip(1).index_fill(1, torch.tensor([0]), 0)},
    "batch index": {"boxes": BOXES.index_fill(1, torch.tensor([0]), 4)},
    "unordered in a list": {"boxes": [*LISTS[:3], LISTS[3].flip(1)]},
    "weight": {"boxes": BOXES, "box_weights": WEIGHTS.log().index_fill(0, torch.tensor([3]), torch.inf)},
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_the_device_asserts_what_the_cpu_checks(bad):
    with pytest.raises(ValueError, match="must"):
        of_features(lambda x: x, **bad)
    with pretending() as pretence, pytest.raises(Exception, match=r"box(es|_weights) must (have|be) finite"):
        of_features(
            pretence.on_device,
            **{
                name: [pretence.on_device(x) for x in value] if isinstance(value, list) else pretence.on_device(value)
                for name, value in bad.items()
            },
        )


def test_the_device_asserts_what_the_cpu_checks_of_weights_alone():
    """ROIPerceptualLoss has its boxes on the CPU, and weights wherever they are."""
    images, boxes = torch.rand(1, 1, 16, 16), torch.tensor([[0, 2, 2, 8, 8.0], [0, 3, 3, 9, 9]])
    loss, weights = ROIPerceptualLoss(network(), "1", output_size=2, halo="whole"), torch.tensor([1, torch.nan])
    with pytest.raises(ValueError, match=r"box_weights\[1\] must be finite"):
        loss(images, images, boxes, weights)
    with pretending() as pretence:
        place = pretence.on_device
        with pytest.raises(ValueError, match=r"box_weights\[1\] must be finite"):
            loss(place(images), place(images), boxes, weights)
        with pytest.raises(Exception, match="box_weights must be finite"):
            loss(place(images), place(images), boxes, place(weights))
    assert not pretence.waits


def network(channels=1):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(channels, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()
    )


def move(module, place):
    """As `module.to` does."""
    for part in module.modules():
        for store in (part._parameters, part._buffers):
            for name, tensor in store.items():
                store[name] = None if tensor is None else place(tensor)


# Boxes, options, and launches of the loss and its gradient.
PERCEPTUAL = {
    "windows of two kinds": ([[10, 12, 18, 20], [0, 0, 9, 9]], {}, 56),
    "windows and a whole image": ([[10, 12, 18, 20], [0, 0, 60, 60]], {}, 55),
    "whole images": ([[10, 12, 18, 20], [20, 20, 30, 30]], {"halo": "whole"}, 25),
    "two layers": ([[10, 12, 18, 20], [20, 20, 30, 30]], {"layers": ["1", "4"]}, 74),
    "ignored": ([[10, 12, 18, 20], [90, 90, 99, 99]], {"outside": "ignore"}, 60),
    "weights": ([[10, 12, 18, 20], [0, 0, 9, 9]], {"weights": torch.tensor([2.0, 3.0])}, 59),
    "windows of two kinds, of a network for RGB": ([[10, 12, 18, 20], [0, 0, 9, 9]], {"mean": "imagenet"}, 73),
    "weights on the CPU, ignored": (
        [[10, 12, 18, 20], [90, 90, 99, 99]],
        {"weights": torch.tensor([2.0, 3.0]), "on_host": True, "outside": "ignore"},
        62,
    ),
    "nothing": ([], {}, 5),
}


@pytest.mark.parametrize(("boxes", "options", "launches"), PERCEPTUAL.values(), ids=PERCEPTUAL)
def test_the_perceptual_loss_of_images_waits_for_nothing(boxes, options, launches, monkeypatch):
    """Boxes are on the CPU; all that is planned from them goes to the device in one copy."""
    monkeypatch.setattr(windows, "COST_PER_CALL", 0)  # so that windows of so small images pay
    options = {"layers": "4", "output_size": 2, **options}
    weights, on_host = options.pop("weights", None), options.pop("on_host", False)
    loss = ROIPerceptualLoss(network(3 if "mean" in options else 1), save_extractor=False, **options)
    pair = torch.rand(2, 2, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    rois = torch.tensor([[number % 2, *box] for number, box in enumerate(boxes)]).view(-1, 5).float()

    def call(place):
        denoised, normal_dose = (place(images) for images in pair)
        value = loss(
            denoised.requires_grad_(), normal_dose, rois, weights if weights is None or on_host else place(weights)
        )
        value.backward()
        return value.detach(), denoised.grad

    if "halo" not in options and boxes:
        assert loss.plan((64, 64), rois, 2).windows
    expected = call(torch.clone)
    with pretending() as pretence:
        move(loss, pretence.on_device)
        got = call(pretence.on_device)
    for there, here in zip(got, expected, strict=True):
        assert torch.allclose(there.held, here, atol=1e-6)
    assert not pretence.waits
    assert pretence.uploads <= 1
    assert pretence.launches.total() <= launches, pretence.launches
    assert pretence.launches["_cut_kernel"] <= 1
    assert pretence.launches["_add_kernel"] <= 1


# Options, and boxes of two batches whose windows are of the same kinds.
CAPTURED = {
    "windows of two kinds": ({}, [[0, 10, 12, 18, 20], [1, 0, 0, 9, 9]], [[0, 1, 0, 9, 9], [1, 30, 40, 38, 48]]),
    "whole images": ({"halo": "whole"}, [[0, 1, 2, 8, 9], [1, 3, 3, 60, 9]], [[0, 20, 20, 30, 30], [1, 0, 0, 9, 50]]),
    "two layers, ignored": (
        {"layers": {"1": 2.0, "4": 1.0}, "outside": "ignore", "mean": (0.5,)},
        [[0, 10, 12, 18, 20], [1, 90, 90, 99, 99], [1, 30, 32, 38, 40]],
        [[1, 40, 12, 48, 20], [0, 10, 16, 18, 24], [0, 90, 90, 99, 99]],
    ),
}


@pytest.mark.parametrize(
    "case", [case if case.startswith("windows") else pytest.param(case, marks=pytest.mark.slow) for case in CAPTURED]
)
def test_the_perceptual_loss_as_one_cuda_graph(case, monkeypatch):
    """As docs/gpu.md shows it; each replay gives what a call of its own gives, and another capture the same graph."""
    monkeypatch.setattr(windows, "COST_PER_CALL", 0)
    options, *boxes = CAPTURED[case]
    loss = ROIPerceptualLoss(network(), save_extractor=False, **{"layers": "4", "output_size": 2, **options})
    images = torch.rand(2, 2, 2, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    rois = [torch.tensor(of_batch).float() for of_batch in boxes]
    expected = []
    for (denoised, normal_dose), of_batch in zip(images, rois, strict=True):
        value = loss(denoised.requires_grad_(), normal_dose, of_batch)
        expected.append((value.detach(), *torch.autograd.grad(value, denoised)))
    (example,) = python_examples(Path(__file__).parents[2] / "docs" / "gpu.md")

    @contextmanager
    def capturing(graph):
        with pretence.recorded() as graph.recording:
            yield
        graph.replay = graph.recording.replay

    def batches():
        for number in (1, 0):
            yield *(pretence.on_device(x.detach()) for x in images[number]), rois[number]
            torch.testing.assert_close((scope["value"].held, scope["gradient"].held), expected[number])

    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, stand_in in {
        "CUDAGraph": SimpleNamespace,
        "graph": capturing,
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": nullcontext,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    with pretending() as pretence:
        move(loss, pretence.on_device)
        denoised, normal_dose = (pretence.on_device(x.detach().clone()) for x in images[0])
        scope = {"torch": torch, "loss": loss, "denoised": denoised.requires_grad_(), "normal_dose": normal_dose}
        exec(example, scope | {"boxes": rois[0], "batches": batches()}, scope)
        assert (pretence.uploads, pretence.waits) == (3, {})
        with pretence.recorded() as again:
            torch.autograd.grad(loss(denoised, normal_dose, scope["prepared"]), denoised)
        assert again.launches == scope["graph"].recording.launches
        assert pretence.uploads == 3


def test_boxes_that_a_cuda_graph_would_not_see_anew(monkeypatch):
    monkeypatch.setattr(windows, "COST_PER_CALL", 0)
    loss, pair = ROIPerceptualLoss(network(), "4", output_size=2), torch.rand(2, 2, 1, 64, 64)
    boxes = torch.tensor([[0.0, 10, 12, 18, 20]])
    with pretending() as pretence:
        move(loss, pretence.on_device)
        images = [pretence.on_device(x) for x in pair]
        with (
            pretence.recorded(),
            pytest.raises(RuntimeError, match=r"To fix: capture .*loss\.prepare\(denoised, boxes"),
        ):
            loss(*images, boxes)


@pytest.mark.parametrize("most", [1, 32])
def test_windows_of_both_images_and_their_derivatives(most, monkeypatch):
    """In one launch, and in several where there are more kinds than one takes."""
    monkeypatch.setattr(roi, "_MOST_KINDS", most)
    images, targets, along = torch.rand(3, 2, 1, 8, 9, generator=torch.Generator().manual_seed(0))
    corners, kinds = torch.tensor([[0, 1, 2], [1, 0, 0], [0, 2, 3]]), ([2, 1], [(4, 5), (6, 3)])

    def call(place):
        leaf = place(images.clone()).requires_grad_()
        windows, of_targets = roi.windows_of_pair(leaf, place(targets), place(corners), *kinds)
        (first,) = torch.autograd.grad(sum((w**3).sum() for w in windows), leaf, create_graph=True)
        (second,) = torch.autograd.grad((first * place(along)).sum(), leaf)
        assert not any(w.requires_grad for w in of_targets)
        return [*windows, *of_targets, first, second]

    expected = call(torch.clone)
    with pretending() as pretence:
        got = call(pretence.on_device)
    for there, here in zip(got, expected, strict=True):
        assert torch.allclose(there.held, here, rtol=1e-5)
    launches = -(-len(kinds[0]) // most)
    assert pretence.launches["_cut_kernel"] == 2 * launches  # the second time for the second derivative
    assert pretence.launches["_add_kernel"] == 2 * launches
