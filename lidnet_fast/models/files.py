"""Trained networks as files: weights with what is needed to rebuild the network.

Loading one runs no code but this package's, unless the caller trusts a class that the file names.
"""

import hashlib
import io
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lidnet_fast import __version__
from lidnet_fast.errors import InputError
from lidnet_fast.files import write_bytes
from lidnet_fast.models.denoisers import build_denoiser
from lidnet_fast.models.detectors import build_detector
from lidnet_fast.models.envelope import Envelope
from lidnet_fast.models.hu import HUDenoiser
from lidnet_fast.models.lesion_detector import LesionDetector
from lidnet_fast.models.onnx import OnnxDenoiser
from lidnet_fast.models.published import CONFIG, ONNX, WEIGHTS, is_published, read_published
from lidnet_fast.models.registry import NetworkConfig, is_import_path
from lidnet_fast.models.windowing import HUWindow
from lidnet_fast.neighbours import MOST_NEIGHBOURS

FORMAT = "lidnet_fast-network"
VERSION = 1
Kind = Literal["denoiser", "detector"]
WhichDetector = Literal["frozen", "cotrained"]
"""Of a run: the one trained on normal dose and then left as it was, or the one that went on with the denoiser."""


def save_network(
    path: Path,
    kind: Kind,
    network: nn.Module,
    config: NetworkConfig,
    window: HUWindow,
    trained: dict[str, Any],
    envelope: Envelope | None = None,
    context: int = 0,
) -> None:
    """Write a network to `path` (under a temporary name, then renamed).

    Args:
        path: the file to make.
        kind: "denoiser" or "detector".
        network: its weights are taken as they are.
        config: how `network` was built.
        window: the HU window it works in.
        trained: the run's configuration in plain types, kept for the record.
        envelope: what it was trained on; None where that wasn't measured.
        context: neighbouring slices on each side that it sees.
    """
    content = {
        "format": FORMAT,
        "version": VERSION,
        "software": __version__,
        "kind": kind,
        "network": asdict(config),
        "window": {"low": window.low, "high": window.high},
        "context": context,
        "trained": trained,
        "envelope": None if envelope is None else envelope.to_dict(),
        "state_dict": network.state_dict(),
    }
    write_bytes(path, serialised(content))


def save_denoiser(path: Path | str, denoiser: HUDenoiser, config: NetworkConfig) -> None:
    """Write a denoiser that you trained yourself, for `load_denoiser`, `lidnet-fast denoise` and the other commands.

    Args:
        path: the file to make, or to make again.
        denoiser: the network and its HU window.
        config: how the network is built: a name of this package ("unet", "redcnn"), or the import path of its class
            ("my_package.RedCNN"), and the keyword arguments. A class of yours is loaded with `trust_code`.

    Raises:
        InputError: `config` makes another network than the denoiser's.
    """
    made = build_network("denoiser", without_weights(config), denoiser.context).state_dict()
    has = denoiser.network.state_dict()
    if {name: x.shape for name, x in made.items()} != {name: x.shape for name, x in has.items()}:
        raise InputError(
            f"config must be how the denoiser's network was built, but {config.name} {config.options} makes other "
            f"weights. To fix: NetworkConfig(name or import path of {type(denoiser.network).__name__}, its arguments)"
        )
    save_network(
        Path(path), "denoiser", denoiser.network, config, denoiser.window, {}, denoiser.envelope, denoiser.context
    )


def load_network(
    path: Path,
    kind: Kind,
    expected: NetworkConfig | None = None,
    *,
    context: int | None = None,
    trust_code: bool = False,
) -> tuple[nn.Module, HUWindow]:
    """Rebuild a network, in eval mode.

    Args:
        path: a file made by `save_network`, or a published folder.
        kind: what it must be.
        expected: refuse a file of another network than this.
        context: refuse a file of a network that sees another number of neighbouring slices on each side.
        trust_code: let the file name a class by import path. The module it names is imported, which runs its code.
            `expected` names the class too, and is trusted as the caller's word.

    Returns:
        The network and the HU window that it works in.

    Raises:
        InputError: the file is missing, damaged, of another kind, network or context, or names code that wasn't
            trusted; the message says which.
    """
    network, window, *_ = _rebuild(path, kind, expected, context, trust_code)
    return network, window


