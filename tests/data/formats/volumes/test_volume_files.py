"""Headers that ITK's readers crash on, loop on or follow to several files."""

import gzip
import os
import re
import struct
import zlib

import nibabel
import numpy as np
import pytest

from lidnet_fast.cli import main
from lidnet_fast.data.formats.sources import find_series
from lidnet_fast.data.formats.volumes.files import read_header, read_voxels
from lidnet_fast.errors import InputError
from lidnet_fast.evaluation.denoised import denoised_series
from lidnet_fast.inference.sources import find
from tests.fuzz.hostile import limits

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


def pack_zeros(path, depth):
    """A volume of zeros, 512 KiB a slice, packed to a thousandth: its header can be read at once."""
    if path.suffix == ".gz":
        header = nibabel.Nifti1Header()
        header.set_data_shape((512, 512, depth))
        header.set_data_dtype(np.int16)
        header.set_data_offset(352)
        head = header.binaryblock + b"\0" * 4
    elif path.suffix == ".nrrd":
        head = (
            f"NRRD0004\ntype: short\ndimension: 3\nsizes: 512 512 {depth}\nendian: little\nencoding: gzip\n\n".encode()
        )
    else:
        head = (
            f"NDims = 3\nCompressedData = True\nDimSize = 512 512 {depth}\nElementType = MET_SHORT\nElementDataFile = "
        )
        head = (head + ("LOCAL\n" if path.suffix == ".mha" else "a.zraw\n")).encode()
    zeros = bytes(512 * 512 * 2 * min(depth, 8))  # of more, only the header speaks
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(head + zeros))
    elif path.suffix == ".nrrd":
        path.write_bytes(head + gzip.compress(zeros))
    elif path.suffix == ".mha":
        path.write_bytes(head + zlib.compress(zeros))
    else:
        path.write_bytes(head)
        path.with_suffix(".zraw").write_bytes(zlib.compress(zeros))


PACKED = ["a.nii.gz", "a.nrrd", "a.mha", "a.mhd"]


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("command", READERS)
def test_a_volume_that_unpacks_to_far_more_than_its_size(tmp_path, name, command):
    """Of what the header says, nothing is unpacked before."""
    pack_zeros(tmp_path / name, 1500)
    message = rf"{name}: would unpack from 0\.0 to 750\.0 MiB\. To fix: .* --max-volume-gib 1 allows it"
    with limits(), pytest.raises(InputError, match=message):
        READERS[command](tmp_path / name)


@pytest.mark.parametrize("name", PACKED)
def test_limits_of_unpacked_sizes(tmp_path, name):
    path = tmp_path / name
    pack_zeros(path, 8)
    read_header(path).check_unpacked()
    assert not read_voxels(path).any()
    pack_zeros(path, 1500)
    read_header(path).check_unpacked(0.74)
    with pytest.raises(InputError, match="would unpack"):
        read_header(path).check_unpacked(0.73)
    data = path.with_suffix(".zraw") if name == "a.mhd" else path
    with data.open("ab") as file:
        file.truncate(8 << 20)  # a ratio of 94
    read_header(path).check_unpacked()


def test_nothing_unpacks_to_more_than_the_largest_size(tmp_path):
    pack_zeros(tmp_path / "a.nrrd", 17000)
    with (tmp_path / "a.nrrd").open("ab") as file:
        file.truncate(1 << 30)
    with pytest.raises(InputError, match=r"would unpack from 1024\.0 to 8500\.0 MiB.*--max-volume-gib 9 allows it"):
        read_header(tmp_path / "a.nrrd").check_unpacked()
    read_header(tmp_path / "a.nrrd").check_unpacked(9)


