"""DICOM in, DICOM out, checked with pydicom, SimpleITK and, where it is installed, David Clunie's dciodvfy."""

import datetime
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk  # noqa: N813
from pydicom.data import get_testdata_file
from pydicom.pixels import apply_modality_lut, apply_voi_lut
from pydicom.uid import (
    ExplicitVRLittleEndian,
    MRImageStorage,
    RLELossless,
)

from lidnet_fast.cli import main
from lidnet_fast.data.formats.dicom.series import scan
from lidnet_fast.errors import InputError
from lidnet_fast.inference import denoise
from tests.data.conftest import SYNTAXES

REAL = {
    "head": "693_UNCR.dcm",  # padded with -2000, 14 bits of 16
    "head_j2k": "693_J2KR.dcm",
    "chest": "CT_small.dcm",
    "tilted": "J2K_pixelrep_mismatch.dcm",
    "abdomen": "explicit_VR-UN.dcm",
    "spine": "bad_sequence.dcm",  # unsigned, 12 bits, JPEG lossless, UIDs that aren't
}
CHANGED = {
    *("ImageType", "InstanceCreationDate", "InstanceCreationTime", "SOPInstanceUID", "SeriesDate", "SeriesTime"),
    *("ContentDate", "ContentTime", "SeriesDescription", "DerivationDescription", "DerivationCodeSequence"),
    *("SourceImageSequence", "ContributingEquipmentSequence", "SeriesInstanceUID", "SeriesNumber", "PixelData"),
}
DROPPED = {"SmallestImagePixelValue", "LargestImagePixelValue", "DigitalSignaturesSequence", "IconImageSequence"}


def real(name):
    return Path(get_testdata_file(REAL[name], download=False))


def results(out):
    """Source file name -> result."""
    return {path.name: path for path in out.rglob("*") if path.is_file() and path.name != "denoise.json"}


def hu_of(image):
    return apply_modality_lut(image.pixel_array, image)


@pytest.fixture(scope="session")
def real_out(tmp_path_factory, run):
    """Real CT of five patients, and what became of it."""
    source, out = tmp_path_factory.mktemp("real"), tmp_path_factory.mktemp("out") / "denoised"
    for name in REAL:
        shutil.copy(real(name), source / name)
    summary = denoise(source, out, model=run, precision="float32", device="cpu")
    assert summary.failures == []
    # The head is there twice: uncompressed and in JPEG 2000, as one image of one series.
    assert summary.slices == 5
    assert summary.skipped == {"copies of another": 1}
    return out


@pytest.mark.parametrize("name", [name for name in REAL if name != "head_j2k"])
def test_real_ct_keeps_what_holds(real_out, expected, name):
    source, result = pydicom.dcmread(real(name)), pydicom.dcmread(results(real_out)[name])
    differing = {
        element.keyword
        for element in (*source, *result)
        if element.tag.element and source.get(element.tag) != result.get(element.tag)
    }
    assert differing <= CHANGED | DROPPED
    assert not DROPPED & set(result.dir())
    assert result.file_meta.TransferSyntaxUID == ExplicitVRLittleEndian
    assert result.file_meta.MediaStorageSOPInstanceUID == result.SOPInstanceUID != source.SOPInstanceUID
    stored, made = source.pixel_array, result.pixel_array
    assert made.dtype == stored.dtype
    hu = np.maximum(hu_of(source), -1024)
    outside = hu_of(source) < -1024
    np.testing.assert_array_equal(made[outside], stored[outside])
    assert name != "head" or outside.mean() > 0.1
    # Half a step of rounding, at a slope of 1.
    assert np.abs(hu_of(result) - expected(hu[None])[0].clip(-1024))[~outside].max() <= 0.5 + 1e-3
    assert (made != stored).mean() > 0.1


