import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from lidnet_fast import MultiLoss, ROIPerceptualLoss, multi_loss, roi_perceptual_loss
from lidnet_fast.extractors import LayerExtractor

BOXES = [torch.tensor([[2.0, 3, 11, 9], [20, 4, 27.5, 12]]), torch.tensor([[5.0, 5, 9, 10]])]


def network():
    layers = (nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(4, 5, 3, padding=1))
    return nn.Sequential(*layers).double()


def images():
    return [torch.rand(2, 1, 16, 32, dtype=torch.float64) for _ in range(2)]


@pytest.mark.parametrize("halo", ["exact", "auto", "whole"])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_roi_perceptual_loss_is_the_weighted_sum_over_layers(assert_near, reduction, halo):
    extractor, (denoised, normal_dose) = network(), images()
    weights = torch.rand(3)
    loss = ROIPerceptualLoss(
        extractor, {"1": 0.5, "3": 2.0}, halo, output_size=3, sampling_ratio=1, criterion="l1", reduction=reduction
    )
    value = loss(denoised.requires_grad_(), normal_dose, BOXES, weights)

    def features(x):
        x = x.expand(-1, 3, -1, -1)
        return extractor[:2](x), extractor(x)

    leaf = denoised.detach().clone().requires_grad_()
    options = {"criterion": "l1", "box_weights": weights, "reduction": reduction}
    with torch.no_grad():
        targets = features(normal_dose)
    parts = [
        roi_perceptual_loss(x, y, BOXES, 3, scale, 1, **options)
        for x, y, scale in zip(features(leaf), targets, (1.0, 0.5), strict=True)
    ]
    expected = 0.5 * parts[0] + 2.0 * parts[1]
    assert_near(value, expected)
    upstream = torch.randn(value.shape, dtype=torch.float64)
    value.backward(upstream)
    expected.backward(upstream)
    assert_near(denoised.grad, leaf.grad)


def test_layers_may_be_a_name_or_names(assert_near):
    extractor, pair = network(), images()
    alone = [ROIPerceptualLoss(extractor, layer)(*pair, BOXES) for layer in ("1", "3")]
    assert_near(ROIPerceptualLoss(extractor, ["1", "3"])(*pair, BOXES), sum(alone))
    assert not alone[0].isclose(alone[1])


def test_roi_perceptual_loss_without_boxes():
    denoised, normal_dose = images()
    loss = ROIPerceptualLoss(network(), "3")(denoised.requires_grad_(), normal_dose, [torch.zeros(0, 4)] * 2)
    loss.backward()
    assert loss == 0
    assert torch.equal(denoised.grad, torch.zeros_like(denoised))


def test_autocast_of_the_extractor_gives_a_float32_loss(assert_near):
    extractor, (denoised, normal_dose) = network().float(), (x.float() for x in images())
    loss = ROIPerceptualLoss(extractor, "3")
    exact = loss(denoised, normal_dose, BOXES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = loss(denoised, normal_dose, BOXES)
    assert half.dtype == torch.float32
    assert half != exact
    assert_near(half, exact, tolerance=5e-2)


@pytest.mark.parametrize("halo", ["exact", "whole"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_images_of_shorter_dtypes_are_computed_in_the_extractors(dtype, halo):
    loss = ROIPerceptualLoss(network(), "3", halo)
    denoised, normal_dose = (x.to(dtype) for x in images())
    value = loss(denoised.requires_grad_(), normal_dose, BOXES)
    assert torch.equal(value, loss(denoised.double(), normal_dose.double(), BOXES))
    value.backward()
    assert denoised.grad.dtype == dtype
    pairs = zip(*(x.to(dtype) for x in images()), strict=True)
    lists = [list(of_list) for of_list in zip(*pairs, strict=True)]
    assert loss(*lists, BOXES).dtype == torch.float64


@pytest.mark.parametrize("halo", ["exact", "whole"])
@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float16), (torch.float16, torch.bfloat16)]
)
def test_images_of_two_dtypes_are_promoted(dtypes, halo, assert_near):
    loss = ROIPerceptualLoss(network().float(), "3", halo)
    denoised, normal_dose = (x.to(dtype) for x, dtype in zip(images(), dtypes, strict=True))
    value = loss(denoised.requires_grad_(), normal_dose, BOXES)
    assert torch.equal(value, loss(denoised.float(), normal_dose.float(), BOXES))
    assert torch.equal(value, loss(list(denoised), list(normal_dose), BOXES))
    with torch.autocast("cpu", torch.bfloat16):
        half = loss(denoised, normal_dose, BOXES)
    assert half.dtype == torch.float32
    assert_near(half, value, tolerance=5e-2)


