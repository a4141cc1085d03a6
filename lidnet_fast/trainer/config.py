"""The run's configuration: nested dataclasses, one YAML file, every value overridable on the command line.

Images are windowed before they reach a network: `window.low` HU becomes 0 and `window.high` HU becomes 1, so losses are
in units of the window. The paper (arXiv:2104.08845) does not publish its weights, layer, RoI size or lengths: all of
them are configuration here, and the defaults are ours.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeVar, get_args

from jsonargparse import ArgumentParser

from lidnet_fast import backend
from lidnet_fast.device import Device, Precision
from lidnet_fast.errors import InputError
from lidnet_fast.functional import check_term_weights
from lidnet_fast.functional.pixel_losses import SMALLEST_SIDE
from lidnet_fast.models.registry import NetworkConfig
from lidnet_fast.models.windowing import HUWindow
from lidnet_fast.multitask import check_weighting
from lidnet_fast.neighbours import MOST_NEIGHBOURS
from lidnet_fast.urls import is_url, without_secrets

T = TypeVar("T")
LoggerName = Literal["csv", "tensorboard", "wandb", "mlflow"]
_Rule = dict[str, tuple[str, Callable[[float], bool]]]


def _must(words: str, holds: Callable[[float], bool]) -> _Rule:
    """The metadata of a field whose number has to keep a rule; null needs no rule."""
    return {"must": (words, holds)}


_AT_LEAST_1 = _must("be at least 1", lambda value: value >= 1)
_NOT_NEGATIVE = _must("be finite and not negative", lambda value: 0 <= value < math.inf)
_ABOVE_0 = _must("be finite and above 0", lambda value: 0 < value < math.inf)
_FRACTION = _must("lie in [0, 1]", lambda value: 0 <= value <= 1)
_DECAY = _must("lie in [0, 1)", lambda value: 0 <= value < 1)


@dataclass(frozen=True)
class _Checked:
    """A group of the configuration, which refuses values that can't work; the rules stand at the fields.

    It is a dataclass itself, or jsonargparse would look for subclasses of the groups.

    Raises:
        InputError: names the key within the group and its value.
    """

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            if "must" in entry.metadata and value is not None:
                words, holds = entry.metadata["must"]
                if not holds(value):
                    raise InputError(f"{entry.name} must {words}, got {value}")


@dataclass(frozen=True)
class DataConfig(_Checked):
    """Where samples come from and what a sample is."""

    store: str = ""
    """Folder made by `lidnet-fast prepare`; or, with Zarr volumes, the URL that it was copied to."""
    crop: int | None = field(default=256, metadata=_AT_LEAST_1)
    """Side of the square field of view in pixels, for training and evaluation alike; null for whole slices."""
    positive_fraction: float = field(default=0.85, metadata=_FRACTION)
    """Fraction of samples centred near a lesion; the rest is drawn from all slices."""
    augment: bool = True
    """Random flips of the training samples."""
    context: int = field(default=0, metadata=_must(f"lie in 0..{MOST_NEIGHBOURS}", lambda k: 0 <= k <= MOST_NEIGHBOURS))
    """Neighbouring slices on each side that the detectors see as channels; beyond a series' ends they are repeated."""
    denoiser_context: bool = False
    """Whether the denoiser sees as many neighbouring slices; otherwise it denoises each slice by itself."""
    workers: int = field(default=0, metadata=_NOT_NEGATIVE)
    """Loader processes; 0 reads in the training process."""
    noise_map_cache_mib: int = field(default=512, metadata=_NOT_NEGATIVE)
    """Bound in MiB on the cache of what the noise of a slice follows from (simulated low dose only), per process."""

    def context_of(self, kind: Literal["denoiser", "detector"]) -> int:
        """Neighbouring slices on each side that a network of this kind sees."""
        return 0 if kind == "denoiser" and not self.denoiser_context else self.context


