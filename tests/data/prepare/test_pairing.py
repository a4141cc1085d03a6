"""Normal and low dose of one scan find each other."""

import re

import numpy as np
import pytest

from lidnet_fast.data.formats.sources import find_series
from lidnet_fast.data.prepare.pairing import pair
from lidnet_fast.data.prepare.plan import prepare
from lidnet_fast.data.store.reader import Store

UID = "1.2.826.0.1.3680043.8.498"
DRAW = {"val_fraction": 0, "test_fraction": 0}


def with_kernel(kernel):
    def edit(z, dataset):
        dataset.ConvolutionKernel = kernel

    return edit


@pytest.fixture
def kernels(tmp_path, write_series, make_hu):
    """A patient with these kernels at normal and at low dose; every series has values of its own."""

    def make(normal, low):
        hu, count = {}, 0
        for dose, kernels in (("normal", normal), ("low", low)):
            for kernel in kernels:
                count += 1
                hu[dose, kernel] = make_hu(3, seed=count)
                edit = with_kernel(kernel) if kernel else None
                write_series(tmp_path / dose, hu[dose, kernel], series_uid=f"{UID}.{count}", edit=edit)
        return hu

    return make


def test_pairs_of_several_kernels(tmp_path, kernels):
    hu = kernels(["B30f", "D45f"], ["D45f", "B30f"])
    summary = prepare([tmp_path / "normal"], tmp_path / "store", low_dose=tmp_path / "low", **DRAW)
    assert (summary.rejected, summary.series["train"]) == ([], 2)
    store = Store(tmp_path / "store")
    for index, info in enumerate(store.series):
        np.testing.assert_array_equal(store.read(index, 1), hu["normal", info.kernel][1])
        np.testing.assert_array_equal(store.read(index, 1, low_dose=True), hu["low", info.kernel][1])


@pytest.mark.parametrize(
    ("normal", "low", "paired", "faults"),
    [
        (
            ["B30f", "D45f"],
            ["B30f"],
            {"B30f": "B30f"},
            ["no series there has .*\\.2 of patient anna \\(kernel D45f\\)"],
        ),
        (["B30f"], ["D45f", "B30f"], {"B30f": "B30f"}, []),
        (["B30f"], ["I30f"], {"B30f": "I30f"}, []),  # the only one there is: reconstructed iteratively
        (["B30f"], ["D45f", "I30f"], {}, ["both have the patient"]),
        (["B30f"], [None], {"B30f": None}, []),
        (["B30f"], [None, "B30f"], {"B30f": "B30f"}, []),
        (["B30f", None], ["B30f", None], {"B30f": "B30f", None: None}, []),
        ([None, None], [None], {}, ["of both", "of both"]),
    ],
)
def test_which_kernels_are_paired(tmp_path, kernels, normal, low, paired, faults):
    kernels(normal, low)
    scans = {dose: find_series([tmp_path / dose], "", strict=True, resample=False).series for dose in ("normal", "low")}
    pairs, rejected = pair(scans["normal"], scans["low"])
    left = {fault.series_uid for fault in rejected if "belongs to no normal-dose series" in fault.reason}
    assert left == {one.series_uid for one in scans["low"]} - {one.series_uid for one in pairs.values()}
    rejected = [fault for fault in rejected if fault.series_uid not in left]
    kernel_of = {one.series_uid: one.kernel or None for one in scans["normal"]}
    assert {kernel_of[uid]: other.kernel or None for uid, other in pairs.items()} == paired
    assert len(rejected) == len(faults)
    for fault, message in zip(rejected, faults, strict=True):
        assert re.search(message, fault.reason)


def test_a_pair_of_different_kernels_is_named(tmp_path, kernels):
    kernels(["B30f"], ["I30f"])
    summary = prepare([tmp_path / "normal"], tmp_path / "store", low_dose=tmp_path / "low", **DRAW)
    assert f"series {UID}.1 has the kernel B30f, its low dose I30f" in summary.warnings
