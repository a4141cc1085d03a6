"""Code that lies in the working directory or that a file names runs only where the user asks for it."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
import torch
import yaml

from lidnet_fast.errors import InputError
from lidnet_fast.evaluation.evaluate import read_config
from lidnet_fast.models.denoisers import build_denoiser
from lidnet_fast.models.files import build_network, load_denoiser, save_network
from lidnet_fast.models.registry import NetworkConfig
from lidnet_fast.models.windowing import HUWindow
from lidnet_fast.trainer.config import RunConfig, to_dict

SMALL = NetworkConfig("small", {"channels": 4})
MODULE = """
from pathlib import Path
from torch import nn
Path(__file__).with_suffix(".ran").touch()
class Net(nn.Conv2d):
    def __init__(self):
        super().__init__(1, 1, 1)
"""
# What the commands import, and names that the standard library and the extension modules look for.
SHADOWS = ("pydicom", "SimpleITK", "gdcm", "scipy", "fsspec", "lightning", "queue", "dl", "zarr", "yaml", "numpy")


def run(arguments: list[str | Path], cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the installed command in a process of its own, as a user does."""
    command = [Path(sys.executable).with_name("lidnet-fast"), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=os.environ)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "denoiser.pt"
    save_network(path, "denoiser", build_network("denoiser", SMALL), SMALL, HUWindow(), {})
    return path


@pytest.fixture
def foreign(model: Path) -> Path:
    """A model file whose network is a class of the module `foreign_net`."""
    content = torch.load(model, weights_only=True)
    content["network"] = {"name": "foreign_net:Net", "options": {}}
    content["state_dict"] = {"weight": torch.ones(1, 1, 1, 1), "bias": torch.zeros(1)}
    path = model.with_name("foreign.pt")
    torch.save(content, path)
    return path


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    """A folder that holds one volume, and beside it a module for every name that might be imported from there."""
    folder = tmp_path / "studies"
    folder.mkdir()
    hu = np.linspace(-1000, 400, 2 * 32 * 32).astype(np.int16).reshape(2, 32, 32)
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(hu), folder / "ct.nii.gz")
    for name in SHADOWS:
        (folder / f"{name}.py").write_text(f"open({str(tmp_path / 'shadow.ran')!r}, 'w')\nraise SystemExit(7)\n")
    (folder / "foreign_net.py").write_text(MODULE)
    return folder


def test_modules_in_the_working_directory_replace_none(scan: Path, model: Path, tmp_path: Path) -> None:
    """Every command that used to look there first; those that fail for another reason fail in one line."""
    for arguments, status in (
        (["denoise", "ct.nii.gz", "out", "--model", model], 0),
        (["prepare", ".", "--out", "store", "--boxes", "nowhere.csv"], 2),
        (["evaluate", "nowhere"], 2),
    ):
        done = run(arguments, scan)
        assert done.returncode == status, (arguments, done.stderr)
        assert not (tmp_path / "shadow.ran").exists(), arguments
        assert "Traceback" not in done.stderr


def test_processes_that_a_command_starts_look_there_neither(tmp_path: Path) -> None:
    """Python puts the working directory first for `-c`, by which processes of a run and of a pool are started.

    Those that whoever called `main` starts afterwards look where they would.
    """
    (tmp_path / "wave.py").write_text("raise SystemExit(7)")
    program = (
        "import subprocess, sys; from lidnet_fast import cli; start = [sys.executable, '-c', 'import wave']; "
        "cli.COMMANDS['info'] = lambda _: subprocess.run(start, check=True); cli.main(['info']); "
        "sys.exit(subprocess.run(start).returncode)"
    )
    assert subprocess.run([sys.executable, "-P", "-c", program], cwd=tmp_path).returncode == 7


def test_a_model_file_runs_no_code_unless_trusted(scan: Path, foreign: Path, tmp_path: Path) -> None:
    ran = scan / "foreign_net.ran"
    refused = run(["denoise", "ct.nii.gz", "out", "--model", foreign], scan)
    assert refused.returncode == 2
    assert "foreign_net:Net" in refused.stderr
    assert "--trust-code" in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert not ran.exists()
    trusted = run(["denoise", "ct.nii.gz", "out", "--model", foreign, "--trust-code"], scan)
    assert trusted.returncode == 0, trusted.stderr
    assert ran.exists()
    assert not (tmp_path / "shadow.ran").exists()


