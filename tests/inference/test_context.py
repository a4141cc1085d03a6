"""Denoisers that see neighbouring slices, on stacks, volumes and DICOM series."""

import json
from collections import Counter

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk  # noqa: N813
import torch

from lidnet_fast.data.formats.dicom.series import read_volume, scan
from lidnet_fast.inference import HUDenoiser, SliceDenoiser, denoise, detect, save_denoiser
from lidnet_fast.inference import series as series_module
from lidnet_fast.models import HUWindow, NetworkConfig, build_detector
from lidnet_fast.models.files import save_network
from lidnet_fast.neighbours import neighbours, slabs, stacks
from tests.data.formats.dicom.test_multiframe import complete, converted
from tests.inference.conftest import random_network

__all__ = ["converted"]

OPTIONS = {"channels": 8, "layers": 3}


@pytest.fixture(scope="module")
def hu_denoiser():
    return HUDenoiser(random_network("small", context=2, **OPTIONS), HUWindow(), context=2).eval()


@pytest.fixture(scope="module")
def model(hu_denoiser, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "denoiser.pt"
    save_denoiser(path, hu_denoiser, NetworkConfig("small", OPTIONS))
    return path


@pytest.fixture(scope="module")
def expected(hu_denoiser):
    def denoised(hu):
        with torch.inference_mode():
            return hu_denoiser(stacks(torch.from_numpy(hu).float(), 2))[:, 0].numpy()

    return denoised


def run_on(source, out, model, **options):
    summary = denoise(source, out, **{"model": model, "precision": "float32", "device": "cpu", **options})
    assert summary.failures == []
    return summary


@pytest.mark.parametrize("options", [{}, {"batch_size": 2}, {"tile": 20}, {"blend": 0.5}])
def test_a_stack_is_denoised_from_neighbours(hu_denoiser, expected, make_hu, options):
    hu = make_hu(5, 40, 56).astype(np.float32)
    whole = SliceDenoiser(hu_denoiser, "cpu", **options)(hu)
    wanted = hu + options.get("blend", 1) * (expected(hu) - hu)
    np.testing.assert_allclose(whole, wanted, rtol=0, atol=0.2)
    part = SliceDenoiser(hu_denoiser, "cpu", **options)(torch.from_numpy(hu[:4]), 2, 1)
    np.testing.assert_allclose(part, SliceDenoiser(hu_denoiser, "cpu", **options)(hu[:4])[2:3], rtol=0, atol=1e-3)
    np.testing.assert_allclose(
        SliceDenoiser(hu_denoiser, "cpu", **options)(hu[0]),
        SliceDenoiser(hu_denoiser, "cpu", **options)(hu[:1])[0],
        rtol=0,
        atol=1e-3,
    )


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("context", [0, 1, 3])
def test_slabs_hold_every_slice_with_its_neighbours(context, size):
    slices, answered = np.arange(7)[:, None, None], []
    for slab, before, after in slabs((slices[start : start + size] for start in range(0, 7, size)), context):
        for place in range(before, len(slab) - after):
            z = int(slab[place, 0, 0])
            answered.append(z)
            seen = slab[neighbours(place, len(slab), context), 0, 0]
            assert seen.tolist() == neighbours(z, 7, context).tolist()
        assert len(slab) <= size + 2 * context
    assert answered == list(range(7))


@pytest.mark.parametrize("denoise_first", [False, True])
def test_lesions_are_found_in_stacks(tmp_path, hu_denoiser, converted, denoise_first):
    """In a volume, in files and in a multi-frame file, whatever the size of the batches: what whole stacks show."""
    run, source = tmp_path / "run", tmp_path / "in"
    single, hu, enhanced = converted()
    source.mkdir()
    single.rename(source / "single")
    enhanced.rename(source / "enhanced.dcm")
    torch.manual_seed(0)
    options = {"score_threshold": 0.0, "max_detections": 2}
    detector = build_detector("faster_rcnn_small", context=1, **options).eval()
    for name in ("detector", "collaborate"):
        config = NetworkConfig("faster_rcnn_small", options)
        save_network(run / name / "detector.pt", "detector", detector, config, HUWindow(), {}, context=1)
    save_denoiser(run / "collaborate" / "denoiser.pt", hu_denoiser, NetworkConfig("small", OPTIONS))
    sitk.WriteImage(sitk.GetImageFromArray(hu), str(source / "ct.nii"))
    seen = torch.from_numpy(hu).float()
    if denoise_first:
        seen = torch.from_numpy(SliceDenoiser(hu_denoiser, "cpu")(hu)).clamp(min=-1024)
    window = HUWindow()
    expected = detector.detect(window.clamp(window.scale(stacks(seen, 1))))
    best = max(float(one["scores"].max()) for one in expected)
    for size in (1, 4):
        out = tmp_path / f"out{size}"
        options = {"denoise_first": denoise_first, "batch_size": size, "device": "cpu", "precision": "float32"}
        assert detect(source, out, model=run, **options).failures == []
        found = [json.loads(path.read_text()) for path in out.rglob("*.json") if path.name != "detect.json"]
        assert len(found) == 3
        for record in found:
            assert record["lesions"][0]["score"] == pytest.approx(best, abs=1e-3)
            scores = [box["score"] for lesion in record["lesions"] for box in lesion["boxes"]]
            assert sorted(scores) == pytest.approx(
                sorted(float(x) for one in expected for x in one["scores"]), abs=1e-3
            )


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_volume(tmp_path, model, expected, make_hu, batch_size):
    hu = make_hu(7, 40, 56)
    sitk.WriteImage(sitk.GetImageFromArray(hu), str(tmp_path / "ct.nii"))
    run_on(tmp_path / "ct.nii", tmp_path / "out.nii", model, batch_size=batch_size)
    made = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "out.nii")))
    assert np.abs(made - expected(np.maximum(hu, -1024)).clip(-1024)).max() <= 0.5 + 1e-3


