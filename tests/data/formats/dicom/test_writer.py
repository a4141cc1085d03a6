"""What derived images keep, drop and are called."""

from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataelem import RawDataElement
from pydicom.tag import Tag
from pydicom.uid import ExplicitVRBigEndian

from lidnet_fast.data.formats.dicom.series import scan
from lidnet_fast.inference import denoise
from tests.data.conftest import SYNTAXES
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


@pytest.mark.parametrize("syntax", SYNTAXES[:4], ids=lambda syntax: syntax.keyword)
@pytest.mark.parametrize(("signed", "bits"), [(0, (12,)), (0, (12, 15)), (1, (13,))])
def test_overlays_in_unused_bits(tmp_path, run, expected, write_series, make_hu, syntax, signed, bits):
    """12 bits of pixels, and graphics in the others: neither touches the other."""
    hu = make_hu(1, 32, 32).clip(-1000, 1400)
    rng = np.random.default_rng(0)
    drawn = {bit: rng.random((32, 32)) < 0.3 for bit in bits}
    graphics = sum(where.astype(np.uint16) << bit for bit, where in drawn.items())

    def edit(z, dataset):
        dataset.RescaleIntercept = 0 if signed else -1024
        dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 12, 11, signed
        words = (hu[z] - int(dataset.RescaleIntercept)).astype(np.uint16) & 0xFFF | graphics
        dataset.PixelData = (words.byteswap() if syntax == ExplicitVRBigEndian else words).tobytes()
        for group, bit in zip((0x6000, 0x6002), bits, strict=False):
            dataset.add_new((group, 0x0010), "US", 32)
            dataset.add_new((group, 0x0011), "US", 32)
            dataset.add_new((group, 0x0040), "CS", "G")
            dataset.add_new((group, 0x0050), "SS", [1, 1])
            dataset.add_new((group, 0x0100), "US", 16)
            dataset.add_new((group, 0x0102), "US", bit)

    write_series(tmp_path / "in", hu, syntax=syntax, edit=edit)
    np.testing.assert_array_equal(scan([tmp_path / "in"]).series[0].read(), hu)
    denoise(tmp_path / "in", tmp_path / "out", model=run, precision="float32")
    result = result_of(tmp_path / "out")
    words = np.frombuffer(result.PixelData, "<u2").reshape(32, 32)
    for bit, where in drawn.items():
        np.testing.assert_array_equal(words >> bit & 1, where)
    np.testing.assert_array_equal(words & 0xF000, graphics)
    stored = (words & 0xFFF).astype(int)
    made = np.where(stored > 2047, stored - 4096, stored) if signed else stored - 1024
    assert np.abs(made - expected(hu)[0].clip(-1024, 2047)).max() <= 0.5 + 1e-3
    assert result[0x6000, 0x0102].value == bits[0]
    (series,) = scan([tmp_path / "out"]).series
    np.testing.assert_array_equal(series.read()[0], made)
