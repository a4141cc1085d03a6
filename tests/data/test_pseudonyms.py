"""Pseudonyms: keyed, the same for the same key, and nothing else in what is written."""

import csv
import hashlib
import hmac
import os
from pathlib import Path

import numpy as np
import pydicom
import pytest

from lidnet_fast.cli import main
from lidnet_fast.data.prepare.plan import prepare
from lidnet_fast.data.pseudonyms import Pseudonyms
from lidnet_fast.data.store.reader import Store
from lidnet_fast.errors import InputError
from lidnet_fast.evaluation.export import export

PATIENTS = {"1.2.840.99.3": "Müller^Anna", "1.2.840.99.1": "Müller^Anna", "1.2.840.99.2": "bert 4711"}
SPLITS = "patient_id,split\nMüller^Anna,train\nbert 4711,test\n"


@pytest.fixture
def key(tmp_path):
    return make_key(tmp_path / "key", bytes(range(32)))


def make_key(path, content, mode=0o600):
    path.write_bytes(content)
    path.chmod(mode)
    return path


@pytest.fixture
def study(tmp_path, write_series, make_hu):
    """Three series of two patients, a box on each, and the splits."""
    for number, (uid, patient) in enumerate(PATIENTS.items()):

        def edit(_, dataset, patient=patient):
            dataset.SpecificCharacterSet = "ISO_IR 192"
            dataset.PatientID = patient

        where = {"origin": (0.0, 0.0, 10.0 * number), "series_uid": uid}
        write_series(tmp_path / "in" / str(number), make_hu(2, seed=number), **where, edit=edit)
    rows = [f"{uid},{z},1,2,{10 + z},20" for z, uid in enumerate(sorted(PATIENTS)) if z < 2]
    (tmp_path / "boxes.csv").write_text("\n".join(["series_uid,slice,x1,y1,x2,y2", *rows]))
    (tmp_path / "splits.csv").write_text(SPLITS, encoding="utf-8")
    return tmp_path / "in"


def ids(store):
    return {(info.series_uid, info.patient_id) for info in store.series}


def search(folder, ids):
    """Ids in the names or, as UTF-8 or as NumPy keeps text, in the content of what lies below a folder."""
    for path in folder.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        for name in ids:
            if name in str(path.relative_to(folder)) or name.encode() in content or name.encode("utf-32-le") in content:
                yield path, name


def test_ids_are_hashes_with_the_key():
    pseudonyms = Pseudonyms(b"k" * 32, Path("key"))
    for kind, name, made in (("patient", "Müller^Anna", None), ("series", "1.2.3", "2.25.")):
        digest = hmac.new(b"k" * 32, f"lidnet_fast {kind}\0{name}".encode(), hashlib.sha256).digest()[:16]
        expected = digest.hex() if made is None else f"{made}{int.from_bytes(digest, 'big')}"
        assert getattr(pseudonyms, kind)(name) == expected
    assert pydicom.uid.UID(pseudonyms.series("a/b")).is_valid
    other = Pseudonyms(b"l" * 32, Path("key"))
    assert other.patient("anna") != pseudonyms.patient("anna")
    assert other.fingerprint != pseudonyms.fingerprint
    assert "kkk" not in repr(pseudonyms)


@pytest.mark.parametrize("split", ["table", "draw"])
def test_a_store_has_pseudonyms_alone(tmp_path, study, key, split):
    how = {"splits": tmp_path / "splits.csv"} if split == "table" else {"val_fraction": 0, "test_fraction": 0}
    options = {"boxes": tmp_path / "boxes.csv", "workers": 1, **how}
    prepare([study], tmp_path / "plain", **options)
    prepare([study], tmp_path / "store", pseudonymise=key, **options)
    prepare([study], tmp_path / "again", pseudonymise=key, **options)
    plain, store = Store(tmp_path / "plain"), Store(tmp_path / "store")
    pseudonyms = Pseudonyms.read(key)
    assert ids(store) == {(pseudonyms.series(uid), pseudonyms.patient(who)) for uid, who in ids(plain)}
    assert store.series == Store(tmp_path / "again").series
    assert (plain.pseudonyms, store.pseudonyms) == (None, pseudonyms.fingerprint)
    real = [*PATIENTS, *PATIENTS.values()]
    assert {name for _, name in search(tmp_path / "plain", real)} == set(real)
    assert list(search(tmp_path / "store", real)) == []
    # Everything else is as it was.
    place = {info.series_uid: index for index, info in enumerate(store.series)}
    assert sorted(place) == list(place)
    for index, info in enumerate(plain.series):
        other = place[pseudonyms.series(info.series_uid)]
        for z in range(2):
            np.testing.assert_array_equal(plain.read(index, z), store.read(other, z))
            np.testing.assert_array_equal(plain.boxes(index, z), store.boxes(other, z))
        if split == "table":
            assert store.series[other].split == info.split
    if split == "table":
        assert store.split["patients"] == {pseudonyms.patient(who): of for who, of in plain.split["patients"].items()}
    assert not list(tmp_path.glob("*.csv.*"))


