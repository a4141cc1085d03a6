"""A run: phases in a folder, each resumed where it stopped and skipped when it is done."""

import logging
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from torch import nn

from lidnet_fast import backend, progress
from lidnet_fast.data.store.reader import index_files
from lidnet_fast.device import choose_device, choose_precision
from lidnet_fast.errors import InputError
from lidnet_fast.files import as_private_as, is_temporary, make_folder, remove_temporary, write_text
from lidnet_fast.models.envelope import Envelope
from lidnet_fast.models.files import Kind, build_network, load_network, save_network, without_weights
from lidnet_fast.models.lesion_detector import LesionDetector
from lidnet_fast.models.registry import NetworkConfig
from lidnet_fast.runtime import recorded_cost
from lidnet_fast.trainer import ranks
from lidnet_fast.trainer.checkpoints import PhaseCheckpoints
from lidnet_fast.trainer.config import (
    CollaborateConfig,
    ObjectiveConfig,
    PhaseConfig,
    RunConfig,
    check_available,
    to_dict,
)
from lidnet_fast.trainer.datamodule import PatchData, split_patches, stream_seed
from lidnet_fast.trainer.loggers import check_loggers, finish, phase_loggers
from lidnet_fast.trainer.objective import JointObjective, check_extractor
from lidnet_fast.trainer.phase import Phase, outermost_sequentials
from lidnet_fast.trainer.phases import CollaboratePhase, DenoiserPhase, DetectorPhase
from lidnet_fast.trainer.stored import flattened, read_stored
from lidnet_fast.trainer.training_envelope import training_envelope
from lidnet_fast.urls import without_secrets

# What may differ between a run and its continuation, since no result depends on it.
_FREE_KEYS = {
    "out",
    "device",
    "devices",  # nothing beyond rounding; see `PatchData.load_state_dict`
    "num_nodes",
    "log_every",
    "loggers",
    "checkpoint_every",
    "data.workers",
    "collaborate.cache_mib",  # nothing beyond rounding, and that only between some cache and none
}

_SHOWN = 4
"""So many differences of two configurations are named."""


