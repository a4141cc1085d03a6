"""The embedded studies: phantom patients with the noise of a normal-dose scan, as stores like any other."""

import multiprocessing
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from lidnet_fast.data.phantoms.chest import ChestPhantom
from lidnet_fast.data.phantoms.head import HeadPhantom
from lidnet_fast.data.phantoms.liver import LiverPhantom
from lidnet_fast.data.phantoms.phantom import Phantom
from lidnet_fast.data.simulation.dose import DoseSimulation, sample_generator, simulate_low_dose
from lidnet_fast.data.store.reader import SeriesInfo
from lidnet_fast.data.store.writer import StoreWriter
from lidnet_fast.models.windowing import HUWindow
from lidnet_fast.progress import progress


@dataclass(frozen=True)
class Study:
    """What an embedded study consists of; the defaults are the chest's, which the demo uses.

    Attributes:
        patients: number of phantoms per split.
        phantom: of the patients; `unannotated_fraction` is about the training split, the others are fully annotated.
        scan_photons: photons per ray of the normal-dose scan.
        dose_fraction: of the low-dose scan.
        window: HU in which the organ is read, and networks are trained.
        lesion_contrasts: HU of the lesions that `assess` inserts into its slices, in soft tissue; None: as in any CT.
    """

    patients: tuple[tuple[str, int], ...] = (("train", 50), ("val", 4), ("test", 16))
    phantom: Phantom = field(default_factory=ChestPhantom)
    scan_photons: float = 1e5
    dose_fraction: float = 0.02
    window: HUWindow = field(default_factory=lambda: HUWindow(-1000.0, 400.0))
    lesion_contrasts: tuple[float, ...] | None = None


STUDIES = {
    "chest": Study(),
    "liver": Study(
        patients=(("train", 44), ("val", 6), ("test", 36)),
        phantom=LiverPhantom(),
        scan_photons=1.6e6,
        dose_fraction=0.1,
        window=HUWindow(-160.0, 240.0),
        lesion_contrasts=(-15.0, -25.0, -40.0, -60.0),
    ),
    "head": Study(
        patients=(("train", 44), ("val", 6), ("test", 36)),
        phantom=HeadPhantom(),
        scan_photons=2.5e6,
        dose_fraction=0.05,
        window=HUWindow(0.0, 100.0),
        lesion_contrasts=(8.0, 12.0, 18.0, 27.0),
    ),
}
"""Name -> study."""

# A scan at `scan_photons` is simulated as a fraction of one with this many times more photons: nearly noise-free.
_CLEAN_FACTOR = 20.0


def make_study(path: Path, study: Study, seed: int, workers: int = 2) -> None:
    """Write the study's store, on `workers` processes."""
    jobs = [
        (study, split, seed, number)
        for number, split in enumerate(split for split, count in study.patients for _ in range(count))
    ]
    simulation = DoseSimulation(dose_fraction=study.dose_fraction, photons=study.scan_photons)
    with (
        multiprocessing.get_context("spawn").Pool(workers) as pool,
        StoreWriter(path, simulation=simulation.to_dict(), split={"seed": seed, "by": "phantom study"}) as writer,
    ):
        for info, volume, boxes in progress(pool.imap(_scan, jobs), "phantom patients", len(jobs)):
            writer.add_series(info, volume, boxes)


def _scan(job: tuple[Study, str, int, int]) -> tuple[SeriesInfo, np.ndarray, np.ndarray]:
    study, split, seed, number = job
    torch.set_num_threads(1)
    phantom = study.phantom if split == "train" else replace(study.phantom, unannotated_fraction=0.0)
    patient = phantom.make_patient(np.random.default_rng([seed, number]))
    clean = DoseSimulation(dose_fraction=1 / _CLEAN_FACTOR, photons=study.scan_photons * _CLEAN_FACTOR)
    volume = torch.from_numpy(patient.volume)
    generators = [sample_generator(seed, number, z) for z in range(len(volume))]
    scan = simulate_low_dose(volume, phantom.pixel_spacing, clean, generators)
    info = SeriesInfo(
        series_uid=f"phantom-{seed}-{number:03d}",
        patient_id=f"phantom-{number:03d}",
        split=split,
        shape=tuple(volume.shape),  # type: ignore[arg-type]
        spacing=(phantom.slice_spacing_mm, phantom.pixel_spacing, phantom.pixel_spacing),
        origin=(0.0, 0.0, 0.0),
        orientation=(1.0, 0.0, 0.0, 0.0, 1.0, 0.0),
        body_part=phantom.body_part,
    )
    return info, scan.round().clamp(-32768, 32767).short().numpy(), patient.boxes[patient.annotated]
