"""What makes slices one regular scan: complete, of one acquisition."""

import numpy as np
import pytest

from lidnet_fast.data.formats.dicom.series import scan
from lidnet_fast.data.prepare.plan import prepare
from lidnet_fast.data.store.reader import Store
from lidnet_fast.errors import InputError
from lidnet_fast.inference import denoise
from tests.inference.conftest import make_run, run

__all__ = ["make_run", "run"]


def zones(*parts, thick=None):
    """Heights and thicknesses of slices: (count, distance) each, one zone on top of the other."""
    heights, thicknesses = [0.0], []
    for count, distance in parts:
        thicknesses += [distance if thick is None else thick] * count
        heights += [heights[-1] + distance * (n + 1) for n in range(count)]
    return heights[: len(thicknesses)], thicknesses


def placed(heights, thicknesses=None, **values):
    """Slices at these heights, as thick as this; of the other values, each slice has its own."""

    def edit(z, dataset):
        dataset.ImagePositionPatient = [-20, -30, heights[z]]
        if thicknesses is not None:
            dataset.SliceThickness = thicknesses[z]
        for keyword, each in values.items():
            setattr(dataset, keyword, each[z])

    return edit


@pytest.mark.parametrize("parts", [[(12, 4), (8, 7)], [(8, 4), (12, 7)], [(6, 2.5), (20, 7.5)], [(20, 2.5), (2, 7.5)]])
def test_a_step_that_thickness_explains_misses_nothing(tmp_path, write_series, run, parts):
    """As heads are scanned, whichever zone is larger."""
    heights, thicknesses = zones(*parts)
    count = len(heights)
    hu = np.broadcast_to(np.rint(4 * np.array(heights, np.int16))[:, None, None], (count, 16, 16)).astype(np.int16)
    write_series(tmp_path / "ct", hu, edit=placed(heights, thicknesses))
    low, high = (min(distance for _, distance in parts), max(distance for _, distance in parts))
    with pytest.raises(InputError, match=rf"unevenly spaced, {low:g} to {high:g} mm apart. To fix: --resample"):
        scan([tmp_path / "ct"])
    prepare([tmp_path / "ct"], tmp_path / "store", resample=True, val_fraction=0, test_fraction=0)
    store = Store(tmp_path / "store")
    step = store.series[0].spacing[0]
    assert step == max(parts)[1]  # the larger zone's distance is the median
    for z in range(store.series[0].shape[0]):
        np.testing.assert_allclose(store.read(0, z), 4 * step * z, atol=2.5)
    assert denoise(tmp_path / "ct", tmp_path / "out", model=run).slices == count


@pytest.mark.parametrize(
    ("parts", "lost", "between"),
    [
        ([(12, 4), (8, 7)], 5, "16 and 24 mm; its slices are 4 mm"),
        ([(12, 4), (8, 7)], 15, "62 and 76 mm; its slices are 7 mm"),
        ([(12, 4), (8, 7)], 12, "44 and 55 mm; its slices are 7 mm"),
        ([(8, 4), (12, 7)], 3, "8 and 16 mm; its slices are 4 mm"),
    ],
)
def test_what_thickness_does_not_explain_is_missing(tmp_path, write_series, make_hu, parts, lost, between):
    heights, thicknesses = (values[:lost] + values[lost + 1 :] for values in zones(*parts))
    write_series(tmp_path, make_hu(len(heights), 16, 16), edit=placed(heights, thicknesses))
    with pytest.raises(InputError, match=f"slices are missing between {between} apart"):
        scan([tmp_path], accept="resampleable")


def test_a_step_without_another_thickness_is_missing_slices(tmp_path, write_series, make_hu):
    heights, thicknesses = zones((12, 4), (8, 7), thick=4)
    write_series(tmp_path, make_hu(20, 16, 16), edit=placed(heights, thicknesses))
    with pytest.raises(InputError, match=r"slices are missing between 48 and 55 mm, .* are 4 mm apart"):
        scan([tmp_path], accept="resampleable")


def test_thickness_that_is_rounded_differently_is_one(tmp_path, write_series, make_hu):
    heights = [1.25 * z for z in range(8)]
    edit = placed(heights, [1.25 + 1e-4 * (-1) ** z for z in range(8)])
    files = write_series(tmp_path, make_hu(8, 16, 16), edit=edit)
    assert scan([tmp_path]).series[0].spacing[0] == 1.25
    files[3].unlink()
    with pytest.raises(InputError, match=r"slices are missing between 2\.5 and 5 mm"):
        scan([tmp_path])


@pytest.mark.parametrize(
    ("keyword", "values"),
    [
        ("AcquisitionNumber", [1, 2] * 4),
        ("AcquisitionNumber", [1, 2, 3, 1, 2, 3, 1, 2]),
        ("ConvolutionKernel", ["B30f", "D45f"] * 4),
    ],
)
def test_scans_among_each_other_are_rejected(tmp_path, write_series, make_hu, run, keyword, values):
    """Passes at 0, 2, 4 and at 1, 3, 5 mm were one scan with slices 1 mm apart."""
    hu = make_hu(8, 16, 16)
    write_series(tmp_path / "ct", hu, edit=placed(range(8), **{keyword: values}))
    message = f"slices of different {keyword} lie among each other, .*several scans under one SeriesInstanceUID. To fix"
    with pytest.raises(InputError, match=message):
        scan([tmp_path / "ct"])
    with pytest.raises(InputError, match=message):
        prepare([tmp_path / "ct"], tmp_path / "store")
    # Slice by slice it doesn't matter to which scan one belongs.
    assert denoise(tmp_path / "ct", tmp_path / "out", model=run).slices == 8


def test_passes_over_the_same_places_are_named(tmp_path, write_series, make_hu):
    write_series(tmp_path, make_hu(8), edit=placed([0, 1, 2, 3] * 2, AcquisitionNumber=[1] * 4 + [2] * 4))
    with pytest.raises(InputError, match="slices of different AcquisitionNumber lie among each other"):
        scan([tmp_path])


@pytest.mark.parametrize(
    "numbers", [[1] * 4 + [2] * 4, list(range(8, 0, -1)), [1, 1, None, 1, 2, 1, 2, 2], ["A", "B"] * 4]
)
def test_a_scan_in_blocks_is_one(tmp_path, write_series, make_hu, numbers):
    """A rotation after the other; where the number isn't known, nothing follows from it."""

    def edit(z, dataset):
        dataset.ImagePositionPatient = [-20, -30, z]
        dataset.add_new("AcquisitionNumber", "LO" if isinstance(numbers[z], str) else "IS", numbers[z])

    write_series(tmp_path, make_hu(8, 16, 16), edit=edit)
    assert scan([tmp_path]).series[0].shape == (8, 16, 16)
