"""Headers that ITK's readers crash on, loop on or follow to several files."""

import re
import struct

import numpy as np
import pytest

from lidnet_fast.data.formats.itk.files import read_header, read_voxels
from lidnet_fast.errors import InputError

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