def test_what_a_result_says_of_itself(real_out):
    source, result = pydicom.dcmread(real("chest")), pydicom.dcmread(results(real_out)["chest"])
    manifest = json.loads((real_out / "denoise.json").read_text())
    assert list(result.ImageType) == ["DERIVED", "SECONDARY", "AXIAL"]
    assert result.SeriesDescription == f"denoised mine {manifest['model'][:8]}"
    assert f"model mine, SHA-256 {manifest['model'][:16]}, computed in float32" in result.DerivationDescription
    assert result.SeriesNumber == source.SeriesNumber + 1000
    (reference,) = result.SourceImageSequence
    assert reference.ReferencedSOPInstanceUID == source.SOPInstanceUID
    assert reference.ReferencedSOPClassUID == source.SOPClassUID
    assert result.DerivationCodeSequence[-1].CodeValue == "113087"
    assert result.ContributingEquipmentSequence[-1].ManufacturerModelName == "lidnet-fast denoise"
    day = datetime.datetime.fromisoformat(manifest["created"])
    assert result.InstanceCreationDate + result.InstanceCreationTime == day.strftime("%Y%m%d%H%M%S")
    for keyword in ("PatientID", "PatientName", "StudyInstanceUID", "FrameOfReferenceUID", "WindowCenter"):
        assert result.get(keyword) == source.get(keyword)


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="needs dciodvfy (Debian: apt-get install dicom3tools)")
@pytest.mark.parametrize("name", [name for name in REAL if name not in ("head_j2k", "spine")])
def test_validator_finds_nothing_new(real_out, name):
    assert faults(results(real_out)[name]) <= faults(real(name))


def faults(path):
    lines = subprocess.run(["dciodvfy", str(path)], capture_output=True, text=True, check=False).stderr.splitlines()
    assert any("CTImage" in line or "CT" in line for line in lines), lines
    return {line for line in lines if line.startswith(("Error", "Warning"))}


def read_with_itk(files):
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames([str(file) for file in files])
    return reader.Execute()


@pytest.mark.parametrize(
    "syntax",
    SYNTAXES,
    ids=lambda syntax: syntax.keyword,
)
def test_series_as_a_viewer_reads_it(tmp_path, run, expected, write_series, make_hu, syntax):
    hu = make_hu(5, 40, 56)
    files = write_series(
        tmp_path / "in", hu, orientation=(0.8, 0.6, 0, -0.36, 0.48, 0.8), slope=2, intercept=-1000, syntax=syntax
    )
    summary = denoise(tmp_path / "in", tmp_path / "out", model=run, precision="float32", device="cpu", batch_size=2)
    assert summary.failures == []
    (folder,) = (path for path in (tmp_path / "out").iterdir() if path.is_dir())
    (uid,) = sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder))
    assert uid == folder.name == pydicom.dcmread(next(folder.iterdir())).SeriesInstanceUID
    names = [Path(name).name for name in sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), uid)]
    assert names == [file.name for file in files]
    before, after = read_with_itk(files), read_with_itk([folder / name for name in names])
    for what in ("Size", "Spacing", "Origin", "Direction"):
        assert getattr(after, f"Get{what}")() == getattr(before, f"Get{what}")()
    assert after.GetPixelID() == before.GetPixelID()
    source = sitk.GetArrayFromImage(before)
    assert np.abs(sitk.GetArrayFromImage(after) - expected(source).clip(-1024)).max() <= 1 + 1e-3
    image = pydicom.dcmread(folder / names[0])
    image.WindowCenter, image.WindowWidth = 40, 400
    assert apply_voi_lut(hu_of(image), image).std() > 0


def edit_of(**values):
    def edit(z, dataset):
        for keyword, value in values.items():
            if value is None:
                delattr(dataset, keyword)
            else:
                setattr(dataset, keyword, value)

    return edit


def test_values_that_cannot_be_stored_become_the_nearest(tmp_path, make_run, write_series, make_hu):
    """12 unsigned bits, and a network that adds far more than they hold."""
    import torch

    run = make_run("small", channels=1, layers=2)
    model = run / "collaborate" / "denoiser.pt"
    content = torch.load(model, weights_only=True)
    content["state_dict"] = {k: torch.zeros_like(v) for k, v in content["state_dict"].items()}
    content["state_dict"]["body.2.bias"] += 2  # 2 windows of 1400 HU
    torch.save(content, model)
    hu = make_hu(2).clip(-1024, 3071)
    hu[:, :9] = -2000

    def edit(z, dataset):
        stored = np.where(hu[z] < -1024, 63, hu[z] + 1087)
        dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 12, 11, 0
        dataset.PixelPaddingValue = 63
        dataset.RescaleIntercept = -1087  # the padding is -1024 HU
        dataset.PixelData = stored.astype(np.uint16).tobytes()

    files = write_series(tmp_path / "in", hu, edit=edit)
    denoise(tmp_path / "in", tmp_path / "out", model=model, device="cpu")
    for file in files:
        stored, made = (
            pydicom.dcmread(file).pixel_array,
            pydicom.dcmread(results(tmp_path / "out")[file.name]).pixel_array,
        )
        assert (made[:9] == 63).all()
        seen = stored[9:] <= 1087 + 1500  # beyond, a denoiser changes nothing
        expected = np.where(seen, np.minimum(stored[9:].astype(int) + 2800, 4095), stored[9:])
        np.testing.assert_array_equal(made[9:], expected)


