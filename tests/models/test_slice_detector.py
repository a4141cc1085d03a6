"""A detector on whole slices, in tiles of the size that it was trained on."""

from itertools import pairwise

import pytest
import torch

from lidnet_fast.models.detectors import build_detector
from lidnet_fast.models.slice_detector import OVERLAP, SliceDetector, _spans
from lidnet_fast.models.windowing import HUWindow

CPU = torch.device("cpu")


class Bright(torch.nn.Module):
    """Finds the one bright rectangle of an image, wholly or in part, with its share of the image as score."""

    nms_threshold, max_detections = 0.5, 100

    def __init__(self):
        super().__init__()
        self.seen = []

    def detect(self, images):
        self.seen.append(tuple(images.shape[-2:]))
        found = []
        for image in images[:, 0]:
            rows, columns = (image > 0.9).nonzero(as_tuple=True)
            boxes = torch.zeros(0, 4)
            if len(rows):
                boxes = torch.tensor([[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]]).float()
            found.append({"boxes": boxes, "scores": torch.full((len(boxes),), len(rows) / image.numel())})
        return found


@pytest.mark.parametrize("place", [(0, 0), (100, 90), (127, 126), (190, 30), (228, 188)])
def test_a_lesion_anywhere_is_found_once_and_whole(place):
    row, column = place
    hu = torch.full((2, 1, 240, 200), -1000.0)
    hu[1, 0, row : row + 12, column : column + 12] = 400
    detector = SliceDetector(Bright(), HUWindow(), 128, CPU)
    nothing, found = detector(hu)
    assert len(nothing["scores"]) == 0
    assert found["boxes"].tolist() == [[column, row, column + 12, row + 12]]
    assert set(detector.detector.seen) == {(128, 128)}


def test_without_tiles_it_is_the_detector_itself():
    torch.manual_seed(0)
    detector = build_detector("faster_rcnn_small", score_threshold=0.0, max_detections=7).eval()
    window, hu = HUWindow(), torch.rand(2, 1, 96, 80) * 1400 - 1000
    expected = detector.detect(window.clamp(window.scale(hu)))
    for tile in (None, 96, 500):
        for one, other in zip(SliceDetector(detector, window, tile, CPU)(hu), expected, strict=True):
            torch.testing.assert_close(one["boxes"], other["boxes"])
            torch.testing.assert_close(one["scores"], other["scores"])


@pytest.mark.parametrize(("size", "tile"), [(512, 256), (512, 128), (130, 128), (97, 32), (300, 299)])
def test_tiles_cover_an_axis_and_answer_for_each_place_once(size, tile):
    spans = list(_spans(size, tile))
    places = [place for place, _ in spans]
    assert places[0].start == 0 and places[-1].stop == size
    assert {place.stop - place.start for place in places} == {tile}
    overlap = min(one.stop - other.start for one, other in pairwise(places))
    assert overlap >= min(OVERLAP, tile // 2)
    borders = [end for _, ends in spans for end in ends]
    assert borders[0] == -torch.inf and borders[-1] == torch.inf and borders[1:-1:2] == borders[2:-1:2]
    for place, (first, last) in spans:
        assert place.start == 0 or first >= place.start + overlap / 2 - 1
        assert place.stop == size or last <= place.stop - overlap / 2 + 1
