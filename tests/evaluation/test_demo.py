"""The demo on a tiny study: every file it promises, and its statistics."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from lidnet_fast.data.phantoms.study import Study
from lidnet_fast.evaluation.demo import controls, interval, paired_gains, run_demo
from lidnet_fast.models.registry import NetworkConfig
from lidnet_fast.trainer.config import ObjectiveConfig, RunConfig


@pytest.mark.slow
def test_demo_writes_what_it_promises_and_goes_on_where_it_stopped(tiny_config: RunConfig, tiny_study: Study) -> None:
    config = replace(tiny_config, independent_judge=NetworkConfig("retinanet_small"))
    rows = run_demo(config, tiny_study, seeds=2)
    assert list(rows) == ["low dose", "MSE", "whole-map perceptual", "lesion-weighted MSE", "LIDnet", "normal dose"]
    out = Path(config.out)
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["arms"]["MSE"]["psnr"][1] < metrics["arms"]["MSE"]["psnr"][2]
    assert metrics["arms"]["LIDnet"]["cotrained_ap50"] is not None
    assert set(metrics["gain_of_lidnet"]) == set(rows) - {"LIDnet"}
    assert metrics["cost"]["LIDnet"]["seconds"] > 0
    report = (out / "report.html").read_text()
    assert all(name in report for name in rows)
    for seed in (0, 1):
        assert (out / f"seed{seed}" / "config.yaml").exists()
        assert (out / f"seed{seed}" / "arms" / "LIDnet" / "denoiser.pt").exists()

    again = run_demo(config, tiny_study, seeds=2)
    assert again == rows


def test_controls_share_the_pixel_terms() -> None:
    lidnet = ObjectiveConfig()
    arms = controls(lidnet, quick=False)
    assert arms["LIDnet"] is lidnet
    for name, objective in arms.items():
        assert objective.pixel == lidnet.pixel
        assert (objective.detection > 0) == (name == "LIDnet")
    assert list(controls(lidnet, quick=True)) == ["MSE", "LIDnet"]


def test_interval_is_students() -> None:
    assert interval([1.5]) == 1.5
    assert interval([1.0, None]) is None
    mean, low, high = interval([1.0, 2.0, 4.0])
    # t(0.975, 2) = 4.302653; s = 1.527525
    assert math.isclose(mean, 7 / 3)
    assert math.isclose(high - mean, 4.302653 * 1.527525 / math.sqrt(3), rel_tol=1e-5)
    assert math.isclose(mean - low, high - mean)


def test_gains_are_paired_by_seed() -> None:
    seeds = [
        {"MSE": {"psnr": base}, "LIDnet": {"psnr": base + gain}}
        for base, gain in ((10.0, 1.0), (20.0, 2.0), (30.0, 3.0))
    ]
    mean, low, high = paired_gains(seeds)["MSE"]["psnr"]
    assert math.isclose(mean, 2.0)
    assert high - low < 6  # far less than the spread between seeds


def test_gains_come_in_the_order_of_the_metrics() -> None:
    keys = [f"metric {number}" for number in range(20)]
    gains = paired_gains([{"MSE": dict.fromkeys(keys, 1.0), "LIDnet": dict.fromkeys(reversed(keys), 2.0)}])
    assert list(gains["MSE"]) == keys