@pytest.mark.parametrize("files", [1, 2])
def test_multi_frame_ct(tmp_path, model, expected, write_series, make_hu, files):
    """Frames in no order, in one file or in two that lie one behind the other."""
    legacy = pytest.importorskip("highdicom.legacy")
    hu = make_hu(6, 40, 56)
    singles = [pydicom.dcmread(path) for path in write_series(tmp_path / "single", hu, edit=complete)]
    (tmp_path / "in").mkdir()
    for number, part in enumerate(np.array_split(np.arange(6), files)):
        frames = [singles[z] for z in np.random.default_rng(0).permutation(part)]
        place = {"series_instance_uid": "1.2.9", "series_number": 1, "instance_number": number + 1}
        made = legacy.LegacyConvertedEnhancedCTImage(frames, sop_instance_uid=f"1.2.9.{number}", **place)
        made.save_as(tmp_path / "in" / f"{number}.dcm")
    assert run_on(tmp_path / "in", tmp_path / "out", model).slices == 6
    (series,) = scan(sorted((tmp_path / "out").rglob("*.dcm"))).series
    assert np.abs(read_volume(series) - expected(hu).clip(-1024)).max() <= 0.5 + 1e-3


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_series_of_files_in_no_order(tmp_path, model, expected, make_hu, write_series, monkeypatch, batch_size):
    """Each file is decoded once, also where a batch's neighbours lie in the next one's files."""
    hu = make_hu(7, 40, 56)
    paths = write_series(tmp_path / "in", hu)
    read, decoded = series_module.read_image, Counter()
    monkeypatch.setattr(series_module, "read_image", lambda path: (decoded.update([path]), read(path))[1])
    summary = run_on(tmp_path / "in", tmp_path / "out", model, batch_size=batch_size)
    assert summary.slices == 7
    assert decoded == Counter(paths)
    results = {path.name: path for path in (tmp_path / "out").rglob("*.dcm")}
    wanted = expected(hu).clip(-1024)
    for z, path in enumerate(paths):
        made = pydicom.dcmread(results[path.name])
        assert np.abs(made.pixel_array * 1.0 + made.RescaleIntercept - wanted[z]).max() <= 0.5 + 1e-3


def test_an_interrupted_series_goes_on_with_the_same_neighbours(
    tmp_path, model, expected, make_hu, write_series, monkeypatch
):
    hu = make_hu(7, 40, 56)
    paths = write_series(tmp_path / "in", hu)
    read, calls = series_module.read_image, []

    def cut(path):
        calls.append(path)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return read(path)

    with monkeypatch.context() as patch:
        patch.setattr(series_module, "read_image", cut)
        with pytest.raises(KeyboardInterrupt):
            run_on(tmp_path / "in", tmp_path / "out", model, batch_size=1)
    summary = run_on(tmp_path / "in", tmp_path / "out", model, batch_size=1)
    assert 0 < summary.slices < 7
    results = {path.name: path for path in (tmp_path / "out").rglob("*.dcm")}
    wanted = expected(hu).clip(-1024)
    for z, path in enumerate(paths):
        made = pydicom.dcmread(results[path.name])
        assert np.abs(made.pixel_array * 1.0 + made.RescaleIntercept - wanted[z]).max() <= 0.5 + 1e-3


def test_series_whose_order_is_unknown_are_refused(tmp_path, model, make_hu, write_series):
    hu = make_hu(3, 40, 56)

    def without_place(z, dataset):
        if z == 1:
            del dataset.ImagePositionPatient

    def at_one_place(z, dataset):
        if z == 1:
            dataset.ImagePositionPatient = [-20, -30, 100]

    write_series(tmp_path / "in" / "a", hu, series_uid="1.2.3", edit=without_place)
    write_series(tmp_path / "in" / "b", hu, series_uid="1.2.4", edit=at_one_place)
    summary = denoise(tmp_path / "in", tmp_path / "out", model=model, device="cpu")
    first, second = sorted(summary.failures, key=lambda fault: "same place" in fault)
    assert "doesn't say where its slices lie, and the model looks at neighbouring slices. To fix" in first
    assert "lie at the same place, and the model looks at neighbouring slices. To fix" in second
    assert not list((tmp_path / "out").rglob("*.dcm"))


def test_slices_of_another_size_are_no_neighbours(tmp_path, model, expected, make_hu, write_series):
    large, small = make_hu(2, 40, 56), make_hu(2, 32, 32, seed=1)
    paths = write_series(tmp_path / "in" / "a", large)
    paths += write_series(tmp_path / "in" / "b", small, origin=(-20.0, -30.0, 200.0))
    run_on(tmp_path / "in", tmp_path / "out", model, batch_size=4)
    results = {path.parent.name + path.name: path for path in (tmp_path / "out").rglob("*.dcm")}
    for n, wanted in enumerate([*expected(large), *expected(small)]):
        made = pydicom.dcmread(results[paths[n].parent.name + paths[n].name])
        assert np.abs(made.pixel_array * 1.0 + made.RescaleIntercept - wanted.clip(-1024)).max() <= 0.5 + 1e-3
