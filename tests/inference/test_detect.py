"""Studies in, lesions out: tables, JSON and DICOM SR, checked with highdicom and, where it is installed, dciodvfy."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import highdicom as hd
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk  # noqa: N813
import torch
from pydicom.sr.codedict import codes

from lidnet_fast.cli import main
from lidnet_fast.data.annotations.boxes import read_boxes
from lidnet_fast.data.formats.dicom.series import scan
from lidnet_fast.data.formats.find import files_below
from lidnet_fast.data.formats.volumes.series import scan_volumes
from lidnet_fast.errors import InputError
from lidnet_fast.inference import denoise, detect
from lidnet_fast.models.detectors import build_detector
from lidnet_fast.models.envelope import Envelope
from lidnet_fast.models.files import save_network
from lidnet_fast.models.lesion_detector import LesionDetector
from lidnet_fast.models.registry import NetworkConfig
from lidnet_fast.models.slice_detector import SliceDetector
from lidnet_fast.models.windowing import HUWindow
from tests.data.formats.dicom.test_multiframe import converted

__all__ = ["converted"]

OBLIQUE = (0.8, 0.6, 0, -0.36, 0.48, 0.8)
ON_CPU = {"device": "cpu", "precision": "float32"}
TYPE_2 = ("StudyDate", "StudyTime", "StudyID", "AccessionNumber", "PatientBirthDate", "PatientSex")


def named(z, dataset):
    """What CT of a scanner has beside what `write_series` writes."""
    dataset.FrameOfReferenceUID, dataset.PatientName, dataset.SeriesNumber = "1.2.840.77", "Doe^Anna", 3
    dataset.StudyInstanceUID = "1.2.840.78"
    for keyword in TYPE_2:
        setattr(dataset, keyword, "")


def save_detector(path, seed, crop, **more):
    options = {"score_threshold": 0.0, "max_detections": 3}
    torch.manual_seed(seed)
    network = build_detector("faster_rcnn_small", **options)
    config = NetworkConfig("faster_rcnn_small", options)
    save_network(path, "detector", network, config, HUWindow(), {"data": {"crop": crop}}, **more)


@pytest.fixture(scope="module")
def model(make_run):
    """The folder of a run with random networks; its detectors saw fields of view smaller than the slices."""
    run = make_run()
    save_detector(run / "detector" / "detector.pt", 0, 48)
    save_detector(run / "collaborate" / "detector.pt", 1, 48)
    return run


@pytest.fixture
def bright(monkeypatch):
    """A detector that finds each image's brightest square, with a score that its size gives."""

    def find(self, images, features=None):
        found = []
        for image in images[:, 0]:
            rows, columns = (image > 0.95).nonzero(as_tuple=True)
            boxes = torch.zeros(0, 4)
            if len(rows):
                boxes = torch.tensor([[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]]).float()
            found.append({"boxes": boxes, "scores": torch.full((len(boxes),), min(1.0, len(rows) / 100))})
        return found

    monkeypatch.setattr(LesionDetector, "detect", find)


def with_lesion(shape=(9, 64, 80)):
    """Air with a cube on slices 3 to 5: rows 20 to 27, columns 40 to 47."""
    hu = np.full(shape, -900, np.int16)
    hu[3:6, 20:28, 40:48] = 400
    return hu


def record_of(out):
    (path,) = (path for path in out.rglob("*.json") if path.name != "detect.json")
    return json.loads(path.read_text())


def words_of(report):
    return "\n".join(str(element.value) for element in pydicom.dcmread(report).iterall() if element.VR == "UT")


def contents(out):
    return {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}


