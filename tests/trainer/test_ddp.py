"""Two processes (gloo) train what one process trains on the same batches, and end together."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from lidnet_fast import cli
from lidnet_fast.errors import InputError
from lidnet_fast.models.files import load_network
from lidnet_fast.trainer.config import RunConfig, to_dict
from lidnet_fast.trainer.run import Run, curves, train

CLI = [sys.executable, "-c", "from lidnet_fast.cli import main; main()"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]


@pytest.fixture
def batches_of_four(tiny_config: RunConfig) -> RunConfig:
    return replace(
        tiny_config,
        detector=replace(tiny_config.detector, batch_size=4),
        denoiser=replace(tiny_config.denoiser, batch_size=4),
        collaborate=replace(tiny_config.collaborate, batch_size=4, steps=6),
    )


def command(config: RunConfig, *, by: list[str], folder: Path, devices: int = 1) -> subprocess.CompletedProcess[str]:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(to_dict(replace(config, devices=devices))))
    return subprocess.run(
        [*by, "train", "--config", path],
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(cli.__file__).parents[2])},
    )


def network(config: RunConfig, phase: str, kind: str) -> dict[str, torch.Tensor]:
    return load_network(Path(config.out) / phase / f"{kind}.pt", kind, trust_code=True)[0].state_dict()  # type: ignore[arg-type]


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], statistics: bool = True) -> None:
    """To a tenth of a step's length, as AdamW's first steps are signs of gradients."""
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if statistics or not key.endswith(("running_mean", "running_var", "num_batches_tracked")):
            torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-4, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.slow
def test_two_processes_of_torchrun_are_one_with_the_same_batches(batches_of_four: RunConfig, tmp_path: Path) -> None:
    """One process takes every batch in the parts that two see: then all losses, and anchors, are the same."""
    two = replace(batches_of_four, out=str(tmp_path / "two"))
    done = command(two, by=[*TORCHRUN, *CLI], folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Trained networks") == 1

    one = replace(batches_of_four, micro_batch_size=2, out=str(tmp_path / "one"))
    run = Run(one)
    run.train_detector()
    run.train_denoiser()
    # BatchNorm's statistics are rank 0's in two processes, and those of all parts in one.
    assert_same(network(two, "detector", "detector"), network(one, "detector", "detector"), statistics=False)
    assert_same(network(two, "denoiser", "denoiser"), network(one, "denoiser", "denoiser"))
    shutil.rmtree(Path(one.out) / "detector")
    shutil.copytree(Path(two.out) / "detector", Path(one.out) / "detector")
    run.collaborate()
    for kind in ("denoiser", "detector"):
        assert_same(network(two, "collaborate", kind), network(one, "collaborate", kind))

    whole = replace(batches_of_four, out=str(tmp_path / "whole"))
    Run(whole).train_denoiser()
    assert_same(network(two, "denoiser", "denoiser"), network(whole, "denoiser", "denoiser"))
    quality = [curves(Path(c.out) / "denoiser")["val/psnr"] for c in (two, whole)]
    assert quality[0] == (quality[1][0], pytest.approx(quality[1][1], rel=1e-4))
    assert not list(Path(two.out).rglob("part1"))


FAULTY = '''
import os, signal
from pathlib import Path
from torch import nn
from lidnet_fast.errors import InputError
from lidnet_fast.models.denoisers import build_denoiser

class Faulty(nn.Module):
    """Fails at a step of a rank, as the file "fault" says."""

    def __init__(self):
        super().__init__()
        self.network, self.calls = build_denoiser("small", channels=8), 0

    def forward(self, images):
        if self.training and Path("fault").exists():
            self.calls += 1
            rank, call, what = Path("fault").read_text().split()
            if self.calls == int(call) and os.environ.get("RANK", "0") == rank:
                if what == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise InputError(f"a fault of rank {rank}")
        return self.network(images)
'''


@pytest.mark.slow
def test_a_run_goes_on_in_any_number_of_processes_and_all_end_with_one(
    batches_of_four: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One process fails at step 2; two go on until rank 1 fails at step 4; one ends the run as if nothing had been."""
    (tmp_path / "faulty.py").write_text(FAULTY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    config = replace(
        batches_of_four,
        out=str(tmp_path / "run"),
        denoiser=replace(batches_of_four.denoiser, name="faulty.Faulty", options={}, steps=6),
        detector=replace(batches_of_four.detector, steps=0),
        collaborate=replace(batches_of_four.collaborate, steps=0),
    )
    last = Path(config.out) / "denoiser" / "last.ckpt"
    Path("fault").write_text("0 3 raise")
    with pytest.raises(InputError, match="a fault of rank 0"):
        train(config)
    assert torch.load(last, weights_only=True)["global_step"] == 2

    Path("fault").write_text("1 3 raise")
    failed = command(config, by=CLI, folder=tmp_path, devices=2)
    assert failed.returncode == 2
    assert failed.stderr == "lidnet-fast: a fault of rank 1\n"
    assert "The denoiser phase resumes at step 2, its processes changed from 1 to 2:" in failed.stdout
    assert torch.load(last, weights_only=True)["global_step"] == 4

    Path("fault").write_text("1 1 kill")
    killed = command(config, by=CLI, folder=tmp_path, devices=2)
    assert killed.returncode == 2
    assert killed.stderr.count("\n") == 1
    assert "the process of rank 1 was ended by SIGKILL" in killed.stderr

    Path("fault").unlink()
    train(config)
    assert "its processes changed from 2 to 1:" in capsys.readouterr().out
    undisturbed = replace(config, out=str(tmp_path / "undisturbed"))
    train(undisturbed)
    assert_same(network(config, "denoiser", "denoiser"), network(undisturbed, "denoiser", "denoiser"))


def test_several_processes_need_torchrun(tiny_config: RunConfig) -> None:
    with pytest.raises(InputError, match=r"devices is 2 and num_nodes is 3, but this is the only process"):
        Run(replace(tiny_config, devices=2, num_nodes=3))
    assert not Path(tiny_config.out).exists()


def test_batches_that_cannot_be_shared_equally_are_refused(
    tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lidnet_fast.trainer.ranks.join", lambda config: config)
    with pytest.raises(InputError, match=r"detector.batch_size is 2, which 3 processes cannot share equally"):
        Run(replace(tiny_config, devices=3))


def test_other_commands_refuse_torchrun(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="2"):
        cli.main(["demo"])
    assert capsys.readouterr().err == ("lidnet-fast: demo runs in one process; only train runs under torchrun\n")
