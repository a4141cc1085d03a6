"""The account of a command's files adds up, and what of CT isn't in the output is named and makes the exit status 2."""

import gzip
import os
import re
import shutil
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from pydicom.uid import MRImageStorage

from lidnet_fast.cli import main
from lidnet_fast.data.formats.account import Account, Rejected
from lidnet_fast.data.prepare.plan import prepare
from lidnet_fast.data.store.reader import Store
from lidnet_fast.errors import InputError
from lidnet_fast.evaluation.denoised import match
from tests.inference.conftest import make_run, run

__all__ = ["make_run", "run"]

GOOD = 3


class Zoo:
    """Writes what people keep beside CT; every animal returns the folder's skipped and rejected files per command."""

    def __init__(self, folder, write_series, make_hu):
        self.folder, self.write_series, self.make_hu = folder, write_series, make_hu

    def series(self, depth=4, uid="1.2.1", **options):
        return self.write_series(self.folder / "a", self.make_hu(depth), series_uid=uid, **options)

    def copies(self):
        files = self.series()
        shutil.copy(files[0], self.folder / "again.dcm")
        return {"prepare": (1, 0), "denoise": (1, 0)}

    def truncated(self):
        files = self.series()
        files[1].write_bytes(files[1].read_bytes()[:-999])
        return {"prepare": (0, 4), "denoise": (0, 4)}

    def truncated_and_copied(self):
        files = self.series()
        shutil.copy(files[0], self.folder / "again.dcm")
        files[1].write_bytes(files[1].read_bytes()[:-999])
        return {"prepare": (1, 4), "denoise": (1, 4)}

    def no_header(self):
        (self.folder / "empty.dcm").write_bytes(b"")
        return {"prepare": (0, 1), "denoise": (0, 1)}

    def a_slice_is_missing(self):
        self.series(6)[2].unlink()
        return {"prepare": (0, 5), "denoise": (0, 0)}

    def one_identifier_for_all(self):
        def same(z, image):
            image.SOPInstanceUID = image.file_meta.MediaStorageSOPInstanceUID = "1.2.3.4"

        self.series(edit=same)
        return {"prepare": (0, 0), "denoise": (0, 4)}

    def two_patients_in_one_series(self):
        self.series()
        self.write_series(self.folder / "b", self.make_hu(2, seed=1), series_uid="1.2.1", patient_id="bert")
        return {"prepare": (0, 6), "denoise": (0, 6)}

    def other_than_ct(self):
        def localiser(z, image):
            image.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]

        def mr(z, image):
            image.file_meta.MediaStorageSOPClassUID = image.SOPClassUID = MRImageStorage

        self.series(2, edit=localiser)
        self.series(3, "1.2.2", edit=mr)
        (self.folder / "notes.txt").write_text("a note")
        return {"prepare": (6, 0), "denoise": (6, 0)}

    def reformats(self):
        def derived(z, image):
            image.ImageType = ["DERIVED", "SECONDARY", "AXIAL", "MPR"]

        self.series(orientation=(1, 0, 0, 0, 0, -1), edit=derived)
        return {"prepare": (4, 0), "denoise": (4, 0)}

    def links_and_a_pipe(self):
        outside = self.folder.parent / "outside.dcm"
        outside.write_bytes(b"")
        (self.folder / "out").symlink_to(outside)
        (self.folder / "nothing").symlink_to("nowhere")
        (self.folder / "inside").symlink_to("good")
        os.mkfifo(self.folder / "pipe")
        return {"prepare": (3, 0), "denoise": (3, 0)}

    def archives(self):
        (file,) = self.series(1)
        (self.folder / "a.dcm.gz").write_bytes(gzip.compress(file.read_bytes()))
        with zipfile.ZipFile(self.folder / "a.zip", "w") as archive:
            archive.write(file)
        file.unlink()
        return {"prepare": (1, 1), "denoise": (1, 1)}

    def volumes(self):
        hu = self.make_hu(3)
        for name in ("ct.mhd", "other.nii.gz", "cut.nrrd"):
            sitk.WriteImage(sitk.GetImageFromArray(hu), str(self.folder / name))
        sitk.WriteImage(sitk.GetImageFromArray(np.ones(hu.shape, np.uint8)), str(self.folder / "mask.nii"))
        (self.folder / "cut.nrrd").write_bytes((self.folder / "cut.nrrd").read_bytes()[:-999])
        (self.folder / "other.raw").write_bytes(b"")
        return {"prepare": (2, 1), "denoise": (2, 1)}


ANIMALS = [name for name in vars(Zoo) if name not in ("__init__", "series") and not name.startswith("__")]


