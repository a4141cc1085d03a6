"""Detectors trained on what a denoiser makes: the images that they see, and where they begin."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from lidnet_fast.data.samples import dataset
from lidnet_fast.data.samples.dataset import collate, make_batch
from lidnet_fast.models.detectors import build_detector
from lidnet_fast.models.files import load_detector
from lidnet_fast.trainer.config import RunConfig
from lidnet_fast.trainer.datamodule import split_patches
from lidnet_fast.trainer.phases import DetectorPhase
from lidnet_fast.trainer.run import Run


class Darker(nn.Module):
    def forward(self, windowed: torch.Tensor) -> torch.Tensor:
        return windowed - 0.1


def test_it_sees_what_the_denoiser_makes_of_low_dose(tiny_config: RunConfig) -> None:
    patches = split_patches(tiny_config, "train", "detector")
    batch = make_batch(collate([patches[draw] for draw in range(2)]), torch.device("cpu"))
    detector, window = build_detector("faster_rcnn_small"), tiny_config.window
    seen = DetectorPhase(detector, tiny_config, Darker())._images(batch)
    expected = (window.scale(batch["low_dose"]) - 0.1).clamp(0, 1)
    inside = batch["low_dose"].abs() < 1400  # metal passes unchanged
    torch.testing.assert_close(seen[inside], expected[inside])
    normal = DetectorPhase(detector, tiny_config)._images(batch)
    torch.testing.assert_close(normal, window.scale(batch["normal_dose"]).clamp(0, 1))


def test_normal_dose_costs_no_noise(tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A detector that trains and validates on normal dose asks for no low dose; one on denoised images does."""
    drawn: list[int] = []
    noise = dataset.stack_noise
    monkeypatch.setattr(dataset, "stack_noise", lambda *args: drawn.append(1) or noise(*args))
    run = Run(replace(tiny_config, independent_judge=tiny_config.detector.network))
    run.train_independent_judge()
    run.train_detector()
    assert not drawn
    Run(replace(tiny_config, out=f"{tiny_config.out}_on")).train_detector_on(nn.Identity(), None)
    assert drawn


def test_it_begins_where_it_is_told_to_and_learns(trained_config: RunConfig, tmp_path: Path) -> None:
    begin = Path(trained_config.out) / "detector" / "detector.pt"
    start = load_detector(begin).state_dict()

    def trained(name: str, steps: int) -> dict[str, torch.Tensor]:
        detector = replace(trained_config.detector, steps=steps)
        run = Run(replace(trained_config, out=str(tmp_path / name), detector=detector))
        return run.train_detector_on(nn.Identity(), begin).state_dict()

    untrained, tuned = trained("untrained", 0), trained("tuned", 2)
    assert all(torch.equal(value, start[key]) for key, value in untrained.items())
    assert any(not torch.equal(value, start[key]) for key, value in tuned.items())
