import math

import pytest
import torch
from torch import nn

from lidnet_fast.errors import InputError
from lidnet_fast.models import DETECTORS, LesionDetector, build_detector
from lidnet_fast.models.lesion_detector import OneStageDetector, TwoStageDetector

SMALL = ["faster_rcnn_small", "retinanet_small", "retinanet_small_fpn"]
BOX = torch.tensor([[10.0, 12.0, 24.0, 30.0]])
NONE = torch.zeros(0, 4)


def make(name, seed=0, **options) -> LesionDetector:
    torch.manual_seed(seed)
    return build_detector(name, **options)


def images(*shape, seed=1):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def blobs(count, generator, size=128):
    """Noise with up to three bright discs of 6 to 30 pixels per image, and their boxes."""
    pictures = 0.3 + 0.1 * torch.randn(count, 1, size, size, generator=generator)
    centres = torch.arange(size) + 0.5
    boxes = []
    for picture in pictures:
        discs = torch.zeros(0, 3)  # x, y, radius
        for _ in range(int(torch.randint(4, (1,), generator=generator))):
            radius = 3 * 5 ** torch.rand(1, generator=generator)
            x, y = radius + torch.rand(2, generator=generator) * (size - 2 * radius)
            if (torch.hypot(discs[:, 0] - x, discs[:, 1] - y) < discs[:, 2] + radius).any():
                continue
            contrast = 0.15 + 0.2 * torch.rand(1, generator=generator)
            picture[0] += contrast * (torch.hypot(centres - x, (centres - y)[:, None]) < radius)
            discs = torch.cat([discs, torch.stack([x, y, radius[0]])[None]])
        boxes.append(torch.cat([discs[:, :2] - discs[:, 2:], discs[:, :2] + discs[:, 2:]], dim=1))
    return pictures.clamp(0, 1), boxes


@pytest.mark.parametrize("name", DETECTORS)
def test_every_detector_end_to_end(name):
    detector = make(name)
    x = images(2, 1, 72, 90)
    features = detector.features(x)
    assert list(features) == list(detector.feature_strides)
    padded = [size + -size % max(detector.feature_strides.values()) for size in (72, 90)]
    for level, stride in detector.feature_strides.items():
        assert features[level].shape[-2:] == (padded[0] // stride, padded[1] // stride)
    losses = detector.losses(x, [BOX, NONE], features)
    assert all(loss.dim() == 0 and loss.isfinite() for loss in losses.values())
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad is not None for p in detector.parameters())
    for found in detector.eval().detect(x):
        assert found["boxes"].shape == (len(found["scores"]), 4)
        assert found["labels"].tolist() == [1] * len(found["scores"])
    assert isinstance(detector, TwoStageDetector if name.startswith("faster") else OneStageDetector)


def test_sure_negatives_keep_their_gradient_under_autocast():
    detector = make("retinanet_small")
    logits = detector.model.head.classification_head.cls_logits
    nn.init.constant_(logits.bias, -7.0)
    gradients = []
    for half in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            losses = detector.losses(images(1, 1, 64, 64), [NONE])
        gradients += torch.autograd.grad(losses["classification"], logits.bias)
    assert gradients[0].min() > 0
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0.05, atol=0)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", SMALL)
def test_shared_features_give_the_same_losses_and_gradients(name, training):
    detector = make(name).train(training)
    boxes = [BOX, NONE]
    results = []
    for share in (False, True):
        x = images(2, 1, 64, 64).requires_grad_()
        features = detector.features(x) if share else None
        torch.manual_seed(5)
        losses = detector.losses(x, boxes, features)
        (gradient,) = torch.autograd.grad(torch.stack(list(losses.values())).sum(), x)
        results.append((losses, gradient))
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])
    assert results[0][1].abs().sum() > 0


