from itertools import pairwise

import numpy as np
import pytest
import torch
from torchvision.ops import box_iou

from lidnet_fast.metrics import FALSE_POSITIVES, froc

A = [10.0, 10.0, 20.0, 20.0]
B = [40.0, 40.0, 50.0, 50.0]
FAR = [70.0, 70.0, 80.0, 80.0]


def detections(*pairs):
    return {
        "boxes": torch.tensor([box for box, _ in pairs]).reshape(-1, 4),
        "scores": torch.tensor([score for _, score in pairs]),
    }


def boxes(*rows):
    return torch.tensor(rows).reshape(-1, 4)


def test_by_hand():
    """Two images, three lesions; going down the scores: hit, false, hit tied with false, repeated hit, false."""
    found = [
        detections((A, 0.9), (FAR, 0.8), (A, 0.4)),
        detections((A, 0.7), (FAR, 0.7), (FAR, 0.2)),
    ]
    result = froc(found, [boxes(A, B), boxes(A)])
    assert result.false_positives.tolist() == [0.0, 0.0, 0.5, 1.0, 1.5]
    assert result.sensitivity.tolist() == pytest.approx([0, 1 / 3, 1 / 3, 2 / 3, 2 / 3])
    expected = {1 / 8: 1 / 3, 1 / 4: 1 / 3, 1 / 2: 1 / 3, 1: 2 / 3, 2: 2 / 3, 4: 2 / 3, 8: 2 / 3}
    assert result.sensitivities == pytest.approx(expected)
    assert result.mean == pytest.approx(sum(expected.values()) / 7)


def test_linear_between_points():
    found = [detections((FAR, 0.9), (A, 0.9), (FAR, 0.5), (FAR, 0.4), (B, 0.4))]
    result = froc(found, [boxes(A, B)], (0.5, 1, 2, 3, 4))
    # (0, 0), (1, .5), (2, .5), (3, 1)
    assert list(result.sensitivities.values()) == pytest.approx([0.25, 0.5, 0.5, 1, 1])


def test_hits_without_further_false_positives_lead_straight_up():
    """A hit, a false positive, and a hit below it: up to one false positive, the second hit doesn't count."""
    result = froc([detections((A, 0.9), (FAR, 0.8), (B, 0.7))], [boxes(A, B)], (0.5, 0.99, 1))
    assert list(zip(result.false_positives, result.sensitivity, strict=True)) == [(0, 0), (0, 0.5), (1, 0.5), (1, 1)]
    assert list(result.sensitivities.values()) == [0.5, 0.5, 1]


def test_repeated_hits_are_neither_true_nor_false():
    result = froc([detections((A, 0.9), (A, 0.8), (A, 0.7))], [boxes(A)])
    assert result.false_positives.tolist() == [0.0, 0.0] and result.sensitivity.tolist() == [0.0, 1.0]
    assert result.mean == 1.0


def test_iou_threshold_is_inclusive():
    half = [10.0, 10.0, 20.0, 15.0]
    assert froc([detections((half, 0.9))], [boxes(A)]).mean == 1.0
    assert froc([detections((half, 0.9))], [boxes(A)], iou_threshold=0.51).mean == 0.0


def test_no_detections():
    result = froc([detections(), detections()], [boxes(A), boxes()])
    assert result.mean == 0.0 and result.sensitivity.tolist() == [0.0]


def test_no_lesions():
    result = froc([detections((A, 0.9))], [boxes()])
    assert result.mean is None and result.sensitivities == dict.fromkeys(FALSE_POSITIVES)
    assert len(result.false_positives) == len(result.sensitivity) == 0


def test_straight_stretches_lose_their_inner_points_only():
    found = [detections(*((FAR, 0.9 - k / 1000) for k in range(100)), (A, 0.5), *((FAR, 0.4) for _ in range(9)))]
    result = froc(found, [boxes(A)])
    assert result.false_positives.tolist() == [0, 100, 100, 109]
    assert result.sensitivity.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("count", [(0, 0), (1, 2)])
def test_bad_counts(count):
    with pytest.raises(ValueError, match=f"at least one: got {count[0]}, {count[1]}"):
        froc([detections()] * count[0], [boxes()] * count[1])


def brute_force(found, lesions, rates, threshold):
    """The definition, one score at a time."""
    scores = sorted({float(s) for one in found for s in one["scores"]}, reverse=True)
    points = [(0.0, 0.0)]
    for score in scores:
        hits, wrong, total = 0, 0, 0
        for one, truth in zip(found, lesions, strict=True):
            kept = [b for b, s in zip(one["boxes"], one["scores"], strict=True) if float(s) >= score]
            overlap = [[float(box_iou(b[None], t[None])) >= threshold for t in truth] for b in kept]
            wrong += sum(not any(row) for row in overlap)
            hits += sum(any(row[k] for row in overlap) for k in range(len(truth)))
            total += len(truth)
        points.append((wrong / len(found), hits / total))

    def read(rate):
        """On the stretch that the rate lies in; at its end, the highest point there."""
        at = [y for x, y in points if x == rate]
        if at or rate > points[-1][0]:
            return max(at or [points[-1][1]])
        (x1, y1), (x2, y2) = next(pair for pair in pairwise(points) if pair[0][0] < rate < pair[1][0])
        return y1 + (y2 - y1) * (rate - x1) / (x2 - x1)

    return np.array([read(rate) for rate in rates])


@pytest.mark.parametrize("seed", range(5))
def test_against_brute_force(seed):
    generator = torch.Generator().manual_seed(seed)
    found, lesions = [], []
    for _ in range(6):
        corner = torch.rand(int(torch.randint(4, (1,), generator=generator)), 2, generator=generator) * 50
        truth = torch.cat([corner, corner + 12], dim=1)
        near = truth.repeat(3, 1) + torch.randn(3 * len(truth), 4, generator=generator) * 2
        far = torch.rand(8, 2, generator=generator) * 50
        every = torch.cat([near, torch.cat([far, far + 12], dim=1)])
        scores = (torch.rand(len(every), generator=generator) * 12).round() / 12  # with ties
        found.append({"boxes": every, "scores": scores})
        lesions.append(truth)
    rates = np.concatenate([FALSE_POSITIVES, np.linspace(0, 9, 50)])
    result = froc(found, lesions, tuple(rates))
    expected = brute_force(found, lesions, rates, 0.5)
    assert 0.2 < expected.max() < 1.01
    curve = np.interp(rates, result.false_positives, result.sensitivity)
    np.testing.assert_allclose(curve, expected, atol=1e-12)
    assert list(result.sensitivities) == list(dict.fromkeys(rates))
    for rate, value in zip(rates, expected, strict=True):
        assert result.sensitivities[rate] == pytest.approx(value, abs=1e-12)
