"""`lidnet-fast bench`: what it measures is the trainer, and what it advises follows from the figures."""

from dataclasses import replace
from pathlib import Path

import pytest

from lidnet_fast import device as device_module
from lidnet_fast.errors import InputError
from lidnet_fast.trainer.bench import CONFIGURED, Speed, advice, bench, variants
from lidnet_fast.trainer.clock import PARTS
from lidnet_fast.trainer.config import RunConfig


def speed(images_per_s: float, **shares: float) -> Speed:
    return Speed(images_per_s, {part: shares.get(part, 0.0) for part in PARTS}, 1000.0)


def test_bench_measures_every_variant_and_leaves_nothing(
    tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(device_module, "computes_in_bfloat16", lambda device: False)
    before = sorted(tmp_path.rglob("*"))
    speeds = bench(replace(tiny_config, precision="auto"), seconds=1.0)
    assert sorted(tmp_path.rglob("*")) == before
    printed = capsys.readouterr().out
    assert next(iter(speeds)) == CONFIGURED
    for name, found in speeds.items():
        assert found.images_per_s > 0
        assert sum(found.shares.values()) == pytest.approx(1, abs=0.05)
        assert name in printed
    assert "Limited by: " in printed
    assert "The data alone" in printed


def test_variants_change_one_thing(tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_module, "computes_in_bfloat16", lambda device: True)
    assert set(variants(tiny_config)) == {
        CONFIGURED,
        "--precision bfloat16",
        "--data.workers 2",
        "--ops reference",
    }
    busy = replace(tiny_config, precision="auto", data=replace(tiny_config.data, workers=3))
    found = variants(busy)
    assert found["--precision float32"] == replace(busy, precision="float32")
    assert found["--data.workers 0"].data.workers == 0


def test_advice_names_what_waits_and_what_helps(tiny_config: RunConfig) -> None:
    speeds = {
        CONFIGURED: speed(10, data=0.5, denoiser=0.3, detector=0.2),
        "--data.workers 2": speed(18, denoiser=0.6, detector=0.4),
        "--precision bfloat16": speed(10.2, data=0.6),
    }
    lines = advice(tiny_config, speeds, loaded=12.0)
    assert lines[0] == "Limited by: data (50% of a step)."
    assert "Steps wait for data (50% of the time)" in lines[1] and "12.0 images/s" in lines[1]
    assert lines[2:] == ["Change: --data.workers 2 takes 1.80 times as many images/s."]


def test_advice_on_networks(tiny_config: RunConfig) -> None:
    lines = advice(tiny_config, {CONFIGURED: speed(10, data=0.01, denoiser=0.7)}, loaded=100.0)
    assert lines[0].startswith("Limited by: denoiser")
    assert len(lines) == 2 and "--denoiser.name" in lines[1]


def test_bad_seconds(tiny_config: RunConfig) -> None:
    with pytest.raises(InputError, match="--seconds must be positive, got 0"):
        bench(tiny_config, seconds=0)
