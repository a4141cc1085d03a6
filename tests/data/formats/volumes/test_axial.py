"""Slices are axial whatever the order of a file's axes; where voxels lie is SimpleITK's word."""

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813

from lidnet_fast.data.annotations.boxes import read_boxes
from lidnet_fast.data.annotations.luna16 import read_boxes as read_spheres
from lidnet_fast.data.formats.sources import find_series
from lidnet_fast.data.formats.volumes.files import read_header, volume_stem
from lidnet_fast.data.formats.volumes.series import volume_series
from lidnet_fast.data.prepare.plan import prepare
from lidnet_fast.data.store.reader import Store
from lidnet_fast.errors import InputError
from lidnet_fast.evaluation.denoised import match
from lidnet_fast.evaluation.export import export

ORDERS = ["LPS", "RAS", "PIR", "ASL", "RSA", "SLP", "PLS", "ILA", "RIP"]
SUFFIXES = {"PIR": ".nii.gz", "ASL": ".mha", "RSA": ".nrrd"}


def axial(make_hu):
    image = sitk.GetImageFromArray(make_hu(6, 32, 40))
    image.SetSpacing((0.8, 0.7, 2.5))
    image.SetOrigin((-20, -30, 100))
    return image


def write(folder, image, order):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"ct{SUFFIXES.get(order, '.nii')}"
    sitk.WriteImage(sitk.DICOMOrient(image, order), str(path))
    return path


def series_of(path):
    return volume_series(read_header(path), volume_stem(path))


def value_at(image, place):
    return image[image.TransformPhysicalPointToIndex(place.tolist())]


@pytest.mark.parametrize("order", ORDERS)
def test_slices_are_axial(tmp_path, make_hu, order):
    image = axial(make_hu)
    series = series_of(write(tmp_path, image, order))
    volume = series.read()
    assert series.shape == volume.shape == (6, 32, 40)
    assert series.spacing == pytest.approx((2.5, 0.7, 0.8))
    np.testing.assert_allclose(np.abs(series.axes), np.eye(3), atol=1e-6)
    rows, columns, _ = series.axes
    for z, y, x in np.random.default_rng(0).integers(0, (6, 32, 40), (20, 3)):
        place = np.array(series.positions[z]) + x * 0.8 * rows + y * 0.7 * columns
        assert volume[z, y, x] == value_at(image, place)


@pytest.mark.parametrize("order", ORDERS)
def test_slices_turn_back_into_voxels(tmp_path, make_hu, order):
    path = write(tmp_path, axial(make_hu), order)
    series = series_of(path)
    np.testing.assert_array_equal(
        series.to_file(series.read_values()), sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
    )


@pytest.mark.parametrize("order", ORDERS)
def test_boxes_are_counted_along_the_files_own_axes(tmp_path, make_hu, order):
    """A box around the voxels 3..6, 9..15 of the two axes that aren't the patient's length, on 2 of that one."""
    path = write(tmp_path, axial(make_hu), order)
    marked = sitk.ReadImage(str(path))
    voxels = sitk.GetArrayFromImage(marked)
    along = 2 - next(n for n, letter in enumerate(order) if letter in "SI")
    np.moveaxis(voxels, along, 0)[2, 9:16, 3:7] = 3000
    changed = sitk.GetImageFromArray(voxels)
    changed.CopyInformation(marked)
    sitk.WriteImage(changed, str(path))
    table = tmp_path / "boxes.csv"
    table.write_text("series_uid,slice,x1,y1,x2,y2\nct,2,3,9,7,16\n")
    series = series_of(path)
    ((z, x1, y1, x2, y2),) = read_boxes(table, [series])["ct"].astype(int)
    inside = np.zeros(series.shape, bool)
    inside[z, y1:y2, x1:x2] = True
    np.testing.assert_array_equal(series.read() == 3000, inside)
    table.write_text(f"series_uid,z_mm,x1,y1,x2,y2\nct,{series.positions[z][2]},3,9,7,16\n")
    np.testing.assert_array_equal(read_boxes(table, [series])["ct"], [[z, x1, y1, x2, y2]])
    width, height = (
        side for side, letter in zip(sitk.ReadImage(str(path)).GetSize(), order, strict=True) if letter not in "SI"
    )
    table.write_text(f"series_uid,slice,x1,y1,x2,y2\nct,2,0,0,{width},{height}\n")
    read_boxes(table, [series])
    table.write_text(f"series_uid,slice,x1,y1,x2,y2\nct,2,0,0,{width + 1},{height}\n")
    with pytest.raises(InputError, match=f"box .* reaches outside its {width} x {height} image"):
        read_boxes(table, [series])


