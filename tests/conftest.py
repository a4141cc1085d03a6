"""Fixtures for every folder of tests."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from filelock import FileLock

# Without a GPU, Triton kernels run in Triton's interpreter, or with LIDNET_FAST_TRITON=ptx on the executor of their PTX
# (tests/kernels/ptx); that is decided when triton is imported.
if not torch.cuda.is_available() and os.environ.get("LIDNET_FAST_TRITON") != "ptx":
    os.environ["TRITON_INTERPRET"] = "1"


Once = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Once:
    """Make a folder that all processes of this session share: by the first that asks for it, while others wait."""
    folder = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):  # pytest-xdist's workers have folders of their own in the session's
        folder = folder.parent

    def made(name: str, make: Callable[[Path], object]) -> Path:
        path = folder / name
        with FileLock(folder / f"{name}.lock"):
            if not path.exists():
                unfinished = folder / f"{name}.unfinished"
                make(unfinished)
                unfinished.rename(path)
        return path

    return made


@dataclass(frozen=True)
class RealCT:
    """Real CT of five patients, one slice each, with boxes written by hand: the input of ``lidnet-fast prepare``."""

    sources: list[Path]
    boxes: Path
    splits: Path


REAL_CT = {
    # folder: (file, patient, split, series, boxes)
    "abdomen": (  # JPEG 2000 lossless, 512 x 512; boxes: both kidneys
        "explicit_VR-UN.dcm",
        "PANCREAS_0001",
        "train",
        "1.2.826.0.1.3680043.2.1125.1.68878959984837726447916707551399667",
        [(176, 156, 227, 221), (294, 162, 342, 223)],
    ),
    "spine": (  # JPEG lossless, 512 x 512; box: the vertebral body
        "bad_sequence.dcm",
        "b2cbe507f250",
        "train",
        "dbf60361338b6cb0d8add6f6ea34276642da945f02b34613f09188618e7d4d7b",
        [(160, 165, 300, 260)],
    ),
    "head": (  # explicit little endian, 512 x 512, padded with -2000; box: in the brain
        "693_UNCR.dcm",
        "CQ500-CT-310",
        "train",
        "1.2.276.0.7230010.3.1.3.296485376.1.1521713419.1802493",
        [(200, 200, 320, 320)],
    ),
    "skull_base": (  # JPEG 2000 lossless, 512 x 512, tilted gantry; box: the cerebellum
        "J2K_pixelrep_mismatch.dcm",
        "JXD191021006",
        "val",
        "1.2.392.200036.9123.100.11.15002200303521616157144550003340146",
        [(190, 300, 320, 380)],
    ),
    "chest_crop": (  # explicit little endian, 128 x 128; box: the vertebral body
        "CT_small.dcm",
        "1CT1",
        "test",
        "1.3.6.1.4.1.5962.1.3.1.1.20040119072730.12322",
        [(42, 7, 79, 44)],
    ),
}


@pytest.fixture
def real_ct(tmp_path) -> RealCT:
    """Real CT from the packages pydicom and pydicom-data, copied into one folder per patient."""
    from pydicom.data import get_testdata_file

    root = tmp_path / "real_ct"
    box_lines, split_lines = ["series_uid,slice,x1,y1,x2,y2"], ["patient_id,split"]
    for folder, (name, patient, split, series, boxes) in REAL_CT.items():
        (root / folder).mkdir(parents=True)
        shutil.copy(get_testdata_file(name, download=False), root / folder / name)
        box_lines += [",".join(str(value) for value in (series, 0, *box)) for box in boxes]
        split_lines.append(f"{patient},{split}")
    (root / "boxes.csv").write_text("\n".join(box_lines) + "\n")
    (root / "splits.csv").write_text("\n".join(split_lines) + "\n")
    return RealCT([root / folder for folder in REAL_CT], root / "boxes.csv", root / "splits.csv")