@dataclass(frozen=True)
class PhaseConfig(_Checked, NetworkConfig):
    """A network, and the phase that trains it by itself."""

    steps: int = field(default=20000, metadata=_NOT_NEGATIVE)
    """Length of the phase, in batches."""
    batch_size: int = field(default=8, metadata=_AT_LEAST_1)
    """Samples of a step, shared out equally among the run's processes."""
    learning_rate: float = field(default=5e-4, metadata=_NOT_NEGATIVE)
    """Largest learning rate: the first twentieth of the steps rises to it, the others fall to 0 along a cosine."""
    weight_decay: float = field(default=0.0, metadata=_NOT_NEGATIVE)
    """Weight decay of AdamW."""
    clip_norm: float | None = field(default=None, metadata=_ABOVE_0)
    """Largest norm of a step's gradient: a longer one is shortened to it. null for no bound."""

    @property
    def network(self) -> NetworkConfig:
        """The network alone, as it is stored with its weights."""
        return NetworkConfig(self.name, self.options)


@dataclass(frozen=True)
class DenoiserConfig(PhaseConfig):
    """The denoiser, and the phase that warms it up with the pixel terms."""

    name: str = "unet"
    """redcnn, unet, small, or the import path of a class, such as my_package.my_module.MyDenoiser."""


@dataclass(frozen=True)
class DetectorConfig(PhaseConfig):
    """The detector, and the phase that trains it on normal dose; a frozen copy is the judge of the evaluation."""

    name: str = "faster_rcnn_resnet18_fpn"
    """faster_rcnn_ or retinanet_, then resnet18_fpn, resnet50_fpn or small."""
    weight_decay: float = field(default=1e-4, metadata=_NOT_NEGATIVE)
    """Weight decay of AdamW."""
    clip_norm: float | None = field(default=5.0, metadata=_ABOVE_0)
    """Largest norm of a step's gradient: a longer one is shortened to it. null for no bound."""


@dataclass(frozen=True)
class ObjectiveConfig(_Checked):
    """The joint objective of a denoiser step.

    pixel terms + perceptual * (feature loss on whole maps) + roi_perceptual * (ROI perceptual loss) + detection *
    (detection loss on the denoised image). Feature losses are divided by the variance of the normal-dose features, so
    that a weight means the same at every level and for every detector. The defaults were chosen on phantoms
    (docs/evidence.md).
    """

    pixel: dict[str, float] = field(default_factory=lambda: {"mse": 1.0})
    """Weights of `lidnet_fast.multi_loss` terms."""
    roi_weight: float = field(default=12.0, metadata=_ABOVE_0)
    """Weight of pixels inside lesion boxes in the terms mse, l1 and charbonnier; 1 is the plain mean."""
    perceptual: float = field(default=0.0, metadata=_NOT_NEGATIVE)
    """Weight of the mean square difference of the detector's whole feature maps."""
    roi_perceptual: float = field(default=3e-3, metadata=_NOT_NEGATIVE)
    """Weight of the ROI perceptual loss of the detector's features."""
    detection: float = field(default=3e-4, metadata=_NOT_NEGATIVE)
    """Weight of the detector's own loss on the denoised image."""
    regions: Literal["boxes", "proposals", "both"] = "both"
    """Where the ROI perceptual loss looks: ground-truth boxes, the detector's proposals on normal dose, or both."""
    grow: float = field(default=2.0, metadata=_NOT_NEGATIVE)
    """Pixels added on each side of a region."""
    levels: int = field(default=2, metadata=_AT_LEAST_1)
    """How many of the detector's feature levels are compared, from the finest."""
    roi_size: int = field(default=7, metadata=_AT_LEAST_1)
    """Bins that RoIAlign pools a region into, along each side."""
    proposal_score: float = 0.3
    """Proposals scoring less than this are not regions; the others count with their score as weight."""
    proposals_per_image: int = field(default=8, metadata=_NOT_NEGATIVE)
    """Most proposals of an image that are regions, the best first."""
    roi_extractor: float = field(default=0.0, metadata=_NOT_NEGATIVE)
    """Weight of an ROI perceptual loss, over the same regions, of another network's features: their mean square
    difference as it is."""
    extractor: str = "vgg19:relu3_4"
    """That network of torchvision's and its layer, or layers with commas between."""
    extractor_weights: str | None = None
    """Its weights: a state dict, the name of torchvision's ("DEFAULT" downloads them); without any they are
    random, which `train` warns of."""

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            check_term_weights(self.pixel)
        except ValueError as error:
            raise InputError(f"pixel: {error}") from error


