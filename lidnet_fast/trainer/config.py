"""The run's configuration: nested dataclasses, one YAML file, every value overridable on the command line.

Images are windowed before they reach a network: `window.low` HU becomes 0 and `window.high` HU becomes 1, so losses are
in units of the window. The paper (arXiv:2104.08845) does not publish its weights, layer, RoI size or lengths: all of
them are configuration here, and the defaults are ours.
"""

import math
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args

from lidnet_fast import backend
from lidnet_fast.data.store.backends import is_url
from lidnet_fast.errors import InputError
from lidnet_fast.functional import check_term_weights
from lidnet_fast.functional.pixel_losses import SMALLEST_SIDE
from lidnet_fast.multitask import check_weighting


@dataclass
class WindowConfig:
    """HU window of the networks and of the image metrics."""

    low: float = -1000.0
    high: float = 400.0


@dataclass
class DataConfig:
    """Where samples come from and what a sample is."""

    store: str = ""
    """Folder made by `lidnet-fast prepare`; or, with Zarr volumes, the URL that it was copied to."""
    crop: int | None = 256
    """Side of the square field of view in pixels, for training and evaluation alike; null for whole slices."""
    positive_fraction: float = 0.85
    """Fraction of samples centred near a lesion; the rest is drawn from all slices."""
    augment: bool = True
    """Random flips of the training samples."""
    workers: int = 0
    """Loader processes; 0 reads in the training process."""
    noise_map_cache_mb: int = 512
    """Bound on the cache of what the noise of a slice follows from (simulated low dose only), per process."""


@dataclass
class NetworkConfig:
    """A network by name or import path, with its constructor's options."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class PhaseConfig:
    """Length and optimisation of one phase."""

    steps: int
    batch_size: int
    """Samples of a step, shared out equally among the run's processes."""
    learning_rate: float
    weight_decay: float = 0.0
    clip_norm: float | None = None


@dataclass
class ObjectiveConfig:
    """The joint objective of a denoiser step.

    pixel terms + perceptual * (feature loss on whole maps) + roi_perceptual * (ROI perceptual loss) + detection *
    (detection loss on the denoised image). Feature losses are divided by the variance of the normal-dose features, so
    that a weight means the same at every level and for every detector.
    """

    pixel: dict[str, float] = field(default_factory=lambda: {"mse": 1.0})
    """Weights of `lidnet_fast.multi_loss` terms."""
    roi_weight: float = 1.0
    """Weight of pixels inside lesion boxes in the pixel terms; 1 is the plain mean."""
    perceptual: float = 0.0
    roi_perceptual: float = 4e-3
    detection: float = 2e-3
    regions: Literal["boxes", "proposals", "both"] = "both"
    """Where the ROI perceptual loss looks: ground-truth boxes, the detector's proposals on normal dose, or both."""
    grow: float = 2.0
    """Pixels added on each side of a region."""
    levels: int = 2
    """How many of the detector's feature levels are compared, from the finest."""
    roi_size: int = 7
    proposal_score: float = 0.3
    """Proposals scoring less than this are not regions; the others count with their score as weight."""
    proposals_per_image: int = 8
    roi_extractor: float = 0.0
    """Weight of an ROI perceptual loss, over the same regions, of another network's features: their mean square
    difference as it is."""
    extractor: str = "vgg19:relu3_4"
    """That network of torchvision's and its layer, or layers with commas between."""
    extractor_weights: str | None = None
    """Its weights: a state dict, the name of torchvision's ("DEFAULT" downloads them), or none for random ones."""


