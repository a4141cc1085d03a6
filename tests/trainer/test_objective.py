"""The joint objective: terms, regions, and where gradients go."""

from dataclasses import replace

import pytest
import torch

import lidnet_fast
from lidnet_fast.models.detectors import build_detector
from lidnet_fast.models.windowing import HUWindow
from lidnet_fast.trainer.config import ObjectiveConfig
from lidnet_fast.trainer.objective import JointObjective

BOXES = [torch.tensor([[10.0, 12, 22, 26]]), torch.zeros(0, 4)]
PLAIN = ObjectiveConfig(roi_perceptual=0.0, detection=0.0)


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(0)
    return build_detector("faster_rcnn_small").eval().requires_grad_(False)


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    normal = torch.rand(2, 1, 64, 64, generator=generator)
    return (normal + 0.1 * torch.randn(normal.shape, generator=generator)).requires_grad_(), normal


def objective(config: ObjectiveConfig) -> JointObjective:
    return JointObjective(config, HUWindow())


def test_plain_objective_is_the_mean_square_error_and_needs_no_detector(images) -> None:
    denoised, normal = images
    found = objective(PLAIN)(denoised, normal, BOXES, detector=None)
    torch.testing.assert_close(found.total, torch.nn.functional.mse_loss(denoised, normal))
    assert set(found.terms) == {"mse"}
    assert set(found.losses) == {"pixel"}


def test_total_is_the_weighted_sum_of_the_terms(detector, images) -> None:
    denoised, normal = images
    config = replace(PLAIN, perceptual=0.3, roi_perceptual=0.2, detection=0.1, regions="boxes")
    torch.manual_seed(0)
    found = objective(config)(denoised, normal, BOXES, detector)
    terms = found.terms
    expected = terms["mse"] + 0.3 * terms["perceptual"] + 0.2 * terms["roi_perceptual"] + 0.1 * terms["detection"]
    torch.testing.assert_close(found.total.detach(), expected)
    torch.testing.assert_close(found.losses["roi_perceptual"].detach(), 0.2 * terms["roi_perceptual"])


def test_roi_term_is_the_public_loss_over_feature_variance(detector, images) -> None:
    denoised, normal = images
    config = replace(PLAIN, roi_perceptual=1.0, regions="boxes", levels=1, grow=0.0)
    terms = objective(config)(denoised, normal, BOXES, detector).terms
    window = HUWindow()
    found, target = (detector.features(window.clamp(x))["0"] for x in (denoised.detach(), normal))
    loss = lidnet_fast.roi_perceptual_loss(found, target, BOXES, 7, 1 / detector.feature_strides["0"])
    torch.testing.assert_close(terms["roi_perceptual"], loss / target.var((0, 2, 3)).mean())


def test_roi_gradient_stays_near_the_regions(detector, images) -> None:
    denoised, normal = images
    config = replace(PLAIN, pixel={"mse": 1e-12}, roi_perceptual=1.0, regions="boxes")
    objective(config)(denoised, normal, BOXES, detector).total.backward()
    gradient = denoised.grad.abs()
    assert gradient[0].max() > 1e-4
    assert gradient[1].max() < 1e-6 * gradient[0].max()


@pytest.mark.parametrize(("regions", "count"), [("boxes", 1), ("proposals", 6), ("both", 7)])
def test_regions(detector, images, regions: str, count: int) -> None:
    _, normal = images
    config = ObjectiveConfig(regions=regions, proposal_score=0.0, proposals_per_image=3, grow=2.0)
    found = objective(config).regions(normal, detector.features(normal), BOXES, detector)
    assert sum(len(boxes) for boxes in found.boxes) == len(found.weights) == count
    for boxes in found.boxes:
        assert (boxes >= 0).all() and (boxes <= 64).all()
    if regions != "proposals":
        assert found.boxes[0][0].tolist() == [8, 10, 24, 28]
        assert found.weights[0] == 1


def test_no_regions_give_a_zero_term(detector, images) -> None:
    denoised, normal = images
    config = replace(PLAIN, roi_perceptual=1.0, regions="boxes")
    terms = objective(config)(denoised, normal, [BOXES[1], BOXES[1]], detector).terms
    assert terms["roi_perceptual"] == 0


def test_roi_weight_raises_the_lesions_share(images) -> None:
    denoised, normal = images
    heavy = objective(replace(PLAIN, roi_weight=1e6, grow=0.0))(denoised, normal, BOXES, None).total
    lesion = (denoised - normal)[0, 0, 12:26, 10:22].square().mean()
    torch.testing.assert_close(heavy, lesion, rtol=1e-2, atol=0)
