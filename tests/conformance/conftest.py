import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Once

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def fresh_errors(request: pytest.FixtureRequest, once: Once) -> dict[tuple[str, str], str]:
    """(case, cell) -> what went wrong, of all chosen tests of cells that take a fresh process."""
    chosen = [item.callspec.params for item in request.session.items if "fresh_errors" in item.fixturenames]
    lines = "".join(json.dumps([params["case"].name, params["cell"].name]) + "\n" for params in chosen)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("LIDNET_FAST_BACKEND", None)

    def run(folder: Path) -> None:
        command = [sys.executable, "-m", "tests.conformance.fresh"]
        done = subprocess.run(command, input=lines, capture_output=True, text=True, cwd=ROOT, env=environment)
        assert done.returncode == 0, done.stderr
        folder.mkdir()
        (folder / "results").write_text(done.stdout)

    results = (once("conformance", run) / "results").read_text().splitlines()
    return {(case, cell): error for case, cell, error in map(json.loads, results)}