def test_slices_need_not_be_a_volume(tmp_path, run, write_series, make_hu):
    """Missing slices, slices of other size, without position or spacing, at one place twice: each is denoised."""
    files = write_series(tmp_path / "in", make_hu(6))
    files[2].unlink()
    image = pydicom.dcmread(files[3])
    del image.ImagePositionPatient, image.PixelSpacing
    image.save_as(files[3])
    image = pydicom.dcmread(files[4])
    image.Rows, image.PixelData = 32, image.PixelData[: 32 * 64 * 2]
    image.save_as(files[4])
    summary = denoise(tmp_path / "in", tmp_path / "out", model=run, device="cpu", batch_size=4)
    assert (summary.denoised, summary.slices, summary.failures) == (1, 5, [])
    assert pydicom.dcmread(results(tmp_path / "out")[files[4].name]).pixel_array.shape == (32, 64)


@pytest.fixture
def enhanced(tmp_path):
    """The only enhanced CT that pydicom has, two frames of perfusion, turned into HU."""
    image = pydicom.dcmread(get_testdata_file("eCT_Supplemental.dcm", download=False))
    shared = image.SharedFunctionalGroupsSequence[0]
    image.ImageType = shared.CTImageFrameTypeSequence[0].FrameType = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    transformation = shared.PixelValueTransformationSequence[0]
    del shared.PixelValueTransformationSequence
    for frame, slope in zip(image.PerFrameFunctionalGroupsSequence, (1, 0.5), strict=True):
        own = pydicom.Dataset()
        own.update(transformation)
        own.RescaleType, own.RescaleSlope = "HU", slope
        frame.PixelValueTransformationSequence = [own]
    path = tmp_path / "in" / "enhanced.dcm"
    path.parent.mkdir()
    image.save_as(path)
    return path


def test_enhanced(tmp_path, run, expected, enhanced):
    summary = denoise(enhanced, tmp_path / "out", model=run, precision="float32", device="cpu")
    assert (summary.denoised, summary.slices) == (1, 2)
    source, result = pydicom.dcmread(enhanced), pydicom.dcmread(results(tmp_path / "out")["enhanced.dcm"])
    for frame, slope in enumerate((1, 0.5)):
        hu = source.pixel_array[frame].astype(float) * slope - 1024
        made = result.pixel_array[frame].astype(float) * slope - 1024
        assert np.abs(made - expected(hu[None])[0].clip(-1024)).max() <= 0.5 * slope + 1e-3
    shared = result.SharedFunctionalGroupsSequence[0]
    assert list(result.ImageType) == ["DERIVED", "PRIMARY", "VOLUME", "NONE"]
    assert list(shared.CTImageFrameTypeSequence[0].FrameType) == ["DERIVED", "PRIMARY", "VOLUME", "NONE"]
    (reference,) = shared.DerivationImageSequence[0].SourceImageSequence
    assert reference.ReferencedSOPInstanceUID == source.SOPInstanceUID
    if shutil.which("dciodvfy"):
        assert faults(results(tmp_path / "out")["enhanced.dcm"]) <= faults(enhanced)


def test_a_perfusion_map_is_not_hu(tmp_path, run):
    path = get_testdata_file("eCT_Supplemental.dcm", download=False)
    summary = denoise(path, tmp_path / "out", model=run, device="cpu")
    assert len(summary.failures) == 1
    assert "its values are ml/100ml/s (MeasurementUnitsCodeSequence), not HU" in summary.failures[0]
    assert list(results(tmp_path / "out")) == []


