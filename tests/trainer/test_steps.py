"""What a step may be made of: parts of a batch, averaged weights, recomputed activations, compiled networks."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from lidnet_fast import device as device_module
from lidnet_fast.errors import InputError
from lidnet_fast.models.denoisers import build_denoiser
from lidnet_fast.models.detectors import build_detector
from lidnet_fast.models.files import load_network
from lidnet_fast.trainer import clock as clock_module
from lidnet_fast.trainer import run as run_module
from lidnet_fast.trainer.clock import PARTS, StepClock
from lidnet_fast.trainer.config import RunConfig
from lidnet_fast.trainer.phase import Phase, averaged_weights, checkpoint_activations, micro_batches
from lidnet_fast.trainer.phases import DenoiserPhase
from lidnet_fast.trainer.run import Run, train


def denoiser_of(config: RunConfig, phase: str = "denoiser") -> dict[str, torch.Tensor]:
    return load_network(Path(config.out) / phase / "denoiser.pt", "denoiser", trust_code=True)[0].state_dict()


def detector_of(config: RunConfig) -> dict[str, torch.Tensor]:
    return load_network(Path(config.out) / "detector" / "detector.pt", "detector")[0].state_dict()


def assert_same_weights(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """To a tenth of a step's length: AdamW's first steps are signs of gradients, which rounding turns near zero."""
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-4)


@pytest.fixture
def denoising_config(tiny_config: RunConfig) -> RunConfig:
    return replace(tiny_config, collaborate=replace(tiny_config.collaborate, steps=0))


def trained(config: RunConfig, out: Path) -> RunConfig:
    config = replace(config, out=str(out))
    Run(config).train_denoiser()
    return config


def test_micro_batches_are_all_of_the_batch() -> None:
    batch = {"normal_dose": torch.arange(5.0), "boxes": list("abcde")}
    parts = list(micro_batches(batch, 2))  # type: ignore[arg-type]
    assert [len(part["normal_dose"]) for part in parts] == [2, 2, 1]
    assert torch.cat([part["normal_dose"] for part in parts]).equal(batch["normal_dose"])
    assert [box for part in parts for box in part["boxes"]] == batch["boxes"]
    (whole,) = micro_batches(batch, None)  # type: ignore[arg-type]
    assert whole["normal_dose"].equal(batch["normal_dose"])


def test_a_batch_in_parts_takes_the_same_steps(denoising_config: RunConfig, tmp_path: Path) -> None:
    odd = replace(denoising_config, denoiser=replace(denoising_config.denoiser, batch_size=3))
    whole = trained(odd, tmp_path / "whole")
    parts = trained(replace(odd, micro_batch_size=2), tmp_path / "parts")
    assert_same_weights(denoiser_of(parts), denoiser_of(whole))
    logs = [run_module.curves(Path(c.out) / "denoiser")["denoiser/mse"][1] for c in (whole, parts)]
    assert logs[0] == pytest.approx(logs[1], rel=1e-4)


def test_collaborate_in_parts_trains_both_networks(tiny_config: RunConfig) -> None:
    train(replace(tiny_config, micro_batch_size=1))
    before, after = denoiser_of(tiny_config), denoiser_of(tiny_config, "collaborate")
    assert any(not torch.equal(before[key], after[key]) for key in before)


def test_averaged_weights_follow_the_formula() -> None:
    network = nn.Linear(1, 1, bias=False)
    average = averaged_weights(network, 0.5)
    assert average is not None
    expected = None
    for step, value in enumerate([1.0, 4.0, 2.0, 8.0]):
        nn.init.constant_(network.weight, value)
        average.update_parameters(network)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = value if expected is None else decay * expected + (1 - decay) * value
        assert average.module.weight.item() == pytest.approx(expected)
    assert averaged_weights(network, 0.0) is None


def test_average_is_saved_resumed_and_not_trained(denoising_config: RunConfig, tmp_path: Path, monkeypatch) -> None:
    plain = trained(denoising_config, tmp_path / "plain")
    averaged = trained(replace(denoising_config, ema_decay=0.9), tmp_path / "averaged")
    assert any(
        not torch.equal(a, b) for a, b in zip(denoiser_of(averaged).values(), denoiser_of(plain).values(), strict=True)
    )

    again = replace(averaged, out=str(tmp_path / "again"))
    step = DenoiserPhase.training_step

    def cut(self, batch, batch_idx):
        if batch_idx == 2:
            raise RuntimeError("power cut")
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(DenoiserPhase, "training_step", cut)
        with pytest.raises(RuntimeError, match="power cut"):
            Run(again).train_denoiser()
    Run(again).train_denoiser()
    for key, value in denoiser_of(averaged).items():
        assert torch.equal(value, denoiser_of(again)[key]), key


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_bad_decay_is_refused(tiny_config: RunConfig, decay: float) -> None:
    with pytest.raises(InputError, match=rf"ema_decay must lie in \[0, 1\), got {decay}"):
        Run(replace(tiny_config, ema_decay=decay))


def test_checkpointed_activations_give_the_same_gradient_from_less_memory() -> None:
    torch.manual_seed(0)
    plain = build_denoiser("unet", channels=8, levels=3, blocks=2)
    nn.init.normal_(plain.tail.weight)
    checkpointed = build_denoiser("unet", channels=8, levels=3, blocks=2)
    checkpoint_activations(checkpointed)
    checkpointed.load_state_dict(plain.state_dict())
    assert checkpointed.state_dict().keys() == plain.state_dict().keys()
    images = torch.rand(2, 1, 32, 32)
    kept, gradients = [], []
    for network in (plain, checkpointed):
        saved: dict[int, int] = {}  # by storage: views and repeats keep nothing more

        def note(tensor: torch.Tensor, saved: dict[int, int] = saved) -> torch.Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            total = network(images).square().sum()
        kept.append(sum(saved.values()))
        total.backward()
        gradients.append([p.grad for p in network.parameters()])
    for found, expected in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(found, expected)
    assert kept[1] < 0.6 * kept[0]


@pytest.mark.parametrize("momentum", [0.1, None])
def test_checkpointed_batchnorm_sees_every_batch_once(momentum: float | None) -> None:
    networks = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        network = build_detector("faster_rcnn_small").model.backbone
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = momentum
        if checkpointed:
            checkpoint_activations(network)
        networks.append(network)
    for step in range(3):
        images = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(step))
        for network in networks:
            torch.stack([level.square().sum() for level in network(images).values()]).sum().backward()
    plain, checkpointed = (network.state_dict() for network in networks)
    assert plain["stage1.0.1.num_batches_tracked"] == 3
    assert plain.keys() == checkpointed.keys()
    for key, value in plain.items():
        assert torch.equal(checkpointed[key], value), key


def test_checkpointing_that_would_do_nothing_is_refused(tiny_config: RunConfig) -> None:
    redcnn = replace(
        tiny_config,
        activation_checkpointing=True,
        denoiser=replace(tiny_config.denoiser, name="redcnn", options={"channels": 4}),
    )
    with pytest.raises(InputError, match="activation_checkpointing: true does nothing for denoiser 'redcnn'"):
        Run(redcnn)


def test_checkpointed_run_equals_the_plain_one(tiny_config: RunConfig, tmp_path: Path) -> None:
    unet = replace(
        tiny_config, denoiser=replace(tiny_config.denoiser, name="unet", options={"channels": 4, "levels": 2})
    )
    short = replace(unet, collaborate=replace(unet.collaborate, steps=3))
    train(short)
    other = replace(short, activation_checkpointing=True, out=str(tmp_path / "checkpointed"))
    train(other)
    for phase in ("denoiser", "collaborate"):
        assert_same_weights(denoiser_of(other, phase), denoiser_of(short, phase))
    assert_same_weights(detector_of(other), detector_of(short))


@pytest.mark.slow
def test_compiled_run_equals_the_plain_one(tiny_config: RunConfig, tmp_path: Path, monkeypatch) -> None:
    compiled = []
    monkeypatch.setattr(
        nn.Module, "compile", lambda self, compile=nn.Module.compile: (compiled.append(self), compile(self))
    )
    short = replace(tiny_config, collaborate=replace(tiny_config.collaborate, steps=3))
    train(short)
    assert not compiled
    other = replace(short, compile=True, out=str(tmp_path / "compiled"))
    train(other)
    assert len(compiled) == 4  # backbone; denoiser; both
    for phase in ("denoiser", "collaborate"):
        assert_same_weights(denoiser_of(other, phase), denoiser_of(short, phase))


def test_automatic_precision_is_decided_once(tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    automatic = replace(tiny_config, precision="auto")
    monkeypatch.setattr(device_module, "computes_in_bfloat16", lambda device: True)
    assert Run(automatic).config.precision == "bfloat16"
    monkeypatch.setattr(device_module, "computes_in_bfloat16", lambda device: False)
    assert Run(automatic).config.precision == "bfloat16"
    with pytest.raises(InputError, match="holds a run with precision = bfloat16, not float32"):
        Run(tiny_config)


def test_clock_divides_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(clock_module, "_now", lambda device: float(next(ticks)))
    clock = StepClock(torch.device("cpu"))
    x = torch.ones(1, requires_grad=True)
    clock.restart()  # 0
    y = x * 2
    clock.lap("denoiser")  # 1
    clock.lap_in_backward(y, "detector")
    z = y.square()
    clock.lap_in_backward(z, "losses")
    clock.lap("losses")  # 2
    z.sum().backward()  # 3: the losses' backward has reached z; 4: that of z has reached y
    clock.lap("denoiser")  # 5
    assert clock.read() == {"denoiser": 2.0, "losses": 2.0, "detector": 1.0}
    clock.restart()
    clock.lap("data")
    assert clock.read() == {"data": 1.0}
    clock.lap_in_backward(torch.ones(1), "detector")  # needs no gradient: nothing to be told of


def test_clock_of_a_cpu_run_on_a_machine_with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    clock = StepClock(torch.device("cpu"))
    clock.restart()
    clock.lap("denoiser")
    assert clock.read()["denoiser"] > 0
    assert clock_module.step_memory_mb(clock.device) > 100


def test_clock_runs_on_the_device_of_the_run(tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert Phase(tiny_config).clock.device.type == "cpu"
    assert Phase(replace(tiny_config, device="auto")).clock.device.type == "cuda"


class Normalising(nn.Module):
    """A denoiser of a user's, whose BatchNorm minds the mode."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 1, 3, padding=1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images + self.body(images)


