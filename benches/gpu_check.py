"""Everything that only a GPU can show, in parts of less than eight minutes: benches/gpu_check.sh [PART...].

Needs torch, torchvision, triton and pytest, and to build, setuptools, ninja, g++ and nvcc; nothing is downloaded.
Without the name of a part it runs those that haven't passed yet, so a run that was interrupted is resumed by the same
command. All that they find is in one JSON file, gpu_check.json.
"""

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LIMIT = 8 * 60
"""Seconds that a part may take."""
PYTEST = ["-m", "pytest", "-q", "-o", "addopts=--strict-markers --import-mode=importlib -rfEs"]
# Its checks make every program tens of times slower; these cases reach every kernel, with memory of its own for each
# tensor instead of a share of the caching allocator's.
SANITIZED = ["tests/kernels/test_roi_perceptual_triton.py", "tests/kernels/test_roi_windows_triton.py"]
PARTS: dict[str, list[str]] = {
    "install": ["-m", "pip", "install", "--no-deps", "--no-build-isolation", "--editable", "."],
    "ops": [*PYTEST, "tests/ops", "tests/test_backend.py"],
    "conformance": [*PYTEST, "tests/conformance"],
    "kernels": [*PYTEST, "tests/kernels"],
    "sanitizer": [*PYTEST, *SANITIZED, "-k", "pyramid or volumes or layouts"],
    "parity": [],
    "behaviour": [],
    "speed-rois": [],
    "speed-pixels": [],
    "speed-windows": [],
}
"""Name -> arguments of Python; those without are parts of gpu_measure.py."""
NEED_NO_GPU = ("install", "ops", "conformance", "kernels")
BEFORE_SPEED = ("parity", "behaviour")
"""What isn't right isn't timed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of: {', '.join(PARTS)}")
    parser.add_argument("--out", type=Path, default=Path("gpu_check.json"))
    arguments = parser.parse_args()
    unknown = [name for name in arguments.parts if name not in PARTS]
    if unknown:
        parser.error(f"unknown part {unknown[0]!r} (parts: {', '.join(PARTS)})")
    report = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    for name in arguments.parts or [name for name in PARTS if not report.get(name, {}).get("ok")]:
        print(f"gpu_check: {name}", flush=True)
        report[name] = run(name, report)
        print(f"gpu_check: {name}: {'ok' if report[name]['ok'] else report[name]['why']}", flush=True)
        scratch = arguments.out.with_suffix(".part")
        scratch.write_text(json.dumps(report, indent=1) + "\n")
        scratch.replace(arguments.out)
    failed = [name for name in arguments.parts or PARTS if not report[name]["ok"]]
    if failed:
        sys.exit(f"gpu_check: failed: {', '.join(failed)}; details are in {arguments.out}")


def run(name: str, report: dict[str, Any]) -> dict[str, Any]:
    """Run a part in a process of its own; "ok", and "why" not, "seconds", the end of its "output", its results."""
    reason = why_not(name, report)
    if reason:
        return {"ok": False, "why": reason}
    environment, start = {**os.environ, "PYTHONUNBUFFERED": "1"}, time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        measured, output = Path(folder) / "measured.json", Path(folder) / "output"
        command = [sys.executable, *PARTS[name]]
        if not PARTS[name]:
            command += ["benches/gpu_measure.py", name, "--out", str(measured)]
        if name == "sanitizer":
            command = ["compute-sanitizer", "--error-exitcode", "1", *command]
            environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
        with output.open("w") as stream:
            try:
                code = subprocess.run(command, cwd=ROOT, env=environment, stdout=stream, stderr=stream, timeout=LIMIT)
                why = f"exit status {code.returncode}" if code.returncode else ""
            except subprocess.TimeoutExpired:
                why = f"took longer than {LIMIT} s"
        result = {"ok": not why, "why": why, "seconds": round(time.monotonic() - start, 1)}
        result["output"] = output.read_text(errors="replace")[-4000:]
        print(result["output"])
        return result | (json.loads(measured.read_text()) if measured.exists() else {})


def why_not(name: str, report: dict[str, Any]) -> str:
    """Why a part can't run here, or nothing."""
    missing = [package for package in ("torch", "pytest") if importlib.util.find_spec(package) is None]
    if missing:
        return f"{sys.executable} has no {missing[0]}. To fix: PYTHON=... names an interpreter that has it"
    if name not in NEED_NO_GPU:
        import torch

        if not torch.cuda.is_available():
            return "torch sees no CUDA device here"
    if name == "sanitizer" and shutil.which("compute-sanitizer") is None:
        return "compute-sanitizer isn't on the PATH; it comes with NVIDIA's CUDA toolkit"
    wrong = [other for other in BEFORE_SPEED if not report.get(other, {}).get("ok")]
    if name.startswith("speed") and wrong:
        return f"{wrong[0]} hasn't passed, and what isn't right isn't timed"
    return ""


if __name__ == "__main__":
    main()
