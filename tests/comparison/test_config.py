"""What a comparison refuses, in one line, before it makes anything."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lidnet_fast import cli
from lidnet_fast.comparison.config import built_in_arms, demo_of
from lidnet_fast.trainer.config import RunConfig, overridden


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--arms", "{mse: , lidnit: }"], "unknown arm 'lidnit'; did you mean 'lidnet'?"),
        (["--arms", "{mse: }"], "arms: at least two are needed"),
        (["--arms", "{mse: , mine: {denoiser: {steps: 3}}}"], "arm 'mine' sets denoiser"),
        (["--arms", "{mse: , mine: {detector: {steps: 3}}}"], "arm 'mine': its detector may have a name and options"),
        (["--arms", "{mse: , mine: {detector: {name: retinanet}}}"], "arm 'mine': unknown detector 'retinanet'"),
        (["--arms", "{mse: , mine: {collaborate: {objective: {roi_wait: 3}}}}"], "arm 'mine': "),
        (["--arms", "{mse: , mine: {collaborate: {objective: {roi_weight: -3}}}}"], "arm 'mine': "),
        (["--arms", "{mse: , a/b: {}}"], "arms: 'a/b' becomes a folder's name"),
        (["--study", "lung"], "unknown study 'lung'"),
        (["--seeds", "0", "100"], "seeds [0, 100] mix test with development"),
        (["--denoisers", "{unit: }"], "unknown denoiser 'unit'; did you mean 'unet'?"),
        (["--denoisers", "{small: {options: {chanels: 8}}}"], "denoiser 'small'"),
        (["--denoisers", "{my.Net: }"], "can't import module 'my'"),
        (["--judges", "{one: {name: retinanet_smal}}"], "unknown detector 'retinanet_smal'"),
        (
            ["--judges", "{one: {name: retinanet_small}, two: {name: retinanet_small}}"],
            "judges one and two are the same network",
        ),
        (["--judges", "{cotrained: {name: retinanet_small}}"], "the name 'cotrained' is taken"),
        (["--seeds", "[0, 100]"], "mix test with development"),
        (["--seeds", "[1, 1]"], "seeds must be different numbers"),
        (["--seeds", "[]"], "seeds must be different numbers"),
        (["--seed", "3"], "seed is set: a comparison has seeds instead"),
        (["--stores", "{}"], "nothing to compare on"),
        (["--stores", "{gone: /nowhere}"], "store 'gone': data.store: there is no folder /nowhere"),
        (["--devices", "2"], "devices and num_nodes must be 1"),
        (["--cells", "3/2"], "--cells 3/2"),
        (["--cells", "half"], "--cells half"),
        (["--cells", "1/2", "--collect"], "--cells excludes --collect and --assess"),
        (["--collect"], "so there are no cells to collect"),
    ],
)
def test_refused(
    options: list[str], words: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as stop:
        cli.main(["compare", "--config", str(config), "--out", str(out), *options])
    said = capsys.readouterr()
    assert stop.value.code == 2
    assert words in said.err
    assert said.err.count("\n") == 1
    assert not out.exists()


def test_a_store_without_test_lesions_is_refused(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lidnet_fast.data.phantoms.chest import ChestPhantom
    from lidnet_fast.data.phantoms.study import Study, make_study

    phantom = ChestPhantom(image_size=128, slices=1, lesions_per_slice=(2, 2))
    make_study(tmp_path / "store", Study(patients=(("train", 1), ("val", 1)), phantom=phantom), seed=0, workers=1)
    with pytest.raises(SystemExit) as stop:
        cli.main(["compare", "--config", str(config), "--stores", f"{{mine: {tmp_path / 'store'}}}"])
    assert stop.value.code == 2
    assert "store 'mine'" in capsys.readouterr().err


def test_a_folder_of_something_else_is_refused(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(SystemExit) as stop:
        cli.main(["compare", "--config", str(config), "--out", str(tmp_path / "mine")])
    assert stop.value.code == 2
    assert "is not empty and holds no comparison" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("there", "said"),
    [
        (
            {"tables": [{"store": store} for store in ("chest", "liver", "head")]},
            "its results have tables of chest and this call's don't; tables of head and this call's don't. To fix: "
            "choose another --out, name these too, or make tables without them by --collect",
        ),
        ({"arms": {}}, "would be replaced, and doesn't say what it is of"),
    ],
)
def test_tables_of_other_studies_are_not_replaced(
    there: dict, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`compare --study liver` in the folder of `compare --study chest` left only its own tables."""
    (tmp_path / "compare.yaml").write_text("precision: float32\n")
    (tmp_path / "metrics.json").write_text(json.dumps(there))
    with pytest.raises(SystemExit, match="2"):
        cli.main(["compare", "--study", "liver", "--device", "cpu", "--out", str(tmp_path)])
    assert said in capsys.readouterr().err
    assert (tmp_path / "compare.yaml").read_text() == "precision: float32\n"


def test_a_gpu_that_is_not_there_is_said_before_a_folder_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        cli.main(["compare", "--study", "chest", "--device", "cuda", "--out", str(tmp_path / "out")])
    assert "PyTorch finds no GPU. To fix: give --device cpu, or auto" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_arms_share_the_pixel_terms_and_controls_have_nothing_of_the_detector() -> None:
    config = RunConfig()
    for name, changes in built_in_arms().items():
        objective = overridden(config, changes).collaborate.objective
        assert objective.pixel == config.collaborate.objective.pixel
        assert (objective.detection > 0) == (name == "lidnet")
        assert (objective.perceptual > 0) == (name == "whole-map")
        assert (objective.roi_weight > 1) == (name in ("lesion-weighted", "lidnet"))
    assert overridden(config, built_in_arms()["lidnet"]) == config


def test_the_experiments_configuration_is_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = Path(__file__).parents[2] / "configs" / "compare.yaml"
    with pytest.raises(SystemExit):
        cli.main(["compare", "--config", str(config), "--out", str(tmp_path / "out"), "--collect"])
    assert "so there are no cells to collect" in capsys.readouterr().err  # what is said once all else is checked


def test_the_demo_is_a_comparison_of_the_chest_study() -> None:
    run = replace(RunConfig(), seed=3)
    whole, quick = demo_of(run, 2), demo_of(run, 1, quick=True)
    assert (whole.names, whole.matrix.seeds, whole.split) == (["chest"], [3, 4], "test")
    assert whole.arms == ["mse", "whole-map", "lesion-weighted", "lidnet"]
    assert quick.arms == ["mse", "lidnet"]
    assert quick.run.evaluation.samples == run.evaluation.samples // 2
