"""NIfTI headers and values, against the standard and against what SimpleITK makes of the geometry."""

import gzip

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813

from lidnet_fast.data.formats.volumes.files import read_header, read_voxels
from lidnet_fast.errors import InputError

MATRIX = np.array([[0, 0, -2.5, 40], [-0.8, 0, 0, 30], [0, 0.7, 0, -20], [0, 0, 0, 1]])


def save(path, values, qform=1, sform=1, kind=nibabel.Nifti1Image, other=None, **fields):
    """Write a file by nibabel; `other` is the matrix of its qform where that isn't the sform's."""
    image = kind(values, None)
    image.set_sform(MATRIX, sform)
    image.set_qform(MATRIX if other is None else other, qform)
    nibabel.save(image, path)
    if fields:
        content = bytearray(path.read_bytes())
        header = type(image.header)(bytes(content[: image.header.sizeof_hdr]))
        for name, value in fields.items():
            header[name] = value
        content[: image.header.sizeof_hdr] = header.binaryblock
        path.write_bytes(content)


@pytest.mark.parametrize(
    ("slope", "intercept", "expected"),
    [(0, 7, [-1000, 40, 3]), (np.nan, 7, [-1000, 40, 3]), (1, 7, [-993, 47, 10]), (2, -24, [-2024, 56, -18])],
)
def test_scaling(tmp_path, slope, intercept, expected):
    """The standard: at slope 0 the stored values are the values, and the intercept says nothing."""
    path = tmp_path / "a.nii"
    save(path, np.array([-1000, 40, 3], np.int16).reshape(3, 1, 1), scl_slope=slope, scl_inter=intercept)
    assert read_voxels(path).ravel().tolist() == expected


def test_an_intercept_that_is_no_number(tmp_path):
    path = tmp_path / "a.nii"
    save(path, np.zeros((3, 4, 5), np.int16), scl_slope=1, scl_inter=np.inf)
    with pytest.raises(InputError, match=r"a\.nii: can't be read .*invalid intercept inf"):
        read_header(path)


@pytest.mark.parametrize("dtype", ["<i2", ">i2", "<f4", ">f8", "<i4", "<u2"])
@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
def test_kinds_of_values(tmp_path, dtype, kind):
    values = np.arange(60).reshape(5, 4, 3).astype(dtype)
    header = kind.header_class(endianness=dtype[0])
    header.set_data_dtype(values.dtype)
    nibabel.save(kind(values, np.eye(4), header), tmp_path / "a.nii")
    voxels = read_voxels(tmp_path / "a.nii")
    assert voxels.dtype == values.dtype.newbyteorder("=") and voxels.dtype.isnative
    np.testing.assert_array_equal(voxels, values.T)
    header = read_header(tmp_path / "a.nii")
    assert (header.size, header.values_per_voxel, header.bits) == ((5, 4, 3), 1, 8 * values.itemsize)


def test_values_that_are_not_numbers_stay(tmp_path):
    values = np.array([np.nan, np.inf, -np.inf, 5], np.float32).reshape(4, 1, 1)
    save(tmp_path / "a.nii.gz", values)
    np.testing.assert_array_equal(read_voxels(tmp_path / "a.nii.gz"), values.T)


MIRRORED = np.diag([-1.0, 1, 1, 1]) @ MATRIX


@pytest.mark.parametrize("codes", [(0, 0), (1, 0), (0, 1), (1, 1), (1, 2), (2, 1), (0, 2), (1, 4)])
def test_geometry_is_that_of_itk(tmp_path, codes):
    """Which of the two matrices counts where they differ is ITK's choice."""
    save(tmp_path / "a.nii", np.zeros((5, 4, 3), np.int16), *codes, other=MIRRORED)
    header, image = read_header(tmp_path / "a.nii"), sitk.ReadImage(str(tmp_path / "a.nii"))
    assert header.size == image.GetSize()
    assert header.origin == pytest.approx(image.GetOrigin(), abs=1e-5)
    assert header.spacing == pytest.approx(image.GetSpacing(), abs=1e-5)
    np.testing.assert_allclose(header.directions, np.array(image.GetDirection()).reshape(3, 3).T, atol=1e-5)


def test_a_file_beside_one_of_the_same_stem(tmp_path):
    """ITK reads a.nii where it is told a.nii.gz."""
    for value, name in enumerate(("a.nii", "a.nii.gz", "b.nii.gz")):
        save(tmp_path / name, np.full((5, 4, 3), value, np.int16))
        assert (read_voxels(tmp_path / name) == value).all()
    assert (read_voxels(tmp_path / "a.nii") == 0).all()


def test_units(tmp_path):
    save(tmp_path / "a.nii", np.zeros((5, 4, 3), np.int16), xyzt_units=3)
    assert read_header(tmp_path / "a.nii").spacing == pytest.approx((0.0008, 0.0007, 0.0025))


@pytest.mark.parametrize("shape", [(5, 4, 3, 1), (5, 4, 3, 1, 1)])
def test_further_axes_of_one_voxel(tmp_path, shape):
    save(tmp_path / "a.nii", np.zeros(shape, np.int16))
    assert read_header(tmp_path / "a.nii").size == (5, 4, 3)
    assert read_voxels(tmp_path / "a.nii").shape == (3, 4, 5)


@pytest.mark.parametrize("kind", [np.complex64, [("R", "u1"), ("G", "u1"), ("B", "u1")]])
def test_several_values_per_voxel(tmp_path, kind):
    save(tmp_path / "a.nii", np.zeros((5, 4, 3), kind))
    with pytest.raises(InputError, match=r"this has 3 dimensions and [23] values per voxel"):
        read_header(tmp_path / "a.nii").check_is_volume()


def test_damage_that_only_the_checksum_shows(tmp_path):
    save(tmp_path / "a.nii", np.zeros((5, 4, 3), np.int16))
    packed = bytearray(gzip.compress((tmp_path / "a.nii").read_bytes()))
    packed[-8] ^= 1
    (tmp_path / "a.nii.gz").write_bytes(packed)
    with pytest.raises(InputError, match=r"a\.nii\.gz: can't be read .*CRC"):
        read_voxels(tmp_path / "a.nii.gz")


def test_small_faults_of_a_header_are_mended_silently(tmp_path, capfd):
    save(
        tmp_path / "a.nii",
        np.zeros((5, 4, 3), np.int16),
        sizeof_hdr=340,
        pixdim=[0, -1, 1, 1, 1, 1, 1, 1],
        qform_code=77,
    )
    assert read_header(tmp_path / "a.nii").size == (5, 4, 3)
    assert capfd.readouterr() == ("", "")
