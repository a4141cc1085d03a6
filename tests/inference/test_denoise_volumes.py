"""NIfTI, MetaImage and NRRD in and out, checked with SimpleITK."""

import gzip
import shutil

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from filelock import FileLock
from nibabel.spatialimages import HeaderDataError

from lidnet_fast.cli import main
from lidnet_fast.data.formats.sources import find_series
from lidnet_fast.data.formats.volumes import itk, nifti
from lidnet_fast.data.formats.volumes.files import is_volume, read_voxels
from lidnet_fast.errors import InputError
from lidnet_fast.inference import denoise
from lidnet_fast.inference.sources import find

# Rotated about the patient's length, oblique, and left-handed.
DIRECTION = (0.8, -0.6, 0.0, 0.6, 0.8, 0.0, 0.0, 0.0, -1.0)


def write(path, values, direction=DIRECTION):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(values)
    image.SetSpacing((0.7, 0.8, 2.5))
    image.SetOrigin((-20.0, 30.5, 100.0))
    image.SetDirection(direction)
    sitk.WriteImage(image, str(path))


def run_on(source, out, run, **options):
    return denoise(source, out, **{"model": run, "precision": "float32", "device": "cpu", **options})


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".mhd", ".mha", ".nrrd"])
@pytest.mark.parametrize("dtype", [np.int16, np.float32])
def test_volumes(tmp_path, run, expected, make_hu, suffix, dtype):
    hu = make_hu(5, 40, 56).astype(dtype)
    hu[:, :3] = -2000
    source, out = tmp_path / "in", tmp_path / "out"
    write(source / "anna" / f"ct{suffix}", hu)
    summary = run_on(source, out, run, batch_size=2)
    assert (summary.denoised, summary.slices, summary.failures) == (1, 5, [])
    files = {path.name for path in (out / "anna").iterdir()}
    assert files == {path.name for path in (source / "anna").iterdir()}
    before, after = (sitk.ReadImage(str(root / "anna" / f"ct{suffix}")) for root in (source, out))
    for what in ("Size", "Spacing", "Origin", "Direction"):
        np.testing.assert_allclose(getattr(after, f"Get{what}")(), getattr(before, f"Get{what}")(), atol=1e-5)
    assert after.GetPixelID() == sitk.sitkInt16
    made = sitk.GetArrayFromImage(after)
    assert (made[:, :3] == -2000).all()
    assert np.abs(made - expected(np.maximum(hu, -1024)).clip(-1024))[:, 3:].max() <= 0.5 + 1e-3
    if suffix.startswith(".nii"):
        assert "Noise reduced" in after.GetMetaData("descrip")
    if suffix == ".nii.gz":
        assert gzip.decompress((out / "anna" / "ct.nii.gz").read_bytes())
    again = run_on(source, out, run, batch_size=2)
    assert (again.denoised, again.already) == (0, 1)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".mhd", ".mha", ".nrrd"])
def test_what_is_no_number_outside_the_field_of_view_is_air(tmp_path, run, expected, make_hu, suffix):
    hu = make_hu(3, 40, 56).astype(np.float32)
    air = hu.copy()
    hu[:, :4], hu[1, :, 50:], hu[2] = np.nan, np.inf, -np.inf
    air[~np.isfinite(hu)] = -1024
    write(tmp_path / f"ct{suffix}", hu)
    assert run_on(tmp_path / f"ct{suffix}", tmp_path / "out", run).failures == []
    made = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "out" / f"ct{suffix}")))
    assert (made[~np.isfinite(hu)] == -1024).all()
    inside = np.isfinite(hu)
    assert np.abs(made - expected(air).clip(-1024))[inside].max() <= 0.5 + 1e-3