@pytest.mark.parametrize("name", ["faster_rcnn_small", "retinanet_small", "retinanet_resnet18_fpn"])
def test_losses_agree_with_torchvisions_forward(name):
    detector = make(name).train()
    x, boxes = images(2, 1, 70, 64), [BOX, NONE]
    state = {k: v.clone() for k, v in detector.state_dict().items()}
    torch.manual_seed(3)
    ours = detector.losses(x, boxes)
    detector.load_state_dict(state)
    torch.manual_seed(3)
    labels = [torch.ones(len(b), dtype=torch.int64) for b in boxes]
    theirs = detector.model(list(x), [{"boxes": b, "labels": n} for b, n in zip(boxes, labels, strict=True)])
    assert ours.keys() == theirs.keys()
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["faster_rcnn_small", "retinanet_small", "retinanet_resnet18_fpn"])
def test_detections_agree_with_torchvisions_forward(name):
    # A threshold below an untrained network's scores.
    detector = make(name, score_threshold=1e-4, max_detections=50).eval()
    x = images(2, 1, 70, 64)
    with torch.no_grad():
        theirs = detector.model(list(x))
    for ours, reference in zip(detector.detect(x), theirs, strict=True):
        # torchvision's RetinaNet keeps boxes without area, and an untrained one those of its unused class 0.
        kept = (reference["boxes"][:, 2:] > reference["boxes"][:, :2]).all(dim=1) & (reference["labels"] == 1)
        count = int(kept.sum())
        assert len(ours["scores"]) >= count > 15
        torch.testing.assert_close(ours["scores"][:count], reference["scores"][kept], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(ours["boxes"][:count], reference["boxes"][kept], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", SMALL)
def test_boxes_are_not_rounded_to_half_precision(name):
    """Far from the image's corner a lesion is smaller than bfloat16's steps."""
    detector = make(name, score_threshold=0.0).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (found,) = detector.detect(images(1, 1, 320, 320))
    assert found["boxes"].dtype == torch.float32
    far = found["boxes"][(found["boxes"] > 130).all(dim=1)]
    assert len(far) > 5
    assert (far % 1 != 0).any()


@pytest.mark.parametrize("name", SMALL)
def test_a_frozen_detector_stays_as_it_was(name):
    """Losses in eval mode change neither flags nor buffers, nor do they give the parameters gradients."""
    detector = make(name).eval().requires_grad_(False)
    before = {k: v.clone() for k, v in detector.state_dict().items()}
    x = images(2, 1, 64, 64).requires_grad_()
    torch.stack(list(detector.losses(x, [BOX, NONE]).values())).sum().backward()
    detector.detect(x)
    assert x.grad is not None and x.grad.abs().sum() > 0
    assert not any(module.training for module in detector.modules())
    assert all(torch.equal(v, before[k]) for k, v in detector.state_dict().items())
    assert all(p.grad is None for p in detector.parameters())


@pytest.mark.parametrize("name", SMALL)
def test_training_mode_survives_proposals(name):
    detector = make(name).train()
    detector.proposals(images(1, 1, 64, 64), score_threshold=0, max_per_image=5, nms_threshold=0.5)
    assert all(module.training for module in detector.modules())


@pytest.mark.parametrize("name", SMALL)
def test_losses_without_any_lesion(name):
    detector = make(name)
    losses = detector.losses(images(2, 1, 64, 64), [NONE, NONE])
    assert all(loss.isfinite() for loss in losses.values())
    torch.stack(list(losses.values())).sum().backward()


@pytest.mark.parametrize("name", SMALL)
def test_losses_are_a_function_of_the_generator(name):
    detector = make(name)
    values = []
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        losses = detector.losses(images(2, 1, 64, 64), [BOX, NONE])
        values.append([float(loss.detach()) for loss in losses.values()])
    assert values[0] == values[1]
    # RetinaNet samples nothing.
    assert (values[0] == values[2]) == name.startswith("retinanet")


@pytest.mark.parametrize("name", SMALL)
def test_proposals_obey_their_options(name):
    detector = make(name).eval()
    x = images(2, 1, 50, 70).requires_grad_()
    features = detector.features(x)
    options = {"max_per_image": 1000, "nms_threshold": 1.0, "score_threshold": 0.0}
    everything = detector.proposals(x, features, **options)
    for boxes, scores in everything:
        assert not boxes.requires_grad and not scores.requires_grad
        assert len(boxes) > 10
        assert (boxes[:, :2] >= 0).all() and (boxes[:, 2] <= 70).all() and (boxes[:, 3] <= 50).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        assert (scores.diff() <= 0).all()
    few = detector.proposals(x, **{**options, "max_per_image": 3})
    for (boxes, scores), (all_boxes, all_scores) in zip(few, everything, strict=True):
        assert torch.equal(boxes, all_boxes[:3]) and torch.equal(scores, all_scores[:3])
    middle = float(everything[0][1].median())
    above = detector.proposals(x, features, **{**options, "score_threshold": middle})
    assert len(above[0][1]) == int((everything[0][1] >= middle).sum())
    apart = detector.proposals(x, features, **{**options, "nms_threshold": 0.1})
    assert 0 < len(apart[0][0]) < len(everything[0][0])


@pytest.mark.parametrize("name", SMALL)
def test_forward_is_losses_or_detections(name):
    detector = make(name).eval()
    x = images(1, 1, 64, 64)
    assert detector(x, [BOX]).keys() == detector.losses(x, [BOX]).keys()
    assert detector(x)[0].keys() == {"boxes", "scores", "labels"}


@pytest.mark.parametrize("name", SMALL)
def test_bfloat16_autocast(name):
    """Anchors stay in float32, so that boxes and losses stay near those without autocast."""
    detector = make(name).eval()
    x, boxes = images(2, 1, 128, 128), [torch.tensor([[101.0, 103, 110, 113]]), BOX]
    torch.manual_seed(0)
    exact = detector.losses(x, boxes)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        rough = detector.losses(x, boxes)
        found = detector.detect(x)
    assert found[0]["boxes"].dtype == torch.float32
    for key in exact:
        torch.testing.assert_close(rough[key].float(), exact[key], rtol=0.05, atol=0.01)


@pytest.mark.parametrize("name", SMALL)
def test_state_dict_round_trip(name):
    first, second = make(name, seed=0).eval(), make(name, seed=1).eval()
    x = images(1, 1, 64, 64)
    options = {"score_threshold": 0.0, "max_per_image": 9, "nms_threshold": 0.5}
    second.load_state_dict(first.state_dict())
    ((boxes, scores),), ((boxes2, scores2),) = first.proposals(x, **options), second.proposals(x, **options)
    assert torch.equal(boxes, boxes2) and torch.equal(scores, scores2)


def test_the_judge_shares_nothing_with_the_training_detector():
    kinds = [{type(m) for m in make(name).model.backbone.modules()} for name in SMALL]
    assert nn.BatchNorm2d in kinds[0] and nn.BatchNorm2d not in kinds[1]
    assert kinds[0] & kinds[1] <= {nn.Conv2d, nn.Sequential}
    assert len(make(SMALL[1]).feature_strides) == 1


def test_anchors_fit_the_lesions_of_lidc():
    """A square lesion among LIDC's sizes has an anchor with an IoU that the RPN learns from, wherever it lies."""
    from torchvision.models.detection.image_list import ImageList
    from torchvision.ops import box_iou

    detector = make("faster_rcnn_small")
    x = images(1, 1, 96, 96)
    levels = list(detector.features(x).values())
    (anchors,) = detector.model.rpn.anchor_generator(ImageList(x, [(96, 96)]), levels)
    sides = [math.exp(2.56 + z * 0.52) for z in (-1.5, -0.5, 0.0, 0.5, 1.0, 2.0)]
    for side in sides:
        shift = torch.arange(0, 16, 1.3)
        corner = torch.cartesian_prod(24 + shift, 24 + shift)
        best = box_iou(torch.cat([corner, corner + side], dim=1), anchors).max(dim=1).values
        assert best.min() > 0.35, side
        assert best.mean() > 0.55, side


def test_pretrained_weights_keep_grey_images_responses(monkeypatch):
    """The one-channel stem answers as the three-channel one does to a grey image."""
    from torchvision.models import resnet

    from lidnet_fast.models.backbones import ResNetFPN

    torch.manual_seed(0)
    whole = resnet.resnet18()
    monkeypatch.setattr(resnet, "resnet18", lambda weights: whole)
    backbone = ResNetFPN("resnet18", weights="IMAGENET1K_V1")
    x = images(1, 1, 32, 32)
    torch.testing.assert_close(backbone.conv1(x), whole.conv1(x.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("faster_rcnn", {}, "unknown detector 'faster_rcnn'; did you mean 'faster_rcnn_small'"),
        ("yolo", {}, r"unknown detector 'yolo'. Known: faster_rcnn_resnet18_fpn, "),
        ("retinanet_small", {"nms": 1}, "unexpected keyword argument 'nms'; its options: anchor_sizes, weights, "),
        (
            "retinanet_small",
            {"weights": "DEFAULT"},
            "'retinanet_small' has no pretrained weights, got weights='DEFAULT'",
        ),
        ("retinanet_resnet18_fpn", {"weights": "V9"}, "resnet18 has no weights 'V9'; torchvision knows IMAGENET1K_V1"),
        ("retinanet_small", {"score_threshold": 2}, r"score_threshold must lie in \[0, 1\], got 2"),
        ("retinanet_small", {"image_std": 0}, "image_std must be positive, got 0"),
        ("retinanet_small", {"max_detections": 0}, "max_detections must be at least 1, got 0"),
        ("faster_rcnn_small", {"anchor_sizes": [[8]]}, "has 3 feature levels, got anchor_sizes for 1"),
        (
            "faster_rcnn_small",
            {"anchor_sizes": [[8], [16, 20], [32]]},
            "anchor_sizes needs positive sizes, equally many",
        ),
        ("faster_rcnn_small", {"anchor_sizes": []}, "anchor_sizes needs positive sizes"),
        ("faster_rcnn_small", {"anchor_sizes": [[], [], []]}, "anchor_sizes needs positive sizes"),
        ("faster_rcnn_small", {"nms_threshold": "low"}, "can't be made with {'nms_threshold': 'low'}"),
    ],
)
def test_bad_configuration(name, options, message):
    with pytest.raises(InputError, match=message) as error:
        build_detector(name, **options)
    assert "\n" not in str(error.value)


def test_anchor_sizes_are_taken():
    detector = make("faster_rcnn_small", anchor_sizes=[[10], [20], [40]])
    assert detector.model.rpn.anchor_generator.sizes == ((10,), (20,), (40,))


@pytest.mark.parametrize(
    "bad",
    [torch.rand(1, 3, 32, 32), torch.rand(1, 32, 32), torch.zeros(1, 1, 32, 32, dtype=torch.int16)],
)
def test_bad_images(bad):
    with pytest.raises(ValueError, match="images must be floating point"):
        make("retinanet_small").features(bad)


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([BOX], "one tensor per image: got 1 for 2"),
        ([BOX, torch.zeros(0)], r"boxes\[1\] must have shape \[L, 4\], got \[0\]"),
        ([BOX, torch.cat([BOX, BOX[:, [2, 1, 0, 3]]])], r"boxes\[1\]\[1\] is empty or not finite: \[24.0, "),
        ([torch.full((1, 4), math.nan), BOX], r"boxes\[0\]\[0\] is empty or not finite: \[nan"),
    ],
)
def test_bad_boxes(boxes, message):
    with pytest.raises(ValueError, match=message):
        make("faster_rcnn_small").losses(images(2, 1, 32, 32), boxes)


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_small_detectors_learn(name):
    """A hundred steps on bright discs in noise reach AP@0.5 far above chance (.9 and more when this was written)."""
    from lidnet_fast.metrics import DetectionMetrics

    detector, generator = make(name), torch.Generator().manual_seed(1)
    steps, rate = 100, 2e-3
    optimizer = torch.optim.AdamW(detector.parameters(), rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.05)
    for _ in range(steps):
        losses = detector.losses(*blobs(4, generator))
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        nn.utils.clip_grad_norm_(detector.parameters(), 5.0)
        optimizer.step()
        schedule.step()
    detector.eval()
    metrics = DetectionMetrics()
    for _ in range(5):
        x, boxes = blobs(8, generator)
        metrics.update(detector.detect(x), boxes)
    assert metrics.compute()["ap50"] > 0.7
