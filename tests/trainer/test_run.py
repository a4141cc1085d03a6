"""A run that is interrupted anywhere and continued ends with the same weights, bit for bit."""

import json
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lidnet_fast import cli
from lidnet_fast.data.phantoms.study import Study, make_study
from lidnet_fast.data.store.reader import Store
from lidnet_fast.errors import InputError
from lidnet_fast.models.files import load_denoiser, load_network
from lidnet_fast.trainer import run as run_module
from lidnet_fast.trainer.config import RunConfig
from lidnet_fast.trainer.phases import CollaboratePhase, DenoiserPhase, DetectorPhase
from lidnet_fast.trainer.run import train
from tests.conftest import Once


class PowerCutError(Exception):
    pass


def weights(out: str, phase: str) -> dict[str, torch.Tensor]:
    states = {}
    for kind in ("denoiser", "detector"):
        path = Path(out) / phase / f"{kind}.pt"
        if path.exists():
            network, _ = load_network(path, kind)
            states.update({f"{kind}.{k}": v for k, v in network.state_dict().items()})
    assert states
    return states


def test_a_model_file_says_what_it_was_trained_on_and_nothing_of_this_machine(tiny_config: RunConfig) -> None:
    run = train(tiny_config)
    for phase in ("denoiser", "collaborate"):
        path = run.out / phase / "denoiser.pt"
        envelope = load_denoiser(path).envelope
        assert envelope is not None
        assert envelope.noise
        assert envelope.body_parts == ("CHEST",)
        series = Store(tiny_config.data.store).series
        assert envelope.pixel_spacing == (
            min(max(info.spacing[1:]) for info in series if info.split == "train"),
            max(max(info.spacing[1:]) for info in series if info.split == "train"),
        )
        content = path.read_bytes()
        for secret in (tiny_config.out, tiny_config.data.store, *(info.patient_id for info in series)):
            assert secret.encode() not in content


@pytest.mark.parametrize(
    ("phase", "step"), [(DetectorPhase, 2), (DenoiserPhase, 3), (CollaboratePhase, 3), (CollaboratePhase, 5)]
)
def test_interrupted_run_continues_bit_exactly(
    trained_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: type, step: int
) -> None:
    assert_continues_bit_exactly(trained_config, tmp_path, monkeypatch, phase, step)


