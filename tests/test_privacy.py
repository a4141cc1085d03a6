"""The table of docs/privacy.md: each identifier is looked for in what the commands really write."""

import gzip
import re
import socket
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813

from lidnet_fast.cli import main
from tests.conftest import Once
from tests.data.conftest import write_series

__all__ = ["write_series"]

TABLE = Path(__file__).parents[1] / "docs" / "privacy.md"
COLUMNS = ("PatientID", "PatientName", "series' UID", "paths", "host name")
PATIENTS = {"4711-anna": "train", "4711-bert": "val", "4711-carla": "test"}
HOST = "ct-archive-7"
SMALL = [
    *("--device", "cpu", "--data.crop", "64", "--denoiser.name", "small", "--detector.name", "faster_rcnn_small"),
    *("--independent_judge", "null", "--detector.steps", "1", "--detector.batch_size", "1"),
    *("--denoiser.steps", "1", "--denoiser.batch_size", "1", "--collaborate.steps", "1"),
    *("--collaborate.batch_size", "1", "--evaluation.samples", "2", "--evaluation.validation_samples", "2"),
    *("--collaborate.objective.extractor_weights", "{root}/weights.pt"),
]

# Output, as the table names it -> where it lies.
OUTPUTS = {
    "`prepare`: the store": ["store"],
    "`prepare --pseudonymise`: the store": ["pseudonymous"],
    "`prepare --report`": ["report.csv"],
    "`prepare --pseudonym-table`": ["who.csv"],
    "`export`: NIfTI": ["nifti/low_dose", "nifti/normal_dose"],
    "`export --format dicom`: DICOM": ["dicom/low_dose", "dicom/normal_dose"],
    "`export`: its store": ["nifti/store", "dicom/store"],
    "`export --pseudonymise`: all of it": ["nifti_pseudonymous", "dicom_pseudonymous"],
    "`train`: `config.yaml`": ["run/config.yaml"],
    "`train`: TensorBoard's `events.out.tfevents.*`": ["run/**/events.out.tfevents.*"],
    "`train`: `metrics.csv`, `hparams.yaml`, `cost.json`": [
        *("run/*/logs/**/metrics.csv", "run/**/hparams.yaml", "run/**/cost.json")
    ],
    "`train --loggers wandb`: what is sent, `tracking.json`": [
        *("run/*/wandb/*/*.wandb", "run/*/wandb/*/files/*", "run/*/tracking.json")
    ],
    "`train --loggers wandb`: wandb's own `logs`": ["run/*/wandb/*/logs/*"],
    "`train`: model files (`denoiser.pt`, `detector.pt`)": ["run/**/*.pt"],
    "`publish`: all of it": ["published"],
    "`evaluate`: `metrics.json`": ["run/evaluated/*/metrics.json"],
    "`evaluate`: `report.html`": ["run/evaluated/*/report.html"],
    "`compare`: `compare.yaml`, `report.html`": ["compared/compare.yaml", "compared/report.html"],
    "`compare`: `metrics.json`, `metrics.csv`, records of cells (`*.npz`)": [
        *("compared/metrics.json", "compared/metrics.csv", "compared/**/*.npz")
    ],
    "`assess --store`: `assess.json`, `assess.html`": ["assessed/assess.json", "assessed/assess.html"],
    "`assess --store`: `noise_power.npz`": ["assessed/noise_power.npz"],
    "`assess --store --export`": ["scans"],
    "`denoise`: DICOM": ["denoised/*/*/*.dcm"],
    "`denoise`: volumes": ["denoised/volume.nii.gz", "denoised/volume.mhd"],
    "`denoise.json`": ["denoised/denoise.json"],
    "`detect`: JSON, `candidates.csv`, `boxes.csv`": [
        *("detected/*/1.*.json", "detected/volume.*.json", "detected/candidates.csv", "detected/boxes.csv")
    ],
    "`detect`: DICOM SR": ["detected/*/*.dcm"],
    "`detect.json`": ["detected/detect.json"],
}


def body(seed: int) -> np.ndarray:
    """Soft tissue in air, with noise: int16 [2, 64, 64], HU."""
    y, x = np.mgrid[:64, :64] - 31.5
    tissue = np.where(np.hypot(y, x) < 30, 40, -1000)
    return (tissue + np.random.default_rng(seed).integers(-20, 21, (2, 64, 64))).astype(np.int16)


