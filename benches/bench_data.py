"""Random slices and patches from a store, against what a user has without one: the DICOM files, one per slice.

The files hold a real abdominal slice (pydicom-data), shifted, with the textured noise of other scans at the same dose.
"cold" drops the files that are read from the page cache before each read, which is part of the time of all. MONAI's
CacheDataset holds decoded slices in memory: all of them, which is the bound that no reader of files can reach, and a
tenth, as with data ten times as large as memory; its PersistentDataset keeps each decoded slice in a file.
"""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom
import pytest
import torch
from pydicom.data import get_testdata_file
from pydicom.uid import ExplicitVRLittleEndian, JPEG2000Lossless, generate_uid
from torch import Tensor

from benches.harness import Contestant
from lidnet_fast.data.simulation.dose import DoseSimulation, sample_generator, simulate_low_dose
from lidnet_fast.data.store.index import SeriesInfo
from lidnet_fast.data.store.reader import Store
from lidnet_fast.data.store.writer import StoreWriter

SERIES, SLICES, SIDE = 8, 24, 512
READS = 32
PATCH = 64
SYNTAXES = {"uncompressed": ExplicitVRLittleEndian, "JPEG 2000": JPEG2000Lossless}

Window = tuple[slice, slice]
Read = Callable[[int, int, Window], np.ndarray]


@dataclass(frozen=True)
class Study:
    """The same volumes in every form."""

    folder: Path
    volumes: np.ndarray
    """int16 [SERIES, SLICES, H, W], HU"""

    def dicom(self, syntax: str, series: int, z: int) -> Path:
        return self.folder / syntax / f"{series:02d}_{z:03d}.dcm"

    def dicoms(self, syntax: str) -> list[Path]:
        return [self.dicom(syntax, series, z) for series in range(SERIES) for z in range(SLICES)]


@dataclass(frozen=True)
class Reader:
    """One way to read a window of a slice, and the file that it reads it from."""

    read: Read
    file: Callable[[int, int], Path] | None
    """None where everything is in memory."""


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Study:
    folder = tmp_path_factory.mktemp("study")
    dataset = pydicom.dcmread(get_testdata_file("explicit_VR-UN.dcm", download=False))
    hu = torch.from_numpy(dataset.pixel_array * float(dataset.RescaleSlope) + float(dataset.RescaleIntercept)).float()
    spacing = float(dataset.PixelSpacing[0])
    noisy = simulate_low_dose(
        hu.expand(SLICES, -1, -1),
        spacing,
        DoseSimulation(dose_fraction=0.5),
        [sample_generator(0, 0, z) for z in range(SLICES)],
    )
    slices = noisy.round().clamp(-1024, 3071).short().numpy()
    volumes = np.stack([np.roll(slices, 7 * series, (1, 2)) for series in range(SERIES)])
    for volume_format in ("blosc2", "zarr"):
        with StoreWriter(folder / volume_format, volume_format=volume_format) as writer:
            for number, volume in enumerate(volumes):
                axes = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
                geometry = {"spacing": (1.0, spacing, spacing), "origin": (0.0, 0.0, 0.0), "orientation": axes}
                info = SeriesInfo(f"{number}", f"{number}", "train", shape=volume.shape, **geometry)
                writer.add_series(info, volume, np.empty((0, 5)))
    made = Study(folder, volumes)
    dataset.decompress()
    dataset.RescaleSlope, dataset.RescaleIntercept, dataset.PixelRepresentation = 1, -1024, 0
    for name, syntax in SYNTAXES.items():
        (folder / name).mkdir()
        for series in range(SERIES):
            for z in range(SLICES):
                write_dicom(dataset, volumes[series, z], syntax, made.dicom(name, series, z))
    os.sync()  # only clean pages can be dropped
    return made


def write_dicom(dataset: pydicom.Dataset, hu: np.ndarray, syntax: str, path: Path) -> None:
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.PixelData = (hu + 1024).astype(np.uint16).tobytes()
    dataset["PixelData"].VR = "OW"
    if syntax != ExplicitVRLittleEndian:
        dataset.compress(syntax, generate_instance_uid=False)
    dataset.save_as(path)


