"""Our trainer against ldct-benchmark's training loop: RED-CNN on the same DICOM files, patches and batch size.

    pip install --no-deps ldct-benchmark scikit-image && pip install matplotlib imageio lazy-loader tifffile
    python -m benches.profile_ldct_benchmark

ldct-benchmark (Eulig, Ommer and Kachelriess, "Benchmarking deep learning-based low-dose CT image denoising algorithms",
Med. Phys. 51, 2024) reads every slice with pydicom and crops it. Its Trainer runs as published, but for the experiment
tracker, a stand-in here, and its list of patients, which names the files made by this script. Ours runs with logs,
checkpoints and clocks, on a store that `prepare` made of the same files. Turns alternate; the first steps of each are
not counted.
"""

import argparse
import statistics
import sys
import tempfile
import time
import types
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
import torch
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from lidnet_fast.data.phantoms.chest import ChestPhantom
from lidnet_fast.data.prepare.plan import prepare
from lidnet_fast.data.simulation.dose import DoseSimulation, sample_generator, simulate_low_dose
from lidnet_fast.runtime import keep_freed_memory, machine_facts, peak_memory_mb, reset_peak_memory
from lidnet_fast.trainer.config import DataConfig, DenoiserConfig, RunConfig
from lidnet_fast.trainer.run import Run, curves

PATCH, BATCH, STEPS, WARM_UP = 64, 16, 8, 2
PATIENTS, SLICES = 3, 8


def write_slices(folder: Path, volume: np.ndarray, spacing: float, patient: str) -> None:
    """A CT series of one file per slice, named as The Cancer Imaging Archive names them."""
    folder.mkdir(parents=True)
    series, study = generate_uid(), generate_uid(entropy_srcs=[patient])
    for z, image in enumerate(volume):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = CTImageStorage
        meta.MediaStorageSOPInstanceUID = generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        path = folder / f"1-{z + 1}.dcm"
        dataset = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
        dataset.SOPClassUID, dataset.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
        dataset.SeriesInstanceUID, dataset.StudyInstanceUID = series, study
        dataset.PatientID, dataset.Modality, dataset.ImageType = patient, "CT", ["ORIGINAL", "PRIMARY", "AXIAL"]
        dataset.Rows, dataset.Columns = image.shape
        dataset.BitsAllocated = dataset.BitsStored = 16
        dataset.HighBit, dataset.PixelRepresentation = 15, 0
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
        dataset.PixelSpacing, dataset.SliceThickness = [spacing, spacing], 5.0
        dataset.ImagePositionPatient, dataset.ImageOrientationPatient = [0, 0, 5.0 * z], [1, 0, 0, 0, 1, 0]
        dataset.RescaleSlope, dataset.RescaleIntercept = 1, -1024
        dataset.PixelData = (image.astype(np.int32) + 1024).clip(0, 4095).astype(np.uint16).tobytes()
        dataset.save_as(path, enforce_file_format=True)


def write_study(root: Path) -> list[dict[str, object]]:
    """Phantom patients at full and at low dose; returns ldct-benchmark's list of them."""
    phantom = ChestPhantom(slices=SLICES)
    patients: list[dict[str, object]] = []
    for number in range(PATIENTS):
        name = f"L{number:03d}"
        volume = phantom.make_patient(np.random.default_rng(number)).volume
        normal = torch.from_numpy(volume).float()
        generators = [sample_generator(0, number, z) for z in range(SLICES)]
        low = simulate_low_dose(normal, phantom.pixel_spacing, DoseSimulation(0.1), generators)
        write_slices(root / "full" / name, normal.numpy(), phantom.pixel_spacing, name)
        write_slices(root / "low" / name, low.round().numpy(), phantom.pixel_spacing, name)
        patients.append({"id": name, "n_slices": SLICES, "input": f"./low/{name}", "target": f"./full/{name}"})
    return patients


class TheirTrainer:
    """ldct-benchmark's RED-CNN Trainer on these files."""

    def __init__(self, root: Path, patients: list[dict[str, object]]) -> None:
        tracker = types.ModuleType("wandb")
        tracker.run = Namespace(dir=str(root))  # type: ignore[attr-defined]
        sys.modules.setdefault("wandb", tracker)
        import ldctbench.data.LDCTMayo as data  # noqa: N813
        from ldctbench.methods.redcnn.Trainer import Trainer

        dataset = sys.modules["ldctbench.data.LDCTMayo"] if isinstance(data, type) else data
        info = {"mean": 481.0, "std": 502.0, "min": 0.0, "max": 4095.0, "train_set": patients, "val_set": patients}
        dataset.load_yaml = lambda path: info  # type: ignore[attr-defined]
        arguments = Namespace(
            seed=0, datafolder=str(root), patchsize=PATCH, data_subset=1.0, data_norm="meanstd", mbs=BATCH,
            iterations_before_val=STEPS, num_workers=0, cuda=False, devices=0, optimizer="adam", lr=1e-4,
            adam_b1=0.9, adam_b2=0.999,
        )  # fmt: skip
        self._times: list[float] = []
        step = Trainer.train_step

        def timed_step(trainer: object, batch: object) -> None:
            step(trainer, batch)
            self._times.append(time.perf_counter())

        Trainer.train_step = timed_step
        self.trainer = Trainer(arguments, torch.device("cpu"))

    def turn(self) -> tuple[float, float]:
        """Images per second and peak memory in MiB of one turn."""
        self._times.clear()
        reset_peak_memory()
        self.trainer.train()
        return BATCH / statistics.median(np.diff(self._times[WARM_UP:])), peak_memory_mb()


def our_turn(config: RunConfig, out: Path) -> tuple[float, float]:
    """The same of our denoiser phase."""
    run = Run(replace(config, out=str(out)))
    run.train_denoiser()
    logged = curves(out / "denoiser")
    return statistics.median(logged["speed/images_per_s"][1][WARM_UP:]), logged["speed/peak_memory_mb"][1][-1]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    keep_freed_memory()
    facts = machine_facts()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        theirs = TheirTrainer(root, write_study(root))
        splits = root / "splits.csv"
        splits.write_text("patient_id,split\nL000,train\nL001,val\nL002,test\n")
        store = root / "store"
        prepare([root / "full"], store, low_dose=root / "low", splits=splits)
        config = RunConfig(
            device="cpu",
            data=DataConfig(store=str(store), crop=PATCH),
            denoiser=DenoiserConfig("redcnn", steps=STEPS, batch_size=BATCH),
            log_every=1,
            checkpoint_every=STEPS // 2,
            precision="float32",
        )
        fast = {
            "ours, float32": config,
            "ours, bfloat16": replace(config, precision="bfloat16"),
        }
        found: dict[str, list[tuple[float, float]]] = {"ldct-benchmark": [], **{name: [] for name in fast}}
        for number in range(options.rounds):
            found["ldct-benchmark"].append(theirs.turn())
            for name, variant in fast.items():
                found[name].append(our_turn(variant, root / f"{name} {number}"))
    print(f"{facts['processor']}, torch {facts['torch']}, pydicom {pydicom.__version__}, {facts['date']}\n")
    print(f"| RED-CNN, {BATCH}x{PATCH}x{PATCH} | images/s | times | peak MiB |\n| --- | ---: | ---: | ---: |")
    base = statistics.median(speed for speed, _ in found["ldct-benchmark"])
    for name, turns in found.items():
        speed = statistics.median(speed for speed, _ in turns)
        memory = statistics.median(memory for _, memory in turns)
        print(f"| {name} | {speed:.2f} | {speed / base:.2f} | {memory:.0f} |")


if __name__ == "__main__":
    main()
