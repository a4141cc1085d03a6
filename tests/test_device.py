"""One answer to which device, and in which arithmetic, in every command."""

import re

import pytest
import torch

from lidnet_fast import device as device_module
from lidnet_fast.cli import main
from lidnet_fast.device import autocast, choose_device, choose_precision, computes_in_bfloat16
from lidnet_fast.errors import InputError

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("capabilities", "native"),
    [
        ({"architecture": "x86_64", "avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, False),
        ({"architecture": "x86_64", "avx512_bf16": True, "amx_bf16": False}, True),
        ({"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": True}, True),
        ({"architecture": "aarch64", "neon": True, "bf16": True}, True),
        ({"architecture": "aarch64", "neon": True, "bf16": False}, False),
        ({}, False),
    ],
)
def test_bfloat16_on_cpus(monkeypatch: pytest.MonkeyPatch, capabilities: dict, native: bool) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert computes_in_bfloat16(CPU) == native
    assert choose_precision("auto", CPU) == ("bfloat16" if native else "float32")
    assert choose_precision("float32", CPU) == "float32"
    assert choose_precision("bfloat16", CPU) == "bfloat16"


def test_pytorch_that_cannot_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch 2.10 has no torch.cpu.get_capabilities."""
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert choose_precision("auto", CPU) == "float32"


def test_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [choose_device(name).type for name in ("auto", "cpu", "cuda")] == ["cuda", "cpu", "cuda"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [choose_device(name).type for name in ("auto", "cpu")] == ["cpu", "cpu"]
    with pytest.raises(InputError, match=r"device is 'cuda', but PyTorch finds no GPU\. To fix: give --device cpu"):
        choose_device("cuda")


def test_autocast() -> None:
    convolution, image = torch.nn.Conv2d(1, 1, 1), torch.rand(1, 1, 4, 4)
    for precision, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        with autocast(CPU, precision):
            assert convolution(image).dtype == dtype


@pytest.mark.parametrize("command", ["train", "bench", "demo", "evaluate", "denoise"])
def test_every_command_takes_the_same_values(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    text = capsys.readouterr().out
    for option, values in (("device", device_module.Device), ("precision", device_module.Precision)):
        assert re.search(rf"--{option} {{{','.join(values.__args__)}}}", text), option
