"""Random reads of CT series: our store against what people keep slices in today, all holding identical series.

Studies are chest phantoms, and a real abdominal slice (pydicom-data) under other noise in each slice and shifted in
each series. LIDNET_FAST_BENCH_GB says how large the second is. A peer that isn't installed is left out, with the reason
among pytest's warnings. "cold" drops the files from the page cache (posix_fadvise, DONTNEED) before each turn.

Zarr, zarrs and tensorstore read one array, whose blocks and codec are our store's. nnU-Net's files are made for the
patch that is read. CacheDataset holds all slices decoded in memory, the bound that no reader of files can reach.
"""

import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pydicom
import pytest
import torch
from pydicom.data import get_testdata_file
from pydicom.uid import ExplicitVRLittleEndian, generate_uid
from torch.utils.data import DataLoader, Dataset

from benches.harness import Contestant
from lidnet_fast.data.phantoms.chest import ChestPhantom
from lidnet_fast.data.simulation.dose import DoseSimulation, sample_generator, simulate_low_dose
from lidnet_fast.data.store.index import SeriesInfo
from lidnet_fast.data.store.reader import Store
from lidnet_fast.data.store.writer import StoreWriter

SIDE = 512
PHANTOMS, PHANTOM_SLICES = 50, 8
CT_SLICES = 80
CT_SERIES = max(1, round(float(os.environ.get("LIDNET_FAST_BENCH_GB", "2")) * 1e9 / (CT_SLICES * SIDE * SIDE * 2)))
READS, BATCH = 32, 8

Place = tuple[int, slice, slice, slice]
"""Series, slices, rows, columns."""
Read = Callable[[Place], np.ndarray]
Files = Callable[[Place], Iterable[Path]]
"""What is read for a window, to be dropped from the page cache."""


@dataclass(frozen=True, eq=False)
class Study:
    """The same volumes for all, and a folder for their files."""

    folder: Path
    volumes: np.ndarray
    """int16 [series, Z, H, W], HU"""

    def in_folder(self, name: str) -> Files:
        files = [file for file in (self.folder / name).rglob("*") if file.is_file()]
        return lambda place: files

    def dicom(self, series: int, z: int) -> Path:
        return self.folder / "dicom" / f"{series:02d}_{z:03d}.dcm"

    def dicoms(self, place: Place) -> list[Path]:
        return [self.dicom(place[0], z) for z in range(place[1].start, place[1].stop)]


def lidnet_fast(study: Study, side: int) -> tuple[Callable[[], Read], Files]:
    """Our store. Like every peer: what opens it, in the process that reads, and its files."""
    axes = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
    geometry = {"spacing": (1.0, 0.7, 0.7), "origin": (0.0, 0.0, 0.0), "orientation": axes}
    if not (study.folder / "store").exists():
        with StoreWriter(study.folder / "store") as writer:
            for number, volume in enumerate(study.volumes):
                info = SeriesInfo(f"{number}", f"{number}", "train", shape=volume.shape, **geometry)
                writer.add_series(info, volume, np.empty((0, 5)))

    def opened() -> Read:
        store = Store(study.folder / "store")

        def read(place: Place) -> np.ndarray:
            series, z, y, x = place
            context = (z.stop - z.start) // 2
            return store.read_stack(
                series, z.start + context, context, (y.start, x.start, y.stop - y.start, x.stop - x.start)
            )

        return read

    return opened, study.in_folder("store")


def nnunet(study: Study, side: int) -> tuple[Callable[[], Read], Files]:
    from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2

    name = f"nnunet_{side}"
    folder = study.folder / name
    if not folder.exists():
        folder.mkdir()
        for number, volume in enumerate(study.volumes):
            data = volume[None]
            blocks, chunks = comp_blosc2_params(data.shape, (side, side), bytes_per_pixel=2)
            nnUNetDatasetBlosc2.save_case(data, np.zeros_like(data), {}, str(folder / f"{number:05d}"), chunks, blocks)

    def opened() -> Read:
        dataset = nnUNetDatasetBlosc2(str(folder))
        return lambda place: dataset.load_case(f"{place[0]:05d}")[0][(0, *place[1:])]

    return opened, study.in_folder(name)


def array_of_zarr(study: Study) -> Path:
    import zarr

    path = study.folder / "array.zarr"
    if not path.exists():
        array = zarr.create_array(
            path,
            shape=study.volumes.shape,
            dtype=np.int16,
            chunks=(1, 1, 128, 128),
            shards=(1, study.volumes.shape[1], SIDE, SIDE),
            compressors=zarr.codecs.BloscCodec(cname="lz4", clevel=5, shuffle="shuffle"),
        )
        for number, volume in enumerate(study.volumes):
            array[number] = volume
    return path


