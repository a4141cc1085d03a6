"""The three phases as Lightning modules: detector, denoiser, collaborate."""

import itertools
import math
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from lidnet_fast.data.dataset import Batch
from lidnet_fast.errors import InputError
from lidnet_fast.evaluation.detection import DetectionMetrics
from lidnet_fast.evaluation.image_quality import ImageQuality
from lidnet_fast.models.detectors import LesionDetector
from lidnet_fast.models.windowing import HUWindow
from lidnet_fast.multitask import mtl_backward
from lidnet_fast.trainer.config import CollaborateConfig, PhaseConfig
from lidnet_fast.trainer.objective import JointObjective, Objective


def cosine_schedule(steps: int) -> Any:
    """Learning-rate factor of step k: a linear warm-up over the first twentieth, then half a cosine to zero."""

    def factor(step: int) -> float:
        progress = min(step / max(steps, 1), 1.0)
        return min(progress / 0.05 + 0.02, 1.0) * 0.5 * (1 + math.cos(math.pi * progress)) + 1e-4

    return factor


class Phase(L.LightningModule):
    """What the phases share: a seed per step, validation of images and detections, finite losses.

    Args:
        seed: of the run.
        window: HU window of the networks.
    """

    def __init__(self, seed: int, window: HUWindow) -> None:
        super().__init__()
        self.seed, self.window = seed, window
        self._quality = ImageQuality(window)
        self._detections = DetectionMetrics()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seed the global generator from the step: detectors sample anchors from it, and a resumed run must agree."""
        name = zlib.crc32(type(self).__name__.encode())
        torch.manual_seed((self.seed * 1_000_003 + batch_idx) * 4_099 + self.global_rank + (name << 20))

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
            self.log(f"{prefix}/{name}", value.detach(), prog_bar=name == "total", batch_size=batch_size)

    def validate_images(self, denoised: Tensor, batch: Batch) -> None:
        """Accumulate image quality; `denoised` is windowed."""
        self._quality.update(self.window.unscale(denoised), batch["normal_dose"], batch["boxes"])

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


class DetectorPhase(Phase):
    """Trains a detector on normal-dose images."""

    def __init__(self, detector: LesionDetector, config: PhaseConfig, seed: int, window: HUWindow) -> None:
        super().__init__(seed, window)
        self.detector, self.config = detector, config

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The detector's own losses on normal dose."""
        images = self.window.clamp(self.window.scale(batch["normal_dose"]))
        terms = self.detector.losses(images, batch["boxes"])
        total = self.check_finite(torch.stack(list(terms.values())).sum(), "detector", batch_idx)
        self.report("detector", {**terms, "total": total}, len(images))
        return total

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """AP on normal dose."""
        self.validate_detections(self.detector, self.window.scale(batch["normal_dose"]), batch)

    def configure_optimizers(self) -> Any:
        """AdamW with the cosine schedule, stepped every batch."""
        return _scheduled_adamw(self.detector, self.config)


class DenoiserPhase(Phase):
    """Warms the denoiser up with pixel terms alone."""

    def __init__(
        self, denoiser: nn.Module, objective: JointObjective, config: PhaseConfig, seed: int, window: HUWindow
    ) -> None:
        super().__init__(seed, window)
        self.denoiser, self.objective, self.config = denoiser, objective, config

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The pixel terms of the objective."""
        denoised = self.denoiser(self.window.scale(batch["low_dose"]))
        total, terms = self.objective.pixel(denoised, self.window.scale(batch["normal_dose"]), batch["boxes"])
        self.check_finite(total, "denoiser", batch_idx)
        self.report("denoiser", {**terms, "total": total}, len(denoised))
        return total

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Image quality."""
        self.validate_images(self.denoiser(self.window.scale(batch["low_dose"])), batch)

    def configure_optimizers(self) -> Any:
        """AdamW with the cosine schedule, stepped every batch."""
        return _scheduled_adamw(self.denoiser, self.config)