class Run:
    """The phases of one configuration in the folder `config.out`.

    Every phase leaves its networks (`<phase>/denoiser.pt`, `<phase>/detector.pt`), its logs and its cost
    (`<phase>/cost.json`). A finished phase is loaded instead of trained again. An interrupted one resumes from its last
    checkpoint, with the same samples, noise and random numbers as if it had not been interrupted: on the CPU to the
    same bits.

    Args:
        config: of the run.
        callbacks: of Lightning's, for every phase, added to the run's own.

    Raises:
        InputError: a value can't work, or the folder holds a run of another configuration.
    """

    def __init__(self, config: RunConfig, callbacks: Sequence[L.Callback] = ()) -> None:
        self._callbacks = callbacks
        joined = ranks.join(config)
        self.config = config = ranks.on_first(lambda: _begun(joined))
        self.out = Path(config.out)
        backend.use(backend.available()[-1] if config.ops == "auto" else config.ops)
        self.window = config.window
        self._envelopes: dict[Kind, Envelope] = {}

    def train_detector(self) -> LesionDetector:
        """Train the detector on normal dose; a frozen copy of it is the judge of the evaluation."""
        return self._train_detector("detector", self.config.detector.network)

    def train_independent_judge(self) -> LesionDetector | None:
        """Train the detector that only evaluates, if the configuration names one."""
        network = self.config.independent_judge
        return None if network is None else self._train_detector("independent_judge", network)

    def train_detector_on(self, denoiser: nn.Module, begin: Path | None) -> LesionDetector:
        """Train the detector on what a denoiser makes of low dose, in the place of the detector phase.

        Args:
            denoiser: windowed low dose to windowed normal dose; it stays as it is.
            begin: file of a detector to go on from; None to train from the start.
        """
        return self._train_detector("detector", self.config.detector.network, denoiser, begin)

    def _train_detector(
        self, phase: str, network: NetworkConfig, denoiser: nn.Module | None = None, begin: Path | None = None
    ) -> LesionDetector:
        detector = self._new_network("detector", network, phase)
        if begin is not None:
            detector.load_state_dict(load_network(begin, "detector", network)[0].state_dict())
        assert isinstance(detector, LesionDetector)
        self._fit(
            phase,
            lambda: DetectorPhase(detector, self.config, denoiser),
            {"detector": (detector, network)},
            phase,
            self.config.detector,
            with_low_dose=denoiser is not None,
        )
        return detector

    def train_denoiser(self) -> nn.Module:
        """Warm the denoiser up with the pixel terms."""
        config = self.config
        denoiser = self._new_network("denoiser", config.denoiser.network, "denoiser")
        # The warm start serves every objective, so lesions count in it as any other pixel.
        plain = replace(config.collaborate.objective, roi_weight=1.0, roi_extractor=0.0)
        objective = JointObjective(plain, self.window)
        self._fit(
            "denoiser",
            lambda: DenoiserPhase(denoiser, objective, config),
            {"denoiser": (denoiser, config.denoiser.network)},
            "denoiser",
            config.denoiser,
        )
        return denoiser

    def collaborate(
        self, phase: str = "collaborate", objective: ObjectiveConfig | None = None
    ) -> tuple[nn.Module, LesionDetector]:
        """Train both networks together, from the ends of the detector and the denoiser phase.

        Args:
            phase: the phase's folder.
            objective: what a denoiser step minimises; by default the configuration's.
        """
        config = self.config
        joint = replace(config.collaborate, objective=objective or config.collaborate.objective)
        denoiser = self._loaded(self.out / "denoiser" / "denoiser.pt", "denoiser", config.denoiser.network)
        detector = self._loaded(self.out / "detector" / "detector.pt", "detector", config.detector.network)
        assert isinstance(detector, LesionDetector)
        self._fit(
            phase,
            lambda: CollaboratePhase(denoiser, detector, self._objective(joint), joint, config),
            {"denoiser": (denoiser, config.denoiser.network), "detector": (detector, config.detector.network)},
            "collaborate",
            joint,
        )
        return denoiser, detector

    def _envelope(self, kind: Kind) -> Envelope:
        if kind not in self._envelopes:
            self._envelopes[kind] = training_envelope(self.config, "low_dose" if kind == "denoiser" else "normal_dose")
        return self._envelopes[kind]

    def _objective(self, joint: CollaborateConfig) -> JointObjective:
        # Only whole slices come again; a detector that trains sees them differently every time.
        cache_mib = joint.cache_mib if self.config.data.crop is None else 0
        of_detector = cache_mib if joint.detector_steps == 0 else 0
        return JointObjective(
            joint.objective, self.window, detector_cache_mib=of_detector, extractor_cache_mib=cache_mib
        )

    def _new_network(self, kind: Any, network: NetworkConfig, stream: str) -> nn.Module:
        torch.manual_seed(stream_seed(self.config.seed, stream))
        return build_network(kind, network, self.config.data.context_of(kind))

    def _loaded(self, path: Path, kind: Kind, network: NetworkConfig) -> nn.Module:
        return load_network(path, kind, network, context=self.config.data.context_of(kind))[0]

    def _fit(
        self,
        phase: str,
        make_module: Callable[[], Phase],
        networks: dict[Any, tuple[nn.Module, NetworkConfig]],
        stream: str,
        lengths: PhaseConfig | CollaborateConfig,
        with_low_dose: bool = True,
    ) -> None:
        folder = self.out / phase
        files = {kind: folder / f"{kind}.pt" for kind in networks}
        last = folder / "last.ckpt"

        def save() -> None:
            for kind, (network, config) in networks.items():
                envelope, context = self._envelope(kind), self.config.data.context_of(kind)
                save_network(files[kind], kind, network, config, self.window, _record(self.config), envelope, context)

        if not ranks.on_first(lambda: all(path.exists() for path in files.values())):
            with recorded_cost(folder / "cost.json", steps=lengths.steps) if ranks.is_first() else nullcontext():
                if lengths.steps:
                    checkpoint = last if ranks.on_first(last.exists) else None
                    steps, batch_size = lengths.steps, lengths.batch_size
                    data = PatchData(self.config, stream, steps, batch_size, with_low_dose=with_low_dose)
                    self._train(folder, make_module, data, checkpoint)
            ranks.on_first(save)
        ranks.on_first(lambda: last.unlink(missing_ok=True))
        ranks.on_first(lambda: remove_temporary(self.out))
        for kind, (network, config) in networks.items():
            network.load_state_dict(self._loaded(files[kind], kind, config).state_dict())
            network.cpu().eval()

    def _train(self, folder: Path, make_module: Callable[[], Phase], data: PatchData, checkpoint: Path | None) -> None:
        """Train, from a checkpoint if there is one."""
        with warnings.catch_warnings():
            _silence_lightning()
            trainer = self._trainer(folder, data.steps, resumed=checkpoint is not None)
            phase = make_module()
            phase.prepare_networks()
            try:
                trainer.fit(phase, data, ckpt_path=checkpoint, weights_only=True)
            except SystemExit as stop:  # what Lightning makes of Ctrl-C
                if trainer.interrupted:
                    raise KeyboardInterrupt from stop
                raise
            except InputError as error:
                raise _own_words(error) from error
            finally:
                finish(trainer.loggers)
        phase.finish()

    def _trainer(self, folder: Path, steps: int, resumed: bool) -> L.Trainer:
        config = self.config
        make_folder(folder)
        # A resumed phase logs to a folder of its own: the loggers would overwrite the one before.
        version = f"part{len(list((folder / 'logs').glob('part*')))}" if resumed else "part0"
        return L.Trainer(
            accelerator="gpu" if choose_device(config.device).type == "cuda" else "cpu",
            devices=config.devices,
            num_nodes=config.num_nodes,
            strategy="auto" if config.devices * config.num_nodes == 1 else "ddp_find_unused_parameters_true",
            precision="bf16-mixed" if config.precision == "bfloat16" else "32-true",  # "auto" has been decided
            # One Lightning epoch is the whole phase: batches are numbered, and there is nothing to reshuffle.
            max_epochs=1,
            val_check_interval=min(config.evaluation.validate_every, steps),
            num_sanity_val_steps=0,
            log_every_n_steps=config.log_every,
            logger=phase_loggers(config.loggers, folder, version, config.log_every, _record(config)),
            callbacks=[
                ModelCheckpoint(
                    dirpath=folder,
                    filename="last",
                    every_n_train_steps=config.checkpoint_every,
                    save_top_k=1,
                    save_on_train_epoch_end=False,
                    enable_version_counter=False,
                ),
                _EndOnSigterm(),
                *([RichProgressBar()] if progress.shown() else []),
                *self._callbacks,
            ],
            plugins=[PhaseCheckpoints(), TorchElasticEnvironment() if ranks.launched() else LightningEnvironment()],
            enable_progress_bar=progress.shown(),
            enable_model_summary=False,
            use_distributed_sampler=False,
        )