@pytest.fixture(scope="module")
def readers(study) -> dict[str, Reader]:
    """Ways to read, ours first."""

    def of_store(name: str) -> Reader:
        store = Store(study.folder / name)
        suffix = {"blosc2": ".b2nd", "zarr": ".zarr"}[name]

        def read(series: int, z: int, window: Window) -> np.ndarray:
            (y, x) = window
            return store.read(series, z, (y.start, x.start, y.stop - y.start, x.stop - x.start))

        return Reader(read, lambda series, z: study.folder / name / "volumes" / f"{series:05d}{suffix}")

    def of_pydicom(syntax: str) -> Reader:
        def read(series: int, z: int, window: Window) -> np.ndarray:
            dataset = pydicom.dcmread(study.dicom(syntax, series, z))
            slope, intercept = int(dataset.RescaleSlope), int(dataset.RescaleIntercept)
            return dataset.pixel_array[window].astype(np.int16) * slope + intercept

        return Reader(read, lambda series, z: study.dicom(syntax, series, z))

    found = {"blosc2": of_store("blosc2"), "Zarr": of_store("zarr")}
    found |= {f"pydicom, {syntax}": of_pydicom(syntax) for syntax in SYNTAXES}
    return found | simple_itk(study) | monai(study)


def simple_itk(study: Study) -> dict[str, Reader]:
    try:
        import SimpleITK as sitk  # noqa: N813, the name its documentation gives it
    except ImportError:
        return {}

    def read(series: int, z: int, window: Window) -> np.ndarray:
        image = sitk.ReadImage(str(study.dicom("uncompressed", series, z)))
        return sitk.GetArrayViewFromImage(image)[0][window].astype(np.int16)

    return {"SimpleITK": Reader(read, lambda series, z: study.dicom("uncompressed", series, z))}


def monai(study: Study) -> dict[str, Reader]:
    try:
        from monai.data import CacheDataset, PersistentDataset, PydicomReader
        from monai.transforms import LoadImage
    except ImportError:
        return {}

    files = [str(file) for file in study.dicoms("uncompressed")]
    load = LoadImage(reader=PydicomReader(swap_ij=False), image_only=True, dtype=np.int16)
    persistent = PersistentDataset(files, load, study.folder / "persistent")
    persistent_files: dict[tuple[int, int], Path] = {}
    for number in range(len(files)):  # an item's file is named by a hash: find it by what appears
        before = set((study.folder / "persistent").iterdir())
        persistent[number]
        (persistent_files[divmod(number, SLICES)],) = set((study.folder / "persistent").iterdir()) - before
    os.sync()

    def reader(dataset, file: Callable[[int, int], Path] | None) -> Reader:
        return Reader(lambda series, z, window: np.asarray(dataset[series * SLICES + z])[window], file)

    def cache(rate: float) -> CacheDataset:
        return CacheDataset(files, load, cache_rate=rate, copy_cache=False, progress=False)

    return {
        "CacheDataset": reader(cache(1.0), None),
        "CacheDataset of 1/10": reader(cache(0.1), lambda series, z: study.dicom("uncompressed", series, z)),
        "PersistentDataset": reader(persistent, lambda series, z: persistent_files[series, z]),
    }


def forget(files: Iterable[Path]) -> None:
    """Drop files, and all files of folders, from the page cache."""
    for path in files:
        for file in path.rglob("*") if path.is_dir() else [path]:
            if file.is_file():
                with file.open("rb") as opened:
                    os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.mark.parametrize("side", [SIDE, PATCH])
@pytest.mark.parametrize("cache", ["warm", "cold"])
def test_random_reads(race, study, readers, side, cache):
    rng = np.random.default_rng(0)
    places = [
        (int(rng.integers(SERIES)), int(rng.integers(SLICES)), (slice(y, y + side), slice(x, x + side)))
        for y, x in rng.integers(0, SIDE - side + 1, (READS, 2)).tolist()
    ]

    def contestant(reader: Reader) -> Contestant:
        files = {reader.file(series, z) for series, z, _ in places} if reader.file else set()

        def run() -> tuple[Tensor]:
            if cache == "cold":
                forget(files)
            return (torch.from_numpy(np.stack([reader.read(*place) for place in places])),)

        return run

    runs = {name: contestant(reader) for name, reader in readers.items()}
    expected = np.stack([study.volumes[series, z][window] for series, z, window in places])
    race(
        "random reads",
        f"{READS} of {side}x{side}",
        cache,
        ours=runs.pop("blosc2"),
        peers=runs,
        expected=(torch.from_numpy(expected).double(),),
        tolerance=0,
    )
