"""Records give the metrics of their samples: torchmetrics' average precision, FROC, image quality."""

from pathlib import Path

import numpy as np
import pytest
import torch

from lidnet_fast.comparison.records import Record, findings, joined_examples
from lidnet_fast.comparison.statistics import average_precision, froc_mean, plain_metrics
from lidnet_fast.errors import InputError
from lidnet_fast.evaluation.arms import Evaluation, Example
from lidnet_fast.metrics import DetectionMetrics, ImageQuality
from lidnet_fast.models.windowing import HUWindow


def random_detections(seed: int, images: int) -> tuple[list[dict[str, torch.Tensor]], list[torch.Tensor]]:
    """Detections near lesions and elsewhere, several on some lesions, with ties among their scores."""
    rng = np.random.default_rng(seed)
    detections, boxes = [], []
    for _ in range(images):
        corners = rng.integers(0, 80, (rng.integers(0, 4), 2))
        lesions = np.hstack([corners, corners + rng.integers(5, 20, corners.shape)]).astype(np.float32)
        near = np.repeat(lesions, rng.integers(0, 4), axis=0) + rng.normal(0, 1.5, (1, 4))
        near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
        elsewhere = rng.uniform(0, 60, (rng.integers(0, 6), 2))
        found = np.vstack([near, np.hstack([elsewhere, elsewhere + 12])]).astype(np.float32)
        scores = rng.random(len(found)).round(1 if seed % 2 else 6).astype(np.float32)
        detections.append({"boxes": torch.from_numpy(found), "scores": torch.from_numpy(scores)})
        boxes.append(torch.from_numpy(lesions))
    return detections, boxes


@pytest.mark.parametrize("seed", range(6))
def test_detection_metrics_are_those_of_torchmetrics_and_froc(seed: int) -> None:
    detections, boxes = random_detections(seed, images=40)
    metric = DetectionMetrics()
    metric.update(detections, boxes)
    expected = metric.compute()
    found = findings(metric.detections, metric.boxes)
    lesions = sum(map(len, boxes))
    weights = np.ones((1, len(boxes)))
    assert average_precision(found, weights, np.array([lesions]))[0] == pytest.approx(expected["ap50"], abs=1e-6)
    assert froc_mean(found, weights, np.ones((1, lesions)))[0] == pytest.approx(expected["froc_mean"], abs=1e-6)


def test_weights_are_how_often_a_sample_counts() -> None:
    detections, boxes = random_detections(0, images=12)
    weights = np.random.default_rng(1).integers(0, 3, 12)
    again = DetectionMetrics()
    again.update(*[[values[n] for n in np.repeat(np.arange(12), weights)] for values in (detections, boxes)])
    expected = again.compute()
    found = findings(detections, boxes)
    of_lesions = np.repeat(weights, [len(one) for one in boxes])[None].astype(float)
    samples = weights[None].astype(float)
    assert average_precision(found, samples, of_lesions.sum(1))[0] == pytest.approx(expected["ap50"], abs=1e-6)
    assert froc_mean(found, samples, of_lesions)[0] == pytest.approx(expected["froc_mean"], abs=1e-6)


def test_without_detections_or_lesions() -> None:
    nothing = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0)}
    one = torch.tensor([[0.0, 0, 5, 5]])
    silent = findings([nothing], [one])
    assert average_precision(silent, np.ones((1, 1)), np.ones(1)) == 0
    assert froc_mean(silent, np.ones((1, 1)), np.ones((1, 1))) == 0
    healthy = findings([{"boxes": one, "scores": torch.ones(1)}], [torch.zeros(0, 4)])
    assert np.isnan(average_precision(healthy, np.ones((1, 1)), np.zeros(1)))
    assert np.isnan(froc_mean(healthy, np.ones((1, 1)), np.zeros((1, 0))))


def evaluated(samples: int = 6) -> Evaluation:
    torch.manual_seed(0)
    detections, _ = random_detections(0, samples)
    boxes = [torch.tensor([[4.0, 5, 12, 14], [20, 20, 26, 25]])[: n % 3] for n in range(samples)]
    normal = torch.randn(samples, 1, 32, 32) * 100
    quality, detection = {}, {}
    for arm, noise in (("one", 10), ("two", 30)):
        quality[arm] = ImageQuality(HUWindow())
        quality[arm].update(normal + noise * torch.randn_like(normal), normal, boxes)
        detection[arm] = {"judge": DetectionMetrics(), "other": DetectionMetrics()}
        for metric in detection[arm].values():
            metric.update(detections, boxes)
    example = Example(1, boxes[1], dict.fromkeys(quality, normal[1, 0]), dict.fromkeys(quality, detections[1]))
    return Evaluation(quality, detection, [(n, 0, 0, 0, False, False) for n in range(samples)], [example])


def test_a_record_keeps_what_it_was_made_of(tmp_path: Path) -> None:
    evaluation = evaluated()
    Record.of(evaluation, "one", [0, 0, 1, 1, 2, 2]).save(tmp_path / "one.npz")
    Record.of(evaluation, "two", [0, 0, 1, 1, 2, 2]).save(tmp_path / "two.npz")
    assert Record.detectors_in(tmp_path / "one.npz") == ["judge", "other"]
    records = {arm: Record.load(tmp_path / f"{arm}.npz") for arm in ("one", "two")}
    for arm, record in records.items():
        expected = evaluation.flat()[arm]
        for name, value in plain_metrics(record).items():
            assert value == pytest.approx(expected[name], abs=1e-6), name
    (example,) = joined_examples(records)
    assert list(example.images) == ["one", "two"]
    assert torch.equal(example.boxes, evaluation.examples[0].boxes)
    assert torch.equal(example.images["two"], evaluation.examples[0].images["two"].round())
    assert torch.equal(example.detections["two"]["boxes"], evaluation.examples[0].detections["two"]["boxes"])


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    path = tmp_path / "cell.npz"
    Record.of(evaluated(), "one", [0, 0, 1, 1, 2, 2]).save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"cell\.npz is not the record of a cell"):
        Record.load(path)
    with pytest.raises(InputError, match=r"cell\.npz is not the record of a cell"):
        Record.detectors_in(path)
