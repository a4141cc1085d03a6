"""Every case in every cell: right, or refused with the sentence that docs/operators.md has."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lidnet_fast

from .cases import CASES
from .cells import Cell, examine
from .table import CELLS, DOCUMENT, written

ROOT = Path(__file__).parents[2]


def pairs(*, fresh: bool) -> list:
    return [
        pytest.param(case, cell, id=f"{case.name} - {cell.name}")
        for cell in CELLS.values()
        for case in CASES
        if cell.fresh == fresh and cell.applies(case)
    ]


@pytest.mark.parametrize(("case", "cell"), pairs(fresh=False))
def test_right_or_refused(case, cell):
    (error,) = examine([case], cell)
    assert not error, error


@pytest.mark.parametrize(("case", "cell"), pairs(fresh=True))
def test_right_or_refused_in_a_fresh_process(case, cell, fresh_errors):
    error = fresh_errors[case.name, cell.name]
    if case.name == "mtl_backward" and torch.__version__ < (2, 12) and "Tensor.requires_grad_() call" in error:
        pytest.skip("Dynamo before 2.12 stops at the case's own requires_grad_, before mtl_backward")
    assert not error, error


@pytest.mark.slow
def test_one_graph_of_all_ops_through_the_default_compiler(tmp_path):
    """Nothing compiled before is reused."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.conformance.inductor"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr


def test_every_public_op_and_module_is_a_case():
    named = {case.name.partition(",")[0] for case in CASES}
    public = {name for name in lidnet_fast.__all__ if callable(getattr(lidnet_fast, name))}
    public -= {"InputWarning", "MTLBackwardOutput", "MultiLossOutput"}
    assert named >= public


def test_windows_are_what_the_windowed_case_runs():
    (case,) = (case for case in CASES if case.name == "ROIPerceptualLoss")
    x, _, b = case.tensors()
    used = []

    def check(case):
        used.append(case.module().plan(x.shape[2:], b, len(x)))

    examine([case], Cell("plan", check, lambda case: True, False, False, None))
    assert len(used[0].windows) > 1
    assert not used[0].whole


def test_the_document_has_this_table():
    text = DOCUMENT.read_text()
    assert text == written(text), "to fix: python -m tests.conformance.table"