class _EndOnSigterm(L.Callback):
    """SIGTERM ends the run as Ctrl-C does; Lightning would wait for the step's end and for the other processes."""

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.default_int_handler)


def train(config: RunConfig) -> Run:
    """All phases of a configuration, resumed where they stopped.

    Raises:
        InputError: see `Run`.
    """
    with as_private_as(index_files(config.data.store)):
        run = Run(config)
        objective = config.collaborate.objective
        if ranks.is_first() and objective.roi_extractor and objective.extractor_weights is None:
            print(
                f"lidnet-fast: warning: the weights of {objective.extractor} are random. To fix: give "
                "--collaborate.objective.extractor_weights FILE, or DEFAULT for torchvision's",
                file=sys.stderr,
            )
        run.train_detector()
        run.train_independent_judge()
        run.train_denoiser()
        run.collaborate()
    return run


def curves(folder: Path) -> dict[str, tuple[list[int], list[float]]]:
    """A phase's logged values: name -> (steps, values), over all its parts; steps that were done again count once."""
    import csv

    series: dict[str, dict[int, float]] = {}
    for path in sorted((folder / "logs").glob("part*/metrics.csv"), key=lambda p: int(p.parent.name[4:])):
        with path.open(newline="", encoding="utf-8") as lines:
            for row in csv.DictReader(lines):
                if None in row.values():  # the run was killed while it wrote this line
                    continue
                step = int(row["step"])
                for name, value in row.items():
                    if value and name not in ("step", "epoch"):
                        series.setdefault(name, {})[step] = float(value)
    return {name: (sorted(values), [values[step] for step in sorted(values)]) for name, values in series.items()}


