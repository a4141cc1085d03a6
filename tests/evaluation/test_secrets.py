"""A store's password stays out of what a run and its evaluation write, and a run's URL isn't opened unasked."""

import json
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
import yaml

from lidnet_fast.cli import main
from lidnet_fast.data.store.reader import Store
from lidnet_fast.data.store.writer import StoreWriter
from lidnet_fast.trainer.config import RunConfig
from lidnet_fast.trainer.run import Run, train

SECRET = "memory://anna:s3cr3t@bucket/store"


@pytest.fixture
def remote(tiny_store: Path, tmp_path: Path) -> str:
    """The tiny store at a URL with a password in it."""
    store = Store(tiny_store)
    with StoreWriter(tmp_path / "zarr", volume_format="zarr", simulation=store.simulation) as writer:
        for index, info in enumerate(store.series):
            volume = [store.read(index, z) for z in range(info.shape[0])]
            boxes = [(z, *box) for z in range(info.shape[0]) for box in store.boxes(index, z)]
            writer.add_series(info, np.stack(volume), np.array(boxes))
    for url in (SECRET, SECRET.replace("s3cr3t", "changed")):
        fsspec.filesystem("memory").put(str(tmp_path / "zarr"), url, recursive=True)
    return SECRET


def test_a_run_keeps_no_password_and_its_url_is_opened_on_request(
    tiny_config: RunConfig, remote: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    untrained = {name: replace(getattr(tiny_config, name), steps=0) for name in ("detector", "denoiser", "collaborate")}
    config = replace(tiny_config, **untrained, data=replace(tiny_config.data, store=remote))
    train(config)
    Run(replace(config, data=replace(config.data, store=remote.replace("s3cr3t", "changed"))))
    stored = yaml.safe_load(Path(config.out, "config.yaml").read_text())
    assert stored["data"]["store"] == "memory://anna@bucket/store"
    with pytest.raises(SystemExit, match="2"):
        main(["evaluate", config.out])
    refused = capsys.readouterr().err
    assert "the run's store is at memory://anna@bucket/store. To fix:" in refused
    assert "repeat the URL with --store" in refused
    main(["evaluate", config.out, "--store", remote, "--device", "cpu"])
    assert "s3cr3t" not in "".join(capsys.readouterr())
    assert json.loads(Path(config.out, "metrics.json").read_text())["own"]  # the URL with its password is the run's
    for file in filter(Path.is_file, Path(config.out).rglob("*")):
        assert b"s3cr3t" not in file.read_bytes(), file
