"""A run's folder keeps the run's own results: what else is evaluated beside it has a folder of its own."""

import json
import shutil
from pathlib import Path

import pytest

from lidnet_fast.cli import main
from lidnet_fast.data.store.reader import Store
from lidnet_fast.evaluation.evaluate import place_of_results
from lidnet_fast.models.files import fingerprint
from lidnet_fast.publication import publish
from lidnet_fast.trainer.config import RunConfig

SMALL = ["--device", "cpu", "--samples", "2"]


def test_only_the_runs_own_results_are_in_its_folder(
    trained_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another denoiser, another store, and candidates of any detector: none is what `publish` says of the run."""
    run, other, store = Path(trained_config.out), tmp_path / "other.pt", tmp_path / "moved"
    main(["evaluate", str(run), *SMALL])
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    own = json.loads(before["metrics.json"])
    assert (own["own"], own["samples"]) == (True, 2)
    assert own["denoiser"] == fingerprint(run / "collaborate" / "denoiser.pt")
    shutil.copy(run / "denoiser" / "denoiser.pt", other)
    shutil.copytree(trained_config.data.store, store)
    main(["evaluate", str(run), *SMALL, "--denoiser", str(other)])
    main(["evaluate", str(run), *SMALL, "--store", str(store)])
    uid = next(info.series_uid for info in Store(store).series if info.split == "test")
    (tmp_path / "mine.csv").write_text(f"seriesuid,coordX,coordY,coordZ,probability\n{uid},0,0,0,0.5\n")
    main(["evaluate", str(run), "--candidates", str(tmp_path / "mine.csv")])
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before
    made = {path.parent.name.rpartition("-")[0]: path for path in (run / "evaluated").glob("*/*.json")}
    assert set(made) == {"other", "on_moved", "mine"}
    result = json.loads(made["other"].read_text())
    assert (result["own"], result["denoiser"]) == (False, fingerprint(other))
    assert made["other"].with_name("report.html").exists()

    monkeypatch.setattr("lidnet_fast.publication.folder.write_onnx", lambda path, _: path.write_bytes(b""))
    card = (publish(run, tmp_path / "published") / "README.md").read_text()
    assert f"| PSNR whole image (dB) | {own['arms']['denoised']['psnr']:.2f} |" in card


def test_the_same_store_by_another_name_is_the_runs(trained_config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    store, run = Path(trained_config.data.store), Path(trained_config.out)
    monkeypatch.chdir(store.parent)
    main(["evaluate", str(run), *SMALL, "--store", store.name])
    assert json.loads((run / "metrics.json").read_text())["own"]


def test_names_of_places(tmp_path: Path) -> None:
    """They differ where what is evaluated differs, and say nothing that a URL may not."""
    files = [tmp_path / name / "denoiser.pt" for name in ("a", "b")]
    for file in files:
        file.parent.mkdir()
        file.write_bytes(file.parent.name.encode())
    places = [place_of_results(tmp_path, file) for file in files]
    assert len({*places, place_of_results(tmp_path, files[0], "s3://bucket/ct")}) == 3
    signed = place_of_results(tmp_path, store="https://host/ct?signature=secret")
    assert signed.name.startswith("on_ct-")
    assert place_of_results(tmp_path) == tmp_path
