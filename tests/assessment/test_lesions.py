import numpy as np
import pytest
from scipy import ndimage
from torchvision.transforms.functional import gaussian_blur

from lidnet_fast.assessment.arms import Arm, low_dose_arm
from lidnet_fast.assessment.cases import Case, phantom_cases, store_cases
from lidnet_fast.assessment.lesions import LesionAssessment
from lidnet_fast.assessment.options import AssessOptions
from lidnet_fast.assessment.scanner import Scene
from lidnet_fast.data.lesions.signal import Lesion, lesion_signal
from lidnet_fast.data.prepare.plan import prepare
from lidnet_fast.data.store.reader import Store

OPTIONS = AssessOptions(diameters=(4.0, 8.0), cases=3, case_realisations=6)
SPACING = (0.8, 0.8)


def make_case(number):
    """Lung within a body, two lesions."""
    y, x = np.mgrid[:160, :160] - 80
    hu = np.where(np.hypot(y, x) < 75, 40.0, -1000.0)
    hu[np.hypot(y, x) < 60] = -850
    scene = Scene(hu, SPACING, (32, 32, 96, 96), (0, number))
    lesions = (Lesion((0, 30, 40), 8.0, 300.0, tissue="lung"), Lesion((0, 65, 60), 4.0, 150.0, tissue="lung"))
    return Case(
        f"case {number}", scene, lesions, tuple(lesion_signal(one, (96, 96), (1.0, *SPACING)) for one in lesions)
    )


def pasted(images):
    images = images.clone()
    images[..., 44:52, 20:28] += 400
    return images


@pytest.fixture(scope="module")
def results():
    arms = [low_dose_arm(), Arm("blur", lambda images: gaussian_blur(images, 21, 3.0)), Arm("paste", pasted)]
    assessment = LesionAssessment(OPTIONS, arms, 0.2)
    assert len(list(assessment.measure([make_case(n) for n in range(6)]))) == 6
    return assessment.results()


def test_nothing_denoised_erases_and_invents_nothing(results):
    low = results.arms["low dose"]
    assert [lesion["retained"] for lesion in low["lesions"]] == pytest.approx([1.0] * 12, abs=1e-4)
    assert low["survival"][0] == 1
    assert low["images"] == 36
    for kind in ("bright", "dark"):
        assert low[kind][1] <= OPTIONS.false_alarm_rate <= low[kind][2]


def test_a_blur_erases_what_its_kernel_says(results):
    case = make_case(0)
    for lesion, (window, patch) in zip(results.arms["blur"]["lesions"], case.signals, strict=False):
        image = np.zeros((96, 96))
        image[window] = patch
        expected = (ndimage.gaussian_filter(image, 3.0)[window] * patch).sum() / (patch**2).sum()
        assert lesion["retained"] == pytest.approx(expected, rel=0.02)
    by_size = {row["diameter_mm"]: row["survival"][0] for row in results.arms["blur"]["survival_by_diameter"]}
    assert by_size == {4.0: 0, 8.0: 1}
    by_contrast = results.arms["blur"]["survival_by_contrast"]["lung"]
    assert [(row["contrast_hu"], row["survival"][0]) for row in by_contrast] == [(150, 0), (300, 1)]


def test_a_pasted_blob_is_an_invention(results):
    assert results.arms["paste"]["bright"][0] == 1
    assert results.arms["paste"]["survival"][0] == 1


def test_the_worst_are_shown(results):
    assert [shown.arm for shown in results.erased] == ["blur"] * 3
    assert [shown.arm for shown in results.invented] == ["paste"] * 3
    (box,) = results.invented[0].marks["paste"]
    assert box[0] <= 24 <= box[2] and box[1] <= 48 <= box[3]
    assert list(results.erased[0].images) == ["truth", "low dose", "blur", "paste"]


def test_every_case_has_a_map_of_every_arm(results):
    assert len(results.maps) == 6
    for case in results.maps.values():
        assert list(case) == ["low dose", "blur", "paste"]
        height, width = np.unravel_index(case["paste"].argmax(), case["paste"].shape)
        assert 44 <= 2 * height < 52
        assert 20 <= 2 * width < 28
        assert case["paste"].max() > results.threshold
        assert case["low dose"].min() < 0


def test_phantom_cases_are_free_of_lesions_but_their_own():
    options = AssessOptions(cases=4, lesions_per_case=4)
    cases = list(phantom_cases(options))
    kinds = [(lesion.diameter, round(lesion.contrast)) for case in cases for lesion in case.lesions]
    assert len(set(kinds)) >= 14  # 4 sizes x 4 contrasts, one after the other, where there is room
    for case in cases:
        assert case.scene.view.shape == (256, 256)
        for lesion in case.lesions:
            y, x = (round(place) for place in lesion.centre[1:])
            assert case.signal[y, x] == pytest.approx(lesion.contrast, rel=0.15)
        assert len(case.boxes()) == len(case.lesions)
    assert (next(phantom_cases(options)).scene.hu == cases[0].scene.hu).all()


def test_cases_on_real_ct(real_ct, tmp_path):
    """Slices of four patients, and the fifth's, which alone is in the test split."""
    options = AssessOptions(diameters=(4.0, 8.0), cases=4, case_realisations=2, lesions_per_case=2)
    for splits, expected in (({}, 4), ({"splits": real_ct.splits}, 1)):
        store = tmp_path / f"store{expected}"
        prepare(real_ct.sources, store, resample=True, **splits or {"val_fraction": 0, "test_fraction": 0})
        cases = list(store_cases(Store(store), options))
        assert len({case.name for case in cases}) == expected
        assert all(case.lesions for case in cases)
    assessment = LesionAssessment(options, [low_dose_arm()], 0.25, noisy=True)
    list(assessment.measure(cases))
    low = assessment.results().arms["low dose"]
    assert [lesion["retained"] for lesion in low["lesions"]] == pytest.approx([1.0] * len(low["lesions"]), abs=1e-3)
    assert low["bright"][1] <= 0.05 and low["dark"][1] <= 0.05
