#!/usr/bin/env bash
# Everything that only a GPU can tell, in one command and a few minutes: benches/gpu_check.sh [OUT.json]
# Needs the project installed with its dev extra (`make check` does that in .venv); PYTHON chooses another interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
OUT=${1:-gpu_check.json}
"$PYTHON" -c 'import sys, torch; torch.cuda.is_available() or sys.exit("gpu_check: torch sees no CUDA device here")'
"$PYTHON" -m pytest -q -m "gpu or interpreter" tests
if command -v compute-sanitizer >/dev/null; then
  compute-sanitizer --error-exitcode 1 "$PYTHON" -m pytest -q tests/kernels -k "pyramid or volumes or layouts"
else
  echo "gpu_check: compute-sanitizer isn't installed; memory wasn't checked"
fi
"$PYTHON" benches/gpu_check.py --out "$OUT"
