"""The joint objective: terms, regions, and where gradients go."""

from dataclasses import replace

import pytest
import torch

import lidnet_fast
from lidnet_fast import backend
from lidnet_fast.errors import InputError
from lidnet_fast.models.denoisers import build_denoiser
from lidnet_fast.models.detectors import build_detector
from lidnet_fast.models.windowing import HUWindow
from lidnet_fast.trainer.config import ObjectiveConfig
from lidnet_fast.trainer.objective import JointObjective

BOXES = [torch.tensor([[10.0, 12, 22, 26]]), torch.zeros(0, 4)]
PLAIN = ObjectiveConfig(roi_weight=1.0, roi_perceptual=0.0, detection=0.0)


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
    joint = objective(config)
    found = joint.regions(normal, BOXES, joint.read_normal_dose(normal, detector, None).proposals)
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


@pytest.mark.parametrize("regions", ["boxes", "both"])
def test_cached_normal_dose_changes_nothing_and_is_computed_once(detector, images, monkeypatch, regions: str) -> None:
    denoised, normal = images
    config = replace(PLAIN, roi_perceptual=1.0, perceptual=0.5, regions=regions, proposal_score=0.0)
    plain = objective(config)(denoised, normal, BOXES, detector)
    cached = JointObjective(config, HUWindow(), detector_cache_mib=16)
    detect = JointObjective._detect
    seen = []
    monkeypatch.setattr(JointObjective, "_detect", lambda self, x, d: (seen.append(len(x)), detect(self, x, d))[1])
    for ids in (["a", "b"], ["b", "a"], ["a", "c"]):
        order = [0, 1] if ids[0] == "a" else [1, 0]
        boxes = [BOXES[n] for n in order]
        found = cached(denoised[order], normal[order], boxes, detector, ids=ids)
        torch.testing.assert_close(found.total, plain.total)
    assert seen == [1, 1, 1]
    assert cached.cache.hit_rate == 0.5

    with torch.no_grad():
        next(detector.parameters()).add_(0)  # what a step of the detector does
    cached(denoised, normal, BOXES, detector, ids=["a", "b"])
    assert seen == [1] * 5


EXTRACTOR = replace(PLAIN, roi_extractor=0.5, extractor="squeezenet1_1:features.3", regions="boxes", grow=0.0)


def test_extractor_term_is_the_public_loss_on_imagenets_scale(images) -> None:
    denoised, normal = images
    detector = build_detector("faster_rcnn_small").eval().requires_grad_(False)
    found = objective(EXTRACTOR)(denoised, normal, BOXES, detector)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = lidnet_fast.extractors.load_network("squeezenet1_1")
    loss = lidnet_fast.ROIPerceptualLoss(network, "features.3", mean="imagenet")
    window = HUWindow()
    expected = loss(window.clamp(denoised), window.clamp(normal), BOXES)
    torch.testing.assert_close(found.terms["roi_extractor"], expected.detach())
    torch.testing.assert_close(found.losses["roi_extractor"], 0.5 * expected)


@pytest.mark.parametrize(("regions", "passes"), [("boxes", 0), ("both", 1)])
def test_the_extractor_term_asks_the_detector_for_proposals_alone(detector, images, monkeypatch, regions, passes):
    features, seen = type(detector).features, []
    monkeypatch.setattr(type(detector), "features", lambda self, x: seen.append(x) or features(self, x))
    found = objective(replace(EXTRACTOR, regions=regions))(*images, BOXES, detector)
    assert len(seen) == passes
    assert found.terms["roi_extractor"] > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extractor": "vgg99:relu1_1"}, "extractor 'vgg99:relu1_1', weights None: torchvision has no network 'vgg99'"),
        ({"extractor": "vgg11:relu9_1"}, "has no layer 'relu9_1'"),
        ({"extractor_weights": "nowhere/vgg.pt"}, "weights 'nowhere/vgg.pt': .*No such file"),
        ({"extractor_weights": "NEWEST"}, "vgg11 has no weights 'NEWEST'; it has IMAGENET1K_V1, or give a file"),
    ],
)
def test_bad_extractors(change, message) -> None:
    with pytest.raises(InputError, match=message):
        objective(replace(EXTRACTOR, **{"extractor": "vgg11:relu2_1", **change}))


@pytest.mark.slow
def test_fused_and_reference_training_agree(detector) -> None:
    """Two hundred steps of a small denoiser under all terms: the same losses and weights, but for rounding."""
    config = replace(
        EXTRACTOR,
        pixel={"mse": 1.0, "ssim": 0.1, "edge": 0.05},
        roi_weight=3.0,
        roi_perceptual=0.01,
        detection=0.005,
        regions="both",
        proposal_score=0.0,
    )
    histories, weights = [], []
    for ops in ("reference", "fused"):
        if ops not in backend.available():
            pytest.skip("no kernels here")
        backend.use(ops)
        torch.manual_seed(0)
        denoiser, joint = build_denoiser("small", channels=4), objective(config)
        optimizer = torch.optim.SGD(denoiser.parameters(), 0.02)
        generator = torch.Generator().manual_seed(1)
        history = []
        for step in range(200):
            normal = torch.nn.functional.avg_pool2d(torch.rand(2, 1, 52, 52, generator=generator), 5, 1)
            low = normal + 0.1 * torch.randn(normal.shape, generator=generator)
            torch.manual_seed(step)
            total = joint(denoiser(low), normal, BOXES, detector).total
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            history.append(float(total.detach()))
        histories.append(torch.tensor(history))
        weights.append(torch.cat([p.detach().flatten() for p in denoiser.parameters()]))
    backend.use(None)
    assert histories[0][-20:].mean() < histories[0][:20].mean()
    torch.testing.assert_close(histories[1], histories[0], rtol=1e-3, atol=1e-5)
    assert (weights[1] - weights[0]).norm() <= 1e-3 * weights[0].norm()
