"""Damaged arguments and configurations end with exit status 0 or 2 and at most one line on stderr."""

import contextlib
import io
import os
import tempfile
from pathlib import Path
from unittest import mock

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lidnet_fast import cli
from lidnet_fast.trainer.config import RunConfig, check_available, to_dict
from tests.fuzz.hostile import NUMBERS, damaged, limits

CONFIG = yaml.safe_dump(to_dict(RunConfig()))
OPTIONS = [
    *("--config", "--out", "--seed", "--ops", "--balance", "--precision", "--compile", "--data.crop", "--data.store"),
    *("--data", "--data.workers", "--window", "--window.low", "--denoiser", "--denoiser.name", "--denoiser.options"),
    *("--collaborate.objective.pixel", "--collaborate.steps", "--detector", "--independent_judge", "--seeds"),
    *("--quick", "--seconds", "--help", "--version", "--print_config", "--samples", "--images", "--store", "--split"),
    *("--format", "--boxes", "--splits", "--simulate-dose", "--workers", "--extractor", "--image-size", "--", "-h"),
]
WORDS = st.sampled_from(NUMBERS) | st.text(max_size=6) | st.sampled_from(
    ["null", "{}", "[]", "{a: 1}", "true", "/nowhere", ".", "vgg19:relu3_4", "a=b", "unet", "upgrad", "N=/", "\n"]
)  # fmt: skip
TRAINING = {
    "lidnet_fast.trainer.run.train": lambda config: check_available(config) or mock.MagicMock(),
    "lidnet_fast.trainer.bench.bench": lambda config, seconds: check_available(config),
    "lidnet_fast.comparison.compare.compare": lambda comparison, out, **options: None,
    "lidnet_fast.info.describe_extractor": lambda *arguments: "",
    "lidnet_fast.runtime.keep_freed_memory": lambda: None,
}


@pytest.fixture(scope="module", autouse=True)
def _no_training():
    with contextlib.ExitStack() as stack:
        for name, stub in TRAINING.items():
            stack.enter_context(mock.patch(name, stub))
        yield


def check(arguments):
    """Run the command line in an empty folder."""
    output, errors, before = io.StringIO(), io.StringIO(), Path.cwd()
    status = 0
    with tempfile.TemporaryDirectory() as folder, limits():
        os.chdir(folder)
        try:
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
                cli.main(arguments)
        except SystemExit as stop:
            status = stop.code or 0
        finally:
            os.chdir(before)
    assert status in (0, 2), (status, errors.getvalue())
    assert "Traceback" not in errors.getvalue()
    if status == 2 and arguments and arguments[0] != "info":
        assert errors.getvalue().count("\n") == 1 or (not arguments[0] and not errors.getvalue()), errors.getvalue()


@given(
    command=st.sampled_from([*cli.COMMANDS, *cli.COMMANDS, "", "trian", "--version"]),
    rest=st.lists(st.tuples(st.sampled_from(OPTIONS), WORDS) | st.tuples(WORDS), max_size=4),
)
def test_arguments(command, rest):
    check([command, *(word for words in rest for word in words)])


@st.composite
def changed_config(draw):
    """The default configuration with some values, keys or bytes replaced."""
    values = yaml.safe_load(CONFIG)
    for _ in range(draw(st.integers(1, 3))):
        place = values
        while True:
            key = draw(st.sampled_from(sorted(place)))
            if not (isinstance(place[key], dict) and place[key] and draw(st.integers(0, 5))):
                break
            place = place[key]
        number = st.sampled_from([None, True, -1, 0, 1, 10**30, 10**400, 1e308, float("nan"), float("inf"), -1e-320])
        place[key] = draw(
            number | st.text(max_size=5) | st.sampled_from([[], {}, [1], {"mse": "x"}, {1: 2}, "x.Y", "os.system"])
        )
    content = yaml.safe_dump(values).encode("utf-8", "surrogatepass")
    return draw(st.just(content) | damaged(content))


@given(content=changed_config(), command=st.sampled_from(["train", "bench", "demo"]))
def test_configurations(content, command):
    with tempfile.NamedTemporaryFile(suffix=".yaml") as file:
        Path(file.name).write_bytes(content)
        check([command, "--config", file.name, "--data.store", "/tmp"])