def test_images_of_longer_dtypes_are_refused():
    loss, pair = ROIPerceptualLoss(network().float(), "3"), images()
    with pytest.raises(
        TypeError, match=r"denoised must be of the extractor's dtype, torch.float32, .* To fix: denoised.to"
    ):
        loss(*pair, BOXES)
    with pytest.raises(
        TypeError, match=r"normal_dose must be of the extractor's dtype, torch.float32, .* got torch.float64"
    ):
        loss(pair[0].float(), pair[1], BOXES)
    with pytest.raises(ValueError, match=r"denoised must have shape \[N, C, H, W\], got \(1, 16, 32\)"):
        loss(pair[0][0].float(), pair[1][0].float(), BOXES)
    assert loss.double()(*pair, BOXES).dtype == torch.float64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"halo": 16}, "halo must be one of exact, auto, whole, got 16"),
        ({"halo": "tight"}, "halo must be one of exact, auto, whole, got 'tight'"),
        ({"cache_mib": -1}, "cache_mib must be at least 0, got -1"),
        ({"layers": "33"}, "has no layer '33'; near it are 3"),
        ({"layers": []}, "layers must name at least one layer"),
        ({"layers": {"3": float("nan")}}, r"layers\['3'\] must be a finite weight, got nan"),
        ({"output_size": 0}, "output_size must be"),
        ({"criterion": "vgg"}, "criterion must be one of"),
        ({"reduction": "max"}, "reduction must be one of"),
        ({"sampling_ratio": -3}, "sampling_ratio must be"),
    ],
)
def test_bad_options_of_roi_perceptual_loss(options, message):
    with pytest.raises(ValueError, match=message):
        ROIPerceptualLoss(**{"extractor": network(), "layers": "3", **options})


def test_bad_images_of_roi_perceptual_loss():
    loss, (denoised, normal_dose) = ROIPerceptualLoss(network(), "3"), images()
    with pytest.raises(ValueError, match="normal_dose must have the shape of denoised"):
        loss(denoised, normal_dose[:1], BOXES)
    with pytest.raises(ValueError, match="normal_dose requires a gradient"):
        loss(denoised, normal_dose.requires_grad_(), BOXES)


def test_multi_loss_module_keeps_its_options():
    denoised, normal_dose = images()
    weights = {"l1": 0.4, "ssim": 0.6}
    for boxes, roi_weight in ((None, None), (BOXES, 3.0)):
        actual = MultiLoss(weights, roi_weight=roi_weight, data_range=2.0)(denoised, normal_dose, boxes)
        expected = multi_loss(denoised, normal_dose, weights, boxes=boxes, roi_weight=roi_weight, data_range=2.0)
        assert torch.equal(actual.total, expected.total)
        assert actual.terms == expected.terms


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": {"psnr": 1.0}}, "a term of weights must be one of .*got 'psnr'"),
        ({"weights": {}}, "weights must name at least one term"),
        ({"roi_weight": -1}, "roi_weight must be a finite number above 0, got -1"),
        ({"data_range": 0}, "data_range must be a finite number above 0, got 0"),
    ],
)
def test_bad_options_of_multi_loss(options, message):
    with pytest.raises(ValueError, match=message):
        MultiLoss(**{"weights": {"mse": 1.0}, **options})


def test_modules_print_their_options():
    assert "layers={3: 1}, halo='exact', output_size=(7, 7)" in repr(ROIPerceptualLoss(network(), "3"))
    assert "weights={'mse': 1.0}" in repr(MultiLoss({"mse": 1.0}))


def test_the_total_can_be_walked_back_from_the_output():
    denoised, normal_dose = images()
    multi_loss(denoised.requires_grad_(), normal_dose, {"mse": 1.0}).backward()
    assert torch.allclose(denoised.grad, 2 * (denoised - normal_dose).detach() / denoised.numel())


@pytest.mark.parametrize(("layers", "same"), [(3, "3"), ([1, 3], ["1", "3"]), ({1: 0.5, 3: 2.0}, {"1": 0.5, "3": 2.0})])
def test_layers_may_be_numbers(layers, same):
    extractor, pair = network(), images()
    assert ROIPerceptualLoss(extractor, layers)(*pair, BOXES) == ROIPerceptualLoss(extractor, same)(*pair, BOXES)


