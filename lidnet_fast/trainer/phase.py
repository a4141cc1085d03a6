"""What the phases share: one optimiser step per batch, in parts where memory asks for it, timed and seeded."""

import math
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

from lidnet_fast.data.samples.dataset import Batch
from lidnet_fast.device import choose_device
from lidnet_fast.errors import InputError
from lidnet_fast.metrics.detection import DetectionMetrics
from lidnet_fast.metrics.image_quality import ImageQuality
from lidnet_fast.models.lesion_detector import LesionDetector
from lidnet_fast.neighbours import middle
from lidnet_fast.trainer.clock import StepClock, step_memory_mb
from lidnet_fast.trainer.config import RunConfig

Tensors = list[Tensor] | tuple[Tensor, ...]


def cosine_schedule(steps: int) -> Callable[[int], float]:
    """Learning-rate factor of step k: a linear warm-up over the first twentieth, then half a cosine to zero."""

    def factor(step: int) -> float:
        progress = min(step / max(steps, 1), 1.0)
        return min(progress / 0.05 + 0.02, 1.0) * 0.5 * (1 + math.cos(math.pi * progress)) + 1e-4

    return factor


def scheduled_adamw(network: nn.Module, learning_rate: float, weight_decay: float, steps: int) -> tuple[Any, Any]:
    """AdamW in one fused kernel, and its cosine schedule over `steps` steps."""
    optimizer = torch.optim.AdamW(network.parameters(), learning_rate, weight_decay=weight_decay, fused=True)
    return optimizer, LambdaLR(optimizer, cosine_schedule(steps))


def averaged_weights(network: nn.Module, decay: float) -> AveragedModel | None:
    """The exponential moving average of a network's weights, or None for a decay of 0.

    The decay of step n is min(decay, (1 + n) / (10 + n)), so that the first steps are soon forgotten.
    """
    if not decay:
        return None

    def average(means: Tensors, weights: Tensors, steps: Tensor | int) -> None:
        n = int(steps)
        torch._foreach_lerp_(means, weights, 1 - min(decay, (1 + n) / (10 + n)))

    return cast(AveragedModel, AveragedModel(network, multi_avg_fn=average).requires_grad_(False))


def outermost_sequentials(network: nn.Module) -> set[nn.Module]:
    """Every `nn.Sequential` that isn't inside another."""
    outermost: set[nn.Module] = set()
    inside: set[nn.Module] = set()
    for module in network.modules():  # parents come first
        if isinstance(module, nn.Sequential) and module not in inside:
            outermost.add(module)
            inside.update(module.modules())
    return outermost


def checkpoint_activations(network: nn.Module, compiled: bool = False) -> None:
    """Let every outermost `nn.Sequential` keep its input alone and compute the rest again in the backward pass.

    Args:
        network: its weights and buffers keep their names.
        compiled: whether the network is to go through torch.compile, which takes none but its own contexts around the
            computation, and changes buffers once by itself.
    """
    outermost = outermost_sequentials(network)

    def wrapped(module: nn.Module) -> nn.Module:
        if compiled:
            return checkpoint_wrapper(module)
        return checkpoint_wrapper(module, context_fn=lambda: (nullcontext(), _buffers_left_alone(module)))

    apply_activation_checkpointing(network, wrapped, check_fn=lambda module: module in outermost)


@contextmanager
def _buffers_left_alone(module: nn.Module) -> Iterator[None]:
    """Let computations change copies of the buffers: BatchNorm's statistics have seen the batch in the forward pass."""
    kept = [
        (inner, name, buffer)
        for inner in module.modules()
        for name, buffer in inner.named_buffers(recurse=False)
        if inner.training
    ]
    for inner, name, buffer in kept:
        setattr(inner, name, buffer.clone())
    try:
        yield
    finally:
        for inner, name, buffer in kept:
            setattr(inner, name, buffer)