def test_masks_that_pack_well_are_no_bombs(tmp_path):
    """They are skipped for what they are, before their size is looked at."""
    header = nibabel.Nifti1Header()
    header.set_data_shape((512, 512, 1500))
    header.set_data_dtype(np.uint8)
    (tmp_path / "mask.nii.gz").write_bytes(gzip.compress(header.binaryblock))
    write(tmp_path / "a.nii")
    found = find(tmp_path, tmp_path / "out")
    assert (found.rejected, sum(found.skipped.values())) == ([], 1)


def test_limits_of_commands(tmp_path, capsys):
    pack_zeros(tmp_path / "a.nii.gz", 130)
    arguments = ["prepare", str(tmp_path / "a.nii.gz"), "--out", str(tmp_path / "store"), "--workers", "1"]
    for option, message in (([], "would unpack from 0.0 to 65.0 MiB"), (["--max-volume-gib", "0.07"], "can't be read")):
        with pytest.raises(SystemExit) as stop:
            main([*arguments, *option])
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


@pytest.mark.parametrize("name", ["a.mha", "a.mhd", "a.nrrd", "a.nhdr", "a.nii.gz"])
@pytest.mark.parametrize("damage", ["flipped", "overwritten", "cut", "checksum"])
def test_damaged_voxels_are_never_invented(tmp_path, name, damage):
    """ITK left memory as it was behind the damage of compressed voxels, and said nothing."""
    values = np.random.default_rng(0).integers(-1000, 1000, (8, 32, 32), np.int16)
    sitk.WriteImage(sitk.GetImageFromArray(values), str(tmp_path / name), True)
    np.testing.assert_array_equal(read_voxels(tmp_path / name), values)
    data = max(tmp_path.iterdir(), key=lambda file: file.stat().st_size)
    content = bytearray(data.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 0xFF
    elif damage == "overwritten":
        content[len(content) // 2 : len(content) // 2 + 100] = bytes(100)
    elif damage == "cut":
        del content[-100:]
    else:
        content[-6] ^= 1
    data.write_bytes(content)
    with pytest.raises(InputError, match=rf"{name}: can't be read"):
        read_voxels(tmp_path / name)


@pytest.mark.parametrize("name", ["a.mha", "a.mhd", "a.nrrd"])
@pytest.mark.parametrize("dtype", [np.int16, np.uint16, np.int32, np.float32, np.float64])
@pytest.mark.parametrize("order", "<>")
def test_compressed_values_of_every_kind(tmp_path, name, dtype, order):
    values = np.arange(240).reshape(3, 8, 10).astype(dtype)
    sitk.WriteImage(sitk.GetImageFromArray(values), str(tmp_path / name), True)
    if order == ">":
        big = values.astype(values.dtype.newbyteorder(">")).tobytes()
        if name == "a.nrrd":
            head = (tmp_path / name).read_bytes().split(b"\n\n")[0].replace(b"endian: little", b"endian: big")
            (tmp_path / name).write_bytes(head + b"\n\n" + gzip.compress(big))
        else:
            change(tmp_path / name, rb"ByteOrderMSB = False", b"ByteOrderMSB = True")
            head = (tmp_path / name).read_bytes().split(b"LOCAL\n")[0]
            if name == "a.mha":
                (tmp_path / name).write_bytes(head + b"LOCAL\n" + zlib.compress(big))
            else:
                (tmp_path / "a.zraw").write_bytes(zlib.compress(big))
    voxels = read_voxels(tmp_path / name)
    assert voxels.dtype == dtype
    np.testing.assert_array_equal(voxels, values)


@pytest.mark.parametrize("count", [100, 239])
@pytest.mark.parametrize(
    ("name", "binary", "text"),
    [("a.nhdr", rb"encoding: raw", b"encoding: ascii"), ("a.mhd", rb"BinaryData = True", b"BinaryData = False")],
)
def test_too_few_values_in_a_text(tmp_path, name, binary, text, count):
    path = tmp_path / name
    write(path)
    (tmp_path / "a.raw").write_text(" ".join(map(str, range(count))))
    change(path, binary, text)
    with pytest.raises(InputError, match="can't be read"):
        read_voxels(path)
