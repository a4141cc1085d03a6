import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from lidnet_fast.data.phantoms.chest import ChestPhantom
from lidnet_fast.data.phantoms.study import Study, make_study
from lidnet_fast.trainer.config import (
    CollaborateConfig,
    DataConfig,
    DenoiserConfig,
    DetectorConfig,
    EvaluationConfig,
    RunConfig,
)
from lidnet_fast.trainer.run import train
from tests.conftest import Once


@pytest.fixture(scope="session")
def tiny_study() -> Study:
    return Study(
        patients=(("train", 3), ("val", 1), ("test", 1)),
        phantom=ChestPhantom(image_size=128, slices=2, lesions_per_slice=(2, 3)),
        dose_fraction=0.05,
    )


@pytest.fixture(scope="session")
def tiny_store(once: Once, tiny_study: Study) -> Path:
    return once("tiny_store", lambda path: make_study(path, tiny_study, seed=0, workers=1))


@pytest.fixture
def tiny_config(tiny_store: Path, tmp_path: Path) -> RunConfig:
    """Seconds of training: every code path, no quality."""
    config = RunConfig(
        out=str(tmp_path / "run"),
        device="cpu",
        precision="float32",
        data=DataConfig(store=str(tiny_store), crop=64),
        denoiser=DenoiserConfig("small", {"channels": 8}, steps=4, batch_size=2, learning_rate=1e-3),
        detector=DetectorConfig("faster_rcnn_small", steps=4, batch_size=2, learning_rate=1e-3, clip_norm=5.0),
        collaborate=CollaborateConfig(
            steps=8, batch_size=2, denoiser_steps=2, detector_steps=1, denoiser_learning_rate=1e-3
        ),
        evaluation=EvaluationConfig(samples=6, validation_samples=4, validate_every=4),
        checkpoint_every=1,
        log_every=1,
    )
    # Untrained detectors score nothing above the default: regions would never hold proposals.
    objective = replace(config.collaborate.objective, proposal_score=0.0)
    return replace(config, collaborate=replace(config.collaborate, objective=objective))


@pytest.fixture
def trained_config(tiny_config: RunConfig, once: Once) -> RunConfig:
    """The tiny configuration, and in its folder a run of it trained to its end: a copy of one that all tests share."""
    run = once("tiny_run", lambda path: train(replace(tiny_config, out=str(path))))
    shutil.copytree(run, tiny_config.out)
    return tiny_config