class Phase(L.LightningModule):
    """One optimiser step of one network per batch; validation of images and detections; finite losses.

    Args:
        config: of the run.
    """

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.config = config
        self.window = config.window
        self.clock = StepClock(choose_device(config.device))
        self._images_seen = 0
        self._quality = ImageQuality(self.window)
        self._detections = DetectionMetrics()

    def trained_parts(self) -> list[nn.Module]:
        """What is compiled, and computes activations again, where the configuration says so."""
        raise NotImplementedError

    def prepare_networks(self) -> None:
        """Set the networks up for training as the configuration says; their weights and names stay as they are."""
        for network in self.trained_parts():
            if self.config.activation_checkpointing:
                checkpoint_activations(network, self.config.compile)
            if self.config.compile:
                network.compile()

    def finish(self) -> None:
        """Make of the networks what the phase leaves."""

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """A step begins."""
        self.clock.lap("data")

    def optimise(
        self,
        batch: Batch,
        batch_idx: int,
        backward: Callable[[Batch, float], dict[str, Tensor]],
        network: nn.Module,
        index: int,
        clip_norm: float | None,
    ) -> dict[str, Tensor]:
        """One step of one optimiser on a batch, in parts of at most `micro_batch_size` samples.

        Args:
            batch: of the step.
            batch_idx: the step's number.
            backward: runs forward and backward of a part of the batch, the losses multiplied by the part's share of
                the samples, and returns the terms to be logged.
            network: whose gradients are clipped.
            index: of the optimiser and its schedule.
            clip_norm: largest norm of the gradient, or None.

        Returns:
            The terms, averaged over the parts.
        """
        optimizers, schedulers = self.optimizers(), self.lr_schedulers()
        optimizer = optimizers[index] if isinstance(optimizers, list) else optimizers
        scheduler: Any = schedulers[index] if isinstance(schedulers, list) else schedulers
        optimizer.zero_grad()  # type: ignore[union-attr]
        mean: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=self.device))
        parts = list(micro_batches(batch, self.config.micro_batch_size))
        samples = len(batch["normal_dose"])
        first_sample = self.global_rank * samples
        for number, part in enumerate(parts):
            self._seed_part(batch_idx, first_sample)
            first_sample += len(part["normal_dose"])
            share = len(part["normal_dose"]) / samples
            with self._gradients_exchanged(number == len(parts) - 1):
                for name, value in backward(part, share).items():
                    mean[name] = mean[name] + share * value.detach()
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(network.parameters(), clip_norm)
        optimizer.step()  # type: ignore[union-attr]
        scheduler.step()
        return mean

    def _seed_part(self, batch_idx: int, first_sample: int) -> None:
        """Seed the global generator, from which detectors sample anchors, for a part of a step's batch.

        A resumed run must agree, and so must a part whether it is a rank's or one of several of one process.
        """
        name = zlib.crc32(type(self).__name__.encode())
        torch.manual_seed((self.config.seed * 1_000_003 + batch_idx) * 4_099 + first_sample + (name << 20))

    def _gradients_exchanged(self, exchanged: bool) -> AbstractContextManager[None]:
        """Whether a backward pass exchanges gradients between processes; only a step's last one has to."""
        model = self.trainer.strategy.model
        if exchanged or not isinstance(model, nn.parallel.DistributedDataParallel):
            return nullcontext()
        return model.no_sync()

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Every `log_every` steps, log the speed and the parts of the time."""
        self.clock.lap("other")
        self._images_seen += len(batch["normal_dose"]) * self.trainer.world_size
        if (batch_idx + 1) % self.config.log_every:
            return
        seconds = self.clock.read()
        total = sum(seconds.values())
        self.log("speed/images_per_s", self._images_seen / total, prog_bar=True)
        for part, value in seconds.items():
            self.log(f"speed/{part}", value / total, prog_bar=part == "data")
        self.log("speed/peak_memory_mb", step_memory_mb(self.clock.device))
        self._images_seen = 0

    def check_finite(self, loss: Tensor, what: str, batch_idx: int) -> Tensor:
        """The loss, if it is finite.

        Raises:
            InputError: the run has diverged; the message names the loss and the step.
        """
        if not torch.isfinite(loss):
            raise InputError(
                f"the {what} loss is {loss.item()} at step {batch_idx}: lower its learning rate or check the data; "
                "the last checkpoint is intact"
            )
        return loss

    def report(self, prefix: str, terms: dict[str, Tensor], batch_size: int) -> None:
        """Log training terms, each under `prefix/name`."""
        for name, value in terms.items():
            self.log(f"{prefix}/{name}", value, prog_bar=name == "total", batch_size=batch_size)

    def on_validation_start(self) -> None:
        """Validation runs as it is written: its batches have other shapes, which would be compiled for a few calls."""
        torch.compiler.set_stance("force_eager")

    def validate_images(self, denoised: Tensor, batch: Batch) -> None:
        """Accumulate the image quality of the middle slices; `denoised` is windowed."""
        self._quality.update(self.window.unscale(middle(denoised)), middle(batch["normal_dose"]), batch["boxes"])

    def validate_detections(self, detector: LesionDetector, images: Tensor, batch: Batch) -> None:
        """Accumulate detection metrics on windowed images."""
        self._detections.update(detector.detect(self.window.clamp(images)), batch["boxes"])

    def on_validation_epoch_end(self) -> None:
        """Log what was accumulated."""
        for metric, keys in ((self._quality, ("psnr", "lesion_psnr")), (self._detections, ("ap50",))):
            if metric.count:
                values = metric.compute()
                for key in keys:
                    value = values[key]
                    if value is not None:
                        self.log(f"val/{key}", value, sync_dist=True)
            metric.reset()

    def on_validation_end(self) -> None:
        """Go on with compiled networks, and leave the time out of the steps'."""
        torch.compiler.set_stance("default")
        self.clock.restart()


def micro_batches(batch: Batch, size: int | None) -> Iterator[Batch]:
    """The batch in parts of at most `size` samples; whole for None."""
    samples = len(batch["normal_dose"])
    step = samples if size is None else size
    for start in range(0, samples, step):
        yield cast(Batch, {key: values[start : start + step] for key, values in batch.items()})  # type: ignore[index]
