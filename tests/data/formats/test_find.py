"""The gate for input files: regular files inside the given folders pass, and what doesn't is counted."""

import os
import shutil
import socket

import pytest

from lidnet_fast.data.annotations.lidc_idri import read_boxes
from lidnet_fast.data.formats.dicom.series import scan
from lidnet_fast.data.formats.find import files_below
from lidnet_fast.data.formats.sources import find_series
from lidnet_fast.errors import InputError
from lidnet_fast.evaluation.denoised import denoised_series
from lidnet_fast.inference.sources import find

OUTSIDE = "that are links to outside of the folder"


def names(found, root):
    return [path.relative_to(root).as_posix() for path in found.paths]


def test_each_file_once_in_a_stable_order(tmp_path):
    for name in ("b/2", "b/1", "a/3", "c"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "a" / "again").symlink_to(tmp_path / "c")
    (tmp_path / "a" / "round").symlink_to(tmp_path, target_is_directory=True)
    found = files_below([tmp_path, tmp_path / "b", tmp_path / "c"])
    assert names(found, tmp_path) == ["c", "a/3", "b/1", "b/2"]
    assert found.skipped == {}
    (tmp_path / "a" / "to_b").symlink_to(tmp_path / "b" / "1")
    assert names(files_below([tmp_path], without=tmp_path / "b"), tmp_path) == ["c", "a/3"]


def test_links_are_followed_inside_the_given_folders_only(tmp_path):
    inside, outside = tmp_path / "in", tmp_path / "in_other"
    for folder in (inside / "deep", outside):
        folder.mkdir(parents=True)
        (folder / "file").write_text("x")
    (inside / "near").symlink_to("deep/file")
    (inside / "far").symlink_to(outside / "file")
    (inside / "far_folder").symlink_to(outside, target_is_directory=True)
    (inside / "nowhere").symlink_to(inside / "gone")
    (inside / "loop").symlink_to(inside / "loop")
    found = files_below([inside])
    assert names(found, inside) == ["near"]  # and its target is the same file
    assert found.skipped == {OUTSIDE: 2, "that are links to nothing": 2}
    assert len(files_below([inside, outside]).paths) == 2
    (tmp_path / "link").symlink_to(inside, target_is_directory=True)
    assert names(files_below([tmp_path / "link"]), tmp_path / "link") == ["near"]
    assert files_below([inside / "far"]).paths == [inside / "far"]


def test_links_are_followed_further_on_request(tmp_path, write_series, make_hu):
    inside, outside = tmp_path / "in", tmp_path / "out"
    write_series(outside, make_hu(3))
    inside.mkdir()
    (inside / "link").symlink_to(outside, target_is_directory=True)
    (inside / "again").symlink_to(next(outside.iterdir()))
    (inside / "round").symlink_to(inside, target_is_directory=True)
    (inside / "nowhere").symlink_to(inside / "gone")
    found = files_below([inside], follow_links=True)
    assert len(found.paths) == 3
    assert found.skipped == {"that are links to nothing": 1}
    for series in (
        find_series([inside], "", strict=True, resample=False, follow_links=True).series,
        find(inside, tmp_path / "results", follow_links=True).series,
    ):
        assert [len(one.files) for one in series] == [3]


def test_what_is_no_regular_file_is_never_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.dcm")
    with socket.socket(socket.AF_UNIX) as server:
        here = os.open(".", os.O_RDONLY)
        os.chdir(tmp_path)  # names of sockets are short
        server.bind("socket.dcm")
        os.chdir(here)
        os.close(here)
    (tmp_path / "device.dcm").symlink_to("/dev/zero")
    (tmp_path / "file").write_text("x")
    found = files_below([tmp_path])
    assert names(found, tmp_path) == ["file"]
    assert found.skipped == {"that aren't regular files": 2, OUTSIDE: 1}
    assert files_below([tmp_path / "pipe.dcm"]).skipped == {"that aren't regular files": 1}


