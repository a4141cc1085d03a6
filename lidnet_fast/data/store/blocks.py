"""Reading a window of a blosc2 volume with one wait for the disk, and hardly a byte beside the window's blocks.

blosc2 reads a file's header, a slice's header and then block by block, waiting for each, and the whole slice where a
window touches more than a quarter of its blocks. So a table of where the blocks lie is written to a file's end, where
blosc2 keeps what it passes over. Files of older stores have none, and blosc2 reads them alone.
"""

import math
import os
import struct
import sys
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import blosc2
import numpy as np

_TABLE = "lidnet_fast_blocks"
_HEADER = 32
"""Bytes at the beginning of a slice, with its size decoded, a block's and its own at 4, 8 and 12. The places of its
blocks follow, as int32, and then the blocks."""
_LAZY = 8
"""Flag in a header's last byte, of a slice that blosc2 has yet to read."""
_PAGE = 4096
_of_thread = threading.local()


def add_table(array: blosc2.NDArray) -> None:
    """Write the table to the end of a new file, in which each slice is a chunk.

    It is a slice's header without its sizes, and int64 [Z, blocks + 2]: where a slice and its blocks begin and the last
    ends; 0 for slices without blocks (of one value, or stored as they are) and of another header.
    """
    blocks = math.prod(_grid(array))
    table, header = np.zeros((array.shape[0], blocks + 2), np.int64), b""
    first = _HEADER + 4 * blocks
    for z, row in enumerate(table):
        # As in the file up to the first block; then the slice's number (int32), its place (int64), its blocks' sizes.
        lazy = array.schunk.get_lazychunk(z)
        if len(lazy) != first + 12 + 4 * blocks:
            continue
        found = lazy[:4] + bytes(12) + lazy[16 : _HEADER - 1] + bytes([lazy[_HEADER - 1] & ~_LAZY])
        header = header or found
        starts, sizes = (np.frombuffer(lazy, np.int32, blocks, place) for place in (_HEADER, first + 12))
        if found == header and (starts[1:] == starts[:-1] + sizes[:-1]).all():
            row[:] = int.from_bytes(lazy[first + 4 : first + 12], "little")
            row[1:-1] += starts
            row[-1] += starts[-1] + sizes[-1]
    array.schunk.vlmeta[_TABLE] = header.ljust(_HEADER, b"\0") + table.tobytes()


class Blocks:
    """The blocks of a file that has a table."""

    def __init__(self, location: str, array: blosc2.NDArray, header: bytes, table: np.ndarray):
        self._header, self._table, self._dtype = header, table.tolist(), array.dtype
        (_, self._columns), (_, self._height, self._width) = _grid(array), array.blocks
        self._file = os.open(location, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_RANDOM)  # the kernel would read megabytes ahead

    @classmethod
    def of(cls, location: str, array: blosc2.NDArray) -> Self | None:
        """Return a file's, or None where it has no table or the system can't be told what will be read."""
        if not hasattr(os, "posix_fadvise") or array.chunks != (1, *array.shape[1:]) or array.blocks[0] != 1:
            return None
        try:
            content = array.schunk.vlmeta[_TABLE]
            table = np.frombuffer(content, np.int64, offset=_HEADER).reshape(
                array.shape[0], math.prod(_grid(array)) + 2
            )
        except Exception:  # none, or not ours: blosc2 decodes what a file's metadata say, and has many errors for that
            return None
        sound = (np.diff(table) >= 0).all() and (table >= 0).all() and table.max() <= Path(location).stat().st_size
        return cls(location, array, content[:_HEADER], table) if sound else None

    def read(self, start: Sequence[int], stop: Sequence[int]) -> np.ndarray | None:
        """Return what lies from (z, y, x) `start` up to `stop`, or ask the disk for it and leave it to blosc2: None."""
        slices = self._table[start[0] : stop[0]]
        rows = range(start[1] // self._height, (stop[1] - 1) // self._height + 1)
        columns = range(start[2] // self._width, (stop[2] - 1) // self._width + 1)
        count, blocks = len(rows) * len(columns), len(slices[0]) - 2
        if count == blocks:
            self._ask([(0, _PAGE), *((places[0], places[-1]) for places in slices)])
            return None
        runs = [(1 + row * self._columns + columns.start, 1 + row * self._columns + columns.stop) for row in rows]
        of_blocks = [(places[first], places[last]) for places in slices for first, last in runs]
        if 4 * count <= blocks or not all(places[0] for places in slices):
            self._ask(sorted([(0, _PAGE), *((places[0], places[1]) for places in slices), *of_blocks]))
            return None
        self._ask(of_blocks)
        pixels = np.empty([high - low for low, high in zip(start, stop, strict=True)], self._dtype)
        parts = [
            (to_y, to_x, from_y, from_x)
            for to_y, from_y in _overlaps(rows, self._height, start[1], stop[1])
            for to_x, from_x in _overlaps(columns, self._width, start[2], stop[2])
        ]
        for places, into in zip(slices, pixels, strict=True):
            for block, (to_y, to_x, from_y, from_x) in zip(self._decode(places, runs, count), parts, strict=True):
                into[to_y, to_x] = block[from_y, from_x]
        return pixels

    def _ask(self, runs: list[tuple[int, int]]) -> None:
        """Tell the system of all bytes before any is read, so that none waits for another."""
        begin, end = runs[0]
        for low, high in [*runs[1:], (sys.maxsize, 0)]:
            if low > end + _PAGE:
                if end > begin:  # 0 bytes would be all up to the file's end
                    os.posix_fadvise(self._file, begin, end - begin, os.POSIX_FADV_WILLNEED)
                begin = low
            end = high

    def _decode(self, places: list[int], runs: list[tuple[int, int]], count: int) -> np.ndarray:
        """Read runs of a slice's blocks, `count` in all, as a slice of these alone; the next call overwrites them."""
        end = _HEADER + 4 * count
        content = _scratch("content", end + sum(places[last] - places[first] for first, last in runs))
        starts: list[int] = []
        for first, last in runs:
            shift, size = end - places[first], places[last] - places[first]
            starts += [place + shift for place in places[first:last]]
            if os.preadv(self._file, [content[end : end + size]], places[first]) != size:
                raise OSError("the file ends within the slice")
            end += size
        block = self._height * self._width * self._dtype.itemsize
        sizes = (count * block, block, end)
        struct.pack_into(f"<4s3i16s{count}i", content, 0, self._header[:4], *sizes, self._header[16:], *starts)
        decoded = _scratch("decoded", count * block)
        blosc2.decompress2(content, dst=decoded, nthreads=1)
        return decoded.view(self._dtype).reshape(count, self._height, self._width)


def _scratch(name: str, size: int) -> Any:
    """Return this thread's buffer, an array of bytes that grows: fresh memory would cost a page fault per 4 KB."""
    buffers = _of_thread.__dict__
    if name not in buffers or len(buffers[name]) < size:
        buffers[name] = np.empty(size, np.uint8)
    return buffers[name][:size]


def _overlaps(blocks: range, size: int, start: int, stop: int) -> list[tuple[slice, slice]]:
    """What of an axis's blocks a window covers: places in the window and in the block."""
    ends = [(block * size, max(block * size, start), min((block + 1) * size, stop)) for block in blocks]
    return [(slice(low - start, high - start), slice(low - begin, high - begin)) for begin, low, high in ends]


def _grid(array: blosc2.NDArray) -> tuple[int, int]:
    """How many rows and columns of blocks a slice has."""
    rows, columns = (-(-side // block) for side, block in zip(array.shape[1:], array.blocks[1:], strict=True))
    return rows, columns