def test_the_table_of_pseudonyms_is_written_on_request_for_its_user_alone(tmp_path, study, key):
    options = ["--splits", str(tmp_path / "splits.csv"), "--workers", "1", "--pseudonymise", str(key)]
    table = tmp_path / "who.csv"
    main(["prepare", str(study), "--out", str(tmp_path / "store"), "--pseudonym-table", str(table), *options])
    assert table.stat().st_mode & 0o777 == 0o600
    with table.open(newline="", encoding="utf-8") as file:
        rows = {(row["kind"], row["id"]): row["pseudonym"] for row in csv.DictReader(file)}
    pseudonyms = Pseudonyms.read(key)
    assert rows == {
        **{("series", uid): pseudonyms.series(uid) for uid in PATIENTS},
        **{("patient", who): pseudonyms.patient(who) for who in PATIENTS.values()},
    }
    (tmp_path / "mine.csv").write_text("mine")
    for path in (tmp_path / "mine.csv", tmp_path):
        with pytest.raises(InputError, match="isn't a table of pseudonyms"):
            prepare([study], tmp_path / "other", pseudonymise=key, pseudonym_table=path)
    with pytest.raises(InputError, match="needs pseudonymise"):
        prepare([study], tmp_path / "other", pseudonym_table=tmp_path / "new.csv")


@pytest.mark.parametrize("format", ["nifti", "dicom"])
def test_an_export_has_pseudonyms_alone(tmp_path, study, key, format):
    prepare([study], tmp_path / "plain", splits=tmp_path / "splits.csv", low_dose=_copy(study, tmp_path), workers=1)
    prepare(
        [study],
        tmp_path / "store",
        splits=tmp_path / "splits.csv",
        low_dose=tmp_path / "low",
        workers=1,
        pseudonymise=key,
    )
    how = {"split": "train", "format": format}
    export(tmp_path / "plain", tmp_path / "out", **how, pseudonymise=key, pseudonym_table=tmp_path / "who.csv")
    export(tmp_path / "store", tmp_path / "already", **how, pseudonymise=key)
    assert Store(tmp_path / "out" / "store").series == Store(tmp_path / "already" / "store").series
    assert list(search(tmp_path / "out", [*PATIENTS, *PATIENTS.values()])) == []
    files = [{path.relative_to(out).as_posix() for path in out.rglob("*")} for out in tmp_path.glob("[oa][ul]*")]
    assert files[0] == files[1]
    if format == "dicom":
        for path in (tmp_path / "out").rglob("*.dcm"):
            dataset = pydicom.dcmread(path)
            assert dataset.PatientID == Pseudonyms.read(key).patient("Müller^Anna")
            assert dataset.PatientName == ""
    assert len((tmp_path / "who.csv").read_text().splitlines()) == 4
    with pytest.raises(InputError, match="has the pseudonyms of this key already"):
        export(tmp_path / "store", tmp_path / "no", pseudonymise=key, pseudonym_table=tmp_path / "no.csv")
    # Of another key, they are ids like others.
    other = make_key(tmp_path / "other", b"o" * 40)
    export(tmp_path / "store", tmp_path / "twice", **how, pseudonymise=other)
    twice = Pseudonyms.read(other)
    assert ids(Store(tmp_path / "twice" / "store")) == {
        (twice.series(info.series_uid), twice.patient(info.patient_id))
        for info in Store(tmp_path / "store").series
        if info.split == "train"
    }


def _copy(study, tmp_path):
    """The same series under other names, as low dose."""
    for path in study.rglob("*.dcm"):
        dataset = pydicom.dcmread(path)
        dataset.SeriesInstanceUID += ".77"
        (tmp_path / "low").mkdir(exist_ok=True)
        dataset.save_as(tmp_path / "low" / f"{path.parent.name}_{path.name}")
    return tmp_path / "low"


@pytest.mark.parametrize(
    ("content", "mode", "said"),
    [
        (b"k" * 31, 0o600, r"a key has 32 to 4096 bytes. To fix: head -c 32 /dev/urandom > "),
        (b"", 0o600, r"a key has 32 to 4096 bytes"),
        (b"k" * 4097, 0o600, r"a key has 32 to 4096 bytes"),
        (b"k" * 32, 0o640, r"others may read or change. To fix: chmod 600 "),
        (b"k" * 32, 0o602, r"others may read or change"),
        (None, 0o600, r"there is no such key file. To fix: head -c 32"),
    ],
)
def test_keys_that_are_none(tmp_path, study, content, mode, said):
    path = tmp_path / "secret" if content is None else make_key(tmp_path / "secret", content, mode)
    with pytest.raises(InputError, match=rf"secret: .*{said}"):
        prepare([study], tmp_path / "store", pseudonymise=path)
    with pytest.raises(InputError, match=rf"secret: .*{said}"):
        export(tmp_path / "nowhere", tmp_path / "out", pseudonymise=path)
    assert not (tmp_path / "store").exists()


def test_a_pipe_is_no_key(tmp_path):
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(InputError, match="there is no such key file"):
        Pseudonyms.read(tmp_path / "pipe")
