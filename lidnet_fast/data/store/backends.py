"""How a store keeps its volumes: blosc2 files on a local disk, or Zarr arrays for object storage as well.

Both are compressed without loss (LZ4 on shuffled bytes, zstd on shuffled bits) in blocks of one slice, so that a window
is read by decoding only the blocks it touches. On a local disk blosc2 is an order of magnitude faster for a small
window: Zarr spends most of its time outside of the decoder.
"""

import contextlib
import errno
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import blosc2
import msgpack
import numpy as np

from lidnet_fast.data.store.blocks import Blocks, add_table
from lidnet_fast.errors import InputError
from lidnet_fast.urls import is_url

_LARGEST_BLOSC2_HEADER = 1 << 16


class Volume(Protocol):
    """An opened volume, int16 HU [Z, H, W]."""

    shape: tuple[int, ...]
    dtype: np.dtype

    def __getitem__(self, place: tuple[slice, slice, slice], /) -> np.ndarray:
        """Read a window of some slices. A damaged file is an OSError, a RuntimeError or a ValueError."""


class VolumeFormat(Protocol):
    """A way to keep a volume."""

    suffix: str
    """Of the volumes' names."""

    def write(self, path: Path, volume: np.ndarray) -> None:
        """Write int16 HU [Z, H, W] to a new file or folder."""

    def open(self, location: str) -> Volume:
        """Open a volume for reading.

        Raises:
            InputError: volumes of this format can't be opened there.
            OSError, RuntimeError, ValueError: this one can't be opened.
        """


@contextlib.contextmanager
def _damage_is_a_value_error() -> Iterator[None]:
    """Blosc2 and Zarr take their metadata at their word, and file systems have errors of their own."""
    try:
        yield
    except (OSError, RuntimeError, ValueError):
        raise
    except Exception as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


class Blosc2:
    """One file. A chunk is a slice, a block 128 x 128 of its pixels."""

    suffix = ".b2nd"

    def write(self, path: Path, volume: np.ndarray) -> None:
        """See `VolumeFormat`."""
        _, height, width = volume.shape
        # Against zstd and shuffled bits, reading takes half the time and the files 1.2 of the bytes. One thread, since
        # several store a slice's blocks in an order that differs from run to run.
        cparams = blosc2.CParams(codec=blosc2.Codec.LZ4, clevel=5, filters=[blosc2.Filter.SHUFFLE], nthreads=1)
        blocks = (1, min(128, height), min(128, width))
        try:
            array = blosc2.asarray(
                np.ascontiguousarray(volume),
                urlpath=str(path),
                mode="w",
                chunks=(1, height, width),
                blocks=blocks,
                cparams=cparams,
            )
            add_table(array)
        except RuntimeError as error:  # blosc2 doesn't say what the system told it
            raise OSError(errno.EIO, f"can't be written (disk full?): {error}", str(path)) from error

    def open(self, location: str) -> Volume:
        """See `VolumeFormat`."""
        if is_url(location):
            raise InputError("blosc2 volumes are read from a local folder; a store at a URL needs volumes of zarr")
        with _damage_is_a_value_error():
            _check_blosc2_metadata(Path(location))
            # One thread: readers run in parallel in the workers, and a slice is too small to share out.
            array = blosc2.open(location, mode="r", deserialize="safe", dparams=blosc2.DParams(nthreads=1))
        if not isinstance(array, blosc2.NDArray):
            raise ValueError(f"it holds a {type(array).__name__}, not an array")
        return _Blosc2Volume(array, location)


