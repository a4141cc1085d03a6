import dataclasses
import shutil

import numpy as np
import pydicom
import pytest
from pydicom.uid import JPEG2000Lossless

from lidnet_fast.cli import main
from lidnet_fast.data.prepare.plan import prepare
from lidnet_fast.data.prepare.splits import read_splits, split_of
from lidnet_fast.data.simulation.dose import DoseSimulation
from lidnet_fast.data.store.index import SPLITS
from lidnet_fast.data.store.reader import Store
from lidnet_fast.errors import InputError
from lidnet_fast.evaluation.export import export

UID = "1.2.826.0.1.3680043.8.498"
HEADER = "series_uid,slice,x1,y1,x2,y2"


@pytest.fixture
def study(tmp_path, write_series, make_hu):
    """Three patients, one of them with two series; returns (folder, volumes by series UID, patients by series UID)."""
    volumes, patients = {}, {}
    for n, (patient, depth) in enumerate([("anna", 4), ("anna", 5), ("bert", 3), ("carla", 6)]):
        uid = f"{UID}.{n}"
        volumes[uid], patients[uid] = make_hu(depth, seed=n), patient
        syntax = {"syntax": JPEG2000Lossless} if n == 2 else {}
        write_series(tmp_path / "ct" / patient, volumes[uid], series_uid=uid, patient_id=patient, **syntax)
    return tmp_path / "ct", volumes, patients


@pytest.fixture
def splits_csv(tmp_path):
    path = tmp_path / "splits.csv"
    path.write_text("patient_id,split\nanna,train\nbert,val\ncarla,test\nsomebody else,val\n")
    return path


def test_the_store_says_how_a_series_was_made(tmp_path, write_series, make_hu):
    """Thickness, which needn't be the distance, kernel and body part; what differs or isn't there is unknown."""

    def edit(z, dataset):
        dataset.SliceThickness, dataset.ConvolutionKernel, dataset.BodyPartExamined = 3, ["I30f", "3"], "CHEST"

    def other(z, dataset):
        dataset.ConvolutionKernel = ["B30f", "B60f"][z]
        dataset.SliceThickness = None

    write_series(tmp_path / "ct", make_hu(2), series_uid=f"{UID}.1", edit=edit)
    write_series(tmp_path / "ct", make_hu(2), series_uid=f"{UID}.2", edit=other)
    prepare([tmp_path / "ct"], tmp_path / "store", val_fraction=0, test_fraction=0)
    known, unknown = Store(tmp_path / "store").series
    assert (known.slice_thickness, known.kernel, known.body_part) == (3.0, "I30f\\3", "CHEST")
    assert (unknown.slice_thickness, unknown.kernel, unknown.body_part) == (None, "", "")
    assert unknown.spacing[0] == 2.5


