"""Arguments that work but are hardly meant are told once, on the CPU, and to nobody who traces."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import lidnet_fast as fast
from lidnet_fast.extractors import LayerExtractor
from lidnet_fast.inference import SliceDenoiser
from lidnet_fast.models.hu import HUDenoiser
from lidnet_fast.models.windowing import HUWindow

INSIDE, OUTSIDE, FRACTIONS = (
    torch.tensor(rows)
    for rows in (
        [[0.0, 4, 4, 20, 20], [1, 30, 40, 63, 64]],
        [[0.0, 4, 4, 20, 20], [0, 300, 310, 320, 330], [1, 4, 64, 20, 80], [1, -9, 4, 0, 9]],
        [[0.0, 0.1, 0.1, 0.2, 0.2], [1, 0.5, 0.6, 1, 1]],
    )
)


def images(dtype=torch.float32):
    return torch.rand(2, 1, 64, 64, dtype=dtype), torch.rand(2, 1, 64, 64, dtype=dtype)


def network():
    return nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU())


EXTRACTOR = fast.ROIPerceptualLoss(network(), "1")
SIZES = [(64, 64)] * 2
USES = {
    "roi_perceptual_loss": lambda x, t, b: fast.roi_perceptual_loss(x, t, b),
    "roi_perceptual_loss, spatial_scale": lambda x, t, b: fast.roi_perceptual_loss(
        x[..., ::2, ::2], t[..., ::2, ::2], b, spatial_scale=0.5
    ),
    "multiscale_roi_perceptual_loss": lambda x, t, b: fast.multiscale_roi_perceptual_loss(
        {"0": x[..., ::2, ::2]}, {"0": t[..., ::2, ::2]}, b, SIZES
    ),
    "roi_align": lambda x, t, b: fast.roi_align(x, b, 3),
    "multiscale_roi_align": lambda x, t, b: fast.multiscale_roi_align({"0": x}, b, SIZES, 3, 2),
    "multi_loss": lambda x, t, b: fast.multi_loss(x, t, {"mse": 1.0}, boxes=b, roi_weight=3.0).total,
    "multi_loss_jacobian": lambda x, t, b: fast.multi_loss_jacobian(x, t, ["l1"], boxes=b, roi_weight=3.0),
    "MultiLoss": lambda x, t, b: fast.MultiLoss({"mse": 1.0}, roi_weight=3.0)(x, t, b).total,
    "ROIPerceptualLoss": lambda x, t, b: EXTRACTOR(x, t, b),
}


def told(call, *arguments) -> list[str]:
    """What a call warns of; the filter is as Python sets it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        call(*arguments)
    assert all(warning.category is fast.InputWarning and warning.filename == __file__ for warning in caught)
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_boxes_outside_are_told_with_their_number(use):
    (sentence,) = told(use, *images(), OUTSIDE)
    assert sentence.startswith(
        "3 of 4 boxes lie outside the images of 64 x 64 pixels, the first of them at (300, 310, 320, 330)."
    )
    assert told(use, *images(), INSIDE) == told(use, *images(), INSIDE[:0]) == []


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_boxes_in_fractions_are_told(use):
    (sentence,) = told(use, *images(), FRACTIONS)
    assert "within one pixel of the origin, the first is (0.1, 0.1, 0.2, 0.2), in images of 64 x 64 pixels" in sentence


def test_the_unit_of_boxes_may_be_the_image():
    """As spatial_scale says, which has them within the map."""
    assert told(lambda: fast.roi_align(images()[0], FRACTIONS, 3, spatial_scale=64.0)) == []


def test_a_forgotten_spatial_scale_is_asked_for():
    x, t = (image[..., ::4, ::4] for image in images())
    (sentence,) = told(fast.roi_perceptual_loss, x, t, INSIDE)
    assert sentence.startswith("1 of 2 boxes lie outside the images of 16 x 16 pixels")
    assert sentence.endswith("Of features, is spatial_scale 1 / stride?")


@pytest.mark.parametrize("name", ["multi_loss", "MultiLoss", "ROIPerceptualLoss"])
def test_losses_without_a_spatial_scale_do_not_ask_for_it(name):
    (sentence,) = told(USES[name], *images(), OUTSIDE)
    assert sentence.endswith("Are boxes in pixels of these images?")