def _check_blosc2_metadata(path: Path) -> None:
    """Refuse what isn't a plain array before blosc2 sees it: other metadata name sources and code to evaluate.

    Raises:
        ValueError: says what the file is.
    """
    _check_regular([path])
    with path.open("rb") as file:
        head = file.read(15)
        length = int.from_bytes(head[11:15], "big")
        if head[2:10] != b"b2frame\0" or not len(head) < length <= _LARGEST_BLOSC2_HEADER:
            raise ValueError("it isn't a blosc2 file")
        *_, metadata = msgpack.unpackb(head + file.read(length - len(head)), raw=True)
    _, layers, _ = metadata
    if set(layers) != {b"b2nd"}:
        raise ValueError(f"it has metadata {sorted(layers)}; a plain array has b2nd alone")


def _check_regular(paths: Iterable[Path]) -> None:
    """Refuse pipes and devices, from which reading may never end."""
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{path.name} isn't a regular file" if path.exists() else f"there is no file {path.name}")


class _Blosc2Volume:
    def __init__(self, array: blosc2.NDArray, location: str):
        self._array = array
        self._blocks = Blocks.of(location, array)
        self.shape, self.dtype = array.shape, array.dtype

    def __getitem__(self, place: tuple[slice, slice, slice], /) -> np.ndarray:
        start, stop = [part.start for part in place], [part.stop for part in place]
        pixels = self._blocks.read(start, stop) if self._blocks else None
        if pixels is None:
            pixels = np.empty([part.stop - part.start for part in place], self.dtype)
            # What array[place] comes down to; its handling of any index takes as long as decoding a small window.
            self._array.get_slice_numpy(pixels, (start, stop))
        return pixels


class Zarr:
    """One Zarr v3 array, at any location of fsspec's. A shard (one object) is 16 slices, a chunk 256 x 256 pixels.

    On object storage requests cost more than bytes: a window takes one for the shard's list of chunks and one for every
    chunk it touches.
    """

    suffix = ".zarr"

    # No CT number: what was never written, or got lost, reads as this.
    _MISSING = -32768

    def write(self, path: Path, volume: np.ndarray) -> None:
        """See `VolumeFormat`."""
        zarr = _import_zarr()
        _, height, width = volume.shape
        block = (min(256, height), min(256, width))
        array = zarr.create_array(
            path,
            shape=volume.shape,
            dtype=np.int16,
            chunks=(1, *block),
            shards=(16, *(math.ceil(side / part) * part for side, part in zip((height, width), block, strict=True))),
            # Damaged bytes must not reach the decompressor, which can crash on them.
            compressors=[
                zarr.codecs.BloscCodec(cname="zstd", clevel=3, shuffle="bitshuffle"),
                zarr.codecs.Crc32cCodec(),
            ],
            fill_value=self._MISSING,
            config={"write_empty_chunks": True},
        )
        array[:] = volume

    def open(self, location: str) -> Volume:
        """See `VolumeFormat`."""
        zarr = _import_zarr()
        source: Any = Path(location)
        if is_url(location):
            source = zarr.storage.FsspecStore.from_url(location, read_only=True)
        else:
            _check_regular(path for path in source.rglob("*") if not path.is_dir())
        with _damage_is_a_value_error():
            return _ZarrVolume(zarr.open_array(source, mode="r", zarr_format=3), self._MISSING)


class _ZarrVolume:
    def __init__(self, array: Any, missing: int):
        self._array, self._missing = array, missing
        self.shape, self.dtype = array.shape, array.dtype

    def __getitem__(self, place: tuple[slice, slice, slice], /) -> np.ndarray:
        with _damage_is_a_value_error():
            pixels = self._array[place]
        # A slice's window lies in one shard: either all of it is there or none.
        if pixels.max((1, 2)).min() == self._missing:
            raise OSError("an object of it is missing")
        return pixels


FORMATS: dict[str, VolumeFormat] = {"blosc2": Blosc2(), "zarr": Zarr()}


def _import_zarr() -> Any:
    try:
        import zarr
        import zarr.codecs
        import zarr.storage
    except ImportError as error:
        raise InputError(f"volumes of zarr need pip install 'lidnet_fast[cloud]' ({error})") from error
    return zarr
