"""Real CT end to end: prepare, train for a moment, evaluate, denoise a slice."""

import json
from pathlib import Path

import pytest
import torch

from lidnet_fast.cli import main
from lidnet_fast.data.store.reader import Store
from lidnet_fast.inference import load_denoiser


@pytest.mark.slow
def test_real_ct_from_dicom_to_denoised_slice(real_ct, tmp_path: Path) -> None:
    store, run = tmp_path / "store", tmp_path / "run"
    sources = [str(source) for source in real_ct.sources]
    # The abdomen tests: the widest body and so the strongest noise of the five.
    splits = tmp_path / "splits.csv"
    tested = {"test": "val", "train": "train", "val": "train"}
    lines = [line.split(",") for line in real_ct.splits.read_text().splitlines()[1:]]
    rows = [f"{patient},{'test' if patient == 'PANCREAS_0001' else tested[split]}" for patient, split in lines]
    splits.write_text("\n".join(["patient_id,split", *rows]))
    tables = f"--boxes {real_ct.boxes} --splits {splits}"
    main(["prepare", *sources, *f"--out {store} {tables} --simulate-dose 0.1".split()])
    options = f"""
        --out {run} --data.store {store} --data.crop 128 --device cpu --ops reference
        --denoiser.name small --detector.name faster_rcnn_small --independent_judge.name retinanet_small
        --detector.steps 6 --denoiser.steps 60 --collaborate.steps 10
        --denoiser.batch_size 2 --denoiser.learning_rate 2e-3
        --evaluation.samples 8 --evaluation.validation_samples 4
    """
    main(["train", *options.split()])
    main(["evaluate", str(run)])

    metrics = json.loads((run / "metrics.json").read_text())["arms"]
    assert list(metrics) == ["low dose", "denoised", "normal dose"]
    assert metrics["denoised"]["psnr"] > metrics["low dose"]["psnr"] + 1
    assert metrics["normal dose"]["rmse_hu"] == 0
    for judge in ("judge", "independent"):
        assert 0 <= metrics["denoised"][judge]["ap50"] <= 1
    assert "<html" in (run / "report.html").read_text()

    slice_hu = torch.from_numpy(Store(store).read(0, 0))
    with torch.no_grad():
        denoised = load_denoiser(run / "collaborate" / "denoiser.pt")(slice_hu[None, None])
    assert denoised.shape == (1, 1, *slice_hu.shape)
    assert (denoised[0, 0] - slice_hu).abs().median() < 50
