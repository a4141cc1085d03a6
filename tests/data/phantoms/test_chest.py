import dataclasses
import itertools

import numpy as np
import pytest

from lidnet_fast.data.phantoms import lidc
from lidnet_fast.data.phantoms.canvas import Canvas, texture
from lidnet_fast.data.phantoms.chest import ChestPhantom
from lidnet_fast.errors import InputError

SMALL = ChestPhantom(image_size=256, slices=3)


@pytest.fixture(scope="module")
def patients():
    return [SMALL.make_patient(np.random.default_rng([1, n])) for n in range(4)]


@pytest.fixture(scope="module")
def full_size():
    phantom = ChestPhantom(slices=4, lesions_per_slice=(3, 3), vessel_trees=1)
    return [phantom.make_patient(np.random.default_rng([2, n])) for n in range(10)]


def test_a_patient_has_the_documented_arrays(patients):
    for patient in patients:
        assert patient.volume.shape == (3, 256, 256)
        assert patient.volume.dtype == patient.boxes.dtype == np.float32
        assert patient.boxes.shape == (len(patient.annotated), 5)
        assert patient.annotated.dtype == bool
        assert patient.annotated.all()
        assert patient.volume.min() == -1000


def test_the_same_generator_state_gives_the_same_patient(patients):
    again = SMALL.make_patient(np.random.default_rng([1, 0]))
    np.testing.assert_array_equal(again.volume, patients[0].volume)
    np.testing.assert_array_equal(again.boxes, patients[0].boxes)
    assert not np.array_equal(patients[1].volume, patients[0].volume)


def test_every_tissue_is_there_at_its_hu(patients):
    """Shares of the slice: air around, aerated lung, fat, soft tissue, bone."""
    for patient in patients:
        share = {
            name: ((patient.volume > low) & (patient.volume < high)).mean()
            for name, low, high in (
                ("air", -1001, -970),
                ("lung", -930, -780),
                ("fat", -125, -60),
                ("soft", 10, 80),
                ("bone", 300, 800),
            )
        }
        assert 0.3 < share["air"] < 0.7, share
        assert 0.1 < share["lung"] < 0.35, share
        assert 0.04 < share["fat"] < 0.3, share
        assert 0.04 < share["soft"] < 0.3, share
        assert 0.004 < share["bone"] < 0.06, share


def test_slices_of_a_patient_share_their_body(patients):
    def around(volume):
        return volume < -970

    within = np.mean([(around(p.volume[0]) ^ around(p.volume[1])).mean() for p in patients])
    between = np.mean([(around(p.volume[0]) ^ around(q.volume[0])).mean() for p, q in itertools.pairwise(patients)])
    assert within < 0.6 * between


def test_boxes_are_tight_around_what_differs_from_the_slice_without_the_lesion():
    """The same generator state with and without a lesion differs only where the lesion (and its spicules) is."""
    phantom = ChestPhantom(slices=1, lesions_per_slice=(1, 1), ground_glass_fraction=0.0)
    bare = dataclasses.replace(phantom, lesions_per_slice=(0, 0))
    checked = 0
    for seed in range(12):
        with_lesion = phantom.make_patient(np.random.default_rng(seed))
        without = bare.make_patient(np.random.default_rng(seed))
        assert len(without.boxes) == 0
        if not len(with_lesion.boxes):
            continue
        added = with_lesion.volume[0] - without.volume[0]
        _, x1, y1, x2, y2 = with_lesion.boxes[0].astype(int)
        # On every side the lesion reaches the box's last pixel, unless a denser vessel or wall hides it there.
        inside, hidden = added[y1:y2, x1:x2], without.volume[0, y1:y2, x1:x2] > -600
        for side in (0, -1):
            assert inside[side].max() > 100 or hidden[side].any()
            assert inside[:, side].max() > 100 or hidden[:, side].any()
        rows, columns = np.nonzero(added > 250)
        outside = (rows < y1) | (rows >= y2) | (columns < x1) | (columns >= x2)
        assert (added > 250)[y1:y2, x1:x2].mean() > 0.4
        # Spicules leave the box; the body of the nodule doesn't.
        assert outside.mean() < 0.35
        checked += 1
    assert checked >= 10


def test_boxes_lie_in_the_slice_and_are_at_least_three_pixels(patients, full_size):
    for patient in patients + full_size:
        z, x1, y1, x2, y2 = patient.boxes.T
        assert ((z >= 0) & (z < len(patient.volume)) & (z == z.round())).all()
        assert ((x2 - x1 >= 3) & (y2 - y1 >= 3)).all()
        assert (patient.boxes[:, 1:] >= 0).all()
        assert (patient.boxes[:, 3:] <= patient.volume.shape[1]).all()