def make_everything(root: Path, write_series) -> None:
    """Run every command that writes on studies of three made-up patients."""
    rows = ["series_uid,slice,x1,y1,x2,y2"]
    for number, patient in enumerate(PATIENTS):

        def edit(_, dataset, patient=patient):
            dataset.PatientName, dataset.StudyInstanceUID = f"Doe^{patient[5:]}", "1.2.4714"

        for name, seed in (("in", 0), ("low", 1)):
            where = {"origin": (0.0, 0.0, 10.0 * number), "series_uid": f"1.2.4712.{seed}.{number}"}
            write_series(root / name / str(number), body(seed), patient_id=patient, edit=edit, **where)
        rows += [f"1.2.4712.0.{number},{z},10,12,30,34" for z in range(2)]
    # Without low dose, it is rejected.
    where = {"origin": (0.0, 0.0, 99.0), "series_uid": "1.2.4712.2.0"}
    write_series(root / "in" / "3", body(0), patient_id="4711-anna", edit=edit, **where)
    (root / "boxes.csv").write_text("\n".join(rows))
    (root / "splits.csv").write_text("\n".join(["patient_id,split", *map(",".join, PATIENTS.items())]))
    (root / "key").touch(0o600)
    (root / "key").write_bytes(bytes(range(32)))

    def run(command: str, *arguments: str) -> None:
        main([word.replace("{root}", str(root)) for word in (*command.split(), *arguments)])

    study = "prepare {root}/in --low-dose {root}/low --boxes {root}/boxes.csv --splits {root}/splits.csv --workers 1"
    with pytest.raises(SystemExit, match="2"):  # of the rejected one
        run(f"{study} --out {{root}}/store --report {{root}}/report.csv")
    with pytest.raises(SystemExit, match="2"):
        run(f"{study} --out {{root}}/pseudonymous --pseudonymise {{root}}/key --pseudonym-table {{root}}/who.csv")
    for format in ("nifti", "dicom"):
        export = f"export {{root}}/store --format {format}"
        run(f"{export} {{root}}/{format}")
        run(f"{export} {{root}}/{format}_pseudonymous --pseudonymise {{root}}/key")
    run("train --data.store {root}/store --out {root}/run --loggers tensorboard wandb", *SMALL)
    run("evaluate {root}/run --device cpu --images other={root}/nifti/low_dose")
    run("publish {root}/run {root}/published")
    stores = "{mine: {root}/store}"
    run(
        "compare --out {root}/compared --arms",
        "{mse: null, lidnet: null}",
        "--stores",
        stores,
        *SMALL,
        "--denoiser.options",
        "{}",
    )
    assess = "assess --store {root}/store --realisations 10 --doses 0.5 --cases 1 --case-realisations 1 --device cpu"
    run(f"{assess} --model {{root}}/run --out {{root}}/assessed")
    run(f"{assess} --export {{root}}/scans")
    (root / "in").rename(root / "studies")
    for suffix in (".nii.gz", ".mhd"):
        image = sitk.GetImageFromArray(body(0))
        image.SetMetaData("ITK_FileNotes", "4711-anna")
        sitk.WriteImage(image, str(root / "studies" / f"volume{suffix}"))
    for command, out in (("denoise", "denoised"), ("detect", "detected")):
        run(f"{command} {{root}}/studies {{root}}/{out} --model {{root}}/run --device cpu")


@pytest.fixture
def everything(once: Once, write_series, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(socket, "gethostname", lambda: HOST)
    monkeypatch.setenv("WANDB_MODE", "offline")
    return once("somewhere_4713", lambda root: make_everything(root, write_series))


def rows() -> Iterator[tuple[str, list[bool]]]:
    lines = re.findall(r"^\| (.*) \|$", TABLE.read_text(encoding="utf-8"), re.M)
    heading, _, *cells = (line.split(" | ") for line in lines)
    assert heading == ["output", *COLUMNS]
    for output, *held in cells:
        assert set(held) <= {"yes", "–"}
        yield output, [cell == "yes" for cell in held]


def content(path: Path) -> bytes:
    if path.suffix == ".npz":
        with zipfile.ZipFile(path) as arrays:
            return b"".join(arrays.read(name) for name in arrays.namelist())
    return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()


def test_the_table_names_every_output() -> None:
    assert [output for output, _ in rows()] == list(OUTPUTS)


@pytest.mark.slow
@pytest.mark.parametrize(("output", "held"), list(rows()))
def test_outputs_hold_what_the_table_says(everything: Path, output: str, held: list[bool]) -> None:
    found = [path for pattern in OUTPUTS[output] for path in everything.glob(pattern)]
    files = [file for path in found for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file()]
    assert len(files) >= len(OUTPUTS[output])
    written = [str(file.relative_to(everything)).encode() + b"\0" + content(file) for file in files]
    looked_for = (b"4711-", b"Doe^", b"1.2.4712.", str(everything).encode(), HOST.encode())
    # NumPy keeps text in four bytes a letter.
    present = [
        any(name in text or name.decode().encode("utf-32-le") in text for text in written) for name in looked_for
    ]
    assert dict(zip(COLUMNS, present, strict=True)) == dict(zip(COLUMNS, held, strict=True))