@dataclass(frozen=True)
class CollaborateConfig(_Checked):
    """The collaborative phase: cycles of denoiser steps, then detector steps."""

    steps: int = field(default=20000, metadata=_NOT_NEGATIVE)
    """Batches in all, of both kinds of step."""
    batch_size: int = field(default=4, metadata=_AT_LEAST_1)
    """Samples of a step, shared out equally among the run's processes."""
    denoiser_steps: int = field(default=4, metadata=_AT_LEAST_1)
    """Denoiser steps of a cycle."""
    detector_steps: int = field(default=1, metadata=_NOT_NEGATIVE)
    """Detector steps of a cycle; 0 keeps the detector as it is."""
    denoiser_learning_rate: float = field(default=1e-4, metadata=_NOT_NEGATIVE)
    """As `denoiser.learning_rate`, of the denoiser steps."""
    detector_learning_rate: float = field(default=1e-4, metadata=_NOT_NEGATIVE)
    """As `detector.learning_rate`, of the detector steps."""
    detector_clip_norm: float | None = field(default=5.0, metadata=_ABOVE_0)
    """Largest norm of a detector step's gradient; null for no bound."""
    cache_mib: int = field(default=1024, metadata=_NOT_NEGATIVE)
    """Bound in MiB on each of two caches, per process, of what networks that don't train make of normal-dose images:
    the detector, and `objective.extractor`. They serve whole slices (`data.crop: null`), which come again; random
    fields of view don't."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)


@dataclass(frozen=True)
class EvaluationConfig(_Checked):
    """The held-out samples of `evaluate` and of the validation curves."""

    samples: int = field(default=1000, metadata=_AT_LEAST_1)
    """Samples of the test split for the result table."""
    validation_samples: int = field(default=100, metadata=_AT_LEAST_1)
    """Samples of the validation split for each point of the validation curves."""
    validate_every: int = field(default=1000, metadata=_AT_LEAST_1)
    """Steps between two points of the validation curves."""


@dataclass(frozen=True)
class RunConfig(_Checked):
    """Everything a run depends on."""

    out: str = "runs/lidnet"
    """The run's folder; a folder that holds the same run is resumed."""
    seed: int = field(default=0, metadata=_NOT_NEGATIVE)
    """Everything random follows from it: initial weights, samples, noise."""
    ops: Literal["auto", "reference", "fused"] = "auto"
    """Implementation of the losses: the library's kernels and ROI windows, or the plain definitions on whole images;
    "auto" is "fused" where kernels are available."""
    balance: Literal["none", "sum", "mean", "upgrad", "dualproj", "mgda", "pcgrad", "aligned_mtl", "imtl_g"] = "none"
    """How a denoiser step weighs the losses' gradients at the denoised image, by `lidnet_fast.mtl_backward`; "none"
    and "sum" add them up. All but "none" also log the gradients' norms, weights and cosines."""
    precision: Precision = "auto"
    """Arithmetic of the networks; losses and weights are float32. "auto" is "bfloat16" where the hardware computes in
    it, "float32" elsewhere, and what the run began with when it is resumed."""
    compile: bool = False
    """Compile the denoiser and the detector's backbone with torch.compile: minutes at the start of every phase."""
    micro_batch_size: int | None = field(default=None, metadata=_AT_LEAST_1)
    """Most samples that pass through a process's networks at once; gradients of a batch's parts are accumulated."""
    activation_checkpointing: bool = False
    """Keep fewer activations and compute them again in the backward pass: less memory for more time. It applies to what
    a network has in `nn.Sequential`s; a denoiser without any (`redcnn`) is refused."""
    ema_decay: float = field(default=0.0, metadata=_DECAY)
    """Decay per step of the exponential moving average of the denoiser's weights, such as 0.999, which validation and
    the result then use; 0 for none."""
    device: Device = "auto"
    """Where the networks run: "auto" is a GPU if there is one."""
    devices: int = field(default=1, metadata=_AT_LEAST_1)
    """Processes on this machine, each with a GPU of its own; where torchrun starts them, it decides."""
    num_nodes: int = field(default=1, metadata=_AT_LEAST_1)
    """Machines; more than one are started by torchrun (docs/cluster.md)."""
    checkpoint_every: int = field(default=500, metadata=_AT_LEAST_1)
    """Steps between two checkpoints; an interrupted run resumes from the last."""
    log_every: int = field(default=10, metadata=_AT_LEAST_1)
    """Steps between two points of the training curves."""
    loggers: list[LoggerName] = field(default_factory=lambda: ["csv", "tensorboard"])
    """Where the curves go: csv (always), tensorboard, wandb, mlflow."""
    window: HUWindow = field(default_factory=HUWindow)
    data: DataConfig = field(default_factory=DataConfig)
    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)
    detector: DetectorConfig = field(default_factory=DetectorConfig)
    independent_judge: NetworkConfig | None = None
    """A second detector, trained like the first, that only evaluates: no denoiser is ever trained through it."""
    collaborate: CollaborateConfig = field(default_factory=CollaborateConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        for term in self.collaborate.objective.pixel:
            if self.data.crop is not None and self.data.crop < SMALLEST_SIDE[term]:
                raise InputError(
                    f"data.crop must be at least {SMALLEST_SIDE[term]} for the term {term!r} of "
                    f"collaborate.objective.pixel, got {self.data.crop}"
                )


def to_dict(config: RunConfig) -> dict[str, Any]:
    """The configuration as plain types, as it is stored: without what a store's URL has of passwords and the like."""
    record = asdict(config)
    record["data"]["store"] = without_secrets(config.data.store)
    return record


def from_options(options: Any) -> RunConfig:
    """Build the configuration of parsed options, which may hold a command's own options too.

    Args:
        options: jsonargparse's namespace, whose values have the types of the fields.

    Raises:
        InputError: names the key that is null, a list or another thing than a group of keys, or whose value can't work.
    """
    return _built(RunConfig, options, "")


def from_tree(tree: Mapping[str, Any]) -> RunConfig:
    """Build the configuration of plain values in nested groups, as `to_dict` makes them; what is left out is default.

    Raises:
        InputError: a key isn't known, or its value has another type or can't work.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(RunConfig)
    try:
        return from_options(parser.parse_object(dict(tree)))
    except InputError:
        raise
    except Exception as error:  # whatever jsonargparse raises
        raise InputError(str(error)) from error


def overridden(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """A configuration with some of its values changed.

    Args:
        config: stays as it is.
        changes: new values in nested groups, such as {"collaborate": {"steps": 100}}. A value that is itself a mapping,
            such as `denoiser.options`, is replaced as a whole.

    Raises:
        InputError: as `from_tree`.
    """
    return from_tree(_changed(config, changes))


def _changed(config: Any, changes: Mapping[str, Any]) -> dict[str, Any]:
    tree = asdict(config)
    for name, value in changes.items():
        group = getattr(config, name, None)
        tree[name] = _changed(group, value) if is_dataclass(group) and isinstance(value, Mapping) else value
    return tree


def _built(kind: type[T], options: Any, prefix: str) -> T:
    values: dict[str, Any] = {}
    for entry in fields(kind):  # type: ignore[arg-type]
        key, value = f"{prefix}{entry.name}", getattr(options, entry.name)
        kinds = (entry.type, *get_args(entry.type))
        group = next((one for one in kinds if isinstance(one, type) and is_dataclass(one)), None)
        if value is None and NoneType not in kinds:
            raise InputError(f"configuration key {key} must not be null")
        if group is not None and value is not None:
            if not isinstance(value, type(options)) or not all(hasattr(value, one.name) for one in fields(group)):
                raise InputError(f"configuration key {key} must be a group of keys, got {value!r}")
            value = _built(group, value, f"{key}.")
        values[entry.name] = value
    try:
        return kind(**values)
    except InputError as error:
        raise InputError(f"configuration key {prefix}{error}") from error


def check_available(config: RunConfig) -> None:
    """Refuse a configuration that needs what isn't here: the store, the kernels, a weighting's package.

    Raises:
        InputError: names the key and its value.
    """
    if config.ops != "auto" and config.ops not in backend.available():
        raise InputError(f"ops: {config.ops!r} isn't available here (available: {', '.join(backend.available())})")
    if config.balance != "none":
        try:
            check_weighting(config.balance)
        except (ValueError, ImportError) as error:
            raise InputError(f"balance: {error}") from error
    if not config.data.store:
        raise InputError("configuration key data.store is empty. To fix: give the folder that `prepare` made")
    if not is_url(config.data.store) and not Path(config.data.store).is_dir():
        raise InputError(f"data.store: there is no folder {config.data.store}")