def of_zarr(study: Study, side: int) -> tuple[Callable[[], Read], Files]:
    import zarr

    path = array_of_zarr(study)
    return lambda: zarr.open_array(path, mode="r").__getitem__, study.in_folder(path.name)


def zarrs(study: Study, side: int) -> tuple[Callable[[], Read], Files]:
    import zarr
    import zarrs  # noqa: F401, which registers its pipeline

    path = array_of_zarr(study)

    def opened() -> Read:
        with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
            return zarr.open_array(path, mode="r").__getitem__

    return opened, study.in_folder(path.name)


def tensorstore(study: Study, side: int) -> tuple[Callable[[], Read], Files]:
    import tensorstore

    path = array_of_zarr(study)

    def opened() -> Read:
        kvstore = {"driver": "file", "path": str(path)}
        array = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}, open=True, read=True).result()
        return lambda place: array[place].read().result()

    return opened, study.in_folder(path.name)


def litdata(study: Study, side: int) -> tuple[Callable[[], Read], Files]:
    from litdata import StreamingDataset
    from litdata.streaming import Cache

    folder = study.folder / "litdata"
    if not folder.exists():
        writer = Cache(str(folder), chunk_bytes="64MB")
        for number, pixels in enumerate(study.volumes.reshape(-1, SIDE, SIDE)):
            writer[number] = pixels
        writer.done()
        writer.merge()

    def opened() -> Read:
        dataset = StreamingDataset(str(folder))

        def read(place: Place) -> np.ndarray:
            series, zs, *window = place
            first = series * study.volumes.shape[1]
            return np.stack([np.asarray(dataset[first + z])[tuple(window)] for z in range(zs.start, zs.stop)])

        return read

    return opened, study.in_folder("litdata")


def read_dicoms(study: Study) -> Read:
    def read(place: Place) -> np.ndarray:
        datasets = [pydicom.dcmread(path) for path in study.dicoms(place)]
        return np.stack(
            [
                dataset.pixel_array[place[2:]].astype(np.int16) * int(dataset.RescaleSlope)
                + int(dataset.RescaleIntercept)
                for dataset in datasets
            ]
        )

    return read


def of_pydicom(study: Study, side: int) -> tuple[Callable[[], Read], Files]:
    return lambda: read_dicoms(study), study.dicoms


def persistent_dataset(study: Study, side: int) -> tuple[Callable[[], Read], Files]:
    return of_monai(study, "PersistentDataset", cache_dir=study.folder / "persistent")


def cache_dataset(study: Study, side: int) -> tuple[Callable[[], Read], Files]:
    return of_monai(study, "CacheDataset", copy_cache=False, progress=False)


@cache
def of_monai(study: Study, kind: str, **options) -> tuple[Callable[[], Read], Files]:
    import monai.data
    from monai.transforms import LoadImage

    series, depth = study.volumes.shape[:2]
    dicoms = [str(study.dicom(number, z)) for number in range(series) for z in range(depth)]
    load = LoadImage(reader=monai.data.PydicomReader(swap_ij=False), image_only=True, dtype=np.int16)
    dataset = getattr(monai.data, kind)(dicoms, load, **options)
    files = (
        [dataset.cache_dir / f"{dataset.hash_func(name).decode()}.pt" for name in dicoms]
        if "cache_dir" in options
        else []
    )
    for number, file in enumerate(files):
        if not file.exists():
            dataset[number]

    def numbers(place: Place) -> range:
        return range(place[0] * depth + place[1].start, place[0] * depth + place[1].stop)

    def read(place: Place) -> np.ndarray:
        return np.stack([np.asarray(dataset[number])[place[2:]] for number in numbers(place)])

    return lambda: read, lambda place: [files[number] for number in numbers(place)] if files else []


PEERS = {
    "nnU-Net": nnunet,
    "Zarr": of_zarr,
    "zarrs": zarrs,
    "tensorstore": tensorstore,
    "litdata": litdata,
    "pydicom": of_pydicom,
    "PersistentDataset": persistent_dataset,
    "CacheDataset": cache_dataset,
}


class Reads(Dataset):
    """Windows to read, one after the other; opened in the process that reads."""

    def __init__(self, opened: Callable[[], Read], places: list[Place]):
        self.opened, self.places = opened, places
        self.read: Read | None = None

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: int) -> np.ndarray:
        self.read = self.read or self.opened()
        return self.read(self.places[number])