def test_prepare(tmp_path, study, splits_csv):
    folder, volumes, patients = study
    table = tmp_path / "boxes.csv"
    table.write_text(f"{HEADER}\n{UID}.1,4,1,2,3,4\n{UID}.1,4,11,12,13,14.5\n{UID}.3,0,0,0,64,64\n")
    out = tmp_path / "new" / "store"
    summary = prepare([str(folder)], str(out), boxes=str(table), splits=str(splits_csv))
    store = Store(out)
    assert [info.series_uid for info in store.series] == sorted(volumes)
    for index, info in enumerate(store.series):
        assert info.patient_id == patients[info.series_uid]
        assert info.split == {"anna": "train", "bert": "val", "carla": "test"}[info.patient_id]
        assert info.spacing == pytest.approx((2.5, 0.7, 0.8))
        assert info.origin == (-20, -30, 100)
        assert info.orientation == (1, 0, 0, 0, 1, 0)
        assert not info.has_low_dose
        stack = np.stack([store.read(index, z) for z in range(info.shape[0])])
        np.testing.assert_array_equal(stack, volumes[info.series_uid])
    np.testing.assert_array_equal(store.boxes(1, 4), [[1, 2, 3, 4], [11, 12, 13, 14.5]])
    np.testing.assert_array_equal(store.boxes(3, 0), [[0, 0, 64, 64]])
    assert np.unique(store.index.box_z[store.index.box_series == 1]).tolist() == [4]
    assert store.simulation is None
    assert store.split == {"by": "table", "patients": {"anna": "train", "bert": "val", "carla": "test"}}
    assert summary.out == out
    assert summary.patients == {"train": 1, "val": 1, "test": 1}
    assert summary.series == {"train": 2, "val": 1, "test": 1}
    assert summary.slices == {"train": 9, "val": 3, "test": 6}
    assert summary.boxes == {"train": 2, "val": 0, "test": 1}
    assert summary.slices_with_boxes == {"train": 1, "val": 0, "test": 1}
    assert summary.warnings == ()
    assert "  train: 1 patients, 2 series, 9 slices, 2 boxes on 1 of them" in summary.lines()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_store_is_as_private_as_its_sources(tmp_path, study, workers):
    tmp_path.chmod(0o700)
    prepare([study[0]], tmp_path / "store", workers=workers, report=tmp_path / "report.csv")
    for path in [tmp_path / "report.csv", tmp_path / "store", *(tmp_path / "store").rglob("*")]:
        assert path.stat().st_mode & 0o077 == 0, path


def test_progress_is_silent_off_the_terminal(tmp_path, study, capfd):
    prepare([study[0]], tmp_path / "store")
    assert capfd.readouterr() == ("", "")


def test_simulated_dose_keeps_parameters_and_no_noise(tmp_path, study):
    folder, volumes, _ = study
    prepare([folder], tmp_path / "store", simulate_dose=0.1, photons=1e5)
    store = Store(tmp_path / "store")
    assert store.simulation == dataclasses.asdict(DoseSimulation(dose_fraction=0.1, photons=1e5))
    assert DoseSimulation.from_dict(store.simulation).dose_fraction == 0.1
    assert not any(info.has_low_dose for info in store.series)
    np.testing.assert_array_equal(store.read(0, 1), volumes[f"{UID}.0"][1])


def test_draw(tmp_path, study):
    """Series of one patient stay together, and the draw is recorded."""
    prepare([study[0]], tmp_path / "store", seed=1, val_fraction=0.3, test_fraction=0.2)
    store = Store(tmp_path / "store")
    assert store.split == {"by": "draw", "seed": 1, "val_fraction": 0.3, "test_fraction": 0.2}
    for info in store.series:
        assert info.split == split_of(info.patient_id, 1, 0.3, 0.2)
    assert {info.split for info in store.series} == set(SPLITS)
    again = prepare([study[0]], tmp_path / "again", seed=1, val_fraction=0.3, test_fraction=0.2)
    assert Store(tmp_path / "again").series == store.series
    (warning,) = again.warnings
    assert warning.endswith("can't be trained on this store. To fix: prepare it with --boxes or --insert-lesions")


def test_fractions_are_met_on_average():
    patients = [f"LIDC-IDRI-{n:04d}" for n in range(4000)]
    splits = [split_of(patient, 0, 0.1, 0.25) for patient in patients]
    assert splits.count("val") / 4000 == pytest.approx(0.1, abs=0.02)
    assert splits.count("test") / 4000 == pytest.approx(0.25, abs=0.02)
    other = [split_of(patient, 1, 0.1, 0.25) for patient in patients]
    # Two independent draws agree with probability .1^2 + .25^2 + .65^2.
    assert np.mean([a == b for a, b in zip(splits, other, strict=True)]) == pytest.approx(0.495, abs=0.03)


def test_the_draw_never_changes():
    """Stores that are prepared anew, or grow, must keep their held-out patients."""
    drawn = [split_of(patient, 0, 0.3, 0.3) for patient in ("anna", "bert", "carla", "dora", "emil", "fritz")]
    assert drawn == ["test", "val", "test", "test", "train", "test"]


