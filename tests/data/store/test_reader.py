import dataclasses
import io
import json
import multiprocessing
import pickle
import shutil
import zipfile

import blosc2
import numpy as np
import pytest

from lidnet_fast.data.store import reader as store_module
from lidnet_fast.data.store.backends import Blosc2
from lidnet_fast.data.store.reader import SeriesInfo, Store
from lidnet_fast.data.store.writer import StoreWriter
from lidnet_fast.errors import InputError

SHAPE = (5, 200, 150)
NO_BOXES = np.empty((0, 5), np.float32)


def make_info(series_uid="1.2.3", patient_id="anna", split="train", shape=SHAPE, **changes):
    geometry = {"spacing": (2.5, 0.7, 0.8), "origin": (-10.0, -20.0, 30.5), "orientation": (1.0, 0, 0, 0, 1.0, 0)}
    return SeriesInfo(series_uid, patient_id, split, **{"shape": shape, **geometry, **changes})


def make_volume(seed=0, shape=SHAPE):
    """A ramp with noise: what can't be compressed at all is stored as it is, without blocks."""
    noise = np.random.default_rng(seed).integers(-30, 30, shape, dtype=np.int16)
    return noise + np.linspace(-990, 3040, shape[-1]).astype(np.int16)


@pytest.fixture
def study(tmp_path):
    """Three series, the second with a measured low dose, boxes on some slices, given in no order."""
    infos = [
        make_info(slice_thickness=1.25, kernel="B30f", body_part="CHEST"),
        make_info("1.2.4", "bert", "val", (3, 64, 64), has_low_dose=True),
        make_info("1.2.5", "carla", "train", (4, 128, 256)),
    ]
    volumes = [make_volume(seed, info.shape) for seed, info in enumerate(infos)]
    boxes = [
        np.array([[3, 10, 20, 30.5, 45], [0, 0, 0, 150, 200], [3, 1.25, 2, 5, 6]], np.float32),
        np.array([[2, 0, 0, 64, 64]], np.float32),
        NO_BOXES,
    ]
    low_dose = make_volume(9, (3, 64, 64))
    path = tmp_path / "study"
    simulation = {"dose_fraction": 0.25}
    with StoreWriter(path, simulation=simulation, split={"seed": 3}) as writer:
        for info, volume, rows in zip(infos, volumes, boxes, strict=True):
            writer.add_series(info, volume, rows, low_dose if info.has_low_dose else None)
    return path, infos, volumes, boxes, low_dose


def test_round_trip(study):
    path, infos, volumes, boxes, low_dose = study
    store = Store(path)
    assert store.series == infos
    assert store.simulation == {"dose_fraction": 0.25}
    assert store.split == {"seed": 3}
    for index, volume in enumerate(volumes):
        for z in range(len(volume)):
            slice_ = store.read(index, z)
            assert slice_.dtype == np.int16
            np.testing.assert_array_equal(slice_, volume[z])
            expected = boxes[index][boxes[index][:, 0] == z, 1:]
            np.testing.assert_array_equal(store.boxes(index, z), expected)
            assert store.boxes(index, z).dtype == np.float32
    for z in range(3):
        np.testing.assert_array_equal(store.read(1, z, low_dose=True), low_dose[z])


def test_windows_are_those_of_the_slice(study):
    path, _, volumes, _, low_dose = study
    store = Store(path)
    for y0, x0, h, w in [(0, 0, 1, 1), (199, 149, 1, 1), (100, 60, 64, 64), (7, 120, 190, 30)]:
        np.testing.assert_array_equal(store.read(0, 2, (y0, x0, h, w)), volumes[0][2, y0 : y0 + h, x0 : x0 + w])
    np.testing.assert_array_equal(store.read(1, 1, (3, 4, 5, 6), low_dose=True), low_dose[1, 3:8, 4:10])


def test_window_decodes_only_its_blocks(study):
    """With the right half of a slice destroyed on disk, a window in its left half still reads."""
    path, _, volumes, _, _ = study
    volume = path / "volumes" / "00002.b2nd"
    opened = blosc2.open(str(volume), mode="r")
    assert (opened.chunks, opened.blocks) == ((1, 128, 256), (1, 128, 128))
    chunk = opened.schunk.get_chunk(0)
    # A chunk is a header of 32 bytes, the offsets of its blocks, and the blocks as threads finished them.
    left, start = np.frombuffer(chunk, np.int32, 2, 32)
    end = left if left > start else len(chunk)
    content = bytearray(volume.read_bytes())
    place = content.index(chunk[:64])
    content[place + start : place + end] = b"\x7f" * (end - start)
    volume.write_bytes(content)
    store = Store(path)
    np.testing.assert_array_equal(store.read(2, 0, (0, 0, 128, 128)), volumes[2][0, :, :128])
    with pytest.raises(InputError, match=r"00002\.b2nd: slice 0 can't be decoded"):
        store.read(2, 0)