@pytest.mark.parametrize("orientation", [(1, 0, 0, 0, 1, 0), OBLIQUE])
def test_a_lesion_where_it_is(tmp_path, model, bright, write_series, orientation):
    files = write_series(tmp_path / "in", with_lesion(), edit=named, orientation=orientation)
    summary = detect(tmp_path / "in", tmp_path / "out", model=model, **ON_CPU)
    assert (summary.done, summary.slices, summary.lesions, summary.failures) == (1, 9, 1, [])
    record = record_of(tmp_path / "out")
    (lesion,) = record["lesions"]
    assert (record["detector"], record["denoised_by"], record["shape"]) == ("frozen", None, [9, 64, 80])
    box = lesion["box"]
    assert (box["first_slice"], box["last_slice"]) == (3, 5)
    assert [box[name] for name in ("x1", "y1", "x2", "y2")] == [40, 20, 48, 28]
    assert [one["slice"] for one in lesion["boxes"]] == [3, 4, 5] and lesion["score"] == pytest.approx(0.64)
    # SimpleITK's point of the cube's middle, which counts pixels from their centres.
    image = sitk.ReadImage([str(file) for file in files])
    middle = image.TransformContinuousIndexToPhysicalPoint((43.5, 23.5, 4.0))
    assert lesion["centre_mm"] == pytest.approx(middle, abs=1e-3)
    ends = [image.TransformContinuousIndexToPhysicalPoint(place) for place in ((39.5, 19.5, 2.5), (47.5, 27.5, 5.5))]
    np.testing.assert_allclose([box["corners_mm"][0], box["corners_mm"][6]], ends, atol=1e-3)


def test_a_lesion_in_a_volume_whose_axes_run_otherwise(tmp_path, model, bright):
    """Slices run against the patient's length, and rows along the file's second axis."""
    hu = with_lesion()
    image = sitk.GetImageFromArray(np.ascontiguousarray(np.transpose(hu[::-1], (0, 2, 1))))
    image.SetSpacing((0.7, 0.8, 2.5))
    image.SetOrigin((3.0, -4.0, 50.0))
    image.SetDirection((0, 1, 0, 1, 0, 0, 0, 0, -1))
    (tmp_path / "in").mkdir()
    sitk.WriteImage(image, str(tmp_path / "in" / "ct.nii.gz"))
    detect(tmp_path / "in", tmp_path / "out", model=model, **ON_CPU)
    assert not list((tmp_path / "out").rglob("*.dcm"))
    record = json.loads((tmp_path / "out" / "ct.nii.gz.json").read_text())
    (lesion,) = record["lesions"]
    box = lesion["box"]
    assert (box["first_slice"], box["last_slice"]) == (3, 5)
    assert [box[name] for name in ("x1", "y1", "x2", "y2")] == [20, 40, 28, 48]
    middle = image.TransformContinuousIndexToPhysicalPoint((23.5, 43.5, 4.0))
    assert lesion["centre_mm"] == pytest.approx(middle, abs=1e-3)
    found, _ = scan_volumes(files_below([tmp_path / "in"]).paths, [tmp_path / "in"])
    rows = read_boxes(tmp_path / "out" / "boxes.csv", found.series)["ct"]
    assert rows.shape == (3, 5)
    z, x1, y1, x2, y2 = rows[0].astype(int)
    assert found.series[0].read()[z, y1:y2, x1:x2].min() == 400


@pytest.fixture(scope="module")
def searched(tmp_path_factory, model):
    """A series, and what a random detector finds in it."""
    from tests.data.conftest import write_series

    root = tmp_path_factory.mktemp("searched")
    hu = np.random.default_rng(0).integers(-1000, 400, (6, 64, 80)).astype(np.int16)
    write = write_series.__wrapped__ if hasattr(write_series, "__wrapped__") else write_series.__pytest_wrapped__.obj
    write()(root / "in", hu, edit=named, orientation=OBLIQUE)
    detect(root / "in", root / "out", model=model, **ON_CPU)
    return root


