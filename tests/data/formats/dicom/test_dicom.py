import shutil

import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.datadict import tag_for_keyword
from pydicom.dataelem import RawDataElement
from pydicom.tag import Tag
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    EnhancedCTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    MRImageStorage,
    RLELossless,
)

from lidnet_fast.data.formats.dicom.series import read_volume, scan
from lidnet_fast.data.formats.geometry import LOWEST_HU
from lidnet_fast.errors import InputError
from tests.fuzz.hostile import limits

UID = "1.2.826.0.1.3680043.8.498"


def only_series(folder):
    (series,) = scan([folder]).series
    return series


@pytest.mark.parametrize(
    "syntax",
    [
        ExplicitVRLittleEndian,
        ImplicitVRLittleEndian,
        ExplicitVRBigEndian,
        DeflatedExplicitVRLittleEndian,
        RLELossless,
        JPEG2000Lossless,
        JPEGLosslessSV1,
        JPEGLSLossless,
    ],
    ids=lambda syntax: syntax.keyword,
)
def test_transfer_syntaxes(tmp_path, write_series, make_hu, syntax):
    hu = make_hu()
    files = write_series(tmp_path, hu, syntax=syntax)
    assert pydicom.dcmread(files[0]).file_meta.TransferSyntaxUID == syntax
    volume = read_volume(only_series(tmp_path))
    assert volume.dtype == np.int16
    np.testing.assert_array_equal(volume, hu)


def test_geometry_and_order(tmp_path, write_series, make_hu):
    hu = make_hu(5, 40, 56)
    files = write_series(tmp_path, hu)
    assert sorted(files) != files
    series = only_series(tmp_path)
    assert series.series_uid == f"{UID}.1"
    assert series.patient_id == "anna"
    assert list(series.files) == files
    assert series.shape == (5, 40, 56)
    assert series.spacing == pytest.approx((2.5, 0.7, 0.8))
    assert series.positions[0] == pytest.approx((-20, -30, 100))
    assert series.distances == pytest.approx([100, 102.5, 105, 107.5, 110])
    assert series.orientation == (1, 0, 0, 0, 1, 0)
    assert series.sop_instance_uids == tuple(str(pydicom.dcmread(file).SOPInstanceUID) for file in files)


@pytest.mark.parametrize(
    "orientation",
    [
        (1, 0, 0, 0, -1, 0),  # bottom row first: the normal points to the feet
        (1, 0, 0, 0, 0.9272, -0.3746),  # tilted gantry
        (0, 1, 0, 0, 0, -1),  # sagittal
        (0.8, 0.6, 0, -0.36, 0.48, 0.8),  # oblique
    ],
)
def test_orientations(tmp_path, write_series, make_hu, orientation):
    hu = make_hu()
    write_series(tmp_path, hu, orientation=orientation)
    series = only_series(tmp_path)
    np.testing.assert_array_equal(read_volume(series), hu)
    assert series.orientation == pytest.approx(orientation)
    assert series.spacing[0] == pytest.approx(2.5, abs=1e-3)
    assert np.all(np.diff(series.distances) > 0)


def test_two_series_in_one_folder_and_one_series_in_two(tmp_path, write_series, make_hu):
    one, two = make_hu(4, seed=1), make_hu(6, seed=2)
    write_series(tmp_path / "a", one, series_uid=f"{UID}.7")
    files = write_series(tmp_path / "a", two, series_uid=f"{UID}.8", patient_id="bert", suffix="")
    (tmp_path / "a" / "deeper").mkdir()
    for file in files[:3]:
        shutil.move(file, tmp_path / "a" / "deeper" / file.name)
    found = scan([tmp_path / "a"])
    assert [(series.series_uid, series.patient_id) for series in found.series] == [
        (f"{UID}.7", "anna"),
        (f"{UID}.8", "bert"),
    ]
    np.testing.assert_array_equal(read_volume(found.series[0]), one)
    np.testing.assert_array_equal(read_volume(found.series[1]), two)
    assert found.skipped == {}