def test_files_of_holes_are_not_read(tmp_path):
    (tmp_path / "holes").write_bytes(b"begin")
    os.truncate(tmp_path / "holes", 1 << 40)
    (tmp_path / "some_holes").write_bytes(bytes(8 << 20))
    os.truncate(tmp_path / "some_holes", 128 << 20)
    found = files_below([tmp_path])
    assert names(found, tmp_path) == ["some_holes"]
    assert found.skipped == {"that are mostly holes": 1}


def test_a_source_that_does_not_exist(tmp_path):
    with pytest.raises(InputError, match=r"gone: there is no such file or folder"):
        files_below([tmp_path / "gone"])


READERS = {
    "scan": lambda folder: scan([folder]),
    "prepare": lambda folder: find_series([folder], "", strict=True, resample=False),
    "denoise": lambda folder: find(folder, folder / "out"),
}


@pytest.mark.parametrize("name", READERS)
def test_every_reader_of_ct_passes_the_gate(tmp_path, write_series, make_hu, name):
    write_series(tmp_path / "theirs", make_hu(3), series_uid="1.2.3.4")
    write_series(tmp_path / "mine", make_hu(3))
    (tmp_path / "mine" / "link").symlink_to(tmp_path / "theirs", target_is_directory=True)
    os.mkfifo(tmp_path / "mine" / "pipe")
    found = READERS[name](tmp_path / "mine")
    assert len(found.series) == 1
    assert found.skipped == {OUTSIDE: 1, "that aren't regular files": 1}
    shutil.rmtree(tmp_path / "mine")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "link").symlink_to(tmp_path / "theirs", target_is_directory=True)
    with pytest.raises(InputError, match=rf"mine: no CT found \(1 files {OUTSIDE}\)"):
        READERS[name](tmp_path / "mine")


ARCHIVES = {"study.zip": b"PK\x03\x04", "a.tgz": b"\x1f\x8b\x08", "b.tar": bytes(512), "c": b"7z\xbc\xaf\x27\x1c"}


@pytest.mark.parametrize("name", READERS)
def test_archives_are_named_as_such(tmp_path, write_series, make_hu, name):
    folder = tmp_path / "mine"
    folder.mkdir()
    for file, start in ARCHIVES.items():
        (folder / file).write_bytes(start + bytes(600))
    message = r"no CT found \(1 files packed \(7z\), to be unpacked first, 1 files packed \(gzip\), .*\(tar\).*\(zip\)"
    with pytest.raises(InputError, match=message):
        READERS[name](folder)
    write_series(folder, make_hu(3))
    assert sum(READERS[name](folder).skipped.values()) == len(ARCHIVES)


@pytest.mark.parametrize("file", ["1.2.3.dcm.gz", "a.DCM.zip", "ct.nii.bz2", "packed.dcm"])
def test_an_image_that_is_packed_by_itself_is_named(tmp_path, write_series, make_hu, file):
    """It is CT that a person would miss in the output."""
    write_series(tmp_path, make_hu(3))
    (tmp_path / file).write_bytes((b"BZh" if file.endswith("bz2") else b"\x1f\x8b") + bytes(300))
    message = f"{tmp_path / file}: is packed ({'bzip2' if file.endswith('bz2') else 'gzip'}). To fix: unpack it"
    for found in (find_series([tmp_path], "", strict=False, resample=False), find(tmp_path, tmp_path / "out")):
        assert [fault.reason for fault in found.rejected] == [message]
        assert len(found.series) == 1


def test_annotations_and_denoised_images_pass_the_gate(tmp_path):
    (tmp_path / "theirs.xml").write_text("<LidcReadMessage/>")
    (tmp_path / "theirs.nii").write_bytes(b"")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.xml").symlink_to(tmp_path / "theirs.xml")
    (tmp_path / "mine" / "a.nii").symlink_to(tmp_path / "theirs.nii")
    with pytest.raises(InputError, match="holds no XML file"):
        read_boxes(tmp_path / "mine", [], 2)
    with pytest.raises(InputError, match="no CT found"):
        denoised_series(tmp_path / "mine")
