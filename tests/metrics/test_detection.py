import numpy as np
import pytest
import torch
from torchvision.ops import box_iou

from lidnet_fast.metrics import DetectionMetrics, froc


def sample(seed, images=12):
    generator = torch.Generator().manual_seed(seed)
    found, lesions = [], []
    for _ in range(images):
        corner = torch.rand(int(torch.randint(4, (1,), generator=generator)), 2, generator=generator) * 90
        truth = torch.cat([corner, corner + 6 + 10 * torch.rand(len(corner), 1, generator=generator)], dim=1)
        near = truth + torch.randn(truth.shape, generator=generator)
        far = torch.rand(5, 2, generator=generator) * 90
        every = torch.cat([near, torch.cat([far, far + 12], dim=1)])
        scores = torch.rand(len(every), generator=generator)
        scores[: len(near)] = scores[: len(near)].sqrt()
        found.append({"boxes": every, "scores": scores})
        lesions.append(truth)
    return found, lesions


def brute_force_ap(found, lesions, threshold):
    """COCO's average precision from its definition: greedy matching by score, 101 recall points."""
    marks, total = [], 0
    for one, truth in zip(found, lesions, strict=True):
        free = list(range(len(truth)))
        total += len(truth)
        for k in one["scores"].argsort(descending=True):
            overlap = [(float(box_iou(one["boxes"][k][None], truth[t][None])), t) for t in free]
            best = max(overlap, default=(0.0, -1))
            if best[0] >= threshold:
                free.remove(best[1])
            marks.append((float(one["scores"][k]), best[0] >= threshold))
    hits = np.cumsum([hit for _, hit in sorted(marks, key=lambda m: -m[0])])
    recall, precision = hits / total, hits / np.arange(1, len(hits) + 1)
    return np.mean([precision[recall >= r].max(initial=0) for r in np.linspace(0, 1, 101)])


@pytest.mark.parametrize("seed", range(3))
def test_average_precision_against_its_definition(seed):
    found, lesions = sample(seed)
    metrics = DetectionMetrics()
    for start in range(0, len(found), 5):
        metrics.update(found[start : start + 5], lesions[start : start + 5])
    assert metrics.count == len(found)
    values = metrics.compute()
    expected = [brute_force_ap(found, lesions, t) for t in np.linspace(0.5, 0.95, 10)]
    assert 0.05 < expected[0] < 0.95
    assert values["ap50"] == pytest.approx(expected[0], abs=1e-5)
    assert values["ap"] == pytest.approx(np.mean(expected), abs=1e-5)
    curve = froc(found, lesions)
    assert values["froc_mean"] == curve.mean and values["froc"] == curve.sensitivities
    assert np.array_equal(values["curve"]["false_positives"], curve.false_positives)
    assert np.array_equal(values["curve"]["sensitivity"], curve.sensitivity)


def test_perfect_detector():
    _, lesions = sample(0)
    metrics = DetectionMetrics()
    metrics.update([{"boxes": b, "scores": torch.full((len(b),), 0.9)} for b in lesions], lesions)
    values = metrics.compute()
    assert values["ap50"] == pytest.approx(1) and values["ap"] == pytest.approx(1) and values["froc_mean"] == 1


def test_only_the_best_hundred_detections_count():
    box = torch.tensor([[10.0, 10, 20, 20]])
    elsewhere = torch.tensor([[50.0, 50, 60, 60]]).repeat(100, 1)
    metrics = DetectionMetrics()
    # The hit scores lowest of 101 and comes first in the list.
    scores = torch.cat([torch.tensor([0.1]), torch.linspace(0.2, 0.9, 100)])
    metrics.update([{"boxes": torch.cat([box, elsewhere]), "scores": scores}], [box])
    assert len(metrics.detections[0]["scores"]) == 100
    values = metrics.compute()
    assert values["ap50"] == 0 and values["froc_mean"] == 0


def test_nothing_to_find_and_nothing_found():
    empty = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0)}
    box = torch.tensor([[10.0, 10, 20, 20]])
    metrics = DetectionMetrics()
    metrics.update([empty], [box])
    values = metrics.compute()
    assert values["ap50"] == 0 and values["ap"] == 0 and values["froc_mean"] == 0
    metrics.reset()
    assert metrics.count == 0
    metrics.update([{"boxes": box, "scores": torch.ones(1)}], [torch.zeros(0, 4)])
    values = metrics.compute()
    assert values["ap50"] is None and values["ap"] is None and values["froc_mean"] is None
    assert set(values["froc"].values()) == {None} and len(values["curve"]["sensitivity"]) == 0


def test_compute_needs_images():
    with pytest.raises(ValueError, match="no images"):
        DetectionMetrics().compute()


def test_bad_input_changes_nothing():
    box = torch.tensor([[10.0, 10, 20, 20]])
    metrics = DetectionMetrics()
    with pytest.raises(ValueError, match="detections for 1 images and boxes for 2"):
        metrics.update([{"boxes": box, "scores": torch.ones(1)}], [box, box])
    with pytest.raises(ValueError, match=r"detections\[1\] has 1 boxes and 2 scores"):
        metrics.update([{"boxes": box, "scores": torch.ones(n)} for n in (1, 2)], [box, box])
    assert metrics.count == 0