def test_a_kind_is_told_once_for_each_line_and_the_filter_decides():
    def loop():
        for number in range(1, 4):
            fast.roi_perceptual_loss(*images(), OUTSIDE.repeat(number, 1))
        fast.roi_align(images()[0], FRACTIONS, 3)

    first, second = told(loop)
    assert first.startswith("3 of 4 boxes")
    assert second.startswith("every box")
    assert len(told(loop)) == 2  # another filter, told anew
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore", fast.InputWarning)
        loop()
    assert not caught
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loop()
    assert [str(warning.message)[:4] for warning in caught] == ["3 of", "6 of", "9 of", "ever"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", fast.InputWarning)
        for _ in range(2):
            with pytest.raises(fast.InputWarning, match="3 of 4 boxes"):
                fast.roi_perceptual_loss(*images(), OUTSIDE)


def perceptual(name, x, t, boxes, outside, reduction):
    options = {"outside": outside, "reduction": reduction}
    if name == "ROIPerceptualLoss":
        torch.manual_seed(0)
        loss = fast.ROIPerceptualLoss(network().double(), "1", **options)
        if isinstance(boxes, list):
            return loss(list(x), list(t), boxes)
        return loss(x, t, boxes)
    if name == "multiscale_roi_perceptual_loss":
        return fast.multiscale_roi_perceptual_loss({"0": x}, {"0": t}, boxes, SIZES, **options)
    return fast.roi_perceptual_loss(x, t, boxes, **options)


@pytest.mark.parametrize("name", ["roi_perceptual_loss", "multiscale_roi_perceptual_loss", "ROIPerceptualLoss"])
@pytest.mark.parametrize("lists", [False, True])
def test_boxes_outside_can_be_left_out(name, lists):
    x, t = images(torch.float64)

    def loss(boxes, outside, reduction):
        boxes = boxes.to(x.dtype)
        if lists:
            boxes = [boxes[boxes[:, 0] == image, 1:] for image in range(2)]
        return perceptual(name, x, t, boxes, outside, reduction)

    def silent(*arguments):
        values = []
        assert told(lambda: values.append(loss(*arguments))) == []
        return values[0]

    within = OUTSIDE[:1]
    one = silent(within, "keep", "mean")
    assert one > 0
    assert torch.allclose(silent(OUTSIDE, "ignore", "mean"), one, rtol=1e-12)
    assert torch.allclose(silent(OUTSIDE, "ignore", "sum"), one, rtol=1e-12)
    assert torch.allclose(silent(OUTSIDE, "ignore", "none"), torch.stack([one, *[one * 0] * 3]), rtol=1e-12)
    assert silent(OUTSIDE[1:], "ignore", "mean") == 0
    assert silent(INSIDE, "ignore", "mean") == silent(INSIDE, "keep", "mean")
    x.requires_grad_()
    silent(OUTSIDE, "ignore", "mean").backward()
    assert x.grad[0].any()
    assert not x.grad[1].any()
    with pytest.raises(ValueError, match="outside must be one of keep, ignore, got 'drop'"):
        loss(INSIDE, "drop", "mean")


def test_boxes_outside_are_left_out_within_graphs():
    x, t = images()
    compiled = torch.compile(
        lambda x, t, b: fast.roi_perceptual_loss(x, t, b, outside="ignore"), backend="aot_eager", fullgraph=True
    )
    assert compiled(x, t, OUTSIDE) == fast.roi_perceptual_loss(x, t, OUTSIDE[:1])


HU = torch.tensor(np.random.default_rng(0).uniform(-1024, 1500, (2, 1, 64, 64)), dtype=torch.float32)
UNIT = torch.rand(2, 1, 64, 64)


@pytest.mark.parametrize(
    ("target", "data_range", "said"),
    [
        (HU, 1.0, "but data_range is 1"),
        (UNIT, 255.0, "but data_range is 255"),
        (UNIT * 2 - 1, 1.0, "but data_range is 1"),
        (UNIT * 255, 1.0, "but data_range is 1"),
        (UNIT, 2500.0, "but data_range is 2500"),
        (UNIT, 1.0, None),
        (UNIT * 1.4 - 0.1, 1.0, None),
        (UNIT * 2 - 1, 2.0, None),
        (UNIT * 255, 255.0, None),
        (HU, 2500.0, None),
        (UNIT * 0, 255.0, None),
        (torch.full_like(UNIT, torch.nan), 1.0, None),
    ],
)
@pytest.mark.parametrize("term", ["ssim", "mse"])
def test_images_far_from_data_range_are_told(target, data_range, said, term):
    sentences = told(lambda: fast.multi_loss(UNIT, target, {term: 1.0}, data_range=data_range))
    assert len(sentences) == (said is not None and term == "ssim")
    assert all(said in sentence for sentence in sentences)


@pytest.mark.parametrize(
    ("images", "options", "told_of"),
    [
        (UNIT, {"mean": "imagenet"}, False),
        (UNIT, {"mean": (123.7, 116.3, 103.5), "std": (58.4, 57.1, 57.4)}, True),
        (UNIT * 255, {"mean": (123.7, 116.3, 103.5), "std": (58.4, 57.1, 57.4)}, False),
        (UNIT * 255, {"mean": "imagenet"}, True),
        (UNIT * 2 - 1, {"mean": "imagenet"}, True),
        (HU, {"mean": "imagenet"}, True),
        (HU, {"mean": (-500.0,) * 3, "std": (500.0,) * 3}, False),
        (HU, {}, False),
    ],
)
def test_images_far_from_mean_and_std_are_told(images, options, told_of):
    network = nn.Sequential(nn.Conv2d(3, 2, 3))
    loss, extractor = fast.ROIPerceptualLoss(network, "0", **options), LayerExtractor(network, ["0"], **options)
    for sentences in (told(lambda: loss(UNIT, images, INSIDE)), told(lambda: extractor(images))):
        assert len(sentences) == told_of
        assert all("To fix: scale the images, or give the mean and std" in sentence for sentence in sentences)


@pytest.mark.parametrize(
    ("hu", "said"),
    [
        (HU + 1024, "Are they raw DICOM values? To fix: apply RescaleSlope and RescaleIntercept"),
        (UNIT, "Are they windowed? To fix: undo the window"),
        (HU, None),
        (UNIT * 80, None),  # soft tissue alone
        (UNIT * 0 - 1024, None),
    ],
)
def test_images_that_are_no_hu_are_told(hu, said):
    denoiser = HUDenoiser(nn.Conv2d(1, 1, 1), HUWindow()).requires_grad_(False)
    of_slices = SliceDenoiser(denoiser, "cpu", precision="float32")
    for sentences in (told(lambda: denoiser(hu)), told(lambda: of_slices(hu[:, 0].numpy()))):
        assert len(sentences) == (said is not None)
        assert all(said in sentence for sentence in sentences)


def both(x, t):
    """Two warnings, were they eager."""
    loss = fast.multi_loss(x, t, {"ssim": 1.0}).total
    return loss + fast.roi_perceptual_loss(x, t, OUTSIDE[:1])


def test_who_traces_is_told_nothing():
    wrong = HU.clone()
    assert len(told(both, UNIT, wrong)) == 1
    uses = {
        "torch.compile": lambda: torch.compile(both, backend="aot_eager", fullgraph=True)(UNIT, wrong),
        "torch.func.grad": lambda: torch.func.grad(both)(UNIT, wrong),
        "torch.vmap": lambda: torch.vmap(both)(UNIT[None], wrong[None]),
        "torch.export": lambda: torch.export.export(Wrapped(), (UNIT, wrong)),
        "the meta device": lambda: fast.multi_loss(UNIT.to("meta"), wrong.to("meta"), {"ssim": 1.0}),
        "FakeTensorMode": lambda: of_fake_tensors(wrong),
        "make_fx": lambda: make_fx(lambda x, t: fast.multi_loss(x, t, {"ssim": 1.0}).total)(UNIT, wrong),
    }
    for name, use in uses.items():
        assert told_of_ours(use) == [], name


class Wrapped(nn.Module):
    def forward(self, x, t):
        return both(x, t)


def of_fake_tensors(wrong):
    with FakeTensorMode() as mode:
        fast.multi_loss(mode.from_tensor(UNIT), mode.from_tensor(wrong), {"ssim": 1.0})


def told_of_ours(use) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        use()
    return [str(warning.message) for warning in caught if warning.category is fast.InputWarning]