def test_sources_that_overlap_and_links_count_once(tmp_path, write_series, make_hu):
    hu = make_hu()
    files = write_series(tmp_path / "data" / "x", hu)
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "link").symlink_to(tmp_path / "data" / "x")
    (tmp_path / "data" / "x" / "loop").symlink_to(tmp_path / "data")
    found = scan([tmp_path / "study", tmp_path / "data", files[0]])
    assert [series.shape for series in found.series] == [(4, 64, 64)]
    np.testing.assert_array_equal(read_volume(found.series[0]), hu)


def test_rescale_differs_between_slices(tmp_path, write_series, make_hu):
    hu = make_hu() // 2 * 2

    def rescale(z, dataset):
        slope, intercept = [(1, -1024), (2, 0), (0.5, 10), (1, 0)][z]
        stored = (hu[z] - intercept) / slope
        dataset.RescaleSlope, dataset.RescaleIntercept = slope, intercept
        dataset.PixelData = stored.astype(np.int16).tobytes()

    write_series(tmp_path, hu, edit=rescale)
    np.testing.assert_array_equal(read_volume(only_series(tmp_path)), hu)


@pytest.mark.parametrize("padding", [-2000, 63536])
def test_padding_is_air(tmp_path, write_series, make_hu, padding):
    """The padding value is stored as unsigned by some scanners though the pixels are signed."""
    hu = make_hu()
    hu[:, :5] = -3024

    def pad(z, dataset):
        dataset.add_new("PixelPaddingValue", "SS" if padding < 0 else "US", padding)

    write_series(tmp_path, hu, edit=pad)
    volume = read_volume(only_series(tmp_path))
    assert (volume[:, :5] == LOWEST_HU).all()
    np.testing.assert_array_equal(volume[:, 5:], hu[:, 5:])


def test_bright_padding_is_air_and_tissue_is_not_padding(tmp_path, write_series, make_hu):
    hu = make_hu()
    hu[:2, :5] = 20000
    hu[2:, 20:40, 20:40] = 0
    bright, water = 20000 + 1024, 1024

    def pad(z, dataset):
        dataset.add_new("PixelPaddingValue", "SS", bright if z < 2 else water)

    write_series(tmp_path, hu, edit=pad)
    volume = read_volume(only_series(tmp_path))
    assert (volume[:2, :5] == LOWEST_HU).all()
    np.testing.assert_array_equal(volume[:2, 5:], hu[:2, 5:])
    np.testing.assert_array_equal(volume[2:], hu[2:])


def test_a_range_of_padding(tmp_path, write_series, make_hu):
    hu = make_hu()
    hu[:, :5], hu[:, 5:9] = 20000, 20500

    def pad(z, dataset):
        dataset.add_new("PixelPaddingValue", "SS", 20000 + 1024)
        dataset.add_new("PixelPaddingRangeLimit", "SS", 21000 + 1024)

    write_series(tmp_path, hu, edit=pad)
    volume = read_volume(only_series(tmp_path))
    assert (volume[:, :9] == LOWEST_HU).all()
    np.testing.assert_array_equal(volume[:, 9:], hu[:, 9:])


def test_values_beyond_int16_are_clipped(tmp_path, write_series, make_hu):
    hu = np.clip(make_hu(), 0, 2000)

    def steep(z, dataset):
        dataset.RescaleSlope = 100
        dataset.PixelData = (hu[z] - 1000).astype(np.int16).tobytes()

    write_series(tmp_path, hu, intercept=0, edit=steep)
    expected = np.clip((hu.astype(int) - 1000) * 100, LOWEST_HU, 32767)
    np.testing.assert_array_equal(read_volume(only_series(tmp_path)), expected)


