"""The three phases as Lightning modules: detector, denoiser, collaborate."""

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lidnet_fast.data.samples.dataset import Batch
from lidnet_fast.device import choose_device
from lidnet_fast.models.denoisers import evaluated
from lidnet_fast.models.lesion_detector import LesionDetector
from lidnet_fast.multitask import mtl_backward
from lidnet_fast.neighbours import middle
from lidnet_fast.trainer import ranks
from lidnet_fast.trainer.config import CollaborateConfig, RunConfig
from lidnet_fast.trainer.objective import JointObjective, Objective
from lidnet_fast.trainer.phase import Phase, averaged_weights, scheduled_adamw


class DetectorPhase(Phase):
    """Trains a detector on normal-dose images, or on what a denoiser makes of low-dose ones.

    Args:
        detector: is trained.
        config: of the run.
        denoiser: stays as it is; None for normal dose.
    """

    def __init__(self, detector: LesionDetector, config: RunConfig, denoiser: nn.Module | None = None) -> None:
        super().__init__(config)
        self.detector, self.denoiser = detector, denoiser

    def _images(self, batch: Batch) -> Tensor:
        """What the detector sees, windowed."""
        if self.denoiser is None:
            return self.window.clamp(self.window.scale(batch["normal_dose"]))
        with torch.no_grad(), evaluated(self.denoiser):
            return self.window.clamp(self.window.scale(self.window.denoise(self.denoiser, batch["low_dose"])))

    def trained_parts(self) -> list[nn.Module]:
        """The backbone; proposals and targets differ in number with every batch."""
        return [self.detector.model.backbone]

    def prepare_networks(self) -> None:
        """On several GPUs, BatchNorm sees the batch of all; PyTorch has that for GPUs alone."""
        if ranks.world() > 1 and choose_device(self.config.device).type == "cuda":
            nn.SyncBatchNorm.convert_sync_batchnorm(self.detector)
        super().prepare_networks()

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """The detector's own losses."""

        def backward(part: Batch, share: float) -> dict[str, Tensor]:
            terms = self.detector.losses(self._images(part), part["boxes"])
            total = self.check_finite(torch.stack(list(terms.values())).sum(), "detector", batch_idx)
            self.manual_backward(share * total)
            return {**terms, "total": total}

        terms = self.optimise(batch, batch_idx, backward, self.detector, 0, self.config.detector.clip_norm)
        self.clock.lap("detector")
        self.report("detector", terms, len(batch["normal_dose"]))

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """AP on images like those of training."""
        self.validate_detections(self.detector, self._images(batch), batch)

    def configure_optimizers(self) -> Any:
        """AdamW with the cosine schedule."""
        phase = self.config.detector
        return _lists(scheduled_adamw(self.detector, phase.learning_rate, phase.weight_decay, phase.steps))


class DenoisingPhase(Phase):
    """What the phases that train a denoiser share: the average of its weights, which validation and the result use.

    Args:
        denoiser: windowed low dose to windowed normal dose.
        objective: what a denoiser step minimises.
        config: of the run.
        context: neighbours on each side of a slice that are denoised with it.
    """

    def __init__(self, denoiser: nn.Module, objective: JointObjective, config: RunConfig, context: int = 0) -> None:
        super().__init__(config)
        self.context = context
        self.denoiser, self.objective = denoiser, objective
        self.average = averaged_weights(denoiser, config.ema_decay)

    def trained_parts(self) -> list[nn.Module]:
        """The denoiser."""
        return [self.denoiser]

    def windowed(self, denoiser: nn.Module, batch: Batch) -> Tensor:
        """The images that a denoiser makes of a batch, windowed: [N, 2 context + 1, H, W]."""
        around = self.config.data.context_of("denoiser")
        low_dose = middle(batch["low_dose"], self.context + around)
        return self.window.scale(self.window.denoise(denoiser, low_dose, around))

    def denoise(self, batch: Batch) -> Tensor:
        """The denoised images of the network in training, windowed."""
        denoised = self.windowed(self.denoiser, batch)
        self.clock.lap("denoiser")
        return denoised

    def update_average(self) -> None:
        """Take this step's weights into the average."""
        if self.average is not None:
            self.average.update_parameters(self.denoiser)
        self.clock.lap("denoiser")

    def validated_denoiser(self) -> nn.Module:
        """The network as it would be saved now."""
        return self.denoiser if self.average is None else self.average.module

    def finish(self) -> None:
        """Make the averaged weights the network's."""
        self.denoiser.load_state_dict(self.validated_denoiser().state_dict())


class DenoiserPhase(DenoisingPhase):
    """Warms the denoiser up with pixel terms alone."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """The pixel terms of the objective."""

        def backward(part: Batch, share: float) -> dict[str, Tensor]:
            denoised = self.denoise(part)
            total, terms = self.objective.pixel(denoised, self.window.scale(part["normal_dose"]), part["boxes"])
            self.check_finite(total, "denoiser", batch_idx)
            self.clock.lap("losses")
            self.manual_backward(share * total)
            self.clock.lap("denoiser")
            return {**terms, "total": total}

        terms = self.optimise(batch, batch_idx, backward, self.denoiser, 0, self.config.denoiser.clip_norm)
        self.update_average()
        self.report("denoiser", terms, len(batch["normal_dose"]))

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Image quality."""
        self.validate_images(self.windowed(self.validated_denoiser(), batch), batch)

    def configure_optimizers(self) -> Any:
        """AdamW with the cosine schedule."""
        phase = self.config.denoiser
        return _lists(scheduled_adamw(self.denoiser, phase.learning_rate, phase.weight_decay, phase.steps))