@pytest.mark.parametrize("order", ["LPS", "RAS", "PIR", "ASL", "RSA", "SLP", "ILA"])
@pytest.mark.parametrize("suffix", [".nii.gz", ".mha"])
def test_slices_are_axial_whatever_the_order_of_the_axes(tmp_path, run, expected, make_hu, order, suffix):
    """The slices that prepare takes of a file are denoised, and come back in the file's own order."""
    image = sitk.GetImageFromArray(make_hu(6, 40, 48))
    image.SetSpacing((0.7, 0.8, 2.5))
    source = tmp_path / f"ct{suffix}"
    sitk.WriteImage(sitk.DICOMOrient(image, order), str(source))
    assert run_on(source, tmp_path / "out", run).slices == 6
    before, after = (sitk.ReadImage(str(path)) for path in (source, tmp_path / "out" / source.name))
    for what in ("Size", "Spacing", "Origin", "Direction"):
        np.testing.assert_allclose(getattr(after, f"Get{what}")(), getattr(before, f"Get{what}")(), atol=1e-5)
    (series,) = find_series([source], "", strict=True, resample=False).series
    (made,) = find_series([tmp_path / "out" / source.name], "", strict=True, resample=False).series
    assert series.shape == (6, 40, 48)
    assert np.abs(made.read() - expected(series.read()).clip(-1024)).max() <= 0.5 + 1e-3


def test_tilted_slices_keep_their_matrix(tmp_path, run, expected, make_hu):
    hu = make_hu(3, 32, 40)
    matrix = np.array([[-0.8, 0, 0, 20], [0, -0.7, 0.67, 30], [0, 0, 2.5, 100], [0, 0, 0, 1]])
    image = nibabel.Nifti1Image(hu.T, None)
    image.set_sform(matrix, "scanner")
    nibabel.save(image, tmp_path / "ct.nii")
    run_on(tmp_path / "ct.nii", tmp_path / "out", run)
    after = nibabel.load(tmp_path / "out" / "ct.nii")
    np.testing.assert_allclose(after.affine, matrix, atol=1e-6)
    assert np.abs(np.asarray(after.dataobj).T - expected(hu)).max() <= 0.5 + 1e-3


def test_results_are_as_private_as_their_sources(tmp_path, run, make_hu, write_series):
    write(tmp_path / "in" / "ct.mhd", make_hu(2))
    write_series(tmp_path / "in" / "dicom", make_hu(2))
    (tmp_path / "in").chmod(0o700)
    run_on(tmp_path / "in", tmp_path / "out", run)
    run_on(tmp_path / "in" / "ct.mhd", tmp_path / "one" / "ct.nii.gz", run)
    made = [*(tmp_path / "out").rglob("*"), *(tmp_path / "one").rglob("*")]
    assert len(made) == 8
    for path in [tmp_path / "out", tmp_path / "one", *made]:
        assert path.stat().st_mode & 0o077 == 0, path


def test_names_of_ours_concern_their_own_series_only(tmp_path, run, make_hu, write_series):
    source, out = tmp_path / "in", tmp_path / "out"
    collide = (".lock", "denoise.json", "deep/.0123456789abcdef.part")
    for number, name in enumerate(collide):
        write(source / name / "ct.nii", make_hu(1))
        write_series(source / name / "dicom", make_hu(1), series_uid=f"1.2.{number}")
    for name in ("sound", "deep/.lock", "deep/denoise.json"):
        write(source / name / "ct.nii", make_hu(1))
    summary = run_on(source, out, run)
    assert (summary.denoised, len(summary.failures)) == (3, 6)
    for name in collide:
        of_name = [failure for failure in summary.failures if f"{source / name}/" in failure]
        assert len(of_name) == 2 and all("To fix: rename it" in failure for failure in of_name)
    assert (out / "deep" / ".lock" / "ct.nii").is_file()
    assert (out / "denoise.json").is_file()
    # A file of the user's where a folder is needed, likewise; what was made is found again.
    (source / "late").mkdir()
    write(source / "late" / "ct.nii", make_hu(1))
    (out / "late").write_text("mine")
    again = run_on(source, out, run)
    assert (again.denoised, again.already, len(again.failures)) == (0, 3, 7)
    assert (out / "late").read_text() == "mine"


