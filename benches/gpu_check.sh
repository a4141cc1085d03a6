#!/usr/bin/env bash
# Everything that only a GPU can show: benches/gpu_check.sh [--out FILE] [PART...]; see benches/gpu_check.py.
# PYTHON chooses the interpreter, in which torch is installed.
cd "$(dirname "$0")/.." && exec "${PYTHON:-python3}" benches/gpu_check.py "$@"
