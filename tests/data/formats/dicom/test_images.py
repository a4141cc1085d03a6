"""Which files are CT images and which series they are of: the same answer in prepare and in denoise."""

import numpy as np
import pydicom
import pytest
from pydicom.uid import CTImageStorage, MRImageStorage

from lidnet_fast.cli import main
from lidnet_fast.data.formats.sources import find_series
from lidnet_fast.data.prepare.plan import prepare
from lidnet_fast.data.store.reader import Store
from lidnet_fast.errors import InputError
from lidnet_fast.inference import denoise
from lidnet_fast.inference.sources import find
from tests.inference.conftest import make_run, run

__all__ = ["make_run", "run"]

CORONAL, SAGITTAL = (1, 0, 0, 0, 0, -1), (0, 1, 0, 0, 0, -1)


def found(folder, **options):
    """UIDs of the series that both commands find, and what both skip."""
    prepared = find_series([folder], "", strict=False, resample=False, **options)
    denoised = find(folder, folder / "out", **options)
    assert prepared.skipped == denoised.skipped
    assert prepared.rejected == denoised.rejected == []
    uids = sorted(series.series_uid for series in prepared.series)
    assert uids == sorted(series.uid for series in denoised.series)
    return uids, dict(prepared.skipped)


def typed(*image_type, description=None):
    def edit(z, dataset):
        if image_type:
            dataset.ImageType = list(image_type)
        else:
            del dataset.ImageType
        if description is not None:
            dataset.SeriesDescription = description

    return edit


SKIPPED = "reformats, which --reformats takes"


def test_reformats_beside_the_axial_series(tmp_path, write_series, make_hu, run, capsys):
    write_series(tmp_path / "ct", make_hu(4), series_uid="1.2.1")
    derived = typed("DERIVED", "SECONDARY", "AXIAL")
    write_series(tmp_path / "ct", make_hu(3), series_uid="1.2.2", orientation=CORONAL, edit=derived)
    write_series(tmp_path / "ct", make_hu(2), series_uid="1.2.3", orientation=SAGITTAL, edit=derived)
    mip = typed("DERIVED", "SECONDARY", "AXIAL", "MIP")
    write_series(tmp_path / "ct", make_hu(5), series_uid="1.2.4", edit=mip)
    assert found(tmp_path / "ct") == (["1.2.1"], {SKIPPED: 10})
    assert found(tmp_path / "ct", reformats=True) == (["1.2.1", "1.2.2", "1.2.3", "1.2.4"], {})
    main(["prepare", str(tmp_path / "ct"), "--out", str(tmp_path / "store"), "--val-fraction", "0"])
    assert f"skipped: 10 files {SKIPPED}" in capsys.readouterr().out
    main(["denoise", str(tmp_path / "ct"), str(tmp_path / "out"), "--model", str(run)])
    assert "1 series (4 slices) denoised\n" in (said := capsys.readouterr().out)
    assert f"skipped: 10 files {SKIPPED}" in said
    assert denoise(tmp_path / "ct", tmp_path / "all", model=run, reformats=True).slices == 14


@pytest.mark.parametrize(
    "edit",
    [
        typed("DERIVED", "SECONDARY", "REFORMATTED", "AVERAGE"),
        typed("DERIVED", "SECONDARY", "REFORMATTED", "MIN IP"),
        typed("DERIVED", "SECONDARY", "OTHER", "CSA MPR", "", "CSAPARALLEL"),
        typed("DERIVED", "SECONDARY", "AXIAL", "CT_SOM5 MIP"),
        typed("ORIGINAL", "PRIMARY", "MPR"),
        typed("DERIVED", "SECONDARY", description="Thorax MIP 10.0"),
    ],
)
def test_what_calls_itself_a_reformat(tmp_path, write_series, make_hu, edit):
    write_series(tmp_path, make_hu(2), series_uid="1.2.1", edit=edit)
    with pytest.raises(InputError, match=r"no CT found \(2 files reformats, which --reformats takes\)"):
        found(tmp_path)
    assert found(tmp_path, reformats=True)[0] == ["1.2.1"]