def test_what_is_not_ct_is_skipped(tmp_path, write_series, make_hu):
    write_series(tmp_path, make_hu())

    def localiser(z, dataset):
        dataset.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]

    def mr(z, dataset):
        dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = MRImageStorage
        dataset.Modality = "MR"

    write_series(tmp_path / "scout", make_hu(1), series_uid=f"{UID}.2", edit=localiser)
    write_series(tmp_path / "mr", make_hu(3), series_uid=f"{UID}.3", edit=mr)
    (tmp_path / "notes.txt").write_text("a note")
    (tmp_path / "picture.png").write_bytes(bytes(500))
    (tmp_path / "looks_like_dicom").write_bytes(b"\x08\x00\x05\x00" + bytes(range(200)))
    shutil.copy(get_testdata_file("DICOMDIR", download=False), tmp_path / "DICOMDIR")
    found = scan([tmp_path])
    assert [series.series_uid for series in found.series] == [f"{UID}.1"]
    assert found.skipped == {"localiser": 1, "not CT": 4, "not DICOM": 3}


def test_files_without_preamble(tmp_path, write_series, make_hu):
    """Old archives wrote the bare data set, in implicit little endian."""
    hu = make_hu()
    for file in write_series(tmp_path, hu, syntax=ImplicitVRLittleEndian, suffix=""):
        dataset = pydicom.dcmread(file)
        del dataset.file_meta
        dataset.preamble = None
        dataset.save_as(file, implicit_vr=True, little_endian=True, enforce_file_format=False)
        assert file.read_bytes()[:2] == b"\x08\x00"
    np.testing.assert_array_equal(read_volume(only_series(tmp_path)), hu)


def test_patient_without_id_is_the_study(tmp_path, write_series, make_hu):
    write_series(tmp_path, make_hu(), patient_id="")
    assert only_series(tmp_path).patient_id == f"{UID}.1.1"


def test_a_single_slice(tmp_path, write_series, make_hu):
    write_series(tmp_path / "a", make_hu(1))
    assert only_series(tmp_path / "a").spacing == (2.5, 0.7, 0.8)

    def thin(z, dataset):
        dataset.SliceThickness = None

    write_series(tmp_path / "b", make_hu(1), edit=thin)
    assert only_series(tmp_path / "b").spacing == (0, 0.7, 0.8)


def test_no_ct(tmp_path):
    with pytest.raises(InputError, match=r"nowhere: there is no such file or folder"):
        scan([tmp_path / "nowhere"])
    with pytest.raises(InputError, match=r"no CT found \(no files at all\)"):
        scan([tmp_path])
    (tmp_path / "notes.txt").write_text("a note")
    with pytest.raises(InputError, match=rf"{tmp_path}: no CT found \(1 files not DICOM\)"):
        scan([tmp_path])


@pytest.mark.parametrize("missing", [[2], [1, 2], [1, 4]])
def test_missing_slices(tmp_path, write_series, make_hu, missing):
    files = write_series(tmp_path, make_hu(9))
    for z in missing:
        files[z].unlink()
    first = 100 + 2.5 * (missing[0] - 1)
    second = next(100 + 2.5 * z for z in range(missing[0], 9) if z not in missing)
    with pytest.raises(
        InputError, match=rf"series {UID}\.1 .*missing between {first:g} and {second:g} mm.* 2\.5 mm apart"
    ):
        scan([tmp_path])


def test_a_slice_twice(tmp_path, write_series, make_hu):
    """One of two slices at a position is kept where they are alike to the pixel; otherwise none is right."""
    hu = make_hu()
    files = write_series(tmp_path, hu)
    again = pydicom.dcmread(files[1])
    again.SOPInstanceUID = again.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    again.compress(RLELossless, generate_instance_uid=False)
    again.save_as(tmp_path / "zcopy.dcm")
    found = scan([tmp_path])
    (series,) = found.series
    assert list(series.files) == files
    assert found.skipped == {"copies of another": 1}
    np.testing.assert_array_equal(read_volume(series), hu)
    shutil.copy(files[1], tmp_path / "zcopy.dcm")
    other = pydicom.dcmread(files[1])
    other.PixelData = bytes(2) + other.PixelData[2:]
    other.save_as(tmp_path / "zother.dcm")
    message = rf"series {UID}\.1: two different slices at the same position, 102\.5 mm: .*zother\.dcm"
    with pytest.raises(InputError, match=message):
        scan([tmp_path])
    found = scan([tmp_path], strict=False)
    assert found.series == []
    assert [fault.series_uid for fault in found.rejected] == [f"{UID}.1"]


