"""Runs whose networks see neighbouring slices."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from lidnet_fast import cli
from lidnet_fast.assessment.arms import model_arms
from lidnet_fast.data.samples.dataset import collate, make_batch
from lidnet_fast.data.store.reader import Store
from lidnet_fast.errors import InputError
from lidnet_fast.evaluation.evaluate import evaluate_run
from lidnet_fast.models.denoisers import build_denoiser
from lidnet_fast.models.detectors import build_detector
from lidnet_fast.models.files import load_denoiser, load_detector, load_trained_detector, save_denoiser
from lidnet_fast.models.hu import HUDenoiser
from lidnet_fast.models.registry import NetworkConfig
from lidnet_fast.models.windowing import HUWindow
from lidnet_fast.trainer.config import ObjectiveConfig, RunConfig, to_dict
from lidnet_fast.trainer.datamodule import split_patches
from lidnet_fast.trainer.objective import JointObjective
from lidnet_fast.trainer.phases import CollaboratePhase
from lidnet_fast.trainer.run import train
from tests.trainer.test_run import assert_continues_bit_exactly


@pytest.fixture(params=[False, True], ids=["denoiser_of_one_slice", "denoiser_of_three"])
def among(tiny_config: RunConfig, request: pytest.FixtureRequest) -> RunConfig:
    return replace(tiny_config, data=replace(tiny_config.data, context=1, denoiser_context=request.param))


def test_a_run_with_neighbours(among: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It trains, resumes to the bit, is evaluated, and its files say what they see."""
    train(among)
    run = Path(among.out)
    assert_continues_bit_exactly(among, tmp_path, monkeypatch, CollaboratePhase, 5)
    around = 1 if among.data.denoiser_context else 0
    assert load_denoiser(run).context == around
    assert load_detector(run / "collaborate" / "detector.pt").context == 1
    distance = Store(among.data.store).series[0].spacing[0]
    assert load_trained_detector(run / "detector" / "detector.pt").envelope.slice_distance == (distance, distance)
    assert load_denoiser(run).envelope.slice_distance == ((distance, distance) if around else None)
    evaluation = evaluate_run(run, device="cpu", scans=True)
    assert set(json.loads((run / "metrics.json").read_text())["scans"]["denoised"]) == {"judge", "cotrained"}
    assert evaluation.metrics["normal dose"]["psnr"] == 100
    assert evaluation.examples[0].images["denoised"].shape == (64, 64)
    with pytest.raises(
        InputError, match=rf"denoiser of context {around}, .* but one of context {1 - around} is needed"
    ):
        load_denoiser(run, context=1 - around)
    with pytest.raises(InputError, match=r"holds a run with data.context = 1, not 2"):
        train(replace(among, data=replace(among.data, context=2)))


