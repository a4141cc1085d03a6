"""The store: a folder of compressed CT volumes with an index of their series, slices and lesion boxes.

Layout::

    store.json              format name and version, software version, volume format, low-dose simulation, split,
                            how lesions were inserted
    index.npz               series and boxes as arrays (`lidnet_fast.data.store.index.Index`)
    volumes/00000.b2nd      normal-dose volume, int16 HU [Z, H, W], in a format of `lidnet_fast.data.store.backends`
    volumes/00000.low_dose.b2nd   its measured low-dose twin, where there is one

Opening a store reads the two index files and no volume. A store with Zarr volumes may lie wherever fsspec reaches: copy
the folder there (``aws s3 cp --recursive store s3://bucket/store``) and open it by its URL.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from cachetools import LRUCache
from fsspec.core import url_to_fs

from lidnet_fast.data.store.backends import FORMATS, Volume
from lidnet_fast.data.store.index import Index, SeriesInfo, box_keys
from lidnet_fast.errors import InputError
from lidnet_fast.neighbours import neighbours
from lidnet_fast.urls import is_url

STORE_FORMAT = "lidnet_fast-store"
STORE_VERSION = 2

_OPEN_VOLUMES = 64


class Store:
    """A store opened for reading; volumes are opened when first read, and at most `_OPEN_VOLUMES` are kept open.

    It pickles without its open volumes, so that it can be handed to data-loading workers.

    Args:
        path: the store's folder, or its URL (``s3://bucket/store``, ``memory://store``, ...). Credentials and other
            settings of a file system are read from where its fsspec implementation and fsspec's own configuration
            (``FSSPEC_S3_ENDPOINT_URL``, ...) look for them.

    Attributes:
        path: the store's folder or URL.
        index: all that is known of series and boxes, as arrays.
        series: the series, by index.
        simulation: parameters of the low-dose simulation to be used with this store, or None.
        split: how the patients were split, as `StoreWriter` was told.
        inserted_lesions: how its lesions were made, where they aren't the patients' own (`lidnet_fast.data.lesions`).
        pseudonyms: fingerprint of the key that made its ids (`lidnet_fast.data.pseudonyms`), or None.

    Raises:
        InputError: there is no store at `path`, it is of another version, or its index is damaged.
    """

    path: str
    index: Index
    series: list[SeriesInfo]
    simulation: dict[str, Any] | None
    split: dict[str, Any] | None
    inserted_lesions: dict[str, Any] | None
    pseudonyms: str | None

    def __init__(self, path: str | Path):
        self.path = str(path).rstrip("/")
        header = self._read_header()
        self.simulation = header.get("simulation")
        self.split = header.get("split")
        self.inserted_lesions = header.get("inserted_lesions")
        self.pseudonyms = header.get("pseudonyms")
        try:
            self._format = FORMATS[header["volumes"]]
            self.index = Index.load(self._read_file("index.npz"))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self.path}: the store's index is damaged: {error}") from error
        self.series = self.index.infos()
        self._key = box_keys(self.index.box_series, self.index.box_z)
        self._volumes: LRUCache[tuple[int, bool], Volume] = LRUCache(_OPEN_VOLUMES)
        self._process = os.getpid()

    def _read_file(self, name: str) -> bytes:
        try:
            if not is_url(self.path) and Path(self.path, name).exists() and not Path(self.path, name).is_file():
                raise ValueError("isn't a regular file")
            file_system, folder = url_to_fs(self.path)
            return file_system.cat_file(f"{folder}/{name}")
        except FileNotFoundError:
            raise
        except Exception as error:  # every file system has errors of its own: no credentials, no such host, ...
            raise InputError(f"{self.path}/{name}: can't be read: {self._cause(error)}") from error

    def _cause(self, error: Exception) -> str:
        """What an error says, without the URL's password: some file systems name the place without its ``://``."""
        _, _, place = self.path.partition("://")
        password = place.rpartition("@")[0].partition(":")[2]
        return str(error).replace(password, "***") if password else str(error)

    def _read_header(self) -> dict[str, Any]:
        try:
            content = self._read_file("store.json")
        except FileNotFoundError as error:
            raise InputError(f"{self.path}: isn't a store (there is no store.json in it)") from error
        try:
            header = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{self.path}/store.json: can't be read: {error}") from error
        found = (header.get("format"), header.get("version")) if isinstance(header, dict) else (None, None)
        if found != (STORE_FORMAT, STORE_VERSION):
            raise InputError(
                f"{self.path}: is a store of format {found[0]} version {found[1]}, "
                f"this software reads {STORE_FORMAT} version {STORE_VERSION}; prepare it again"
            )
        return header

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_volumes": LRUCache(_OPEN_VOLUMES)}

    def _location(self, series_index: int, low_dose: bool) -> str:
        name = volume_name(int(self.index.volume[series_index]), low_dose)
        return f"{self.path}/volumes/{name}{self._format.suffix}"

    def _volume(self, series_index: int, low_dose: bool) -> Volume:
        if self._process != os.getpid():  # forked: connections aren't shared with the parent
            self._volumes.clear()
            self._process = os.getpid()
        key = (series_index, low_dose)
        volume = self._volumes.get(key)
        if volume is None:
            location = self._location(series_index, low_dose)
            try:
                volume = self._format.open(location)
            except (OSError, RuntimeError, ValueError) as error:
                raise InputError(f"{location}: can't be opened: {self._cause(error)}") from error
            if volume.shape != self.series[series_index].shape or volume.dtype != np.int16:
                raise InputError(
                    f"{location}: holds {volume.dtype} {list(volume.shape)}, "
                    f"the index says int16 {list(self.series[series_index].shape)}"
                )
            self._volumes[key] = volume
        return volume

    def read(
        self, series_index: int, z: int, window: tuple[int, int, int, int] | None = None, low_dose: bool = False
    ) -> np.ndarray:
        """Read one slice or a window of it: int16 [h, w], HU. Arguments and errors are those of `read_stack`."""
        return self.read_stack(series_index, z, 0, window, low_dose)[0]

    def read_stack(
        self,
        series_index: int,
        z: int,
        context: int,
        window: tuple[int, int, int, int] | None = None,
        low_dose: bool = False,
    ) -> np.ndarray:
        """Read a slice and its neighbours, or a window of them, in one piece.

        Args:
            series_index: which series.
            z: which slice.
            context: neighbouring slices on each side; beyond the ends of the series its end slices are repeated.
            window: (y0, x0, h, w) in pixels, inside the image; None reads whole slices.
            low_dose: read the measured low-dose volume instead of the normal-dose one.

        Returns:
            int16 [2 context + 1, h, w], HU.

        Raises:
            IndexError: no such series or slice.
            ValueError: the window leaves the image, or the series has no low-dose volume.
            InputError: the volume's file is missing or damaged.
        """
        if not 0 <= series_index < len(self.series):
            raise IndexError(f"series_index {series_index} isn't one of 0..{len(self.series) - 1}")
        info = self.series[series_index]
        depth, height, width = info.shape
        if not 0 <= z < depth:
            raise IndexError(f"z {z} isn't one of 0..{depth - 1} (series {info.series_uid})")
        if low_dose and not info.has_low_dose:
            raise ValueError(f"series {info.series_uid} has no low-dose volume")
        y0, x0, h, w = window if window is not None else (0, 0, height, width)
        if y0 < 0 or x0 < 0 or h <= 0 or w <= 0 or y0 + h > height or x0 + w > width:
            raise ValueError(f"window (y0={y0}, x0={x0}, h={h}, w={w}) leaves the {height} x {width} image")
        volume = self._volume(int(series_index), bool(low_dose))
        seen = neighbours(int(z), depth, context)
        first, last = int(seen[0]), int(seen[-1])
        try:
            pixels = volume[first : last + 1, int(y0) : int(y0 + h), int(x0) : int(x0 + w)]
        except (OSError, RuntimeError, ValueError) as error:
            raise InputError(
                f"{self._location(series_index, low_dose)}: slice {z} can't be decoded: {self._cause(error)}"
            ) from error
        return pixels if len(pixels) == len(seen) else pixels[seen - first]

    def boxes(self, series_index: int, z: int) -> np.ndarray:
        """Return the lesion boxes of one slice, float32 [L, 4] (x1, y1, x2, y2) in pixels; L may be 0."""
        key = (int(series_index) << 32) | int(z)
        first, last = np.searchsorted(self._key, [key, key + 1])
        return self.index.box[first:last].copy()


def index_files(location: str | Path) -> list[Path]:
    """The files that say what a store holds; none where it isn't a local folder."""
    return [] if is_url(str(location)) else [Path(location, name) for name in ("store.json", "index.npz")]


def volume_name(number: int, low_dose: bool) -> str:
    """Return the name of a volume, without the suffix of its format."""
    return f"{number:05d}.low_dose" if low_dose else f"{number:05d}"
