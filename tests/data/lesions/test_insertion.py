import numpy as np
import pytest

from lidnet_fast.data.lesions.insertion import CONTRASTS, DIAMETERS, Insertion, draw_lesions, insert_lesions
from lidnet_fast.data.lesions.places import TissueDepth
from lidnet_fast.errors import InputError

SPACING = (2.5, 0.8, 0.8)


def chest(depth=9):
    """A lung of 84 mm in soft tissue."""
    y, x = np.mgrid[:128, :128] - 64
    slice_ = np.where(np.hypot(y, x) < 34, -850, 40)
    slice_[np.hypot(y, x) > 60] = -1000
    return np.repeat(slice_[None], depth, 0).astype(np.int16)


def test_lesions_are_where_the_boxes_are_and_nowhere_else():
    before, volume = chest(), chest()
    boxes = insert_lesions([volume], SPACING, Insertion(6), "1.2.3")
    assert len(np.unique(boxes[:, 0])) > 1
    changed = np.abs(volume.astype(int) - before) > 8
    for z, x1, y1, x2, y2 in boxes:
        assert changed[int(z), round(y1) : round(y2), round(x1) : round(x2)].mean() > 0.5
    for z in range(len(volume)):
        for _, x1, y1, x2, y2 in boxes[boxes[:, 0] == z]:
            changed[z, int(y1) - 4 : int(y2) + 5, int(x1) - 4 : int(x2) + 5] = False
    # Slices that a lesion's cap barely touches have no box.
    assert changed.mean() < 2e-3


def test_low_dose_gets_the_same_lesions():
    normal, low = chest(), chest() + np.int16(7)
    insert_lesions([normal, low], SPACING, Insertion(3), "1.2.3")
    assert (low - normal == 7).all()


def test_a_pure_function_of_seed_and_series():
    first = draw_lesions(chest(), SPACING, Insertion(4), "1.2.3")
    assert draw_lesions(chest(), SPACING, Insertion(4), "1.2.3") == first
    assert draw_lesions(chest(), SPACING, Insertion(4), "1.2.4") != first
    assert draw_lesions(chest(), SPACING, Insertion(4, seed=1), "1.2.3") != first


def test_sizes_tissues_and_contrasts():
    lesions = draw_lesions(chest(30), SPACING, Insertion(40), "1.2.3")
    assert {lesion.tissue for lesion in lesions} == set(CONTRASTS)
    for lesion in lesions:
        low, high = CONTRASTS[lesion.tissue]
        assert low <= abs(lesion.contrast) <= high
        assert DIAMETERS[0] <= lesion.diameter <= DIAMETERS[1]
    assert min(lesion.contrast for lesion in lesions) < 0


def test_no_room_no_lesions():
    assert len(insert_lesions([np.full((3, 64, 64), -1000, np.int16)], SPACING, Insertion(2), "1")) == 0


def test_one_slice_without_a_distance():
    assert len(insert_lesions([chest(1)], (0.0, 0.8, 0.8), Insertion(2), "1")) == 2


def test_places_keep_their_distance():
    depth, rng = TissueDepth(chest(1)[0], (0.8, 0.8)), np.random.default_rng(0)
    taken = []
    while (place := depth.place(rng, 6.0, ["lung"], taken)) is not None:
        assert np.hypot(place[0] - 64, place[1] - 64) * 0.8 < 34 * 0.8 - 3
        taken.append((place[0], place[1], 6.0))
    assert len(taken) > 4
    places = np.array(taken)[:, :2] * 0.8
    distances = np.linalg.norm(places[:, None] - places, axis=-1)[~np.eye(len(places), dtype=bool)]
    assert distances.min() > 12


def test_at_least_one():
    with pytest.raises(InputError, match="insert_lesions must be at least 1, got 0"):
        Insertion(0)