def _begun(config: RunConfig) -> RunConfig:
    """Check everything, make the folder this run's, and decide the precision."""
    check_available(config)
    check_loggers(config.loggers)
    out = Path(config.out)
    earlier = _earlier_config(out)
    native = choose_precision(config.precision, choose_device(config.device))
    config = replace(config, precision=earlier.get("precision", native) if config.precision == "auto" else native)
    _check_parts(config)
    check_folder(config)
    if not earlier:
        write_text(out / "config.yaml", yaml.safe_dump(to_dict(config), sort_keys=False))
    return config


def _check_parts(config: RunConfig) -> None:
    """Open the store and build every network once, so that what is wrong with them is said before the run begins."""
    processes = config.devices * config.num_nodes
    batch_sizes = {
        "detector": config.detector.batch_size,
        "denoiser": config.denoiser.batch_size,
        "collaborate": config.collaborate.batch_size,
    }
    for phase, size in batch_sizes.items():
        if size % processes:
            raise InputError(
                f"{phase}.batch_size is {size}, which {processes} processes cannot share equally: "
                f"make it a multiple of {processes}"
            )
    # Whole slices have the usual size, or one near it.
    check_extractor(config.collaborate.objective, config.data.crop or 512)
    training, *_ = (split_patches(config, split, "test") for split in ("train", "val", "test"))
    if not training.lesions and (config.detector.steps or config.collaborate.steps):
        raise InputError(
            f"data.store ({without_secrets(config.data.store)}): its training split has no lesion box, and a detector "
            "learns from them. To fix: prepare it with --boxes or --insert-lesions"
        )
    networks: list[tuple[Kind, NetworkConfig | None]] = [
        ("denoiser", config.denoiser.network),
        ("detector", config.detector.network),
        ("detector", config.independent_judge),
    ]
    for kind, network in networks:
        if network is None:
            continue
        built = build_network(kind, without_weights(network), config.data.context_of(kind))
        if kind == "denoiser" and config.activation_checkpointing and not outermost_sequentials(built):
            raise InputError(
                f"activation_checkpointing: true does nothing for denoiser {network.name!r}, which has no "
                "nn.Sequential whose activations could be computed again"
            )


def _earlier_config(out: Path) -> dict[str, Any]:
    """The configuration, flat, of the run that the folder holds; empty where it holds none."""
    path = out / "config.yaml"
    return read_stored(path) if path.exists() else {}


def check_folder(config: RunConfig) -> None:
    """Refuse a folder of something else than this run.

    Raises:
        InputError: `config.out` holds another run, other files, or is a file.
    """
    out = Path(config.out)
    earlier = _earlier_config(out)
    if earlier:
        mine = flattened(to_dict(config))
        differing = [
            f"{key} = {earlier.get(key)}, not {mine.get(key)}"
            for key in sorted((mine.keys() | earlier.keys()) - _FREE_KEYS)
            if mine.get(key) != earlier.get(key)
        ]
        if differing:
            more = f"; and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
            raise InputError(
                f"{out} holds a run with {'; '.join(differing[:_SHOWN])}{more}: "
                "choose another --out, or give the same configuration to go on with it"
            )
        return
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file: choose another --out")
    # A run that was killed while it wrote its configuration has done nothing else.
    if out.exists() and not all(map(is_temporary, out.iterdir())):
        raise InputError(f"{out} is not empty and holds no run: choose another --out")


def _own_words(error: InputError) -> InputError:
    """An error of a loader process without the traceback that it comes with."""
    text = str(error)
    return InputError(text.rpartition("InputError: ")[2].strip()) if "DataLoader worker" in text else error


def _record(config: RunConfig) -> dict[str, Any]:
    """The configuration as a model file keeps it: model files travel, and this machine's paths and URLs don't."""
    record = to_dict(config)
    del record["out"], record["data"]["store"]
    objective = record["collaborate"]["objective"]
    if objective["extractor_weights"] is not None:
        objective["extractor_weights"] = Path(objective["extractor_weights"]).name
    return record


def _silence_lightning() -> None:
    """Drop Lightning's advice, none of which applies to phases; its errors still show."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\.")
