"""Enhanced (multi-frame) CT against the single-frame files that highdicom made it from, and against a real file."""

import random
import shutil

import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.uid import (
    EnhancedCTImageStorage,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    LegacyConvertedEnhancedCTImageStorage,
    generate_uid,
)

from lidnet_fast.data.annotations.boxes import read_boxes
from lidnet_fast.data.formats.dicom.series import read_volume, scan
from lidnet_fast.errors import InputError

UID = "1.2.826.0.1.3680043.8.498"


def complete(z, dataset):
    """What highdicom asks of single frames."""
    dataset.InstanceNumber = z + 1
    dataset.FrameOfReferenceUID = "1.2.3.4"
    for keyword in [
        "StudyDate",
        "StudyTime",
        "SeriesDate",
        "SeriesTime",
        "ContentDate",
        "ContentTime",
        "AccessionNumber",
        "PatientName",
        "PatientSex",
        "PatientBirthDate",
        "StudyID",
        "Manufacturer",
        "ReferringPhysicianName",
        "PositionReferenceIndicator",
        "SeriesNumber",
        "AcquisitionNumber",
        "AcquisitionDateTime",
        "KVP",
    ]:
        setattr(dataset, keyword, "19990101" if keyword.endswith("Date") else None)
    dataset.StudyTime = dataset.SeriesTime = dataset.ContentTime = "120000"
    dataset.SeriesNumber = dataset.AcquisitionNumber = 1


@pytest.fixture
def converted(tmp_path, write_series, make_hu):
    """Single frames and what highdicom makes of them, its frames in random order: (folder, HU, enhanced file)."""
    legacy = pytest.importorskip("highdicom.legacy")

    def convert(syntax=ExplicitVRLittleEndian):
        hu = make_hu(5)

        def rescale(z, dataset):
            complete(z, dataset)
            dataset.RescaleIntercept = -1000 - z
            dataset.PixelData = (hu[z] + 1000 + z).astype(np.int16).tobytes()

        files = write_series(tmp_path / "single", hu, edit=rescale)
        singles = [pydicom.dcmread(file) for file in files]
        random.Random(1).shuffle(singles)
        enhanced = legacy.LegacyConvertedEnhancedCTImage(
            singles, series_instance_uid=f"{UID}.9", series_number=1, sop_instance_uid=f"{UID}.9.1", instance_number=1
        )
        if syntax != ExplicitVRLittleEndian:
            enhanced.compress(syntax, generate_instance_uid=False)
        (tmp_path / "enhanced").mkdir()
        enhanced.save_as(tmp_path / "enhanced" / "a.dcm")
        return tmp_path / "single", hu, tmp_path / "enhanced" / "a.dcm"

    return convert


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, JPEG2000Lossless], ids=lambda syntax: syntax.keyword)
def test_the_same_as_single_frames(converted, syntax):
    folder, hu, file = converted(syntax)
    (single,) = scan([folder]).series
    (multi,) = scan([file]).series
    assert pydicom.dcmread(file).SOPClassUID == LegacyConvertedEnhancedCTImageStorage
    np.testing.assert_array_equal(read_volume(single), hu)
    np.testing.assert_array_equal(read_volume(multi), hu)
    assert multi.series_uid == f"{UID}.9"
    assert multi.shape == single.shape
    assert multi.positions == single.positions
    assert multi.orientation == single.orientation
    assert multi.spacing == pytest.approx(single.spacing)
    assert multi.patient_id == single.patient_id
    assert sorted(multi.frames) == list(range(5)) != list(multi.frames)


def test_a_value_beside_the_functional_groups(converted):
    """What no group of a frame says counts for it from the image, also when pixels are decoded."""
    _, hu, file = converted()
    image = pydicom.dcmread(file)
    for groups in (*image.SharedFunctionalGroupsSequence, *image.PerFrameFunctionalGroupsSequence):
        for transformation in groups.get("PixelValueTransformationSequence") or ():
            del transformation.RescaleSlope
    image.RescaleSlope = 1
    image.save_as(file)
    (series,) = scan([file]).series
    np.testing.assert_array_equal(read_volume(series), hu)


def test_boxes_name_frames(tmp_path, converted):
    _, _, file = converted()
    (series,) = scan([file]).series
    table = tmp_path / "boxes.csv"
    table.write_text(f"series_uid,sop_instance_uid,x1,y1,x2,y2\n{UID}.9,{UID}.9.1#3,1,2,3,4\n")
    assert read_boxes(table, [series])[f"{UID}.9"].tolist() == [[series.frames.index(2), 1, 2, 3, 4]]


def test_a_missing_frame_a_truncated_file_and_no_groups(tmp_path, converted):
    _, _, file = converted()
    content = file.read_bytes()
    file.write_bytes(content[:-100])
    with pytest.raises(InputError, match=r"a\.dcm: is truncated: its 64 x 64 pixels of 5 frames take 40960 bytes"):
        scan([file])
    file.write_bytes(content)
    image = pydicom.dcmread(file)
    del image.PerFrameFunctionalGroupsSequence[-1]
    image.save_as(file)
    with pytest.raises(InputError, match=r"a\.dcm: is multi-frame \(enhanced\) CT without the functional groups"):
        scan([file])
    file.write_bytes(content)
    image = pydicom.dcmread(file)
    heights = [
        groups.PlanePositionSequence[0].ImagePositionPatient[2] for groups in image.PerFrameFunctionalGroupsSequence
    ]
    del image.PerFrameFunctionalGroupsSequence[heights.index(105)]
    image.NumberOfFrames = 4
    image.save_as(file)
    with pytest.raises(InputError, match="slices are missing between"):
        scan([file])


def test_frames_that_are_localisers_are_skipped(tmp_path, converted):
    _, hu, file = converted()
    image = pydicom.dcmread(file)
    image.SOPClassUID = image.file_meta.MediaStorageSOPClassUID = EnhancedCTImageStorage
    for groups in image.PerFrameFunctionalGroupsSequence:
        item = pydicom.Dataset()
        first = groups.PlanePositionSequence[0].ImagePositionPatient[2] == 100
        item.FrameType = ["ORIGINAL", "PRIMARY", "LOCALIZER" if first else "VOLUME", "NONE"]
        groups.CTImageFrameTypeSequence = [item]
    image.SOPInstanceUID = image.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    image.save_as(file)
    (series,) = scan([file]).series
    np.testing.assert_array_equal(read_volume(series), hu[1:])


def test_frames_of_passes_among_each_other_are_rejected(converted):
    """Enhanced CT numbers acquisitions frame by frame."""
    _, _, file = converted()
    image = pydicom.dcmread(file)
    image.AcquisitionNumber = 1
    for groups in image.PerFrameFunctionalGroupsSequence:
        item = pydicom.Dataset()
        item.FrameAcquisitionNumber = int(groups.PlanePositionSequence[0].ImagePositionPatient[2] / 2.5) % 2 + 1
        groups.FrameContentSequence = [item]
    image.save_as(file)
    with pytest.raises(InputError, match="slices of different AcquisitionNumber lie among each other"):
        scan([file])


def test_real_perfusion_map_is_not_ct(tmp_path):
    """Two frames of cerebral blood flow in an enhanced CT image of pydicom's test data."""
    shutil.copy(get_testdata_file("eCT_Supplemental.dcm", download=False), tmp_path / "map.dcm")
    with pytest.raises(
        InputError, match=r"map\.dcm: its values are ml/100ml/s \(MeasurementUnitsCodeSequence\), not HU"
    ):
        scan([tmp_path])