def test_empty_splits(tmp_path, study):
    folder = study[0]
    summary = prepare([folder], tmp_path / "a", val_fraction=0, test_fraction=0)
    assert [warning.split(";")[0] for warning in summary.warnings] == [
        "none of the 3 patients is in the split val",
        "none of the 3 patients is in the split test",
        "no lesion box is in the split train, so that LIDnet can't be trained on this store. "
        "To fix: prepare it with --boxes or --insert-lesions",
    ]
    assert any("warning: none of the 3 patients" in line for line in summary.lines())
    with pytest.raises(InputError, match="none of the 1 patient is in the split train; give another seed"):
        prepare([folder / "anna"], tmp_path / "b", val_fraction=0.499, test_fraction=0.5)
    table = tmp_path / "splits.csv"
    table.write_text("patient_id,split\nanna,val\nbert,val\ncarla,val\n")
    with pytest.raises(InputError, match="none of the 3 patients is in the split train; list patients for it"):
        prepare([folder], tmp_path / "b", splits=table)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("by", ["table", "fraction"])
def test_a_store_for_evaluation_only(tmp_path, study, by, capsys):
    """Every patient in test, because the table or the fraction says so, not by chance."""
    table = tmp_path / "splits.csv"
    table.write_text("patient_id,split\nanna,test\nbert,test\ncarla,test\n")
    chosen = {"splits": table} if by == "table" else {"test_fraction": 1}
    summary = prepare([study[0]], tmp_path / "store", simulate_dose=0.25, **chosen)
    assert summary.patients == {"train": 0, "val": 0, "test": 3}
    assert summary.warnings == ("all patients are in the split test: the store is for evaluation only",)
    assert {info.split for info in Store(tmp_path / "store").series} == {"test"}
    assert len(export(tmp_path / "store", tmp_path / "exported")) == 3
    with pytest.raises(SystemExit) as stop:
        main(["train", "--data.store", str(tmp_path / "store"), "--out", str(tmp_path / "run"), "--data.crop", "64"])
    assert stop.value.code == 2
    assert "the train split has no slices. To fix: prepare a store with patients in train" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.fixture
def low_dose(tmp_path, study, write_series):
    """The same scans at low dose in another folder, in UIDs of another order."""
    _, volumes, patients = study
    low = {}
    for n, uid in enumerate(volumes):
        low[uid] = volumes[uid] + np.random.default_rng(n).integers(-20, 20, volumes[uid].shape, np.int16)
        write_series(
            tmp_path / "low" / patients[uid],
            low[uid],
            series_uid=f"{UID}.{99 - n}",
            patient_id=patients[uid],
            suffix="",
        )
    return tmp_path / "low", low


def test_paired_low_dose(tmp_path, study, low_dose, write_series):
    folder, volumes, _ = study
    write_series(low_dose[0] / "x", np.zeros((3, 64, 64), np.int16), series_uid=f"{UID}.70", patient_id="xaver")
    for place in (folder, low_dose[0]):
        (place / "notes.txt").write_text("a note")
    summary = prepare([folder], tmp_path / "store", low_dose=low_dose[0])
    assert summary.skipped == {"not DICOM": 2}
    store = Store(tmp_path / "store")
    for index, info in enumerate(store.series):
        assert info.has_low_dose
        for z in range(info.shape[0]):
            expected = np.maximum(low_dose[1][info.series_uid][z], -1024)
            np.testing.assert_array_equal(store.read(index, z, low_dose=True), expected)
            np.testing.assert_array_equal(store.read(index, z), volumes[info.series_uid][z])
    (rejected,) = summary.rejected
    assert rejected.reason.endswith("belongs to no normal-dose series")
    assert f"series {UID}.70 of patient xaver" in rejected.reason