@pytest.mark.parametrize(
    ("orientation", "edit"),
    [
        (CORONAL, typed("ORIGINAL", "PRIMARY", "AXIAL")),  # a head that lies coronally in the gantry
        ((1, 0, 0, 0, 0.8, -0.6), typed("DERIVED", "PRIMARY", "AXIAL")),  # tilted by 37 degrees
        ((1, 0, 0, 0, 1, 0), typed("DERIVED", "SECONDARY", "AXIAL")),  # such as a denoiser's
        ((1, 0, 0, 0, 1, 0), typed("DERIVED")),
        ((1, 0, 0, 0, 1, 0), typed()),
        ((1, 0, 0, 0, 1, 0), typed("ORIGINAL", "PRIMARY", "AXIAL", description="for MIP and MPR")),
        ((1, 0, 0, 0, 1, 0), typed("DERIVED", "PRIMARY", "AXIAL", description="after Amipaque")),
    ],
)
def test_what_is_no_reformat(tmp_path, write_series, make_hu, orientation, edit):
    write_series(tmp_path, make_hu(2), series_uid="1.2.1", orientation=orientation, edit=edit)
    assert found(tmp_path) == (["1.2.1"], {})


def test_frames_that_are_reformats(tmp_path):
    """A slab's maximum in enhanced CT says so in its functional groups alone."""
    image = pydicom.dcmread(pydicom.data.get_testdata_file("eCT_Supplemental.dcm", download=False))
    shared = image.SharedFunctionalGroupsSequence[0]
    del shared.PixelValueTransformationSequence[0].RescaleType
    shared.PixelValueTransformationSequence[0].RescaleType = "HU"
    shared.CTImageFrameTypeSequence[0].VolumeBasedCalculationTechnique = "MAX_IP"
    image.save_as(tmp_path / "slab.dcm")
    with pytest.raises(InputError, match="1 files reformats"):
        found(tmp_path)
    assert len(found(tmp_path, reformats=True)[0]) == 1


