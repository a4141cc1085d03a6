"""Trained networks as files: weights with what is needed to rebuild the network, loaded without running any code."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from lidnet_fast import __version__
from lidnet_fast.errors import InputError
from lidnet_fast.files import write_bytes
from lidnet_fast.models.denoisers import build_denoiser
from lidnet_fast.models.detectors import LesionDetector, build_detector
from lidnet_fast.models.hu import HUDenoiser
from lidnet_fast.models.windowing import HUWindow
from lidnet_fast.trainer.checkpoints import diverged_weights, serialised
from lidnet_fast.trainer.config import NetworkConfig

FORMAT = "lidnet_fast-network"
Kind = Literal["denoiser", "detector"]


def save_network(
    path: Path, kind: Kind, network: nn.Module, config: NetworkConfig, window: HUWindow, trained: dict[str, Any]
) -> None:
    """Write a network to `path` (under a temporary name, then renamed).

    Args:
        path: the file to make.
        kind: "denoiser" or "detector".
        network: its weights are taken as they are.
        config: how `network` was built.
        window: the HU window it works in.
        trained: the run's configuration in plain types, kept for the record.
    """
    content = {
        "format": FORMAT,
        "version": 1,
        "software": __version__,
        "kind": kind,
        "network": asdict(config),
        "window": {"low": window.low, "high": window.high},
        "trained": trained,
        "state_dict": network.state_dict(),
    }
    write_bytes(path, serialised(content))


def load_network(path: Path, kind: Kind, expected: NetworkConfig | None = None) -> tuple[nn.Module, HUWindow]:
    """Rebuild a network, in eval mode.

    Args:
        path: a file made by `save_network`.
        kind: what it must be.
        expected: refuse a file of another network than this.

    Returns:
        The network and the HU window that it works in.

    Raises:
        InputError: the file is missing, damaged, of another kind or of another network; the message says which.
    """
    if not path.is_file():
        raise InputError(f"there is no checkpoint {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever its zip and pickle readers do
        raise InputError(f"{path} is not a readable checkpoint ({type(error).__name__})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"{path} is not a {FORMAT} file")
    if content["kind"] != kind:
        raise InputError(f"{path} holds a {content['kind']}, not a {kind}")
    config = NetworkConfig(**content["network"])
    if expected is not None and config != expected:
        raise InputError(
            f"{path} holds {kind} {config.name} {config.options}, "
            f"but the configuration asks for {expected.name} {expected.options}"
        )
    network = build_network(kind, without_weights(config))
    try:
        network.load_state_dict(content["state_dict"])
    except RuntimeError as error:
        raise InputError(f"{path}: its weights do not fit {kind} {config.name} {config.options}") from error
    diverged = diverged_weights(network.state_dict())
    if diverged is not None:
        raise InputError(f"{path}: {diverged} is NaN")
    return network.eval(), HUWindow(**content["window"])


def build_network(kind: Kind, config: NetworkConfig) -> nn.Module:
    """A new denoiser or detector, channels last; its initial weights come from torch's global generator."""
    build = build_denoiser if kind == "denoiser" else build_detector
    return build(config.name, **config.options).to(memory_format=torch.channels_last)


def without_weights(config: NetworkConfig) -> NetworkConfig:
    """The same network with random weights: nothing is fetched to build it."""
    return replace(config, options={k: v for k, v in config.options.items() if k != "weights"})


def load_denoiser(path: Path | str, expected: NetworkConfig | None = None) -> HUDenoiser:
    """A trained denoiser, HU in and HU out, in eval mode.

    Args:
        path: a `denoiser.pt` of a run.
        expected: refuse a file of another network than this.

    Raises:
        InputError: see `load_network`.
    """
    return HUDenoiser(*load_network(Path(path), "denoiser", expected)).eval()


def load_detector(path: Path, expected: NetworkConfig | None = None) -> LesionDetector:
    """`load_network` for a detector, frozen."""
    network, _ = load_network(path, "detector", expected)
    assert isinstance(network, LesionDetector)
    return network.requires_grad_(False)
