"""The envelopes of a run: what its networks are trained on, measured on training samples."""

from dataclasses import replace
from typing import Literal

import torch

from lidnet_fast.data.formats.geometry import slice_distance
from lidnet_fast.data.samples.dataset import collate, make_batch
from lidnet_fast.models.envelope import Acquisition, Envelope
from lidnet_fast.neighbours import middle
from lidnet_fast.trainer.config import RunConfig
from lidnet_fast.trainer.datamodule import split_patches

_SAMPLES = 48


def training_envelope(config: RunConfig, images: Literal["low_dose", "normal_dose"] = "low_dose") -> Envelope:
    """Measure the images of the first samples of the denoiser phase: low dose for denoisers, normal for detectors.

    The distance between slices counts where the network sees neighbours.
    """
    context = config.data.context_of("denoiser" if images == "low_dose" else "detector")
    patches = split_patches(config, "train", "denoiser", with_low_dose=images == "low_dose")
    trained = []
    for draw in range(_SAMPLES):
        sample = patches[draw]
        image = make_batch(collate([sample]), torch.device("cpu"))[images]
        series = patches.store.series[sample.id[0]]
        trained.append(
            Acquisition.measured(
                [middle(image)[0, 0].numpy()],
                pixel_spacing=max(series.spacing[1:]),
                slice_thickness=series.slice_thickness,
                slice_distance=slice_distance(series) if context else None,
                kernel=series.kernel,
                body_part=series.body_part,
            )
        )
    return replace(Envelope.around(trained), inserted_lesions=patches.store.inserted_lesions is not None)
