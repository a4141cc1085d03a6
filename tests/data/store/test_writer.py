"""Writing a store: all or nothing, resumed after any interruption, by many processes."""

import multiprocessing
import time

import numpy as np
import pytest

from lidnet_fast.data.store.index import SeriesInfo
from lidnet_fast.data.store.reader import Store
from lidnet_fast.data.store.writer import StoreWriter
from lidnet_fast.errors import InputError

SHAPE = (5, 200, 150)
NO_BOXES = np.empty((0, 5), np.float32)
GEOMETRY = {"spacing": (2.5, 0.7, 0.8), "origin": (-10.0, -20.0, 30.5), "orientation": (1.0, 0, 0, 0, 1.0, 0)}


def series_info(series_uid="1.2.3", patient_id="anna", split="train", shape=SHAPE, **changes):
    return SeriesInfo(series_uid, patient_id, split, **{"shape": shape, **GEOMETRY, **changes})


def volume_of(seed=0, shape=SHAPE):
    return np.random.default_rng(seed).integers(-1024, 3071, shape, dtype=np.int16)


def write(writer, number, **changes):
    """Series `number`: three slices of its own pixels, and a box on slice 1."""
    shape = (3, 40, 40)
    box = np.array([[1, number / 100, 0, 30.3, 40]], np.float32)
    info = series_info(f"1.{number}", f"patient {number}", shape=shape, **changes)
    writer.write(number, info, volume_of(number, shape), box)


def check(path, numbers):
    """The store holds these series, as `write` writes them, and no stray file; beside it lies nothing."""
    store = Store(path)
    assert [info.series_uid for info in store.series] == [f"1.{number}" for number in numbers]
    for index, number in enumerate(numbers):
        for z in range(3):
            np.testing.assert_array_equal(store.read(index, z), volume_of(number, (3, 40, 40))[z])
            assert store.boxes(index, z).tolist() == (
                [[np.float32(number / 100), 0, np.float32(30.3), 40]] if z == 1 else []
            )
    assert len(list((path / "volumes").iterdir())) == len(numbers)
    assert sorted(file.name for file in path.iterdir()) == ["index.npz", "store.json", "volumes"]
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_an_existing_destination_is_refused(tmp_path):
    (tmp_path / "s").mkdir()
    with pytest.raises(InputError, match=r"s: exists already"), StoreWriter(tmp_path / "s"):
        pass
    assert [entry.name for entry in tmp_path.iterdir()] == ["s"]


def test_what_lies_where_unfinished_stores_do_stays(tmp_path):
    (tmp_path / "theirs").mkdir()
    partial = tmp_path / ".s.partial"
    partial.symlink_to(tmp_path / "theirs", target_is_directory=True)
    with pytest.raises(InputError, match=r"\.s\.partial: .*To fix"), StoreWriter(tmp_path / "s"):
        pass
    partial.unlink()
    (partial / "mine").mkdir(parents=True)
    with (
        pytest.raises(InputError, match=r"\.s\.partial: .*holds other files.*To fix: rename"),
        StoreWriter(tmp_path / "s"),
    ):
        pass
    assert (partial / "mine").is_dir()
    assert not list((tmp_path / "theirs").iterdir())


@pytest.mark.parametrize("ids", [{"series_uid": "1.2.3\0"}, {"series_uid": "1.2.4", "patient_id": "anna\0"}])
def test_ids_that_would_become_one_are_refused(tmp_path, ids):
    with pytest.raises(InputError, match="an id can't have the character NUL"), StoreWriter(tmp_path / "s") as writer:
        writer.add_series(series_info(), volume_of(), NO_BOXES)
        writer.add_series(series_info(**ids), volume_of(), NO_BOXES)


def test_nothing_is_left_of_a_store_that_failed(tmp_path):
    with pytest.raises(KeyboardInterrupt), StoreWriter(tmp_path / "s") as writer:
        writer.add_series(series_info(), volume_of(), NO_BOXES)
        assert not (tmp_path / "s").exists()
        raise KeyboardInterrupt
    with pytest.raises(InputError, match="no series"), StoreWriter(tmp_path / "s"):
        pass
    assert not list(tmp_path.iterdir())


