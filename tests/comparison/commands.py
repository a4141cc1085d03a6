"""`lidnet-fast compare` in processes of its own, on a tiny configuration."""

import subprocess
import sys
from pathlib import Path

import yaml

MINE = {"detector": {"name": "retinanet_small"}, "collaborate": {"objective": {"roi_weight": 5.0}}}


def write_config(path: Path, store: Path) -> Path:
    content = {
        "stores": {"phantoms": str(store)},
        "denoisers": {"small": {"options": {"channels": 8}}, "tiny": {"name": "small", "options": {"channels": 4}}},
        "arms": {"mse": None, "mine": MINE, "lidnet": None},
        "seeds": [0, 1],
        "judges": {"retina": {"name": "retinanet_small"}},
        "device": "cpu",
        "precision": "float32",
        "data": {"crop": 64},
        "denoiser": {"name": "small", "steps": 4, "batch_size": 2},
        "detector": {"name": "faster_rcnn_small", "steps": 4, "batch_size": 2},
        # Untrained detectors score nothing above the default: regions would never hold proposals.
        "collaborate": {"steps": 8, "batch_size": 2, "denoiser_steps": 2, "objective": {"proposal_score": 0.0}},
        "evaluation": {"samples": 12, "validation_samples": 4, "validate_every": 4},
        "checkpoint_every": 1,
        "log_every": 1,
    }
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def start(config: Path, out: Path, *options: str) -> subprocess.Popen[str]:
    program = [sys.executable, "-c", "from lidnet_fast.cli import main; main()", "compare"]
    words = ["--config", str(config), "--out", str(out), *options]
    return subprocess.Popen([*program, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(config: Path, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    process = start(config, out, *options)
    stdout, stderr = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)