def test_features_of_whole_slices_are_cached(among: RunConfig, tmp_path: Path) -> None:
    """With balanced losses, averaged weights and parts of a batch, too."""
    objective = replace(among.collaborate.objective, roi_extractor=0.1, extractor="squeezenet1_1:features.3")
    cached = replace(
        among,
        balance="upgrad",
        ema_decay=0.9,
        micro_batch_size=1,
        data=replace(among.data, crop=None, augment=False),
        collaborate=replace(among.collaborate, detector_steps=0, objective=objective),
    )
    train(cached)
    without = replace(cached, out=str(tmp_path / "without"), collaborate=replace(cached.collaborate, cache_mib=0))
    train(without)
    found, expected = (load_denoiser(config.out).state_dict() for config in (cached, without))
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_two_processes(tiny_config: RunConfig, tmp_path: Path) -> None:
    """A step's samples are shared out, with their neighbours."""
    config = replace(
        tiny_config,
        data=replace(tiny_config.data, context=1, denoiser_context=True),
        detector=replace(tiny_config.detector, steps=0),
        # A mean weighted by lesions is of a process's own samples.
        collaborate=replace(
            tiny_config.collaborate,
            detector_steps=0,
            objective=replace(tiny_config.collaborate.objective, roi_weight=1.0),
        ),
    )
    train(config)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(to_dict(replace(config, out=str(tmp_path / "two"), devices=2))))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    command = [sys.executable, "-c", "from lidnet_fast.cli import main; main()", "train", "--config", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(cli.__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, *torchrun, *command], capture_output=True, text=True, timeout=240, env=environment
    )
    assert done.returncode == 0, done.stderr
    found, expected = (load_denoiser(out).state_dict() for out in (tmp_path / "two", config.out))
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("context", [0, 1])
def test_the_objective_is_about_what_the_detector_sees(context: int) -> None:
    """Pixel terms are of the middle slice; the detector's reach every slice that it sees."""
    torch.manual_seed(0)
    window, slices = HUWindow(), 2 * context + 1
    detector = build_detector("faster_rcnn_small", context=context).eval()
    normal = torch.rand(1, slices, 64, 64)
    boxes = [torch.tensor([[20.0, 20, 34, 34]])]

    def gradient(**weights: float) -> torch.Tensor:
        denoised = (normal + 0.1).requires_grad_()
        objective = JointObjective(ObjectiveConfig(**{"roi_perceptual": 0.0, "detection": 0.0, **weights}), window)
        (found,) = torch.autograd.grad(objective(denoised, normal, boxes, detector).total, denoised)
        return found.abs().sum((0, 2, 3))

    pixels = gradient()
    assert pixels[context] > 0
    assert pixels.count_nonzero() == 1
    for term in ("detection", "roi_perceptual", "perceptual"):
        assert gradient(**{"pixel": {"mse": 1e-9}, term: 1.0}).count_nonzero() == slices


def test_a_denoiser_of_one_slice_denoises_all_that_the_detector_sees(among: RunConfig) -> None:
    """And one of three sees the neighbours of the detector's neighbours."""
    patches = split_patches(among, "train", "collaborate")
    batch = make_batch(collate([patches[draw] for draw in range(2)]), torch.device("cpu"))
    around = among.data.context_of("denoiser")
    assert batch["low_dose"].shape[1] == 3 + 2 * around
    torch.manual_seed(0)
    network = build_denoiser("small", context=around, channels=4)
    torch.nn.init.normal_(network.body[-1].weight, std=0.05)
    phase = CollaboratePhase(
        network,
        build_detector("faster_rcnn_small", context=1),
        JointObjective(ObjectiveConfig(), HUWindow()),
        among.collaborate,
        among,
    )
    denoised = phase.windowed(network, batch)
    for channel in range(3):
        one = batch["low_dose"][:, channel : channel + 2 * around + 1]
        alone = HUWindow().scale(HUWindow().denoise(network, one, around))
        torch.testing.assert_close(denoised[:, channel : channel + 1], alone)


def test_a_run_of_before_there_was_a_context_goes_on(trained_config: RunConfig) -> None:
    path = Path(trained_config.out) / "config.yaml"
    stored = yaml.safe_load(path.read_text())
    del stored["data"]["context"], stored["data"]["denoiser_context"]
    path.write_text(yaml.safe_dump(stored))
    train(trained_config)
    with pytest.raises(InputError, match=r"data.context = 0, not 1"):
        train(replace(trained_config, data=replace(trained_config.data, context=1)))


def test_a_denoiser_of_another_context_is_refused(trained_config: RunConfig, tmp_path: Path) -> None:
    other = HUDenoiser(build_denoiser("small", context=1), HUWindow(), context=1)
    save_denoiser(tmp_path / "other.pt", other, NetworkConfig("small"))
    with pytest.raises(InputError, match=r"other.pt holds a denoiser of context 1, which sees 3 slices"):
        evaluate_run(Path(trained_config.out), tmp_path / "other.pt", device="cpu")
    with pytest.raises(InputError, match=r"other.pt holds a denoiser of context 1, which sees 3 slices"):
        model_arms([str(tmp_path / "other.pt")], device="cpu")


@pytest.mark.parametrize("context", ["-1", "17", "1.5"])
def test_contexts_that_cannot_be(capsys: pytest.CaptureFixture[str], tmp_path: Path, context: str) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--data.store", str(tmp_path), "--data.context", context])
    assert stop.value.code == 2
    assert "data.context" in capsys.readouterr().err
