"""What a run says that it was trained on holds images like its own, and not those that its denoiser would spoil."""

from pathlib import Path

import numpy as np
import pytest
import torch

from lidnet_fast.data.phantoms.chest import ChestPhantom
from lidnet_fast.data.phantoms.study import Study, make_study
from lidnet_fast.data.samples.dataset import LesionPatches, collate, make_batch
from lidnet_fast.data.simulation.dose import DoseSimulation, sample_generator, simulate_low_dose
from lidnet_fast.models.envelope import Acquisition, Envelope
from lidnet_fast.models.files import load_denoiser, load_trained_detector
from lidnet_fast.trainer.config import DataConfig, RunConfig
from lidnet_fast.trainer.training_envelope import training_envelope
from tests.conftest import Once

CROP = 128


@pytest.fixture(scope="module")
def store(once: Once) -> Path:
    """The demo's study with few patients: chests at 2 % of the dose."""
    few = Study(patients=(("train", 1), ("test", 1)), phantom=ChestPhantom(slices=2))
    return once("few_chests", lambda path: make_study(path, few, seed=0, workers=1))


@pytest.fixture(scope="module")
def envelope(store: Path) -> Envelope:
    return training_envelope(RunConfig(data=DataConfig(store=str(store), crop=CROP)))


def head(size: int, spacing: float) -> torch.Tensor:
    """An adult's head: scalp, skull, grey and white matter, ventricles; [1,S,S], HU."""
    y, x = np.mgrid[-size / 2 : size / 2, -size / 2 : size / 2] * spacing
    r = np.hypot(x / 70, y / 90)
    brain = np.where((np.hypot(x, y) // 14) % 2 == 0, 39, 31)
    hu = np.select([np.hypot(x / 12, y / 20) < 1, r < 0.95, r < 1.05, r < 1.1], [8, brain, 1100, 60], -1000)
    return torch.from_numpy(hu[None].astype(np.float32))


def test_held_out_images_at_low_dose_lie_inside(store: Path, envelope: Envelope) -> None:
    patches = LesionPatches(store, "test", crop=None, positive_fraction=0, augment=False, seed=0)
    for draw in range(2):
        low_dose = make_batch(collate([patches[draw]]), torch.device("cpu"))["low_dose"][0].numpy()
        assert envelope.outside(Acquisition.measured(low_dose, pixel_spacing=0.7, body_part="CHEST")) == []


def test_a_head_at_normal_dose_lies_outside(envelope: Envelope) -> None:
    """The demo's denoiser made 35 HU of 15 HU of noise in the brain, and nothing was said."""
    spacing = 0.49
    scan = DoseSimulation(dose_fraction=1 / 20, photons=2e6)  # of next to no noise, as the demo makes its normal dose
    hu = simulate_low_dose(head(512, spacing), spacing, scan, [sample_generator(0, 0, 0)]).round().numpy()
    said = envelope.outside(Acquisition.measured(hu, pixel_spacing=spacing, body_part="HEAD"))
    for start in ("pixel spacing 0.49 mm", "noise in soft tissue", "body part HEAD (trained on CHEST)"):
        assert any(phrase.startswith(start) for phrase in said), said
    # Without a word of its header, the noise alone gives it away.
    assert any(phrase.startswith("noise in soft tissue") for phrase in envelope.outside(Acquisition.measured(hu)))


def test_the_envelope_is_of_the_images_that_the_denoiser_sees(store: Path, envelope: Envelope) -> None:
    """The store's images are of the normal dose; the network saw them with the noise of 2 %."""
    patches = LesionPatches(store, "train", crop=CROP, positive_fraction=0, augment=False, seed=0)
    said = envelope.outside(Acquisition.measured([patches[draw].normal_dose[0] for draw in range(4)]))
    assert len(said) == 2
    assert said[0].startswith("noise in lung")
    assert said[1].startswith("noise in soft tissue")


def test_what_a_detectors_file_says_of_its_training(trained_config: RunConfig) -> None:
    """Normal dose, whose noise is less than that of the denoiser's images, in fields of view of the run."""
    noise = load_denoiser(trained_config.out).envelope.noise
    for phase in ("detector", "collaborate"):
        detector = load_trained_detector(Path(trained_config.out, phase, "detector.pt"))
        assert detector.crop == trained_config.data.crop and detector.window == trained_config.window
        for tissue, (_, high) in detector.envelope.noise.items():
            assert high < noise[tissue][1]
