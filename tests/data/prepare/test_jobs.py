"""Preparing in many processes, after interruptions, on Dask; and what is left out is said."""

import csv
import os
import resource
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pydicom
import pytest

from lidnet_fast.cli import main
from lidnet_fast.data.prepare.jobs import executor, run
from lidnet_fast.data.prepare.plan import prepare
from lidnet_fast.data.store.backends import FORMATS
from lidnet_fast.data.store.reader import Store
from lidnet_fast.data.store.writer import SeriesWriter
from lidnet_fast.errors import InputError

UID = "1.2.826.0.1.3680043.8.498"
TO_TRAIN = {"val_fraction": 0, "test_fraction": 0}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """24 series of 8 slices, and their boxes."""
    from tests.data.conftest import save, slice_dataset

    root = tmp_path_factory.mktemp("study")
    rng = np.random.default_rng(0)
    lines = ["series_uid,slice,x1,y1,x2,y2"]
    for n in range(24):
        (root / "ct" / str(n)).mkdir(parents=True)
        for z in range(8):
            dataset = slice_dataset(
                rng.integers(-1000, 1000, (256, 256), np.int16),
                series_uid=f"{UID}.{n}",
                patient_id=f"patient {n // 2}",
                position=(0, 0, 2 * z),
                orientation=(1, 0, 0, 0, 1, 0),
                spacing=(2, 1, 1),
                slope=1,
                intercept=-1024,
                number=z,
                syntax="1.2.840.10008.1.2.1",
            )
            save(dataset, root / "ct" / str(n) / f"{z}.dcm")
        lines.append(f"{UID}.{n},{n % 3},1,2,3,4")
    (root / "boxes.csv").write_text("\n".join(lines) + "\n")
    return root


