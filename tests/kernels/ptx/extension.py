"""Kernels of csrc/cuda: the PTX that nvcc makes of them for sm_90, run on the executor. No GPU needed."""

import ctypes
import functools
import random
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from .executor import WARP, Executed, execute
from .memory import GlobalMemory, Uninitialised
from .program import Program, parse

SOURCES = Path(__file__).parents[3] / "csrc" / "cuda"
# In the order of csrc/storage.h; how a kernel's name ends that is compiled for them.
_MANGLED = {torch.float32: "f", torch.float64: "d", torch.float16: "NS0_4HalfE", torch.bfloat16: "NS0_8BFloat16E"}


class MaskLaunch(ctypes.Structure):
    """As csrc/cuda/multi_loss.h has it."""

    _fields_ = (
        ("rois", ctypes.c_void_p),
        ("boxes", ctypes.c_int64),
        ("storage", ctypes.c_int),
        ("volume", ctypes.c_bool),
        *((name, ctypes.c_int64) for name in ("images", "depth", "height", "width")),
        ("mask", ctypes.c_void_p),
        ("inside", ctypes.c_void_p),
    )


class GramianLaunch(ctypes.Structure):
    """As csrc/cuda/gradients.h has it."""

    _fields_ = (
        ("gradients", ctypes.c_void_p),
        ("storage", ctypes.c_int),
        *((name, ctypes.c_int64) for name in ("count", "samples", "length")),
        ("partial", ctypes.c_void_p),
        ("result", ctypes.c_void_p),
    )


class ScalesLaunch(ctypes.Structure):
    """As csrc/cuda/multi_loss.h has it."""

    _fields_ = (
        ("sums", ctypes.c_void_p * 5),
        ("blocks", ctypes.c_int64 * 5),
        ("windows", ctypes.c_int64 * 5),
        ("planes", ctypes.c_int64),
        ("wide", ctypes.c_bool),
        ("coefficient", ctypes.c_double),
        ("similarities", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
    )


def nvcc() -> Path | None:
    """The compiler on the PATH or of PyPI's nvidia-cuda-nvcc."""
    packages = Path(sysconfig.get_path("purelib"))
    found = [shutil.which("nvcc"), *sorted(packages.glob("nvidia/cu*/bin/nvcc"))]
    return next((Path(path) for path in found if path), None)


@functools.cache
def compiled(source: Path) -> str:
    """The PTX of a .cu file.

    Raises:
        FileNotFoundError: There is no nvcc.
    """
    compiler = nvcc()
    if compiler is None:
        raise FileNotFoundError("needs nvcc (pip install 'cuda-toolkit[nvcc,cccl]')")
    with TemporaryDirectory() as folder:
        ptx = Path(folder) / "kernels.ptx"
        command = [compiler, "-std=c++17", "-O3", "-arch=sm_90", "-ptx", source, "-o", ptx]
        subprocess.run(command, capture_output=True, text=True, check=True)
        return ptx.read_text()


def nvcc_version() -> str | None:
    """Such as "13.0"."""
    compiler = nvcc()
    if compiler is None:
        return None
    said = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    return said.partition("release ")[2].partition(",")[0]


class Launches:
    """Launches of kernels in csrc/cuda as their own host code makes them, and what they did.

    Args:
        most: Only so many blocks of each run, drawn at random: for counting, not for results.
        sources: The folder of the kernels' sources.

    Attributes:
        executed: Kernel -> what it did.
        warps: Kernel -> how many warps its grid has.
    """

    def __init__(self, most: int | None = None, sources: Path = SOURCES) -> None:
        self.executed: dict[str, Executed] = {}
        self.warps: dict[str, int] = {}
        self._most, self._sources = most, sources

    def covered(self, rois: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The mask of boxes in images of a shape (images, depth, rows, columns), and its sums over tiles of 32 x 32."""
        images, depth, rows, columns = shape
        blocks = images * depth * -(-rows // 32) * -(-columns // 32)
        mask, inside = torch.full(shape, 9, dtype=torch.uint8), torch.full((blocks,), -1, dtype=torch.int32)
        volume, sides = rois.shape[1] == 7, (images, depth, rows, columns)
        launch = MaskLaunch(_at(rois), len(rois), _storage(rois), volume, *sides, _at(mask), _at(inside))
        kernel = f"mask_kernelI{_MANGLED[rois.dtype]}E"
        self._launch("multi_loss_values.cu", kernel, blocks, [launch], [rois, mask, inside])
        return mask, inside

    def scales(
        self, sums: Sequence[Tensor], windows: Sequence[int], coefficient: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """MS-SSIM of each plane and what its windows at each scale weigh, from sums of blocks [2, planes, blocks]."""
        planes = sums[0].shape[1]
        similarities = torch.full((planes,), torch.nan, dtype=torch.float64)
        weights = torch.full((len(sums), planes), torch.nan, dtype=dtype)
        launch = ScalesLaunch(
            sums=tuple(map(_at, sums)),
            blocks=tuple(of_scale[0].numel() for of_scale in sums),
            windows=tuple(windows),
            planes=planes,
            wide=dtype == torch.float64,
            coefficient=coefficient,
            similarities=_at(similarities),
            weights=_at(weights),
        )
        kernel, tensors = f"scales_kernelI{_MANGLED[dtype]}E", [*sums, similarities, weights]
        self._launch("multi_loss_values.cu", kernel, planes, [launch], tensors)
        return similarities, weights

    def gramian(self, gradients: Tensor) -> Tensor:
        """Of gradients [count, values]."""
        count, length = gradients.shape
        chunks = min(-(-length // 2048), 256)
        values = -(-length // (256 * chunks)) * 256
        result = torch.zeros(count, count, dtype=torch.promote_types(gradients.dtype, torch.float32))
        partial = torch.zeros(count, count, chunks, dtype=torch.float64)
        launch = GramianLaunch(_at(gradients), _storage(gradients), count, 1, length, _at(partial), _at(result))
        group, tensors = 4 if count <= 4 else 6, [gradients, partial, result]
        multiply = f"multiply_kernelI{_MANGLED[gradients.dtype]}Li{group}E"
        blocks = (-(-count // group)) ** 2 * chunks
        self._launch("gradients_kernels.cu", multiply, blocks, [launch, chunks, values], tensors)
        add = f"add_chunks_kernelI{_MANGLED[result.dtype]}E"
        self._launch("gradients_kernels.cu", add, -(-count * count // 8), [launch, chunks], tensors)
        return result

    def _launch(
        self,
        source: str,
        name: str,
        blocks: int,
        arguments: Sequence[int | ctypes.Structure],
        tensors: Sequence[Tensor],
    ) -> None:
        kernel, executed = _program(self._sources / source, name), Executed()
        numbers: Sequence[int] = range(blocks)
        if self._most is not None and self._most < blocks:
            numbers = random.Random(0).sample(numbers, self._most)
        held = [bytes(argument) if isinstance(argument, ctypes.Structure) else argument for argument in arguments]
        shared = max((place.stop for place in kernel.shared.values()), default=0)
        execute(kernel, held, numbers, GlobalMemory(tensors, Uninitialised()), shared, executed, blocks)
        short = name.partition("I")[0]
        self.executed[short], self.warps[short] = executed, blocks * kernel.threads // WARP


@functools.cache
def _program(source: Path, kernel: str) -> Program:
    """The kernel of a .cu file whose mangled name holds `kernel`."""
    return parse(compiled(source), kernel)


def _at(tensor: Tensor) -> int:
    return tensor.data_ptr()


def _storage(tensor: Tensor) -> int:
    return list(_MANGLED).index(tensor.dtype)