def test_the_tables_are_those_that_other_commands_read(searched):
    record = record_of(searched / "out")
    (series,) = scan([searched / "in"]).series
    boxes = [box for lesion in record["lesions"] for box in lesion["boxes"]]
    assert len(boxes) == 18 and all(box["sop_instance_uid"] == series.sop_instance_uids[box["slice"]] for box in boxes)
    expected = [[box[name] for name in ("slice", "x1", "y1", "x2", "y2")] for box in boxes]
    np.testing.assert_allclose(read_boxes(searched / "out" / "boxes.csv", [series])[series.series_uid], expected)
    # A table of candidates: the detector's own lesions, as annotations, are all found.
    lesions = (searched / "out" / "candidates.csv").read_text().replace("probability", "diameter_mm")
    (searched / "annotations.csv").write_text(lesions)
    (searched / "seriesuids.csv").write_text(f"{series.series_uid}\n")
    main(
        [
            *("evaluate", "--candidates", str(searched / "out" / "candidates.csv"), "--out", str(searched / "scored")),
            *("--annotations", str(searched / "annotations.csv"), "--series-uids", str(searched / "seriesuids.csv")),
        ]
    )
    assert json.loads((searched / "scored" / "scans.json").read_text())["cpm"] == [1, 1, 1]


def test_the_report_says_what_the_json_says(searched):
    """Read with highdicom: regions on their images, in pixels; the box in space, in mm; the score."""
    record = record_of(searched / "out")
    (path,) = (searched / "out").rglob("*.dcm")
    report = hd.sr.srread(path)
    assert (report.PatientName, report.StudyInstanceUID, report.SeriesNumber) == ("Doe^Anna", "1.2.840.78", 2003)
    assert report.SeriesInstanceUID == path.stem
    groups = report.content.get_volumetric_roi_measurement_groups()
    in_pixels = [group for group in groups if group.reference_type == codes.DCM.ImageRegion]
    in_space = [group for group in groups if group.reference_type == codes.DCM.VolumeSurface]
    assert len(in_pixels) == len(in_space) == len(record["lesions"]) > 1
    for lesion, flat, solid in zip(record["lesions"], in_pixels, in_space, strict=True):
        assert flat.tracking_uid == solid.tracking_uid
        assert flat.tracking_identifier == solid.tracking_identifier == f"lesion {lesion['lesion']}"
        assert flat.finding_type == codes.SCT.Lesion
        (certainty,) = flat.get_measurements(name=codes.DCM.CertaintyOfFinding)
        assert certainty.value == pytest.approx(100 * lesion["score"])
        regions = flat.roi
        assert len(regions) == len(lesion["boxes"])
        for box, region in zip(lesion["boxes"], regions, strict=True):
            (item,) = region.ContentSequence
            assert item.ReferencedSOPSequence[0].ReferencedSOPInstanceUID == box["sop_instance_uid"]
            np.testing.assert_array_equal(region.value[0], [box["x1"], box["y1"]])
            np.testing.assert_array_equal(region.value[2], [box["x2"], box["y2"]])
        faces = np.concatenate([np.asarray(face.value)[:4] for face in solid.roi if hasattr(face, "GraphicData")])
        np.testing.assert_allclose(faces, lesion["box"]["corners_mm"], atol=1e-3)
    sources = {pydicom.dcmread(file).SOPInstanceUID for file in (searched / "in").iterdir()}
    (study,) = report.CurrentRequestedProcedureEvidenceSequence
    (series,) = study.ReferencedSeriesSequence
    assert {item.ReferencedSOPInstanceUID for item in series.ReferencedSOPSequence} == sources


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="needs dciodvfy (Debian: apt-get install dicom3tools)")
def test_a_validator_finds_no_fault_in_the_report(searched):
    (path,) = (searched / "out").rglob("*.dcm")
    lines = subprocess.run(["dciodvfy", str(path)], capture_output=True, text=True, check=False).stderr.splitlines()
    assert "Comprehensive3DSR" in lines
    assert not [line for line in lines if line.startswith(("Error", "Warning")) and "DICOMDIR" not in line]


def test_a_series_without_lesions(tmp_path, model, bright, write_series, make_hu):
    """It has been searched, and says so; a report would have nothing to hold."""
    write_series(tmp_path / "in", np.full((3, 64, 64), -900, np.int16), edit=named)
    for already in (0, 1):
        summary = detect(tmp_path / "in", tmp_path / "out", model=model, **ON_CPU)
        assert (summary.already, summary.lesions, summary.failures) == (already, 0, [])
    assert record_of(tmp_path / "out")["lesions"] == []
    assert not list((tmp_path / "out").rglob("*.dcm"))
    assert (tmp_path / "out" / "candidates.csv").read_text() == "seriesuid,coordX,coordY,coordZ,probability\n"