class CollaboratePhase(DenoisingPhase):
    """Alternates the two networks: cycles of `denoiser_steps` batches, then `detector_steps` batches.

    The detector stays in eval mode: its BatchNorm keeps the statistics of the detector phase, so that its features mean
    the same in both kinds of step; its weights train all the same. Of the slices that it sees, all are denoised.

    With `balance` other than "none", a denoiser step combines the losses' gradients at the denoised image by that
    weighting of `mtl_backward`, and logs their norms, weights and cosines.

    Args:
        denoiser: windowed low dose to windowed normal dose.
        detector: its losses and features train the denoiser.
        objective: what a denoiser step minimises.
        joint: lengths and learning rates of this phase.
        config: of the run.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        detector: LesionDetector,
        objective: JointObjective,
        joint: CollaborateConfig,
        config: RunConfig,
    ) -> None:
        super().__init__(denoiser, objective, config, config.data.context_of("detector"))
        self.detector, self.joint = detector, joint

    def trained_parts(self) -> list[nn.Module]:
        """The denoiser and the detector's backbone."""
        return [self.denoiser, self.detector.model.backbone]

    def on_train_start(self) -> None:
        """Fix the detector's BatchNorm statistics, and no others: networks are loaded in eval mode."""
        self.detector.eval()
        self.denoiser.train()

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """One step of one network, as the cadence says."""
        cycle = self.joint.denoiser_steps + self.joint.detector_steps
        if batch_idx % cycle < self.joint.denoiser_steps:
            self._denoiser_step(batch, batch_idx)
        else:
            self._detector_step(batch, batch_idx)

    def _denoiser_step(self, batch: Batch, batch_idx: int) -> None:
        def backward(part: Batch, share: float) -> dict[str, Tensor]:
            denoised = self.denoise(part)
            found = self.objective(
                denoised,
                self.window.scale(part["normal_dose"]),
                part["boxes"],
                self.detector,
                ids=part["ids"],
                clock=self.clock,
            )
            total = self.check_finite(found.total, "denoiser", batch_idx)
            logged = {**found.terms, "total": total}
            if self.config.balance == "none":
                self.manual_backward(share * total)
            else:
                logged |= self._balanced_backward(found, denoised, share)
            self.clock.lap("denoiser")
            return logged

        with _frozen(self.detector):
            terms = self.optimise(batch, batch_idx, backward, self.denoiser, 0, None)
        self.update_average()
        self.report("collaborate", terms, len(batch["normal_dose"]))

    def _balanced_backward(self, objective: Objective, denoised: Tensor, share: float) -> dict[str, Tensor]:
        """Backward pass of the losses' gradients at the denoised image, weighed against each other."""
        losses = {name: share * loss for name, loss in objective.losses.items()}
        self.trainer.strategy.pre_backward(objective.total)  # DDP waits for it before the gradients it gathers
        found = mtl_backward(losses, denoised, self.config.balance)
        values = {f"gradient_norm/{name}": found.norms[i] / share for i, name in enumerate(losses)}
        values |= {f"weight/{name}": found.weights[i] for i, name in enumerate(losses)}
        return values | {
            f"cosine/{a}_{b}": found.cosines[i, j] for (i, a), (j, b) in itertools.combinations(enumerate(losses), 2)
        }

    def _detector_step(self, batch: Batch, batch_idx: int) -> None:
        def backward(part: Batch, share: float) -> dict[str, Tensor]:
            with torch.no_grad(), evaluated(self.denoiser):
                denoised = self.denoise(part)
            images = self.window.clamp(torch.cat([denoised, self.window.scale(part["normal_dose"])]))
            terms = self.detector.losses(images, part["boxes"] * 2)
            total = self.check_finite(torch.stack(list(terms.values())).sum(), "detector", batch_idx)
            self.manual_backward(share * total)
            return terms

        terms = self.optimise(batch, batch_idx, backward, self.detector, 1, self.joint.detector_clip_norm)
        self.clock.lap("detector")
        self.report("collaborate/detector", terms, len(batch["normal_dose"]))

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Image quality, and the detector's AP on the denoised images."""
        denoised = self.windowed(self.validated_denoiser(), batch)
        self.validate_images(denoised, batch)
        self.validate_detections(self.detector, denoised, batch)

    def configure_optimizers(self) -> Any:
        """One optimiser and cosine schedule per network, each over its own steps."""
        joint = self.joint
        cycle = joint.denoiser_steps + joint.detector_steps
        steps = [math.ceil(joint.steps * part / cycle) for part in (joint.denoiser_steps, joint.detector_steps)]
        return _lists(
            scheduled_adamw(self.denoiser, joint.denoiser_learning_rate, 0.0, steps[0]),
            scheduled_adamw(self.detector, joint.detector_learning_rate, 1e-4, steps[1]),
        )


def _lists(*scheduled: tuple[Any, Any]) -> tuple[list[Any], list[Any]]:
    """Optimisers and their schedules as Lightning takes them."""
    return [optimizer for optimizer, _ in scheduled], [schedule for _, schedule in scheduled]


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