def test_unfinished_series_are_not_written_through_links(tmp_path, run, make_hu, write_series, monkeypatch):
    write_series(tmp_path / "in", make_hu(2))
    run_on(tmp_path / "in", tmp_path / "out", run)
    (series,) = (path for path in (tmp_path / "out").iterdir() if path.is_dir())
    shutil.rmtree(series)
    (tmp_path / "theirs").mkdir()
    series.with_name(f".{series.name}.part").symlink_to(tmp_path / "theirs", target_is_directory=True)
    summary = run_on(tmp_path / "in", tmp_path / "out", run)
    assert summary.denoised == 0
    assert "it's a link" in summary.failures[0]
    assert not list((tmp_path / "theirs").iterdir())


def test_one_file_into_another_format(tmp_path, run, make_hu):
    write(tmp_path / "ct.mhd", make_hu(2))
    run_on(tmp_path / "ct.mhd", tmp_path / "new" / "ct.nii.gz", run)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["ct.nii.gz"]
    before = (tmp_path / "new" / "ct.nii.gz").read_bytes()
    with pytest.raises(InputError, match=r"ct\.nii\.gz: exists already"):
        run_on(tmp_path / "ct.mhd", tmp_path / "new" / "ct.nii.gz", run)
    assert (tmp_path / "new" / "ct.nii.gz").read_bytes() == before


@pytest.mark.parametrize(
    ("old", "new"), [(".mhd", ".nii.gz"), (".nii", ".nrrd"), (".nrrd", ".mha"), (".nii.gz", ".nii")]
)
def test_every_format_keeps_the_geometry(tmp_path, run, make_hu, old, new):
    write(tmp_path / f"ct{old}", make_hu(3, 32, 40))
    run_on(tmp_path / f"ct{old}", tmp_path / f"new{new}", run)
    before, after = (sitk.ReadImage(str(tmp_path / name)) for name in (f"ct{old}", f"new{new}"))
    for what in ("Size", "Spacing", "Origin", "Direction"):
        np.testing.assert_allclose(getattr(after, f"Get{what}")(), getattr(before, f"Get{what}")(), atol=1e-5)


def test_both_matrices_and_the_values_of_nifti(tmp_path, run, expected, make_hu):
    """A file may have a second matrix, such as one to an atlas."""
    hu = make_hu(3, 32, 40)
    image = nibabel.Nifti1Image(hu.T.astype(">i2") + 1024, None)
    image.set_qform(np.diag([-0.7, 0.8, 2.5, 1]), "scanner")
    image.set_sform(np.diag([-1.5, 1.25, 2.0, 1]), "mni")
    image.header.set_slope_inter(1, -1024)
    image.header.set_xyzt_units("mm")
    nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj) - 1024, None, image.header), tmp_path / "ct.nii")
    run_on(tmp_path / "ct.nii", tmp_path / "out", run)
    before, after = (nibabel.load(tmp_path / name) for name in ("ct.nii", "out/ct.nii"))
    for name in ("qform_code", "sform_code", "srow_x", "srow_y", "quatern_b", "qoffset_x", "pixdim", "xyzt_units"):
        np.testing.assert_array_equal(after.header[name], before.header[name])
    assert after.get_data_dtype() == np.int16
    assert np.abs(np.asarray(after.dataobj).T - expected(hu)).max() <= 0.5 + 1e-3


def test_voxels_beside_a_header_are_not_overwritten(tmp_path, run, make_hu):
    """ct.mhd and ct.nhdr both keep their voxels in ct.raw."""
    write(tmp_path / "ct.nhdr", make_hu(2))
    before = (tmp_path / "ct.raw").read_bytes()
    summary = run_on(tmp_path / "ct.nhdr", tmp_path / "ct.mhd", run)
    assert summary.failures == [
        f"{tmp_path / 'ct.raw'}: exists already, and would be overwritten by the voxels of ct.mhd. "
        "To fix: choose another name, or remove the file"
    ]
    assert {path.name for path in tmp_path.iterdir()} >= {"ct.nhdr", "ct.raw"}
    assert not (tmp_path / "ct.mhd").exists()
    assert (tmp_path / "ct.raw").read_bytes() == before