def test_python_callers_trust_by_word_or_by_name(scan: Path, foreign: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(scan)
    path_before = list(sys.path)
    with pytest.raises(InputError, match=r"foreign_net:Net.*trust_code=True"):
        load_denoiser(foreign)
    assert not (scan / "foreign_net.ran").exists()
    with pytest.raises(InputError, match="asks for small"):
        load_denoiser(foreign, SMALL)
    load_denoiser(foreign, NetworkConfig("foreign_net:Net"))
    (scan / "foreign_net.ran").unlink()
    monkeypatch.delitem(sys.modules, "foreign_net")
    load_denoiser(foreign, trust_code=True)
    assert (scan / "foreign_net.ran").exists()
    assert sys.path == path_before
    monkeypatch.delitem(sys.modules, "foreign_net")


def test_a_users_own_network_is_found_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_here.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    assert type(build_denoiser("mine_here.Net")).__name__ == "Net"
    monkeypatch.delitem(sys.modules, "mine_here")
    (tmp_path / "json.py").write_text("raise SystemExit(7)")  # an installed module of the name comes first
    monkeypatch.delitem(sys.modules, "json", raising=False)
    with pytest.raises(InputError, match="module 'json' has no 'Net'"):
        build_denoiser("json.Net")


OWN = """
from torch import nn
class RedCNN(nn.Module):
    def __init__(self, kernel):
        super().__init__()
        self.layer = nn.Conv2d(1, 1, kernel, padding=kernel // 2)
    def forward(self, images):
        return images + self.layer(images)
"""
SAVING = """
from lidnet_fast.inference import HUDenoiser, save_denoiser
from lidnet_fast.models import HUWindow, NetworkConfig
from my_package import RedCNN
save_denoiser("mine.pt", HUDenoiser(RedCNN(5), HUWindow()), NetworkConfig("my_package.RedCNN", {"kernel": 5}))
"""


@pytest.mark.slow
def test_what_a_user_saved_is_read_in_a_fresh_process(scan: Path) -> None:
    (scan / "my_package.py").write_text(OWN)
    (scan / "save.py").write_text(SAVING)
    for name in SHADOWS:  # of a script's folder, which Python searches first
        (scan / f"{name}.py").unlink()
    saved = subprocess.run([sys.executable, "save.py"], cwd=scan, capture_output=True, text=True)
    assert saved.returncode == 0, saved.stderr
    refused = run(["denoise", "ct.nii.gz", "out", "--model", "mine.pt"], scan)
    assert refused.returncode == 2, refused.stderr
    assert "trust" in refused.stderr
    assert not (scan / "out").exists()
    done = run(["denoise", "ct.nii.gz", "out", "--model", "mine.pt", "--trust-code"], scan)
    assert done.returncode == 0, done.stderr
    assert SimpleITK.ReadImage(scan / "out" / "ct.nii.gz").GetSize() == (32, 32, 2)


def test_a_run_s_configuration_names_no_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "evil.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "config.yaml"
    config = to_dict(RunConfig(out="run"))
    for place in ("denoiser", "collaborate", "window"):
        path.write_text(yaml.safe_dump({**config, place: {"class_path": "evil.Net", "init_args": {}}}))
        with pytest.raises(InputError, match=r"config.yaml: a run's configuration has no class_path, got 'evil.Net'"):
            read_config(path)
    path.write_text(yaml.safe_dump({**config, "denoiser": {"name": "evil.Net", "options": {}}}))
    with pytest.raises(InputError, match=r"config.yaml names the class 'evil.Net'.*--trust-code"):
        read_config(path)
    assert read_config(path, trust_code=True).denoiser.name == "evil.Net"
    assert not (tmp_path / "evil.ran").exists()


def test_a_run_s_configuration_has_no_aliases(tmp_path: Path) -> None:
    """A few lines of nested aliases stand for 10^9 values; one anchor may even hold itself."""
    path = tmp_path / "config.yaml"
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 10)}]" for k in range(1, 10)]
    for text in ("\n".join(levels), "&a {out: *a}"):
        path.write_text(text)
        with pytest.raises(InputError, match=r"config.yaml is not the configuration of a run: it has an alias"):
            read_config(path)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("kind", None, "its kind can't be None"),
        ("version", 2, "has version 2; this lidnet_fast reads version 1"),
        ("version", "1", "its version can't be '1'"),
        ("network", [], r"its network can't be \[\]"),
        ("network", {"name": "small"}, "its network.options is missing"),
        ("network", {"name": 3, "options": {}}, "its network.name can't be 3"),
        ("network", {"name": "small", "options": {3: 4}}, "must be named by strings"),
        ("network", {"name": "small", "options": {}, "device": "x"}, "its network has an unknown entry 'device'"),
        ("network", {"name": "small", "options": {"channels": "x"}}, "denoiser 'small'"),
        ("window", {"low": 5}, "its window.high is missing"),
        ("window", {"low": True, "high": 4}, "its window.low can't be True"),
        ("window", {"low": 5.0, "high": 4.0}, "low must be below high"),
        ("state_dict", None, "its state_dict can't be None"),
        ("state_dict", {"tail.weight": 3}, "its weights do not fit"),
        ("state_dict", {3: torch.ones(1)}, "its weights do not fit"),
    ],
)
def test_every_entry_of_a_model_file_is_checked(model: Path, key: str, value: object, said: str) -> None:
    content = torch.load(model, weights_only=True)
    for damaged in ({**content, key: value}, {name: entry for name, entry in content.items() if name != key}):
        torch.save(damaged, model)
        with pytest.raises(InputError, match=said if key in damaged else f"its {key} is missing"):
            load_denoiser(model)
