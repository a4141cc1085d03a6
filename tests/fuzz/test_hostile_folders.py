"""Folders of links, pipes, bombs and strange names, in a child with limits: the sound series in them comes out, and
nothing from outside.
"""

import contextlib
import os
import resource
import signal
import socket
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian

from lidnet_fast import cli
from lidnet_fast.data.store.reader import Store
from lidnet_fast.models.denoisers import build_denoiser
from lidnet_fast.models.files import save_network
from lidnet_fast.models.registry import NetworkConfig
from lidnet_fast.models.windowing import HUWindow
from tests.data.conftest import save, slice_dataset

SECONDS = 60
BYTES = 2 << 30
"""Address space that a command may add: what a bomb that goes off exceeds."""
SECRET = "4711-outside"
_MIB_OF_ZEROS = 1 << 20


def series(folder: Path, uid: str, patient: str, syntax: str = ExplicitVRLittleEndian) -> Path:
    """Two slices of a sound series."""
    folder.mkdir(parents=True, exist_ok=True)
    for z in range(2):
        hu = np.random.default_rng(z).integers(-1000, 1000, (32, 32), np.int16)
        where = {"position": (0, 0, 2.5 * z), "orientation": (1, 0, 0, 0, 1, 0), "spacing": (2.5, 0.7, 0.7)}
        dataset = slice_dataset(
            hu, series_uid=uid, patient_id=patient, **where, slope=1, intercept=-1024, number=z, syntax=syntax
        )
        save(dataset, folder / f"{z}.dcm")
    return folder


def zeros(mebibytes: int, wbits: int) -> bytes:
    """A stream that unpacks to as many MiB of zeros, a thousandth of its size."""
    packer = zlib.compressobj(9, zlib.DEFLATED, wbits)
    head = packer.compress(b"") + packer.flush(zlib.Z_FULL_FLUSH)
    block = packer.compress(bytes(_MIB_OF_ZEROS)) + packer.flush(zlib.Z_FULL_FLUSH)
    return head + block * mebibytes + packer.flush()


def deflated_bomb(path: Path) -> None:
    (folder := path.with_name(path.name + "_deflated")).mkdir()
    file = series(folder, "1.2.9", "bomb", DeflatedExplicitVRLittleEndian) / "0.dcm"
    content = file.read_bytes()
    start = 144 + int.from_bytes(content[140:144], "little")
    file.write_bytes(content[:start] + zeros(1100, -zlib.MAX_WBITS))
    (folder / "1.dcm").unlink()


def packed_nifti(path: Path) -> None:
    image = sitk.GetImageFromArray(np.zeros((4, 8, 8), np.int16))
    sitk.WriteImage(image, str(path.with_name("small.nii")))
    head = path.with_name("small.nii").read_bytes()[:352]
    path.with_name("small.nii").unlink()
    # Of 2 GiB, as it says itself.
    sides = np.array([3, 1024, 1024, 1024, 1, 1, 1, 1], "<i2").tobytes()
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    begin = packer.compress(head[:40] + sides + head[56:]) + packer.flush(zlib.Z_FULL_FLUSH)
    block = packer.compress(bytes(_MIB_OF_ZEROS)) + packer.flush(zlib.Z_FULL_FLUSH)
    path.with_name("bomb.nii.gz").write_bytes(begin + block * 2048 + packer.flush())


def large_element(path: Path) -> None:
    """A slice with a private element of 700 MB, which takes no room on the disk."""
    file = series(path.with_name(path.name + "_large"), "1.2.8", "large") / "0.dcm"
    content = file.read_bytes()
    pixels = content.index(b"\xe0\x7f\x10\x00OW")
    (file.parent / "1.dcm").unlink()
    length = 700_000_000
    with file.open("wb") as out:
        out.write(content[:pixels] + b"\x29\x00\x10\x00LO\x04\x00mine")
        out.write(b"\x29\x00\x01\x10OB\x00\x00" + length.to_bytes(4, "little"))
        out.seek(length, os.SEEK_CUR)
        out.write(content[pixels:])


def sparse_slice(path: Path) -> None:
    """A sound slice with a TB of zeros behind it, which take no room on the disk."""
    file = series(path.with_name(path.name + "_sparse"), "1.2.11", "sparse") / "0.dcm"
    os.truncate(file, 1 << 40)


def header_of(voxels: str) -> Callable[[Path], None]:
    """A MetaImage header whose voxels lie in some file."""

    def write(path: Path) -> None:
        lines = ("NDims = 3", "DimSize = 8 8 4", "ElementType = MET_SHORT", f"ElementDataFile = {voxels}")
        path.with_name(path.name + ".mhd").write_text("\n".join(lines))

    return write


def pipe_of_voxels(path: Path) -> None:
    os.mkfifo(path.with_name("voxels.raw"))
    header_of("voxels.raw")(path)


def a_socket(path: Path) -> None:
    before = Path.cwd()
    os.chdir(path.parent)  # their names are short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("s.dcm")
    os.chdir(before)