def test_imagenets_mean_and_std_have_a_name():
    pair = images()
    torch.manual_seed(0)
    named = ROIPerceptualLoss(network(), "3", mean="imagenet")
    given = ROIPerceptualLoss(named.extractor.network, "3", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    assert named(*pair, BOXES) == given(*pair, BOXES)


def test_losses_in_units_of_the_features_variance(assert_near):
    """The same for an extractor whose features are a hundred times as large, whatever the layer."""
    extractor, (denoised, normal_dose), seen = network(), images(), torch.rand(3, 1, 20, 24, dtype=torch.float64)
    plain = [ROIPerceptualLoss(extractor, layer) for layer in ("1", "3")]
    features = LayerExtractor(extractor, ["1", "3"])(seen)
    variances = [features[layer].var((0, 2, 3)).mean() for layer in ("1", "3")]
    expected = sum(loss(denoised, normal_dose, BOXES) / v for loss, v in zip(plain, variances, strict=True))
    loss = ROIPerceptualLoss(extractor, ["1", "3"], normalise_by=seen)
    assert_near(loss(denoised, normal_dose, BOXES), expected)
    whole = ROIPerceptualLoss(extractor, ["1", "3"], "whole", normalise_by=seen)
    assert_near(whole(denoised, normal_dose, BOXES), expected)
    other = ROIPerceptualLoss(extractor, ["1", "3"], normalise_by=seen[:1])
    other.load_state_dict(loss.state_dict())
    assert_near(other(denoised, normal_dose, BOXES), expected)
    with torch.no_grad():
        extractor[3].weight *= 100
        extractor[3].bias *= 100
    assert_near(ROIPerceptualLoss(extractor, ["1", "3"], normalise_by=seen)(denoised, normal_dose, BOXES), expected)


SEEN = torch.rand(2, 1, 8, 8, dtype=torch.float64)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (
            SEEN.numpy(),
            TypeError,
            r"normalise_by must be a Tensor, got ndarray. To fix: torch.as_tensor\(normalise_by\)",
        ),
        ([SEEN], TypeError, r"normalise_by must be a Tensor, got list. To fix: torch.stack\(normalise_by\)"),
        (SEEN.long(), TypeError, r"normalise_by must be float32, .* To fix: normalise_by.float\(\)"),
        (SEEN[0], ValueError, r"normalise_by must have shape \[N, C, H, W\], got \(1, 8, 8\)"),
        (SEEN.expand(2, 2, 8, 8), ValueError, "normalise_by must have 1 or 3 channels, got 2"),
        (
            torch.zeros_like(SEEN),
            ValueError,
            "normalise_by must have images that aren't constant.* To fix: give normal-",
        ),
        (SEEN[..., :1, :1].expand_as(SEEN), ValueError, "normalise_by must have images that aren't constant"),
        (SEEN[:0], ValueError, r"normalise_by must have images .*got shape \(0, 1, 8, 8\)"),
        (
            torch.full_like(SEEN, torch.nan),
            ValueError,
            "normalise_by must be finite, got NaN or infinity. To fix: give",
        ),
        (
            SEEN - 1e6,
            ValueError,
            "normalise_by must give layer '1' features that vary, their variance is 1e-12. To fix:",
        ),
    ],
)
def test_what_cannot_normalise_is_refused(given, error, message):
    extractor = network()
    nn.init.ones_(extractor[0].weight)
    with pytest.raises(error, match=message):
        ROIPerceptualLoss(extractor, "1", normalise_by=given)


def test_a_number_that_is_no_layer_is_answered_with_the_module_of_that_number():
    message = (
        r"has no layer '3'; near it are 0.3. To fix: choose one of lidnet_fast.extractors.layer_names\(extractor\)"
    )
    with pytest.raises(ValueError, match=message):
        ROIPerceptualLoss(nn.Sequential(network()), 3)