def content(store: Path) -> dict[str, bytes]:
    return {str(path.relative_to(store)): path.read_bytes() for path in sorted(store.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def expected(study, tmp_path_factory):
    """The content of the store, written by this process alone."""
    store = tmp_path_factory.mktemp("expected") / "store"
    prepare([study / "ct"], store, boxes=study / "boxes.csv", workers=1)
    assert len(Store(store).series) == 24
    return content(store)


def test_the_number_of_workers_changes_nothing(tmp_path, study, expected):
    prepare([study / "ct"], tmp_path / "store", boxes=study / "boxes.csv", workers=3)
    assert content(tmp_path / "store") == expected


def test_zarr(tmp_path, study, expected):
    pytest.importorskip("zarr")
    command = ["prepare", str(study / "ct"), "--out", str(tmp_path / "store"), "--format", "zarr", "--workers", "2"]
    main([*command, "--boxes", str(study / "boxes.csv")])
    store = Store(tmp_path / "store")
    assert len(store.series) == 24
    first = pydicom.dcmread(study / "ct" / "0" / "1.dcm")
    np.testing.assert_array_equal(store.read(0, 1), np.maximum(first.pixel_array - 1024, -1024))


def test_dask_changes_nothing(tmp_path, study, expected):
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(n_workers=2, processes=False, dashboard_address=None) as cluster:
        address = cluster.scheduler_address
        prepare([study / "ct"], tmp_path / "store", boxes=study / "boxes.csv", dask=address)
    assert content(tmp_path / "store") == expected


def interrupt_after(count):
    """A `run` that is interrupted when some jobs are done."""
    from lidnet_fast.data.prepare.jobs import run

    def interrupted(pool, function, jobs, what):
        for n, result in enumerate(run(pool, function, jobs, what)):
            if n == count:
                raise KeyboardInterrupt
            yield result

    return interrupted


def test_interrupted(tmp_path, study, expected, monkeypatch):
    """The same call goes on; what is finished isn't written again."""
    arguments = {"sources": [study / "ct"], "out": tmp_path / "store", "boxes": study / "boxes.csv", "workers": 1}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("lidnet_fast.data.prepare.writing.run", interrupt_after(7))
        prepare(**arguments)
    written = []
    with monkeypatch.context() as patch:
        write = SeriesWriter.write
        patch.setattr(
            SeriesWriter, "write", lambda self, index, *rest: (written.append(index), write(self, index, *rest))
        )
        summary = prepare(**arguments)
    assert written == list(range(8, 24))
    assert sum(summary.series.values()) == 24
    assert content(tmp_path / "store") == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store"]


@pytest.mark.slow
def test_killed_again_and_again(tmp_path, study, expected):
    """The same command goes on after a kill, whenever that comes."""
    out = tmp_path / "store"
    command = [sys.executable, "-c", "from lidnet_fast.cli import main; main()", "prepare", str(study / "ct")]
    command += ["--out", str(out), "--boxes", str(study / "boxes.csv"), "--workers", "2"]

    def finished():
        return list(tmp_path.glob(".store.partial/**/records/*.json"))

    for moment in (1, 6):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(finished()) < moment:
            time.sleep(0.005)
        assert process.poll() is None, "finished before it could be killed"
        process.kill()
        process.wait()
        assert not out.exists()
        assert moment <= len(finished()) < 24
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert content(out) == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store"]


def test_another_study_starts_anew(tmp_path, study, expected, write_series, make_hu, monkeypatch):
    """What an interrupted call of other arguments has left is no part of this store."""
    write_series(tmp_path / "ct", make_hu())

    write_series(tmp_path / "ct", make_hu(), series_uid=f"{UID}.77")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("lidnet_fast.data.prepare.writing.run", interrupt_after(1))
        prepare([tmp_path / "ct"], tmp_path / "store", workers=1, **TO_TRAIN)
    assert (tmp_path / ".store.partial").exists()
    prepare([study / "ct"], tmp_path / "store", boxes=study / "boxes.csv", workers=1)
    assert content(tmp_path / "store") == expected


@pytest.fixture
def faulty(tmp_path, write_series, make_hu):
    """A good series, and one for each of many faults."""
    from pydicom.uid import RLELossless

    root = tmp_path / "ct"
    write_series(root / "good", make_hu(), series_uid=f"{UID}.1")
    gap = write_series(root / "gap", make_hu(9), series_uid=f"{UID}.2")
    gap[4].unlink()
    truncated = write_series(root / "truncated", make_hu(), series_uid=f"{UID}.3")
    truncated[1].write_bytes(truncated[1].read_bytes()[:-100])
    undecodable = write_series(root / "undecodable", make_hu(), series_uid=f"{UID}.4", syntax=RLELossless)
    undecodable[1].write_bytes(undecodable[1].read_bytes()[:-900])

    def colour(z, dataset):
        dataset.PhotometricInterpretation = "PALETTE COLOR"

    write_series(root / "colour", make_hu(), series_uid=f"{UID}.5", edit=colour)
    (root / "empty.dcm").write_bytes(b"")
    return root


REASONS = {
    f"{UID}.2": "slices are missing between 107.5 and 112.5 mm",
    f"{UID}.3": "is truncated: its 64 x 64 pixels take 8192 bytes",
    f"{UID}.4": "its pixels can't be decoded (truncated?)",
    f"{UID}.5": "this is PALETTE COLOR",
    "": "isn't a DICOM file, whatever its name says",
}


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_series_are_left_out_and_listed(tmp_path, faulty, make_hu, workers):
    report = tmp_path / "reports" / "rejected.csv"
    boxes = tmp_path / "boxes.csv"
    boxes.write_text(f"series_uid,slice,x1,y1,x2,y2\n{UID}.1,0,1,2,3,4\n{UID}.2,0,1,2,3,4\n{UID}.4,0,1,2,3,4\n")
    options = {"boxes": boxes, "report": report, "workers": workers, **TO_TRAIN}
    summary = prepare([faulty], tmp_path / "store", **options)
    (info,) = Store(tmp_path / "store").series
    assert info.series_uid == f"{UID}.1"
    assert summary.series["train"] == 1
    assert summary.boxes["train"] == 1
    with report.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["series_uid"]: row["reason"] for row in rows}.keys() == REASONS.keys()
    for row in rows:
        assert REASONS[row["series_uid"]] in row["reason"]
        assert Path(row["path"]).exists()
    lines = summary.lines()
    assert "  rejected: 5" in lines
    # The same call again may write its report again.
    prepare([faulty], tmp_path / "again", **options)


def test_strict_ends_cleanly_while_others_still_write(tmp_path, make_hu):
    import SimpleITK as sitk  # noqa: N813

    (tmp_path / "ct").mkdir()
    for number in range(24):
        hu = np.zeros((2, 16, 16), np.int16) if number == 5 else make_hu(2, 16, 16)
        sitk.WriteImage(sitk.GetImageFromArray(hu), str(tmp_path / "ct" / f"{number:02d}.mha"))
    with pytest.raises(InputError, match=r"05\.mha: has no value below 0"):
        prepare([tmp_path / "ct"], tmp_path / "store", strict=True, workers=2, **TO_TRAIN)
    assert [path.name for path in tmp_path.iterdir()] == ["ct"]


def _end(number):
    os._exit(number)


def test_a_worker_that_is_killed():
    with executor(2) as pool, pytest.raises(InputError, match=r"a process ended while adding \(out of memory\?\)"):
        list(run(pool, _end, [1, 2], "adding"))


def test_a_folder_that_cannot_be_listed(tmp_path, study, monkeypatch):
    listed = os.scandir

    def refuse(path):
        if Path(path).name == "3":
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError, match=r"ct/3: can't be listed: Permission denied"):
        prepare([study / "ct"], tmp_path / "store", workers=1)