def fail(tmp_path, message, *arguments, **options):
    """`prepare` refuses this in one line, and leaves nothing behind."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=message) as error:
        prepare(*arguments, strict=True, **options)
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_unpaired_low_dose(tmp_path, study, low_dose, write_series, make_hu):
    folder, out = study[0], tmp_path / "store"
    fail(tmp_path, r"low_dose: series .*\.0 in .* is among the normal-dose series", [folder], out, low_dose=folder)
    write_series(low_dose[0] / "again", make_hu(3), series_uid=f"{UID}.80", patient_id="bert")
    fail(tmp_path, r"low_dose: .*\.80 and .*\.97 both have .* of series .*\.2", [folder], out, low_dose=low_dose[0])
    shutil.rmtree(low_dose[0] / "again")
    write_series(folder / "again", make_hu(6), series_uid=f"{UID}.5", patient_id="carla")
    fail(tmp_path, r"low_dose: series .*\.96 .* of both .*\.3 and .*\.5", [folder], out, low_dose=low_dose[0])
    shutil.rmtree(folder / "again")
    shutil.rmtree(low_dose[0] / "bert")
    fail(tmp_path, r"low_dose: no series there has .*\.2 of patient bert", [folder], out, low_dose=low_dose[0])
    write_series(low_dose[0] / "bert", make_hu(3), series_uid=f"{UID}.97", patient_id="bert", origin=(-20, -30, 101))
    fail(tmp_path, r"low_dose: no series there has .*\.2 of patient bert", [folder], out, low_dose=low_dose[0])


def test_bad_arguments(tmp_path, study, splits_csv):
    folder, out = study[0], tmp_path / "store"
    fail(tmp_path, r"ct: exists already", [folder], folder)
    fail(tmp_path, r"sources: at least one folder", [], out)
    fail(tmp_path, r"nowhere: there is no such file or folder", [folder, tmp_path / "nowhere"], out)
    fail(tmp_path, r"no CT found", [splits_csv], out)
    fail(tmp_path, r"boxes\.csv: there is no such file", [folder], out, boxes=tmp_path / "boxes.csv")
    fail(tmp_path, r"simulate_dose: dose_fraction must be in \(0, 1\], got 1\.5", [folder], out, simulate_dose=1.5)
    fail(tmp_path, r"low_dose .*and simulate_dose .*one of the two", [folder], out, simulate_dose=0.5, low_dose=folder)
    fail(tmp_path, r"photons needs simulate_dose. To fix: give both or neither", [folder], out, photons=1e5)
    fail(tmp_path, r"val_fraction must be in \[0, 1\), got -0\.1", [folder], out, val_fraction=-0.1)
    fail(tmp_path, r"must be below 1, got 0\.5 \+ 0\.5", [folder], out, val_fraction=0.5, test_fraction=0.5)


def _z(file):
    return pydicom.dcmread(file, stop_before_pixels=True).ImagePositionPatient[2]


def test_bad_studies(tmp_path, study):
    folder, out = study[0], tmp_path / "store"
    table = tmp_path / "boxes.csv"
    table.write_text(f"{HEADER}\n{UID}.0,0,1,2,3,4\n{UID}.0,0,1,2,3,64.5\n")
    fail(tmp_path, r"boxes\.csv, line 3: .*reaches outside its 64 x 64 image", [folder], out, boxes=table)
    table.write_text(f"{HEADER},label\n{UID}.0,0,1,2,3,4,nodule\n")
    fail(tmp_path, r"boxes\.csv, line 1: column 'label' is unknown", [folder], out, boxes=table)
    truncated = sorted((folder / "bert").iterdir())[1]
    truncated.write_bytes(truncated.read_bytes()[:-900])
    # Compressed: noticed when the first series is in the store already.
    fail(tmp_path, rf"{truncated.name}: its pixels can't be decoded \(truncated\?\)", [folder], out, val_fraction=0)
    truncated.unlink()
    inner = next(file for file in (folder / "carla").iterdir() if _z(file) == 105)
    inner.unlink()
    fail(tmp_path, rf"series {UID}\.3 .*slices are missing between", [folder], out)


BAD_SPLITS = {
    "two splits": (
        ["anna,train", "bert,val", "carla,test", "anna,test"],
        "patient anna is in two splits, train on line 2 and test on line 5",
    ),
    "unknown split": (["anna,train", "bert,validation"], "line 3: split 'validation' isn't one of train, val, test"),
    "nobody": (["anna,train"], "no line for patient bert and 1 more patients"),
    "empty": (["anna,"], "line 2: split is empty"),
}


@pytest.mark.parametrize("name", BAD_SPLITS)
def test_bad_splits(tmp_path, name):
    lines, message = BAD_SPLITS[name]
    path = tmp_path / "splits.csv"
    path.write_text("\n".join(["patient_id,split", *lines]))
    with pytest.raises(InputError, match=message) as error:
        read_splits(path, ["carla", "anna", "bert"])
    assert str(error.value).startswith(str(path))


def test_a_patient_may_be_listed_twice_alike(tmp_path):
    path = tmp_path / "splits.csv"
    path.write_text("split,patient_id\ntrain,anna\nval,bert\ntrain,anna\n")
    assert read_splits(path, ["bert", "anna"]) == {"anna": "train", "bert": "val"}
    path.write_text("patient,split\nanna,train\n")
    with pytest.raises(InputError, match=r"line 1: column patient_id is missing; column 'patient' is unknown"):
        read_splits(path, ["anna"])


def test_real_ct(tmp_path, real_ct):
    """Real slices in three transfer syntaxes, boxes written by hand around organs."""
    summary = prepare(
        real_ct.sources, tmp_path / "store", boxes=real_ct.boxes, splits=real_ct.splits, simulate_dose=0.25
    )
    assert summary.slices == {"train": 3, "val": 1, "test": 1}
    assert summary.boxes == {"train": 4, "val": 1, "test": 1}
    store = Store(tmp_path / "store")
    index = {info.patient_id: n for n, info in enumerate(store.series)}
    assert set(index) == {"PANCREAS_0001", "b2cbe507f250", "CQ500-CT-310", "JXD191021006", "1CT1"}
    medians = {}
    for patient, n in index.items():
        image = store.read(n, 0)
        assert image.min() >= -1024
        assert 1000 < image.max() < 2500
        medians[patient] = [
            float(np.median(image[int(y1) : int(y2), int(x1) : int(x2)])) for x1, y1, x2, y2 in store.boxes(n, 0)
        ]
    np.testing.assert_array_equal(store.boxes(index["PANCREAS_0001"], 0), [[176, 156, 227, 221], [294, 162, 342, 223]])
    assert medians["PANCREAS_0001"] == pytest.approx([110, 100], abs=20)  # kidneys with contrast medium
    assert medians["b2cbe507f250"] == pytest.approx([210], abs=30)  # spongy bone
    assert medians["1CT1"] == pytest.approx([220], abs=30)
    assert medians["CQ500-CT-310"] == pytest.approx([25], abs=5)  # brain
    assert medians["JXD191021006"] == pytest.approx([36], abs=5)
    assert store.series[index["CQ500-CT-310"]].spacing == pytest.approx((5, 0.478516, 0.478516))
    assert store.series[index["PANCREAS_0001"]].spacing == pytest.approx((0, 0.859375, 0.859375))


def test_copies_of_a_real_slice_are_noticed(tmp_path, real_ct):
    """The head again, in another transfer syntax, under another name."""
    from pydicom.data import get_testdata_file

    shutil.copy(get_testdata_file("693_J2KR.dcm", download=False), real_ct.sources[2] / "again.dcm")
    summary = prepare(real_ct.sources, tmp_path / "store", splits=real_ct.splits)
    assert summary.slices == {"train": 3, "val": 1, "test": 1}
    assert summary.rejected == []
