"""What derived images keep, drop and are called."""

from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataelem import RawDataElement
from pydicom.tag import Tag

from lidnet_fast.data.formats.dicom.series import scan
from lidnet_fast.inference import denoise
from tests.inference.conftest import expected, make_run, run

__all__ = ["expected", "make_run", "run"]


def as_text(**values):
    """What should be a number, as text in its own type."""

    def edit(z, dataset):
        for keyword, value in values.items():
            tag = Tag(tag_for_keyword(keyword))
            dataset[tag] = RawDataElement(tag, dictionary_VR(tag), len(value), value.encode(), 0, False, True)

    return edit


def result_of(out) -> pydicom.Dataset:
    (path,) = (path for path in Path(out).rglob("*.dcm"))
    return pydicom.dcmread(path)


NUMBERS = {
    "SeriesNumber": ("A1", "1\\2", "1.5", ""),
    "SliceThickness": ("thin", "nan", "2\\3"),
    "AcquisitionNumber": ("A1", "1\\2"),
    "NumberOfFrames": ("A ", "1\\1", ""),
    "InstanceNumber": ("A1",),
    "KVP": ("120 kV", "inf"),
    "PixelPaddingValue": ("none",),
    "WindowCenter": ("soft",),
}


@pytest.mark.parametrize(("keyword", "value"), [(keyword, value) for keyword in NUMBERS for value in NUMBERS[keyword]])
def test_optional_numbers_that_are_none_stop_nothing(tmp_path, run, write_series, make_hu, keyword, value):
    hu = make_hu(1, 32, 32)
    write_series(tmp_path / "in", hu, edit=as_text(**{keyword: value}))
    summary = denoise(tmp_path / "in", tmp_path / "out", model=run)
    assert (summary.failures, summary.slices) == ([], 1)
    if keyword == "SeriesNumber":
        assert result_of(tmp_path / "out").SeriesNumber is None
    np.testing.assert_array_equal(scan([tmp_path / "in"]).series[0].read(), hu)


def test_an_infinite_number_that_is_read(tmp_path, run, write_series, make_hu):
    hu = make_hu(1, 32, 32)
    for keyword in ("SeriesNumber", "AcquisitionNumber"):
        (file,) = write_series(tmp_path / keyword, hu, edit=lambda z, image: setattr(image, keyword, 123456))  # noqa: B023
        file.write_bytes(file.read_bytes().replace(b"123456", b"1e4000"))
        np.testing.assert_array_equal(scan([tmp_path / keyword]).series[0].read(), hu)
        assert denoise(tmp_path / keyword, tmp_path / f"{keyword}.out", model=run).failures == []


def test_series_and_image_of_one_identifier_become_two(tmp_path, run, write_series, make_hu):
    def same(z, dataset):
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SeriesInstanceUID

    write_series(tmp_path / "in", make_hu(1, 32, 32), edit=same)
    for out in ("out", "again"):
        denoise(tmp_path / "in", tmp_path / out, model=run)
    result = result_of(tmp_path / "out")
    assert result.SOPInstanceUID == result.file_meta.MediaStorageSOPInstanceUID != result.SeriesInstanceUID
    assert result.SeriesInstanceUID == result_of(tmp_path / "again").SeriesInstanceUID
    assert result.SOPInstanceUID == result_of(tmp_path / "again").SOPInstanceUID
    source = "1.2.826.0.1.3680043.8.498.1"
    assert len({result.SOPInstanceUID, result.SeriesInstanceUID, result.StudyInstanceUID, source}) == 4