def test_run_with_cached_features_continues_bit_exactly(
    tiny_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the cache is empty when it goes on."""
    objective = replace(tiny_config.collaborate.objective, roi_extractor=0.1, extractor="squeezenet1_1:features.3")
    cached = replace(
        tiny_config,
        data=replace(tiny_config.data, crop=None, augment=False),
        collaborate=replace(tiny_config.collaborate, detector_steps=0, objective=objective),
    )
    train(cached)
    assert_continues_bit_exactly(cached, tmp_path, monkeypatch, CollaboratePhase, 5)


def assert_continues_bit_exactly(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: type, step: int
) -> None:
    """The run of this configuration, trained to its end, is what the interrupted one is compared with."""
    again = replace(config, out=str(tmp_path / "interrupted"))
    training_step = phase.training_step

    def cut(self, batch, batch_idx):
        if batch_idx == step:
            raise PowerCutError
        return training_step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(phase, "training_step", cut)
        with pytest.raises(PowerCutError):
            train(again)
    torch.manual_seed(12345)  # whatever the new process's generator holds
    train(again)

    for name in ("detector", "denoiser", "collaborate"):
        expected, found = weights(config.out, name), weights(again.out, name)
        assert expected.keys() == found.keys()
        for key in expected:
            assert torch.equal(expected[key], found[key]), f"{name}: {key}"


def test_ctrl_c_ends_as_an_interruption_and_the_run_goes_on(
    tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(self, batch, batch_idx):
        raise KeyboardInterrupt

    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        patch.setattr(DenoiserPhase, "training_step", interrupt)
        patch.setitem(cli.COMMANDS, "train", lambda _: train(tiny_config))
        with pytest.raises(SystemExit) as stop:
            cli.main(["train"])
    assert stop.value.code == 130
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert "resumes from what is finished" in capsys.readouterr().err
    train(tiny_config)


def test_finished_phases_are_not_trained_again(trained_config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module.L.Trainer, "fit", lambda *_, **__: pytest.fail("trained again"))
    train(trained_config)


def test_other_configuration_in_the_same_folder_is_refused(tiny_config: RunConfig) -> None:
    run_module.Run(tiny_config)
    with pytest.raises(InputError, match=r"seed = 0, not 1"):
        run_module.Run(replace(tiny_config, seed=1))


def test_a_store_without_boxes_trains_a_denoiser_alone(tiny_config: RunConfig, tiny_study: Study, once: Once) -> None:
    phantom = replace(tiny_study.phantom, slices=1, lesions_per_slice=(0, 0))
    boxless = replace(tiny_study, patients=(("train", 1), ("val", 1), ("test", 1)), phantom=phantom)
    store = once("boxless_store", lambda path: make_study(path, boxless, seed=0, workers=1))
    config = replace(tiny_config, data=replace(tiny_config.data, store=str(store)))
    words = r"training split has no lesion box.* To fix: prepare it with --boxes or --insert-lesions"
    no_detector = replace(config, detector=replace(config.detector, steps=0))
    for needy in (config, no_detector):
        with pytest.raises(InputError, match=words):
            run_module.Run(needy)
    assert not Path(config.out).exists()
    run_module.Run(replace(no_detector, collaborate=replace(config.collaborate, steps=0)))


@pytest.mark.parametrize(("weights", "said"), [(None, True), ("IMAGENET1K_V1", False)])
def test_random_weights_of_an_extractor_are_said(
    tiny_config: RunConfig,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    weights: str | None,
    said: bool,
) -> None:
    objective = replace(
        tiny_config.collaborate.objective, roi_extractor=0.1, extractor="vgg11:relu1_1", extractor_weights=weights
    )
    for phase in ("train_detector", "train_denoiser", "collaborate"):
        monkeypatch.setattr(run_module.Run, phase, lambda _: None)
    train(replace(tiny_config, collaborate=replace(tiny_config.collaborate, objective=objective)))
    assert ("warning: the weights of vgg11:relu1_1 are random. To fix: " in capsys.readouterr().err) == said


def test_folder_with_other_content_is_refused(tiny_config: RunConfig) -> None:
    Path(tiny_config.out).mkdir()
    (Path(tiny_config.out) / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="holds no run"):
        run_module.Run(tiny_config)


def test_both_networks_train_in_collaborate(trained_config: RunConfig) -> None:
    collaborate = weights(trained_config.out, "collaborate")
    for phase in ("denoiser", "detector"):
        before = weights(trained_config.out, phase)
        assert any(not torch.equal(collaborate[k], v) for k, v in before.items())


def test_diverged_loss_stops_the_run(tiny_config: RunConfig) -> None:
    diverging = replace(tiny_config.denoiser, learning_rate=1e30)
    with pytest.raises(InputError, match=r"denoiser loss is (nan|inf) at step"):
        train(replace(tiny_config, denoiser=diverging))


def test_bf16_autocast_trains_near_float32(tiny_config: RunConfig, tmp_path: Path) -> None:
    short = replace(tiny_config, collaborate=replace(tiny_config.collaborate, steps=3))
    train(short)
    half = replace(short, precision="bfloat16", out=str(tmp_path / "bf16"))
    train(half)
    for key, value in weights(half.out, "denoiser").items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, weights(short.out, "denoiser")[key], rtol=0.1, atol=0.01)


@pytest.mark.parametrize("balance", ["sum", "upgrad"])
def test_balanced_steps_log_how_the_losses_agree(trained_config: RunConfig, tmp_path: Path, balance: str) -> None:
    balanced = replace(trained_config, balance=balance, out=str(tmp_path / balance))
    train(balanced)
    logged = run_module.curves(Path(balanced.out) / "collaborate")
    losses = ("pixel", "detection", "roi_perceptual")
    for loss in losses:
        assert all(norm > 0 for norm in logged[f"collaborate/gradient_norm/{loss}"][1])
        assert all(weight >= 0 for weight in logged[f"collaborate/weight/{loss}"][1])
    for pair in ("pixel_detection", "pixel_roi_perceptual", "detection_roi_perceptual"):
        assert all(-1.0001 <= cosine <= 1.0001 for cosine in logged[f"collaborate/cosine/{pair}"][1])
    plain, found = weights(trained_config.out, "collaborate"), weights(balanced.out, "collaborate")
    if balance == "sum":  # the same gradient, summed in another order
        for key, value in found.items():
            torch.testing.assert_close(value, plain[key], rtol=1e-3, atol=1e-4)
    else:
        assert any(not torch.equal(value, plain[key]) for key, value in found.items())


def test_missing_weighting_package_is_told_before_anything_is_built(
    tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchjd", None)
    with pytest.raises(InputError, match="balance: weighting 'mgda' needs TorchJD: pip install torchjd"):
        train(replace(tiny_config, balance="mgda"))
    assert not Path(tiny_config.out).exists()


def test_logs_hold_the_curves_of_every_phase(trained_config: RunConfig) -> None:
    logged = {
        phase: run_module.curves(Path(trained_config.out) / phase) for phase in ("detector", "denoiser", "collaborate")
    }
    assert logged["detector"]["detector/total"][0] == [0, 1, 2, 3]
    assert "val/ap50" in logged["detector"]
    assert {"denoiser/mse", "val/psnr", "val/lesion_psnr"} <= set(logged["denoiser"])
    terms = {"mse", "roi_perceptual", "detection", "total"}
    assert {f"collaborate/{term}" for term in terms} <= set(logged["collaborate"])
    cost = json.loads((Path(trained_config.out) / "collaborate" / "cost.json").read_text())
    assert cost["steps"] == 8
    assert cost["seconds"] > 0
    assert cost["peak_memory_mb"] > 100
    assert list((Path(trained_config.out) / "collaborate").rglob("events.out.tfevents*"))
