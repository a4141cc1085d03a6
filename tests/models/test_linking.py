"""Boxes of neighbouring slices become candidates."""

import numpy as np
import pytest
import torch
from torchvision.ops import box_iou

from lidnet_fast.data.formats.geometry import Geometry
from lidnet_fast.models.linking import link

GEOMETRY = {
    "shape": (9, 64, 64),
    "spacing": (2.5, 0.7, 0.8),
    "origin": (-20.0, -30.0, 100.0),
    "orientation": (1, 0, 0, 0, 1, 0),
}


def found(*pairs):
    boxes = torch.tensor([box for box, _ in pairs], dtype=torch.float32).reshape(-1, 4)
    return {"boxes": boxes, "scores": torch.tensor([score for _, score in pairs])}


A, SHIFTED, FAR = (10, 10, 20, 20), (14, 10, 24, 20), (40, 40, 50, 50)


def test_by_hand():
    """A lesion on three slices beside one on a slice of its own; a gap of one slice parts."""
    slices = [found((A, 0.3)), found((A, 0.9), (FAR, 0.5)), found((SHIFTED, 0.6)), found(), found((A, 0.2))]
    candidates = link(slices)
    assert [candidate.score for candidate in candidates] == pytest.approx([0.9, 0.5, 0.2])
    best, alone, after = candidates
    assert best.slices.tolist() == [0, 1, 2] and best.box == (0, 2, 10, 10, 24, 20)
    assert alone.box == (1, 1, 40, 40, 50, 50)
    assert after.slices.tolist() == [4]


def test_the_threshold_is_inclusive():
    share = float(box_iou(torch.tensor([A]).float(), torch.tensor([SHIFTED]).float()))
    slices = [found((A, 0.5)), found((SHIFTED, 0.5))]
    assert len(link(slices, share)) == 1 and len(link(slices, share + 1e-6)) == 2


def test_chains_join_boxes_of_one_slice():
    """Two boxes on a slice that don't touch, and one on the next that both overlap."""
    left, right, both = (10, 10, 20, 20), (21, 10, 31, 20), (10, 10, 31, 20)
    (candidate,) = link([found((left, 0.5), (right, 0.4)), found((both, 0.6))], 0.3)
    assert candidate.slices.tolist() == [0, 0, 1]
    assert len(link([found((left, 0.5), (right, 0.4))], 0.3)) == 2


def test_nothing():
    assert link([]) == [] and link([found(), found()]) == []


def test_centre_in_mm_weighted_by_scores():
    (candidate,) = link([found((A, 0.25)), found((A, 0.75))])
    centre = candidate.centre(Geometry(**GEOMETRY).to_patient)
    # 14.5 pixels from the centre of the first one; three quarters of the way from slice 0 to slice 1.
    assert centre == pytest.approx([-20 + 14.5 * 0.8, -30 + 14.5 * 0.7, 100 + 0.75 * 2.5])


def test_centre_on_oblique_slices_and_where_slices_lie_unevenly():
    rows, columns = np.array([0.8, 0.6, 0]), np.array([-0.36, 0.48, 0.8])
    geometry = Geometry(**{**GEOMETRY, "orientation": (*rows, *columns)})
    place = geometry.to_patient(np.array([3]), np.array([[10.5, 20.5]]))[0]
    normal = np.cross(rows, columns)
    expected = np.array(GEOMETRY["origin"]) + 10 * 0.8 * rows + 20 * 0.7 * columns + 3 * 2.5 * normal
    assert place == pytest.approx(expected)


def brute_force(slices, iou):
    """Number of groups, by merging until nothing changes."""
    nodes = [(z, box) for z, one in enumerate(slices) for box in one["boxes"]]
    groups = list(range(len(nodes)))
    for _ in nodes:
        for i, (z, box) in enumerate(nodes):
            for j, (other_z, other) in enumerate(nodes):
                if abs(z - other_z) == 1 and box_iou(box[None], other[None]) >= iou:
                    groups[i] = groups[j] = min(groups[i], groups[j])
    return groups


@pytest.mark.parametrize("seed", range(3))
def test_against_brute_force(seed):
    generator = torch.Generator().manual_seed(seed)
    slices = []
    for _ in range(6):
        corner = torch.rand(5, 2, generator=generator) * 25
        boxes = torch.cat([corner, corner + 4 + torch.rand(5, 2, generator=generator) * 6], dim=1)
        slices.append({"boxes": boxes, "scores": torch.rand(5, generator=generator)})
    candidates = link(slices, 0.1)
    sizes = np.bincount(brute_force(slices, 0.1))
    assert sorted(len(candidate.scores) for candidate in candidates) == sorted(sizes[sizes > 0].tolist())
    assert max(len(candidate.scores) for candidate in candidates) > 1
    scores = [candidate.score for candidate in candidates]
    assert scores == sorted(scores, reverse=True)