def test_the_state_dict_can_leave_the_extractor_out():
    extractor, pair = network(), images()
    model = nn.ModuleDict({"loss": ROIPerceptualLoss(extractor, "3", normalise_by=pair[1], save_extractor=False)})
    state = model.state_dict()
    assert list(state) == ["loss.variances"]
    other = nn.ModuleDict({"loss": ROIPerceptualLoss(extractor, "3", normalise_by=pair[0], save_extractor=False)})
    copied = copy.deepcopy(other)
    for loaded in (other, copied, pickle.loads(pickle.dumps(other))):
        loaded.load_state_dict(state)
        assert loaded["loss"](*pair, BOXES) == model["loss"](*pair, BOXES)
    full = ROIPerceptualLoss(extractor, "3", normalise_by=pair[1])
    assert any(key.startswith("extractor.") for key in full.state_dict())
    other["loss"].load_state_dict(full.state_dict())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mean": 0.5}, TypeError, r"mean must be one number per channel, such as \(0.5,\), got 0.5"),
        ({"mean": (0.0,) * 3, "std": 2}, TypeError, "std must be one number per channel"),
        ({"mean": "imagenet1k"}, ValueError, "mean must be numbers, or \"imagenet\" without std, got 'imagenet1k'"),
        ({"mean": "imagenet", "std": (1.0,) * 3}, ValueError, 'or "imagenet" without std'),
        ({"outside": "drop"}, ValueError, "outside must be one of keep, ignore, got 'drop'"),
    ],
)
def test_bad_normalisation(options, error, message):
    with pytest.raises(error, match=message):
        ROIPerceptualLoss(network(), "3", **options)


def test_swapped_arguments_of_plan_are_told():
    loss = ROIPerceptualLoss(network(), "3")
    for boxes in (BOXES, BOXES[0]):
        with pytest.raises(TypeError, match=r"image_size must be \(H, W\) or \(D, H, W\), then boxes; got "):
            loss.plan(boxes, (16, 32))
    assert loss.plan((np.int64(16), 32), BOXES).windows == loss.plan((16, 32), BOXES).windows


PREPARED = torch.tensor([[0.0, 2, 3, 11, 9], [0, 20, 4, 27.5, 12], [1, 5, 5, 9, 10]])


@pytest.mark.parametrize("halo", ["exact", "whole"])
@pytest.mark.parametrize(("weights", "options"), [(None, {}), (torch.tensor([1.0, 2, 3]), {"reduction": "none"})])
def test_prepared_boxes(halo, weights, options):
    """The same to the bit, also after others were there."""
    loss, (denoised, normal_dose) = ROIPerceptualLoss(network(), "3", halo, **options), images()
    expected = loss(denoised, normal_dose, PREPARED, weights)
    prepared = loss.prepare(denoised, PREPARED, weights)
    assert torch.equal(loss(denoised, normal_dose, prepared), expected)
    assert torch.equal(
        loss(denoised.float(), normal_dose, prepared), loss(denoised.float(), normal_dose, PREPARED, weights)
    )
    prepared.replace(PREPARED - torch.tensor([0.0, 1, 1, 1, 1]), None if weights is None else weights + 1)
    assert not torch.equal(loss(denoised, normal_dose, prepared), expected)
    prepared.replace(PREPARED, weights)
    assert torch.equal(loss(denoised, normal_dose, prepared), expected)


def test_no_prepared_boxes():
    loss, pair = ROIPerceptualLoss(network(), "3"), images()
    prepared = loss.prepare(pair[0], torch.zeros(0, 5))
    assert loss(*pair, prepared) == 0
    prepared.replace([torch.zeros(0, 4)] * 2)


def test_prepared_boxes_say_what_they_cannot_do():
    loss, pair = ROIPerceptualLoss(network(), "3", "whole"), images()
    prepared = loss.prepare(pair[0], PREPARED)
    for other in (PREPARED[:2], PREPARED[[0, 1, 1]]):
        with pytest.raises(
            ValueError, match=r"boxes must have windows of the same kinds .*whole images: 2, with boxes: 3\), got"
        ):
            prepared.replace(other)
    with pytest.raises(ValueError, match=r"\(boxes that count: 3; .* got \(boxes that count: 3, weighted"):
        prepared.replace(PREPARED, torch.ones(3))
    with pytest.raises(ValueError, match=r"boxes\[1\] must have finite"):
        prepared.replace(PREPARED.index_fill(0, torch.tensor([1]), torch.nan))
    with pytest.raises(ValueError, match="box_weights and sample_ids must be None for prepared boxes"):
        loss(*pair, prepared, torch.ones(3))
    with pytest.raises(ValueError, match=r"boxes were prepared for images of \(2, 1, 16, 32\) .* got \(1, 1, 16, 32\)"):
        loss(pair[0][:1], pair[1][:1], prepared)
    with pytest.raises(ValueError, match="lists of images need"):
        loss(list(pair[0]), list(pair[1]), prepared)
    with pytest.raises(ValueError, match="denoised must have shape"):
        loss.prepare(pair[0][0], PREPARED)
