from collections import OrderedDict

import pytest
import torch
from torchvision.ops import MultiScaleRoIAlign

from lidnet_fast import multiscale_roi_perceptual_loss, roi_perceptual_loss

SIZES = [(120, 100), (128, 96)]
LEVELS = ("p2", "p3", "p4")


def pyramid(dtype=torch.float64):
    return OrderedDict(
        (name, torch.randn(2, 3, 128 >> k, 104 >> k, dtype=torch.float64).to(dtype))
        for k, name in enumerate(LEVELS, start=2)
    )


def boxes(count=20):
    """Per image boxes whose sides run from 2 to 90 pixels, so that every level gets some."""
    result = []
    for _ in range(2):
        corner = 30 * torch.rand(count, 2)
        side = 2 * 45 ** torch.rand(count, 2)
        # The last float32 below the canonical side of 24: rounding mustn't move it a level down.
        edge = torch.tensor([[0.0, 0.0, 24 * (1 - 2**-24), 24 * (1 - 2**-24)]])
        result.append(torch.cat((torch.cat((corner, corner + side), dim=1), edge)))
    return result


@pytest.mark.parametrize(("scale", "level"), [(24, 3), (224, 4), (10, 4)])
def test_levels_and_pooling_are_torchvisions(assert_near, scale, level):
    inputs, targets, regions = pyramid(), pyramid(), boxes()
    pool = MultiScaleRoIAlign(list(LEVELS), 5, 2, canonical_scale=scale, canonical_level=level)
    doubled = [x.double() for x in regions]
    leaves = OrderedDict((name, x.clone().requires_grad_()) for name, x in inputs.items())
    expected = (pool(leaves, doubled, SIZES) - pool(targets, doubled, SIZES)).square().mean((1, 2, 3))
    upstream = torch.randn(expected.shape, dtype=torch.float64)
    expected.backward(upstream)
    if scale == 24:
        used = pool.map_levels(doubled)
        assert set(used.tolist()) == {0, 1, 2}
    for x in inputs.values():
        x.requires_grad_()
    losses = multiscale_roi_perceptual_loss(
        inputs,
        OrderedDict(reversed(targets.items())),  # matched by name
        regions,
        SIZES,
        5,
        aligned=False,
        canonical_scale=scale,
        canonical_level=level,
        reduction="none",
    )
    losses.backward(upstream)
    assert_near(losses, expected)
    for name in LEVELS:
        expected_gradient = torch.zeros_like(leaves[name]) if leaves[name].grad is None else leaves[name].grad
        assert_near(inputs[name].grad, expected_gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(assert_near, dtype):
    inputs, targets, regions = pyramid(dtype), pyramid(dtype), boxes()
    loss = multiscale_roi_perceptual_loss(inputs, targets, regions, SIZES, canonical_scale=24, canonical_level=3)
    exact = [OrderedDict((name, x.double()) for name, x in maps.items()) for maps in (inputs, targets)]
    expected = multiscale_roi_perceptual_loss(*exact, regions, SIZES, canonical_scale=24, canonical_level=3)
    assert loss.dtype == torch.float32
    assert_near(loss, expected, torch.float32)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_one_level_is_the_plain_loss(reduction):
    inputs, targets, regions = pyramid(), pyramid(), boxes(4)
    options = {"criterion": "l1", "box_weights": torch.rand(10), "reduction": reduction}
    single = multiscale_roi_perceptual_loss(
        {"p3": inputs["p3"]}, {"p3": targets["p3"]}, regions, SIZES, 3, 1, **options
    )
    plain = roi_perceptual_loss(inputs["p3"], targets["p3"], regions, 3, 1 / 8, 1, **options)
    assert torch.equal(single, plain)


def test_boxes_of_no_area_go_to_the_finest_level():
    inputs, targets = pyramid(), pyramid()
    regions = torch.tensor([[0.0, 5, 5, 5, 60], [1, 8, 8, 8, 8]])
    losses = multiscale_roi_perceptual_loss(
        inputs, targets, regions, SIZES, canonical_scale=8, canonical_level=4, reduction="none"
    )
    finest = roi_perceptual_loss(inputs["p2"], targets["p2"], regions, spatial_scale=1 / 4, reduction="none")
    assert torch.equal(losses, finest)


def test_no_boxes_give_zero_gradients():
    inputs, targets = pyramid(), pyramid()
    for x in inputs.values():
        x.requires_grad_()
    loss = multiscale_roi_perceptual_loss(inputs, targets, torch.zeros(0, 5), SIZES)
    loss.backward()
    assert loss == 0
    assert all(torch.equal(x.grad, torch.zeros_like(x)) for x in inputs.values())


def test_gradcheck():
    targets, regions = pyramid(), boxes(3)

    def losses(*levels):
        return multiscale_roi_perceptual_loss(
            dict(zip(LEVELS, levels, strict=True)),
            targets,
            regions,
            SIZES,
            3,
            canonical_scale=24,
            canonical_level=3,
            criterion="charbonnier",
            reduction="none",
        )

    assert torch.autograd.gradcheck(losses, tuple(x.requires_grad_() for x in pyramid().values()), fast_mode=True)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"inputs": {}}, ValueError, "inputs must hold at least one level"),
        ({"targets": {"p2": torch.zeros(1)}}, ValueError, r"targets must have the levels of inputs.*got \['p2'\]"),
        ({"image_sizes": SIZES[:1]}, ValueError, r"image_sizes must have one \(height, width\) per image, 2, got 1"),
        ({"image_sizes": [(120, 100), (0, 96)]}, ValueError, r"image_sizes\[1\] must be .*got \(0, 96\)"),
        ({"image_sizes": [120, 100]}, TypeError, r"image_sizes\[0\] must be \(height, width\), got 120"),
        ({"canonical_scale": 0}, ValueError, "canonical_scale must be a finite number above 0, got 0"),
        ({"canonical_level": 3.5}, ValueError, "canonical_level must be an int, got 3.5"),
        ({"criterion": "huber"}, ValueError, "criterion must be one of"),
        ({"output_size": 0}, ValueError, "output_size must be"),
        ({"boxes": [torch.zeros(1, 4)]}, ValueError, "boxes must be a list of 2 Tensors, one per image, got 1"),
    ],
)
def test_bad_input(change, error, message):
    arguments = {"inputs": pyramid(), "targets": pyramid(), "boxes": boxes(2), "image_sizes": SIZES, **change}
    with pytest.raises(error, match=message):
        multiscale_roi_perceptual_loss(**arguments)


def test_bad_levels():
    inputs, targets = pyramid(), pyramid()
    with pytest.raises(ValueError, match=r"doubling strides, finest first, got 'p4': 2\^4, 'p2': 2\^2"):
        multiscale_roi_perceptual_loss(
            {"p4": inputs["p4"], "p2": inputs["p2"]}, {k: targets[k] for k in ("p2", "p4")}, boxes(2), SIZES
        )
    with pytest.raises(ValueError, match=r"targets\['p3'\] requires a gradient"):
        multiscale_roi_perceptual_loss(inputs, targets | {"p3": targets["p3"].requires_grad_()}, boxes(2), SIZES)
    with pytest.raises(ValueError, match=r"inputs\['p3'\] must share batch size, dtype and device"):
        multiscale_roi_perceptual_loss(
            inputs | {"p3": inputs["p3"][:1]}, targets | {"p3": targets["p3"][:1].detach()}, boxes(2), SIZES
        )
    empty = [{name: x[:0].detach() for name, x in maps.items()} for maps in (inputs, targets)]
    with pytest.raises(ValueError, match="inputs must hold at least one image"):
        multiscale_roi_perceptual_loss(*empty, [], [])