@pytest.fixture
def studies(tmp_path, write_series, make_hu):
    """Two patients; beside three good series, a damaged one and what isn't CT."""
    root = tmp_path / "studies"
    uid = "1.2.826.0.1.3680043.8.498"
    write_series(root / "anna" / "ct", make_hu(3, seed=1), series_uid=f"{uid}.1")
    write_series(root / "anna" / "ct", make_hu(2, seed=2), series_uid=f"{uid}.2")
    write_series(root / "bert", make_hu(4, seed=3), series_uid=f"{uid}.3", patient_id="bert", suffix="")
    damaged = write_series(root / "bert" / "old", make_hu(3, seed=4), series_uid=f"{uid}.4", patient_id="bert")
    damaged[1].write_bytes(damaged[1].read_bytes()[:-1000])
    write_series(
        root / "anna", make_hu(1), series_uid=f"{uid}.5", edit=edit_of(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    )
    mr = write_series(root / "mr", make_hu(2), series_uid=f"{uid}.6")
    for file in mr:
        image = pydicom.dcmread(file)
        image.file_meta.MediaStorageSOPClassUID = image.SOPClassUID = MRImageStorage
        image.save_as(file)
    (root / "notes.txt").write_text("a note")
    return root


def test_a_tree_of_studies(tmp_path, run, studies, capsys):
    out = studies / "denoised"
    arguments = ["denoise", str(studies), str(out), "--model", str(run), "--device", "cpu", "--precision", "float32"]
    for denoised, already in ((3, 0), (0, 3)):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
        output = capsys.readouterr()
        assert f"{denoised} series ({9 if denoised else 0} slices) denoised" in output.out
        assert ("3 were there already" in output.out) == bool(already)
        assert "skipped: 1 files localiser, 2 files not CT, 1 files not DICOM" in output.out
        first, last = output.err.splitlines()
        assert re.search(r"studies/bert/old/4_\d+\.dcm: its pixels can't be decoded \(truncated\?\)", first)
        assert last == f"lidnet-fast: {out}: 1 series or files aren't in it, see above"
        sources = {path.relative_to(studies): path for path in studies.rglob("*") if out not in path.parents}
        good = {path for path in sources if path.parts[0] in ("anna", "bert") and re.match(r"[123]_", path.name)}
        made = [path.relative_to(out) for path in out.rglob("*") if path.is_file() and path.name != "denoise.json"]
        # A folder per series stands between a file's folder and its name.
        assert {path.parent.parent / path.name for path in made} == good
        assert len({path.parent for path in made}) == 3
    for path in made:
        source = pydicom.dcmread(studies / path.parent.parent / path.name)
        result = pydicom.dcmread(out / path)
        assert result.SourceImageSequence[0].ReferencedSOPInstanceUID == source.SOPInstanceUID
        assert result.SeriesInstanceUID == path.parent.name
        assert result.StudyInstanceUID == source.StudyInstanceUID


def contents(out):
    return {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_killed_at_any_moment(tmp_path, run, write_series, make_hu):
    """Whatever is under its final name is whole; in the end, all is as if nothing had happened."""
    source, whole, out = tmp_path / "in", tmp_path / "whole", tmp_path / "out"
    for series in range(4):
        write_series(source / "s", make_hu(12, 128, 128, seed=series), series_uid=f"1.2.3.{series}")
    options = {"model": run, "precision": "float32", "device": "cpu", "batch_size": 3}
    denoise(source, whole, **options)
    reference = contents(whole)
    out.mkdir()
    shutil.copy(whole / "denoise.json", out)  # which has the time of creation
    script = tmp_path / "kill_me.py"
    # Killed by itself when so many files have been renamed, so that the moment isn't one of luck.
    script.write_text(
        "import os, signal, sys, pathlib\n"
        "from lidnet_fast.inference import denoise\n"
        "left = int(sys.argv[4])\n"
        "replace, write = pathlib.Path.replace, pathlib.Path.open\n"
        "def counting(self, target):\n"
        "    global left\n"
        "    left -= 1\n"
        "    if left == 0:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return replace(self, target)\n"
        "pathlib.Path.replace = counting\n"
        "denoise(sys.argv[1], sys.argv[2], model=sys.argv[3], precision='float32', device='cpu', batch_size=3)\n"
    )
    for left in (11, 17):
        command = [sys.executable, str(script), str(source), str(out), str(run), str(left)]
        assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
        finished = {path for path in contents(out) if ".part" not in str(path) and path.name != ".lock"}
        assert all(contents(out)[path] == reference[path] for path in finished)
    process = subprocess.Popen([*command[:-1], "1000"])
    time.sleep(2.5)  # anywhere
    process.kill()
    process.wait()
    denoise(source, out, **options)
    assert contents(out) == reference


def test_goes_on_where_only_the_name_is_missing(tmp_path, run, write_series, make_hu):
    write_series(tmp_path / "in", make_hu(5))
    denoise(tmp_path / "in", tmp_path / "out", model=run, device="cpu", precision="float32")
    (series,) = (path for path in (tmp_path / "out").iterdir() if path.is_dir())
    reference = contents(tmp_path / "out")
    series.rename(series.with_name(f".{series.name}.part"))
    denoise(tmp_path / "in", tmp_path / "out", model=run, device="cpu", precision="float32")
    assert contents(tmp_path / "out") == reference


def test_goes_on_with_the_slice_after_the_last(tmp_path, run, write_series, make_hu):
    files = write_series(tmp_path / "in", make_hu(5))
    denoise(tmp_path / "in", tmp_path / "out", model=run, device="cpu", precision="float32")
    (series,) = (path for path in (tmp_path / "out").iterdir() if path.is_dir())
    reference = contents(tmp_path / "out")
    series.rename(series.with_name(f".{series.name}.part"))
    (series.with_name(f".{series.name}.part") / files[3].name).unlink()
    summary = denoise(tmp_path / "in", tmp_path / "out", model=run, device="cpu", precision="float32")
    assert summary.slices == 1
    assert contents(tmp_path / "out") == reference


BAD_SLICES = {
    "no slope": (edit_of(RescaleSlope=None), "has no usable RescaleSlope"),
    "slope of zero": (edit_of(RescaleSlope=0), "RescaleSlope 0 and RescaleIntercept -1024 don't give HU"),
    "infinite slope": (edit_of(RescaleSlope="1e999"), "has no usable RescaleSlope"),
    "not HU": (edit_of(RescaleType="Z_EFF"), r"its values are Z_EFF \(RescaleType\), not HU"),
    "no pixels": (edit_of(PixelData=None), "its pixels can't be decoded"),
    "no rows": (edit_of(Rows=None), "its pixels can't be decoded"),
    "too many rows": (edit_of(Rows=65535, Columns=65535), "its pixels can't be decoded"),
    "colour": (
        edit_of(SamplesPerPixel=3, PlanarConfiguration=0, PhotometricInterpretation="RGB", Rows=16),
        "3 samples",
    ),
    "two rescalings": (edit_of(RescaleSlope=[1, 2]), "has no usable RescaleSlope"),
}


@pytest.mark.parametrize("name", BAD_SLICES)
def test_bad_slices(tmp_path, run, write_series, make_hu, name):
    edit, message = BAD_SLICES[name]
    (bad,) = write_series(tmp_path / "in", make_hu(1, 48, 48), series_uid="1.2.3.1", edit=edit)
    write_series(tmp_path / "in", make_hu(1), series_uid="1.2.3.2")
    summary = denoise(tmp_path / "in", tmp_path / "out", model=run, device="cpu")
    (failure,) = summary.failures
    assert re.search(message, failure)
    assert str(bad) in failure
    assert "\n" not in failure
    assert len(results(tmp_path / "out")) == 1


def test_out_that_is_something_else(tmp_path, run, make_run, write_series, make_hu):
    write_series(tmp_path / "in", make_hu(1))
    out = tmp_path / "out"
    denoise(tmp_path / "in", out, model=run, device="cpu", precision="float32")
    before = contents(out)
    for options, message in (
        ({"model": make_run(seed=1)}, "holds denoised images of model .*, not .*; choose another folder"),
        ({"precision": "bfloat16"}, "holds denoised images of precision float32, not bfloat16"),
        ({"blend": 0.5}, r"holds denoised images of blend 1.0, not 0.5"),
    ):
        with pytest.raises(InputError, match=message):
            denoise(tmp_path / "in", out, **{"model": run, "device": "cpu", "precision": "float32", **options})
    write_series(tmp_path / "in" / "more", make_hu(1, seed=1))
    (failure,) = denoise(tmp_path / "in", out, model=run, device="cpu", precision="float32").failures
    assert "holds 1 files, but series 1.2.826.0.1.3680043.8.498.1 has 2; remove the folder" in failure
    assert contents(out) == before
    (out / "denoise.json").write_text("[]")
    with pytest.raises(InputError, match="isn't the record of a folder of denoised images"):
        denoise(tmp_path / "in", out, model=run, device="cpu")
    for taken in (tmp_path / "in", run / "collaborate" / "denoiser.pt"):
        with pytest.raises(InputError, match=r"isn't empty and holds no denoised images|no CT found"):
            denoise(tmp_path / "in", taken, model=run, device="cpu")


def test_nothing_is_made_when_nothing_can_be_done(tmp_path, run, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "note.dcm").write_text("no image")
    model, out = ["--model", str(run)], str(tmp_path / "out")
    for arguments, message in (
        ([str(tmp_path / "nowhere"), out, *model], "nowhere: there is no such file or folder"),
        ([str(tmp_path / "empty"), out, *model], "empty: no CT found (no files at all)"),
        ([str(tmp_path / "note.dcm"), out, *model], "note.dcm: isn't a DICOM file, whatever its name says"),
        ([str(tmp_path / "empty"), out, "--model", str(tmp_path)], "there is no checkpoint"),
        ([str(tmp_path / "empty"), out], "model"),
        ([str(tmp_path / "empty"), out, *model, "--precision", "16"], "precision"),
        ([str(tmp_path / "empty"), out, *model, "--tile", "-3"], "tile must be at least 1, got -3"),
        ([str(tmp_path / "empty"), out, *model, "--blend", "2"], "blend must lie in [0, 1], got 2.0"),
        ([str(tmp_path / "empty"), str(tmp_path / "out.nii"), *model], "out.nii: is the name of a volume"),
        ([str(tmp_path / "empty"), str(tmp_path / "out.dcm"), *model], "out.dcm: is the name of a file, and DICOM is"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["denoise", *arguments])
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert not Path(out).exists()


def same_sop_uid(z, dataset):
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = "1.2.3.4"


def test_different_images_with_one_identifier_are_refused_by_name(tmp_path, run, write_series, make_hu, capsys):
    """Eight slices under one SOPInstanceUID came out as one, with exit status 0."""
    write_series(tmp_path / "in" / "shared", make_hu(8), series_uid="1.2.1", edit=same_sop_uid)
    write_series(tmp_path / "in" / "sound", make_hu(2), series_uid="1.2.2")
    with pytest.raises(SystemExit) as stop:
        main(["denoise", str(tmp_path / "in"), str(tmp_path / "out"), "--model", str(run)])
    assert stop.value.code == 2
    said = capsys.readouterr()
    assert re.search(r"series 1\.2\.1: .*shared.* and .* share a SOPInstanceUID, but are different images", said.err)
    assert "copies of another" not in said.out
    assert len(results(tmp_path / "out")) == 2


def test_patients_who_share_identifiers_are_refused(tmp_path, run, write_series, make_hu):
    """The second patient was missing, with exit status 0."""
    write_series(tmp_path / "in" / "a", make_hu(3), patient_id="a")
    write_series(tmp_path / "in" / "b", make_hu(3, seed=1), patient_id="b")
    write_series(tmp_path / "in" / "sound", make_hu(2), series_uid="1.2.2")
    summary = denoise(tmp_path / "in", tmp_path / "out", model=run)
    (failure,) = summary.failures
    assert re.search(r"in/a/.* and .*in/b/.* share its SeriesInstanceUID, but not the patient", failure)
    assert len(results(tmp_path / "out")) == 2


def test_a_copy_agrees_in_position_and_pixels(tmp_path, run, write_series, make_hu):
    """Of one image in two transfer syntaxes, one is denoised; a copy that was moved is another image."""

    def named_by_slice(z, dataset):
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = f"1.2.3.{z}"

    hu = make_hu(2)
    write_series(tmp_path / "in" / "a", hu, edit=named_by_slice)
    write_series(tmp_path / "in" / "b", hu, syntax=RLELossless, edit=named_by_slice)
    assert denoise(tmp_path / "in", tmp_path / "out", model=run).skipped == {"copies of another": 2}
    write_series(tmp_path / "renamed" / "a", hu)
    write_series(tmp_path / "renamed" / "b", hu, intercept=0)  # UIDs of their own, other numbers for the same HU
    assert denoise(tmp_path / "renamed", tmp_path / "out1", model=run).skipped == {"copies of another": 2}
    assert scan([tmp_path / "renamed"]).skipped == {"copies of another": 2}
    write_series(tmp_path / "moved" / "a", hu, edit=named_by_slice)
    write_series(tmp_path / "moved" / "b", hu, origin=(0.0, 0.0, 500.0), edit=named_by_slice)
    with pytest.raises(InputError, match="share a SOPInstanceUID, but are different images"):
        denoise(tmp_path / "moved", tmp_path / "out2", model=run)
