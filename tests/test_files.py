"""Written files: whole or absent, new under an unguessable name, with the permissions of the umask."""

import os
import stat
import tempfile
from pathlib import Path

import pytest

from lidnet_fast.errors import InputError
from lidnet_fast.files import as_private_as, make_folder, own_folder, remove_temporary, whole, whole_path, write_text

WAYS = {
    "stream": lambda path, content: _stream(path, content),
    "by name": lambda path, content: _by_name(path, content),
}


def _stream(path: Path, content: bytes) -> None:
    with whole(path) as file:
        file.write(content)


def _by_name(path: Path, content: bytes) -> None:
    with whole_path(path) as unfinished:
        unfinished.write_bytes(content)


@pytest.mark.parametrize("write", WAYS.values(), ids=WAYS)
def test_a_file_is_replaced_whole(tmp_path, write):
    path = tmp_path / "new" / "a.bin"
    write(path, b"1")
    write(path, b"22")
    assert path.read_bytes() == b"22"
    assert [entry.name for entry in path.parent.iterdir()] == ["a.bin"]


@pytest.mark.parametrize("way", [whole, whole_path])
def test_an_interrupted_write_changes_nothing(tmp_path, way):
    path = tmp_path / "a.bin"
    path.write_bytes(b"before")
    with pytest.raises(KeyboardInterrupt), way(path) as made:
        made.write(b"half") if way is whole else made.write_bytes(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"before"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.bin"]


@pytest.mark.parametrize("write", WAYS.values(), ids=WAYS)
def test_a_link_is_replaced_and_not_followed(tmp_path, write):
    victim, path = tmp_path / "victim", tmp_path / "a.bin"
    victim.write_bytes(b"theirs")
    path.symlink_to(victim)
    write(path, b"ours")
    assert (victim.read_bytes(), path.read_bytes(), path.is_symlink()) == (b"theirs", b"ours", False)


@pytest.mark.parametrize("way", [whole, whole_path])
def test_what_lies_under_the_temporary_name_is_never_written_to(tmp_path, way, monkeypatch):
    victim, path = tmp_path / "victim", tmp_path / "a.bin"
    victim.write_bytes(b"theirs")
    monkeypatch.setattr("lidnet_fast.files.secrets.token_hex", lambda count: "0" * 2 * count)
    (tmp_path / ".0000000000000000.part").symlink_to(victim)
    with pytest.raises(OSError, match=r"File exists: .*a\.bin"), way(path):
        pass
    assert victim.read_bytes() == b"theirs"
    assert not path.exists()


@pytest.mark.parametrize("write", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o007, 0o660)])
def test_permissions_are_those_of_the_umask(tmp_path, write, umask, mode):
    before = os.umask(umask)
    try:
        write(tmp_path / "folder" / "a.bin", b"1")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "folder" / "a.bin").stat().st_mode) == mode
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o777 & ~umask


@pytest.mark.parametrize(
    ("folder", "file", "umask", "expected"),
    [
        (0o755, 0o644, 0o022, 0o644),
        (0o755, 0o600, 0o022, 0o600),
        (0o700, 0o644, 0o022, 0o600),
        (0o750, 0o644, 0o002, 0o660),
        (0o755, 0o640, 0o022, 0o640),
        (0o755, 0o644, 0o077, 0o600),
    ],
)
def test_results_are_no_more_readable_than_their_sources(folder, file, umask, expected):
    usual = os.umask(umask)
    try:
        with tempfile.TemporaryDirectory() as top:  # its parents let everybody pass, where pytest's don't
            source, link = Path(top, "in", "deep", "ct"), Path(top, "link")
            write_text(source, "ct")
            link.symlink_to(source)
            Path(top).chmod(0o755)
            source.parent.chmod(0o755)
            source.parent.parent.chmod(folder)
            source.chmod(file)
            for way in (source, link):
                with as_private_as([Path(top), way, Path(top, "nowhere")]):
                    write_text(Path(top, "out", "a"), "1")
                assert stat.S_IMODE(Path(top, "out", "a").stat().st_mode) == expected
                assert stat.S_IMODE(Path(top, "out").stat().st_mode) == expected | (expected & 0o444) >> 2
            with pytest.raises(KeyboardInterrupt), as_private_as([source]):
                raise KeyboardInterrupt
            assert os.umask(umask) == umask
    finally:
        os.umask(usual)


def test_two_writers_of_one_file_do_not_disturb_each_other(tmp_path):
    path = tmp_path / "a.txt"
    with whole(path) as one:
        one.write(b"one")
        write_text(path, "other")
        assert path.read_text() == "other"
    assert path.read_text() == "one"


def test_companions_come_before_the_file_itself(tmp_path, monkeypatch):
    moved = []
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda self, target: (moved.append(target.name), replace(self, target))[1])
    with whole_path(tmp_path / "a.mhd") as header:
        header.write_text("header")
        header.with_suffix(".raw").write_text("voxels")
        header.with_suffix(".zzz").write_text("more")
    assert moved[-1] == "a.mhd"
    assert set(moved) == {"a.mhd", "a.raw", "a.zzz"}


def test_a_folder_appears_whole(tmp_path):
    with whole_path(tmp_path / "out") as folder:
        write_text(folder / "sub" / "a.txt", "1")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "sub" / "a.txt").read_text() == "1"
    with pytest.raises(OSError, match="not empty"), whole_path(tmp_path / "out") as folder:
        write_text(folder / "b.txt", "2")
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_what_killed_processes_left_is_removed(tmp_path):
    (tmp_path / "sub" / ".0123456789abcdef.part").mkdir(parents=True)
    (tmp_path / "sub" / ".0123456789abcdef.part" / "a").write_text("half")
    (tmp_path / ".fedcba9876543210.part").write_text("half")
    for mine in (".mine.part", "0123456789abcdef.part", ".hidden"):
        (tmp_path / mine).write_text("mine")
    remove_temporary(tmp_path)
    assert {entry.name for entry in tmp_path.rglob("*")} == {"sub", ".mine.part", "0123456789abcdef.part", ".hidden"}


@pytest.mark.parametrize("theirs", ["link", "dangling link", "file"])
def test_work_begins_in_no_folder_of_somebody_elses(tmp_path, theirs):
    (tmp_path / "theirs").mkdir()
    work = tmp_path / "new" / ".work"
    assert own_folder(work, 0o700).stat().st_mode & 0o777 == 0o700
    assert own_folder(work) == work
    work.rmdir()
    if theirs == "file":
        work.write_text("theirs")
    else:
        work.symlink_to(tmp_path / ("theirs" if theirs == "link" else "nowhere"), target_is_directory=True)
    with pytest.raises(InputError, match=r"\.work: .* it's a link, a file or another user's\. To fix:"):
        own_folder(work)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give a folder away")
def test_work_begins_in_no_folder_of_another_user(tmp_path):
    (tmp_path / "work").mkdir()
    os.chown(tmp_path / "work", 4711, -1)
    with pytest.raises(InputError, match="another user's"):
        own_folder(tmp_path / "work")


def test_a_file_where_a_folder_is_needed(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(InputError, match=r"out: is a file, and a folder is needed\. To fix:"):
        make_folder(tmp_path / "out")
    with pytest.raises(InputError, match="To fix:"):
        write_text(tmp_path / "out" / "a.txt", "1")
    assert (tmp_path / "out").read_text() == "mine"
