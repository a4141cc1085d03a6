"""Samples are pure functions of (seed, draw), and boxes stay on their lesions."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from torch.utils.data._utils.pin_memory import pin_memory

from lidnet_fast.data.samples.dataset import Batch, LesionPatches, Sample, collate, make_batch
from lidnet_fast.data.simulation.dose import DoseSimulation, noise_variance_maps, sample_generator, sector_noise
from lidnet_fast.data.store.reader import SeriesInfo, Store
from lidnet_fast.data.store.writer import StoreWriter
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
    geometry = {"spacing": (1.0, 0.7, 0.7), "origin": (0.0, 0.0, 0.0), "orientation": (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)}
    return SeriesInfo(series, patient, split, has_low_dose, shape=volume.shape, **geometry)


def patches(store: Path, **changes) -> LesionPatches:
    options = {"crop": 64, "positive_fraction": 0.8, "augment": True, "seed": 3} | changes
    return LesionPatches(store, "train", **options)


def batch_of(data: LesionPatches, draws: Iterable[int]) -> Batch:
    return make_batch(collate([data[draw] for draw in draws]), CPU)


def same(a: Sample, b: Sample) -> bool:
    pixels = np.array_equal(a.normal_dose, b.normal_dose) and np.array_equal(a.boxes, b.boxes)
    return pixels and a.id == b.id and a.noise_keys == b.noise_keys


def test_a_draw_is_reproducible_and_draws_differ(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store")
    first, second = patches(store), patches(store)
    for draw in (0, 5, 1000):
        assert same(first[draw], second[draw])
    assert not same(first[0], first[1])
    assert not same(first[0], patches(store, seed=4)[0])


def test_noise_does_not_depend_on_the_batch_and_is_fresh_every_epoch(tmp_path: Path) -> None:
    data = patches(write_store(tmp_path / "store"), crop=None, augment=False)
    alone = batch_of(data, [2])
    together = batch_of(data, [0, 2])
    torch.testing.assert_close(alone["low_dose"][0], together["low_dose"][1], rtol=0, atol=1e-3)
    keys = {data[draw].noise_keys[0] for draw in range(4 * len(data))}
    assert len(keys) == 4 * len(data)


@pytest.mark.parametrize("augment", [False, True])
def test_boxes_lie_on_their_lesions(tmp_path: Path, augment: bool) -> None:
    data = patches(write_store(tmp_path / "store"), augment=augment)
    seen = 0
    for start in range(0, 40, 8):
        batch = batch_of(data, range(start, start + 8))
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
    batch = batch_of(data, range(8))
    assert torch.equal(batch["low_dose"], batch["normal_dose"] - 7)


def test_slices_alone_are_noisy_by_seed_epoch_and_sample(tmp_path: Path) -> None:
    """What a run without context trains on follows from this formula, whatever else a dataset can do."""
    data = patches(write_store(tmp_path / "store"))
    draw = len(data) + 2
    sample = data[draw]
    _, _, y0, x0, *flips = sample.id
    assert data.simulation is not None
    whole = torch.from_numpy(data.store.read(*sample.id[:2]))[None]
    maps = noise_variance_maps(whole, 0.7, data.simulation)
    noise = sector_noise(maps, (96, 96), [(y0, x0, 64, 64)], [sample_generator(3, 1, 2)])
    noise = noise.flip([axis + 1 for axis in range(2) if flips[axis]])
    batch = batch_of(data, [draw])
    assert batch["normal_dose"].shape == batch["low_dose"].shape == (1, 1, 64, 64)
    assert torch.equal(batch["low_dose"], batch["normal_dose"] + noise[:, None])


@pytest.mark.parametrize("simulate", [True, False])
def test_neighbours_are_the_slices_beside(tmp_path: Path, simulate: bool) -> None:
    """In the field of view and the flips of the middle slice; beyond the ends, the end slices."""
    store = write_store(tmp_path / "store", simulate)
    alone, among = patches(store), patches(store, context=1, low_dose_context=2)
    for draw in range(12):
        one, batch = batch_of(alone, [draw]), batch_of(among, [draw])
        assert batch["normal_dose"].shape == (1, 3, 64, 64)
        assert batch["low_dose"].shape == (1, 5, 64, 64)
        assert batch["ids"] == one["ids"]
        assert torch.equal(batch["normal_dose"][:, 1], one["normal_dose"][:, 0])
        assert torch.equal(batch["boxes"][0], one["boxes"][0])
        index, z, y0, x0, *flips = batch["ids"][0]
        for channel in range(3):
            beside = among.store.read(index, min(max(z + channel - 1, 0), 2), (y0, x0, 64, 64))
            beside = np.flip(beside, [axis for axis in range(2) if flips[axis]])
            assert np.array_equal(batch["normal_dose"][0, channel], beside)
        if not simulate:
            assert torch.equal(batch["low_dose"][:, 1:4], batch["normal_dose"] - 7)


@pytest.mark.parametrize("simulate", [True, False])
def test_normal_dose_alone_is_the_same_samples(tmp_path: Path, simulate: bool) -> None:
    """Without the low dose, neither stored nor simulated, and without the neighbours that it alone has."""
    store = write_store(tmp_path / "store", simulate)
    both = patches(store, context=1, low_dose_context=2)
    alone = patches(store, context=1, low_dose_context=2, with_low_dose=False)
    for draw in range(12):
        sample = alone[draw]
        assert sample.low_dose is None
        assert sample.attenuation is None
        assert sample.normal_dose.shape[0] == 3
        batch, expected = batch_of(alone, [draw]), batch_of(both, [draw])
        assert batch.keys() == expected.keys() - {"low_dose"}
        assert batch["ids"] == expected["ids"]
        assert torch.equal(batch["normal_dose"], expected["normal_dose"])
        assert torch.equal(batch["boxes"][0], expected["boxes"][0])


@pytest.mark.parametrize("context", [0, 1])
def test_what_is_cached_changes_nothing(tmp_path: Path, context: int) -> None:
    store = write_store(tmp_path / "store")
    options = {"context": context, "low_dose_context": context}
    cached, never = patches(store, **options), patches(store, **options, cache_mib=0)
    for draw in range(12):
        batch, again, expected = (batch_of(data, [draw]) for data in (cached, cached, never))
        assert all(torch.equal(found["low_dose"], expected["low_dose"]) for found in (batch, again))
        assert torch.equal(batch["normal_dose"], expected["normal_dose"])


def test_a_slice_has_the_same_noise_in_every_stack_of_an_epoch(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store")
    data = patches(store, context=1, low_dose_context=1, crop=None, augment=False)
    seen: dict[tuple[int, int, int], torch.Tensor] = {}
    repeated = 0
    for draw in range(3 * len(data)):
        batch = batch_of(data, [draw])
        index, z, *_ = batch["ids"][0]
        for channel, beside in enumerate((max(z - 1, 0), z, min(z + 1, 2))):
            noisy = batch["low_dose"][0, channel]
            known = seen.setdefault((draw // len(data), index, beside), noisy)
            torch.testing.assert_close(noisy, known, rtol=0, atol=1e-3)
            repeated += known is not noisy
    assert repeated > 20
    assert not torch.allclose(seen[0, 0, 0], seen[1, 0, 0], atol=1)  # fresh every epoch
    assert not torch.allclose(seen[0, 0, 0] - seen[0, 0, 1], seen[0, 0, 1] - seen[0, 0, 0], atol=1)


def test_positive_fraction(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store")
    always, never = (patches(store, positive_fraction=f) for f in (1.0, 0.0))
    assert all(len(always[draw].boxes) for draw in range(50))
    assert any(not len(never[draw].boxes) for draw in range(50))


def test_sampler_shares_batches_out_to_ranks_and_starts_where_told() -> None:
    whole = list(DrawSampler(5, 4, 0, 1))
    assert [draw for batch in whole for draw in batch] == list(range(20))
    ranks = [DrawSampler(5, 4, rank, 2) for rank in range(2)]
    batches = [list(sampler) for sampler in ranks]
    assert [first + second for first, second in zip(*batches, strict=True)] == whole
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


def test_an_id_says_which_pixels_a_sample_shows(tmp_path: Path) -> None:
    path = write_store(tmp_path / "store")
    data, store = patches(path), Store(path)
    draws = range(40)
    batch = batch_of(data, draws)
    for image, (series, z, y0, x0, *flips) in zip(batch["normal_dose"][:, 0], batch["ids"], strict=True):
        window = torch.from_numpy(store.read(series, z, (y0, x0, 64, 64))).float()
        assert torch.equal(image, window.flip([axis for axis in (0, 1) if flips[axis]]))
    assert len({flips for *_, a, b in batch["ids"] for flips in [(a, b)]}) == 4


def test_noise_is_flipped_with_its_image(tmp_path: Path) -> None:
    """The noise of a sample is that of the window, which is drawn before the flip."""
    path = write_store(tmp_path / "store")
    flipped, straight = batch_of(patches(path), range(8)), batch_of(patches(path, augment=False), range(8))
    assert any(any(sample[4:]) for sample in flipped["ids"])
    for n, (*place, flip_rows, flip_columns) in enumerate(flipped["ids"]):
        assert place == list(straight["ids"][n][:4])
        axes = [axis for axis, flip in ((0, flip_rows), (1, flip_columns)) if flip]
        for name in ("normal_dose", "low_dose"):
            assert torch.equal(flipped[name][n, 0], straight[name][n, 0].flip(axes))


def test_slices_of_different_sizes_share_a_batch(tmp_path: Path) -> None:
    simulation = DoseSimulation(dose_fraction=0.2).to_dict()
    sizes = [(96, 96), (150, 70), (64, 200)]
    with StoreWriter(tmp_path / "store", simulation=simulation) as writer:
        for n, size in enumerate(sizes):
            volume = np.full((2, *size), 40 * n, np.int16)
            info = series_info(f"series{n}", f"patient{n}", "train", volume, has_low_dose=False)
            writer.add_series(info, volume, np.zeros((0, 5)))
    data = patches(tmp_path / "store")
    batch = batch_of(data, range(12))
    assert {sample[0] for sample in batch["ids"]} == {0, 1, 2}
    for draw in range(12):
        alone = batch_of(data, [draw])
        torch.testing.assert_close(batch["low_dose"][draw], alone["low_dose"][0], rtol=0, atol=1e-3)


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_goes_on_at_any_step_on_any_number_of_workers(tmp_path: Path, workers: int) -> None:
    """The second half of an epoch, begun anew, is the second half: pixels, boxes and noise."""
    data = patches(write_store(tmp_path / "store"))
    expected = [batch_of(data, range(start, start + 3)) for start in range(0, 18, 3)]
    for done in (0, 4):
        sampler = DrawSampler(6, 3, 0, 1)
        sampler.start = done
        loader = DataLoader(patches(tmp_path / "store"), batch_sampler=sampler, collate_fn=collate, num_workers=workers)
        batches = [make_batch(samples, CPU) for samples in loader]
        assert len(batches) == 6 - done
        for batch, same_batch in zip(batches, expected[done:], strict=True):
            assert batch["ids"] == same_batch["ids"]
            assert torch.equal(batch["low_dose"], same_batch["low_dose"])
            assert all(torch.equal(a, b) for a, b in zip(batch["boxes"], same_batch["boxes"], strict=True))


@pytest.mark.parametrize("simulate", [True, False])
def test_all_that_goes_to_the_gpu_is_pinned(tmp_path: Path, simulate: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    data = patches(write_store(tmp_path / "store", simulate=simulate))
    samples = collate([data[draw] for draw in range(3)])
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor, *_: pinned.append(tensor) or tensor.clone())
    copy = pin_memory(samples)  # as a DataLoader does
    tensors = [samples.normal_dose, samples.boxes, *samples.attenuation.values()]
    tensors += [] if simulate else [samples.low_dose]
    assert {id(tensor) for tensor in pinned} == {id(tensor) for tensor in tensors}
    assert len(tensors) == 3
    assert torch.equal(make_batch(copy, CPU)["low_dose"], make_batch(samples, CPU)["low_dose"])
