"""One rule for HU: what prepare takes, denoise takes, and what one refuses, the other refuses in the same words."""

import numpy as np
import pydicom
import pytest
from pydicom import Dataset

from lidnet_fast.data.formats.dicom.series import read_volume, scan
from lidnet_fast.data.formats.dicom.writer import read_image
from lidnet_fast.errors import InputError
from tests.data.formats.dicom.test_multiframe import complete

UID = "1.2.826.0.1.3680043.8.498"


def mapping(*units):
    """A real-world value mapping for each unit."""
    items = []
    for unit in units:
        item, code = Dataset(), Dataset()
        code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = unit, "UCUM", unit
        item.MeasurementUnitsCodeSequence = [code]
        items.append(item)
    return items


ELEMENTS = {
    "nothing said": ({}, None),
    "HU": ({"RescaleType": "HU"}, None),
    "lower case": ({"RescaleType": "hu"}, None),
    "unspecified": ({"RescaleType": "US"}, None),
    "atomic number": ({"RescaleType": "Z_EFF"}, r"its values are Z_EFF \(RescaleType\), not HU"),
    "mapping to HU": ({"RealWorldValueMappingSequence": mapping("[hnsf'U]")}, None),
    "mapping to a flow": (
        {"RealWorldValueMappingSequence": mapping("ml/min")},
        r"its values are ml/min \(Meas.*not HU",
    ),
    "unspecified, mapping to a flow": (
        {"RescaleType": "US", "RealWorldValueMappingSequence": mapping("ml/min")},
        r"its values are ml/min \(Meas.*not HU",
    ),
    "HU, mapping to a flow": ({"RescaleType": "HU", "RealWorldValueMappingSequence": mapping("ml/min")}, None),
    "dark is high": ({"PhotometricInterpretation": "MONOCHROME1"}, None),
    "palette": ({"PhotometricInterpretation": "PALETTE COLOR"}, "this is PALETTE COLOR with 1 samples per pixel"),
    "slope of zero": ({"RescaleSlope": 0}, "RescaleSlope 0 and RescaleIntercept -1024 don't give HU"),
    "no intercept": ({"RescaleIntercept": None}, "has no usable RescaleIntercept"),
}


@pytest.fixture(params=["single-frame", "multi-frame, for all frames", "multi-frame, for one"])
def make_file(request, tmp_path, write_series, make_hu):
    """Write one file with some elements changed, for one frame or for all; returns it and its frames in HU."""

    def make(changes):
        if request.param == "single-frame":
            hu = make_hu(1)
            (file,) = write_series(tmp_path, hu, edit=lambda z, image: set_all(image, image, changes))
            return file, hu
        legacy = pytest.importorskip("highdicom.legacy")
        hu = make_hu(3)
        files = write_series(tmp_path / "single", hu, edit=complete)
        uids = {"series_instance_uid": f"{UID}.9", "sop_instance_uid": f"{UID}.9.1"}
        image = legacy.LegacyConvertedEnhancedCTImage(
            [pydicom.dcmread(file) for file in files], series_number=1, instance_number=1, **uids
        )
        (shared,), frames = image.SharedFunctionalGroupsSequence, image.PerFrameFunctionalGroupsSequence
        for groups in (shared, *frames):
            groups.pop("PixelValueTransformationSequence", None)
        shared.PixelValueTransformationSequence = [hu_transformation()]
        groups = shared
        if request.param == "multi-frame, for one":
            groups = frames[1]
            groups.PixelValueTransformationSequence = [hu_transformation()]
        set_all(image, groups, changes)
        image.save_as(tmp_path / "multi.dcm")
        heights = [frame.PlanePositionSequence[0].ImagePositionPatient[2] for frame in frames]
        return tmp_path / "multi.dcm", hu[np.argsort(np.argsort(heights))]

    return make


def hu_transformation():
    """How the frames of these tests are stored."""
    item = Dataset()
    item.RescaleSlope, item.RescaleIntercept = 1, -1024
    return item


def set_all(image, groups, changes):
    """Change elements where they belong: in the image, in its groups, or in the macro that has a rescaling."""
    for keyword, value in changes.items():
        target = image if keyword == "PhotometricInterpretation" else groups
        if keyword.startswith("Rescale") and groups is not image:
            target = groups.PixelValueTransformationSequence[0]
        setattr(target, keyword, value)


@pytest.mark.parametrize("name", ELEMENTS)
def test_prepare_and_denoise_agree(make_file, name):
    changes, message = ELEMENTS[name]
    file, hu = make_file(changes)
    if message is None:
        (series,) = scan([file]).series
        np.testing.assert_array_equal(read_volume(series), hu[list(series.frames) or [0]])
        np.testing.assert_array_equal(read_image(file).hu, hu)
        return
    with pytest.raises(InputError, match=message) as prepared:
        scan([file])
    with pytest.raises(InputError, match=message) as denoised:
        read_image(file)
    assert str(prepared.value) == str(denoised.value)
