"""What can't work is said before the run begins."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lidnet_fast.errors import InputError
from lidnet_fast.trainer.config import RunConfig
from lidnet_fast.trainer.run import Run


def with_value(config: Any, key: str, value: object) -> Any:
    first, _, rest = key.partition(".")
    return replace(config, **{first: with_value(getattr(config, first), rest, value) if rest else value})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("detector_phase.clip_norm", 0.0, "detector_phase.clip_norm must be finite and above 0, got 0"),
        ("denoiser_phase.clip_norm", -1.0, "denoiser_phase.clip_norm must be finite and above 0, got -1"),
        ("collaborate.detector_clip_norm", float("nan"), "detector_clip_norm must be finite and above 0, got nan"),
        ("collaborate.objective.roi_weight", 0.0, "objective.roi_weight must be finite and above 0, got 0"),
        ("collaborate.objective.grow", -1.0, "objective.grow must be finite and not negative, got -1"),
        ("collaborate.objective.proposals_per_image", -2, "proposals_per_image must be .* not negative, got -2"),
        ("collaborate.objective.pixel", {}, "objective.pixel: weights must name at least one term"),
        ("collaborate.objective.pixel", {"psnr": 1.0}, "objective.pixel: a term of weights .*got 'psnr'"),
        ("collaborate.objective.pixel", {"mse": float("inf")}, r"objective.pixel: weights\['mse'\] .*got inf"),
        ("collaborate.objective.pixel", {"ms_ssim": 1.0}, "data.crop must be at least 161 for .*'ms_ssim' .*got 64"),
    ],
)
def test_bad_values(tiny_config: RunConfig, key: str, value: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Run(with_value(tiny_config, key, value))
    assert not Path(tiny_config.out).exists()


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