def _rebuild(
    path: Path, kind: Kind, expected: NetworkConfig | None, context: int | None, trust_code: bool
) -> tuple[nn.Module, HUWindow, Envelope | None, int]:
    content = read_network(path, kind)
    config = NetworkConfig(content["network"]["name"], content["network"]["options"])
    if expected is not None and config != expected:
        raise InputError(
            f"{path} holds {kind} {config.name} {config.options}, "
            f"but the configuration asks for {expected.name} {expected.options}"
        )
    seen = content.get("context", 0)  # files of before there was a context
    _check_context(path, kind, seen, context)
    if expected is None and not trust_code:
        refuse_foreign_code(path, config)
    network = build_network(kind, without_weights(config), seen)
    try:
        network.load_state_dict(content["state_dict"])
    except (RuntimeError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: its weights do not fit {kind} {config.name} {config.options}") from error
    diverged = diverged_weights(network.state_dict())
    if diverged is not None:
        raise InputError(f"{path}: {diverged} is NaN")
    return network.eval(), HUWindow(**content["window"]), _envelope(path, content), seen


def _check_context(path: Path, kind: Kind, seen: int, needed: int | None) -> None:
    if needed is not None and seen != needed:
        raise InputError(
            f"{path} holds a {kind} of context {seen}, which sees {2 * seen + 1} slices, but one of context {needed} "
            "is needed. To fix: use it where data.context and data.denoiser_context are those that it was trained with"
        )


def _envelope(path: Path, content: dict[str, Any]) -> Envelope | None:
    if content.get("envelope") is None:  # files of before there were envelopes, too
        return None
    try:
        return Envelope.from_dict(content["envelope"])
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def refuse_foreign_code(path: Path, *configs: NetworkConfig | None) -> None:
    """Refuse networks named by import path in a file that somebody else may have written.

    Args:
        path: the file, for the message.
        configs: the networks that it names.

    Raises:
        InputError: one of them isn't among lidnet_fast's own.
    """
    for config in configs:
        if config is not None and is_import_path(config.name):
            raise InputError(
                f"{path} names the class {config.name!r}, whose code would run. To fix: if you trust the file and that "
                "code, give --trust-code (in Python trust_code=True)"
            )


# Key of a network file -> its type; those of "network" and "window" behind a dot.
_ENTRIES: dict[str, type | tuple[type, ...]] = {
    "version": int,
    "kind": str,
    "network": dict,
    "network.name": str,
    "network.options": dict,
    "window": dict,
    "window.low": (int, float),
    "window.high": (int, float),
    "state_dict": dict,
}


def read_network(path: Path, kind: Kind) -> dict[str, Any]:
    """The checked content of a network's file, or of a published folder: what `save_network` wrote.

    Raises:
        InputError: as `load_network`.
    """
    content = read_published(path) if is_published(path) else _unpickled(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"{path} is not a {FORMAT} file")
    for key, kinds in _ENTRIES.items():
        group, _, name = key.rpartition(".")
        entries = content[group] if group else content
        if name not in entries:
            raise InputError(f"{path}: its {key} is missing")
        value = entries[name]
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise InputError(f"{path}: its {key} can't be {value!r}"[:300])
    for group in ("network", "window"):
        unknown = [key for key in content[group] if f"{group}.{key}" not in _ENTRIES]
        if unknown:
            raise InputError(f"{path}: its {group} has an unknown entry {unknown[0]!r}")
    if not all(isinstance(name, str) for name in content["network"]["options"]):
        raise InputError(f"{path}: its network.options must be named by strings")
    context = content.get("context", 0)
    if type(context) is not int or not 0 <= context <= MOST_NEIGHBOURS:
        raise InputError(f"{path}: its context can't be {context!r}"[:300])
    if content["version"] != VERSION:
        raise InputError(f"{path} has version {content['version']}; this lidnet_fast reads version {VERSION}")
    if content["kind"] != kind:
        raise InputError(f"{path} holds a {content['kind']}, not a {kind}")
    return content


def _unpickled(path: Path) -> Any:
    if not path.is_file():
        raise InputError(f"there is no checkpoint {path}. To fix: give the folder of a finished run, or a model file")
    if path.suffix == ".safetensors":
        raise InputError(f"{path} holds weights alone. To fix: give the folder that `lidnet-fast publish` made")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever its zip and pickle readers do
        raise InputError(f"{path} is not a readable checkpoint ({type(error).__name__})") from error


def build_network(kind: Kind, config: NetworkConfig, context: int = 0) -> nn.Module:
    """A new denoiser or detector, channels last; its initial weights come from torch's global generator.

    Raises:
        InputError: as `build_denoiser` and `build_detector`, and for an option named context.
    """
    if "context" in config.options:
        raise InputError(f"{kind} option context: set data.context, and data.denoiser_context, instead")
    build = build_denoiser if kind == "denoiser" else build_detector
    return build(config.name, context=context, **config.options).to(memory_format=torch.channels_last)


def without_weights(config: NetworkConfig) -> NetworkConfig:
    """The same network with random weights: nothing is fetched to build it."""
    return replace(config, options={k: v for k, v in config.options.items() if k != "weights"})


def load_denoiser(
    path: Path | str,
    expected: NetworkConfig | None = None,
    *,
    context: int | None = None,
    trust_code: bool = False,
) -> HUDenoiser:
    """A trained denoiser, HU in and HU out, in eval mode and frozen.

    Args:
        path: the folder of a run, a `denoiser.pt`, or what `lidnet-fast publish` made: the folder or its `model.onnx`.
        expected: as in `load_network`; ONNX doesn't say what network it was.
        context: as in `load_network`.
        trust_code: as in `load_network`; ONNX needs no code.

    Raises:
        InputError: see `load_network`.
    """
    file = denoiser_file(path)
    if file.suffix == ".onnx":
        made = OnnxDenoiser(file).eval()
        _check_context(file, "denoiser", made.context, context)
        return made
    rebuilt = _rebuild(file, "denoiser", expected, context, trust_code)
    return HUDenoiser(*rebuilt).eval().requires_grad_(False)


def denoiser_file(path: Path | str) -> Path:
    """The file of a trained denoiser; of a run's folder, that of its last phase; a published folder itself."""
    path = Path(path)
    return path / "collaborate" / "denoiser.pt" if path.is_dir() and not is_published(path) else path


def load_detector(path: Path, expected: NetworkConfig | None = None, *, context: int | None = None) -> LesionDetector:
    """`load_network` for a detector, frozen."""
    network, _ = load_network(path, "detector", expected, context=context)
    assert isinstance(network, LesionDetector)
    return network.requires_grad_(False)


@dataclass(frozen=True)
class TrainedDetector:
    """A detector with what its file says of it.

    Attributes:
        network: in eval mode and frozen.
        window: the HU window that it works in.
        crop: side of the fields of view that it was trained on, in pixels; None for whole slices.
        envelope: what it was trained on; None where that is unknown.
    """

    network: LesionDetector
    window: HUWindow
    crop: int | None
    envelope: Envelope | None


def load_trained_detector(path: Path) -> TrainedDetector:
    """A detector, and what it was trained on.

    Raises:
        InputError: see `load_network`.
    """
    network, window, envelope, _ = _rebuild(path, "detector", None, None, trust_code=False)
    assert isinstance(network, LesionDetector)
    trained = read_network(path, "detector").get("trained")
    data = trained.get("data") if isinstance(trained, dict) else None
    crop = data.get("crop") if isinstance(data, dict) else None
    if crop is not None and not (type(crop) is int and crop >= 1):
        raise InputError(f"{path}: its trained.data.crop can't be {crop!r}"[:300])
    return TrainedDetector(network.requires_grad_(False), window, crop, envelope)


def detector_file(path: Path | str, which: WhichDetector) -> Path:
    """The file of a trained detector: of a run's folder, the one asked for.

    Raises:
        InputError: the folder has none.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    file = path / ("detector" if which == "frozen" else "collaborate") / "detector.pt"
    if not file.is_file():
        raise InputError(
            f"{file}: there is no {which} detector. To fix: give the folder of a finished run, or a detector.pt"
        )
    return file


def serialised(content: Any) -> memoryview:
    """What `torch.save` writes, in memory: its own writer turns a full disk into errors of its file format."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getbuffer()


def diverged_weights(state: dict[str, Any]) -> str | None:
    """The name of a tensor with NaN, if there is one; infinities may be a network's own, as in an attention mask."""
    for name, value in state.items():
        if isinstance(value, Tensor) and bool(value.isnan().any()):
            return name
    return None


def fingerprint(model: Path) -> str:
    """SHA-256 of a model's file, or of what says how a published folder denoises."""
    digest = hashlib.sha256()
    for file in [model / CONFIG, model / WEIGHTS] if model.is_dir() else [model]:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def model_name(file: Path) -> str:
    """What people call a model: the name of its run, of its published folder, or its own."""
    folder = file.resolve().parent
    if file.name == ONNX:
        return folder.name
    return folder.parent.name if folder.name in ("collaborate", "detector") else file.stem