class CollaboratePhase(Phase):
    """Alternates the two networks: cycles of `denoiser_steps` batches, then `detector_steps` batches.

    The detector stays in eval mode: its BatchNorm keeps the statistics of the detector phase, so that its features mean
    the same in both kinds of step; its weights train all the same.

    With `balance` other than "none", a denoiser step combines the losses' gradients at the denoised image by that
    weighting of `mtl_backward`, and logs their norms, weights and cosines.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        detector: LesionDetector,
        objective: JointObjective,
        config: CollaborateConfig,
        seed: int,
        window: HUWindow,
        balance: str = "none",
    ) -> None:
        super().__init__(seed, window)
        self.automatic_optimization = False
        self.balance = balance
        self.denoiser, self.detector, self.objective, self.config = denoiser, detector, objective, config

    def on_train_start(self) -> None:
        """Fix the detector's BatchNorm statistics."""
        self.detector.eval()

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """One step of one network, as the cadence says."""
        cycle = self.config.denoiser_steps + self.config.detector_steps
        if batch_idx % cycle < self.config.denoiser_steps:
            self._denoiser_step(batch, batch_idx)
        else:
            self._detector_step(batch, batch_idx)

    def _denoiser_step(self, batch: Batch, batch_idx: int) -> None:
        optimizer = self.optimizers()[0]  # type: ignore[index]
        with _frozen(self.detector):
            denoised = self.denoiser(self.window.scale(batch["low_dose"]))
            objective = self.objective(denoised, self.window.scale(batch["normal_dose"]), batch["boxes"], self.detector)
            total = self.check_finite(objective.total, "denoiser", batch_idx)
            if self.balance == "none":
                self._step(optimizer, lambda: self.manual_backward(total), 0)
            else:
                self._step(optimizer, lambda: self._balanced_backward(objective, denoised), 0)
        self.report("collaborate", {**objective.terms, "total": total}, len(denoised))

    def _balanced_backward(self, objective: Objective, denoised: Tensor) -> None:
        """Backward pass of the losses' gradients at the denoised image, weighed against each other."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        losses = objective.losses if scaler is None else {k: scaler.scale(v) for k, v in objective.losses.items()}
        self.trainer.strategy.pre_backward(objective.total)  # DDP waits for it before the gradients it gathers
        found = mtl_backward(losses, denoised, self.balance)
        norms = found.norms if scaler is None else found.norms / scaler.get_scale()
        values = {f"gradient_norm/{name}": norms[i] for i, name in enumerate(losses)}
        values |= {f"weight/{name}": found.weights[i] for i, name in enumerate(losses)}
        values |= {
            f"cosine/{a}_{b}": found.cosines[i, j] for (i, a), (j, b) in itertools.combinations(enumerate(losses), 2)
        }
        self.report("collaborate", values, len(denoised))

    def _detector_step(self, batch: Batch, batch_idx: int) -> None:
        optimizer = self.optimizers()[1]  # type: ignore[index]
        with torch.no_grad():
            denoised = self.denoiser(self.window.scale(batch["low_dose"]))
        images = self.window.clamp(torch.cat([denoised, self.window.scale(batch["normal_dose"])]))
        terms = self.detector.losses(images, batch["boxes"] * 2)
        total = self.check_finite(torch.stack(list(terms.values())).sum(), "detector", batch_idx)
        self._step(optimizer, lambda: self.manual_backward(total), 1, self.config.detector_clip_norm)
        self.report("collaborate/detector", terms, len(images))

    def _step(self, optimizer: Any, backward: Callable[[], None], index: int, clip_norm: float | None = None) -> None:
        optimizer.zero_grad()
        backward()
        if clip_norm is not None:
            scaler = getattr(self.trainer.precision_plugin, "scaler", None)
            if scaler is not None:
                scaler.unscale_(optimizer.optimizer)
            nn.utils.clip_grad_norm_(self.detector.parameters(), clip_norm)
        optimizer.step()
        self.lr_schedulers()[index].step()  # type: ignore[index]

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Image quality, and the detector's AP on the denoised images."""
        denoised = self.denoiser(self.window.scale(batch["low_dose"]))
        self.validate_images(denoised, batch)
        self.validate_detections(self.detector, denoised, batch)

    def configure_optimizers(self) -> Any:
        """One optimiser and cosine schedule per network, each over its own steps."""
        config = self.config
        cycle = config.denoiser_steps + config.detector_steps
        denoiser = torch.optim.AdamW(self.denoiser.parameters(), config.denoiser_learning_rate, weight_decay=0.0)
        detector = torch.optim.AdamW(self.detector.parameters(), config.detector_learning_rate, weight_decay=1e-4)
        steps = [math.ceil(config.steps * part / cycle) for part in (config.denoiser_steps, config.detector_steps)]
        return [denoiser, detector], [
            LambdaLR(optimizer, cosine_schedule(n)) for optimizer, n in zip((denoiser, detector), steps, strict=True)
        ]


def _scheduled_adamw(network: nn.Module, config: PhaseConfig) -> dict[str, Any]:
    optimizer = torch.optim.AdamW(network.parameters(), config.learning_rate, weight_decay=config.weight_decay)
    schedule = LambdaLR(optimizer, cosine_schedule(config.steps))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    parameters = [p for p in module.parameters() if p.requires_grad]
    for p in parameters:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)
