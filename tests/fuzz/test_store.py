"""Damaged stores end as an `InputError` when they are opened or read; what can be read is of the stated size."""

import dataclasses
import io
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lidnet_fast.data.samples.dataset import LesionPatches
from lidnet_fast.data.store.index import Index
from lidnet_fast.data.store.reader import SeriesInfo, Store
from lidnet_fast.data.store.writer import StoreWriter
from tests.fuzz.hostile import damaged, input_errors, limits

GEOMETRY = {"spacing": (2.5, 0.7, 0.8), "origin": (-10.0, -20.0, 30.5), "orientation": (1.0, 0, 0, 0, 1.0, 0)}
FIELDS = ["series_id", *(field.name for field in dataclasses.fields(Index) if field.name != "series_uid")]
JSON = st.sampled_from([None, True, -1, 0, 3, 1e308, "", "x", "zarr", [], ["blosc2"], {}, {"dose_fraction": "x"}])


@pytest.fixture(scope="module", params=["blosc2", "zarr"])
def seed(request, tmp_path_factory):
    """A sound store."""
    folder = tmp_path_factory.mktemp("seed") / "store"
    with StoreWriter(folder, simulation={"dose_fraction": 0.25}, split={}, volume_format=request.param) as writer:
        for number, patient in enumerate(("anna", "bert")):
            volume = np.random.default_rng(number).integers(-1024, 3071, (3, 40, 48), np.int16)
            boxes = np.array([[0, 1, 2, 30, 32], [2, 5, 6, 17.5, 18]], np.float32)
            info = SeriesInfo(f"1.2.{number}", patient, "train", shape=volume.shape, **GEOMETRY)
            writer.add_series(info, volume, boxes)
    return folder


def check_store(seed, name, content):
    """Replace one file of a store, and read all of it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "store")
        shutil.copytree(seed, path)
        (path / name).write_bytes(content)
        with limits(), input_errors():
            store = Store(path)
            for number, info in enumerate(store.series):
                assert np.isfinite([*info.spacing, *info.origin, *info.orientation]).all()
                for z in range(min(info.shape[0], 5)):
                    with input_errors():
                        pixels = store.read(number, z)
                        assert pixels.dtype == np.int16
                        assert pixels.shape == info.shape[1:]
                    assert np.isfinite(store.boxes(number, z)).all()
        with limits(), input_errors():
            patches = LesionPatches(path, "train", crop=32, positive_fraction=0.5, augment=True, seed=0)
            for draw in range(3):
                patches[draw]


@given(data=st.data())
def test_damaged_files(seed, data):
    files = sorted(path.relative_to(seed).as_posix() for path in seed.rglob("*") if path.is_file())
    name = data.draw(st.sampled_from(files))
    check_store(seed, name, data.draw(damaged((seed / name).read_bytes())))


@given(data=st.data())
def test_changed_header(seed, data):
    header = json.loads((seed / "store.json").read_text())
    for key in data.draw(st.lists(st.sampled_from(sorted(header)), min_size=1, max_size=2)):
        header[key] = data.draw(JSON)
    check_store(seed, "store.json", json.dumps(header).encode())


@st.composite
def changed_array(draw, array):
    """Another value in some place, another shape or another type."""
    kind = draw(st.sampled_from(["value", "value", "value", "shape", "type"]))
    if kind == "shape":
        return draw(
            st.sampled_from(
                [lambda a: a[:1], lambda a: a[None], np.ravel, lambda a: a[..., None], lambda a: a[:0], lambda a: a[0]]
            )
        )(array)
    if kind == "type":
        return array.astype("O" if array.dtype.kind == "U" else draw(st.sampled_from(["i8", "U9", "O", "S9"])))
    changed = array.copy()
    place = tuple(draw(st.integers(0, side - 1)) for side in array.shape)
    values = {"f": [np.nan, np.inf, -1.0, 0.0, 1e30], "b": [True, False], "U": ["", "\0", "1.2.0", "anna"]}
    changed[place] = draw(st.sampled_from(values.get(array.dtype.kind, [0, 1, 2, 3, 100, 255])))
    if array.dtype.kind == "i" and draw(st.booleans()):
        changed[place] = draw(st.sampled_from([-1, -(2**31), 2**31 - 1]))
    return changed


@given(data=st.data())
def test_changed_index(seed, data):
    with np.load(seed / "index.npz") as arrays:
        index = dict(arrays)
    for name in data.draw(st.lists(st.sampled_from(FIELDS), min_size=1, max_size=2, unique=True)):
        index[name] = data.draw(changed_array(index[name]))
    content = io.BytesIO()
    np.savez(content, **index)
    check_store(seed, "index.npz", content.getvalue())
