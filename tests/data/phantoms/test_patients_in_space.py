"""Livers and heads: patients whose neighbouring slices cut the same anatomy and the same lesions."""

from dataclasses import replace

import numpy as np
import pytest

from lidnet_fast.data.phantoms import head, liver
from lidnet_fast.data.phantoms.head import HeadPhantom
from lidnet_fast.data.phantoms.liver import LiverPhantom
from lidnet_fast.data.phantoms.phantom import Phantom, PhantomPatient
from lidnet_fast.data.phantoms.study import STUDIES
from lidnet_fast.data.store.index import lesion_numbers
from lidnet_fast.errors import InputError

KINDS = {"liver": LiverPhantom(), "head": HeadPhantom()}
SIGN = {"liver": -1, "head": 1}
"""Whether lesions are darker or brighter than what they grow in."""
SEEDS = range(4)


@pytest.fixture(scope="module", params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def patients(kind: str) -> list[PhantomPatient]:
    return [KINDS[kind].make_patient(np.random.default_rng([7, n])) for n in SEEDS]


@pytest.fixture(scope="module")
def without_lesions(kind: str) -> list[PhantomPatient]:
    """The same patients before they fell ill: the generator draws lesions last."""
    phantom: Phantom = replace(KINDS[kind], lesions=(0, 0))  # type: ignore[call-arg]
    return [phantom.make_patient(np.random.default_rng([7, n])) for n in SEEDS]


def added(kind: str, ill: PhantomPatient, well: PhantomPatient) -> np.ndarray:
    """What lesions add in the direction of their contrast, HU."""
    return SIGN[kind] * (ill.volume - well.volume)


def test_a_patient_has_the_documented_arrays(kind, patients):
    for patient in patients:
        assert patient.volume.shape == (KINDS[kind].slices, 512, 512)
        assert patient.volume.dtype == patient.boxes.dtype == np.float32
        assert len(patient.boxes) == len(patient.annotated) > 0
        assert patient.annotated.all()
        assert (np.diff(patient.boxes[:, 0]) >= 0).all()
        assert patient.volume.min() == -1000


def test_the_same_generator_state_gives_the_same_patient(kind, patients):
    again = KINDS[kind].make_patient(np.random.default_rng([7, 0]))
    np.testing.assert_array_equal(again.volume, patients[0].volume)
    np.testing.assert_array_equal(again.boxes, patients[0].boxes)
    assert not np.array_equal(patients[1].volume, patients[0].volume)


def test_nothing_but_lesions_and_their_rims_is_added(kind, patients, without_lesions):
    margin = {"liver": 6, "head": 16}[kind]  # pixels: soft edges; haemorrhages have a rim of oedema
    for ill, well in zip(patients, without_lesions, strict=True):
        assert len(well.boxes) == 0
        changed = ill.volume != well.volume
        for z, x1, y1, x2, y2 in ill.boxes.astype(int):
            changed[z, max(y1 - margin, 0) : y2 + margin, max(x1 - margin, 0) : x2 + margin] = False
        assert not changed.any()


def test_boxes_are_tight(kind, patients, without_lesions):
    """Two fifths of a lesion's contrast, the opacity from which a pixel counts, is reached on each side of its box."""
    off = []
    for ill, well in zip(patients, without_lesions, strict=True):
        difference = added(kind, ill, well)
        for z, x1, y1, x2, y2 in ill.boxes.astype(int):
            y0, x0 = max(y1 - 3, 0), max(x1 - 3, 0)
            part = difference[z, y0 : y2 + 3, x0 : x2 + 3]
            seen = part > 0.4 * np.percentile(part, 95)
            rows, columns = np.flatnonzero(seen.any(1)) + y0, np.flatnonzero(seen.any(0)) + x0
            off += [abs(rows[0] - y1), abs(rows[-1] + 1 - y2), abs(columns[0] - x1), abs(columns[-1] + 1 - x2)]
    # Texture, and grey and white matter under one lesion, move an edge by a pixel or two.
    assert np.mean(off) < 1
    assert np.percentile(off, 95) <= 3


def test_sizes_and_contrasts_are_the_stated_ones(kind, patients, without_lesions):
    spacing = KINDS[kind].pixel_spacing
    largest = {"liver": liver.DIAMETERS_MM, "head": head.DIAMETERS_MM}[kind][1]
    sides, contrasts, densities = [], [], []
    for ill, well in zip(patients, without_lesions, strict=True):
        difference = added(kind, ill, well)
        for z, x1, y1, x2, y2 in ill.boxes.astype(int):
            sides.append(((x2 - x1) * (y2 - y1)) ** 0.5 * spacing)
            y, x = (y1 + y2) // 2, (x1 + x2) // 2
            middle = (z, slice(y - 1, y + 2), slice(x - 1, x + 2))
            contrasts.append(difference[middle].mean())
            densities.append(ill.volume[middle].mean())
    # Lobes and turned ellipses reach a little further than the mean diameter.
    assert max(sides) < 1.35 * largest
    assert max(sides) > 0.7 * largest
    if kind == "liver":  # less at caps that fill their slice in part; more where a lesion grew over a vessel
        assert np.percentile(contrasts, 5) > 0.6 * liver.CONTRASTS_HU[0]
        assert np.percentile(contrasts, 90) < 1.2 * liver.CONTRASTS_HU[1]
    else:
        assert np.percentile(densities, 5) > head.DENSITIES_HU[0] - 8
        assert max(densities) <= head.DENSITIES_HU[1] + 1


def test_lesions_go_on_in_the_next_slice(patients):
    shared = []
    for patient in patients:
        boxes = patient.boxes
        numbers = lesion_numbers(np.zeros(len(boxes), int), boxes[:, 0].astype(int), boxes[:, 1:])
        shared += np.bincount(numbers).tolist()
    assert np.mean(np.array(shared) > 1) > 0.4
    assert max(shared) >= 3


def test_slices_are_more_like_their_neighbours_than_like_those_further_on(kind, patients):
    window = STUDIES[kind].window
    for patient in patients:
        seen = np.clip(patient.volume, window.low, window.high)
        assert np.abs(np.diff(seen, axis=0)).mean() < 0.75 * np.abs(seen[-1] - seen[0]).mean()


def test_distractors_change_the_organ_and_get_no_box(kind):
    def volume(count: int) -> np.ndarray:
        phantom: Phantom = replace(KINDS[kind], slices=2, lesions=(0, 0), distractors=count)  # type: ignore[call-arg]
        patient = phantom.make_patient(np.random.default_rng(3))
        assert len(patient.boxes) == 0
        return patient.volume

    changed = np.abs(volume(30) - volume(0)) > 10
    assert 300 < changed.sum() < 0.05 * changed.size


def test_some_lesions_go_without_annotation_when_asked(kind):
    half = replace(KINDS[kind], lesions=(20, 20), slices=3, unannotated_fraction=0.5)  # type: ignore[call-arg]
    patient = half.make_patient(np.random.default_rng(5))
    assert 0.2 < patient.annotated.mean() < 0.8
    full = replace(half, unannotated_fraction=0.0).make_patient(np.random.default_rng(5))
    np.testing.assert_array_equal(full.boxes, patient.boxes)
    np.testing.assert_array_equal(full.volume, patient.volume)


def test_pixel_spacing_follows_the_field_of_view(kind):
    small = replace(KINDS[kind], image_size=128, slices=1)
    assert small.make_patient(np.random.default_rng(0)).volume.shape == (1, 128, 128)
    assert small.pixel_spacing == pytest.approx(small.field_of_view_mm / 128)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("image_size", 16),
        ("slices", 0),
        ("lesions", (3, 1)),
        ("lesions", (-1, 1)),
        ("unannotated_fraction", 1.5),
        ("distractors", -1),
        ("texture", float("nan")),
    ],
)
def test_bad_options_are_refused_by_name(kind, field, value):
    with pytest.raises(InputError, match=field):
        replace(KINDS[kind], **{field: value})