def test_a_call_interrupted_between_voxels_and_header(tmp_path, run, make_hu):
    write(tmp_path / "in" / "ct.mhd", make_hu(2))
    run_on(tmp_path / "in", tmp_path / "out", run)
    made = {name: (tmp_path / "out" / name).read_bytes() for name in ("ct.mhd", "ct.raw")}
    (tmp_path / "out" / ".0123456789abcdef.part").mkdir()
    (tmp_path / "out" / "ct.mhd").rename(tmp_path / "out" / ".0123456789abcdef.part" / "ct.mhd")
    assert run_on(tmp_path / "in", tmp_path / "out", run).failures == []
    assert {name: (tmp_path / "out" / name).read_bytes() for name in made} == made


def test_two_calls_on_one_folder(tmp_path, run, make_hu):
    write(tmp_path / "in" / "ct.nii", make_hu(2))
    (tmp_path / "out").mkdir()
    run_on(tmp_path / "in", tmp_path / "out", run)
    with FileLock(tmp_path / "out" / ".lock"), pytest.raises(InputError, match="another process is denoising into it"):
        run_on(tmp_path / "in", tmp_path / "out", run)
    assert run_on(tmp_path / "in", tmp_path / "out", run).already == 1


def bad_volumes(make_hu):
    spoiled = make_hu(2).astype(np.float32)
    spoiled[1, 5, 5] = np.nan
    oblique = sitk.GetImageFromArray(make_hu(2))
    oblique.SetDirection((1, 0, 0, 0, 0.8, -0.6, 0, 0.6, 0.8))
    return {
        "oblique.nii": (oblique, "its slices are oblique, 37 degrees from axial; up to 30 are taken. To fix: "),
        "nan.nrrd": (spoiled, "has voxels that aren't finite"),
        "nan.nii.gz": (spoiled, "has voxels that aren't finite"),
        "infinite.mha": (np.full((2, 32, 32), np.inf, np.float32), "has voxels that aren't finite"),
        "labels.nii": (np.arange(2 * 32 * 32, dtype=np.int16).reshape(2, 32, 32), "has no value below 0"),
        "flat.nii": (make_hu(1)[0], "has 2 dimensions"),
        "film.nii": (np.stack([make_hu(2)] * 2), "has 4 dimensions"),
    }


