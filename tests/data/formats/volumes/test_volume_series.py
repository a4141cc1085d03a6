"""Volumes written by SimpleITK; where their voxels lie is SimpleITK's word against ours."""

import re

import numpy as np
import pytest

from lidnet_fast.data.annotations.boxes import read_boxes
from lidnet_fast.data.formats.sources import find_series
from lidnet_fast.data.prepare.plan import prepare
from lidnet_fast.data.store.reader import Store
from lidnet_fast.errors import InputError
from lidnet_fast.evaluation.denoised import match

sitk = pytest.importorskip("SimpleITK")

DIRECTIONS = {
    "axial": (1, 0, 0, 0, 1, 0, 0, 0, 1),
    "both axes mirrored": (-1, 0, 0, 0, -1, 0, 0, 0, 1),  # as some of LUNA16
    "head first": (1, 0, 0, 0, 1, 0, 0, 0, -1),  # left-handed
    "oblique": (0.8, -0.576, 0.168, 0.6, 0.768, -0.224, 0, 0.28, 0.96),  # 16 degrees
}


def write(path, hu, direction=DIRECTIONS["axial"], compress=False):
    image = sitk.GetImageFromArray(hu)
    image.SetSpacing((0.8, 0.7, 2.5))
    image.SetOrigin((-20, -30, 100))
    image.SetDirection(direction)
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path), compress)
    return image


def only_series(path, **options):
    (series,) = find_series([path], "", strict=True, resample=False, **options).series
    return series


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", ["a.mhd", "a.mha", "a.nrrd", "a.nhdr", "a.nii", "a.nii.gz"])
def test_formats(tmp_path, make_hu, name, direction):
    hu = make_hu(5, 40, 56)
    image = write(tmp_path / name, hu, DIRECTIONS[direction], compress=name in ("a.mhd", "a.nrrd"))
    series = only_series(tmp_path)
    volume = series.read()
    assert volume.dtype == np.int16
    assert (series.series_uid, series.patient_id, series.shape) == ("a", "a", (5, 40, 56))
    assert series.spacing == pytest.approx((2.5, 0.7, 0.8))
    assert np.all(np.diff(series.distances) > 0)
    rows, columns, _ = series.axes
    for x, y, z in [(0, 0, 0), (7, 3, 4), (55, 39, 2)]:
        ours = z if direction != "head first" else 4 - z
        assert volume[ours, y, x] == max(image[x, y, z], -1024)
        place = np.array(series.positions[ours]) + x * 0.8 * rows + y * 0.7 * columns
        assert place == pytest.approx(image.TransformIndexToPhysicalPoint((x, y, z)), abs=1e-4)


def test_padding_and_real_numbers(tmp_path, make_hu):
    """LUNA16 pads with -3024; NIfTI often holds floating-point numbers."""
    hu = make_hu()
    hu[:, :5] = -3024
    write(tmp_path / "a.nii.gz", hu.astype(np.float32) + 0.25)
    expected = np.maximum(hu, -1024)
    np.testing.assert_array_equal(only_series(tmp_path).read(), expected)


@pytest.mark.parametrize("name", ["a.mhd", "a.mha", "a.nrrd", "a.nii", "a.nii.gz"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_outside_the_field_of_view_is_air(tmp_path, make_hu, name, value):
    hu = make_hu(4).astype(np.float32)
    expected = hu.astype(np.int16)
    y, x = np.ogrid[:64, :64]
    outside = np.broadcast_to((y - 31.5) ** 2 + (x - 31.5) ** 2 > 32**2, hu.shape).copy()
    outside[0] = True  # a slice at the end of the volume
    hu[outside] = value
    write(tmp_path / name, hu)
    prepare([tmp_path], tmp_path / "store", val_fraction=0, test_fraction=0, workers=1)
    store = Store(tmp_path / "store")
    for z in range(4):
        np.testing.assert_array_equal(store.read(0, z), np.where(outside[z], -1024, expected[z]))


@pytest.mark.parametrize("name", ["a.mha", "a.nrrd", "a.nii", "a.nii.gz"])
@pytest.mark.parametrize(
    "hole", [(1, 5, 5), (1, slice(2, -1), slice(2, -1)), (1,), ()], ids=["one", "many", "slice", "all"]
)
def test_what_is_no_number_inside_the_field_of_view_is_refused(tmp_path, make_hu, name, hole):
    hu = make_hu(3).astype(np.float32)
    hu[hole] = np.nan
    write(tmp_path / name, hu)
    with pytest.raises(InputError, match=rf"{name}: has voxels that aren't finite inside the field of view. To fix: "):
        only_series(tmp_path).read()


def test_names(tmp_path, make_hu):
    """A file's own name where that is unique, its path where it isn't."""
    for name in ("1.2.3.mhd", "anna/ct.nii.gz", "bert/ct.nrrd"):
        write(tmp_path / name, make_hu())
    found = find_series([tmp_path], "", strict=True, resample=False).series
    assert [one.series_uid for one in found] == ["1.2.3", "anna/ct", "bert/ct"]


def test_one_name_in_two_sources(tmp_path, make_hu):
    for name in ("a/ct.nii", "b/ct.nii", "b/other.nii"):
        write(tmp_path / name, make_hu())
    found = find_series([tmp_path / "a", tmp_path / "b"], "", strict=False, resample=False)
    assert [one.series_uid for one in found.series] == ["other"]
    assert [fault.reason for fault in found.rejected] == [
        f"{tmp_path / name}/ct.nii: another source has a series ct too" for name in ("a", "b")
    ]


def cut(path, kept):
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])


