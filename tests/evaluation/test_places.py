"""A run's folder keeps the run's own results: what else is evaluated has a folder of its own, and nothing is lost."""

import json
import shutil
from pathlib import Path

import pytest

from lidnet_fast.cli import main
from lidnet_fast.data.store.reader import Store
from lidnet_fast.errors import InputError
from lidnet_fast.evaluation.evaluate import place_of_results
from lidnet_fast.models.files import fingerprint
from lidnet_fast.publication import publish
from lidnet_fast.results_folder import refuse_to_lose
from lidnet_fast.trainer.config import RunConfig
from tests.test_cli import refused

CPU = ["--device", "cpu"]


def test_only_the_runs_own_results_are_in_its_folder(
    trained_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another denoiser, store, number of samples, and candidates of any detector: none is what `publish` says."""
    run, other, store = Path(trained_config.out), tmp_path / "other.pt", tmp_path / "moved"
    main(["evaluate", str(run), *CPU])
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    own = json.loads(before["metrics.json"])
    assert (own["own"], own["samples"]) == (True, trained_config.evaluation.samples)
    assert own["denoiser"] == fingerprint(run / "collaborate" / "denoiser.pt")
    shutil.copy(run / "denoiser" / "denoiser.pt", other)
    shutil.copytree(trained_config.data.store, store)
    main(["evaluate", str(run), *CPU, "--denoiser", str(other)])
    main(["evaluate", str(run), *CPU, "--store", str(store)])
    main(["evaluate", str(run), *CPU, "--samples", "2"])
    uid = next(info.series_uid for info in Store(store).series if info.split == "test")
    (tmp_path / "mine.csv").write_text(f"seriesuid,coordX,coordY,coordZ,probability\n{uid},0,0,0,0.5\n")
    main(["evaluate", str(run), "--candidates", str(tmp_path / "mine.csv")])
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before
    made = {path.parent.name.rpartition("-")[0]: path for path in (run / "evaluated").glob("*/*.json")}
    assert set(made) == {"other", "on_moved", "mine", "2_samples"}
    result = json.loads(made["other"].read_text())
    assert (result["own"], result["denoiser"]) == (False, fingerprint(other))
    assert made["other"].with_name("report.html").exists()
    assert json.loads(made["2_samples"].read_text())["samples"] == 2

    monkeypatch.setattr("lidnet_fast.publication.folder.write_onnx", lambda path, _: path.write_bytes(b""))
    card = (publish(run, tmp_path / "published") / "README.md").read_text()
    assert f"| PSNR whole image (dB) | {own['arms']['denoised']['psnr']:.2f} |" in card


def test_the_same_store_by_another_name_is_the_runs(trained_config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    store, run = Path(trained_config.data.store), Path(trained_config.out)
    monkeypatch.chdir(store.parent)
    main(["evaluate", str(run), *CPU, "--store", store.name])
    assert json.loads((run / "metrics.json").read_text())["own"]


def test_a_store_that_has_moved(trained_config: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    run, store = Path(trained_config.out), trained_config.data.store
    config = run / "config.yaml"
    before = config.read_text()
    config.write_text(before.replace(store, f"{store}_before"))
    said = refused(capsys, ["evaluate", str(run), *CPU])
    config.write_text(before)
    assert f"the run's store, {store}_before, isn't there. To fix: say with --store where it is now" in said


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
    table = tmp_path / "mine.csv"
    tables = []
    for content in "ab":
        table.write_text(content)
        tables.append(place_of_results(tmp_path, candidates=table))
    images = [place_of_results(tmp_path, images={"tool": tmp_path / name}) for name in "ab"]
    assert len({*tables, *images}) == 4
    assert images[0].name.startswith("with_tool-")


def test_results_that_would_be_lost(
    trained_config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A call that would leave out what an earlier one found says so, and is refused before it computes anything."""
    run = trained_config.out
    main(["evaluate", run, *CPU, "--scans"])
    before = Path(run, "metrics.json").read_bytes()
    said = refused(capsys, ["evaluate", run, *CPU])
    assert "its results have whole scans and this call's don't. To fix: choose another --out" in said
    assert "samples 6 and this call's have 2" in refused(capsys, ["evaluate", run, "--samples", "2", "--out", run])
    assert Path(run, "metrics.json").read_bytes() == before
    for name, content in (("metrics.json", '{"tables": []}'), ("report.html", ""), ("metrics.json", "no JSON")):
        out = tmp_path / "others"
        out.mkdir()
        (out / name).write_text(content)
        assert f"{name}: would be replaced" in refused(capsys, ["evaluate", run, "--out", str(out)])
        assert [path.name for path in out.iterdir()] == [name]
        shutil.rmtree(out)


@pytest.mark.parametrize(
    ("earlier", "now", "said"),
    [
        ({"samples": 5}, {"samples": 5, "scans": True, "images": {"new": "a"}}, None),
        ({"samples": 5, "scans": False, "images": {}}, {"samples": 5}, None),
        ({"options": {"doses": [0.1], "photons": None}}, {"options": {"doses": (0.1,), "photons": None}}, None),
        ({"samples": 1000}, {"samples": 5}, "its results have samples 1000 and this call's have 5"),
        ({"images": {"a": "x"}}, {"images": {"b": "x"}}, "its results have images a x and this call's don't"),
        ({"options": {"photons": None}}, {"options": {"photons": 1e5}}, "have options photons None and this call's"),
    ],
)
def test_what_replaces_what(tmp_path: Path, earlier: dict, now: dict, said: str | None) -> None:
    """The same call, or one that adds something."""
    (tmp_path / "results.json").write_text(json.dumps(earlier))
    if said is None:
        refuse_to_lose(tmp_path, ["results.json", "page.html"], now, dict)
    else:
        with pytest.raises(InputError, match=said):
            refuse_to_lose(tmp_path, ["results.json", "page.html"], now, dict)
    refuse_to_lose(tmp_path / "new", ["results.json"], now, dict)
    with pytest.raises(InputError, match="is a file, and results go to a folder"):
        refuse_to_lose(tmp_path / "results.json", ["results.json"], now, dict)
