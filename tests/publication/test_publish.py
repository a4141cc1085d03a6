"""`lidnet-fast publish`: what a stranger downloads, reads, checks and denoises with."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import SimpleITK as sitk  # noqa: N813
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from torch import nn

from lidnet_fast.cli import main
from lidnet_fast.comparison.records import Record
from lidnet_fast.data.phantoms.chest import ChestPhantom
from lidnet_fast.data.phantoms.study import Study, make_study
from lidnet_fast.errors import InputError
from lidnet_fast.inference import HUDenoiser, SliceDenoiser, load_denoiser, save_denoiser
from lidnet_fast.models.denoisers import DENOISERS
from lidnet_fast.models.envelope import Envelope
from lidnet_fast.models.files import fingerprint, save_network
from lidnet_fast.models.onnx import OPSET, TOLERANCE_HU, OnnxDenoiser, write_onnx
from lidnet_fast.models.registry import NetworkConfig
from lidnet_fast.models.windowing import HUWindow
from lidnet_fast.publication import publish
from lidnet_fast.trainer.config import DataConfig, RunConfig, to_dict
from tests.comparison.test_records import evaluated
from tests.conftest import Once
from tests.inference.conftest import random_network

WINDOW = HUWindow(-160, 240)
ENVELOPE = Envelope(hu=(-1000.0, 900.0), kernels=("B|30f",), noise={"lung": (20.0, 80.0)})
EVALUATED = {
    "arms": {
        "low dose": {"psnr": 20.5, "judge": {"ap50": 0.5, "curve": {"sensitivity": [0.1]}}},
        "denoised": {"psnr": 29.25, "judge": {"ap50": 0.66, "curve": {"sensitivity": [0.1]}}},
    },
    "images": {"vendor": "/data/4711-anna/vendor"},
    "samples": 250,
    "scans": {"denoised": {"judge": {"cpm": [0.4, 0.3, 0.5]}}},
}


def make_published(root: Path) -> None:
    """A run as `train` and `evaluate` leave it, and what is published of it."""
    run, store = root / "4711-run", root / "4711-store"
    phantom = ChestPhantom(image_size=64, slices=2, lesions_per_slice=(2, 2))
    make_study(store, Study((("train", 2), ("val", 1), ("test", 1)), phantom, dose_fraction=0.05), seed=0, workers=1)
    config = to_dict(RunConfig(out=str(run), data=DataConfig(store=str(store))))
    network, named = random_network("unet", channels=4, levels=3, blocks=1), {"channels": 4, "levels": 3, "blocks": 1}
    trained = {name: value for name, value in config.items() if name not in ("out", "data")}
    file = run / "collaborate" / "denoiser.pt"
    save_network(file, "denoiser", network, NetworkConfig("unet", named), WINDOW, trained, ENVELOPE)
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (run / "metrics.json").write_text(json.dumps({**EVALUATED, "own": True, "denoiser": fingerprint(file)}))
    main(["publish", str(run), str(root / "chest-denoiser")])


@pytest.fixture(scope="session")
def root(once: Once) -> Path:
    return once("published", make_published)


@pytest.fixture(scope="session")
def published(root: Path) -> Path:
    return root / "chest-denoiser"


@pytest.fixture(scope="session")
def denoiser(root: Path) -> HUDenoiser:
    return load_denoiser(root / "4711-run")


def images(*shape: int) -> torch.Tensor:
    """HU from below air to beyond metal."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 5000 - 2000


def test_the_folder_is_what_hubs_read(published: Path, denoiser: HUDenoiser) -> None:
    assert {file.name for file in published.iterdir()} == {
        *("README.md", "SHA256SUMS", "config.json", "model.onnx", "model.safetensors")
    }
    checked = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=published, capture_output=True, text=True)
    assert checked.stdout.splitlines() == [f"{name}: OK" for name in ("config.json", "model.onnx", "model.safetensors")]
    weights = load_file(published / "model.safetensors")
    assert all(torch.equal(value, weights[name]) for name, value in denoiser.network.state_dict().items())
    config = json.loads((published / "config.json").read_text())
    assert config["network"] == {"name": "unet", "options": {"channels": 4, "levels": 3, "blocks": 1}}
    assert config["window"] == {"low": -160, "high": 240}