@pytest.mark.parametrize("kept", [0, 0.5, 0.97])
@pytest.mark.parametrize("name", ["a.mhd", "a.mha", "a.nrrd", "a.nhdr", "a.nii", "a.nii.gz"])
def test_truncated(tmp_path, make_hu, name, kept):
    """ITK would read NIfTI without its end as zeros."""
    write(tmp_path / name, make_hu(20))
    data = tmp_path / "a.raw"
    cut(data if data.exists() else tmp_path / name, kept)
    with pytest.raises(InputError, match="can't be read") as error:
        only_series(tmp_path).read()
    assert str(tmp_path / name) in str(error.value)
    assert "\n" not in str(error.value)


BAD = {
    "labels of 16 bits": (np.arange(192, dtype=np.int16).reshape(3, 8, 8), "has no value below 0, so it isn't HU"),
    "time": (np.zeros((2, 3, 8, 8), np.int16), "3 dimensions and 1 value per voxel, this has 4 dimensions"),
    "image": (np.zeros((8, 8), np.int16), "this has 2 dimensions"),
    "NaN": (np.full((3, 8, 8), np.nan, np.float32), "has voxels that aren't finite"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_ct(tmp_path, make_hu, name):
    """Refused by itself; rejected, with the reason, among others."""
    values, message = BAD[name]
    sitk.WriteImage(sitk.GetImageFromArray(values, isVector=False), str(tmp_path / "bad.nrrd"))
    with pytest.raises(InputError, match=rf"bad\.nrrd: .*{message}"):
        only_series(tmp_path).read()
    write(tmp_path / "good.nii", make_hu())
    summary = prepare([tmp_path], tmp_path / "store", val_fraction=0, test_fraction=0, workers=1)
    assert [info.series_uid for info in Store(tmp_path / "store").series] == ["good"]
    (rejected,) = summary.rejected
    assert rejected.series_uid == "bad"
    assert message in rejected.reason


MR = {
    "magnitude": np.arange(3000, dtype=np.uint16).reshape(3, 25, 40),
    "ringing": np.arange(3000, dtype=np.float32).reshape(3, 25, 40) - 30,
}


@pytest.mark.parametrize("name", ["mr.nii.gz", "mr.mha"])
@pytest.mark.parametrize("kind", MR)
def test_what_does_not_look_like_hu_is_taken_on_request(tmp_path, name, kind):
    """By its values alone can MR in such a file be told from CT: nothing in it is as low as fat."""
    write(tmp_path / name, MR[kind])
    lowest = int(MR[kind].min())
    options = {"val_fraction": 0, "test_fraction": 0, "workers": 1}
    with pytest.raises(
        InputError, match=rf"{name}: has no value below {lowest}, so it isn't HU .*To fix: .*--any-values"
    ):
        prepare([tmp_path], tmp_path / "store", **options)
    prepare([tmp_path], tmp_path / "store", any_values=True, **options)
    np.testing.assert_array_equal(Store(tmp_path / "store").read(0, 1), MR[kind][1])


@pytest.mark.parametrize("lowest", [-51, -200, -1024])
def test_what_looks_like_hu(tmp_path, lowest):
    write(tmp_path / "a.nii", np.full((3, 8, 8), lowest, np.int16))
    assert only_series(tmp_path).read().min() == lowest


@pytest.mark.parametrize("size", ["8 8 999999999", "65000 65000 60000"])
def test_a_size_that_cannot_be(tmp_path, make_hu, size):
    write(tmp_path / "a.mhd", make_hu(3, 8, 8))
    header = (tmp_path / "a.mhd").read_text()
    (tmp_path / "a.mhd").write_text(header.replace("DimSize = 8 8 3", f"DimSize = {size}"))
    with pytest.raises(InputError, match=r"a\.mhd: (says that it has 8 x 8 x 999999999 voxels|can't be read)"):
        only_series(tmp_path).read()


def test_tilted_volume(tmp_path, make_hu):
    """MetaImage may state axes that aren't at right angles."""
    write(tmp_path / "a.mhd", make_hu())
    header = (tmp_path / "a.mhd").read_text()
    (tmp_path / "a.mhd").write_text(
        header.replace("TransformMatrix = 1 0 0 0 1 0 0 0 1", "TransformMatrix = 1 0 0 0 1 0 0 0.3 1")
    )
    with pytest.raises(InputError, match=r"series a in .*tilted by 16\.7 degrees"):
        only_series(tmp_path)
    (tmp_path / "a.mhd").write_text(
        header.replace("TransformMatrix = 1 0 0 0 1 0 0 0 1", "TransformMatrix = 1 0 0 1 1 0 0 0 1")
    )
    with pytest.raises(InputError, match=r"a\.mhd: the rows and columns of its slices aren't at right angles.* To fix"):
        only_series(tmp_path)


@pytest.mark.parametrize("spacing", ["0.8 0.7 0", "nan 0.7 2.5", "0.8 1e300 2.5"])
def test_a_spacing_that_cannot_be(tmp_path, make_hu, spacing):
    write(tmp_path / "a.mhd", make_hu(3, 8, 8))
    header = re.sub("(?m)^ElementSpacing = .*", f"ElementSpacing = {spacing}", (tmp_path / "a.mhd").read_text())
    (tmp_path / "a.mhd").write_text(header)
    with pytest.raises(InputError, match=r"a\.mhd: (its slices aren't apart|has no usable geometry|can't be read)"):
        only_series(tmp_path)


def test_boxes_of_a_series_named_as_a_mask(tmp_path, make_hu):
    """Masks often lie in a folder beside the images', under the same names."""
    hu = make_hu(3, 16, 16)
    write(tmp_path / "data" / "images" / "anna.nii.gz", hu)
    write(tmp_path / "data" / "labels" / "anna.nii.gz", np.ones(hu.shape, np.uint8))
    table = tmp_path / "boxes.csv"
    table.write_text("series_uid,slice,x1,y1,x2,y2\nimages/anna,1,1,2,3,4\n")
    summary = prepare([tmp_path / "data"], tmp_path / "store", boxes=table, val_fraction=0, test_fraction=0, workers=1)
    assert summary.boxes["train"] == 1
    assert summary.skipped == {"of 8 bits, which can't hold HU (masks?)": 1}


def test_names_do_not_depend_on_damage(tmp_path, make_hu):
    for patient in ("anna", "bob"):
        write(tmp_path / patient / "ct.mha", make_hu(3, 16, 16))
    cut(tmp_path / "anna" / "ct.mha", 0)
    found = find_series([tmp_path], "", strict=False, resample=False)
    assert [one.series_uid for one in found.series] == ["bob/ct"]
    assert [one.series_uid for one in found.rejected] == ["anna/ct"]


def test_slices_in_the_box_file_are_the_volumes_own(tmp_path, make_hu):
    """Also where the volume is read from its other end."""
    write(tmp_path / "a.nii", make_hu(5, 16, 16), DIRECTIONS["head first"])
    series = only_series(tmp_path / "a.nii")
    table = tmp_path / "boxes.csv"
    table.write_text("series_uid,slice,x1,y1,x2,y2\na,1,1,2,3,4\n")
    assert series.flipped
    assert read_boxes(table, [series])["a"].tolist() == [[3, 1, 2, 3, 4]]
    table.write_text("series_uid,slice,x1,y1,x2,y2\na,7,1,2,3,4\n")
    with pytest.raises(InputError, match="slice 7"):
        read_boxes(table, [series])


@pytest.mark.parametrize("direction", ["axial", "head first"])
def test_a_store_is_compared_with_the_volumes_it_is_made_of(tmp_path, make_hu, direction):
    hu = make_hu(5, 16, 16)
    write(tmp_path / "ct" / "a.nii", hu, DIRECTIONS[direction])
    write(tmp_path / "ct" / "a_mask.nii", np.ones(hu.shape, np.uint8), DIRECTIONS[direction])
    prepare([tmp_path / "ct"], tmp_path / "store", val_fraction=0, test_fraction=0, workers=1)
    store = Store(tmp_path / "store")
    found = match(tmp_path / "ct", store, [0])[0]
    np.testing.assert_array_equal(found.read(), [store.read(0, z) for z in range(5)])


def test_low_dose_volumes_are_paired_by_name(tmp_path, make_hu):
    for number, name in enumerate(("anna/ct.nii", "bob/ct.nii")):
        hu = make_hu(3, 16, 16, seed=number)
        write(tmp_path / "full" / name, hu)
        write(tmp_path / "low" / name, hu + np.int16(number + 1))
    prepare(
        [tmp_path / "full"],
        tmp_path / "store",
        low_dose=tmp_path / "low",
        val_fraction=0,
        test_fraction=0,
        workers=1,
    )
    store = Store(tmp_path / "store")
    for index, info in enumerate(store.series):
        added = {"anna/ct": 1, "bob/ct": 2}[info.series_uid]
        np.testing.assert_array_equal(store.read(index, 0, low_dose=True), store.read(index, 0) + added)
    with pytest.raises(InputError, match="is among the normal-dose series too"):
        prepare([tmp_path / "full"], tmp_path / "other", low_dose=tmp_path / "full")
