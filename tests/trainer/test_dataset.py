"""Samples are pure functions of (seed, draw), and boxes stay on their lesions."""

from pathlib import Path

import numpy as np
import pytest
import torch

from lidnet_fast.data.dataset import LesionPatches, Sample, make_batch
from lidnet_fast.data.dose import DoseSimulation
from lidnet_fast.data.store import SeriesInfo
from lidnet_fast.data.store_writer import StoreWriter
from lidnet_fast.errors import InputError
from lidnet_fast.trainer.datamodule import DrawSampler

CPU = torch.device("cpu")
LESION_HU = 100


def write_store(path: Path, simulate: bool = True, split: str = "train", size: int = 96) -> Path:
    """Two patients; every lesion is a bright rectangle on water, so that a box can be checked against the pixels."""
    rng = np.random.default_rng(0)
    simulation = DoseSimulation(dose_fraction=0.2).to_dict() if simulate else None
    with StoreWriter(path, simulation=simulation) as writer:
        for patient in range(2):
            volume = np.zeros((3, size, size), np.int16)
            boxes = []
            for z in range(2):  # the third slice has no lesion
                x1, y1 = rng.integers(10, size - 30, 2)
                width, height = rng.integers(6, 16, 2)
                volume[z, y1 : y1 + height, x1 : x1 + width] = LESION_HU
                boxes.append((z, x1, y1, x1 + width, y1 + height))
            info = series_info(f"series{patient}", f"patient{patient}", split, volume, has_low_dose=not simulate)
            writer.add_series(info, volume, np.array(boxes), low_dose=None if simulate else volume - 7)
    return path


def series_info(series: str, patient: str, split: str, volume: np.ndarray, has_low_dose: bool) -> SeriesInfo:
    geometry = ((1.0, 0.7, 0.7), (0.0, 0.0, 0.0), (1.0, 0.0, 0.0, 0.0, 1.0, 0.0))
    return SeriesInfo(series, patient, split, volume.shape, *geometry, has_low_dose)


def patches(store: Path, **changes) -> LesionPatches:
    options = {"crop": 64, "positive_fraction": 0.8, "augment": True, "seed": 3} | changes
    return LesionPatches(store, "train", **options)


def same(a: Sample, b: Sample) -> bool:
    return torch.equal(a.normal_dose, b.normal_dose) and torch.equal(a.boxes, b.boxes) and a.noise_key == b.noise_key


def test_a_draw_is_reproducible_and_draws_differ(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store")
    first, second = patches(store), patches(store)
    for draw in (0, 5, 1000):
        assert same(first[draw], second[draw])
    assert not same(first[0], first[1])
    assert not same(first[0], patches(store, seed=4)[0])


def test_noise_does_not_depend_on_the_batch_and_is_fresh_every_epoch(tmp_path: Path) -> None:
    data = patches(write_store(tmp_path / "store"), crop=None, augment=False)
    alone = make_batch([data[2]], CPU)
    together = make_batch([data[0], data[2]], CPU)
    torch.testing.assert_close(alone["low_dose"][0], together["low_dose"][1], rtol=0, atol=1e-3)
    keys = {data[draw].noise_key for draw in range(4 * len(data))}
    assert len(keys) == 4 * len(data)


@pytest.mark.parametrize("augment", [False, True])
def test_boxes_lie_on_their_lesions(tmp_path: Path, augment: bool) -> None:
    data = patches(write_store(tmp_path / "store"), augment=augment)
    seen = 0
    for start in range(0, 40, 8):
        batch = make_batch([data[draw] for draw in range(start, start + 8)], CPU)
        for image, boxes in zip(batch["normal_dose"][:, 0], batch["boxes"], strict=True):
            mask = torch.zeros_like(image, dtype=torch.bool)
            for x1, y1, x2, y2 in boxes.long().tolist():
                mask[y1:y2, x1:x2] = True
                seen += 1
            assert (image[mask] == LESION_HU).all()
            # Lesions without a box are the slivers at the edge of the field of view.
            inner = image[12:-12, 12:-12]
            assert (inner[~mask[12:-12, 12:-12]] != LESION_HU).all() or len(boxes) == 0
    assert seen > 20


def test_paired_low_dose_is_read_and_flipped_with_its_twin(tmp_path: Path) -> None:
    data = patches(write_store(tmp_path / "store", simulate=False))
    batch = make_batch([data[draw] for draw in range(8)], CPU)
    assert torch.equal(batch["low_dose"], batch["normal_dose"] - 7)


def test_positive_fraction(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store")
    always, never = (patches(store, positive_fraction=f) for f in (1.0, 0.0))
    assert all(len(always[draw].boxes) for draw in range(50))
    assert any(not len(never[draw].boxes) for draw in range(50))


def test_sampler_strides_over_ranks_without_overlap_and_starts_where_told() -> None:
    ranks = [DrawSampler(5, 2, rank, 2) for rank in range(2)]
    batches = [list(sampler) for sampler in ranks]
    assert sorted(draw for batch in [*batches[0], *batches[1]] for draw in batch) == list(range(20))
    ranks[1].start = 3
    assert list(ranks[1]) == batches[1][3:]


def test_refusals(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store")
    with pytest.raises(InputError, match="the test split has no slices"):
        LesionPatches(store, "test", crop=64, positive_fraction=0.5, augment=False, seed=0)
    with pytest.raises(InputError, match=r"data.crop is 128, but series series0"):
        patches(store, crop=128)
    with StoreWriter(tmp_path / "none") as writer:
        volume = np.zeros((1, 96, 96), np.int16)
        info = series_info("s", "p", "train", volume, has_low_dose=False)
        writer.add_series(info, volume, np.zeros((0, 5)))
    with pytest.raises(InputError, match="series s has no low-dose images"):
        patches(tmp_path / "none")