def files_in(folder):
    """What a person would count: all but folders, and links to what is counted anyway."""
    paths = [Path(at, name) for at, _, names in os.walk(folder) for name in names]
    inside = {path.resolve() for path in paths if not path.is_symlink()}
    return sum(not path.is_symlink() or (path.resolve() not in inside and not path.is_dir()) for path in paths)


@pytest.mark.parametrize("command", ["prepare", "denoise"])
@pytest.mark.parametrize("animal", ANIMALS)
def test_every_file_is_accounted_for(tmp_path, write_series, make_hu, run, capsys, animal, command):
    folder, out = tmp_path / "in", tmp_path / "out"
    write_series(folder / "good", make_hu(GOOD, seed=9), series_uid="1.2.9")
    skipped, rejected = getattr(Zoo(folder, write_series, make_hu), animal)()[command]
    options = {
        "prepare": ["prepare", folder, "--out", out, "--val-fraction", 0, "--test-fraction", 0, "--workers", 1],
        "denoise": ["denoise", folder, out, "--model", run, "--device", "cpu"],
    }[command]
    found = files_in(folder)
    status = 0
    try:
        main([str(option) for option in options])
    except SystemExit as stop:
        status = stop.code
    said = capsys.readouterr()
    used = found - skipped - rejected
    assert f"  files: {found} found = {used} used + {skipped} skipped + {rejected} rejected\n" in said.out, said
    assert used >= GOOD
    assert status == (2 if rejected else 0)
    assert bool(said.err) == bool(rejected)
    reasons = re.search("  skipped: (.*)", said.out)
    assert sum(map(int, re.findall(r"(\d+) files ", reasons[1] if reasons else ""))) == skipped
    if command == "denoise":
        results = [path for path in out.rglob("*") if path.is_file() and path.name != "denoise.json"]
        assert len(results) == used


@pytest.mark.parametrize("description", [False, True])
def test_low_dose_without_a_partner_is_named(tmp_path, write_series, make_hu, description):
    """One normal dose has none, one low dose has none, and one pair is ambiguous: nobody is lost."""

    def low(z, image):
        image.SeriesDescription = "low"

    normal, low_dose = (tmp_path / "ct" / "normal", tmp_path / ("ct/low" if description else "low"))
    for number, patient in enumerate(("anna", "bert", "carla")):
        write_series(normal, make_hu(2, seed=number), series_uid=f"1.2.{number}", patient_id=patient)
    for number, patient in enumerate(("anna", "carla", "carla", "dora")):
        write_series(low_dose, make_hu(2, seed=number + 9), series_uid=f"1.3.{number}", patient_id=patient, edit=low)
    options = {"low_dose_description": "low"} if description else {"low_dose": low_dose}
    sources = [tmp_path / "ct"] if description else [normal]
    summary = prepare(sources, tmp_path / "store", val_fraction=0, test_fraction=0, workers=1, **options)
    assert [fault.series_uid for fault in summary.rejected] == ["1.2.1", "1.2.2", "1.3.1", "1.3.2", "1.3.3"]
    assert summary.lines()[4] == "  files: 14 found = 4 used + 0 skipped + 10 rejected"
    with pytest.raises(InputError, match="low_dose: no series there has the patient"):
        prepare(sources, tmp_path / "strict", strict=True, workers=1, **options)


def test_images_to_evaluate(tmp_path, write_series, make_hu, capsys):
    for number in range(2):
        write_series(tmp_path / "ct", make_hu(2, seed=number), series_uid=f"1.2.{number}", patient_id=str(number))
    prepare([tmp_path / "ct"], tmp_path / "store", val_fraction=0, test_fraction=0, workers=1)
    (tmp_path / "ct" / "notes.txt").write_text("a note")
    match(tmp_path / "ct", Store(tmp_path / "store"), [1])
    said = capsys.readouterr().out
    assert f"{tmp_path / 'ct'}:\n  files: 5 found = 2 used + 3 skipped + 0 rejected\n" in said
    assert "skipped: 1 files not DICOM, 2 files of series that aren't evaluated" in said


def test_an_account_that_does_not_add_up_is_a_fault():
    one, other, used_one, used_other = map(Path, "abcd")
    account = Account(found=5, skipped=Counter({"not CT": 1}), rejected=[Rejected("1.2", one, "why", [one, other])])
    for used in ([], [used_one], [used_one, used_other, Path("e")]):
        with pytest.raises(AssertionError, match="the account doesn't add up: 5 found"):
            account.close(used)
    account.close([used_one, used_one, used_other])
    assert account.lines()[0] == "  files: 5 found = 2 used + 1 skipped + 2 rejected"
    with pytest.raises(InputError, match="why"):
        Account(strict=True).take(account)
