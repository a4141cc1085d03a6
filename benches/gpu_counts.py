"""What kernels execute at full size, counted by running blocks of their PTX. No GPU needed.

RoIAlign's are in Triton; of those in csrc/cuda, where there is nvcc, the mask of boxes and the Gramian.

Boxes are proposals around lesions on images of 512x512 with features of 4x256x128x128. `issue` is how long the warps'
instructions take to be issued at least, on 132 SMs with four schedulers at 1.755 GHz; no time is measured here.

    python benches/gpu_counts.py            # prints the table
    python benches/gpu_counts.py --write    # and renews tests/kernels/counts.json, which the tests compare with
"""

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from boxes import as_rois, proposals

from lidnet_fast.kernels import check_boxes, roi_perceptual

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.kernels.ptx import extension
from tests.kernels.ptx.executor import Executed
from tests.kernels.ptx.launch import running_ptx

COUNTS = Path(__file__).parents[1] / "tests" / "kernels" / "counts.json"
ISSUED_PER_SECOND = 132 * 4 * 1.755e9
SAMPLED = {"_difference_kernel": 128, "gather_kernel": 128}


def counts(boxes: int, channels_last: bool, shape: tuple[int, ...] = (4, 256, 128, 128)) -> dict[str, dict[str, float]]:
    """Kernel -> what a call, forward and backward, makes it do."""
    features = torch.zeros(shape)
    if channels_last:
        features = features.contiguous(memory_format=torch.channels_last)
    rois = as_rois(proposals((512, 512), shape[0], boxes)).float().contiguous()
    pooling = (rois, None, [0.25], [7, 7], 2, True)
    lists = [rois[rois[:, 0] == image, 1:].contiguous() for image in range(shape[0])]
    with running_ptx(SAMPLED) as launches:
        check_boxes.check_boxes(lists, torch.ones(boxes), shape[0], 1e30, [], ["boxes", "weights"], torch.float32)
        _, slopes = roi_perceptual.roi_perceptual_loss_and_slopes([features], [features], *pooling, "mse", None, "mean")
        of_gradient = (shape, [channels_last], features.dtype)
        roi_perceptual.roi_perceptual_loss_backward(torch.ones(()), slopes, *pooling, None, "mean", *of_gradient)
    return _table(launches.executed, launches.warps)


def extension_counts(boxes: Sequence[int] = (256, 1000)) -> dict[str, dict[str, dict[str, float]]]:
    """Scenario -> kernel of csrc/cuda -> what it does, on images of 4x1x512x512."""
    shape, table = (4, 1, 512, 512), {}
    for count in boxes:
        launches = extension.Launches(most=64)
        launches.covered(as_rois(proposals(shape[2:], shape[0], count)).float().contiguous(), shape)
        table[f"mask of {count} boxes"] = _table(launches.executed, launches.warps)
    launches = extension.Launches(most=64)
    launches.gramian(torch.zeros(6, math.prod(shape)))
    return {**table, "Gramian of 6 gradients": _table(launches.executed, launches.warps)}


def _table(of_kernels: Mapping[str, Executed], all_warps: Mapping[str, int]) -> dict[str, dict[str, float]]:
    table = {}
    for kernel, executed in of_kernels.items():
        per_warp = executed.instructions.total() / executed.warps
        warps = all_warps[kernel]
        table[kernel.lstrip("_")] = {
            "instructions_per_warp": round(per_warp),
            "warps": warps,
            "issue_us": round(per_warp * warps / ISSUED_PER_SECOND * 1e6, 1),
            "sectors_per_warp": round((executed.sectors_loaded + executed.sectors_stored) / executed.warps),
        }
    return table


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"renew {COUNTS.name}")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--boxes", type=int, nargs="+", default=[256, 1000], help="how many, in all images together")
    arguments = parser.parse_args()
    counted = {
        f"{boxes} boxes, {'channels_last' if channels_last else 'contiguous'}": counts(boxes, channels_last)
        for boxes in arguments.boxes
        for channels_last in (False, True)
    }
    record: dict[str, Any] = {"triton": triton.__version__, "counted": counted}
    if extension.nvcc() is not None:
        record |= {"nvcc": extension.nvcc_version(), "extension": extension_counts()}
    if arguments.json:
        print(json.dumps(record, indent=1))
    else:
        for scenario, kernels in (counted | record.get("extension", {})).items():
            for kernel, row in kernels.items():
                print(f"{scenario:28}{kernel:20}" + "  ".join(f"{name} {value}" for name, value in row.items()))
    if arguments.write:
        COUNTS.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