def test_reading_outside(study):
    store = Store(study[0])
    with pytest.raises(IndexError, match=r"series_index 3 isn't one of 0\.\.2"):
        store.read(3, 0)
    with pytest.raises(IndexError, match=r"z -1 isn't one of 0\.\.4"):
        store.read(0, -1)
    with pytest.raises(ValueError, match=r"x0=100, h=10, w=51\) leaves the 200 x 150 image"):
        store.read(0, 0, (0, 100, 10, 51))
    with pytest.raises(ValueError, match=r"1\.2\.3 has no low-dose volume"):
        store.read(0, 0, low_dose=True)


def test_opening_reads_no_volume(study):
    path = study[0]
    shutil.rmtree(path / "volumes")
    store = Store(path)
    assert len(store.series) == 3
    assert len(np.unique(store.index.box_z[store.index.box_series == 0])) == 2
    assert len(store.boxes(0, 3)) == 2
    with pytest.raises(InputError, match=r"00000\.b2nd: can't be opened"):
        store.read(0, 0)


def test_a_volume_of_another_shape_is_noticed(study):
    path = study[0]
    shutil.copy(path / "volumes" / "00002.b2nd", path / "volumes" / "00000.b2nd")
    with pytest.raises(
        InputError, match=r"00000\.b2nd: holds int16 \[4, 128, 256\], the index says int16 \[5, 200, 150\]"
    ):
        Store(path).read(0, 0)


def test_open_volumes_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "_OPEN_VOLUMES", 3)
    with StoreWriter(tmp_path / "s") as writer:
        for n in range(6):
            writer.add_series(make_info(f"1.{n}", shape=(1, 8, 8)), np.full((1, 8, 8), n, np.int16), NO_BOXES)
    opened = []
    original = Blosc2.open
    monkeypatch.setattr(Blosc2, "open", lambda self, path: opened.append(path) or original(self, path))
    store = Store(tmp_path / "s")
    for n in [0, 1, 2, 0, 1, 3, 0, 1, 2, 5]:
        assert store.read(n, 0).max() == n
        assert len(store._volumes) <= 3
    # 0 and 1 stay open as the last used; 2 was put out by 3.
    assert [path[-6] for path in opened] == ["0", "1", "2", "3", "2", "5"]


def _mean(store):
    return float(store.read(0, 1).mean())


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers(study, start):
    store = Store(study[0])
    expected = _mean(store)
    with multiprocessing.get_context(start).Pool(1) as pool:
        assert pool.map(_mean, [store, store]) == [expected, expected]


def test_pickle_leaves_open_volumes_behind(study):
    store = Store(study[0])
    store.read(0, 0)
    copy = pickle.loads(pickle.dumps(store))
    assert not copy._volumes
    assert store._volumes
    np.testing.assert_array_equal(copy.read(0, 4), store.read(0, 4))


def test_not_a_store(tmp_path):
    with pytest.raises(InputError, match=r"nowhere: isn't a store"):
        Store(tmp_path / "nowhere")
    (tmp_path / "store.json").write_text("[")
    with pytest.raises(InputError, match=r"store\.json: can't be read"):
        Store(tmp_path)


@pytest.mark.parametrize(("key", "value"), [("version", 1), ("format", "something")])
def test_a_store_of_another_version(study, key, value):
    header = study[0] / "store.json"
    header.write_text(json.dumps({**json.loads(header.read_text()), key: value}))
    found = {"format": "lidnet_fast-store", "version": 2, key: value}
    expected = (
        f"of format {found['format']} version {found['version']}, this software reads lidnet_fast-store version 2"
    )
    with pytest.raises(InputError, match=expected):
        Store(study[0])


def _changed(**changes):
    """Damage that replaces an array by what a function makes of it."""

    def damage(content):
        arrays = dict(np.load(io.BytesIO(content)))
        for name, change in changes.items():
            arrays[name] = change(arrays[name])
        changed = io.BytesIO()
        np.savez(changed, **arrays)
        return changed.getvalue()

    return damage


