"""A denoiser as a folder that model hubs read: `config.json`, and weights as safetensors, never a pickle."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from lidnet_fast.errors import InputError
from lidnet_fast.files import write_text

CONFIG, WEIGHTS, ONNX = "config.json", "model.safetensors", "model.onnx"


def is_published(path: Path) -> bool:
    """Whether this is such a folder."""
    return (path / CONFIG).is_file()


def write_published(folder: Path, content: Mapping[str, Any]) -> None:
    """Write a network file's content as `config.json` and `model.safetensors`.

    Args:
        folder: where to.
        content: as `save_network` writes it.

    Raises:
        InputError: the network's options aren't plain values.
    """
    config = {name: value for name, value in content.items() if name != "state_dict"}
    try:
        text = json.dumps(config, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"the network's configuration can't become JSON: {error}") from error
    # Tensors that share memory, or lie in another order, are written out one by one.
    weights = {name: value.clone().contiguous() for name, value in content["state_dict"].items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    write_text(folder / CONFIG, text)


def read_published(folder: Path) -> dict[str, Any]:
    """The inverse of `write_published`; what it holds is for the caller to check.

    Raises:
        InputError: a file is missing or damaged.
    """
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("is no group of keys")
    except (ValueError, RecursionError) as error:
        raise InputError(f"{folder / CONFIG}: can't be read: {error}") from error
    return {**config, "state_dict": _weights(folder / WEIGHTS)}


def _weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise InputError(f"there is no {path}")
    try:
        return load(path.read_bytes())
    except (SafetensorError, ValueError, KeyError) as error:
        raise InputError(f"{path}: is no readable safetensors file: {error}"[:300]) from error
