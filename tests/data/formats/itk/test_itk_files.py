"""Headers that ITK's readers crash on, loop on or follow to several files."""

import gzip
import os
import re
import struct

import numpy as np
import pytest

from lidnet_fast.data.formats.itk.files import read_header, read_voxels
from lidnet_fast.data.formats.sources import find_series
from lidnet_fast.errors import InputError
from lidnet_fast.evaluation.denoised import denoised_series
from lidnet_fast.inference.sources import find

sitk = pytest.importorskip("SimpleITK")


def write(path):
    sitk.WriteImage(sitk.GetImageFromArray(np.arange(240, dtype=np.int16).reshape(3, 8, 10)), str(path))


def change(path, pattern, replacement, count=1):
    content = re.sub(pattern, replacement, path.read_bytes(), count=count)
    assert content != path.read_bytes()
    path.write_bytes(content)


def read(path):
    read_header(path).check_is_volume()
    return read_voxels(path)


NINES = b"9" * 1100
BAD = {
    "hundred dimensions": ("a.mha", rb"NDims = 3", b"NDims = 100", "says NDims = '100'"),
    "negative dimensions": ("a.mhd", rb"NDims = 3", b"NDims:-1e30", "says NDims = '-1e30'"),
    "dimensions in a name": ("a.mhd", rb"NDims = 3", b" NDims\0x\n= 1000", "says NDims = '1000'"),
    "dimensions twice": ("a.mhd", rb"(?s)$", b"\nNDims = 1e9", "says NDims = '1e9'"),
    "not a format of sprintf": ("a.mhd", rb"= a\.raw", b"= %s%s%n.raw 1 3", "its voxels lie in several files"),
    "list": ("a.mhd", rb"= a\.raw", b"= LIST\na.raw", "its voxels lie in several files"),
    "list of NRRD": ("a.nhdr", rb"file: a\.raw", b"file: LIST\na.raw", "its voxels lie in several files"),
    "pattern of NRRD": ("a.nhdr", rb"file: a\.raw", b"file: %99999d 1 3 1", "its voxels lie in several files"),
    "long field": ("a.nrrd", rb"type: short", b"type: " + NINES, "too long a line is in its header: 'type: 9999"),
    "long unknown line": ("a.nrrd", rb"kinds:", NINES + b"\nkinds:", "too long a line is in its header"),
    "key after a field": ("a.nhdr", rb"type: short", b"type: :=" + NINES, "too long a line is in its header"),
    "large directions": ("a.mhd", rb"Matrix = 1 0", b"Matrix = 1 -1e308", "its directions aren't of length 1"),
    "name of another format": ("a.mhd", rb"(?s).*", b"NRRD0004\ntype: short\n", "can't be read"),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
def test_bad_headers(tmp_path, bad):
    name, pattern, replacement, message = BAD[bad]
    path = tmp_path / name
    write(path)
    change(path, pattern, replacement)
    with pytest.raises(InputError, match=re.escape(message)) as error:
        read(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("offset", [float("nan"), float("inf"), 1e30])
def test_an_offset_that_cannot_be(tmp_path, offset):
    path = tmp_path / "a.nii"
    write(path)
    content = bytearray(path.read_bytes())
    struct.pack_into("<f", content, 108, offset)
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"a\.nii: can't be read"):
        read(path)


def test_a_path_too_long_for_messages(tmp_path):
    """Teem writes a path into the message about the line that it can't read."""
    folder = tmp_path.joinpath(*["d" * 200] * 5)
    folder.mkdir(parents=True)
    write(folder / "a.nii")
    read(folder / "a.nii")
    (folder / "a.nrrd").write_bytes(b"NRRD0004\nfoo\n\n")
    with pytest.raises(InputError, match="with its path, too long a line is in its header: "):
        read(folder / "a.nrrd")


GOOD = {
    "long comment": ("a.nrrd", rb"type: short", b"# " + NINES + b"\ntype: short"),
    "long key and value": ("a.nrrd", rb"type: short", b"key:=" + NINES + b": x\ntype: short"),
    "lines of Windows": ("a.nhdr", rb"\n", b"\r\n"),
    "no spaces": ("a.mha", rb"NDims = 3", b"NDims=3"),
    "comment": ("a.mha", rb"NDims = 3", b"Comment = NDims of 100\nNDims = 3"),
}


@pytest.mark.parametrize("good", GOOD)
def test_unusual_headers(tmp_path, good):
    name, pattern, replacement = GOOD[good]
    path = tmp_path / name
    write(path)
    change(path, pattern, replacement, count=0)
    assert read(path).ravel().tolist() == list(range(240))


def test_a_long_name_with_spaces(tmp_path):
    """ITK crashes on the words of a pattern that are this long, not on those of a name."""
    path = tmp_path / "a.mhd"
    write(path)
    name = "full dose " + "x" * 100 + ".raw"
    (tmp_path / "a.raw").rename(tmp_path / name)
    change(path, rb"a\.raw", name.encode())
    assert read(path).ravel().tolist() == list(range(240))


NAMED_IN = {".mhd": (rb"ElementDataFile = .*", "ElementDataFile = {}"), ".nhdr": (rb"data file: .*", "data file: {}")}
ELSEWHERE = [
    "../../secret.bin",
    "{}/secret.bin",
    "/dev/zero",
    "folder/secret.bin",
    "..",
    "link.raw",
    "pipe.raw",
    "./../a.raw",
]
READERS = {
    "prepare": lambda path: find_series([path], "", strict=True, resample=False),
    "denoise": lambda path: reject(find(path, path.parent / "out")),
    "evaluate": lambda path: denoised_series(path.parent),
}


def reject(found):
    (fault,) = found.rejected
    raise InputError(fault.reason)


@pytest.mark.parametrize("suffix", NAMED_IN)
@pytest.mark.parametrize("name", ELSEWHERE)
def test_voxels_that_are_not_in_the_headers_folder(tmp_path, suffix, name):
    """Of the right size, their bytes would come out in the result; a pipe would be waited for."""
    path = tmp_path / "in" / "deep" / f"a{suffix}"
    (path.parent / "folder").mkdir(parents=True)
    write(path)
    for secret in (tmp_path / "secret.bin", path.parent / "folder" / "secret.bin"):
        secret.write_bytes((path.parent / "a.raw").read_bytes())
    (path.parent / "link.raw").symlink_to(tmp_path / "secret.bin")
    os.mkfifo(path.parent / "pipe.raw")
    pattern, replacement = NAMED_IN[suffix]
    change(path, pattern, replacement.format(name.format(tmp_path)).encode())
    for reader in READERS.values():
        with pytest.raises(
            InputError, match=rf"a\{suffix}: says that its voxels are in '.*'\. To fix: let it give the"
        ):
            reader(path)


@pytest.mark.parametrize("suffix", NAMED_IN)
def test_every_file_that_a_header_names_is_looked_at(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    write(path)
    pattern, replacement = NAMED_IN[suffix]
    for first, second in (("a.raw", "/dev/zero"), ("/dev/zero", "a.raw")):
        write(path)
        change(path, pattern, "\n".join(replacement.format(name) for name in (first, second)).encode())
        with pytest.raises(InputError, match="says that its voxels are in '/dev/zero'"):
            read_header(path)
    write(path)
    change(path, pattern, b"#" * (1 << 20) + replacement.format("/dev/zero").encode())
    with pytest.raises(InputError, match=r"says that its voxels|longer than|doesn't say where|too long a line"):
        read_header(path)


@pytest.mark.parametrize("suffix", NAMED_IN)
@pytest.mark.parametrize(
    ("added", "message"), [(-2, "can't be read .truncated"), (2, "its voxels take 480 bytes, and a.raw has 482")]
)
def test_a_file_of_voxels_is_of_the_headers_size(tmp_path, suffix, added, message):
    path = tmp_path / f"a{suffix}"
    write(path)
    content = (tmp_path / "a.raw").read_bytes()
    (tmp_path / "a.raw").write_bytes((content + b"xx")[: len(content) + added])
    with pytest.raises(InputError, match=message):
        read_header(path)


@pytest.mark.parametrize("kind", ["skipped", "compressed", "text", "link in the folder", "dot"])
def test_files_of_voxels_that_are_read(tmp_path, kind):
    path = tmp_path / "a.nhdr"
    write(path)
    voxels = tmp_path / "a.raw"
    content = voxels.read_bytes()
    if kind == "skipped":
        voxels.write_bytes(b"x" * 100 + content)
        change(path, rb"encoding:", b"byte skip: 100\nencoding:")
    elif kind == "compressed":
        voxels.write_bytes(gzip.compress(content))
        change(path, rb"encoding: raw", b"encoding: gzip")
    elif kind == "text":
        voxels.write_text(" ".join(map(str, range(240))))
        change(path, rb"encoding: raw", b"encoding: ascii")
    elif kind == "link in the folder":
        voxels.rename(tmp_path / "b.raw")
        voxels.symlink_to("b.raw")
    else:
        change(path, rb"file: a\.raw", b"file: ./a.raw")
    assert read(path).ravel().tolist() == list(range(240))
    assert read_header(path).files == (path, voxels)
