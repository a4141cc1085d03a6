import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def fresh_errors(request: pytest.FixtureRequest) -> dict[tuple[str, str], str]:
    """(case, cell) -> what went wrong, of all chosen tests of cells that take a fresh process."""
    chosen = [item.callspec.params for item in request.session.items if "fresh_errors" in item.fixturenames]
    lines = "".join(json.dumps([params["case"].name, params["cell"].name]) + "\n" for params in chosen)
    command = [sys.executable, "-m", "tests.conformance.fresh"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("LIDNET_FAST_BACKEND", None)
    done = subprocess.run(command, input=lines, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    return {(case, cell): error for case, cell, error in results}