def _with_a_huge_array(content):
    """An archive of some bytes whose array says that it has 10^15 values."""
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000000,), }"
    changed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(changed, "w") as new:
        for name in old.namelist():
            huge = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
            new.writestr(name, huge if name == "box.npy" else old.read(name))
    return changed.getvalue()


def _compressed(content):
    """Zeros that take a thousandth of their memory in the file."""
    arrays = dict(np.load(io.BytesIO(content)))
    changed = io.BytesIO()
    np.savez_compressed(changed, **{**arrays, "box": np.zeros((1 << 16, 4), np.float32)})
    return changed.getvalue()


def _overlapping(content):
    """An archive whose members say to be larger than the file."""
    archive = zipfile.ZipFile(changed := io.BytesIO(content), "a")
    archive.writestr("more.npy", b"")
    archive.getinfo("box.npy").file_size = archive.getinfo("box.npy").compress_size = 1 << 29
    archive.close()
    return changed.getvalue()


INDEX_DAMAGE = {
    "compressed": _compressed,
    "overlapping": _overlapping,
    "missing": lambda content: None,
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "other": lambda content: b'[{"id": 3}]',
    "one box short": _changed(box=lambda box: box[1:]),
    "pickled": _changed(series_id=lambda ids: ids.astype(object)),
    "huge": _with_a_huge_array,
    "no such split": _changed(split=lambda split: split + 3),
    "numbers for names": _changed(patient_id=lambda ids: np.arange(len(ids))),
    "empty volumes": _changed(shape=lambda shape: shape * [1, 0, 1]),
    "two dimensions": _changed(shape=lambda shape: shape[:, :2]),
    "negative thickness": _changed(slice_thickness=np.negative),
    "two kernels": _changed(kernel=lambda names: np.concatenate([names, names])),
    "NaN spacing": _changed(spacing=lambda spacing: spacing * np.nan),
    "negative spacing": _changed(spacing=np.negative),
    "boxes of no series": _changed(box_series=lambda series: series + 9),
    "boxes of no slice": _changed(box_z=lambda z: z + 99),
    "boxes in no order": _changed(box_series=lambda series: series[::-1], box_z=lambda z: z * 0),
    "NaN boxes": _changed(box=lambda box: box * np.nan),
}


def test_older_stores_open_without_what_they_do_not_know(study):
    """Stores of before there were columns for thickness, kernel and body part."""
    path, infos, *_ = study
    later = ("slice_thickness", "kernel", "body_part")
    arrays = {name: values for name, values in np.load(path / "index.npz").items() if name not in later}
    np.savez(path / "index.npz", **arrays)
    unknown = dataclasses.replace(infos[0], slice_thickness=None, kernel="", body_part="")
    assert Store(path).series == [unknown, *infos[1:]]


@pytest.mark.parametrize("damage", INDEX_DAMAGE)
def test_a_damaged_index(study, damage):
    file = study[0] / "index.npz"
    content = INDEX_DAMAGE[damage](file.read_bytes())
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match="the store's index is damaged"):
        Store(study[0])


@pytest.mark.parametrize("volumes", [["blosc2"], None, "tar"])
def test_an_unknown_volume_format(study, volumes):
    header = json.loads((study[0] / "store.json").read_text())
    (study[0] / "store.json").write_text(json.dumps({**header, "volumes": volumes}))
    with pytest.raises(InputError, match="the store's index is damaged"):
        Store(study[0])


def test_a_volume_is_an_array_and_nothing_that_would_be_run(study):
    """blosc2 files can hold expressions and Python functions, which opening must not evaluate."""
    file = study[0] / "volumes" / "00000.b2nd"
    operand = blosc2.asarray(np.zeros(SHAPE, np.int16), urlpath=str(study[0] / "operand.b2nd"), mode="w")
    file.unlink()
    (operand + 1).save(urlpath=str(file))
    with pytest.raises(InputError, match="can't be opened"):
        Store(study[0]).read(0, 0)
    file.unlink()
    blosc2.SChunk(data=bytes(100), urlpath=str(file), mode="w")
    with pytest.raises(InputError, match=r"can't be opened: it has metadata .*; a plain array has b2nd alone"):
        Store(study[0]).read(0, 0)