@pytest.mark.parametrize("volume_format", ["blosc2", "zarr"])
def test_a_full_disk_is_an_error_of_the_system(tmp_path, volume_format):
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    volume = np.random.default_rng(0).integers(-1000, 1000, (4, 256, 256), np.int16)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, usual[1]))
    try:
        with pytest.raises(OSError, match=r"can't be written|too large"):
            FORMATS[volume_format].write(tmp_path / f"a{FORMATS[volume_format].suffix}", volume)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)


def test_all_that_was_rejected_is_named(tmp_path, write_series, make_hu, capsys):
    write_series(tmp_path / "ct", make_hu(), series_uid=f"{UID}.0")
    for n in range(7):
        (tmp_path / "ct" / f"{n}.dcm").write_bytes(b"")
    with pytest.raises(SystemExit) as stop:
        main(["prepare", str(tmp_path / "ct"), "--out", str(tmp_path / "store"), "--workers", "1"])
    assert stop.value.code == 2
    said = capsys.readouterr()
    assert "  files: 11 found = 4 used + 0 skipped + 7 rejected\n  rejected: 7\n" in said.out
    *named, last = said.err.splitlines()
    assert all(f"{n}.dcm: isn't a DICOM file" in line for n, line in enumerate(named))
    assert last == f"lidnet-fast: {tmp_path / 'store'}: 7 series or files aren't in it, see above"
    assert Store(tmp_path / "store").index.shape.tolist() == [[4, 64, 64]]


def test_nothing_usable(tmp_path, faulty):
    good = faulty / "good"
    for file in good.iterdir():
        file.unlink()
    for name in ("gap", "truncated", "undecodable"):
        report = tmp_path / f"{name}.csv"
        with pytest.raises(InputError, match=rf"none of the CT there can be used; .*{name}"):
            prepare([faulty / name], tmp_path / "store", report=report, workers=1, **TO_TRAIN)
        assert f"{faulty / name}" in report.read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ct", "gap.csv", "truncated.csv", "undecodable.csv"]


def test_bad_arguments(tmp_path, study, capsys):
    notes = tmp_path / "notes.csv"
    notes.write_text("my notes\n")
    with pytest.raises(InputError, match=r"notes\.csv\): exists already and isn't a report"):
        prepare([study / "ct"], tmp_path / "store", report=notes)
    with pytest.raises(InputError, match="workers must be at least 1, got 0"):
        prepare([study / "ct"], tmp_path / "store", workers=0)
    assert notes.read_text() == "my notes\n"
    with pytest.raises(SystemExit, match="2"):
        main(["prepare", str(study / "ct"), "--out", str(tmp_path / "store"), "--dask", "carrier-pigeon://8786"])
    assert "lidnet-fast: dask (carrier-pigeon://8786): " in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes in /proc")
def test_workers_end_with_their_parent(tmp_path):
    """A pool's processes would wait for ever for a parent that was killed."""
    program = (
        "import os, time\n"
        "from lidnet_fast.data.prepare.jobs import executor\n"
        "if __name__ == '__main__':\n"
        "    with executor(2) as pool:\n"
        "        print(*pool.map(pid, range(2)), flush=True)\n"
        "        time.sleep(60)\n"
    ).replace("\nif", "\ndef pid(_):\n    time.sleep(0.2)\n    return os.getpid()\nif", 1)
    (tmp_path / "program.py").write_text(program)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "program.py")], stdout=subprocess.PIPE, text=True, env=environment
    )
    workers = [int(number) for number in process.stdout.readline().split()]
    assert len(set(workers)) == 2
    process.kill()
    process.wait()
    process.stdout.close()
    assert wait_until(lambda: not any(map(is_running, workers)))


def is_running(number):
    """Tell whether a process is there and no zombie, which nobody may have collected yet."""
    status = Path(f"/proc/{number}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def wait_until(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def documented_commands():
    text = Path(__file__).parents[3].joinpath("docs", "datasets.md").read_text().replace("\\\n", " ")
    return [shlex.split(line) for line in text.splitlines() if line.startswith("    lidnet-fast prepare ")]


@pytest.mark.parametrize("command", documented_commands(), ids=lambda command: command[-1].partition("/")[2])
def test_documented_commands(tmp_path, monkeypatch, capsys, command):
    """All that is wrong with them here is that there are no such files."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        main(command[1:])
    assert "there is no such file" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