@pytest.mark.parametrize("order", ORDERS)
def test_places_in_mm_do_not_depend_on_the_order(tmp_path, make_hu, order):
    path = write(tmp_path, axial(make_hu), order)
    table = tmp_path / "annotations.csv"
    table.write_text("seriesuid,coordX,coordY,coordZ,diameter_mm\nct,-10,-20,107.5,6\n")
    series = series_of(path)
    rows = read_spheres(table, [series])["ct"]
    z, x1, y1, x2, y2 = rows[len(rows) // 2]
    middle = np.array([(x1 + x2) / 2 - 0.5, (y1 + y2) / 2 - 0.5]) * [0.8, 0.7]
    place = np.array(series.positions[int(z)]) + middle @ series.axes[:2]
    np.testing.assert_allclose(place, [-10, -20, 107.5], atol=1e-3)


@pytest.mark.parametrize("order", ["LPS", "PIR", "ASL", "RSA"])
def test_from_a_file_to_a_store_and_back(tmp_path, make_hu, order):
    """prepare, export and evaluate see the same axial slices."""
    image = axial(make_hu)
    write(tmp_path / "ct", image, order)
    prepare([tmp_path / "ct"], tmp_path / "store", val_fraction=0,
            test_fraction=0, workers=1)  # fmt: skip
    store = Store(tmp_path / "store")
    assert store.series[0].shape == (6, 32, 40)
    found = match(tmp_path / "ct", store, [0])[0]
    np.testing.assert_array_equal(found.read(), [store.read(0, z) for z in range(6)])
    simulated = tmp_path / "simulated"
    prepare([tmp_path / "ct"], simulated, simulate_dose=0.5, val_fraction=0, test_fraction=0, workers=1)
    export(simulated, tmp_path / "out", split="train")
    (exported,) = (tmp_path / "out" / "normal_dose").iterdir()
    written = sitk.DICOMOrient(sitk.ReadImage(str(exported)), "LPS")
    np.testing.assert_array_equal(sitk.GetArrayFromImage(written), sitk.GetArrayFromImage(image))
    assert written.GetOrigin() == pytest.approx(image.GetOrigin(), abs=1e-4)


def turned(degrees, axis):
    transform = sitk.Euler3DTransform()
    transform.SetRotation(*(np.radians(degrees) if name == axis else 0 for name in "xyz"))
    return transform.GetMatrix()


@pytest.mark.parametrize("suffix", [".nii", ".mha", ".nrrd"])
def test_how_oblique_slices_may_be(tmp_path, make_hu, suffix):
    image = axial(make_hu)
    path = tmp_path / f"ct{suffix}"
    for degrees, axis in ((29, "x"), (-29, "y"), (80, "z")):
        image.SetDirection(turned(degrees, axis))
        sitk.WriteImage(image, str(path))
        assert series_of(path).shape == ((6, 40, 32) if axis == "z" else (6, 32, 40))
    image.SetDirection(turned(40, "x"))
    sitk.WriteImage(image, str(path))
    message = rf"ct{suffix}: its slices are oblique, 40 degrees from axial; up to 30 are taken. To fix: "
    with pytest.raises(InputError, match=message):
        find_series([path], "", strict=True, resample=False)


def save_sheared(path, hu, shear):
    """A NIfTI file whose slices, by its sform, move sideways by this fraction of their distance."""
    matrix = np.array([[-0.8, 0, 0, 20], [0, -0.7, 2.5 * shear, 30], [0, 0, 2.5, 100], [0, 0, 0, 1]])
    image = nibabel.Nifti1Image(hu.T, None)
    image.set_sform(matrix, "scanner")
    nibabel.save(image, path)
    return matrix


def test_a_sheared_matrix_is_rounding_up_to_a_limit(tmp_path, make_hu):
    hu = make_hu(6, 32, 40)
    matrix = save_sheared(tmp_path / "ct.nii", hu, 0.005)
    (series,) = find_series([tmp_path / "ct.nii"], "", strict=True, resample=False).series
    np.testing.assert_array_equal(series.read(), hu)
    assert series.positions[5] == pytest.approx([-20, -30 - matrix[1, 2] * 5, 112.5], abs=1e-4)
    save_sheared(tmp_path / "ct.nii", hu, np.tan(np.radians(15)))
    with pytest.raises(InputError, match=r"series ct in .* tilted by 15\.0 degrees .*To fix: --resample"):
        find_series([tmp_path / "ct.nii"], "", strict=True, resample=False)
    prepare([tmp_path], tmp_path / "store", resample=True, val_fraction=0, test_fraction=0, workers=1)
    assert Store(tmp_path / "store").series[0].shape[0] == 6


def test_rows_and_columns_at_another_angle(tmp_path, make_hu):
    image = nibabel.Nifti1Image(make_hu(3).T, None)
    image.set_sform(np.array([[-0.8, 0.1, 0, 0], [0, -0.7, 0, 0], [0, 0, 2.5, 0], [0, 0, 0, 1]]), "scanner")
    nibabel.save(image, tmp_path / "ct.nii")
    with pytest.raises(InputError, match=r"ct\.nii: the rows and columns of .* at right angles: .*To fix: "):
        find_series([tmp_path / "ct.nii"], "", strict=True, resample=False)
