"""What the kernels need on each GPU: registers, spills, shared memory, occupancy, widths of loads. No GPU needed.

Triton's kernels are compiled as a launch would compile them (same specialisation on strides, alignment and dtypes), for
every target; those in CUDA C++ are in the built extension. The binaries are read with the tools that Triton brings.

    python benches/gpu_resources.py            # prints the table
    python benches/gpu_resources.py --write    # and renews tests/kernels/resources.json, which the tests compare with
"""

import argparse
import collections
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

import lidnet_fast
from lidnet_fast.kernels import check_boxes, roi_perceptual, roi_windows

RESOURCES = Path(__file__).parents[1] / "tests" / "kernels" / "resources.json"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
REGISTERS_PER_SM, WARPS_PER_SM, SHARED_PER_SM = (
    65536,
    64,
    {"sm_80": 164 * 1024, "sm_90": 228 * 1024, "sm_100": 228 * 1024},
)
CUDA_WARPS = 8  # of the blocks of our kernels in CUDA C++
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

VARIANTS = {
    "fp32": {"dtype": torch.float32},
    "fp32 channels_last": {"dtype": torch.float32, "channels_last": True},
    "bf16 channels_last": {"dtype": torch.bfloat16, "channels_last": True},
    "fp32 pyramid": {"dtype": torch.float32, "levels": 3},
    "fp32 volume": {"dtype": torch.float32, "volume": True},
}


@contextmanager
def compiled(target: GPUTarget) -> Iterator[dict[str, Any]]:
    """Launches compile for `target` instead of running: name of the kernel -> what was compiled last."""
    kernels: dict[str, Any] = {}
    backend = make_backend(target)

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        if target.backend == "hip":
            kwargs.pop("maxnreg", None)
        kwargs["debug"] = bool(self.debug)  # whether assertions are compiled
        binder = create_function_from_signature(self.signature, self.params, backend)
        bound, specialization, options = binder(*args, **kwargs)
        options, signature, constexprs, attrs = self._pack_args(backend, kwargs, bound, specialization, options)
        source = ASTSource(self, signature, constexprs, attrs)
        name = self.__name__ + (" with slopes" if bound.get("slopes") is not None and "partial" in bound else "")
        kernels[name] = triton.compile(source, target=target, options=options.__dict__)

    with mock.patch.object(JITFunction, "run", compile_only):
        yield kernels


def launch(dtype: torch.dtype, channels_last: bool = False, levels: int = 1, volume: bool = False) -> None:
    """Forward and backward of realistic shapes; nothing runs inside `compiled`, so the memory is never touched."""
    extent = (64, 64, 64) if volume else (128, 128)
    inputs = [torch.empty(2, 256, *(side >> level for side in extent), dtype=dtype) for level in range(levels)]
    if channels_last:
        inputs = [x.contiguous(memory_format=torch.channels_last) for x in inputs]
    rois = torch.empty(256, 7 if volume else 5)
    box_levels = torch.empty(256, dtype=torch.int64) if levels > 1 else None
    pooling = (rois, box_levels, [0.25 / 2**k for k in range(levels)], [7] * len(extent), 2, True)
    areas, rules = [1e3 * 4**level for level in range(1, levels)], ["boxes must", "box_weights must"]
    check_boxes.check_boxes([rois], torch.empty(256), 2, 1e30, areas, rules, torch.float32)
    roi_perceptual.roi_perceptual_loss(inputs, inputs, *pooling, "mse")
    _, slopes = roi_perceptual.roi_perceptual_loss_and_slopes(inputs, inputs, *pooling, "mse")
    shapes = [side for level in inputs for side in level.shape]
    of_gradients = (shapes, [channels_last] * levels, dtype)
    roi_perceptual.roi_perceptual_loss_backward(torch.empty(256), slopes, *pooling, None, "none", *of_gradients)
    images, size = torch.empty(2, 1, *extent, dtype=dtype), (40,) * len(extent)
    corners = torch.empty(8, 1 + len(extent), dtype=torch.int64)
    windows = roi_windows.roi_windows(images, corners, size)
    roi_windows.roi_windows_backward(windows, corners, images.shape)