def contestant(opened: Callable[[], Read], places: list[Place], workers: int) -> Contestant:
    reads = Reads(opened, places)
    if not workers:
        return lambda: (torch.from_numpy(np.stack([reads[number] for number in range(len(reads))])),)
    loader = DataLoader(
        reads,
        BATCH,
        num_workers=workers,
        persistent_workers=True,
        collate_fn=lambda windows: torch.from_numpy(np.stack(windows)),
    )
    return lambda: (torch.cat(list(loader)),)


def forget(files: Iterable[Path]) -> None:
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.fixture(scope="module")
def studies(tmp_path_factory) -> Callable[[str], Study]:
    @cache
    def study(name: str) -> Study:
        made = Study(tmp_path_factory.mktemp(name), {"phantoms": phantoms, "CT": real_ct}[name]())
        write_dicoms(made)
        return made

    return study


@cache
def prepared(make: Callable, study: Study, side: int) -> tuple[Callable[[], Read], Files]:
    return make(study, side)


def phantoms() -> np.ndarray:
    phantom = ChestPhantom(image_size=SIDE, slices=PHANTOM_SLICES)
    volumes = [phantom.make_patient(np.random.default_rng(number)).volume for number in range(PHANTOMS)]
    return np.stack(volumes).round().clip(-1024, 3071).astype(np.int16)


def real_ct() -> np.ndarray:
    dataset = pydicom.dcmread(get_testdata_file("explicit_VR-UN.dcm", download=False))
    hu = torch.from_numpy(dataset.pixel_array * float(dataset.RescaleSlope) + float(dataset.RescaleIntercept)).float()
    generators = [sample_generator(0, 0, z) for z in range(CT_SLICES)]
    dose = DoseSimulation(dose_fraction=0.5)
    noisy = simulate_low_dose(hu.expand(CT_SLICES, -1, -1), float(dataset.PixelSpacing[0]), dose, generators)
    slices = noisy.round().clamp(-1024, 3071).short().numpy()
    return np.stack([np.roll(slices, 7 * series, (1, 2)) for series in range(CT_SERIES)])


def write_dicoms(study: Study) -> None:
    """Uncompressed, one file per slice."""
    dataset = pydicom.dcmread(get_testdata_file("explicit_VR-UN.dcm", download=False))
    dataset.decompress()
    dataset.RescaleSlope, dataset.RescaleIntercept, dataset.PixelRepresentation = 1, -1024, 0
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    (study.folder / "dicom").mkdir()
    for series, volume in enumerate(study.volumes):
        for z, hu in enumerate(volume):
            dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
            dataset.PixelData = (hu + 1024).astype(np.uint16).tobytes()
            dataset["PixelData"].VR = "OW"
            dataset.save_as(study.dicom(series, z))


@pytest.mark.parametrize("cached", ["warm", "cold"])
@pytest.mark.parametrize("depth, side", [(1, SIDE), (1, 64), (1, 256), (3, SIDE)])
@pytest.mark.parametrize("name", ["phantoms", "CT"])
@pytest.mark.parametrize("workers", [2, 1, 0])  # outermost, and forked before this process reads: readers have threads
def test_random_reads(race, studies, workers, name, depth, side, cached):
    study, rng = studies(name), np.random.default_rng(0)
    places = [
        (
            int(rng.integers(len(study.volumes))),
            *(slice(int(low), int(low) + size) for low, size in zip(corner, size, strict=True)),
        )
        for size in [(depth, side, side)] * READS
        for corner in [rng.integers(0, np.subtract(study.volumes.shape[1:], size) + 1)]
    ]
    runs: dict[str, Contestant] = {}
    before: dict[str, Callable[[], None]] = {}
    for peer, make in {"lidnet_fast": lidnet_fast, **PEERS}.items():
        try:
            opened, files = prepared(make, study, side)
        except ImportError as error:
            warnings.warn(f"{peer} is left out: {error}", stacklevel=1)
            continue
        runs[peer] = contestant(opened, places, workers)
        if cached == "cold":
            read = {file for place in places for file in files(place)}
            before[peer] = lambda read=read: forget(read)
    os.sync()  # only clean pages can be dropped
    expected = np.stack([study.volumes[place] for place in places])
    race(
        f"random reads, {name}",
        f"{READS} of {depth}x{side}x{side}",
        f"{cached}, {workers} workers",
        ours=runs.pop("lidnet_fast"),
        peers=runs,
        expected=(torch.from_numpy(expected).double(),),
        tolerance=0,
        before=before,
    )
