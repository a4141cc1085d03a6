"""`lidnet-fast compare` as users run it: whole, in shares, killed, on what is there, and over another's folder."""

import csv
import json
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from lidnet_fast.assessment.options import AssessOptions
from lidnet_fast.cli import main
from lidnet_fast.comparison import compare as compare_module
from lidnet_fast.comparison.cells import Plan
from lidnet_fast.comparison.config import Comparison, Matrix
from lidnet_fast.comparison.tables import Table
from lidnet_fast.evaluation.evaluate import evaluate_run
from lidnet_fast.inference import load_denoiser
from lidnet_fast.publication import publish
from lidnet_fast.trainer.config import RunConfig
from tests.comparison.commands import run, start

pytestmark = pytest.mark.slow

ARMS = ["low dose", "mse", "mine", "lidnet", "normal dose"]


def tables(out: Path) -> list[dict]:
    return json.loads((out / "metrics.json").read_text())["tables"]


def test_it_writes_what_it_promises_and_trains_each_network_once(compared: Path, tmp_path: Path) -> None:
    small, tiny = tables(compared)
    assert (small["denoiser"], tiny["denoiser"]) == ("small", "tiny")
    assert list(small["arms"]) == ARMS
    assert {"psnr", "lesion_bias_hu", "judge_ap50", "retina_froc_mean", "cotrained_ap50"} <= set(
        small["arms"]["lidnet"]
    )
    assert small["arms"]["low dose"] == tiny["arms"]["low dose"]
    assert small["arms"]["mse"]["psnr"] != tiny["arms"]["mse"]["psnr"]
    value, low, high = small["arms"]["mse"]["psnr"]
    assert low < value < high
    assert list(small["differences"]) == ["mine minus mse", "lidnet minus mse", "lidnet minus mine"]
    of_seeds = [values["lidnet"]["psnr"] - values["mse"]["psnr"] for values in small["seeds"].values()]
    assert small["differences"]["lidnet minus mse"]["psnr"][0] == pytest.approx(sum(of_seeds) / 2)

    content = json.loads((compared / "metrics.json").read_text())
    assert content["missing"] == []
    assert content["cost"]["phantoms, seed 1, tiny: lidnet"]["collaborate"]["seconds"] > 0
    with (compared / "metrics.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    row = next(row for row in rows if (row["denoiser"], row["arm"], row["minus"]) == ("small", "lidnet", "mse"))
    assert float(row["value"]) == pytest.approx(small["differences"]["lidnet minus mse"][row["metric"]][0])
    report = (compared / "phantoms" / "small" / "report.html").read_text()
    assert all(name in report for name in [*ARMS, "retina", "AP@.5 gained over mse", "phantoms, seed 0: detector"])
    overview = (compared / "report.html").read_text()
    assert all(name in overview for name in ("phantoms, small: lidnet", "phantoms, tiny: mse", "lidnet over mse"))
    # For each seed a detector, a judge and a critic; for each denoiser the warm-up and three arms.
    assert len(list(compared.rglob("logs/part*"))) == 2 * (3 + 2 * (1 + 3))

    cell = compared / "phantoms" / "seed1" / "tiny" / "arms" / "lidnet"
    assert load_denoiser(cell).network is not None
    evaluate_run(cell, out=tmp_path)  # a cell is a run
    evaluated = json.loads((tmp_path / "metrics.json").read_text())["arms"]["denoised"]
    assert evaluated["psnr"] == pytest.approx(tiny["seeds"]["1"]["lidnet"]["psnr"])
    card = (publish(cell, tmp_path / "published") / "README.md").read_text()
    assert "this model is *lidnet*" in card and "|  | lidnet | low dose | mine | mse | normal dose |" in card
    for column, metric in (("PSNR whole image (dB)", "psnr"), ("AP@.5 retina", "retina_ap50")):
        (line,) = (line for line in card.splitlines() if line.startswith(f"| {column} |"))
        shown = [float(cell.split()[0]) for cell in line.split("|")[2:-1]]
        of_arm = tiny["seeds"]["1"]
        arms = ("lidnet", "low dose", "mine", "mse", "normal dose")
        assert shown == pytest.approx([of_arm[arm][metric] for arm in arms], abs=0.006)
    assert evaluated["cotrained"]["ap50"] == pytest.approx(tiny["seeds"]["1"]["lidnet"]["cotrained_ap50"], abs=1e-6)


def test_processes_share_a_folder_and_resume_each_others_cells(compared: Path, config: Path, tmp_path: Path) -> None:
    out = tmp_path / "shared"
    first = start(config, out, "--cells", "1/2")
    while first.poll() is None and not any(out.glob("phantoms/seed0/detector/*/last.ckpt")):
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    both = [start(config, out, "--cells", share) for share in ("1/2", "2/2", "1/2")]
    for process in both:
        said = process.communicate()
        assert process.returncode == 0, said
    assert not (out / "metrics.json").exists()
    collected = run(config, out, "--collect")
    assert collected.returncode == 0
    assert tables(out) == tables(compared)
    parts = [path.name for path in out.rglob("logs/part*")]
    assert parts.count("part0") == len(list(compared.rglob("logs/part0")))
    assert parts.count("part1") <= 1  # what was killed went on, if it had a checkpoint, and nothing was done twice


def test_tables_are_made_of_what_is_there(compared: Path, config: Path, tmp_path: Path) -> None:
    out = tmp_path / "part"
    shutil.copytree(compared, out)
    arms = out / "phantoms" / "seed1" / "small" / "arms"
    shutil.rmtree(arms / "mine")
    for seed in (0, 1):
        shutil.rmtree(out / "phantoms" / f"seed{seed}" / "tiny" / "arms" / "mine")
    done = run(config, out, "--collect")
    assert done.returncode == 0
    missing = ["phantoms, seed 0, tiny: mine", "phantoms, seed 1, small: mine", "phantoms, seed 1, tiny: mine"]
    assert [line for line in done.stdout.splitlines() if line.startswith("missing: ")] == [
        f"missing: {name}" for name in missing
    ]
    assert json.loads((out / "metrics.json").read_text())["missing"] == missing
    small, tiny = tables(out)
    assert list(small["seeds"]) == ["0"]
    assert list(small["arms"]) == ARMS
    assert list(tiny["seeds"]) == ["0", "1"]
    assert list(tiny["arms"]) == [arm for arm in ARMS if arm != "mine"]
    assert missing[1] in (out / "phantoms" / "small" / "report.html").read_text()


def test_cells_of_another_configuration_are_refused(compared: Path, config: Path, tmp_path: Path) -> None:
    out = tmp_path / "other"
    shutil.copytree(compared, out)
    before = (out / "compare.yaml").read_text()
    for options in (["--collaborate.steps", "9"], ["--arms", "{mse: , lidnet: {collaborate: {detector_steps: 0}}}"]):
        done = run(config, out, *options)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.count("\n") == 1
        assert "holds a run with collaborate." in done.stderr
        assert f"--config {out / 'compare.yaml'} --out {out}` goes on with it" in done.stderr
    assert (out / "compare.yaml").read_text() == before
    main(["compare", "--config", str(out / "compare.yaml"), "--out", str(out), "--collect"])  # it does
    assert yaml.safe_load(before)["arms"]["mse"]["collaborate"]["objective"]["roi_weight"] == 1.0
    assert (out / "compare.yaml").read_text() == before


def test_a_judge_can_be_added_later(compared: Path, config: Path, tmp_path: Path) -> None:
    out = tmp_path / "grown"
    shutil.copytree(compared, out)
    judges = "{retina: {name: retinanet_small}, faster: {name: faster_rcnn_small}}"
    options = ["--judges", judges, "--seeds", "[0]", "--denoisers", "{small: {options: {channels: 8}}}"]
    done = run(config, out, *options)
    assert done.returncode == 0, done.stderr
    (small,) = tables(out)
    assert {"retina_ap50", "faster_ap50"} <= set(small["arms"]["lidnet"])
    assert len(list(out.rglob("logs/part*"))) == len(list(compared.rglob("logs/part*"))) + 1


def test_bounds_train_judges_on_the_arms_images(compared: Path, config: Path, tmp_path: Path) -> None:
    out = tmp_path / "bound"
    shutil.copytree(compared, out)
    options = ["--bound", "true", "--seeds", "[0]", "--arms", "{mse: , lidnet: }", "--judges", "{}"]
    done = run(config, out, *options, "--denoisers", "{small: {options: {channels: 8}}}")
    assert done.returncode == 0, done.stderr
    (small,) = tables(out)
    for arm in ("mse", "lidnet"):
        assert {"judge_scratch_ap50", "judge_tuned_ap50"} <= set(small["arms"][arm])
    assert "judge_closed" in small["arms"]["lidnet"]
    assert len(list(out.rglob("logs/part*"))) == len(list(compared.rglob("logs/part*"))) + 2 * 2
    assert "frozen judge, bound" in (out / "report.html").read_text()


@pytest.mark.parametrize(
    ("study", "contrasts"), [("chest", None), ("liver", (-15, -25, -40, -60)), ("head", (8, 12, 18, 27))]
)
def test_lesions_put_into_a_study_are_of_its_kind(
    study: str, contrasts: tuple[float, ...] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[AssessOptions] = []

    def assess(models: list[str], out: Path, options: AssessOptions, **_: object) -> None:
        chosen.append(options)

    monkeypatch.setattr(compare_module, "assess_models", assess)
    monkeypatch.setattr(compare_module, "assessment_of", lambda run: AssessOptions())
    comparison = Comparison(RunConfig(), Matrix(studies=[study], seeds=[3]))
    plan = Plan(comparison, tmp_path / "compared")
    table = Table(study, plan.cells[0].denoiser, [3], {arm: {} for arm in comparison.arms}, {}, {})
    compare_module._assessment(plan, table, seed=3)
    assert [(options.seed, options.lesion_contrasts) for options in chosen] == [(3, contrasts)]


def test_task_based_columns(compared: Path, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Means over seeds; what is there isn't assessed again, unless with other options."""
    out = tmp_path / "assessed"
    shutil.copytree(compared, out)
    few = {"realisations": 10, "diameters": (5.0,), "contrasts": (40.0,), "edges": (400.0,)}
    options = AssessOptions(doses=(0.05,), **few, cases=1, case_realisations=1)
    monkeypatch.setattr(compare_module, "assessment_of", lambda run: options)
    command = ["compare", "--config", str(config), "--out", str(out), "--collect", "--assess"]
    main(command)
    for table in tables(out):
        page = out / "phantoms" / table["denoiser"] / "report.html"
        assert "worth a dose of" in page.read_text()
        of_seeds = [
            json.loads(
                (out / "phantoms" / f"seed{seed}" / table["denoiser"] / "assessment" / "assess.json").read_text()
            )
            for seed in (0, 1)
        ]
        assert [content["options"]["seed"] for content in of_seeds] == [0, 1]
        assert all(list(content["arms"]) == ARMS[:-1] for content in of_seeds)
        one, other = (content["uniform"]["mine"]["0.05"]["noise"]["magnitude_hu"][0] for content in of_seeds)
        value, _, high = table["arms"]["mine"]["task_noise"]
        assert value == pytest.approx((one + other) / 2)
        assert high - value == pytest.approx(
            12.706 * abs(one - other) / 2, rel=1e-3
        )  # Student's t, 1 degree of freedom
        assert table["arms"]["low dose"]["task_dose"] == [0.05, 0.05, 0.05]
    before = tables(out)

    def again(*_: object, **__: object) -> None:
        raise RuntimeError("assessed again")

    monkeypatch.setattr(compare_module, "assess_models", again)
    main(command)
    assert tables(out) == before
    monkeypatch.setattr(compare_module, "assessment_of", lambda run: replace(options, case_realisations=2))
    with pytest.raises(RuntimeError, match="assessed again"):
        main(command)
