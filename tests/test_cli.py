"""Bad input ends as one line that names what is wrong, exit status 2, and nothing written."""

import argparse
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import yaml

from lidnet_fast.cli import COMMANDS, main
from lidnet_fast.cli.options import SET_BY_MOST_RUNS
from lidnet_fast.data.simulation.dose import DoseSimulation
from lidnet_fast.data.store.reader import SeriesInfo
from lidnet_fast.data.store.writer import StoreWriter


def refused(capsys: pytest.CaptureFixture[str], arguments: Sequence[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1, message
    return message


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert "'trian'" in refused(capsys, ["trian"])


def test_no_command_shows_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2
    assert "prepare" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["info", "train --help all"])
def test_a_reader_who_has_seen_enough_ends_the_command_quietly(command: str) -> None:
    line = f"import sys; from lidnet_fast.cli import main; main({command.split()})"
    process = subprocess.Popen([sys.executable, "-c", line], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout and process.stderr
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() in (0, 141)  # argparse counts what it could not print as printed


def parser_of(command: str, monkeypatch: pytest.MonkeyPatch) -> argparse.ArgumentParser:
    """What `--help all` would print the help of."""
    parsers: list[argparse.ArgumentParser] = []
    monkeypatch.setattr(argparse.ArgumentParser, "print_help", lambda self: parsers.append(self))
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help", "all"])
    return parsers[0]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_described(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not [action.dest for action in parser_of(command, monkeypatch)._actions if not action.help]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_ended_by_sigterm_as_by_ctrl_c(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setitem(COMMANDS, command, lambda _: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit, match="130"):
        main([command])
    assert capsys.readouterr().err == "lidnet-fast: interrupted; the same command resumes from what is finished\n"
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_run_demands_no_option(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not [action.dest for action in parser_of("train", monkeypatch)._actions if action.required]


def test_help_of_a_run_is_short_unless_all_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    shown = {}
    for words in ("--help", "--help all"):
        with pytest.raises(SystemExit, match="0"):
            main(["bench", *words.split()])
        shown[words] = set(re.findall(r"^  (--[\w.]+)", text := capsys.readouterr().out, re.M))
        assert text.index("Everything a run depends on") < text.index("The joint objective of a denoiser step")
        assert "default: faster_rcnn_resnet18_fpn)" in " ".join(text.split())
    assert {f"--{name}" for name in SET_BY_MOST_RUNS} | {"--config", "--seconds"} <= shown["--help"]
    assert shown["--help"] < shown["--help all"]
    assert len(shown["--help"]) < 35
    assert "bad" in refused(capsys, ["train", "--help", "bad"])


def test_unknown_config_key(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"collaborate": {"objective": {"lambda_roi": 1.0}}}))
    message = refused(capsys, ["train", "--config", str(config)])
    assert "lambda_roi" in message
    assert "config.yaml" in message


def test_unknown_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--colaborate.steps" in refused(capsys, ["train", "--colaborate.steps", "3"])


def test_options_are_written_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--split" in refused(capsys, ["prepare", "folder", "--out", "store", "--split", "splits.csv"])


def test_value_of_the_wrong_type(capsys: pytest.CaptureFixture[str]) -> None:
    assert "many" in refused(capsys, ["train", "--collaborate.steps", "many"])


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--data.crop", "0", "data.crop must be at least 1, got 0"),
        (
            "--collaborate.objective.detection",
            "-1",
            "collaborate.objective.detection must be finite and not negative, got -1",
        ),
        ("--data.positive_fraction", "1.5", "data.positive_fraction must lie in [0, 1], got 1.5"),
        ("--window.low", "500", "window.low must be below high, got low=500.0 and high=400.0"),
        ("--ops", "cudnn", "Got value: cudnn"),
        ("--balance", "nash", "Got value: nash"),
        (
            "--collaborate.objective.detection",
            ".nan",
            "collaborate.objective.detection must be finite and not negative",
        ),
        ("--data.store", "", "data.store is empty"),
        ("--data.store", "/nowhere/store", "/nowhere/store"),
    ],
)
def test_value_that_cannot_work(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, option: str, value: str, expected: str
) -> None:
    out = tmp_path / "run"
    arguments = ["--data.store", str(tmp_path), "--out", str(out), option, value]
    assert expected in refused(capsys, ["train", *arguments])
    assert not out.exists()


@pytest.mark.parametrize("key", ["data", "checkpoint_every", "collaborate.objective", "window.low", "denoiser.name"])
def test_null_where_it_means_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path, key: str) -> None:
    value: dict | None = None
    for name in reversed(key.split(".")):
        value = {name: value}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(value))
    message = refused(capsys, ["train", "--config", str(tmp_path / "config.yaml")])
    assert key.split(".")[0] in message


@pytest.mark.parametrize("value", ["[]", "{}"])
def test_something_else_than_a_group(capsys: pytest.CaptureFixture[str], tmp_path: Path, value: str) -> None:
    (tmp_path / "config.yaml").write_text(f"data: {value}")
    assert "data" in refused(capsys, ["train", "--config", str(tmp_path / "config.yaml")])