def test_the_card_says_what_the_run_knows(published: Path) -> None:
    card = ModelCard.load(published / "README.md")
    about = card.data.to_dict()
    assert about["license"] == "unknown"
    assert about["library_name"] == "lidnet_fast"
    metrics = {one["type"]: one["value"] for one in about["model-index"][0]["results"][0]["metrics"]}
    assert metrics == {"psnr": 29.25, "judge_ap50": 0.66, "judge_cpm": 0.4}
    assert "On 250 fields of view of held-out patients" in card.text
    assert "| CPM frozen judge | 0.400 [0.300, 0.500] | – |" in card.text
    assert "| PSNR whole image (dB) | 29.25 | 20.50 |" in card.text
    assert "| train | 2 | 2 | 4 |" in card.text
    assert "simulated, 0.05 of the dose" in card.text
    assert "| kernels | B\\|30f |" in card.text
    assert "**not a medical device**" in card.text
    assert f"| collaborate.objective.roi_weight | {RunConfig().collaborate.objective.roi_weight} |" in card.text


def test_no_file_holds_a_path_or_an_id(root: Path, published: Path) -> None:
    for file in published.iterdir():
        content = file.read_bytes()
        for secret in (str(root), "4711-", str(Path(__file__).parents[2]), "phantom-"):
            assert secret.encode() not in content, f"{file.name}: {secret}"


def test_the_folder_denoises_as_the_run(published: Path, denoiser: HUDenoiser) -> None:
    again = load_denoiser(published)
    hu = images(1, 1, 37, 53)
    assert torch.equal(again(hu), denoiser(hu))
    assert again.envelope == denoiser.envelope


@pytest.mark.parametrize("shape", [(1, 1, 64, 64), (3, 1, 37, 53), (1, 1, 7, 130), (2, 1, 96, 33)])
def test_onnx_equals_pytorch_at_sizes_that_were_not_traced(
    published: Path, denoiser: HUDenoiser, shape: tuple[int, ...]
) -> None:
    hu = images(*shape)
    expected = denoiser(hu)
    assert (expected - hu).abs().max() > 1
    torch.testing.assert_close(load_denoiser(published / "model.onnx")(hu), expected, rtol=0, atol=TOLERANCE_HU)


