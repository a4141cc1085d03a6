"""Stores of either volume format, on a disk and in an object store."""

import base64
import builtins
import multiprocessing
import os
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import blosc2
import fsspec
import numpy as np
import pytest
import zarr

from lidnet_fast.data.samples.dataset import LesionPatches, collate
from lidnet_fast.data.simulation.dose import DoseSimulation
from lidnet_fast.data.store.index import SeriesInfo
from lidnet_fast.data.store.reader import Store
from lidnet_fast.data.store.writer import StoreWriter
from lidnet_fast.errors import InputError

SHAPES = [(3, 300, 520), (40, 48, 40)]


def volume_of(number, shape):
    return np.random.default_rng(number).integers(-1024, 3071, shape, dtype=np.int16)


def write_store(path, volume_format, simulation=None):
    with StoreWriter(path, volume_format=volume_format, simulation=simulation) as writer:
        for number, shape in enumerate(SHAPES):
            geometry = {"spacing": (2.5, 0.7, 0.8), "origin": (0.0, 0.0, 0.0), "orientation": (1.0, 0, 0, 0, 1.0, 0)}
            info = SeriesInfo(f"1.{number}", f"patient {number}", "train", True, shape=shape, **geometry)
            box = np.array([[1, 3, 4, 20, 30]], np.float32)
            writer.add_series(info, volume_of(number, shape), box, low_dose=volume_of(10 + number, shape))
    return path


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """A store of each format in a local folder."""
    folder = tmp_path_factory.mktemp("local")
    return {name: write_store(folder / name, name) for name in ("blosc2", "zarr")}


@pytest.fixture(scope="module")
def memory(local):
    """The Zarr store in fsspec's object store in memory."""
    url = "memory://bucket/deep/store"
    fsspec.filesystem("memory").put(str(local["zarr"]), url, recursive=True)
    yield url
    fsspec.filesystem("memory").rm("/bucket", recursive=True)


@pytest.fixture(scope="module")
def s3(local):
    """The Zarr store in a bucket of an S3 server."""
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "key"}.items():
            patch.setenv(name, value)
        patch.setitem(fsspec.config.conf, "s3", {"endpoint_url": f"http://{host}:{port}"})
        file_system = fsspec.filesystem("s3")
        file_system.mkdir("bucket")
        file_system.put(str(local["zarr"]), "s3://bucket/store", recursive=True)
        yield "s3://bucket/store"
    server.stop()


@pytest.fixture(params=["blosc2", "zarr", "memory", "s3"])
def location(request, local):
    return local[request.param] if request.param in local else request.getfixturevalue(request.param)


def check(store):
    for number, shape in enumerate(SHAPES):
        depth, height, width = shape
        rng = np.random.default_rng(number)
        for low_dose in (False, True):
            volume = volume_of(number + 10 * low_dose, shape)
            for z in (0, depth - 1, int(rng.integers(depth))):
                np.testing.assert_array_equal(store.read(number, z, low_dose=low_dose), volume[z])
                h, w = rng.integers(1, (height, width))
                y, x = rng.integers(0, (height - h + 1, width - w + 1))
                window = store.read(number, z, (int(y), int(x), int(h), int(w)), low_dose=low_dose)
                np.testing.assert_array_equal(window, volume[z, y : y + h, x : x + w])
                assert window.dtype == np.int16
        assert store.boxes(number, 1).tolist() == [[3, 4, 20, 30]]
    return True


def test_every_window_of_every_volume(location):
    check(Store(location))


def _check_inherited(queue):
    queue.put(check(INHERITED[0]))


INHERITED = []


def test_a_forked_worker_opens_connections_of_its_own(s3):
    INHERITED[:] = [Store(s3)]
    check(INHERITED[0])
    fork = multiprocessing.get_context("fork")
    queue = fork.Queue()
    worker = fork.Process(target=_check_inherited, args=(queue,))
    worker.start()
    assert queue.get(timeout=60)
    worker.join()


def test_samples_are_the_same_wherever_the_store_is(tmp_path, memory):
    simulation = DoseSimulation(dose_fraction=0.2).to_dict()
    options = {"crop": 32, "positive_fraction": 0.5, "augment": True, "seed": 1}
    one = LesionPatches(write_store(tmp_path / "s", "blosc2", simulation), "train", **options)
    other = LesionPatches(write_store(tmp_path / "t", "zarr", simulation), "train", **options)
    fsspec.filesystem("memory").put(str(tmp_path / "t"), "memory://bucket/simulated", recursive=True)
    remote = LesionPatches("memory://bucket/simulated", "train", **options)
    expected, *others = (collate([data[draw] for draw in range(6)]) for data in (one, other, remote))
    for samples in others:
        assert samples.ids == expected.ids
        assert samples.normal_dose.equal(expected.normal_dose)
        assert all(values.equal(samples.attenuation[size]) for size, values in expected.attenuation.items())


