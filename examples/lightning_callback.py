"""The ROI perceptual loss as a callback, for a Lightning module that exists already and stays as it is."""

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader

from lidnet_fast import ROIPerceptualLoss
from lidnet_fast.data.phantoms.chest import ChestPhantom
from lidnet_fast.extractors import load_network
from lidnet_fast.models import HUWindow, build_denoiser


class LesionLoss(L.Callback):
    """Adds `weight` times `perceptual` of what the module's denoiser makes to the loss of its `training_step`."""

    def __init__(self, perceptual, denoiser="denoiser", weight=0.02):
        self.perceptual, self.denoiser, self.weight = perceptual, denoiser, weight

    def on_fit_start(self, trainer, module):
        self.perceptual.to(module.device)
        self.hook = module.get_submodule(self.denoiser).register_forward_hook(self.keep)
        self.module, self.step = module, module.training_step
        module.training_step = self.training_step

    def keep(self, network, inputs, denoised):
        self.denoised = denoised

    def training_step(self, batch, batch_idx):
        loss = self.step(batch, batch_idx)
        lesions = self.perceptual(self.denoised, batch["normal"], batch["boxes"])
        self.module.log("lesions", lesions, prog_bar=True, batch_size=len(batch["normal"]))
        return loss + self.weight * lesions

    def on_fit_end(self, trainer, module):
        self.hook.remove()
        del module.training_step


class Yours(L.LightningModule):  # it has a denoiser, and its batches normal dose and boxes
    def __init__(self):
        super().__init__()
        self.denoiser = build_denoiser("small")

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.mse_loss(self.denoiser(batch["low"]), batch["normal"])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-3)


patient = ChestPhantom(image_size=192, slices=8).make_patient(np.random.default_rng(0))
normal = HUWindow(-1000, 400).scale(torch.from_numpy(patient.volume[:, None]))
boxes = [torch.from_numpy(patient.boxes[patient.boxes[:, 0] == z, 1:]) for z in range(8)]
low = normal + 0.04 * torch.randn_like(normal)
batches = [{"low": low[n : n + 4], "normal": normal[n : n + 4], "boxes": boxes[n : n + 4]} for n in (0, 4)]
perceptual = ROIPerceptualLoss(load_network("vgg19", weights=None), "relu3_4", mean="imagenet", normalise_by=normal)
trainer = L.Trainer(max_epochs=4, callbacks=[LesionLoss(perceptual)], logger=False, enable_checkpointing=False)
trainer.fit(Yours(), DataLoader(batches, batch_size=None))
print(f"lesions {trainer.callback_metrics['lesions']:.4f}")
