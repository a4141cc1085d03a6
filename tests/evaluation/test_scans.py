"""Candidates in whole scans: tables scored by LUNA16's rules, and a run's own detectors."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lidnet_fast.cli import main
from lidnet_fast.data.store.index import SeriesInfo
from lidnet_fast.data.store.reader import Store
from lidnet_fast.data.store.writer import StoreWriter
from lidnet_fast.evaluation.arms import network_arm
from lidnet_fast.evaluation.scans import _detect, lesions_of_store
from lidnet_fast.inference import SliceDenoiser
from lidnet_fast.models import HUWindow, build_detector
from lidnet_fast.models.hu import HUDenoiser
from lidnet_fast.models.slice_detector import SliceDetector
from lidnet_fast.neighbours import stacks
from lidnet_fast.trainer.config import DataConfig, RunConfig
from tests.inference.conftest import random_network
from tests.test_cli import refused

HEADING = "seriesuid,coordX,coordY,coordZ,"


@pytest.fixture
def tables(tmp_path: Path) -> Path:
    """Four scans, three nodules, an excluded finding of unknown size, and candidates."""
    (tmp_path / "seriesuids.csv").write_text("1.1\n1.2\n1.3\n1.4\n")
    (tmp_path / "annotations.csv").write_text(f"{HEADING}diameter_mm\n1.1,0,0,0,10\n1.1,40,0,0,6\n1.2,-5.5,3,-200,8\n")
    (tmp_path / "excluded.csv").write_text(f"{HEADING}diameter_mm\n1.3,9,9,9,-1\n")
    (tmp_path / "candidates.csv").write_text(
        f"{HEADING}probability\n1.1,1,1,1,0.9\n1.1,0,2,0,0.5\n1.2,-5,3,-199,0.7\n1.3,9,9,13.9,0.99\n1.3,9,9,14.1,0.8\n"
    )
    return tmp_path


def options(tables: Path, *names: str) -> list[str]:
    files = {name: str(tables / f"{name.replace('_', '')}.csv") for name in names}
    return [word for name, file in files.items() for word in (f"--{name.replace('_', '-')}", file)]


def test_tables_by_hand_in_a_fresh_process(tables: Path) -> None:
    """Hits of 0.9 and 0.7 of three nodules, a false positive of 0.8 5.1 mm beside an excluded finding of 10 mm."""
    arguments = options(tables, "candidates", "annotations", "excluded", "series_uids")
    command = [Path(sys.executable).with_name("lidnet-fast"), "evaluate", *arguments, "--out", "results"]
    done = subprocess.run(command, cwd=tables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads((tables / "results" / "scans.json").read_text())
    assert (result["scans"], result["lesions"], result["candidates"]) == (4, 3, 5)
    values = {rate: value for rate, (value, _, _) in result["sensitivity"].items()}
    # 1/3 without false positives, 2/3 with the first one, which is 1/4 per scan.
    assert values == pytest.approx({"0.125": 1 / 3, **dict.fromkeys(("0.25", "0.5", "1", "2", "4", "8"), 2 / 3)})
    assert result["cpm"][0] == pytest.approx((1 / 3 + 6 * 2 / 3) / 7)
    assert all(low <= value <= high for value, low, high in [*result["sensitivity"].values(), result["cpm"]])
    assert "4 scans, 3 lesions, 5 candidates" in " ".join(done.stdout.split())
    assert "0.667 [" in done.stdout


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("candidates", "seriesuid,x,y,z,probability\n", "candidates.csv, line 1: column coordX is missing"),
        ("candidates", f"{HEADING}probability\n1.9,0,0,0,1\n", "line 2: there is no series 1.9 among the 4 of "),
        ("candidates", f"{HEADING}probability\n1.1,0,0,zero,1\n", "line 2: coordZ 'zero' isn't a number"),
        ("annotations", f"{HEADING}diameter_mm\n1.9,0,0,0,1\n", "annotations.csv: there is no series 1.9 among"),
        ("annotations", f"{HEADING}diameter_mm\n1.1,0,0,0,-1\n", "annotations.csv, line 2: the nodule at"),
        ("excluded", f"{HEADING}probability\n", "excluded.csv, line 1: column diameter_mm is missing"),
        ("seriesuids", "", "seriesuids.csv: names no series"),
        ("seriesuids", "seriesuid,patient\n", "seriesuids.csv: 'seriesuid,patient' isn't a series UID"),
    ],
)
def test_tables_that_cannot_be_used(
    tables: Path, capsys: pytest.CaptureFixture[str], file: str, content: str, message: str
) -> None:
    (tables / f"{file}.csv").write_text(content)
    arguments = options(tables, "candidates", "annotations", "excluded", "series_uids")
    assert message in refused(capsys, ["evaluate", *arguments, "--out", str(tables / "out")])
    assert not (tables / "out").exists()


@pytest.mark.parametrize(
    ("names", "more", "message"),
    [
        (["candidates"], [], "--candidates needs the folder of a run, --store, or --annotations and --series-uids"),
        (["candidates", "annotations"], [], "--annotations and --series-uids go together"),
        (["candidates", "excluded"], ["--store", "s"], "--annotations and --series-uids go together"),
        (["candidates", "annotations", "series_uids"], ["--samples", "3"], "--samples doesn't go with --candidates"),
        (["annotations"], ["--store", "s"], "--annotations needs --candidates"),
    ],
)
def test_options_that_do_not_go_together(
    tables: Path, capsys: pytest.CaptureFixture[str], names: list[str], more: list[str], message: str
) -> None:
    assert message in refused(capsys, ["evaluate", *options(tables, *names), *more])


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """One test series on oblique slices: a lesion on slices 2 to 4, and another on slice 4."""
    path = tmp_path / "store"
    with StoreWriter(path) as writer:
        geometry = {"spacing": (2.0, 0.5, 0.25), "origin": (-9.0, 4.0, 100.0), "orientation": (0, 1, 0, 0, 0, -1)}
        info = SeriesInfo("1.7", "anna", "test", True, shape=(6, 32, 48), **geometry)
        boxes = np.array([[2, 10, 10, 14, 14], [3, 8, 8, 16, 16], [4, 10, 10, 14, 14], [4, 30, 20, 34, 24]])
        volume = np.zeros(info.shape, np.int16)
        writer.add_series(info, volume, boxes, volume)
    return path


def test_lesions_of_a_store_are_spheres(store: Path) -> None:
    lesions = lesions_of_store(Store(store), 0)
    normal = np.cross((0, 1, 0), (0, 0, -1))
    assert normal.tolist() == [-1, 0, 0]
    # The centre is pixel (12, 12) - half a pixel on slice 3; x runs along y in space, y against z.
    first = [-9 - 3 * 2, 4 + 11.5 * 0.25, 100 - 11.5 * 0.5]
    second = [-9 - 4 * 2, 4 + 31.5 * 0.25, 100 - 21.5 * 0.5]
    np.testing.assert_allclose(lesions.centres, [first, second])
    assert lesions.diameters.tolist() == [4, 2]


def test_a_table_against_the_lesions_of_a_store(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "candidates.csv"
    table.write_text(f"{HEADING}probability\n1.7,-15,6.9,94.3,0.8\n")
    main(["evaluate", "--store", str(store), "--candidates", str(table), "--out", str(tmp_path / "out")])
    result = json.loads((tmp_path / "out" / "scans.json").read_text())
    assert (result["lesions"], result["cpm"]) == (2, [0.5, 0.5, 0.5])
    table.write_text(f"{HEADING}probability\n1.7,-15,6.9,94.3,0.7\n")
    arguments = ["evaluate", "--store", str(store), "--candidates", str(table), "--out", str(tmp_path / "out")]
    assert "its results have SHA-256 of candidates.csv" in refused(capsys, arguments)
    table.write_text(f"{HEADING}probability\n1.8,-15,6.9,94.3,0.8\n")
    arguments = ["evaluate", "--store", str(store), "--candidates", str(table), "--out", str(tmp_path / "other")]
    assert "there is no series 1.8 among the 1 test series of" in refused(capsys, arguments)
    assert not (tmp_path / "other").exists()


def test_a_run_on_whole_scans(trained_config: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    out = Path(trained_config.out)
    main(["evaluate", str(out), "--device", "cpu", "--scans"])
    scans = json.loads((out / "metrics.json").read_text())["scans"]
    assert {arm: set(found) for arm, found in scans.items()} == {
        "low dose": {"judge"},
        "denoised": {"judge", "cotrained"},
        "normal dose": {"judge"},
    }
    for found in scans.values():
        for result in found.values():
            value, low, high = result["cpm"]
            assert 0 <= low <= value <= high <= 1
    assert "Of whole scans by LUNA16" in (out / "report.html").read_text()


@pytest.mark.parametrize(("context", "around"), [(0, 0), (1, 0), (1, 1), (2, 2)])
def test_scans_of_networks_that_see_neighbours(context: int, around: int) -> None:
    """What their detectors see is what `detect --denoise-first` shows them, at the ends of a scan, too."""
    torch.manual_seed(0)
    denoiser = HUDenoiser(random_network("small", context=around, channels=4), HUWindow(), context=around).eval()
    detector = build_detector("faster_rcnn_small", context=context, score_threshold=0.0, max_detections=3).eval()
    data = DataConfig(store="none", crop=None, context=context, denoiser_context=around > 0)
    config = replace(RunConfig(data=data), window=HUWindow())
    hu = np.random.default_rng(0).integers(-1000, 400, (5, 64, 64)).astype(np.int16)
    arm = network_arm("denoised", denoiser, {"judge": detector})
    found = _detect(arm, 0, hu, hu, config, torch.device("cpu"), "float32")["judge"]
    denoised = torch.from_numpy(SliceDenoiser(denoiser, "cpu")(hu))
    with torch.inference_mode():
        expected = SliceDetector(detector, HUWindow(), None, torch.device("cpu"), "float32")(stacks(denoised, context))
    assert len(found) == 5
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one["scores"], other["scores"], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(one["boxes"], other["boxes"], rtol=1e-3, atol=0.05)


def test_single_slices_are_no_scans(
    trained_config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Store(trained_config.data.store)
    with StoreWriter(tmp_path / "single", simulation=source.simulation) as writer:
        for index, info in enumerate(source.series):
            values = vars(info) | {"shape": (1, *info.shape[1:])}
            boxes = np.insert(source.boxes(index, 0), 0, 0, axis=1)
            writer.add_series(SeriesInfo(**values), source.read(index, 0)[None], boxes)
    run = trained_config.out
    arguments = ["evaluate", run, "--store", str(tmp_path / "single"), "--scans", "--device", "cpu", "--samples", "2"]
    assert "its test series have one slice each; --scans needs whole scans" in refused(capsys, arguments)
    assert not Path(run, "metrics.json").exists()
