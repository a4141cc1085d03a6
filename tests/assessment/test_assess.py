import json
import re

import numpy as np
import pytest

from lidnet_fast.assessment.options import AssessOptions
from lidnet_fast.cli import main
from lidnet_fast.data.simulation.dose import DoseSimulation
from lidnet_fast.data.store.index import SeriesInfo
from lidnet_fast.data.store.writer import StoreWriter
from lidnet_fast.errors import InputError
from tests.assessment.test_arms import MINE
from tests.data.lesions.test_insertion import chest

SMALL = ["--realisations", "10", "--diameters", "5", "8", "--contrasts", "60", "--edges", "400", "--device", "cpu"]
SMALL += ["--cases", "2", "--case-realisations", "1", "--doses", "0.25"]


def run(folder, *arguments):
    main(["assess", "--out", str(folder / "out"), *SMALL, *arguments])
    return json.loads((folder / "out/assess.json").read_text())


@pytest.fixture(scope="module")
def assessed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("assess")
    (folder / "my_denoisers.py").write_text(MINE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return folder / "out", run(folder, "--model", "my_denoisers:half", "--model", "copy=my_denoisers:same")


def test_results(assessed):
    out, content = assessed
    assert list(content["arms"]) == ["low dose", "half", "copy"]
    assert list(content["uniform"]["half"]) == ["0.25"]
    assert list(content["uniform"]["low dose"]) == ["0.0625", "0.25", "1"]
    for part in ("noise", "resolution", "detectability", "bias"):
        assert content["uniform"]["copy"]["0.25"][part] == content["uniform"]["low dose"]["0.25"][part]
    assert content["lesions"]["copy"] == content["lesions"]["low dose"]
    assert content["equal_detectability_dose"]["copy"]["0.25"]["npw"] == pytest.approx(0.25)
    assert content["equal_detectability_dose"]["half"]["0.25"]["gabor"] == pytest.approx(0.25)
    retained = [lesion["retained"] for lesion in content["lesions"]["half"]["0.25"]["lesions"]]
    assert retained == pytest.approx([0.5] * len(retained), abs=1e-3)
    spectra = np.load(out / "noise_power.npz")
    assert spectra["half, dose 0.25"] == pytest.approx(spectra["low dose, dose 0.25"] / 4, rel=1e-3, abs=1e-2)


def test_the_report_shows_them(assessed):
    page = (assessed[0] / "assess.html").read_text()
    for title in (
        "Noise power spectrum, dose 0.25",
        "Task transfer function, 400 HU",
        "Dose at equal detectability",
        "Survival of lesions against size",
        "Most erased: phantom",
        "worth a dose of",
        "case by case",
    ):
        assert title in page
    cases = {lesion["case"] for lesion in assessed[1]["lesions"]["half"]["0.25"]["lesions"]}
    assert len(re.findall(r'alt="half, \d+\. phantom', page)) == len(cases)


def write_store(path, simulation):
    with StoreWriter(path, simulation=simulation) as writer:
        for number, split in enumerate(("train", "test")):
            geometry = {"spacing": (2.5, 0.8, 0.8), "origin": (0, 0, 0), "orientation": (1, 0, 0, 0, 1, 0)}
            noise = np.random.default_rng(number).normal(0, 12, (4, 128, 128))
            volume = (chest(4) + noise).round().astype(np.int16)
            info = SeriesInfo(f"1.2.{number}", f"p{number}", split, shape=volume.shape, **geometry)
            writer.add_series(info, volume, np.zeros((0, 5)))


def test_lesions_of_the_users_own_contrasts(tmp_path, monkeypatch):
    (tmp_path / "my_denoisers.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    content = run(tmp_path, "--model", "my_denoisers:half", "--lesion-contrasts", "-60", "-20")
    lesions = content["lesions"]["half"]["0.25"]["lesions"]
    assert {lesion["contrast_hu"] for lesion in lesions} == {-60, -20}
    assert {lesion["tissue"] for lesion in lesions} == {"soft tissue"}
    assert [lesion["retained"] for lesion in lesions] == pytest.approx([0.5] * len(lesions), abs=1e-3)


def test_a_users_own_ct(tmp_path, monkeypatch):
    (tmp_path / "my_denoisers.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    write_store(tmp_path / "store", DoseSimulation(photons=3e5).to_dict())
    content = run(tmp_path, "--model", "my_denoisers:half", "--store", "store", "--doses", "0.25", "1")
    assert content["options"]["photons"] == 3e5
    lesions = content["lesions"]["half"]["0.25"]["lesions"]
    assert {lesion["case"].split(",")[0] for lesion in lesions} == {"series 1.2.1"}  # of the test split
    assert list(content["lesions"]["half"]) == ["0.25"]  # the images are the scan at 1
    low = content["lesions"]["low dose"]["0.25"]
    assert low["survival"][0] == 1 and low["bright"][1] < 0.05


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "assess needs at least one --model"),
        (
            ["--model", "my_denoisers:same", "--realisations", "9"],
            "9 are too few for the 16 Gabor channels",
        ),
        (["--model", "my_denoisers:same", "--diameters", "50"], "larger than the signals' field"),
        (["--model", "my_denoisers:same", "--doses", "1.5"], "doses must be in (0, 1], got 1.5"),
        (["--model", "my_denoisers:same", "--doses", "0.5", "0.5"], "doses must be different finite numbers"),
        (["--model", "my_denoisers:crop"], "'crop' must keep the images' shape [8, 1, 256, 256], got [8, 1, 256, 255]"),
        (["--model", "my_denoisers:same", "--pixel-spacing", "0"], "pixel_spacing must be positive"),
        (["--model", "my_denoisers:same", "--store", "nowhere"], "nowhere: isn't a store"),
        (["--model", "my_denoisers:same", "--store", "store", "--doses", "1"], "give a dose below 1"),
        (["--model", "my_denoisers:same", "--store", "air"], "no room for a lesion of 5 mm"),
        (["--model", "my_denoisers:same", "--false-alarm-rate", "0.01"], "cases are too few. To fix: give more cases"),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, arguments, said):
    (tmp_path / "my_denoisers.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    write_store(tmp_path / "store", None)
    with StoreWriter(tmp_path / "air") as writer:
        geometry = {"spacing": (2.5, 0.8, 0.8), "origin": (0, 0, 0), "orientation": (1, 0, 0, 0, 1, 0)}
        info = SeriesInfo("1.2.9", "p", "test", shape=(1, 64, 64), **geometry)
        writer.add_series(info, np.full((1, 64, 64), -1000, np.int16), np.zeros((0, 5)))
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path, *arguments)
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("values", [{"cases": -1}, {"batch_size": 0}, {"contrasts": (0.0,)}, {"photons": 0.0}])
def test_impossible_options(values):
    with pytest.raises(InputError, match=next(iter(values)).split("_")[0]):
        AssessOptions(**values)


def test_images_of_another_tool(tmp_path, monkeypatch, capsys):
    """What the tool leaves as it is comes back as the low dose, rounded to whole HU."""
    monkeypatch.chdir(tmp_path)
    main(["assess", "--export", "scans", *SMALL])
    assert "scans: 7 volumes to denoise" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "scans").iterdir()) == [
        *(f"dose0.25_case{n}_{twin}.nii.gz" for n in (1, 2) for twin in ("with", "without")),
        *(f"dose0.25_{name}.nii.gz" for name in ("discs1", "signals1", "water")),
    ]
    content = run(tmp_path, "--images", "mine=scans")
    low, mine = (content["uniform"][name]["0.25"] for name in ("low dose", "mine"))
    assert mine["noise"]["magnitude_hu"] == pytest.approx(low["noise"]["magnitude_hu"], rel=1e-3)
    for one, other in zip(mine["detectability"], low["detectability"], strict=True):
        assert one["dprime"][0] == pytest.approx(other["dprime"][0], rel=0.05, abs=0.05)
    assert content["lesions"]["mine"]["0.25"]["survival"][0] == 1
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path, "--images", "mine=scans", "--seed", "1")
    assert "its results have options seed 0 and this call's have 1" in capsys.readouterr().err

    with pytest.raises(SystemExit, match="2"):
        main(["assess", "--export", "scans", *SMALL])
    assert "scans: exists already" in capsys.readouterr().err
    for arguments, said in (
        (["--images", "mine=scans", "--doses", "0.5"], "has no volume dose0.5_water"),
        (
            ["--images", "mine=scans", "--realisations", "12"],
            "size is [10, 256, 256], that of the scan [12, 256, 256]",
        ),
        (["--images", "mine=nowhere"], "--images mine=nowhere: there is no such folder"),
        (["--images", "mine=scans", "--images", "mine=scans"], "the name 'mine' is taken"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(["assess", "--out", "other", *SMALL, *arguments])
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line
    assert not (tmp_path / "other").exists()
