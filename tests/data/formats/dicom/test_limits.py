"""Small files that ask for much memory: large elements and deflated datasets."""

import numpy as np
import pydicom
import pytest
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian

from lidnet_fast.data.formats.dicom.series import scan
from lidnet_fast.data.formats.dicom.writer import read_image
from lidnet_fast.errors import InputError


def _with_a_large_element(_, dataset):
    dataset.private_block(0x0009, "us", create=True).add_new(1, "OB", b"\1" * 70_000)


def test_large_elements_are_not_read_for_pixels_and_not_copied(tmp_path, write_series, make_hu, monkeypatch):
    hu = make_hu(2)
    files = write_series(tmp_path / "in", hu, edit=_with_a_large_element)
    limit = 1 << 16  # the pixels are of 8 KiB
    monkeypatch.setattr("lidnet_fast.data.formats.dicom.limits._LARGEST_ELEMENT", limit)
    (series,) = scan([tmp_path / "in"]).series
    np.testing.assert_array_equal(series.read(), hu)
    with pytest.raises(InputError, match=rf"{files[0].name}: its element \(0009,1001\) has 70000 bytes, .*To fix:"):
        read_image(files[0])
    monkeypatch.setattr("lidnet_fast.data.formats.dicom.limits._LARGEST_ELEMENT", 1 << 12)
    np.testing.assert_array_equal(series.read(), hu)  # pixels are read, however large
    monkeypatch.setattr("lidnet_fast.data.formats.dicom.limits._LARGEST_ELEMENT", 1 << 20)
    assert len(read_image(files[0]).dataset[0x0009, 0x1001].value) == 70_000


def test_deflated_files_unpack_to_a_limit(tmp_path, write_series, make_hu, monkeypatch):
    hu = make_hu(2)
    files = write_series(tmp_path / "in", hu, edit=_with_a_large_element)
    for file in files:
        dataset = pydicom.dcmread(file)
        dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
        dataset.save_as(file)
    monkeypatch.setattr("lidnet_fast.data.formats.dicom.limits._LARGEST_ELEMENT", 1 << 12)
    (series,) = scan([tmp_path / "in"]).series
    np.testing.assert_array_equal(series.read(), hu)
    with monkeypatch.context() as patch:
        patch.setattr("lidnet_fast.data.formats.dicom.limits._LARGEST_RATIO", 3)
        with pytest.raises(InputError, match=r"\.dcm: .*unpacks to more than"):
            scan([tmp_path / "in"])
    monkeypatch.setattr("lidnet_fast.data.formats.dicom.limits._LARGEST_INFLATED", 70_000)
    with pytest.raises(InputError, match=r"\.dcm: .*unpacks to more than 70000 bytes"):
        scan([tmp_path / "in"])
    found = scan([tmp_path / "in"], strict=False)
    assert [len(found.series), len(found.rejected)] == [0, 2]
    files[0].write_bytes(files[0].read_bytes()[:-5000])
    assert len(scan([tmp_path / "in"], strict=False).rejected) == 2


def test_the_name_of_the_deflated_syntax_elsewhere_means_nothing(tmp_path, write_series, make_hu):
    def edit(_, dataset):
        dataset.InstitutionName = str(DeflatedExplicitVRLittleEndian)

    write_series(tmp_path / "in", make_hu(1), edit=edit, syntax=ExplicitVRLittleEndian)
    assert len(scan([tmp_path / "in"]).series) == 1
