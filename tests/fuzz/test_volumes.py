"""Damaged MetaImage, NRRD and NIfTI files end as a sound volume, a rejection or an `InputError`."""

import gzip
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lidnet_fast.data.formats.geometry import LOWEST_HU
from lidnet_fast.data.formats.sources import find_series
from lidnet_fast.data.formats.volumes.series import scan_volumes
from lidnet_fast.evaluation.denoised import denoised_series
from tests.fuzz.hostile import NUMBERS, damaged, input_errors, limits

sitk = pytest.importorskip("SimpleITK")

NAMES = ("a.mhd", "a.mha", "a.nrrd", "a.nhdr", "a.nii", "a.nii.gz")


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    """Every format's header file and, where it has one, file of voxels."""
    image = sitk.GetImageFromArray(np.random.default_rng(0).integers(-1000, 2000, (3, 8, 10), np.int16))
    image.SetSpacing((0.8, 0.7, 2.5))
    found = {}
    for name in NAMES:
        folder = tmp_path_factory.mktemp("seed")
        sitk.WriteImage(image, str(folder / name))
        found[name] = {path.name: path.read_bytes() for path in folder.iterdir()}
    return found


@st.composite
def changed_words(draw, content):
    """A text header with some of its words replaced."""
    end = content.find(b"LOCAL") if b"ElementDataFile" in content else content.find(b"\n\n")
    head, rest = (content, b"") if end < 0 else (content[:end], content[end:])
    words = re.split(rb"([ \n,()=:]+)", head)
    others = st.sampled_from(NUMBERS).map(str.encode) | st.sampled_from(words)
    for _ in range(draw(st.integers(1, 3))):
        words[draw(st.integers(0, len(words) - 1))] = draw(others)
    return b"".join(words) + rest


@st.composite
def damaged_volumes(draw, seeds):
    """Names and contents of a damaged header file and of its voxels' file."""
    name = draw(st.sampled_from(NAMES))
    content = seeds[name][name]
    if name == "a.nii.gz" and draw(st.booleans()):
        changed = draw(damaged(gzip.decompress(content), 360).map(lambda content: gzip.compress(content, 1)))
    elif name.endswith((".nii", ".gz")):
        changed = draw(damaged(content, 400))
    else:
        changed = draw(changed_words(content) | damaged(content, 400))
    return seeds[name] | {name: changed}


@given(data=st.data())
def test_damaged_volumes(seeds, data):
    files = data.draw(damaged_volumes(seeds))
    with tempfile.TemporaryDirectory() as folder:
        for file, content in files.items():
            Path(folder, file).write_bytes(content)
        with limits(), input_errors():
            found = find_series([Path(folder)], "", strict=False, resample=True)
            assert all(rejected.reason for rejected in found.rejected)
            for series in found.series:
                assert np.isfinite(series.positions).all()
                assert np.isfinite(series.orientation).all()
                assert np.isfinite(series.spacing).all()
                assert min(series.spacing) > 0
                assert np.all(np.diff(series.distances) > 0)
                volume = series.read()
                assert volume.dtype == np.int16
                assert volume.shape == series.shape
                assert volume.min() >= LOWEST_HU


@given(data=st.data())
def test_damaged_volumes_to_denoise_or_evaluate(seeds, data):
    files = data.draw(damaged_volumes(seeds))
    with tempfile.TemporaryDirectory() as folder:
        for file, content in files.items():
            Path(folder, file).write_bytes(content)
        with limits(), input_errors():
            for volume in scan_volumes([Path(folder, name) for name in files], [Path(folder)])[0].series:
                slices = volume.read_hu()
                assert slices.shape == volume.shape
                assert np.isfinite(slices).all()
        with limits(), input_errors():
            for series in denoised_series(Path(folder)).series:
                assert series.read().shape == series.geometry.shape