def test_zarr_is_read_by_chunks_of_a_shard(local):
    array = zarr.open_array(local["zarr"] / "volumes" / "00000.zarr", mode="r")
    assert array.metadata.zarr_format == 3
    assert (array.shards, array.chunks) == ((16, 512, 768), (1, 256, 256))
    np.testing.assert_array_equal(array[:], volume_of(0, SHAPES[0]))


def _shards(path):
    return sorted(file for file in (path / "volumes" / "00001.zarr" / "c").rglob("*") if file.is_file())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda shard: shard.unlink(), r"00001\.zarr: slice 20 can't be decoded: an object of it is missing"),
        (lambda shard: shard.write_bytes(shard.read_bytes()[:-9]), r"00001\.zarr: slice 20 can't be decoded"),
        (lambda shard: _flip_bits(shard), r"00001\.zarr: slice 20 can't be decoded: .*checksum"),
    ],
)
def test_a_missing_or_damaged_shard_is_noticed(tmp_path, damage, message):
    path = write_store(tmp_path / "s", "zarr")
    damage(_shards(path)[1])
    store = Store(path)
    np.testing.assert_array_equal(store.read(1, 3), volume_of(1, SHAPES[1])[3])
    with pytest.raises(InputError, match=message):
        store.read(1, 20)


def _flip_bits(path):
    """In every chunk, and not in the shard's list of them, which has a checksum of its own."""
    content = bytearray(path.read_bytes())
    for place in range(0, len(content) - 2048, 256):
        content[place] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("volume_format", "file", "part", "damaged", "message"),
    [
        ("zarr", "00000.zarr/zarr.json", b"data_type", b"eata_type", "KeyError: 'data_type'"),
        ("blosc2", "00000.b2nd", b"<i2", b"<((", "SyntaxError: .*"),
    ],
)
def test_damaged_metadata_are_noticed(tmp_path, volume_format, file, part, damaged, message):
    path = write_store(tmp_path / "s", volume_format)
    metadata = path / "volumes" / file
    assert part in metadata.read_bytes()
    metadata.write_bytes(metadata.read_bytes().replace(part, damaged))
    with pytest.raises(InputError, match=rf"00000\.\w+: can't be opened: {message}"):
        Store(path).read(0, 0)


def _lazy(path):
    array = blosc2.asarray(np.ones(4), urlpath=str(path.with_name("operand.b2nd")), mode="w")
    blosc2.lazyexpr("array + 1", {"array": array}).save(str(path))


def _of_user_code(path):
    """What ran its code when older blosc2 opened it."""
    array = blosc2.asarray(np.ones(4), urlpath=str(path.with_name("operand.b2nd")), mode="w")

    def evil(inputs, output, offset):
        output[:] = inputs[0]

    blosc2.lazyudf(evil, (array,), np.float64).save(urlpath=str(path))


def _with_metadata(path, name):
    meta = {name: b"anything"}
    blosc2.asarray(np.zeros(SHAPES[0], np.int16), urlpath=str(path), mode="w", meta=meta)


@pytest.mark.parametrize(
    ("plant", "said"),
    [
        (_lazy, "it has metadata .*a plain array has b2nd alone"),
        (_of_user_code, "it has metadata .*a plain array has b2nd alone"),
        (lambda path: _with_metadata(path, "proxy-source"), "it has metadata .*proxy-source"),
        (lambda path: _with_metadata(path, "b2o"), "it has metadata .*b2o"),
        (lambda path: blosc2.SChunk(data=b"1", urlpath=str(path)), "it has metadata .*a plain array"),
        (lambda path: path.write_bytes(b"x"), "it isn't a blosc2 file"),
        (lambda path: path.write_bytes(b"\x9e\xa8b2frame\0\xd2\xff\xff\xff\xff"), "it isn't a blosc2 file"),
        (os.mkfifo, r"00000\.b2nd isn't a regular file"),
        (lambda path: path.mkdir(), r"00000\.b2nd isn't a regular file"),
    ],
)
def test_what_is_no_plain_array_is_refused_before_blosc2_opens_it(tmp_path, monkeypatch, plant, said):
    path = write_store(tmp_path / "s", "blosc2")
    volume = path / "volumes" / "00000.b2nd"
    volume.unlink()
    plant(volume)
    monkeypatch.setattr(blosc2, "open", lambda *arguments, **options: pytest.fail("opened"))
    with pytest.raises(InputError, match=rf"00000\.b2nd: can't be opened: {said}"):
        Store(path).read(0, 0)


