import json

import numpy as np
import pytest

from lidnet_fast.data.prepare.plan import prepare
from lidnet_fast.data.store.reader import Store
from lidnet_fast.errors import InputError
from lidnet_fast.evaluation.export import export
from tests.data.lesions.test_insertion import chest

UID = "1.2.826.0.1.3680043.8.498"


@pytest.fixture
def scans(tmp_path, write_series):
    write_series(tmp_path / "ct", chest(5), series_uid=f"{UID}.1", spacing=(2.5, 0.8, 0.8))
    write_series(tmp_path / "low", chest(5) + np.int16(3), series_uid=f"{UID}.2", spacing=(2.5, 0.8, 0.8))
    return tmp_path


def test_the_store_has_lesions_and_says_so(scans):
    options = {"val_fraction": 0, "test_fraction": 0, "insert_lesions": 4, "seed": 3}
    summary = prepare([scans / "ct"], scans / "store", low_dose=scans / "low", **options)
    store = Store(scans / "store")
    assert summary.boxes["train"] == len(store.index.box) >= 4
    assert summary.slices_with_boxes["train"] == len(np.unique(store.index.box_z))
    assert any("none of them is a patient's own" in line for line in summary.lines())
    assert store.inserted_lesions["lesions_per_series"] == 4 and store.inserted_lesions["seed"] == 3
    changed = [store.read(0, z).astype(int) - chest(5)[z] for z in range(5)]
    assert np.abs(changed).max() > 20
    assert all((store.read(0, z, low_dose=True) - store.read(0, z) == 3).all() for z in range(5))


def test_another_number_is_another_store(scans):
    """What an interrupted call wrote is not taken over by a call with other lesions."""
    stores = []
    for n in (1, 4):
        prepare([scans / "ct"], scans / f"store{n}", val_fraction=0, test_fraction=0, insert_lesions=n)
        stores.append(len(np.unique(Store(scans / f"store{n}").index.lesion)))
    assert stores[0] == 1 and stores[1] >= 3


def test_an_export_keeps_the_mark(scans):
    prepare([scans / "ct"], scans / "store", low_dose=scans / "low", val_fraction=0, test_fraction=0, insert_lesions=2)
    export(scans / "store", scans / "out", split="train")
    assert Store(scans / "out/store").inserted_lesions == Store(scans / "store").inserted_lesions


def test_other_stores_are_not_marked(scans):
    prepare([scans / "ct"], scans / "store", val_fraction=0, test_fraction=0)
    assert Store(scans / "store").inserted_lesions is None
    assert json.loads((scans / "store/store.json").read_text())["inserted_lesions"] is None


def test_boxes_and_inserted_lesions_are_not_mixed(scans):
    (scans / "boxes.csv").write_text(f"series_uid,slice,x1,y1,x2,y2\n{UID}.1,0,1,2,3,4\n")
    with pytest.raises(InputError, match=r"insert_lesions \(2\) and boxes .*: give one of the two"):
        prepare([scans / "ct"], scans / "store", boxes=scans / "boxes.csv", insert_lesions=2)
    with pytest.raises(InputError, match="insert_lesions must be at least 1"):
        prepare([scans / "ct"], scans / "store", insert_lesions=0)
    assert not (scans / "store").exists()


def test_real_ct(real_ct, tmp_path):
    """Slices of five patients: lesions only where the tissue is theirs."""
    prepare(real_ct.sources, tmp_path / "plain", splits=real_ct.splits, resample=True)
    summary = prepare(real_ct.sources, tmp_path / "store", splits=real_ct.splits, resample=True, insert_lesions=3)
    plain, store = Store(tmp_path / "plain"), Store(tmp_path / "store")
    assert sum(summary.boxes.values()) >= 8
    for index in range(len(store.series)):
        before = plain.read(index, 0).astype(int)
        changed = np.abs(store.read(index, 0) - before) > 15
        for x1, y1, x2, y2 in store.boxes(index, 0).round().astype(int):
            assert changed[y1:y2, x1:x2].mean() > 0.5
            assert -1000 < before[y1:y2, x1:x2].mean() < 150
