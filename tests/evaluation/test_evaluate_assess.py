"""`evaluate --assess`: task-based image quality as further columns."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from lidnet_fast.assessment.options import AssessOptions
from lidnet_fast.cli import main
from lidnet_fast.evaluation import evaluate
from lidnet_fast.trainer.config import RunConfig


def test_columns_of_a_run(trained_config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = evaluate.assessment_of(trained_config)
    assert chosen == replace(AssessOptions(), doses=(0.05,))  # that of the store's simulation
    few = {"realisations": 10, "diameters": (5.0,), "contrasts": (40.0,), "edges": (400.0,)}
    small = replace(chosen, **few, cases=1, case_realisations=1)
    monkeypatch.setattr(evaluate, "assessment_of", lambda config: small)
    main(["evaluate", trained_config.out, "--device", "cpu", "--assess"])
    out = Path(trained_config.out)
    content = json.loads((out / "assessment/assess.json").read_text())
    assert list(content["arms"]) == ["low dose", "denoised"]
    (lesion, *_) = content["lesions"]["low dose"]["0.05"]["lesions"]
    assert lesion["case"].startswith("series phantom-")
    report = (out / "report.html").read_text()
    assert "task: detectability" in report and "worth a dose of" in report