def test_onnx_says_what_it_is(published: Path, denoiser: HUDenoiser) -> None:
    model = onnx.load(published / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert [(one.domain, one.version) for one in model.opset_import if one.domain == ""] == [("", OPSET)]
    axes = [axis.dim_param or axis.dim_value for axis in model.graph.input[0].type.tensor_type.shape.dim]
    assert axes == ["N", 1, "H", "W"]
    read = load_denoiser(published / "model.onnx")
    assert (read.window, read.envelope) == (WINDOW, ENVELOPE)
    assert read.reach() == denoiser.reach()
    assert read.bytes_per_pixel() == denoiser.bytes_per_pixel()


def test_slices_in_tiles_through_onnx(published: Path, denoiser: HUDenoiser) -> None:
    hu = images(2, 140, 150).numpy()
    expected = SliceDenoiser(denoiser, "cpu")(hu)
    read = load_denoiser(published / "model.onnx")
    np.testing.assert_allclose(SliceDenoiser(read, "cpu", precision="auto")(hu), expected, atol=TOLERANCE_HU)
    np.testing.assert_allclose(SliceDenoiser(read, "cpu", tile=48)(hu), expected, atol=TOLERANCE_HU)
    with pytest.raises(InputError, match="ONNX computes in float32"):
        SliceDenoiser(read, "cpu", precision="bfloat16")


@pytest.mark.slow
@pytest.mark.parametrize("context", [0, 1])
@pytest.mark.parametrize("name", DENOISERS)
def test_every_denoiser_of_ours_becomes_onnx(name: str, context: int, tmp_path: Path) -> None:
    options = {"context": context} if context else {}
    denoiser = HUDenoiser(random_network(name, channels=4, **options), HUWindow(), context=context)
    write_onnx(tmp_path / "model.onnx", denoiser)
    hu = images(1, 2 * context + 1, 45, 58)
    with torch.no_grad():
        torch.testing.assert_close(OnnxDenoiser(tmp_path / "model.onnx")(hu), denoiser(hu), rtol=0, atol=TOLERANCE_HU)


class Padded(nn.Module):
    """Pads where it has to, as users' networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(1, 4, 3, 2, 1), nn.ConvTranspose2d(4, 1, 2, 2)

    def forward(self, x):
        height, width = x.shape[-2:]
        rows, columns = -height % 4, -width % 4
        padded = nn.functional.pad(x, (0, columns, 0, rows), mode="reflect") if rows or columns else x
        return x + self.up(torch.relu(self.down(padded)))[..., :height, :width]


class Decomposing(nn.Conv2d):
    """Has an operator that ONNX lacks."""

    def __init__(self) -> None:
        super().__init__(1, 1, 3, padding=1)

    def forward(self, x):
        return x + torch.linalg.svd(super().forward(x))[0].mean()


class Branching(nn.Conv2d):
    """Does what no graph can say."""

    def __init__(self) -> None:
        super().__init__(1, 1, 3, padding=1)

    def forward(self, x):
        return super().forward(x) if float(x.mean()) > 0.5 else x


def save_own(tmp_path: Path, network: type[nn.Module]) -> Path:
    path = tmp_path / "mine.pt"
    torch.manual_seed(0)
    config = NetworkConfig(f"tests.publication.test_publish:{network.__name__}")
    save_denoiser(path, HUDenoiser(network().eval(), HUWindow()), config)
    return path


@pytest.mark.slow
def test_a_users_own_denoiser_is_published(tmp_path: Path) -> None:
    path = save_own(tmp_path, Padded)
    with pytest.raises(InputError, match="--trust-code"):
        publish(path, tmp_path / "out")
    publish(path, tmp_path / "out", trust_code=True)
    hu = images(1, 1, 33, 46)
    expected = load_denoiser(path, trust_code=True)(hu)
    assert torch.equal(load_denoiser(tmp_path / "out", trust_code=True)(hu), expected)
    found = load_denoiser(tmp_path / "out" / "model.onnx")(hu)  # its code isn't needed
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE_HU)
    assert "Not known" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "said"), [(Decomposing, "its operator aten._linalg_svd has no"), (Branching, "data-dependent")]
)
def test_what_onnx_can_not_say_is_refused_by_name(
    network: type[nn.Module], said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = save_own(tmp_path, network)
    with pytest.raises(SystemExit, match="2"):
        main(["publish", str(path), str(tmp_path / "out"), "--trust-code"])
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "the denoiser can't become ONNX: " in err
    assert said in err
    assert list(tmp_path.iterdir()) == [path]


def publish_of_neighbours(root: Path) -> None:
    """A denoiser that sees 5 slices, and what is published of it."""
    options = {"channels": 4, "levels": 3, "blocks": 1}
    denoiser = HUDenoiser(random_network("unet", context=2, **options), WINDOW, ENVELOPE, context=2)
    save_denoiser(root / "denoiser.pt", denoiser, NetworkConfig("unet", options))
    main(["publish", str(root / "denoiser.pt"), str(root / "five")])


@pytest.fixture(scope="session")
def five(once: Once) -> Path:
    return once("published_five", publish_of_neighbours)


@pytest.mark.parametrize("shape", [(1, 64, 64), (3, 37, 53), (1, 7, 130)])
def test_neighbouring_slices(five: Path, shape: tuple[int, ...]) -> None:
    """The folder gives what the model gives, and ONNX nearly that, at sizes that weren't traced."""
    denoiser, folder, made = (
        load_denoiser(five / name, context=2) for name in ("denoiser.pt", "five", "five/model.onnx")
    )
    hu = images(shape[0], 5, *shape[1:])
    expected = denoiser(hu)
    assert (expected - hu[:, 2:3]).abs().max() > 1
    assert torch.equal(folder(hu), expected)
    torch.testing.assert_close(made(hu), expected, rtol=0, atol=TOLERANCE_HU)
    wide = images(shape[0], 7, *shape[1:])  # what a detector of three slices looks at
    torch.testing.assert_close(made.denoise(wide), denoiser.denoise(wide), rtol=0, atol=TOLERANCE_HU)
    with pytest.raises(ValueError, match=r"hu must be \[N,5,H,W\]"):
        made(hu[:, 1:4])
    assert (made.window, made.envelope, made.reach()) == (WINDOW, ENVELOPE, denoiser.reach())


def test_a_model_of_neighbouring_slices_says_so(five: Path, published: Path) -> None:
    model = onnx.load(five / "five" / "model.onnx")
    shapes = [
        [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in (model.graph.input[0], model.graph.output[0])
    ]
    assert shapes == [["N", 5, "H", "W"], ["N", 1, "H", "W"]]
    card = (five / "five" / "README.md").read_text()
    assert "each slice with 2 on either side of it as channels" in card
    assert "one input, float32 [N, 5, H, W]" in card
    assert json.loads((five / "five" / "config.json").read_text())["context"] == 2
    for model_file in (five / "five", five / "five" / "model.onnx"):
        with pytest.raises(InputError, match=r"holds a denoiser of context 2, .* one of context 0 is needed"):
            load_denoiser(model_file, context=0)
    with pytest.raises(InputError, match="one of context 1 is needed"):
        load_denoiser(published / "model.onnx", context=1)


def test_studies_through_a_model_of_neighbouring_slices(five: Path, tmp_path: Path) -> None:
    """Volumes, by the folder and by ONNX, and stacks in tiles: what the model itself makes of them."""
    hu = np.rint(images(6, 40, 56).numpy()).clip(-1024).astype(np.int16)
    sitk.WriteImage(sitk.GetImageFromArray(hu), str(tmp_path / "ct.nii"))
    expected = SliceDenoiser(load_denoiser(five / "denoiser.pt"), "cpu")(hu)
    for number, model in enumerate(("five", "five/model.onnx")):
        out, precision = tmp_path / f"{number}.nii", ["--precision", "float32"]
        main(
            ["denoise", str(tmp_path / "ct.nii"), str(out), "--model", str(five / model), "--device", "cpu", *precision]
        )
        found = sitk.GetArrayFromImage(sitk.ReadImage(str(out)))
        assert np.abs(found - expected.clip(-1024)).max() <= 0.5 + TOLERANCE_HU
    tiles = SliceDenoiser(load_denoiser(five / "five" / "model.onnx"), "cpu", tile=32)(hu)
    np.testing.assert_allclose(tiles, expected, atol=TOLERANCE_HU)


@pytest.mark.parametrize("changed", [{"own": False}, {"denoiser": "0" * 64}, {"own": None}])
def test_results_of_another_model_are_refused(root: Path, tmp_path: Path, changed: dict) -> None:
    """Of another denoiser or store, of weights that have changed, or of before results said whose they are."""
    run = tmp_path / "run"
    shutil.copytree(root / "4711-run", run)
    content = json.loads((run / "metrics.json").read_text())
    (run / "metrics.json").write_text(json.dumps({**content, **changed}))
    with pytest.raises(InputError, match=rf"metrics.json: doesn't say that .* To fix: lidnet-fast evaluate {run}"):
        publish(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten(published: Path, root: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"exists already"):
        publish(root / "4711-run", tmp_path)
    for model in (published, published / "model.onnx"):
        with pytest.raises(InputError, match=r"is published already. To fix: give the folder of a run"):
            publish(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("seed", [0, 100])
def test_a_cell_of_a_comparison_is_published_with_its_record(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Every judge by its name, with intervals, beside the other arms and low dose on the same samples."""
    monkeypatch.setattr("lidnet_fast.publication.folder.write_onnx", lambda path, _: path.write_bytes(b""))
    place = tmp_path / "runs" / "liver" / f"seed{seed}"
    cell = place / "unet" / "arms" / "lidnet"
    shutil.copytree(root / "4711-run", cell)
    patients = np.repeat(np.arange(5), 2)
    evaluation = evaluated(len(patients))
    for one, file in (
        ("one", cell / "evaluation" / "lidnet.npz"),
        ("two", cell.with_name("mse") / "evaluation" / "mse.npz"),
        ("two", place / "references" / "evaluation" / "low_dose.npz"),
    ):
        file.parent.mkdir(parents=True)
        Record.of(evaluation, one, patients).save(file)
    other = evaluated(3)  # of other samples, as of another configuration
    (cell.with_name("third") / "evaluation").mkdir(parents=True)
    Record.of(other, "one", [0, 1, 2]).save(cell.with_name("third") / "evaluation" / "third.npz")
    card = ModelCard.load(publish(cell, tmp_path / "out") / "README.md")
    of = "validation" if seed else "held-out"
    assert f"On 10 fields of view of {of} patients" in card.text
    assert "this model is *lidnet*" in card.text and "over patients" in card.text
    assert "|  | lidnet | low dose | mse |" in card.text
    assert "- other: a detector of another architecture" in card.text
    flat = evaluation.flat()
    for label, key, digits in (("AP@.5 other", "other_ap50", 3), ("PSNR whole image (dB)", "psnr", 2)):
        (line,) = (line for line in card.text.splitlines() if line.startswith(f"| {label} |"))
        shown = [cell.strip() for cell in line.split("|")[2:-1]]
        assert [text.partition(" [")[0] for text in shown] == [
            f"{flat[arm][key]:.{digits}f}" for arm in ("one", "two", "two")
        ]
        assert all(text.endswith("]") for text in shown)
    (found,) = card.data.to_dict()["model-index"][0]["results"]
    assert {"psnr", "judge_ap50", "other_ap50"} <= {metric["type"] for metric in found["metrics"]}


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "config.json").write_text("{"), r"config.json: can't be read"),
        (lambda folder: (folder / "config.json").write_text("{}"), r"is not a lidnet_fast-network file"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 99), r"no readable safetensors"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"there is no .*model.safetensors"),
    ],
)
def test_damaged_folders(published: Path, tmp_path: Path, damage, said: str) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((published / name).read_bytes())
    damage(tmp_path)
    with pytest.raises(InputError, match=said):
        load_denoiser(tmp_path)


def other_onnx(path: Path, shape: list, kind: int = onnx.TensorProto.FLOAT, inputs: int = 1) -> Path:
    """A model that another tool might have made."""
    from onnx import helper

    names = [f"x{n}" for n in range(inputs)]
    values = [helper.make_tensor_value_info(name, kind, shape) for name in names]
    nodes = [helper.make_node("Sum" if kind == onnx.TensorProto.FLOAT else "Identity", names, ["y"])]
    graph = helper.make_graph(nodes, "g", values, [helper.make_tensor_value_info("y", kind, shape)])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8), path)
    return path


def test_other_models_are_refused_by_name(published: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    free = ["N", 1, "H", "W"]
    models = {
        other_onnx(tmp_path / "rgb.onnx", [1, 3, 224, 224]): "x0 tensor(float) [1, 3, 224, 224]",
        other_onnx(tmp_path / "even.onnx", ["N", 2, "H", "W"]): "or an odd number of neighbouring slices",
        other_onnx(tmp_path / "half.onnx", free, onnx.TensorProto.FLOAT16): "tensor(float16)",
        other_onnx(tmp_path / "two.onnx", free, inputs=2): "x0 tensor(float) [N, 1, H, W], x1",
        other_onnx(tmp_path / "unknown.onnx", free): "don't say that it takes HU",
        tmp_path / "none.onnx": "there is no model",
        published / "model.safetensors": "holds weights alone. To fix: give the folder",
    }
    (tmp_path / "text.onnx").write_text("no model")
    models[tmp_path / "text.onnx"] = "no model that ONNX Runtime can run"
    torch.save({"state_dict": {"w": torch.ones(1)}}, tmp_path / "theirs.pt")
    models[tmp_path / "theirs.pt"] = "is not a lidnet_fast-network file"
    known = onnx.load(published / "model.onnx")
    onnx.helper.set_model_props(known, {"lidnet_fast": '{"format": "lidnet_fast-onnx", "version": 9}'})
    onnx.save(known, tmp_path / "newer.onnx")
    models[tmp_path / "newer.onnx"] = "its metadata can't be read: format lidnet_fast-onnx version 9"
    known = onnx.load(published / "model.onnx")
    (entry,) = (entry for entry in known.metadata_props if entry.key == "lidnet_fast")
    entry.value = json.dumps({**json.loads(entry.value), "context": 1})
    onnx.save(known, tmp_path / "fewer.onnx")
    models[tmp_path / "fewer.onnx"] = "its metadata say that it sees slices: 3, but its input has 1"
    for model, said in models.items():
        with pytest.raises(SystemExit, match="2"):
            main(["denoise", str(tmp_path), str(tmp_path / "out"), "--model", str(model)])
        err = capfd.readouterr().err
        assert err.count("\n") == 1, err
        assert said in err
        assert model.name in err
        assert not (tmp_path / "out").exists()


def test_without_the_extra(published: Path, tmp_path: Path) -> None:
    """In a fresh process that can't import ONNX Runtime."""
    program = (
        "import sys; sys.modules['onnxruntime'] = None; from lidnet_fast.cli import main; "
        f"main(['denoise', '.', 'out', '--model', {str(published / 'model.onnx')!r}])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "lidnet-fast: onnxruntime is not installed: pip install 'lidnet_fast[onnx]'\n"


def test_the_fingerprint_follows_from_weights_and_configuration(published: Path) -> None:
    content = b"".join((published / name).read_bytes() for name in ("config.json", "model.safetensors"))
    assert fingerprint(published) == hashlib.sha256(content).hexdigest()