def test_without_a_frame_of_reference_there_are_regions_of_images_alone(tmp_path, model, bright, write_series):
    write_series(tmp_path / "in", with_lesion())
    detect(tmp_path / "in", tmp_path / "out", model=model, **ON_CPU)
    (path,) = (tmp_path / "out").rglob("*.dcm")
    (group,) = hd.sr.srread(path).content.get_volumetric_roi_measurement_groups()
    assert group.reference_type == codes.DCM.ImageRegion


def test_multi_frame_ct_is_searched_as_its_single_frames_are(tmp_path, model, converted):
    single, _, enhanced = converted()
    records = []
    for name, source in (("out1", single), ("out2", enhanced)):
        detect(source, tmp_path / name, model=model, **ON_CPU)
        records.append(record_of(tmp_path / name))
    (series,) = scan([enhanced]).series
    for one, other in zip(records[0]["lesions"], records[1]["lesions"], strict=True):
        for box, in_frame in zip(one["boxes"], other["boxes"], strict=True):
            assert in_frame["sop_instance_uid"].endswith(f".9.1#{series.frames[box['slice']] + 1}")
            del box["sop_instance_uid"], in_frame["sop_instance_uid"]
        assert one == other
    (path,) = (tmp_path / "out2").rglob("*.dcm")
    groups = hd.sr.srread(path).content.get_volumetric_roi_measurement_groups(reference_type=codes.DCM.ImageRegion)
    regions = [region for group in groups for region in group.roi]
    frames = [region.ContentSequence[0].ReferencedSOPSequence[0].ReferencedFrameNumber for region in regions]
    boxes = [box for lesion in records[1]["lesions"] for box in lesion["boxes"]]
    assert frames == [series.frames[box["slice"]] + 1 for box in boxes]


def test_denoised_first(tmp_path, model, expected, write_series, make_hu, monkeypatch):
    """The co-trained detector sees what the denoiser makes; JSON and report say so."""
    seen = []
    call = SliceDetector.__call__

    def recording(self, hu):
        seen.append(hu[:, 0].numpy())
        return call(self, hu)

    monkeypatch.setattr(SliceDetector, "__call__", recording)
    hu = make_hu(4, 64, 64)
    write_series(tmp_path / "in", hu, edit=named)
    summary = detect(tmp_path / "in", tmp_path / "out", model=model, denoise_first=True, batch_size=3, **ON_CPU)
    assert [len(images) for images in seen] == [3, 1]
    assert np.abs(np.concatenate(seen) - expected(hu).clip(-1024)).max() < 0.01
    manifest, record = json.loads((tmp_path / "out" / "detect.json").read_text()), record_of(tmp_path / "out")
    prints = {
        name: hashlib.sha256((model / "collaborate" / f"{name}.pt").read_bytes()).hexdigest()
        for name in ("detector", "denoiser")
    }
    for one in (manifest, record):
        assert (one["model"], one["denoised_by"]) == (prints["detector"], prints["denoiser"])
        assert one["detector"] == "cotrained"
    (path,) = (tmp_path / "out").rglob("*.dcm")
    assert f"denoised first by the model with SHA-256 {prints['denoiser'][:16]}" in words_of(path)
    assert "the model's file doesn't say what it was trained on" in "\n".join(summary.lines())


def test_a_series_is_read_a_batch_ahead_at_most(tmp_path, model, write_series, make_hu, monkeypatch):
    """Memory is flat in the series' length: what has been read is looked at before more is."""
    module = sys.modules["lidnet_fast.inference.detect"]
    counts = {"read": 0, "seen": 0}
    decode = module.decode_slices

    def reading(*arguments):
        counts["read"] += 1
        assert counts["read"] - counts["seen"] <= 6
        return decode(*arguments)

    def look(self, hu):
        counts["seen"] += len(hu)
        return [{"boxes": torch.zeros(0, 4), "scores": torch.zeros(0)} for _ in hu]

    monkeypatch.setattr(module, "decode_slices", reading)
    monkeypatch.setattr(SliceDetector, "__call__", look)
    write_series(tmp_path / "in", make_hu(30), edit=named)
    detect(tmp_path / "in", tmp_path / "out", model=model, batch_size=2, **ON_CPU)
    assert counts == {"read": 30, "seen": 30}


