"""Whatever happens to a run, it ends with one sentence, and goes on from its last checkpoint."""

import errno
import io
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from lidnet_fast import cli, files
from lidnet_fast.data.store.reader import Store
from lidnet_fast.extractors.networks import load_network as load_extractor
from lidnet_fast.models.files import load_network
from lidnet_fast.trainer.config import RunConfig, to_dict
from lidnet_fast.trainer.phases import DenoiserPhase
from lidnet_fast.trainer.run import Run, curves, train


@pytest.fixture
def denoising(tiny_config: RunConfig) -> RunConfig:
    """Only the denoiser phase has steps."""
    return replace(
        tiny_config,
        detector=replace(tiny_config.detector, steps=0),
        collaborate=replace(tiny_config.collaborate, steps=0),
    )


Says = Callable[..., str]


@pytest.fixture
def sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Says:
    """What `lidnet-fast train` says of a configuration: one line."""

    def says(config: RunConfig, status: int = 2) -> str:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(to_dict(config)))
        with pytest.raises(SystemExit) as stop:
            cli.main(["train", "--config", str(path)])
        message = capsys.readouterr().err
        assert stop.value.code == status, message
        assert message.count("\n") == 1, message
        return message

    return says


def at_step(step: int, work: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Do something right before a step of the denoiser phase."""
    training_step = DenoiserPhase.training_step

    def patched(self, batch, batch_idx):
        if batch_idx == step:
            work()
        return training_step(self, batch, batch_idx)

    monkeypatch.setattr(DenoiserPhase, "training_step", patched)


def denoiser_of(config: RunConfig) -> dict[str, torch.Tensor]:
    return load_network(Path(config.out) / "denoiser" / "denoiser.pt", "denoiser")[0].state_dict()


def last_checkpoint(config: RunConfig) -> Path:
    return Path(config.out) / "denoiser" / "last.ckpt"


def assert_goes_on(config: RunConfig) -> None:
    """The run, continued, ends as one that nothing has happened to."""
    assert torch.load(last_checkpoint(config), weights_only=True)["global_step"] == 2
    train(config)
    undisturbed = replace(config, out=config.out + "_undisturbed")
    train(undisturbed)
    for key, value in denoiser_of(undisturbed).items():
        assert torch.equal(denoiser_of(config)[key], value), key


@pytest.mark.slow
def test_runs_killed_at_any_moment_end_as_if_they_were_not(tiny_config: RunConfig, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(to_dict(tiny_config)))
    script = Path(__file__).with_name("killed_runs.py")
    subprocess.run(
        [sys.executable, script, config, tmp_path, "24", "0"], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    whole, killed = tmp_path / "whole", [path for path in tmp_path.glob("run*") if path.is_dir()]
    assert killed
    networks = sorted(path.relative_to(whole) for path in whole.glob("*/*.pt"))
    assert len(networks) == 4
    for out in killed:
        for network in networks:
            expected, found = (torch.load(run / network, weights_only=True)["state_dict"] for run in (whole, out))
            assert expected.keys() == found.keys()
            assert all(torch.equal(expected[key], found[key]) for key in expected), out / network
        assert not list(out.rglob("*.part")) + list(out.rglob("last.ckpt"))
        logged, expected_logs = (curves(run / "collaborate")["collaborate/total"] for run in (out, whole))
        assert set(zip(*logged, strict=True)) <= set(zip(*expected_logs, strict=True))


def disk_full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_disk_that_is_full_when_a_checkpoint_is_written(
    denoising: RunConfig, monkeypatch: pytest.MonkeyPatch, sentence: Says
) -> None:
    with monkeypatch.context() as patch:
        at_step(2, lambda: patch.setattr(files.os, "fsync", disk_full), patch)
        assert sentence(denoising) == f"lidnet-fast: {last_checkpoint(denoising)}: No space left on device\n"
    assert not list(Path(denoising.out).rglob("*.part"))
    assert_goes_on(denoising)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB, which only root can make."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system is not allowed here")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_full_file_system(denoising: RunConfig, small_disk: Path, sentence: Says) -> None:
    full = replace(denoising, out=str(small_disk / "run"))
    assert sentence(full).endswith("No space left on device\n")
    assert not list(small_disk.rglob("*.part"))


def test_read_only_file_system(denoising: RunConfig, small_disk: Path, sentence: Says) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    message = sentence(replace(denoising, out=str(small_disk / "run")))
    assert message == f"lidnet-fast: {small_disk / 'run' / 'config.yaml'}: Read-only file system\n"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder(denoising: RunConfig, tmp_path: Path, sentence: Says) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir(0o555)
    message = sentence(replace(denoising, out=str(folder)))
    assert message == f"lidnet-fast: {folder / 'config.yaml'}: Permission denied\n"


def test_out_is_a_file(denoising: RunConfig, sentence: Says) -> None:
    Path(denoising.out).write_text("mine")
    assert sentence(denoising) == f"lidnet-fast: {denoising.out} is a file: choose another --out\n"
    assert Path(denoising.out).read_text() == "mine"
    assert "Not a directory" in sentence(replace(denoising, out=denoising.out + "/run"))


def test_out_that_was_killed_while_it_was_claimed_is_taken(denoising: RunConfig) -> None:
    Path(denoising.out).mkdir()
    (Path(denoising.out) / ".0123456789abcdef.part").write_text("out: ru")
    Run(denoising)
    assert (Path(denoising.out) / "config.yaml").exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_volume(denoising: RunConfig, tmp_path: Path, sentence: Says, workers: int) -> None:
    store = tmp_path / "store"
    shutil.copytree(denoising.data.store, store)
    data = replace(denoising.data, store=str(store), workers=workers)
    config = replace(denoising, data=data)
    kept = {}
    for index, series in enumerate(Store(store).series):
        if series.split == "train":
            path = Path(Store(store)._location(index, low_dose=False))
            kept[path] = path.read_bytes()
            damaged = bytearray(kept[path])
            middle = len(damaged) // 4
            damaged[middle : middle + 2000] = b"\xff" * 2000
            path.write_bytes(damaged)
    message = sentence(config)
    assert any(f"lidnet-fast: {path}: slice " in message for path in kept), message
    assert "can't be decoded" in message
    assert "Traceback" not in message
    for path, content in kept.items():
        path.write_bytes(content)
    train(config)


def test_weights_that_diverge_are_not_written(
    denoising: RunConfig, monkeypatch: pytest.MonkeyPatch, sentence: Says
) -> None:
    step = torch.optim.AdamW.step
    taken = 0

    def diverging(self, *args, **kwargs):
        nonlocal taken
        taken += 1
        if taken == 3:
            self.param_groups[0]["params"][0].grad.fill_(float("inf"))
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", diverging)
        message = sentence(denoising)
    assert "is NaN after step 3" in message
    assert_goes_on(denoising)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_the_run_as_an_interruption(
    denoising: RunConfig, monkeypatch: pytest.MonkeyPatch, sentence: Says, number: int
) -> None:
    with monkeypatch.context() as patch:
        at_step(2, lambda: os.kill(os.getpid(), number), patch)
        assert "resumes from what is finished" in sentence(denoising, status=130)
    assert_goes_on(denoising)


class Malicious:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def plain_pickle(content: object) -> bytes:
    return pickle.dumps(content, protocol=2)


def torch_zip(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def legacy_torch(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


@pytest.mark.parametrize("written", [plain_pickle, torch_zip, legacy_torch])
def test_pickles_are_not_executed(
    denoising: RunConfig,
    tmp_path: Path,
    sentence: Says,
    written: Callable[[object], bytes],
) -> None:
    made = tmp_path / "executed"
    content = written({"state_dict": {"weight": Malicious(made)}, "format": "lidnet_fast-network"})
    if written is not plain_pickle:  # the payload works
        torch.load(io.BytesIO(content), weights_only=False)
        assert made.exists()
        made.unlink()
    folder = Path(denoising.out) / "denoiser"
    Run(denoising)
    folder.mkdir()

    checkpoint = folder / "last.ckpt"
    checkpoint.write_bytes(content)
    message = sentence(denoising)
    assert f"{checkpoint} is not a readable checkpoint (UnpicklingError): delete it to start its phase again" in message
    checkpoint.unlink()

    network = folder / "denoiser.pt"
    network.write_bytes(content)
    assert f"{network} is not a readable checkpoint (UnpicklingError)" in sentence(denoising)

    weights = tmp_path / "squeezenet.pt"
    weights.write_bytes(content)
    with pytest.raises(ValueError, match=f"{weights} is not a readable state dict"):
        load_extractor("squeezenet1_1", weights)
    assert not made.exists()


def nan_weights(content: bytes) -> bytes:
    checkpoint = torch.load(io.BytesIO(content), weights_only=True)
    next(iter(checkpoint["state_dict"].values())).fill_(float("nan"))
    return torch_zip(checkpoint)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda content: content[: len(content) // 2], "is not a readable checkpoint"),
        (lambda content: b"", "is not a readable checkpoint"),
        (lambda content: torch_zip([1, 2]), "is not a readable checkpoint"),
        (nan_weights, "is NaN"),
    ],
    ids=["half", "empty", "other", "nan"],
)
def test_damaged_checkpoint(
    denoising: RunConfig,
    monkeypatch: pytest.MonkeyPatch,
    sentence: Says,
    damage: Callable[[bytes], bytes],
    says: str,
) -> None:
    with monkeypatch.context() as patch:
        at_step(2, lambda: os.kill(os.getpid(), signal.SIGINT), patch)
        sentence(denoising, status=130)
    checkpoint = last_checkpoint(denoising)
    damaged = damage(checkpoint.read_bytes())
    checkpoint.write_bytes(damaged)
    message = sentence(denoising)
    assert says in message
    assert str(checkpoint) in message
    assert message.endswith("delete it to start its phase again\n")
    assert checkpoint.read_bytes() == damaged