def nvidia_resources(kernel: Any, target: str) -> dict[str, Any]:
    """Read from the binary by cuobjdump and nvdisasm."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        )
        code = subprocess.run([TOOLS / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True)

    def used(name: str) -> int:
        return int(re.search(rf"\b{name}:(\d+)", usage.stdout)[1])

    instructions = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", code.stdout)
    families = collections.Counter(name.split(".")[0] for name in instructions)

    def widest(family: str) -> int:
        widths = [32]
        for name in instructions:
            if name.split(".")[0] == family:
                widths += [int(part) for part in name.split(".") if part in ("64", "128")]
        return max(widths)

    return {
        "registers": used("REG"),
        "spills": families["LDL"] + families["STL"],
        "local": used("LOCAL") + used("STACK"),
        "shared": kernel.metadata.shared,
        "load_bits": widest("LDG"),
        "store_bits": widest("STG"),
        "occupancy": occupancy(target, kernel.metadata.num_warps, used("REG"), kernel.metadata.shared),
    }


def occupancy(target: str, warps: int, registers: int, shared: int) -> float:
    """Share of an SM's warps that blocks of this many can fill."""
    per_warp = -(-registers * 32 // 256) * 256
    blocks = min(REGISTERS_PER_SM // (per_warp * warps), WARPS_PER_SM // warps, 32)
    if shared:
        blocks = min(blocks, SHARED_PER_SM[target] // (shared + 1024))
    return round(blocks * warps / WARPS_PER_SM, 2)


def extension_resources() -> dict[str, dict[str, Any]]:
    """'target, CUDA C++, kernel<types>' -> what it needs, of lidnet_fast._C_cuda; nothing where that isn't built."""
    library = next(Path(lidnet_fast.__file__).parent.glob("_C_cuda.*so"), None)
    if library is None:
        return {}
    run = subprocess.run([TOOLS / "cuobjdump", "-res-usage", library], capture_output=True, text=True, check=True)
    table, target = {}, ""
    for line in run.stdout.splitlines():
        target = line.split()[-1] if line.startswith("arch = ") else target
        if found := re.match(r"\s*Function _Z\S*?\d([a-z_]+_kernel)I(\S+?)EEv", line):
            kernel = f"{found[1]}<{found[2]}>"
        elif (
            found := re.match(r"\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line)
        ) and target in SHARED_PER_SM:
            registers, stack, shared, local = map(int, found.groups())
            table[f"{target}, CUDA C++, {kernel}"] = {
                "registers": registers,
                "local": local + stack,
                "shared": shared,
                "occupancy": occupancy(target, CUDA_WARPS, registers, shared),
            }
    return dict(sorted(table.items()))


def amd_resources(kernel: Any) -> dict[str, Any]:
    """Read from the metadata in the assembly."""

    def used(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", kernel.asm["amdgcn"])[1])

    return {
        "registers": used("vgpr_count"),
        "spills": used("vgpr_spill_count") + used("sgpr_spill_count"),
        "local": used("private_segment_fixed_size"),
        "shared": used("group_segment_fixed_size"),
    }


def resources(targets: Iterator[str] | list[str], variants: Iterator[str] | list[str]) -> dict[str, dict[str, Any]]:
    """'target, variant, kernel' -> what it needs."""
    table = {}
    for target in targets:
        for variant in variants:
            with compiled(TARGETS[target]) as kernels:
                launch(**VARIANTS[variant])
            for name, kernel in kernels.items():
                row = nvidia_resources(kernel, target) if target.startswith("sm_") else amd_resources(kernel)
                table[f"{target}, {variant}, {name.lstrip('_')}"] = row
    return table


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"renew {RESOURCES.name}")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=TARGETS)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    arguments = parser.parse_args()
    table = resources(arguments.targets, arguments.variants) | extension_resources()
    if arguments.json:
        print(json.dumps(table))
    else:
        for name, row in table.items():
            print(f"{name:60}" + "  ".join(f"{key} {value}" for key, value in row.items()))
    if arguments.write:
        RESOURCES.write_text(json.dumps({"triton": triton.__version__, "kernels": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
