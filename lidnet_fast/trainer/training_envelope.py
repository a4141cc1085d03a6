"""The envelope of a run: what its denoiser is trained on, measured on training samples."""

from dataclasses import replace

import torch

from lidnet_fast.data.samples.dataset import collate, make_batch
from lidnet_fast.models.envelope import Acquisition, Envelope
from lidnet_fast.trainer.config import RunConfig
from lidnet_fast.trainer.datamodule import split_patches

_SAMPLES = 48


def training_envelope(config: RunConfig) -> Envelope:
    """Measure the low-dose images of the first samples of the denoiser phase."""
    patches = split_patches(config, "train", "denoiser")
    trained = []
    for draw in range(_SAMPLES):
        sample = patches[draw]
        low_dose = make_batch(collate([sample]), torch.device("cpu"))["low_dose"]
        series = patches.store.series[sample.id[0]]
        trained.append(
            Acquisition.measured(
                [low_dose[0, 0].numpy()],
                pixel_spacing=max(series.spacing[1:]),
                slice_thickness=series.slice_thickness,
                kernel=series.kernel,
                body_part=series.body_part,
            )
        )
    return replace(Envelope.around(trained), inserted_lesions=patches.store.inserted_lesions is not None)
