"""Every command and Python example of README.md and docs/ runs as it stands, or says here why not."""

import csv
import pydoc
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from PIL import Image

import lidnet_fast.extractors
from lidnet_fast.cli import COMMANDS, main
from lidnet_fast.data.prepare.splits import split_of
from lidnet_fast.data.store.index import SeriesInfo
from lidnet_fast.data.store.reader import Store
from lidnet_fast.evaluation.export import export
from lidnet_fast.inference import load_denoiser
from lidnet_fast.models.denoisers import SmallCNN
from lidnet_fast.models.files import save_network
from lidnet_fast.models.registry import NetworkConfig
from lidnet_fast.models.windowing import HUWindow
from tests.data.annotations.test_annotations import message, outline
from tests.data.conftest import make_hu, write_series
from tests.data.formats.test_deeplesion import HEADER, line

__all__ = ["make_hu", "write_series"]

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ELSEWHERE = {
    "make test": "what runs this",
    "pip install": "tests/packaging/ installs in environments of its own",
    "make demo": "minutes; it is a comparison",
    "lidnet-fast compare": "minutes to days; tests/comparison/ runs smaller ones",
    "pytest --benchmark": "half an hour; tests/test_benchmark_option.py runs a smaller one",
    "python -m benches.profile_": "minutes to hours, and their figures need a quiet machine",
    "python benches/profile_": "likewise",
    "torchrun --nnodes 2": "takes two machines; tests/trainer/test_ddp.py starts torchrun on one",
    "srun": "takes SLURM",
    "aws s3 cp": "takes an account; tests/data/store/test_backends.py reads such a copy from a server of its own",
    "my_tool": "stands for another tool",
}
SMALL = [
    *("--device", "cpu", "--data.crop", "64", "--denoiser.name", "small", "--detector.name", "faster_rcnn_small"),
    *("--independent_judge", "null", "--detector.steps", "1", "--detector.batch_size", "1"),
    *("--denoiser.steps", "1", "--denoiser.batch_size", "1", "--collaborate.steps", "1"),
    *("--collaborate.batch_size", "1", "--evaluation.samples", "2", "--evaluation.validation_samples", "2"),
]
ASSESSED = ["--device", "cpu", "--realisations", "10", "--doses", "0.5", "--cases", "1", "--diameters", "5"]
SHORTENED = {"train": SMALL, "bench": [*SMALL, "--seconds", "1"], "evaluate": ["--samples", "2"], "assess": ASSESSED}
"""Options that are added to a command so that it takes seconds."""
STAND_FOR = {"STUDIES...": "STUDIES", "IN": "STUDIES", "RUN": "runs/measured", "STORE": "measured"}
"""Names in the documents that stand for a path of the reader's."""


def commands(document: Path) -> Iterator[str]:
    """The indented lines that begin like a command, those that go on joined."""
    text = document.read_text().replace("\\\n", " ")
    for found in re.findall(r"^    (?!\s)(.*)$", text, re.M):
        if found.startswith("lidnet-fast ") or any(found.startswith(beginning) for beginning in ELSEWHERE):
            yield found.partition(" #")[0]
        else:
            assert not re.match(r"(make|pip|pytest|python|torchrun|srun|aws) ", found), f"{document.name}: {found}"


def words(command: str) -> list[str]:
    """The words of a command as a shell would make them, with the reader's paths filled in."""
    filled = [STAND_FOR.get(word, word).replace("=/data/", "=data/") for word in shlex.split(command)]
    return [path for word in filled for path in (sorted(map(str, Path().glob(word))) if "*" in word else [word])]


def run(command: str) -> None:
    program, name, *rest = words(command)
    assert program == "lidnet-fast"
    try:
        main([name, *rest, *([] if "--candidates" in rest else SHORTENED.get(name, []))])
    except SystemExit as stop:
        assert not stop.code, f"{command} ended with exit status {stop.code}"


def boxes_of(store: str) -> int:
    opened = Store(store)
    return sum(len(opened.boxes(n, z)) for n, info in enumerate(opened.series) for z in range(info.shape[0]))


def patient_of(split: str, beginning: str = "") -> str:
    """The first PatientID, of those that begin so, that `prepare` draws into the split."""
    return next(name for n in range(999) if split_of(name := f"{beginning}{n}", 0, 0.1, 0.1) == split)


