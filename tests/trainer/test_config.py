"""What can't work is said before the run begins."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonargparse import ArgumentParser

from lidnet_fast import cli
from lidnet_fast.errors import InputError
from lidnet_fast.evaluation.evaluate import read_config
from lidnet_fast.trainer.config import RunConfig, from_options, to_dict
from lidnet_fast.trainer.run import Run


def with_value(config: Any, key: str, value: object) -> Any:
    first, _, rest = key.partition(".")
    return replace(config, **{first: with_value(getattr(config, first), rest, value) if rest else value})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("detector.clip_norm", 0.0, "KEY must be finite and above 0, got 0"),
        ("denoiser.clip_norm", -1.0, "KEY must be finite and above 0, got -1"),
        ("collaborate.detector_clip_norm", float("nan"), "KEY must be finite and above 0, got nan"),
        ("collaborate.objective.roi_weight", 0.0, "KEY must be finite and above 0, got 0"),
        ("collaborate.objective.grow", -1.0, "KEY must be finite and not negative, got -1"),
        ("collaborate.objective.proposals_per_image", -2, "KEY must be .* not negative, got -2"),
        ("collaborate.objective.pixel", {}, "KEY: weights must name at least one term"),
        ("collaborate.objective.pixel", {"psnr": 1.0}, "KEY: a term of weights .*got 'psnr'"),
        ("collaborate.objective.pixel", {"mse": float("inf")}, r"KEY: weights\['mse'\] .*got inf"),
        ("collaborate.objective.pixel", {"ms_ssim": 1.0}, "data.crop must be at least 161 for .*'ms_ssim' .*got 64"),
    ],
)
def test_bad_values(tiny_config: RunConfig, key: str, value: object, message: str) -> None:
    """In Python the message names the argument; among options and in files the whole key."""
    with pytest.raises(InputError, match=message.replace("KEY", key.rpartition(".")[2])):
        with_value(tiny_config, key, value)
    with pytest.raises(InputError, match=f"configuration key {message.replace('KEY', key)}"):
        parsed(tiny_config, {key: value})


def parsed(config: RunConfig, changes: dict[str, Any]) -> RunConfig:
    """The configuration as a file with these keys instead makes it."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(RunConfig)
    values = to_dict(config)
    for key, value in changes.items():
        place = values
        *groups, name = key.split(".")
        for group in groups:
            place = place[group]
        place[name] = value
    return from_options(parser.parse_object(values))


def test_names_of_earlier_versions_in_a_stored_configuration(tiny_config: RunConfig, tmp_path: Path) -> None:
    """What the version before wrote is read as today's configuration, and its run may be resumed."""
    old = to_dict(tiny_config)
    old["accelerator"], old["precision"] = old.pop("device"), "32-true"
    for phase in ("denoiser", "detector"):
        whole = old.pop(phase)
        old[phase] = {key: whole.pop(key) for key in ("name", "options")}
        old[f"{phase}_phase"] = whole
    old["collaborate"]["cache_mb"] = old["collaborate"].pop("cache_mib")
    old["data"]["noise_map_cache_mb"] = old["data"].pop("noise_map_cache_mib")
    Path(tiny_config.out).mkdir()
    stored = Path(tiny_config.out) / "config.yaml"
    stored.write_text(yaml.safe_dump(old))
    assert read_config(stored) == tiny_config
    assert Run(tiny_config).config == tiny_config


@pytest.mark.parametrize(
    ("arguments", "today"),
    [
        (["--accelerator", "cpu"], "accelerator is now device"),
        (["--detector_phase.steps", "3"], "detector_phase is now detector"),
        (["--denoiser_phase.clip_norm", "3"], "denoiser_phase is now denoiser"),
        (["--collaborate.cache_mb", "3"], "collaborate.cache_mb is now collaborate.cache_mib"),
        (["--data.noise_map_cache_mb", "3"], "data.noise_map_cache_mb is now data.noise_map_cache_mib"),
        (["--precision", "bf16-mixed"], "precision bf16-mixed is now bfloat16"),
        (["--precision", "32-true"], "precision 32-true is now float32"),
        (["--device", "gpu"], "device gpu is now cuda"),
    ],
)
def test_names_of_earlier_versions_from_a_user(
    arguments: list[str], today: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = arguments[0].removeprefix("--")
    tree: Any = yaml.safe_load(arguments[1])
    for name in reversed(key.split(".")):
        tree = {name: tree}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(tree))
    for given in (arguments, ["--config", str(tmp_path / "mine.yaml")]):
        with pytest.raises(SystemExit, match="2"):
            cli.main(["train", *given])
        message = capsys.readouterr().err
        assert message.endswith(f"{today}\n"), message
        assert message.count("\n") == 1


@pytest.mark.parametrize(
    ("extractor", "weights", "message"),
    [
        ("vgg11", None, "extractor 'vgg11', weights None: must be NETWORK:LAYERS"),
        ("vgg11:relu9_1", None, "extractor 'vgg11:relu9_1', .*has no layer 'relu9_1'"),
        ("vgg11:relu2_1", "NEWEST", "vgg11 has no weights 'NEWEST'"),
        ("vgg11:relu2_1", "nowhere/vgg.pt", "weights 'nowhere/vgg.pt': .*No such file"),
        ("vgg11:classifier.0", None, "'vgg11:classifier.0' can't be used on images of 64 x 64 pixels: .*features"),
        ("vgg11:relu5_2,pool5", None, "'vgg11:relu5_2,pool5' can't be used on images of 16 x 16 pixels: .*too small"),
    ],
)
def test_bad_extractors(tiny_config: RunConfig, extractor: str, weights: str | None, message: str) -> None:
    objective = replace(
        tiny_config.collaborate.objective, roi_extractor=0.1, extractor=extractor, extractor_weights=weights
    )
    config = with_value(tiny_config, "collaborate.objective", objective)
    if "16 x 16" in message:
        config = with_value(config, "data.crop", 16)
    with pytest.raises(InputError, match=message):
        Run(config)


def test_weights_of_an_extractor_are_not_fetched_before_they_are_needed(
    tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(*_: object, **__: object) -> None:
        raise AssertionError("fetched")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fetch)
    objective = replace(
        tiny_config.collaborate.objective,
        roi_extractor=0.1,
        extractor="vgg11:relu2_1",
        extractor_weights="DEFAULT",
    )
    assert Run(with_value(tiny_config, "collaborate.objective", objective)).config.collaborate.objective == objective