@pytest.fixture
def studies(tmp_path, write_series, make_hu):
    """Two good series and a volume; beside them a single slice, a series with a gap and a damaged one."""
    root, uid = tmp_path / "studies", "1.2.826.0.1.3680043.8.498"
    write_series(root / "anna", make_hu(3, seed=1), series_uid=f"{uid}.1", edit=named)
    write_series(root / "bert" / "ct", make_hu(3, seed=2), series_uid=f"{uid}.2", edit=named)
    write_series(root / "one", make_hu(1, seed=3), series_uid=f"{uid}.3", edit=named)
    gap = write_series(root / "gap", make_hu(7, seed=4), series_uid=f"{uid}.4", edit=named)
    gap[3].unlink()
    damaged = write_series(root / "damaged", make_hu(3, seed=5), series_uid=f"{uid}.5", edit=named)
    damaged[1].write_bytes(damaged[1].read_bytes()[:-1000])
    sitk.WriteImage(sitk.GetImageFromArray(make_hu(4, seed=6)), str(root / "ct.mha"))
    (root / "notes.txt").write_text("a note")
    return root


def test_a_tree_of_studies_in_fresh_processes(studies, model):
    out = studies / "lesions"
    command = [Path(sys.executable).with_name("lidnet-fast"), "detect", studies, out, "--model", model]
    first = None
    for done, already in ((3, ""), (0, ", 3 were there already")):
        run = subprocess.run([*map(str, command), "--device", "cpu"], capture_output=True, text=True)
        assert run.returncode == 2
        assert f"{done} series ({10 if done else 0} slices) searched{already}" in run.stdout
        assert re.search(r"files: 18 found = 7 used \+ 1 skipped \+ 10 rejected", run.stdout), run.stdout
        *faults, last = run.stderr.splitlines()
        assert len(faults) == 3 and last == f"lidnet-fast: {out}: 3 series or files aren't in it, see above"
        text = "\n".join(faults)
        assert re.search(r"one/3_0000.dcm: is the only slice of its series", text)
        assert re.search(r"series .*\.4 in .*gap: slices are missing between", text)
        assert re.search(r"damaged/5_\d+\.dcm: .*truncated", text)
        made = {path.relative_to(out) for path in out.rglob("*") if path.is_file()}
        assert {str(path.parent) for path in made} == {".", "anna", "bert/ct"}
        assert sorted(path.suffix for path in made if path.parent.name) == [".dcm", ".dcm", ".json", ".json"]
        assert {"detect.json", "candidates.csv", "boxes.csv", "ct.mha.json"} <= {str(path) for path in made}
        first = first or contents(out)
    assert contents(out) == first
    candidates = (out / "candidates.csv").read_text().splitlines()
    assert {line.split(",")[0][-2:] for line in candidates[1:]} == {".1", ".2", "ct"}


def test_a_call_that_was_stopped_goes_on(tmp_path, model, write_series, make_hu, monkeypatch):
    for series in range(3):
        write_series(tmp_path / "in", make_hu(3, seed=series), series_uid=f"1.2.3.{series}", edit=named)
    detect(tmp_path / "in", tmp_path / "whole", model=model, **ON_CPU)
    calls, call = [], SliceDetector.__call__

    def stopping(self, hu):
        calls.append(1)
        if len(calls) == 5:  # in the second series
            raise KeyboardInterrupt
        return call(self, hu)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SliceDetector, "__call__", stopping)
        detect(tmp_path / "in", tmp_path / "out", model=model, **ON_CPU)
    assert len(list((tmp_path / "out").rglob("*.dcm"))) == 1 and not (tmp_path / "out" / "candidates.csv").exists()
    summary = detect(tmp_path / "in", tmp_path / "out", model=model, **ON_CPU)
    assert (summary.done, summary.already) == (2, 1)
    for name in ("candidates.csv", "boxes.csv"):
        assert (tmp_path / "out" / name).read_text() == (tmp_path / "whole" / name).read_text()