@pytest.mark.parametrize(
    "name", ["store.json", "index.npz", "volumes/00000.zarr/zarr.json", "volumes/00000.zarr/c/0/0/0"]
)
def test_pipes_in_stores_are_not_opened(tmp_path, name):
    path = write_store(tmp_path / "s", "zarr")
    (path / name).unlink()
    os.mkfifo(path / name)
    with pytest.raises(InputError, match="isn't a regular file"):
        Store(path).read(0, 0)


def test_a_missing_volume_is_noticed(tmp_path):
    path = write_store(tmp_path / "s", "zarr")
    (path / "volumes" / "00000.zarr" / "zarr.json").unlink()
    with pytest.raises(InputError, match=r"00000\.zarr: can't be opened"):
        Store(path).read(0, 0)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("memory://nowhere/store", r"memory://nowhere/store: isn't a store"),
        ("nonsense://bucket/store", r"nonsense://bucket/store/store\.json: can't be read: .*nonsense"),
    ],
)
def test_urls_that_lead_nowhere(url, message):
    with pytest.raises(InputError, match=message):
        Store(url)


@pytest.fixture(scope="module")
def guarded(local):
    """The Zarr store behind a password: the URL without it, and requests as the server saw them."""
    seen = []

    class Guarded(SimpleHTTPRequestHandler):
        def do_GET(self):
            seen.append(self.headers["Authorization"])
            if seen[-1] != f"Basic {base64.b64encode(b'anna:s3cr3t').decode()}":
                self.send_error(401)
            else:
                super().do_GET()

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("localhost", 0), partial(Guarded, directory=local["zarr"])) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"localhost:{server.server_port}", seen
        server.shutdown()


def test_passwords_of_urls_are_used_and_never_shown(guarded):
    place, _ = guarded
    store = Store(f"http://anna:s3cr3t@{place}")
    assert len(store.series) == 2
    with pytest.raises(InputError, match=rf"http://{place}/store.json: can't be read") as wrong:
        Store(f"http://anna:s3cr3tt@{place}")
    with pytest.raises(InputError, match=rf"http://{place}/nowhere: isn't a store") as nowhere:
        Store(f"http://anna:s3cr3t@{place}/nowhere")
    for path in (f"http://anna:wr0ng@{place}", "http://anna:wr0ng@localhost:1"):
        store.path = path  # as if the server had changed
        with pytest.raises(InputError, match=r"00000\.zarr: can't be opened") as volume:
            store.read(0, 0)
        assert "wr0ng" not in str(volume.value)
    assert "s3cr3t" not in f"{wrong.value}{nowhere.value}"


def test_a_password_is_not_shown_without_its_url(monkeypatch):
    """As of s3fs, whose errors name the bucket and what stands before it."""

    def fail(path):
        raise PermissionError(f"{path.partition('://')[2]}: Access Denied")

    monkeypatch.setattr("lidnet_fast.data.store.reader.url_to_fs", fail)
    with pytest.raises(InputError, match=r"s3://key@bucket/s/store.json: can't be read: key:\*\*\*@bucket/s: Access"):
        Store("s3://key:se/cr/et@bucket/s")


def test_a_bucket_that_is_not_there(s3):
    with pytest.raises(InputError, match=r"s3://other/store"):
        Store("s3://other/store")


def test_blosc2_volumes_are_local(local):
    fsspec.filesystem("memory").put(str(local["blosc2"]), "memory://bucket/blosc2", recursive=True)
    store = Store("memory://bucket/blosc2")
    assert len(store.series) == 2
    with pytest.raises(InputError, match=r"00000\.b2nd: can't be opened: blosc2 volumes are read from a local folder"):
        store.read(0, 0)


def test_an_unknown_format(tmp_path):
    with (
        pytest.raises(InputError, match=r"volume_format 'tiff' isn't one of blosc2, zarr"),
        StoreWriter(tmp_path / "s", volume_format="tiff"),
    ):
        pass
    assert not list(tmp_path.iterdir())


def test_without_zarr_installed(local, monkeypatch):
    def without_zarr(name, *arguments, **options):
        if name.split(".")[0] == "zarr":
            raise ImportError("No module named 'zarr'")
        return original(name, *arguments, **options)

    original = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", without_zarr)
    with pytest.raises(InputError, match=r"pip install 'lidnet_fast\[cloud\]'"):
        Store(local["zarr"]).read(0, 0)