def test_a_denoiser_with_batchnorm_trains_in_train_mode_in_its_own_steps_alone(tiny_config: RunConfig) -> None:
    mine = replace(tiny_config.denoiser, name="tests.trainer.test_steps:Normalising", options={})
    train(replace(tiny_config, denoiser=mine))
    seen = [denoiser_of(tiny_config, phase)["body.1.num_batches_tracked"] for phase in ("denoiser", "collaborate")]
    # Four steps; then two, a detector's, two, a detector's, and two.
    assert seen == [4, 4 + 6]


def test_speed_is_logged_in_parts_that_make_a_whole(tiny_config: RunConfig) -> None:
    train(replace(tiny_config, log_every=2))
    for phase, parts in (
        ("detector", {"data", "detector", "other"}),
        ("denoiser", {"data", "denoiser", "losses", "other"}),
        ("collaborate", set(PARTS)),
    ):
        logged = run_module.curves(Path(tiny_config.out) / phase)
        assert min(logged["speed/images_per_s"][1]) > 0
        assert min(logged["speed/peak_memory_mb"][1]) > 100
        found = {key.removeprefix("speed/") for key in logged if key.startswith("speed/")} & set(PARTS)
        assert found == parts
        for shares in zip(*(logged[f"speed/{part}"][1] for part in parts), strict=True):
            assert sum(shares) == pytest.approx(1)


def test_frozen_networks_of_whole_slices_are_asked_once_per_slice(tiny_config: RunConfig, monkeypatch) -> None:
    whole = replace(
        tiny_config,
        data=replace(tiny_config.data, crop=None, augment=False),
        collaborate=replace(tiny_config.collaborate, detector_steps=0, steps=12),
    )
    run = Run(whole)
    run.train_detector()
    run.train_denoiser()
    made = []
    objective = Run._objective
    monkeypatch.setattr(Run, "_objective", lambda self, joint: made.append(objective(self, joint)) or made[-1])
    run.collaborate()
    assert made[0].cache is not None
    assert len(made[0].cache) <= 6  # three patients with two slices each
    assert made[0].cache.hits >= 24 - 6