@dataclass
class CollaborateConfig:
    """The collaborative phase: cycles of denoiser steps, then detector steps."""

    steps: int = 20000
    """Batches in all, of both kinds of step."""
    batch_size: int = 4
    """Samples of a step, shared out equally among the run's processes."""
    denoiser_steps: int = 4
    detector_steps: int = 1
    denoiser_learning_rate: float = 1e-4
    detector_learning_rate: float = 1e-4
    detector_clip_norm: float | None = 5.0
    cache_mb: int = 1024
    """Bound on each of two caches, per process, of what networks that don't train make of normal-dose images: the
    detector, and `objective.extractor`. They serve whole slices (`data.crop: null`), which come again; random fields of
    view don't."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)


@dataclass
class EvaluationConfig:
    """The held-out samples of `evaluate` and of the validation curves."""

    samples: int = 1000
    """Samples of the test split for the result table."""
    validation_samples: int = 100
    validate_every: int = 1000
    """Steps between two points of the validation curves."""


@dataclass
class RunConfig:
    """Everything a run depends on."""

    out: str = "runs/lidnet"
    seed: int = 0
    ops: Literal["auto", "reference", "fused"] = "auto"
    """Implementation of the losses: the library's kernels and ROI windows, or the plain definitions on whole images;
    "auto" is "fused" where kernels are available."""
    balance: Literal["none", "sum", "mean", "upgrad", "dualproj", "mgda", "pcgrad", "aligned_mtl", "imtl_g"] = "none"
    """How a denoiser step weighs the losses' gradients at the denoised image, by `lidnet_fast.mtl_backward`; "none"
    sums the losses. All others also log the gradients' norms, weights and cosines."""
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"] = "auto"
    """Arithmetic of the networks; losses and weights are float32. "auto" is "bf16-mixed" where the hardware computes in
    bfloat16, "32-true" elsewhere, and what the run began with when it goes on."""
    compile: bool = False
    """Compile the denoiser and the detector's backbone with torch.compile: minutes at the start of every phase."""
    micro_batch_size: int | None = None
    """Most samples that pass through a process's networks at once; gradients of a batch's parts are accumulated."""
    activation_checkpointing: bool = False
    """Keep fewer activations and compute them again in the backward pass: less memory for more time. It applies to what
    a network has in `nn.Sequential`s; a denoiser without any (`redcnn`) is refused."""
    ema_decay: float = 0.0
    """Decay per step of the exponential moving average of the denoiser's weights, such as 0.999, which validation and
    the result then use; 0 for none."""
    accelerator: str = "auto"
    devices: int = 1
    """Processes on this machine, each with a GPU of its own; where torchrun starts them, it decides."""
    num_nodes: int = 1
    checkpoint_every: int = 500
    """Steps between two checkpoints; an interrupted run resumes from the last."""
    log_every: int = 10
    window: WindowConfig = field(default_factory=WindowConfig)
    data: DataConfig = field(default_factory=DataConfig)
    denoiser: NetworkConfig = field(default_factory=lambda: NetworkConfig("unet"))
    detector: NetworkConfig = field(default_factory=lambda: NetworkConfig("faster_rcnn_resnet18_fpn"))
    independent_judge: NetworkConfig | None = None
    """A second detector, trained like the first, that only evaluates: no denoiser is ever trained through it."""
    detector_phase: PhaseConfig = field(
        default_factory=lambda: PhaseConfig(20000, 8, 5e-4, weight_decay=1e-4, clip_norm=5.0)
    )
    denoiser_phase: PhaseConfig = field(default_factory=lambda: PhaseConfig(20000, 8, 5e-4))
    collaborate: CollaborateConfig = field(default_factory=CollaborateConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


def to_dict(config: RunConfig) -> dict[str, Any]:
    """The configuration as plain types, as it is stored with checkpoints and as YAML."""
    return asdict(config)


def from_options(options: Any) -> RunConfig:
    """The configuration among parsed options, which may hold a command's own options too."""
    return RunConfig(**{name: getattr(options, name) for name in RunConfig.__dataclass_fields__})


def check_groups(options: Any, kind: type = RunConfig, prefix: str = "") -> None:
    """Refuse null, lists and unnamed keys where they mean nothing; the parser lets them pass.

    Args:
        options: the parsed options, by name.
        kind: the dataclass that they are to become.
        prefix: of the keys in the message.

    Raises:
        InputError: names the key.
    """
    for entry in fields(kind):
        key, value = f"{prefix}{entry.name}", getattr(options, entry.name)
        kinds = (entry.type, *get_args(entry.type))
        if value is None and NoneType not in kinds:
            raise InputError(f"configuration key {key} must not be null")
        inner = next((one for one in kinds if isinstance(one, type) and is_dataclass(one)), None)
        if inner is not None and value is not None:
            if not isinstance(value, type(options)) or not all(hasattr(value, one.name) for one in fields(inner)):
                raise InputError(f"configuration key {key} must be a group of keys, got {value!r}")
            check_groups(value, inner, f"{key}.")


def validate(config: RunConfig) -> None:
    """Refuse values that can't work, before anything is built.

    Raises:
        InputError: names the key and its value.
    """
    objective = config.collaborate.objective
    at_least_one = {
        "data.crop": config.data.crop if config.data.crop is not None else 1,
        "micro_batch_size": config.micro_batch_size if config.micro_batch_size is not None else 1,
        "checkpoint_every": config.checkpoint_every,
        "log_every": config.log_every,
        "detector_phase.batch_size": config.detector_phase.batch_size,
        "denoiser_phase.batch_size": config.denoiser_phase.batch_size,
        "collaborate.batch_size": config.collaborate.batch_size,
        "collaborate.denoiser_steps": config.collaborate.denoiser_steps,
        "collaborate.objective.levels": objective.levels,
        "collaborate.objective.roi_size": objective.roi_size,
        "evaluation.samples": config.evaluation.samples,
        "evaluation.validation_samples": config.evaluation.validation_samples,
        "evaluation.validate_every": config.evaluation.validate_every,
    }
    for key, count in at_least_one.items():
        if count < 1:
            raise InputError(f"configuration key {key} must be at least 1, got {count}")
    not_negative: dict[str, float] = {
        "detector_phase.steps": config.detector_phase.steps,
        "denoiser_phase.steps": config.denoiser_phase.steps,
        "collaborate.steps": config.collaborate.steps,
        "collaborate.detector_steps": config.collaborate.detector_steps,
        "collaborate.objective.perceptual": objective.perceptual,
        "collaborate.objective.roi_perceptual": objective.roi_perceptual,
        "collaborate.objective.detection": objective.detection,
        "collaborate.objective.roi_extractor": objective.roi_extractor,
        "collaborate.objective.grow": objective.grow,
        "collaborate.objective.proposals_per_image": objective.proposals_per_image,
        "collaborate.cache_mb": config.collaborate.cache_mb,
        "data.workers": config.data.workers,
        "seed": config.seed,
    }
    for key, value in not_negative.items():
        if not 0 <= value < math.inf:
            raise InputError(f"configuration key {key} must be finite and not negative, got {value}")
    above_zero = {
        "collaborate.objective.roi_weight": objective.roi_weight,
        "detector_phase.clip_norm": config.detector_phase.clip_norm,
        "denoiser_phase.clip_norm": config.denoiser_phase.clip_norm,
        "collaborate.detector_clip_norm": config.collaborate.detector_clip_norm,
    }
    for key, number in above_zero.items():
        if number is not None and not 0 < number < math.inf:
            raise InputError(f"configuration key {key} must be finite and above 0, got {number}")
    try:
        check_term_weights(objective.pixel)
    except ValueError as error:
        raise InputError(f"configuration key collaborate.objective.pixel: {error}") from error
    for term in objective.pixel:
        if config.data.crop is not None and config.data.crop < SMALLEST_SIDE[term]:
            raise InputError(
                f"configuration key data.crop must be at least {SMALLEST_SIDE[term]} for the term {term!r} of "
                f"collaborate.objective.pixel, got {config.data.crop}"
            )
    if not 0 <= config.ema_decay < 1:
        raise InputError(f"configuration key ema_decay must lie in [0, 1), got {config.ema_decay}")
    if not 0 <= config.data.positive_fraction <= 1:
        raise InputError(
            f"configuration key data.positive_fraction must lie in [0, 1], got {config.data.positive_fraction}"
        )
    if not config.window.low < config.window.high:
        raise InputError(f"window.low ({config.window.low} HU) must be below window.high ({config.window.high} HU)")
    if config.ops != "auto" and config.ops not in backend.available():
        raise InputError(f"ops: {config.ops!r} isn't available here (available: {', '.join(backend.available())})")
    if config.balance != "none":
        try:
            check_weighting(config.balance)
        except (ValueError, ImportError) as error:
            raise InputError(f"balance: {error}") from error
    if not config.data.store:
        raise InputError("configuration key data.store is empty: give the folder that `lidnet-fast prepare` made")
    if not is_url(config.data.store) and not Path(config.data.store).is_dir():
        raise InputError(f"data.store: there is no folder {config.data.store}")
