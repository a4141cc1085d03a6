"""The examples run, in fresh processes and shortened as it says here; tests/test_docs.py runs `your_own_loop.py`."""

import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parents[1] / "examples"


def output_of(folder: Path, name: str, shorter: dict[str, str], check: str = "") -> str:
    """What an example prints, run in a folder with some of its text replaced, and a check behind it."""
    code = (EXAMPLES / name).read_text()
    for long, short in shorter.items():
        assert long in code, f"{name} has no {long}"
        code = code.replace(long, short)
    done = subprocess.run([sys.executable, "-c", code + check], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_encoders(tmp_path):
    """Windows are cheaper than whole images, but for squeeze-and-excitation."""
    said = output_of(tmp_path, "encoders.py", {})
    costs = dict(re.findall(r"^(.+): loss 0\.\d+, .* cost (\d\.\d+) of whole images$", said, re.M))
    assert len(costs) == 5
    assert [name for name, cost in costs.items() if float(cost) >= 1] == ["timm efficientnet_b0"]


@pytest.mark.slow
def test_monai_volumes(tmp_path):
    """The axes are turned around rightly: the loss reads MONAI's volume where MONAI's box is."""
    check = """
box = sample["boxes"][0].reshape(2, 3)
low.requires_grad_()
perceptual(low, normal, [boxes[:1]]).backward()
seen = low.grad[0, 0].abs()
for axis in range(3):
    along = seen.sum([other for other in range(3) if other != axis])
    centre = (along * (torch.arange(len(along)) + 0.5)).sum() / along.sum()
    assert box[0, axis] - 3 < centre < box[1, axis] + 3, (axis, centre, box)
"""
    said = output_of(tmp_path, "monai_volumes.py", {"range(4)": "range(2)"}, check)
    assert re.findall(r"epoch (\d): l1 0\.\d+, lesions 0\.\d+", said) == ["0", "1"]


def test_lightning_callback(tmp_path):
    """It adds its loss to the module's, and leaves the module as it was."""
    check = """
def trained(*callbacks):
    torch.manual_seed(0)
    module = Yours()
    alone = L.Trainer(max_epochs=1, callbacks=[*callbacks], logger=False, enable_checkpointing=False)
    alone.fit(module, DataLoader(batches, batch_size=None))
    assert "training_step" not in vars(module) and not module.denoiser._forward_hooks
    return torch.nn.utils.parameters_to_vector(module.parameters())

assert trained().equal(trained(LesionLoss(perceptual, weight=0)))
assert not trained().equal(trained(LesionLoss(perceptual)))
"""
    small = {"vgg19": "squeezenet1_1", '"relu3_4"': '"features.3"', "max_epochs=4": "max_epochs=1"}
    said = output_of(tmp_path, "lightning_callback.py", small, check)
    assert re.search(r"^lesions 0\.\d+$", said, re.M)


def test_notebook_of_roi_windows(tmp_path):
    """Its assertion holds, and it draws two figures, as the stored one has."""
    stored = nbformat.read(EXAMPLES / "roi_windows.ipynb", 4)
    figures = ["image/png" in output.get("data", {}) for cell in stored.cells for output in cell.get("outputs", [])]
    for cell in stored.cells:
        cell.source = cell.source.replace("512", "192")
    NotebookClient(stored, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    drawn = ["image/png" in output.get("data", {}) for cell in stored.cells for output in cell.get("outputs", [])]
    assert drawn == figures
    assert sum(drawn) == 2
