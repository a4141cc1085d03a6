"""What PyTorch takes, the public ops take too: other dtypes in autocast, any numbers, tensors of shapes alone."""

import warnings

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.tv_tensors import BoundingBoxes

import lidnet_fast as fast

BOXES = torch.tensor([[0.0, 1.5, 2, 9.25, 8], [1, 0, 0.5, 4, 11]])


def images() -> tuple[Tensor, Tensor]:
    return torch.rand(2, 1, 12, 14), torch.rand(2, 1, 12, 14)


LOSSES = {
    "multi_loss": lambda x, t: fast.multi_loss(x, t, {"mse": 1.0, "ssim": 0.5}).total,
    "MultiLoss": lambda x, t: fast.MultiLoss({"mse": 1.0})(x, t).total,
    "roi_perceptual_loss": lambda x, t: fast.roi_perceptual_loss(x, t, BOXES),
    "multiscale_roi_perceptual_loss": lambda x, t: fast.multiscale_roi_perceptual_loss(
        {"0": x}, {"0": t}, BOXES, [(12, 14)] * 2
    ),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_autocast_promotes_what_differs_in_dtype(loss, dtypes):
    input, target = (x.to(dtype) for x, dtype in zip(images(), dtypes, strict=True))
    input.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(input, target)
        assert value.dtype == F.mse_loss(input, target).dtype == torch.float32
    value.backward()
    assert input.grad.dtype == input.dtype
    assert torch.equal(value, loss(input.float(), target.float()))
    with pytest.raises(TypeError, match="must have the dtype of"):
        loss(input, target)


@pytest.mark.parametrize("number", [np.float32, np.float64, np.float16, torch.tensor])
def test_numbers_of_numpy_and_torch(number):
    input, target = images()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        options = {"roi_weight": number(2.0), "data_range": number(0.75)}
        total = fast.multi_loss(input, target, {"mse": number(0.5), "ssim": 0.25}, boxes=BOXES, **options).total
        module = fast.MultiLoss({"mse": number(0.5), "ssim": 0.25}, **options)
        losses = fast.roi_perceptual_loss(input, target, BOXES, spatial_scale=number(0.5))
    plain = {"roi_weight": 2.0, "data_range": 0.75}
    assert total == fast.multi_loss(input, target, {"mse": 0.5, "ssim": 0.25}, boxes=BOXES, **plain).total
    assert total == module(input, target, BOXES).total
    assert losses == fast.roi_perceptual_loss(input, target, BOXES, spatial_scale=0.5)


@pytest.mark.parametrize("number", [np.int64(3), torch.tensor(3)])
def test_integers_of_numpy_and_torch(number):
    input, _ = images()
    assert torch.equal(fast.roi_align(input, BOXES, number, 1.0, number), fast.roi_align(input, BOXES, 3, 1.0, 3))


@pytest.mark.parametrize("weight", [torch.tensor(float("nan")), torch.tensor([1.0, 2.0]), torch.tensor(True), np.inf])
def test_what_is_no_number_is_refused(weight):
    with pytest.raises(ValueError, match=r"weights\['mse'\] must be a finite number, got"):
        fast.multi_loss(*images(), {"mse": weight})


def test_a_weight_that_requires_a_gradient_is_refused():
    with pytest.raises(ValueError, match=r"weights\['mse'\] requires a gradient but never gets one.*detach"):
        fast.multi_loss(*images(), {"mse": torch.tensor(0.5, requires_grad=True)})


OPS = {
    **LOSSES,
    "multi_loss_jacobian": lambda x, t: fast.multi_loss_jacobian(x, t, ["mse", "tv"]),
    "roi_align": lambda x, t: fast.roi_align(x, BOXES.to(x.device), 3),
    "roi_align of volumes": lambda x, t: fast.roi_align(x[:, None], torch.zeros(3, 7, device=x.device), 3),
    "roi_perceptual_loss": lambda x, t: fast.roi_perceptual_loss(x, t, BOXES.to(x.device), reduction="none"),
    "multiscale_roi_perceptual_loss": lambda x, t: fast.multiscale_roi_perceptual_loss(
        {"0": x, "1": x[..., ::2, ::2]}, {"0": t, "1": t[..., ::2, ::2]}, BOXES.to(x.device), [(12, 14)] * 2
    ),
    "roi_windows": lambda x, t: fast.roi_windows(x, torch.zeros(5, 3, dtype=torch.int64), (4, 5)),
    "gradient_gramian": lambda x, t: fast.gradient_gramian(x),
    "combine_gradients": lambda x, t: fast.combine_gradients(x, t[:, 0, 0, 0]),
}


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_meta_tensors_have_shapes_and_dtypes(op):
    input, target = images()
    expected = op(input, target)
    leaf = input.to("meta").requires_grad_()
    value = op(leaf, target.to("meta"))
    assert (value.shape, value.dtype, value.device.type) == (expected.shape, expected.dtype, "meta")
    if value.requires_grad:
        value.sum().backward()
        assert leaf.grad.shape == leaf.shape


@pytest.mark.parametrize("loss", ["roi_perceptual_loss", "multi_loss"])
def test_boxes_that_say_their_format(loss):
    """torchvision's boxes of widths and heights would be read as corners."""
    input, target = images()
    corners = torch.tensor([[1.5, 2, 9.25, 8]])
    given = {form: BoundingBoxes(corners, format=form, canvas_size=(12, 14)) for form in ("XYXY", "XYWH", "CXCYWH")}

    def value(boxes: Tensor) -> Tensor:
        both = [boxes, torch.zeros(0, 4)]
        if loss == "multi_loss":
            return fast.multi_loss(input, target, {"l1": 1.0}, boxes=both, roi_weight=3.0).total
        return fast.roi_perceptual_loss(input, target, both)

    assert value(given["XYXY"]) == value(corners)
    for form in ("XYWH", "CXCYWH"):
        with pytest.raises(
            ValueError, match=rf"boxes\[0\] must have the format XYXY, got {form}\. To fix: torchvision"
        ):
            value(given[form])
