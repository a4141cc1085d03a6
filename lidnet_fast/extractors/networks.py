"""Networks by name, and their layers under the names that papers use."""

import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

__all__ = ["load_network", "network_and_layers", "node_names", "outline_network", "paper_names"]


def network_and_layers(name: str) -> tuple[str, list[str]]:
    """("vgg19", ["relu2_2", "relu3_4"]) of "vgg19:relu2_2,relu3_4".

    Raises:
        ValueError: Without a network or layers.
    """
    network, _, layers = name.partition(":")
    if not network or not layers:
        raise ValueError(f"must be NETWORK:LAYERS, such as vgg19:relu3_4, got {name!r}")
    return network, layers.split(",")


def load_network(name: str, weights: object = None) -> nn.Module:
    """One of torchvision's networks, in evaluation mode.

    Args:
        name: As torchvision.models.list_models gives them: "vgg19", "resnet18", ...
        weights: None for random ones, a torchvision weights enum or its name ("DEFAULT" and others are downloaded at
            the first use), or the path of a state dict.

    Raises:
        ValueError: For an unknown name or weights, or a state dict that isn't the network's.
        FileNotFoundError: If `weights` is a path that isn't there.
    """
    from torchvision.models import get_model

    _check_names(name, weights)
    if not _is_file(weights):
        return get_model(name, weights=weights).eval()
    path = Path(weights)  # type: ignore[arg-type]
    network = get_model(name, weights=None)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # torch.load raises whatever its zip and pickle readers do
        raise ValueError(f"{path} is not a readable state dict ({type(error).__name__})") from error
    try:
        network.load_state_dict(state)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{path} doesn't hold weights of {name}: {str(error).splitlines()[-1].strip()}") from error
    return network.eval()


def outline_network(name: str, weights: object = None) -> nn.Module:
    """What `load_network` would give, on the meta device: its layers without values, in no time and nothing fetched.

    Raises:
        ValueError: As `load_network`.
        FileNotFoundError: As `load_network`.
    """
    _check_names(name, weights)
    weights = weights if _is_file(weights) else None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*no-op")  # a file's values, once they are seen to fit
        try:
            with torch.device("meta"):
                return load_network(name, weights)
        except NotImplementedError:  # RegNet computes its widths by tensors
            return load_network(name, weights).to("meta")


def _check_names(name: str, weights: object) -> None:
    from torchvision.models import get_model_weights, list_models

    if name not in list_models():
        near = [known for known in list_models() if known.startswith(name[:3])]
        raise ValueError(f"torchvision has no network {name!r}; near it are {', '.join(near[:8]) or 'none'}")
    if isinstance(weights, str) and not _is_file(weights) and weights not in get_model_weights(name).__members__:
        known = ", ".join(weight.name for weight in get_model_weights(name))
        raise ValueError(f"{name} has no weights {weights!r}; it has {known}, or give a file")


def _is_file(weights: object) -> bool:
    """Whether weights are meant as a file, rather than by name."""
    if not isinstance(weights, str | Path):
        return False
    path = Path(weights)
    return bool(path.suffix) or path.exists() or len(path.parts) > 1


def node_names(network: nn.Module, layers: Iterable[str]) -> list[str]:
    """Names of the nodes behind layers, which may have the names of VGG's paper."""
    names = paper_names(network)
    return [names.get(layer, layer) for layer in layers]


def paper_names(network: nn.Module) -> dict[str, str]:
    """Layer -> node, of a VGG or of the first part of its `features`; the names are Simonyan and Zisserman's."""
    from torchvision.models import VGG

    if isinstance(network, VGG):
        return _vgg_names(network.features, "features.")
    kinds = (nn.Conv2d, nn.ReLU, nn.MaxPool2d, nn.BatchNorm2d)
    if not isinstance(network, nn.Sequential) or not all(isinstance(module, kinds) for module in network):
        return {}
    from_the_start = isinstance(network[0], nn.Conv2d) and network[0].in_channels in (1, 3)
    return _vgg_names(network, "") if from_the_start else {}


def _vgg_names(features: Iterable[nn.Module], prefix: str) -> dict[str, str]:
    names, block, number = {}, 1, 0
    for index, module in enumerate(features):
        node = f"{prefix}{index}"
        if isinstance(module, nn.Conv2d):
            number += 1
            names[f"conv{block}_{number}"] = node
        elif isinstance(module, nn.ReLU):
            names[f"relu{block}_{number}"] = node
        elif isinstance(module, nn.MaxPool2d):
            names[f"pool{block}"] = node
            block, number = block + 1, 0
    return names
