"""Images from other tools as arms: exported, denoised elsewhere, found again, and scored on the same pixels."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk  # noqa: N813
from pydicom.uid import generate_uid

from lidnet_fast.cli import main
from lidnet_fast.data.store.index import SeriesInfo
from lidnet_fast.data.store.reader import Store
from lidnet_fast.data.store.writer import StoreWriter
from lidnet_fast.evaluation.denoised import denoised_views
from lidnet_fast.evaluation.export import digest_name, export, file_names
from lidnet_fast.trainer.config import RunConfig
from lidnet_fast.trainer.run import train

SAMPLES = ["--samples", "4"]


@pytest.fixture(scope="module")
def exported(tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export") / "out"
    export(tiny_store, out)
    return out


@pytest.fixture(scope="module")
def series(exported: Path) -> SeriesInfo:
    (info,) = Store(exported / "store").series
    return info


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1, message
    return message


def compare(exported: Path, out: Path, **images: Path) -> dict[str, dict[str, float]]:
    options = [option for name, folder in images.items() for option in ("--images", f"{name}={folder}")]
    main(["evaluate", "--store", str(exported / "store"), "--out", str(out), *SAMPLES, *options])
    return json.loads((out / "metrics.json").read_text())["arms"]


def test_export_holds_the_same_pixels_in_files_and_store(exported: Path, series: SeriesInfo, tiny_store: Path) -> None:
    store, original = Store(exported / "store"), Store(tiny_store)
    assert store.simulation is None and series.has_low_dose
    place = next(n for n, info in enumerate(original.series) if info.split == "test")
    for kind in ("low_dose", "normal_dose"):
        image = sitk.ReadImage(str(exported / kind / f"{series.series_uid}.nii.gz"))
        assert image.GetSpacing() == pytest.approx(series.spacing[::-1])
        for z, values in enumerate(sitk.GetArrayFromImage(image)):
            assert np.array_equal(values, store.read(0, z, low_dose=kind == "low_dose"))
    for z in range(series.shape[0]):
        assert np.array_equal(store.read(0, z), original.read(place, z))
        assert np.array_equal(store.boxes(0, z), original.boxes(place, z))
        noise = store.read(0, z, low_dose=True).astype(float) - store.read(0, z)
        assert 5 < noise.std() < 500


def test_export_is_a_function_of_its_seed(exported: Path, tiny_store: Path, tmp_path: Path) -> None:
    def low(out: Path) -> np.ndarray:
        return Store(out / "store").read(0, 1, low_dose=True)

    export(tiny_store, tmp_path / "again")
    export(tiny_store, tmp_path / "other", seed=1)
    assert np.array_equal(low(tmp_path / "again"), low(exported))
    assert not np.array_equal(low(tmp_path / "other"), low(exported))


def test_images_score_as_what_they_are(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arms = compare(exported, tmp_path, unchanged=exported / "low_dose", perfect=exported / "normal_dose")
    assert list(arms) == ["low dose", "unchanged", "perfect", "normal dose"]
    assert arms["unchanged"] == arms["low dose"]
    assert arms["perfect"] == arms["normal dose"] and arms["perfect"]["psnr"] == 100
    assert "judge" not in arms["perfect"]
    assert "perfect (images)" in capsys.readouterr().out
    report = (tmp_path / "report.html").read_text()
    assert "perfect <small>from images</small>" in report
    assert str(exported / "normal_dose") in report


def test_run_and_images_are_scored_on_the_same_samples(
    tiny_config: RunConfig, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    untrained = replace(
        tiny_config,
        detector=replace(tiny_config.detector, steps=0),
        denoiser=replace(tiny_config.denoiser, steps=0),
        collaborate=replace(tiny_config.collaborate, steps=0),
    )
    train(untrained)
    images = ["--images", f"tool={exported / 'low_dose'}"]
    message = refused(capsys, ["evaluate", untrained.out, *images])
    assert "draws its simulated noise for every sample" in message
    assert f"lidnet-fast export {untrained.data.store} OUT" in message
    out = tmp_path / "results"
    main(["evaluate", untrained.out, "--store", str(exported / "store"), "--out", str(out), *SAMPLES, *images])
    arms = json.loads((out / "metrics.json").read_text())["arms"]
    assert list(arms) == ["low dose", "tool", "denoised", "normal dose"]
    assert arms["tool"] == arms["low dose"]
    assert arms["tool"]["judge"]["ap50"] is not None
    assert not (Path(untrained.out) / "report.html").exists()


Tool = Callable[[Path, Path, str], None]
"""(exported low dose, folder to write, series id): denoises, as far as metadata go."""


def keeps_folders(source: Path, out: Path, name: str) -> None:
    for path in source.rglob("*.dcm"):
        image = pydicom.dcmread(path)
        image.SeriesInstanceUID = generate_uid(entropy_srcs=["new"])
        image.PatientID = "anonymous"
        (out / name).mkdir(exist_ok=True)
        image.save_as(out / name / path.name)


def keeps_uid(source: Path, out: Path, name: str) -> None:
    for path in source.rglob("*.dcm"):
        image = pydicom.dcmread(path)
        image.PatientID = "anonymous"
        image.save_as(out / path.name)


def keeps_patient_and_geometry(source: Path, out: Path, name: str) -> None:
    for path in source.rglob("*.dcm"):
        image = pydicom.dcmread(path)
        image.SeriesInstanceUID = generate_uid(entropy_srcs=["new"])
        image.SOPInstanceUID = generate_uid()
        image.save_as(out / path.name)


def writes_float_meta_image(source: Path, out: Path, name: str) -> None:
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(source / name)))
    sitk.WriteImage(sitk.Cast(reader.Execute(), sitk.sitkFloat32), str(out / f"{name}.mhd"))


@pytest.fixture(scope="module")
def exported_dicom(tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export") / "dicom"
    main(["export", str(tiny_store), str(out), "--format", "dicom"])
    return out


@pytest.mark.parametrize("tool", [keeps_folders, keeps_uid, keeps_patient_and_geometry, writes_float_meta_image])
def test_series_are_found_again_by_what_tools_keep(
    exported_dicom: Path, series: SeriesInfo, tmp_path: Path, tool: Tool
) -> None:
    (tmp_path / "images").mkdir()
    tool(exported_dicom / "low_dose", tmp_path / "images", series.series_uid)
    arms = compare(exported_dicom, tmp_path / "out", tool=tmp_path / "images")
    # Reading DICOM cuts off below -1024 HU, outside the window: image scores are the same, the bias isn't.
    for key in ("psnr", "ssim", "rmse_hu", "lesion_psnr"):
        assert arms["tool"][key] == pytest.approx(arms["low dose"][key], rel=1e-6)


def test_exported_dicom_is_what_other_readers_expect(exported_dicom: Path, series: SeriesInfo) -> None:
    folder = exported_dicom / "low_dose" / series.series_uid
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    image = reader.Execute()
    assert image.GetOrigin() == pytest.approx(series.origin)
    assert image.GetSpacing() == pytest.approx(series.spacing[::-1])
    store = Store(exported_dicom / "store")
    expected = [store.read(0, z, low_dose=True) for z in range(series.shape[0])]
    assert np.array_equal(sitk.GetArrayFromImage(image), expected)


def edited(exported: Path, series: SeriesInfo, folder: Path, edit: Callable[[sitk.Image], sitk.Image]) -> Path:
    folder.mkdir()
    image = sitk.ReadImage(str(exported / "low_dose" / f"{series.series_uid}.nii.gz"))
    sitk.WriteImage(edit(image), str(folder / f"{series.series_uid}.mha"))
    return folder


def moved(image: sitk.Image) -> sitk.Image:
    image.SetOrigin((0.0, 3.0, 0.0))
    return image


def stretched(image: sitk.Image) -> sitk.Image:
    image.SetSpacing((1.0, 1.0, 5.0))
    return image


def with_hole(image: sitk.Image) -> sitk.Image:
    values = sitk.GetArrayFromImage(image).astype(np.float32)
    values[:, ::16, ::16] = np.nan
    hole = sitk.GetImageFromArray(values)
    hole.CopyInformation(image)
    return hole


@pytest.mark.parametrize("order", ["PIR", "ASL", "RSA", "LPI"])
def test_volumes_with_another_order_of_axes_are_the_same(
    exported: Path, series: SeriesInfo, tmp_path: Path, order: str
) -> None:
    """Mirrored in the image plane they aren't the series' slices, and are refused."""
    image = sitk.ReadImage(str(exported / "low_dose" / f"{series.series_uid}.nii.gz"))
    turned = sitk.DICOMOrient(image, order)
    for axis, letter in enumerate(order):
        if letter in "RA":
            turned = sitk.Flip(turned, [n == axis for n in range(3)])
    sitk.WriteImage(turned, str(tmp_path / f"{series.series_uid}.nii.gz"))
    arms = compare(exported, tmp_path / "out", turned=tmp_path)
    assert arms["turned"] == arms["low dose"]


@pytest.mark.parametrize("suffix", [".nii.gz", ".mha", ".nrrd"])
def test_what_is_no_number_outside_the_field_of_view_is_air(
    exported: Path, series: SeriesInfo, tmp_path: Path, suffix: str
) -> None:
    image = sitk.ReadImage(str(exported / "low_dose" / f"{series.series_uid}.nii.gz"))
    for name, value in (("air", -1024), ("nan", np.nan), ("inf", np.inf)):
        values = sitk.GetArrayFromImage(image).astype(np.float32)
        values[:, :9] = values[:, :, -7:] = value
        changed = sitk.GetImageFromArray(values)
        changed.CopyInformation(image)
        (tmp_path / name).mkdir()
        sitk.WriteImage(changed, str(tmp_path / name / f"{series.series_uid}{suffix}"))
    arms = compare(exported, tmp_path / "out", **{name: tmp_path / name for name in ("air", "nan", "inf")})
    assert arms["nan"] == arms["inf"] == pytest.approx(arms["air"], rel=1e-5)


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda image: image[:, :, :1], "but its shape is (1, 128, 128), not (2, 128, 128)"),
        (moved, "but its origin is (0, 3, 0), not (0, 0, 0)"),
        (stretched, "but its spacing (z, y, x) is (5, 1, 1), not (5, 2.8, 2.8)"),
        (lambda image: sitk.Flip(image, (True, False, False)), "but its orientation is (-1, 0, 0, 0, 1, 0), not"),
        (lambda image: sitk.Cast(image, sitk.sitkFloat32) / 2000 + 0.5, "its values aren't HU, or it's another series"),
        (with_hole, "has voxels that aren't finite"),
    ],
)
def test_volumes_that_do_not_fit_are_refused(
    exported: Path, series: SeriesInfo, tmp_path: Path, capsys: pytest.CaptureFixture[str], edit, expected: str
) -> None:
    folder = edited(exported, series, tmp_path / "images", edit)
    arguments = ["--store", str(exported / "store"), "--out", str(tmp_path / "out"), "--images", f"tool={folder}"]
    message = refused(capsys, ["evaluate", *arguments, *SAMPLES])
    assert expected in message and f"{series.series_uid}.mha" in message
    assert not (tmp_path / "out").exists()


def test_missing_and_ambiguous_volumes_are_refused(
    exported: Path, series: SeriesInfo, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = exported / "low_dose" / f"{series.series_uid}.nii.gz"
    folder = tmp_path / "images"
    folder.mkdir()
    arguments = ["evaluate", "--store", str(exported / "store"), "--images", f"tool={folder}", *SAMPLES]
    assert "no CT found" in refused(capsys, arguments)
    shutil.copy(source, folder / "somebody.nii.gz")
    assert f"no images of series {series.series_uid} of patient {series.patient_id}" in refused(capsys, arguments)
    for name in ("one", "two"):
        (folder / name).mkdir()
        shutil.copy(source, folder / name)
    message = refused(capsys, arguments)
    assert f"{folder / 'one' / source.name} and {folder / 'two' / source.name} may both be" in message


def test_a_volume_is_not_used_for_two_series(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    with StoreWriter(tmp_path / "store") as writer:
        for name in ("a", "b"):  # two reconstructions of one scan
            volume = rng.integers(-900, 100, (1, 64, 64), np.int16)
            geometry = {"spacing": (1, 1, 1), "origin": (0, 0, 0), "orientation": (1, 0, 0, 0, 1, 0)}
            info = SeriesInfo(f"p/{name}", "p", "test", True, shape=volume.shape, **geometry)
            writer.add_series(info, volume, np.zeros((0, 5)), volume)
    export(tmp_path / "store", tmp_path / "out", format="dicom")
    images = tmp_path / "images"
    images.mkdir()
    keeps_patient_and_geometry(tmp_path / "out" / "low_dose" / digest_name("p/a"), images, "")
    arguments = ["--store", str(tmp_path / "out" / "store"), "--images", f"tool={images}", "--samples", "16"]
    assert "may be series p/b of patient p as well as series p/a" in refused(capsys, ["evaluate", *arguments])


NAMES = [
    *("1.2.3", "a b", "A-1", "a/b", "a_b", "a\\b", "..", ".", "", " ", "a.", ".hidden", "x" * 301, "x" * 300 + "y"),
    *("scan", "Scan", "SCAN", "con", "NUL.x", "é", "e\u0301", "a\x1b[b", "a:b", "*", digest_name("a/b"), "\udcff"),
]
"""Of series: plain ones, and what a file system refuses, hides, shortens or takes for one another."""


def test_file_names_of_series_are_distinct_and_plain() -> None:
    names = file_names(NAMES)
    assert names[:3] == NAMES[:3]
    assert len({name.lower() for name in names}) == len(NAMES)
    for name in names:
        assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._ -]*(?<![. ])", name), name
        assert len(name) <= 100
    assert names == [file_names(NAMES[:n] + NAMES[n:])[n] for n in range(len(NAMES))]


@pytest.mark.parametrize("format", ["nifti", "dicom"])
def test_series_of_any_name_are_exported_and_found_again(tmp_path: Path, format: str) -> None:
    names = [name for name in NAMES if name.isprintable()]
    geometry = {"spacing": (1, 1, 1), "origin": (0, 0, 0), "orientation": (1, 0, 0, 0, 1, 0)}
    with StoreWriter(tmp_path / "store") as writer:
        for number, name in enumerate(names):
            volume = np.full((1, 8, 8), -number, np.int16)
            info = SeriesInfo(name, f"patient {name}", "test", True, shape=volume.shape, **geometry)
            writer.add_series(info, volume, np.zeros((0, 5)), volume)
    export(tmp_path / "store", tmp_path / "out", format=format)
    for folder in ("low_dose", "normal_dose"):
        assert len(list((tmp_path / "out" / folder).iterdir())) == len(names)
    store = Store(tmp_path / "out" / "store")
    ids = [(number, 0, 0, 0, False, False) for number in range(len(names))]
    views = denoised_views(tmp_path / "out" / "low_dose", store, ids, None)
    assert [view[0, 0, 0] for view in views.values()] == [-number for number in range(len(names))]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["evaluate"], "needs the folder of a run, or --store and --images"),
        (["evaluate", "--store", "s"], "needs the folder of a run, or --store and --images"),
        (["evaluate", "--images", "a=b"], "needs the folder of a run, or --store and --images"),
        (["evaluate", "--store", "s", "--images", "folder"], "--images folder: NAME=FOLDER is needed"),
        (["evaluate", "--store", "s", "--images", "a=b", "--images", "a=c"], "--images a=c: the name 'a' is taken"),
        (["evaluate", "--store", "s", "--images", "low dose=b"], "the name 'low dose' is taken"),
        (["evaluate", "--store", "/nowhere", "--images", "a=b"], "data.store: there is no folder /nowhere"),
        (["export", "/nowhere", "out"], "/nowhere: isn't a store"),
    ],
)
def test_arguments_that_cannot_work(capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str) -> None:
    assert expected in refused(capsys, arguments)


def test_export_refuses_what_exists_and_empty_splits(
    exported: Path, tiny_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "exists already" in refused(capsys, ["export", str(tiny_store), str(exported)])
    empty = refused(capsys, ["export", str(exported / "store"), str(tmp_path / "out"), "--split", "val"])
    assert "the val split has no series" in empty
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", ["nifti", "dicom"])
def test_what_comes_of_a_private_store_is_private(tiny_store: Path, tmp_path: Path, format: str) -> None:
    shutil.copytree(tiny_store, tmp_path / "store")
    (tmp_path / "store").chmod(0o700)
    export(tmp_path / "store", tmp_path / "out", format=format)
    compare(tmp_path / "out", tmp_path / "results", tool=tmp_path / "out" / "low_dose")
    made = [path for name in ("out", "results") for path in (tmp_path / name, *(tmp_path / name).rglob("*"))]
    assert {"report.html", "metrics.json", "index.npz"} <= {path.name for path in made}
    for path in made:
        assert path.stat().st_mode & 0o077 == 0, path


def test_interrupted_export_leaves_nothing(tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_, **__) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(sitk, "WriteImage", full)
    with pytest.raises(OSError, match="disk full"):
        export(tiny_store, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