def change(**values):
    def edit(z, dataset):
        if z == 2:
            for keyword, value in values.items():
                setattr(dataset, keyword, value)

    return edit


def drop(keyword):
    def edit(z, dataset):
        if z == 2:
            delattr(dataset, keyword)

    return edit


def raw(**values):
    """Text, whatever the type should be."""

    def edit(z, dataset):
        if z == 2:
            for keyword, value in values.items():
                tag = Tag(tag_for_keyword(keyword))
                dataset[tag] = RawDataElement(tag, "LO", len(value), value.encode(), 0, False, True)

    return edit


BAD_SLICES = {
    "size": (change(Rows=32), r"differ in size \(rows, columns\): .*32"),
    "orientation": (change(ImageOrientationPatient=[1, 0, 0, 0, 0.9272, -0.3746]), "differ in orientation"),
    "pixel spacing": (change(PixelSpacing=[0.7, 0.9]), r"differ in spacing \(z, y, x\): .*0.9"),
    "patient": (change(PatientID="bert"), "but not the patient: .*bert"),
    "no position": (drop("ImagePositionPatient"), "has no usable ImagePositionPatient"),
    "no rows": (drop("Rows"), "has no usable Rows"),
    "no rescale": (drop("RescaleIntercept"), "has no usable RescaleIntercept"),
    "zero spacing": (change(PixelSpacing=[0, 0.7]), "has no usable PixelSpacing"),
    "crooked axes": (change(ImageOrientationPatient=[1, 0, 0, 1, 0, 0]), "has no usable ImageOrientationPatient"),
    "palette": (change(PhotometricInterpretation="PALETTE COLOR"), "this is PALETTE COLOR"),
    "frames": (change(NumberOfFrames=3), "holds 3 frames"),
    "no HU": (change(RescaleType="Z_EFF"), r"its values are Z_EFF \(RescaleType\), not HU"),
    "no pixels": (change(Columns=0, PixelData=b""), "says that it has 0 x 64 pixels"),
    "zero slope": (change(RescaleSlope=0), "its RescaleSlope 0 and RescaleIntercept -1024 don't give HU"),
    "huge slope": (change(RescaleSlope="1e39"), r"its RescaleSlope 1e\+39 and"),
    "huge position": (change(ImagePositionPatient=["1e300", 0, 0]), "has no usable geometry"),
    "enhanced": (change(SOPClassUID=EnhancedCTImageStorage), r"is multi-frame \(enhanced\) CT"),
}


@pytest.mark.parametrize("name", BAD_SLICES)
def test_bad_slices(tmp_path, write_series, make_hu, name):
    edit, message = BAD_SLICES[name]
    files = write_series(tmp_path, make_hu(), edit=edit)
    with pytest.raises(InputError, match=message) as error:
        scan([tmp_path])
    assert str(files[2]) in str(error.value) or f"series {UID}.1" in str(error.value)
    assert "\n" not in str(error.value)


def test_truncated_anywhere(tmp_path, write_series, make_hu):
    """Wherever a header is cut off, the file is neither taken for something that isn't CT nor read."""
    (file,) = write_series(tmp_path, make_hu(1, 16, 16))
    content = file.read_bytes()
    for length in [*range(0, len(content), 9), *range(len(content) - 14, len(content))]:
        file.write_bytes(content[:length])
        with pytest.raises(InputError, match=r"truncated|has no") as error:
            scan([tmp_path])
        assert str(file) in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("kept", [0.5, 0.97])
@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless, JPEGLosslessSV1], ids=lambda s: s.keyword)
def test_truncated_compressed(tmp_path, write_series, make_hu, syntax, kept):
    file = write_series(tmp_path, make_hu(), syntax=syntax)[2]
    content = file.read_bytes()
    file.write_bytes(content[: int(kept * len(content))])
    series = only_series(tmp_path)
    with pytest.raises(InputError, match="can't be decoded") as error:
        read_volume(series)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