def test_bad_volumes(tmp_path, run, make_hu):
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    bad = bad_volumes(make_hu)
    for name, (values, _) in bad.items():
        image = values if isinstance(values, sitk.Image) else sitk.GetImageFromArray(values, isVector=False)
        sitk.WriteImage(image, str(source / name))
    for name in ("cut.nii", "cut.nii.gz", "cut.nrrd", "cut.mha"):
        write(source / name, make_hu(4))
        content = (source / name).read_bytes()
        (source / name).write_bytes(content[: len(content) // 2])
        bad[name] = (None, "can't be read")
    (source / "empty.nii.gz").write_bytes(b"")
    bad["empty.nii.gz"] = (None, "can't be read")
    (source / "no_voxels.mhd").write_text(
        "NDims = 3\nDimSize = 4 4 4\nElementType = MET_SHORT\nElementDataFile = nowhere.raw\n"
    )
    bad["no_voxels.mhd"] = (None, "can't be read")
    write(source / "good.mha", make_hu(2))
    write(source / "mask.nii.gz", np.ones((2, 32, 32), np.uint8))
    summary = run_on(source, out, run)
    assert {path.name for path in out.iterdir()} == {"denoise.json", "good.mha"}
    assert (summary.denoised, summary.skipped) == (1, {"of 8 bits, which can't hold HU (masks?)": 1})
    assert len(summary.failures) == len(bad)
    for name, (_, message) in bad.items():
        (failure,) = (failure for failure in summary.failures if failure.startswith(f"{source / name}:"))
        assert message in failure
        assert "\n" not in failure
    assert {path.name for path in out.iterdir()} == {"denoise.json", "good.mha"}


@pytest.mark.parametrize("suffix", [".nii.gz", ".mha"])
def test_what_does_not_look_like_hu_is_denoised_on_request(tmp_path, run, expected, suffix):
    values = np.arange(2 * 32 * 40, dtype=np.uint16).reshape(2, 32, 40)
    write(tmp_path / f"mr{suffix}", values)
    (failure,) = run_on(tmp_path / f"mr{suffix}", tmp_path / "out", run).failures
    assert "has no value below 0, so it isn't HU (MR? labels? raw detector values?)" in failure
    assert run_on(tmp_path / f"mr{suffix}", tmp_path / "out", run, any_values=True).failures == []
    made = read_voxels(tmp_path / "out" / f"mr{suffix}")
    inside = values <= 1500  # beyond, they pass unchanged
    assert np.abs(made - expected(values.astype(np.float32)))[inside].max() <= 0.5 + 1e-3


ENDINGS = {".NII.GZ": ".nii.gz", ".Nii": ".nii", ".MHA": ".mha", ".Mhd": ".mhd", ".NRRD": ".nrrd", ".NHDR": ".nhdr"}


def test_endings_in_capitals(tmp_path, run, expected, make_hu):
    """Each comes out under its own name, and a damaged one among them stops none."""
    hu = make_hu(2, 32, 40)
    source, out = tmp_path / "in", tmp_path / "out"
    for number, (ending, plain) in enumerate(ENDINGS.items()):
        write(source / f"v{number}{plain}", hu)
        (source / f"v{number}{plain}").rename(source / f"v{number}{ending}")
    (source / "damaged.NII.GZ").write_bytes(b"x" * 400)
    write(source / "z.nii.gz", hu)
    with pytest.raises(SystemExit) as stop, pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        main(["denoise", "in", "out", "--model", str(run), "--precision", "float32", "--device", "cpu"])
    assert stop.value.code == 2
    names = {path.name for path in source.iterdir()} - {"damaged.NII.GZ"}
    assert {path.name for path in out.iterdir()} - {"denoise.json"} == names
    for path in out.iterdir():
        if is_volume(path):
            assert np.abs(read_voxels(path) - expected(hu).clip(-1024)).max() <= 0.5 + 1e-3
    found = find_series([out], "", strict=True, resample=False)
    assert len(found.series) == len(ENDINGS) + 1
    assert found.skipped == {"not DICOM": 1}  # denoise.json; files of voxels are part of their volumes
    assert find(out, tmp_path / "other").skipped == {"not DICOM": 1}


@pytest.mark.parametrize("name", ["b.mha", "b.nii"])
def test_a_file_that_cannot_be_written_does_not_stop_the_others(tmp_path, run, make_hu, monkeypatch, name):
    for one in ("a.nii", name, "c.mha"):
        write(tmp_path / "in" / one, make_hu(2, 32, 40))

    def fail(module, error):
        usual = module.write

        def write_unless(path, *rest):
            if path.name == name:
                path.write_bytes(b"half")
                raise error
            usual(path, *rest)

        monkeypatch.setattr(module, "write", write_unless)

    fail(itk, RuntimeError("sitk::ERROR: no such format"))
    fail(nifti, HeaderDataError("no such format"))
    summary = run_on(tmp_path / "in", tmp_path / "out", run)
    assert summary.failures == [f"{tmp_path / 'out' / name}: can't be written: no such format"]
    assert {path.name for path in (tmp_path / "out").rglob("*")} == {"denoise.json", "a.nii", "c.mha"}


def test_a_volume_that_was_not_finished(tmp_path, run, make_hu):
    """What a killed call leaves behind has no final name, and is cleared away."""
    write(tmp_path / "in" / "ct.mhd", make_hu(2))
    run_on(tmp_path / "in", tmp_path / "out", run)
    whole = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    (tmp_path / "out" / ".0123456789abcdef.part").mkdir()
    (tmp_path / "out" / "ct.mhd").rename(tmp_path / "out" / ".0123456789abcdef.part" / "ct.mhd")
    (tmp_path / "out" / "ct.raw").write_bytes(b"half")
    run_on(tmp_path / "in", tmp_path / "out", run)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == whole