def test_boxes_of_a_slice_keep_apart(full_size):
    for patient in full_size:
        for z in range(len(patient.volume)):
            boxes = patient.boxes[patient.boxes[:, 0] == z, 1:]
            for i, a in enumerate(boxes):
                for b in boxes[i + 1 :]:
                    assert a[0] >= b[2] or b[0] >= a[2] or a[1] >= b[3] or b[1] >= a[3]


def test_sizes_and_places_follow_the_table(full_size):
    boxes = np.concatenate([patient.boxes for patient in full_size])
    assert len(boxes) > 0.9 * 10 * 4 * 3
    geometry = lidc.lesion_geometry()
    for side, column in ((boxes[:, 3] - boxes[:, 1], 0), (boxes[:, 4] - boxes[:, 2], 1)):
        quartiles = np.percentile(side, [25, 50, 75])
        np.testing.assert_allclose(quartiles, np.percentile(geometry[:, column], [25, 50, 75]), rtol=0.25)
    centre = (boxes[:, 1] + boxes[:, 3]) / 2
    # Two lungs with the mediastinum between them.
    assert (centre < 215).mean() > 0.2
    assert (centre > 297).mean() > 0.2


def test_the_number_of_lesions_keeps_to_its_range():
    phantom = dataclasses.replace(SMALL, lesions_per_slice=(0, 2), vessel_trees=0, slices=12)
    patient = phantom.make_patient(np.random.default_rng(0))
    counts = np.bincount(patient.boxes[:, 0].astype(int), minlength=12)
    assert set(counts) == {0, 1, 2}


def test_ground_glass_is_fainter_than_solid():
    def mean_inside(fraction):
        phantom = ChestPhantom(slices=6, ground_glass_fraction=fraction, vessel_trees=0, distractors=0)
        patient = phantom.make_patient(np.random.default_rng(4))
        means = []
        for z, x1, y1, x2, y2 in patient.boxes.astype(int):
            cy, cx = (y1 + y2) // 2, (x1 + x2) // 2
            means.append(np.median(patient.volume[z, cy - 1 : cy + 2, cx - 1 : cx + 2]))
        return np.median(means)

    assert mean_inside(0.0) > -120
    assert -700 < mean_inside(1.0) < -200


def test_some_lesions_go_without_annotation_when_asked():
    phantom = dataclasses.replace(SMALL, unannotated_fraction=0.5, slices=20, vessel_trees=0)
    patient = phantom.make_patient(np.random.default_rng(3))
    assert 0.25 < patient.annotated.mean() < 0.75
    full = dataclasses.replace(phantom, unannotated_fraction=0.0).make_patient(np.random.default_rng(3))
    np.testing.assert_array_equal(full.boxes, patient.boxes)
    np.testing.assert_array_equal(full.volume, patient.volume)


def test_distractors_add_structures_but_no_boxes():
    def dense_lung_pixels(count):
        phantom = ChestPhantom(slices=2, distractors=count, lesions_per_slice=(0, 0), vessel_trees=0)
        patient = phantom.make_patient(np.random.default_rng(6))
        assert len(patient.boxes) == 0
        return (patient.volume > -400).sum()

    assert dense_lung_pixels(40) > dense_lung_pixels(0) + 40 * 8


def test_texture_has_unit_variance_at_any_size():
    for size in (128, 512):
        field = texture(np.random.default_rng(0), size)
        assert field.dtype == np.float32
        assert field.std() == pytest.approx(1, abs=0.1)
        assert field.mean() == pytest.approx(0, abs=1e-4)


def test_shapes_have_their_areas_and_may_leave_the_slice():
    canvas = Canvas(512)
    window, mask = canvas.ellipse(200, 180, 30, 12, 0.7)
    assert mask.sum() == pytest.approx(np.pi * 30 * 12, rel=0.02)
    assert mask[[0, -1]].max() == mask[:, [0, -1]].max() == 0
    _, mask = canvas.segment((100, 100), (160, 100), (5, 5))
    assert mask.sum() == pytest.approx(60 * 10 + np.pi * 25, rel=0.02)
    window, mask = canvas.ellipse(-100, -100, 20, 20)
    canvas.paint((window, mask), 50)
    assert (canvas.image == -1000).all()


def test_pixel_spacing_keeps_the_field_of_view():
    assert ChestPhantom().pixel_spacing == pytest.approx(0.7)
    assert SMALL.pixel_spacing == pytest.approx(1.4)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("image_size", 16),
        ("slices", 0),
        ("lesions_per_slice", (3, 1)),
        ("lesions_per_slice", (-1, 1)),
        ("ground_glass_fraction", 1.5),
        ("unannotated_fraction", -0.1),
        ("vessel_trees", -1),
        ("distractors", -1),
        ("texture", float("nan")),
    ],
)
def test_bad_options_are_refused_by_name(field, value):
    with pytest.raises(InputError, match=field):
        ChestPhantom(**{field: value})