def test_a_folder_holds_results_of_one_setting(tmp_path, model, write_series, make_hu):
    write_series(tmp_path / "in", make_hu(2), edit=named)
    detect(tmp_path / "in", tmp_path / "out", model=model, **ON_CPU)
    for options, message in (
        ({"detector": "cotrained"}, "holds detected lesions of detector frozen, not cotrained"),
        ({"denoise_first": True, "detector": "frozen"}, "holds detected lesions of denoised_by None, not"),
        ({"min_score": 0.5}, "holds detected lesions of min_score None, not 0.5"),
    ):
        with pytest.raises(InputError, match=message):
            detect(tmp_path / "in", tmp_path / "out", model=model, **options, **ON_CPU)
    denoise(tmp_path / "in", tmp_path / "denoised", model=model, **ON_CPU)
    with pytest.raises(InputError, match="isn't empty and holds no detected lesions"):
        detect(tmp_path / "in", tmp_path / "denoised", model=model, **ON_CPU)


def test_series_outside_of_what_the_detector_was_trained_on(tmp_path, write_series, make_hu):
    save_detector(tmp_path / "detector.pt", 0, None, envelope=Envelope(pixel_spacing=(0.3, 0.3)))
    write_series(tmp_path / "in", make_hu(2), edit=named)
    options = {"model": tmp_path / "detector.pt", **ON_CPU}
    summary = detect(tmp_path / "in", tmp_path / "out", **options)
    assert "lies outside of what the model was trained on: pixel spacing 0.8 mm" in "\n".join(summary.lines())
    assert record_of(tmp_path / "out")["outside"] == ["pixel spacing 0.8 mm (trained on 0.3 mm)"]
    (path,) = (tmp_path / "out").rglob("*.dcm")
    assert "it lies outside of what the model was trained on: pixel spacing" in words_of(path)
    refused = detect(tmp_path / "in", tmp_path / "other", outside="refuse", **options)
    assert "To fix: --outside warn takes it all the same" in refused.failures[0] and refused.done == 0


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda run: shutil.rmtree(run / "detector"), [], "detector/detector.pt: there is no frozen detector"),
        (lambda run: (run / "detector" / "detector.pt").write_bytes(b"PK"), [], "is not a readable checkpoint"),
        (lambda run: torch.save({"a": 1}, run / "detector" / "detector.pt"), [], "is not a lidnet_fast-network file"),
        (
            lambda run: shutil.copy(run / "collaborate" / "denoiser.pt", run / "detector" / "detector.pt"),
            [],
            "holds a denoiser, not a detector",
        ),
        (lambda run: (run / "collaborate" / "denoiser.pt").unlink(), ["--denoise-first"], "there is no checkpoint"),
        (lambda run: None, ["--min-score", "2"], "min_score must lie in [0, 1], got 2.0"),
        (lambda run: None, ["--batch-size", "0"], "batch_size must be at least 1, got 0"),
        (lambda run: save_detector(run / "detector" / "detector.pt", 0, "all"), [], "trained.data.crop can't be 'all'"),
    ],
)
def test_bad_input_is_one_line(tmp_path, model, write_series, make_hu, capsys, make, options, message):
    run = shutil.copytree(model, tmp_path / "run")
    make(run)
    write_series(tmp_path / "in", make_hu(2), edit=named)
    with pytest.raises(SystemExit) as stop:
        main(["detect", str(tmp_path / "in"), str(tmp_path / "out"), "--model", str(run), *options])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and message in error
    assert not (tmp_path / "out").exists()


def test_a_detectors_file_is_one_detector(tmp_path, model):
    for option in ({"denoise_first": True}, {"detector": "cotrained"}):
        with pytest.raises(InputError, match=f"{next(iter(option))} needs the folder of a run"):
            detect(tmp_path, tmp_path / "out", model=model / "detector" / "detector.pt", **option)