def shares(volume: np.ndarray, **ranges: tuple[float, float]) -> dict[str, float]:
    """Share of a volume's pixels in each range of HU."""
    return {name: float(((volume > low) & (volume < high)).mean()) for name, (low, high) in ranges.items()}


def test_the_tissues_of_an_abdomen_are_there_at_their_hu():
    for seed in SEEDS:
        volume = LiverPhantom(lesions=(0, 0)).make_patient(np.random.default_rng([8, seed])).volume
        share = shares(
            volume,
            air=(-1001, -970),
            fat=(-125, -85),
            muscle=(45, 75),
            liver=(92, 130),
            vessel=(140, 190),
            bone=(300, 600),
        )
        assert 0.3 < share["air"] < 0.75, share
        assert 0.06 < share["fat"] < 0.3, share
        assert 0.03 < share["muscle"] < 0.15, share
        assert 0.06 < share["liver"] < 0.25, share
        assert 0.001 < share["vessel"] < 0.05, share
        assert 0.002 < share["bone"] < 0.03, share


def test_the_tissues_of_a_head_are_there_at_their_hu():
    for seed in SEEDS:
        volume = HeadPhantom(lesions=(0, 0)).make_patient(np.random.default_rng([8, seed])).volume
        share = shares(volume, air=(-1001, -970), fluid=(2, 14), white=(28, 34.5), grey=(35.5, 43), bone=(400, 1500))
        assert 0.4 < share["air"] < 0.85, share
        assert 0.003 < share["fluid"] < 0.06, share
        assert 0.05 < share["white"] < 0.3, share
        assert 0.03 < share["grey"] < 0.2, share
        assert 0.04 < share["bone"] < 0.2, share