def test_config_file_that_is_not_text(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(b"\x80seed: 1")
    assert "config.yaml: 'utf-8' codec can't decode" in refused(
        capsys, ["train", "--config", str(tmp_path / "config.yaml")]
    )


def test_config_file_that_does_not_exist(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "missing.yaml" in refused(capsys, ["train", "--config", str(tmp_path / "missing.yaml")])


def test_evaluate_a_folder_that_is_no_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "not the folder of a run" in refused(capsys, ["evaluate", str(tmp_path)])


def test_info_of_an_extractor(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    main(["info", "--extractor", "vgg11:relu2_1,features.7"])
    text = capsys.readouterr().out
    assert "vgg11 relu2_1 (features.4)\n" in text
    assert "receptive field  8 x 8 pixels" in text
    assert "400 slices of LIDC-IDRI" in text
    assert re.search(r"expected cost    \d.\d% of whole images", text)
    boxes = tmp_path / "boxes.csv"
    boxes.write_text("series_uid,slice,x1,y1,x2,y2\n1.2,4,3,4,250,251\n1.2,5,10,10,20,20\n")
    main(["info", "--extractor", "resnet18:layer1", "--boxes", str(boxes), "--image-size", "256"])
    text = capsys.readouterr().out
    assert f"windows on 256 x 256, around lesions of 2 slices of {boxes}, median side 128.5 pixels" in text
    assert "planned whole    2 of 4 images" in text


@pytest.mark.parametrize("command", ["prepare", "assess", "evaluate", "denoise"])
def test_help_shows_no_default_that_is_no_value(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert not re.search(r"default: (null|False|\[\]|\))", text)
    if command in ("prepare", "assess"):
        assert f"{DoseSimulation.photons:g} (type: float)" in text


def test_help_of_a_run_shows_the_defaults_that_are_values(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help", "all"])
    text = " ".join(capsys.readouterr().out.split())
    assert "was copied to. (type: str) " in text
    assert "without any they are random, which `train` warns of. (type: str | null, default: null)" in text
    assert "minutes at the start of every phase. (type: bool, default: False)" in text


def test_info_lists_an_extractors_layers(capsys: pytest.CaptureFixture[str]) -> None:
    main(["info", "--extractor", "vgg11"])
    title, *lines = capsys.readouterr().out.splitlines()
    assert title == f"vgg11: {len(lines)} layers, other names in parentheses; --extractor vgg11:conv1_1 describes one"
    assert {"  conv1_1 (features.0)", "  relu3_2 (features.9)", "  pool5 (features, features.20)"} <= set(lines)
    assert "  classifier (classifier.6)" in lines
    assert not {"  features.9", "  x"} & set(lines)
    names = re.findall(r"[\w.]+", " ".join(lines))
    assert len(names) == len(set(names))


def test_info_of_an_extractor_on_fields_of_view(capsys: pytest.CaptureFixture[str]) -> None:
    """LIDC-IDRI's boxes are in slices of 512 x 512; smaller images are parts of them, around a lesion."""
    main(["info", "--extractor", "vgg19:relu3_4", "--image-size", "64"])
    (cost,) = re.findall(r"expected cost +([\d.]+)% of whole images", capsys.readouterr().out)
    assert float(cost) > 95


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--extractor", "vgg19:"], "--extractor must be NETWORK:LAYERS"),
        (["--extractor", "vgg99"], "torchvision has no network 'vgg99'; near it are vgg11"),
        (["--extractor", "vgg99:relu1_1"], "torchvision has no network 'vgg99'; near it are vgg11"),
        (["--extractor", "vgg11:relu9_1"], "has no layer 'relu9_1'"),
        (["--extractor", "resnet18:avgpool"], "AdaptiveAvgPool2d pools over the whole image"),
        (["--extractor", "vgg11:relu3_1", "--image-size", "3"], "images of 3 pixels along an axis are too small"),
        (["--extractor", "resnet18:layer1", "--boxes", "nowhere.csv"], "nowhere.csv: there is no such file"),
    ],
)
def test_bad_extractors(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["info", *arguments])
    assert message in capsys.readouterr().err


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    main(["info"])
    out = capsys.readouterr().out
    assert "lidnet_fast 0.1.0" in out
    assert "ops: " in out


def test_prepare_a_folder_without_ct(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    source, store = tmp_path / "documents", tmp_path / "store"
    source.mkdir()
    (source / "notes.txt").write_text("no images here")
    assert str(source) in refused(capsys, ["prepare", str(source), "--out", str(store)])
    assert not store.exists()


def test_train_on_a_store_of_another_version(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.mkdir()
    (store / "store.json").write_text('{"format": "lidnet_fast-store", "version": 99}')
    arguments = ["--data.store", str(store), "--out", str(tmp_path / "run"), "--device", "cpu"]
    message = refused(capsys, ["train", *arguments, "--detector.name", "faster_rcnn_small"])
    assert "99" in message
    assert str(store) in message


def test_train_an_unknown_network(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    store = tmp_path / "store"
    with StoreWriter(store, simulation=DoseSimulation().to_dict()) as writer:
        for split in ("train", "val", "test"):
            volume = np.zeros((1, 256, 256), np.int16)
            geometry = {"spacing": (1, 1, 1), "origin": (0, 0, 0), "orientation": (1, 0, 0, 0, 1, 0)}
            info = SeriesInfo(split, split, split, shape=volume.shape, **geometry)
            writer.add_series(info, volume, np.array([[0, 8, 8, 16, 16]]))
    arguments = ["--data.store", str(store), "--out", str(tmp_path / "run"), "--detector.name", "faster_rcn_small"]
    message = refused(capsys, ["train", *arguments])
    assert "faster_rcn_small" in message
    assert "faster_rcnn_small" in message
    assert not (tmp_path / "run").exists()