def _box(*values):
    return np.array([[0, 1, 1, 2, 2], values], np.float32)


BAD_SERIES = {
    "box outside": (
        {"boxes": _box(1, 100, 3, 150.5, 9)},
        r"series 1\.2\.3, row 1 .*reaches outside its 150 x 200 image",
    ),
    "box above": ({"boxes": _box(1, 100, -1, 150, 9)}, r"\(100, -1, 150, 9\) reaches outside"),
    "slice beyond": ({"boxes": _box(5, 1, 1, 3, 9)}, r"row 1 .*slice 5 isn't one of 0\.\.4"),
    "half a slice": ({"boxes": _box(1.5, 1, 1, 3, 9)}, r"slice 1\.5 isn't one of"),
    "empty box": ({"boxes": _box(1, 3, 1, 3, 9)}, r"row 1 .*is empty"),
    "NaN": ({"boxes": _box(1, 3, 1, np.nan, 9)}, r"row 1 .*isn't finite"),
    "columns": ({"boxes": np.zeros((1, 4))}, r"boxes must be \[n, 5\]"),
    "split": ({"info": series_info(split="training")}, "split 'training' isn't one of train, val, test"),
    "dtype": ({"volume": volume_of().astype(np.float32)}, "int16 .* is needed, got float32"),
    "shape": ({"volume": volume_of(shape=(5, 200, 151))}, r"its volume is \[5, 200, 151\]"),
    "spacing": ({"info": series_info(spacing=(1.0, 0.0, 0.7))}, "no usable geometry"),
    "flag": ({"low_dose": volume_of()}, "has_low_dose is False"),
    "low dose": (
        {"info": series_info(has_low_dose=True), "low_dose": volume_of(shape=(4, 200, 150))},
        r"the low-dose volume is int16 \[4, 200, 150\]",
    ),
}


@pytest.mark.parametrize("name", BAD_SERIES)
def test_bad_series(tmp_path, name):
    changes, message = BAD_SERIES[name]
    with pytest.raises(InputError, match=message), StoreWriter(tmp_path / "s") as writer:
        writer.add_series(**{"info": series_info(), "volume": volume_of(), "boxes": NO_BOXES, **changes})
    assert not list(tmp_path.iterdir())


def test_series_that_contradict_each_other(tmp_path):
    with StoreWriter(tmp_path / "s") as writer:
        writer.add_series(series_info(), volume_of(), NO_BOXES)
        with pytest.raises(InputError, match=r"series 1\.2\.3: is in the store already"):
            writer.add_series(series_info(), volume_of(), NO_BOXES)
        with pytest.raises(InputError, match=r"series 1\.9: patient anna would be in two splits, train and test"):
            writer.add_series(series_info("1.9", split="test"), volume_of(), NO_BOXES)
    assert [info.series_uid for info in Store(tmp_path / "s").series] == ["1.2.3"]


def test_an_interrupted_write_is_gone_on_with(tmp_path):
    with pytest.raises(KeyboardInterrupt), StoreWriter(tmp_path / "s", key=["a", 1]) as writer:
        write(writer.series_writer(), 0)
        write(writer.series_writer(), 2)
        raise KeyboardInterrupt
    assert not (tmp_path / "s").exists()
    with StoreWriter(tmp_path / "s", key=["a", 1]) as writer:
        assert writer.done == {"1.0": 0, "1.2": 2}
        write(writer.series_writer(), 1)
    check(tmp_path / "s", [0, 1, 2])


@pytest.mark.parametrize("key", [["a", 2], None])
def test_a_write_of_something_else_is_started_anew(tmp_path, key):
    with pytest.raises(KeyboardInterrupt), StoreWriter(tmp_path / "s", key=["a", 1]) as writer:
        write(writer.series_writer(), 0)
        raise KeyboardInterrupt
    with StoreWriter(tmp_path / "s", key=key) as writer:
        assert not writer.done
        write(writer.series_writer(), 4)
    check(tmp_path / "s", [4])