@pytest.mark.slow
def test_from_studies_to_denoised_studies(tmp_path, monkeypatch, write_series, make_hu):
    """README.md, docs/evaluate.md, docs/denoise.md and docs/detect.md, one after the other in one folder."""
    monkeypatch.chdir(tmp_path)
    rows = []
    for n, split in enumerate(("train", "val", "test")):
        patient = patient_of(split)
        write_series(Path("STUDIES", patient), make_hu(2), series_uid=f"1.2.{n}", patient_id=patient)
        write_series(Path("LOW", patient), make_hu(2, seed=1), series_uid=f"1.3.{n}", patient_id=patient)
        rows += [(f"1.2.{n}", z, 10, 12, 30, 34) for z in range(2)]
    with Path("boxes.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("series_uid", "slice", "x1", "y1", "x2", "y2"), *rows])

    ran = [command for command in commands(ROOT / "README.md") if command.startswith("lidnet-fast ")]
    for command in ran:
        run(command)
    assert [command.split()[1] for command in ran] == ["prepare", "bench", "train", "evaluate", "denoise", "publish"]
    assert boxes_of("store") == 6
    assert len(list(Path("DENOISED").rglob("*.dcm"))) == 6

    run("lidnet-fast prepare STUDIES --low-dose LOW --boxes boxes.csv --out measured")
    run("lidnet-fast train --data.store measured --out runs/measured")
    export(Path("measured"), Path("exported"))
    for other in ("data/bm3d", "data/vendor", "results"):
        Path(other).parent.mkdir(exist_ok=True)
        Path(other).symlink_to(Path("exported/low_dose").resolve())
    (volume,) = Path("exported/low_dose").iterdir()
    sitk.WriteImage(sitk.ReadImage(str(volume)), "ct.mhd")
    for name, column in (("candidates", "probability"), ("annotations", "diameter_mm")):
        Path(f"{name}.csv").write_text(f"seriesuid,coordX,coordY,coordZ,{column}\n1.2.2,0,0,100,0.5\n")
    shutil.copy("annotations.csv", "annotations_excluded.csv")
    Path("seriesuids.csv").write_text("1.2.2\n")
    for command in commands(ROOT / "docs" / "evaluate.md"):
        if command.startswith("lidnet-fast "):
            run(command)
    assert Path("runs/comparison/report.html").exists()
    inline = re.findall(r"`(lidnet-fast denoise .*?)`", (ROOT / "docs" / "denoise.md").read_text())
    for command in (*commands(ROOT / "docs" / "denoise.md"), *inline):
        run(command.replace(" OUT", " OUT2"))
    assert sitk.ReadImage("ct_denoised.nii.gz").GetSize() == (64, 64, 2)
    for command in commands(ROOT / "docs" / "detect.md"):
        run(command.replace(" OUT", " LESIONS"))
    assert len(list(Path("LESIONS2").rglob("*.dcm"))) == 3


@pytest.mark.slow
def test_publishing(tmp_path, monkeypatch, write_series, make_hu):
    monkeypatch.chdir(tmp_path)
    write_series(Path("STUDIES"), make_hu(2))
    denoiser = Path(STAND_FOR["RUN"], "collaborate/denoiser.pt")
    save_network(denoiser, "denoiser", SmallCNN(), NetworkConfig("small"), HUWindow(), {})
    for command in commands(ROOT / "docs" / "publish.md"):
        run(command)
    (example,) = python_examples(ROOT / "docs" / "publish.md")
    scope: dict = {"low_dose_hu": np.zeros((3, 1, 40, 50), np.float32)}
    exec(example, scope)
    assert scope["denoised"].shape == (3, 1, 40, 50)


def write_data_sets(write_series, make_hu) -> None:
    """The smallest that docs/datasets.md's commands find something in, in the published layouts."""
    uid = patient_of("train", "1.3.6.1.4.1.14519.5.2.1.6279.6001.")
    luna16 = Path("LUNA16/subset0")
    luna16.mkdir(parents=True)
    image = sitk.GetImageFromArray(make_hu())
    image.SetSpacing((0.7, 0.7, 2.5))
    sitk.WriteImage(image, str(luna16 / f"{uid}.mhd"))
    Path("LUNA16/annotations.csv").write_text(f"seriesuid,coordX,coordY,coordZ,diameter_mm\n{uid},20,22,5,9\n")

    write_series(Path("manifest-1600709154662/LIDC-IDRI/LIDC-IDRI-0001"), make_hu(), series_uid=uid)
    xml = Path("LIDC-XML-only/tcia-lidc-xml/157/158.xml")
    xml.parent.mkdir(parents=True)
    nodule = [outline(10, 12, 30, 34, 102.5, "")]
    xml.write_text(message(uid, [nodule], [nodule]))

    images = Path("DeepLesion/Images_png/000001_01_01")
    images.mkdir(parents=True)
    for number, values in enumerate(make_hu(), 103):
        Image.fromarray((values.astype(np.int32) + 32768).astype(np.uint16)).save(images / f"{number}.png")
    Path("DeepLesion/DL_info.csv").write_text(f"{HEADER}\n{line('000001_01_01', 105, '10.5, 20.25, 30, 40')}\n")

    for dose in ("Full", "Low"):

        def describe(z, dataset, dose=dose):
            dataset.SeriesDescription = f"{dose} dose images"

        folder = Path("LDCT-and-Projection-data/C002/12-23-2021", dose)
        write_series(folder, make_hu(), series_uid=f"1.2.{len(dose)}", patient_id="C002", edit=describe)

    write_series(Path("HOSPITAL/2024/anna"), make_hu(), series_uid="1.2.3")
    Path("boxes.csv").write_text("series_uid,slice,x1,y1,x2,y2\n1.2.3,1,10,12,30,34\n")


def test_data_sets(tmp_path, monkeypatch, write_series, make_hu):
    monkeypatch.chdir(tmp_path)
    write_data_sets(write_series, make_hu)
    found = {}
    for command in commands(ROOT / "docs" / "datasets.md"):
        run(command)
        store = shlex.split(command)[-1]
        found[store] = boxes_of(store)
    assert found.pop("stores/ldct") == 0
    assert list(found) == ["stores/luna16", "stores/lidc", "stores/deeplesion", "stores/hospital"]
    assert min(found.values()) >= 1


def test_pseudonyms(tmp_path, monkeypatch, write_series, make_hu):
    monkeypatch.chdir(tmp_path)
    write_series(Path("STUDIES"), make_hu(2), patient_id=patient_of("train"))
    Path("key").touch(0o600)
    Path("key").write_bytes(bytes(32))
    (command,) = commands(ROOT / "docs" / "privacy.md")
    run(f"{command} --test-fraction 0 --val-fraction 0")
    assert Store("store").pseudonyms is not None


def test_assessment(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my_tools").mkdir()
    Path("my_tools/bm3d.py").write_text("def denoise(images):\n    return images\n")
    denoiser = Path(STAND_FOR["RUN"], "collaborate/denoiser.pt")
    save_network(denoiser, "denoiser", SmallCNN(), NetworkConfig("small"), HUWindow(), {})
    for command in commands(ROOT / "docs" / "assess.md"):
        if command.startswith("lidnet-fast "):
            run(command)
        else:
            Path("results").symlink_to("scans")
    assert Path("runs/assess/assess.html").exists()


def test_python_examples_of_the_assessment():
    (example,) = python_examples(ROOT / "docs" / "assess.md")
    scope: dict = {}
    exec(example, scope)
    assert scope["spectrum"].magnitude == pytest.approx(20, rel=0.02)
    # Four by four pixels of 10 HU in 20 HU of white noise: 2 for the ideal observer.
    assert scope["found"].low < 2 < scope["found"].high


def test_no_command_is_left_out():
    """A new document with commands must be run by one of the tests above."""
    ran = {command for document in DOCUMENTS for command in commands(document)}
    elsewhere = tuple(ELSEWHERE)
    ours = {
        document.name
        for document in DOCUMENTS
        for command in commands(document)
        if command.startswith("lidnet-fast ") and not command.startswith(elsewhere)
    }
    assert ours == {
        "README.md",
        "assess.md",
        "datasets.md",
        "denoise.md",
        "detect.md",
        "evaluate.md",
        "privacy.md",
        "publish.md",
    }
    for beginning in ELSEWHERE:
        assert any(command.startswith(beginning) for command in ran), f"no document has {beginning}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_options_exist(document, capsys):
    """Those of commands within sentences, too."""
    for name, options in re.findall(r"lidnet-fast (\w+)([^`\n#]*)", document.read_text().replace("\\\n", " ")):
        assert name in COMMANDS
        with pytest.raises(SystemExit, match="0"):
            main([name, "--help", "all"])
        offered = set(re.findall(r"--[\w.-]+", capsys.readouterr().out))
        assert set(re.findall(r"--[\w.-]+", options)) <= offered


def python_examples(document: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", document.read_text(), re.S)


def test_the_readme_shows_the_example():
    example = (ROOT / "examples" / "your_own_loop.py").read_text()
    assert python_examples(ROOT / "README.md")[0] == example


def test_your_own_loop(tmp_path):
    """In a fresh process, with a small extractor in the place of VGG19."""
    example = (ROOT / "examples" / "your_own_loop.py").read_text()
    short = example.replace('load_network("vgg19"', 'load_network("squeezenet1_1"').replace('"relu3_4"', '"features.3"')
    assert example.count("vgg19") - short.count("vgg19") == 1 == example.count('"relu3_4"')
    check = "assert denoised_volume.shape == low_dose.shape and boxes[0].shape[1] == 4\n"
    check += "assert abs(denoised_volume - normal_dose).mean() < abs(low_dose - normal_dose).mean()\n"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", short + check], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("epoch 0: l1 0.0")
    assert load_denoiser(tmp_path / "denoiser.pt").window.low == -1000


def test_links_lead_to_files():
    for document in [*DOCUMENTS, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]:
        for target in re.findall(r"\]\((?!https?:)([^)#\s]+)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_every_page_has_its_place():
    places = (ROOT / "mkdocs.yml").read_text()
    assert not [page.name for page in (ROOT / "docs").glob("*.md") if page.name not in places]


def test_the_reference_has_the_public_names():
    listed = re.findall(r"^::: (lidnet_fast[\w.]+)$", (ROOT / "docs" / "reference.md").read_text(), re.M)
    found = [pydoc.locate(name) for name in listed]
    assert None not in found
    for module in (lidnet_fast, lidnet_fast.extractors):
        assert not [name for name in module.__all__ if getattr(module, name) not in found]


def test_help_begins_with_a_table_of_the_names():
    named = re.findall(r"\w+", " ".join(re.findall(r"^    (\S.*?)  ", lidnet_fast.__doc__, re.M)))
    assert sorted(named) == sorted(lidnet_fast.__all__)


@pytest.mark.slow
def test_the_reference_builds(tmp_path):
    for builder in ("mkdocs", "mkdocstrings"):
        pytest.importorskip(builder, reason=f"{builder} isn't installed: pip install --group docs")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    page = (tmp_path / "reference.html").read_text()
    assert not [name for name in lidnet_fast.__all__ if f'id="lidnet_fast.{name}"' not in page]
    assert ":::" not in page


def test_the_readme_matches_torchvision():
    exec(python_examples(ROOT / "README.md")[1], {})


def test_python_examples_of_the_losses():
    """One after the other, as a reader would type them."""
    examples = python_examples(ROOT / "docs" / "losses.md")
    assert len(examples) == 3
    scope: dict = {}
    for example in examples:
        exec(example, scope)
    assert scope["value"].requires_grad
    assert scope["features"].grad.abs().sum() > 0
    assert scope["denoised"].grad.abs().sum() > 0


def test_the_python_example_of_the_studies(tmp_path):
    """As a script, since it starts processes."""
    (example,) = python_examples(ROOT / "docs" / "studies.md")
    (tmp_path / "example.py").write_text(example)
    done = subprocess.run([sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [info.split for info in Store(tmp_path / "small_liver").series] == ["train", "train", "test"]


def test_python_examples_of_the_store(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    reading, writing = python_examples(ROOT / "docs" / "store.md")
    geometry = {"spacing": (2.5, 0.7, 0.8), "origin": (0, 0, 0), "orientation": (1, 0, 0, 0, 1, 0)}
    series = SeriesInfo("1.2.3", "anna", "train", shape=(121, 264, 224), **geometry)
    volume = np.zeros(series.shape, np.int16)
    scope: dict = {"my_series": lambda: [(series, volume, np.array([[120, 1, 2, 30, 40.5]]))]}
    exec(writing, scope)
    exec(reading, scope)
    assert scope["store"].boxes(0, z=120).tolist() == [[1, 2, 30, 40.5]]