# Name -> makes it at a path; `outside` lies next to the folder that is searched.
PIECES: dict[str, Callable[[Path, Path], object]] = {
    "link to a folder outside": lambda path, outside: path.symlink_to(outside, target_is_directory=True),
    "link to a file outside": lambda path, outside: path.symlink_to(outside / "0.dcm"),
    "link to a volume outside": lambda path, outside: path.with_suffix(".nii").symlink_to(outside / "volume.nii"),
    "link to nothing": lambda path, _: path.symlink_to("nowhere"),
    "link to itself": lambda path, _: path.symlink_to(path.name),
    "link to where it is": lambda path, _: path.symlink_to(".", target_is_directory=True),
    "link to a device": lambda path, _: path.with_suffix(".dcm").symlink_to("/dev/zero"),
    "pipe": lambda path, _: os.mkfifo(path),
    "pipe named as DICOM": lambda path, _: os.mkfifo(path.with_suffix(".dcm")),
    "pipe named as a volume": lambda path, _: os.mkfifo(path.with_suffix(".nii.gz")),
    "pipe named as a header": lambda path, _: os.mkfifo(path.with_suffix(".nhdr")),
    "pipe of voxels": lambda path, _: pipe_of_voxels(path),
    "socket": lambda path, _: a_socket(path),
    "voxels outside": lambda path, outside: header_of(str(outside / "volume.nii"))(path),
    "voxels above": lambda path, _: header_of("../../outside/volume.nii")(path),
    "voxels of a device": lambda path, _: header_of("/dev/zero")(path),
    "deflated bomb": lambda path, _: deflated_bomb(path),
    "packed volume": lambda path, _: packed_nifti(path),
    "large element": lambda path, _: large_element(path),
    "sparse file": lambda path, _: (path.touch(), os.truncate(path, 1 << 40)),
    "sparse volume": lambda path, _: (path.with_suffix(".nii").touch(), os.truncate(path.with_suffix(".nii"), 1 << 40)),
    "sparse slice": lambda path, _: sparse_slice(path),
    "series in a folder named as ours": lambda path, _: series(path.with_name(".lock"), "1.2.5", "lock"),
    "series in a folder named as a record": lambda path, _: series(path.with_name("denoise.json"), "1.2.6", "record"),
    "series under a terminal's escapes": lambda path, _: series(path.with_name("a\x1b[2J\x07\nb"), "1.2.7", "escape"),
    "series under a long name": lambda path, _: series(path.with_name("x" * 250), "1.2.10", "long"),
    "folders in folders": lambda path, _: path.joinpath(*["deep"] * 60).mkdir(parents=True),
}
COMMANDS = ("prepare", "denoise")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "denoiser.pt"
    config = NetworkConfig("small", {"channels": 4, "layers": 2})
    save_network(path, "denoiser", build_denoiser("small", channels=4, layers=2), config, HUWindow(), {})
    return path


def in_a_child(arguments: list[str], log: Path) -> int:
    """Run a command in a process with limits of memory, time and what it writes, and without a network."""
    child = os.fork()
    if child == 0:
        status = 77
        try:
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 1)
            os.dup2(1, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, used + BYTES))
            resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
            resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 20, 64 << 20))
            socket.socket.connect = None  # type: ignore[assignment, method-assign]
            cli.main(arguments)
            status = 0
        except SystemExit as stop:
            status = int(stop.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        ended, how = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(how)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -signal.SIGALRM


def state(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")}


def check(command: str, pieces: list[tuple[str, str]], model: Path) -> None:
    """Run a command on a folder with a sound series and some pieces, and look at what came of it."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        outside = series(root / "outside", "1.2.66", SECRET)
        sitk.WriteImage(sitk.GetImageFromArray(np.full((4, 8, 8), -77, np.int16)), str(outside / "volume.nii"))
        series(root / "in" / "sound", "1.2.3", "sound")
        for number, (kind, where) in enumerate(pieces):
            path = root / "in" / where / f"piece{number}"
            path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):  # the same kind twice in one folder
                PIECES[kind](path, outside)
        before, out = state(outside), root / "out"
        arguments = {
            "prepare": ["prepare", str(root / "in"), "--out", str(out), "--workers", "1", "--test-fraction", "0"],
            "denoise": ["denoise", str(root / "in"), str(out), "--model", str(model), "--device", "cpu"],
        }[command]
        arguments += ["--val-fraction", "0"] if command == "prepare" else []
        status = in_a_child(arguments, root / "log")
        said = (root / "log").read_text(errors="replace")
        assert status in (0, 2), (status, said)
        assert "Traceback" not in said, said
        assert not set(said) & {"\x1b", "\x07"}
        assert state(outside) == before
        if command == "prepare":
            store = Store(out)
            assert "1.2.3" in {info.series_uid for info in store.series}, said
            assert SECRET not in {info.patient_id for info in store.series}
        else:
            written = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
            assert sum(path.match("sound/*/*.dcm") for path in written) == 2, said
            assert not any(SECRET.encode() in content for content in written.values())
        assert not list(root.glob(".*")), "something unfinished is left"


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", PIECES)
def test_every_piece(command: str, kind: str, model: Path) -> None:
    check(command, [(kind, "sub")], model)


@settings(max_examples=settings.default.max_examples // 3)
@given(
    command=st.sampled_from(COMMANDS),
    pieces=st.lists(
        st.tuples(st.sampled_from(sorted(PIECES)), st.sampled_from(["", "sub", "sound", "sub/sub", "\u202e"])),
        min_size=1,
        max_size=8,
    ),
)
def test_pieces_together(command: str, pieces: list[tuple[str, str]], model: Path) -> None:
    check(command, pieces, model)