BLANKED = ("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "PatientID")


def blanked(*keywords, remove=False):
    def edit(z, dataset):
        for keyword in keywords:
            if remove:
                delattr(dataset, keyword)
            else:
                setattr(dataset, keyword, "")

    return edit


@pytest.mark.parametrize("remove", [False, True])
def test_identifiers_that_were_emptied(tmp_path, write_series, make_hu, run, remove):
    hu = make_hu(20, 32, 32)
    files = write_series(tmp_path / "ct", hu, edit=blanked(*BLANKED, remove=remove))
    ((uid,), skipped) = found(tmp_path / "ct")
    assert skipped == {}
    (series,) = find_series([tmp_path / "ct"], "", strict=True, resample=False).series
    np.testing.assert_array_equal(series.read(), hu)
    assert list(series.files) == files
    assert series.patient_id == uid
    uids = [pydicom.dcmread(file).file_meta.MediaStorageSOPInstanceUID for file in files]
    assert list(series.sop_instance_uids) == uids
    prepare([tmp_path / "ct"], tmp_path / "store", val_fraction=0, test_fraction=0)
    assert Store(tmp_path / "store").series[0].series_uid == uid
    summary = denoise(tmp_path / "ct", tmp_path / "out", model=run)
    assert (summary.slices, summary.failures) == (20, [])
    made = [pydicom.dcmread(path) for path in (tmp_path / "out").rglob("*.dcm")]
    assert {image.SourceImageSequence[0].ReferencedSOPInstanceUID for image in made} == set(uids)
    assert {image.SOPClassUID for image in made} == {CTImageStorage}
    (made_uid,) = {image.SeriesInstanceUID for image in made}
    assert made_uid.startswith("1.2.826.0.1.3680043.8.498.")
    assert len({image.SOPInstanceUID for image in made} - {uid, made_uid, *uids}) == 20
    (tmp_path / "ct").rename(tmp_path / "elsewhere")
    assert found(tmp_path / "elsewhere") == ([uid], {})
    assert denoise(tmp_path / "elsewhere", tmp_path / "out", model=run).already == 1


def test_series_without_identifiers_are_told_apart(tmp_path, write_series, make_hu):
    """By folder, by geometry, by patient; nothing is merged that isn't one series for sure."""
    write_series(tmp_path / "a", make_hu(3), edit=blanked(*BLANKED))
    write_series(tmp_path / "b", make_hu(3, seed=1), edit=blanked(*BLANKED))
    write_series(tmp_path / "a", make_hu(4), series_uid="1.2.8", spacing=(2.5, 0.5, 0.5), edit=blanked(*BLANKED))
    write_series(tmp_path / "a", make_hu(5), series_uid="1.2.9", patient_id="b", edit=blanked("SeriesInstanceUID"))
    uids, _ = found(tmp_path)
    assert len(uids) == 4
    series = find_series([tmp_path], "", strict=True, resample=False).series
    assert sorted(one.shape[0] for one in series) == [3, 3, 4, 5]
    assert len({one.patient_id for one in series}) == 4


def test_nothing_identifies_an_image(tmp_path, write_series, make_hu):
    """Under one name for two images nobody could tell them apart."""

    def edit(z, dataset):
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
        dataset.SOPInstanceUID = ""

    write_series(tmp_path / "shared", make_hu(3), edit=edit)
    (rejected,) = find(tmp_path / "shared", tmp_path / "out").rejected
    assert "share a SOPInstanceUID, but are different images" in rejected.reason
    (file,) = write_series(tmp_path / "none", make_hu(1), edit=blanked("SOPInstanceUID"))
    content, uid = file.read_bytes(), pydicom.dcmread(file).file_meta.MediaStorageSOPInstanceUID.encode()
    file.write_bytes(content.replace(uid, b" " * len(uid)))
    for rejected in (
        find(tmp_path / "none", tmp_path / "out").rejected,
        find_series([tmp_path / "none"], "", strict=False, resample=False).rejected,
    ):
        assert "has no MediaStorageSOPInstanceUID" in rejected[0].reason


def elements(**values):
    def edit(z, dataset):
        for keyword, value in values.items():
            setattr(dataset, keyword, value)

    return edit


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (elements(PhotometricInterpretation="MONOCHROME1"), None),
        (elements(RescaleType="hu"), None),
        (elements(RescaleType="US"), None),
        (elements(RescaleType="Z_EFF"), "its values are Z_EFF"),
        (elements(PhotometricInterpretation="PALETTE COLOR"), "this is PALETTE COLOR"),
        (elements(RescaleSlope=0), "don't give HU"),
        (elements(SOPClassUID=MRImageStorage, Modality="MR"), "not CT"),
        (elements(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), "localiser"),
        (elements(ImageType=["DERIVED", "SECONDARY", "SCREEN SAVE"]), "dose report"),
        (elements(ImageType="LOCALIZER"), "localiser"),
    ],
)
def test_one_verdict(tmp_path, write_series, make_hu, run, edit, reason):
    """prepare and denoise use, skip or reject the same files for the same reason."""

    def changed(z, dataset):
        edit(z, dataset)
        dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID

    hu = make_hu(2, 32, 32)
    write_series(tmp_path / "in", make_hu(3, 32, 32), series_uid="1.2.1")
    write_series(tmp_path / "in", hu, series_uid="1.2.2", edit=changed)
    prepared = prepare([tmp_path / "in"], tmp_path / "store", val_fraction=0, test_fraction=0)
    denoised = denoise(tmp_path / "in", tmp_path / "out", model=run)
    assert prepared.skipped == denoised.skipped
    if reason is None:
        assert (prepared.series["train"], denoised.slices) == (2, 5)
        np.testing.assert_array_equal(Store(tmp_path / "store").read(1, 1), hu[1])
        assert not prepared.rejected
        assert not denoised.failures
    else:
        assert (prepared.series["train"], denoised.slices) == (1, 3)
        if not prepared.skipped:
            (rejected,), (failure,) = prepared.rejected, denoised.failures
            assert reason in rejected.reason
            assert reason in failure
        else:
            assert dict(prepared.skipped) == {reason: 2}
