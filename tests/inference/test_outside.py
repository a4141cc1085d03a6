"""Series that lie outside of what the model was trained on are named, in the results too, and refused on request."""

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk  # noqa: N813
from pydicom.data import get_testdata_file

from lidnet_fast.cli import main
from lidnet_fast.errors import InputError
from lidnet_fast.inference import Acquisition, Envelope, SliceDenoiser, denoise, detect, load_denoiser
from lidnet_fast.inference.acquisition import acquisition_of_series
from lidnet_fast.inference.sources import find
from lidnet_fast.models.detectors import build_detector
from lidnet_fast.models.files import save_network
from lidnet_fast.models.registry import NetworkConfig
from lidnet_fast.models.windowing import HUWindow
from tests.data.formats.dicom.test_multiframe import converted
from tests.inference.conftest import random_network

__all__ = ["converted"]

ENVELOPE = Envelope(
    hu=(-1300.0, 1000.0),
    pixel_spacing=(0.6, 0.9),
    slice_thickness=(1.0, 2.5),
    kernels=("B30f",),
    body_parts=("CHEST",),
    noise={"soft tissue": (40.0, 90.0), "lung": (40.0, 90.0)},
)
HEAD = ["body part HEAD (trained on CHEST)", "noise in soft tissue 4.", "kernel H31s (trained on B30f)"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model file that says what it was trained on: low-dose CT of the chest."""
    path = tmp_path_factory.mktemp("model") / "mine.pt"
    options = {"channels": 4, "layers": 2}
    save_network(
        path, "denoiser", random_network("small", **options), NetworkConfig("small", options), HUWindow(), {}, ENVELOPE
    )
    return path


def tissue(noise, depth=3, seed=0):
    """Slices of 40 HU with white noise."""
    return np.rint(40 + noise * np.random.default_rng(seed).standard_normal((depth, 64, 64))).astype(np.int16)


@pytest.fixture
def studies(tmp_path, write_series):
    """A chest at low dose as in training, and a head at normal dose."""

    def edit(kernel, part):
        def named(z, dataset):
            dataset.ConvolutionKernel, dataset.BodyPartExamined = kernel, part

        return named

    write_series(tmp_path / "in" / "chest", tissue(60.0), series_uid="1.2.1", edit=edit("B30f", "CHEST"))
    write_series(tmp_path / "in" / "head", tissue(5.0), series_uid="1.2.2", edit=edit("H31s", "HEAD"))
    return tmp_path / "in"


def called(capsys, status, *arguments):
    """The output of `lidnet-fast denoise`, which ends with this status."""
    arguments = ["denoise", *map(str, arguments), "--device", "cpu", "--precision", "float32"]
    if status:
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == status
    else:
        main(arguments)
    return capsys.readouterr()


def descriptions(out):
    """DerivationDescription of each series, by its folder in the source."""
    files = {path.parent.parent.name: path for path in out.rglob("*.dcm")}
    return {name: pydicom.dcmread(path).DerivationDescription for name, path in files.items()}


@pytest.mark.parametrize("choice", [[], ["--outside", "accept"]])
def test_what_lies_outside_is_said_and_written(tmp_path, studies, model, capsys, choice):
    out = tmp_path / "out"
    for _ in range(2):  # the second call finds both there, and says the same
        said = called(capsys, 0, studies, out, "--model", model, *choice).out
        lines = [line for line in said.splitlines() if "warning" in line]
        assert len(lines) == (0 if choice else 1)
        for line in lines:
            assert f"series 1.2.2 in {studies / 'head'}: lies outside of what the model was trained on: " in line
            assert all(phrase in line for phrase in HEAD)
    chest, head = (descriptions(out)[name] for name in ("chest", "head"))
    assert "outside" not in chest
    assert all(phrase in head for phrase in HEAD)
    ((name, noted),) = json.loads((out / "denoise.json").read_text())["outside"].items()
    assert name.startswith("head/")
    assert (out / name).is_dir()
    assert len(noted) == len(HEAD)


def test_refused_by_name(tmp_path, studies, model, capsys):
    out = tmp_path / "out"
    said = called(capsys, 2, studies, out, "--model", model, "--outside", "refuse")
    assert "1 series (3 slices) denoised" in said.out
    assert f"series 1.2.2 in {studies / 'head'}: lies outside of what the model was trained on: " in said.err
    assert "To fix: --outside warn" in said.err
    assert list(descriptions(out)) == ["chest"]
    assert json.loads((out / "denoise.json").read_text())["outside"] == {}
    # Another choice goes on in the same folder: what was made is the same.
    assert "1 were there already" in called(capsys, 0, studies, out, "--model", model).out
    assert set(descriptions(out)) == {"chest", "head"}


def test_an_older_model_file_is_unknown_and_that_is_said_once(tmp_path, studies, run, capsys):
    for _ in range(2):
        said = called(capsys, 0, studies, tmp_path / "out", "--model", run, "--outside", "refuse").out
        assert said.count("the model's file doesn't say what it was trained on") == 1
    assert json.loads((tmp_path / "out" / "denoise.json").read_text())["outside"] is None
    assert not any("trained on" in text for text in descriptions(tmp_path / "out").values())


def test_folders_that_an_older_version_began(tmp_path, studies, model, capsys):
    out = tmp_path / "out"
    called(capsys, 0, studies, out, "--model", model)
    record = json.loads((out / "denoise.json").read_text())
    del record["outside"]
    (out / "denoise.json").write_text(json.dumps(record))
    assert "2 were there already" in called(capsys, 0, studies, out, "--model", model).out
    (out / "denoise.json").write_text(json.dumps({**record, "outside": [1]}))
    with pytest.raises(InputError, match="isn't the record of a folder of denoised images"):
        denoise(studies, out, model=model, device="cpu", precision="float32")


@pytest.mark.parametrize("name", ["ct.nii.gz", "ct.mha"])
def test_volumes(tmp_path, model, name):
    """A normal dose of other pixel size; a single file has no manifest, but a summary."""
    path = tmp_path / "in" / name
    path.parent.mkdir()
    hu = tissue(5.0)
    hu[:, :8] = -1000
    image = sitk.GetImageFromArray(hu)
    image.SetSpacing((0.4, 0.4, 5.0))
    sitk.WriteImage(image, str(path))
    for target in (tmp_path / "out", tmp_path / "one.mha"):
        (where,) = denoise(path, target, model=model, device="cpu").outside.values()
        assert where[0] == "pixel spacing 0.4 mm (trained on 0.6..0.9 mm)"
        assert where[1].startswith("noise in soft tissue")
    assert json.loads((tmp_path / "out" / "denoise.json").read_text())["outside"] == {name: where}
    with pytest.raises(InputError, match="outside must be one of warn, refuse, accept, got 'never'"):
        denoise(path, tmp_path / "new", model=model, outside="never")


def test_a_series_that_fails_is_not_noted(tmp_path, studies, model):
    """Only what is in the folder is in its record."""
    path = sorted((studies / "head").iterdir())[1]
    path.write_bytes(path.read_bytes()[:-1000])
    summary = denoise(studies, tmp_path / "out", model=model, device="cpu")
    assert len(summary.failures) == 1
    assert summary.outside == {}
    assert json.loads((tmp_path / "out" / "denoise.json").read_text())["outside"] == {}


def test_multi_frame_files_say_it_in_their_functional_groups(tmp_path):
    image = pydicom.dcmread(get_testdata_file("eCT_Supplemental.dcm", download=False))
    shared = image.SharedFunctionalGroupsSequence[0]
    transformation = shared.PixelValueTransformationSequence[0]
    transformation.RescaleType = "HU"
    reconstruction = pydicom.Dataset()
    reconstruction.ConvolutionKernel = "FC08"
    shared.CTReconstructionSequence = [reconstruction]
    if "RealWorldValueMappingSequence" in shared:
        del shared.RealWorldValueMappingSequence
    image.save_as(tmp_path / "enhanced.dcm")
    (series,) = find(tmp_path / "enhanced.dcm", tmp_path / "out").series
    with ThreadPoolExecutor(1) as pool:
        measured = acquisition_of_series(series, pool)
    measures = shared.PixelMeasuresSequence[0]
    assert measured.kernel == "FC08"
    assert measured.slice_thickness == float(measures.SliceThickness)
    assert measured.pixel_spacing == max(measures.PixelSpacing)
    assert measured.hu is not None


@pytest.mark.parametrize("kind", ["single", "multi-frame", "volume"])
def test_neighbours_at_another_distance(tmp_path, converted, capsys, kind):
    """A model of neighbouring slices, which saw them 10 mm apart, and series whose slices lie 2.5 mm apart.

    The denoiser, the detector, and the detector behind a denoiser of single slices; whose own file says nothing of it.
    """
    single, hu, enhanced = converted()
    source = {"single": single, "multi-frame": enhanced, "volume": tmp_path / "ct.nii"}[kind]
    if kind == "volume":
        image = sitk.GetImageFromArray(hu)
        image.SetSpacing((0.8, 0.7, 2.5))
        sitk.WriteImage(image, str(source))
    run, far = tmp_path / "run", Envelope(slice_distance=(10.0, 12.0))
    for place, context, envelope in (("run", 1, far), ("alone", 0, Envelope())):
        network = random_network("small", context=context, channels=4, layers=2)
        config = NetworkConfig("small", {"channels": 4, "layers": 2})
        file = tmp_path / place / "collaborate" / "denoiser.pt"
        save_network(file, "denoiser", network, config, HUWindow(), {}, envelope, context)
        detector = build_detector("faster_rcnn_small", context=1)
        for phase in ("detector", "collaborate"):
            path = tmp_path / place / phase / "detector.pt"
            save_network(path, "detector", detector, NetworkConfig("faster_rcnn_small"), HUWindow(), {}, far, context=1)
    said = "slice distance 2.5 mm (trained on 10..12 mm)"
    for number, (function, options) in enumerate(
        (
            (denoise, {"model": run}),
            (detect, {"model": run}),
            (detect, {"model": run, "denoise_first": True}),
            (detect, {"model": tmp_path / "alone", "denoise_first": True}),
        )
    ):
        summary = function(source, tmp_path / f"out{number}", **options, device="cpu", precision="float32")
        assert list(summary.outside.values()) == [[said]]
    refused = detect(source, tmp_path / "none", model=run, outside="refuse", device="cpu", precision="float32")
    (failure,) = refused.failures
    assert f"{said}. To fix: --outside warn" in failure
    assert denoise(source, tmp_path / "quiet", model=tmp_path / "alone", device="cpu").outside == {}


def test_in_python(model):
    denoiser = load_denoiser(model)
    assert denoiser.envelope.outside(Acquisition.measured(tissue(60.0), kernel="B30f")) == []
    assert SliceDenoiser(denoiser, next(denoiser.parameters()).device).envelope == ENVELOPE