def test_added_series_follow_those_that_are_there(tmp_path):
    with pytest.raises(KeyboardInterrupt), StoreWriter(tmp_path / "s", key=1) as writer:
        writer.add_series(series_info("1.1"), volume_of(1), NO_BOXES)
        raise KeyboardInterrupt
    with StoreWriter(tmp_path / "s", key=1) as writer:
        with pytest.raises(InputError, match=r"series 1\.1: is in the store already"):
            writer.add_series(series_info("1.1"), volume_of(1), NO_BOXES)
        assert writer.add_series(series_info("1.2"), volume_of(2), NO_BOXES) == 1
    assert [info.series_uid for info in Store(tmp_path / "s").series] == ["1.1", "1.2"]


def test_left_out_series_leave_no_gap_and_no_file(tmp_path):
    with StoreWriter(tmp_path / "s", key=1) as writer:
        write(writer.series_writer(), 12)
        write(writer.series_writer(), 3)
        leftover = next(writer.series_writer().folder.glob("store/volumes/*")).with_name("00007.b2nd")
        leftover.write_bytes(b"half a volume")
    check(tmp_path / "s", [3, 12])


def test_finished_records_without_their_volumes_are_not_trusted(tmp_path):
    """As after a kill between the final rename and the removal of the working folder, when the store is deleted."""
    with pytest.raises(KeyboardInterrupt), StoreWriter(tmp_path / "s", key=1) as writer:
        write(writer.series_writer(), 0)
        (writer.series_writer().folder / "store").rename(tmp_path / "deleted")
        raise KeyboardInterrupt
    with pytest.raises(InputError, match="no series"), StoreWriter(tmp_path / "s", key=1) as writer:
        assert not writer.done
    assert [entry.name for entry in tmp_path.iterdir()] == ["deleted"]


def test_one_writer_at_a_time(tmp_path):
    with StoreWriter(tmp_path / "s", key=1) as writer:
        write(writer.series_writer(), 0)
        for key in (1, 2, None):
            with (
                pytest.raises(InputError, match=r"s: is being written by another"),
                StoreWriter(tmp_path / "s", key=key),
            ):
                pass
    check(tmp_path / "s", [0])


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_many_processes(tmp_path, start):
    with StoreWriter(tmp_path / "s") as writer, multiprocessing.get_context(start).Pool(2) as pool:
        pool.starmap(write, [(writer.series_writer(), number) for number in (4, 0, 3, 1, 2)])
    check(tmp_path / "s", range(5))


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"series_uid": "1.0"}, r"series 1\.0: is in the store"), ({"split": "val"}, "would be in two splits")],
)
def test_what_processes_wrote_is_checked_together(tmp_path, changes, message):
    with pytest.raises(InputError, match=message), StoreWriter(tmp_path / "s") as writer:
        write(writer.series_writer(), 0)
        info = series_info(**{"series_uid": "1.1", "patient_id": "patient 0", **changes})
        writer.series_writer().write(1, info, volume_of(), NO_BOXES)
    assert not list(tmp_path.iterdir())


def _write_until_killed(path, started):
    with StoreWriter(path, key="k") as writer:
        for number in range(2000):
            if f"1.{number}" not in writer.done:
                write(writer.series_writer(), number)
                started.set()


def test_killed_at_any_moment(tmp_path):
    """Whatever a killed writer leaves, the next one goes on with whole series."""
    path, rng, numbers = tmp_path / "s", np.random.default_rng(0), []
    fork = multiprocessing.get_context("fork")
    for _ in range(5):
        started = fork.Event()
        process = fork.Process(target=_write_until_killed, args=(path, started))
        process.start()
        started.wait()
        time.sleep(rng.uniform(0.02, 0.06))
        process.kill()
        process.join()
        assert not path.exists()
        with pytest.raises(ZeroDivisionError), StoreWriter(path, key="k") as writer:
            assert len(writer.done) > len(numbers)
            numbers = sorted(writer.done.values())
            raise ZeroDivisionError
    with StoreWriter(path, key="k") as writer:
        write(writer.series_writer(), 1999)
    check(path, [*numbers, 1999])