def test_real_series_with_a_gap(tmp_path):
    """Four slices of a real head scan: three in a row and one 200 mm away."""
    for name in ("17106", "17136", "17166", "17196"):
        shutil.copy(get_testdata_file(f"dicomdirtests/77654033/CT2/{name}", download=False), tmp_path / name)
    with pytest.raises(InputError, match=r"missing between -99\.48 and 103\.02 mm; its slices are 1\.25 mm apart"):
        scan([tmp_path])
    (tmp_path / "17106").unlink()
    series = only_series(tmp_path)
    assert series.shape == (3, 16, 16)
    assert [file.name for file in series.files] == ["17136", "17166", "17196"]
    assert series.spacing == pytest.approx((1.25, 0.488281, 0.488281))


def test_real_head_is_the_same_in_two_transfer_syntaxes(tmp_path):
    volumes = []
    for name in ("693_UNCR.dcm", "693_J2KR.dcm"):
        (tmp_path / name).mkdir()
        shutil.copy(get_testdata_file(name, download=False), tmp_path / name)
        volumes.append(read_volume(only_series(tmp_path / name)))
    np.testing.assert_array_equal(*volumes)
    assert volumes[0].min() == LOWEST_HU
    assert 20 < np.median(volumes[0][0, 200:320, 200:320]) < 30


@pytest.mark.parametrize("keyword", ["Modality", "SOPClassUID", "SliceThickness", "PixelPaddingValue"])
def test_two_values_for_one(tmp_path, write_series, make_hu, keyword):
    """What isn't needed, or can't be told from another modality, doesn't stop the scan."""
    text = {"Modality": "CT\\MR", "SOPClassUID": "1.2\\1.3"}.get(keyword, "2\\3")
    write_series(tmp_path, make_hu(3), edit=raw(**{keyword: text}))
    series = only_series(tmp_path)
    slices = 2 if keyword in ("Modality", "SOPClassUID") else 3
    assert read_volume(series).shape == series.shape == (slices, 64, 64)


@pytest.mark.parametrize("thickness", ["nan", "inf", "-1", ""])
def test_an_unusable_thickness_is_unknown(tmp_path, write_series, make_hu, thickness):
    def edit(z, dataset):
        tag = Tag(tag_for_keyword("SliceThickness"))
        dataset[tag] = RawDataElement(tag, "DS", len(thickness), thickness.encode(), 0, False, True)

    write_series(tmp_path, make_hu(depth=1), edit=edit)
    assert scan([tmp_path]).series[0].spacing[0] == 0


def test_an_unknown_type_in_the_meta_header(tmp_path, write_series, make_hu):
    (file,) = write_series(tmp_path, make_hu(depth=1))
    file.write_bytes(file.read_bytes().replace(b"\x02\x00\x02\x00UI", b"\x02\x00\x02\x00TI", 1))
    with pytest.raises(InputError, match="Unknown Value Representation 'TI'"):
        scan([tmp_path])


def test_a_compressed_file_that_says_it_is_huge(tmp_path, write_series, make_hu):
    """Nothing of the stated size is allocated before a file has proved it."""
    sides = {"Rows": 65535, "Columns": 65535}
    write_series(
        tmp_path,
        make_hu(),
        syntax=JPEG2000Lossless,
    )
    for file in tmp_path.iterdir():
        image = pydicom.dcmread(file)
        for keyword, side in sides.items():
            setattr(image, keyword, side)
        image.save_as(file)
    (series,) = scan([tmp_path]).series
    with limits(), pytest.raises(InputError, match=r"decodes to \[64, 64\] pixels|can't be decoded"):
        read_volume(series)


def test_padding_that_no_pixel_can_have(tmp_path, write_series, make_hu):
    hu = make_hu()
    write_series(tmp_path, hu, edit=raw(PixelPaddingValue="9" * 30))
    np.testing.assert_array_equal(only_series(tmp_path).read(), hu)
