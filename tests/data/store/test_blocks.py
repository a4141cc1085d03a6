"""Windows of blosc2 volumes: any of them, how many bytes are read for them, and files with another table or none."""

import os
import sys
from pathlib import Path

import blosc2
import numpy as np
import pytest

from lidnet_fast.data.store.backends import FORMATS

SHAPE = (6, 300, 520)


def volume_of(seed):
    """Slices as in CT, and those that blosc2 stores in its own ways: of one value, noise in every bit, mostly zero."""
    rng = np.random.default_rng(seed)
    volume = rng.normal(40, 30, SHAPE).astype(np.int16)
    volume[1], volume[2], volume[3, 10:] = 7, rng.integers(-32768, 32768, SHAPE[1:]), 0
    return volume


@pytest.fixture
def path(tmp_path):
    FORMATS["blosc2"].write(tmp_path / "volume.b2nd", volume_of(0))
    return tmp_path / "volume.b2nd"


def check_windows(path):
    opened, volume, rng = FORMATS["blosc2"].open(str(path)), volume_of(0), np.random.default_rng(1)
    for _ in range(60):
        size = [int(rng.integers(1, side + 1)) for side in SHAPE]
        size[0] = min(size[0], 3)
        start = [int(rng.integers(side - part + 1)) for side, part in zip(SHAPE, size, strict=True)]
        window = tuple(slice(low, low + part) for low, part in zip(start, size, strict=True))
        np.testing.assert_array_equal(opened[window], volume[window])
    np.testing.assert_array_equal(opened[0:6, 0:300, 0:520], volume)


def test_any_window(path):
    check_windows(path)


@pytest.mark.parametrize(
    "table",
    [None, b"", b"x" * 7, "text", {"a": 1}, -1, 1 << 40, 0],
    ids=["older store", "empty", "another length", "text", "map", "negative", "beyond the file", "unknown places"],
)
def test_files_with_another_table_or_none(path, table):
    array = blosc2.open(path, mode="a")
    (name,) = array.schunk.vlmeta
    if table is None:
        del array.schunk.vlmeta[name]
    elif isinstance(table, int):
        length = (len(array.schunk.vlmeta[name]) - 32) // 8
        array.schunk.vlmeta[name] = array.schunk.vlmeta[name][:32] + np.full(length, table, np.int64).tobytes()
    else:
        array.schunk.vlmeta[name] = table
    del array
    check_windows(path)


def test_a_file_that_ends_early(path):
    opened = FORMATS["blosc2"].open(str(path))
    os.truncate(path, 5000)
    for window in (slice(0, 300), slice(0, 520)), (slice(0, 64), slice(0, 64)), (slice(90, 300), slice(90, 500)):
        with pytest.raises((OSError, RuntimeError, ValueError)):
            opened[(slice(4, 5), *window)]


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc/self/io")
@pytest.mark.parametrize(
    "depth, height, width", [(1, 64, 64), (1, 256, 256), (1, 512, 512), (3, 512, 512), (3, 256, 256)]
)
def test_hardly_more_is_read_than_the_blocks_of_a_window(tmp_path, monkeypatch, depth, height, width):
    """Both by what is read and by what the disk is asked for, which it rounds to pages."""
    volume = np.random.default_rng(0).normal(40, 30, (8, 512, 512)).astype(np.int16)
    FORMATS["blosc2"].write(tmp_path / "volume.b2nd", volume)
    opened = FORMATS["blosc2"].open(str(tmp_path / "volume.b2nd"))
    one_block = blosc2.open(tmp_path / "volume.b2nd").schunk.cbytes / (8 * 16)
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda file, place, size, advice: asked.append((place, size)))

    def bytes_read():
        return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])

    rng = np.random.default_rng(1)
    for _ in range(10):
        z, y, x = (
            int(rng.integers(whole - part + 1))
            for whole, part in zip((8, 512, 512), (depth, height, width), strict=True)
        )
        rows, columns = ((place + size - 1) // 128 - place // 128 + 1 for place, size in ((y, height), (x, width)))
        blocks = depth * rows * columns * one_block
        asked.clear()
        before, now = bytes_read(), bytes_read()
        opened[z : z + depth, y : y + height, x : x + width]
        assert bytes_read() - now - (now - before) < 1.1 * blocks
        assert sum(size for _, size in asked) <= 1.5 * blocks, (z, y, x, asked)
