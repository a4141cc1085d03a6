"""A trained denoiser on slices of any size, within a bound on memory."""

from functools import cached_property
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from lidnet_fast._plausibility import warn_of_hu
from lidnet_fast.device import Precision, autocast, choose_precision
from lidnet_fast.errors import InputError
from lidnet_fast.inference.tiling import in_tiles
from lidnet_fast.models.denoisers import evaluated
from lidnet_fast.models.footprint import Reach
from lidnet_fast.models.hu import HUDenoiser
from lidnet_fast.models.onnx import OnnxDenoiser
from lidnet_fast.models.registry import first_line
from lidnet_fast.neighbours import neighbours

Stack = TypeVar("Stack", np.ndarray, Tensor)

_CPU_MEMORY = 2 * 2**30
_CUDA_SHARE = 0.8
"""Of a GPU's free memory."""
_UNTILEABLE = "what it makes of a pixel depends on the whole image or on its size"


class SliceDenoiser:
    """Denoises stacks of slices, as many at a time as memory allows, and in tiles where one is too large.

    A denoiser with a context takes the slices of a stack as neighbours, in their order, and repeats those at its ends.
    Tiles overlap by as far as the network looks, so that they give what the whole slice gives, up to rounding.

    Args:
        denoiser: HU in, HU out; moved to `device`. It computes in eval mode and keeps the mode that it is in.
        device: where it runs, such as "cpu" or "cuda"; ONNX runs on the CPU.
        precision: of the network; weights stay float32. "auto" is bfloat16 where the device computes in it, which moves
            what a network of your own gives by several HU unless it adds its correction to the input in float32.
        tile: largest side of a tile in pixels, without its overlap; None for whole slices where memory allows.
        batch_size: most slices at a time; None for 1 on the CPU and 8 on a GPU.
        blend: share of the denoised slice in the result, the rest is the original.

    Attributes:
        precision: "float32" or "bfloat16".
        batch_size: most slices at a time.
        envelope: what the denoiser was trained on; None where that is unknown.
        context: neighbouring slices on each side that the denoiser sees.

    Raises:
        TypeError: `denoiser` is not a `HUDenoiser`.
        InputError: an argument that can't work.
    """

    def __init__(
        self,
        denoiser: HUDenoiser,
        device: torch.device | str,
        *,
        precision: Precision = "float32",
        tile: int | None = None,
        batch_size: int | None = None,
        blend: float = 1.0,
    ) -> None:
        if not hasattr(denoiser, "envelope"):
            raise TypeError(
                f"denoiser must be a HUDenoiser, got {type(denoiser).__name__}. "
                "To fix: HUDenoiser(network, HUWindow(low, high))"
            )
        for name, value in (("tile", tile), ("batch_size", batch_size)):
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        if not 0 <= blend <= 1:
            raise InputError(f"blend must lie in [0, 1], got {blend}")
        device = torch.device(device)
        if isinstance(denoiser, OnnxDenoiser):
            if precision == "bfloat16":
                raise InputError("precision: ONNX computes in float32. To fix: leave --precision out")
            device, precision = torch.device("cpu"), "float32"
        on_cpu = device.type == "cpu"
        self.device, self.tile, self.blend, self.envelope = device, tile, blend, denoiser.envelope
        self.context = denoiser.context
        self.precision = choose_precision(precision, device)
        self.batch_size = batch_size or (1 if on_cpu else 8)
        self._memory = _CPU_MEMORY if on_cpu else int(_CUDA_SHARE * torch.cuda.mem_get_info(device)[0])
        try:
            with evaluated(denoiser):
                self._bytes_per_pixel = denoiser.bytes_per_pixel()
        except (ValueError, RuntimeError) as error:
            raise InputError(f"the denoiser fails on a small image: {first_line(error)}") from error
        # Several times as fast as the default layout in bfloat16 on the CPU.
        self._denoiser = denoiser.to(device).to(memory_format=torch.channels_last)
        if tile is not None and self._reach is None:
            raise InputError(f"tile: this denoiser can't work in tiles: {_UNTILEABLE}; leave tile out")

    @cached_property
    def _reach(self) -> Reach | None:
        """Found where tiles are needed; it takes seconds for a deep network."""
        return self._denoiser.reach()

    def __call__(self, hu: Stack, before: int = 0, after: int = 0) -> Stack:
        """Denoise a slice or a stack of slices. An `InputWarning` tells of values that can't be HU of a body.

        Args:
            hu: [H,W] or [N,H,W], HU; an array or a Tensor.
            before: how many of the first slices aren't wanted, and are there as neighbours of the others.
            after: how many of the last.

        Returns:
            float32, HU, of the kind of `hu` and without a graph: the slices wanted, of a slice one.

        Raises:
            TypeError: `hu` is neither an array nor a Tensor.
            InputError: `hu` has other dimensions, or the network can't take slices of this size, makes values of them
                that aren't finite, or doesn't fit into memory even in small tiles.
        """
        if isinstance(hu, Tensor):
            return torch.from_numpy(self(hu.detach().float().numpy(force=True), before, after)).to(hu.device)
        if not isinstance(hu, np.ndarray):
            raise TypeError(f"hu must be an array or a Tensor, [H,W] or [N,H,W], got {type(hu).__name__}")
        if hu.ndim not in (2, 3):
            raise InputError(f"hu must be [H,W] or [N,H,W], got {list(hu.shape)}")
        slices = hu.reshape(-1, *hu.shape[-2:]).astype(np.float32, copy=False)
        denoised = self._denoised(slices, range(before, len(slices) - after))
        return denoised if hu.ndim == 3 else denoised[0]

    def _denoised(self, hu: np.ndarray, wanted: range) -> np.ndarray:
        warn_of_hu(torch.from_numpy(hu))
        while True:
            try:
                with evaluated(self._denoiser):
                    denoised = self._denoise(hu, wanted)
                break
            except torch.OutOfMemoryError as error:
                if self._memory < self._bytes_per_pixel:
                    raise InputError(f"{self.device}: there isn't enough memory for a single pixel") from error
                self._memory //= 2
        if not np.isfinite(denoised).all():
            raise InputError("the denoiser made values that aren't finite")
        original = hu[wanted.start : wanted.stop]
        return original + np.float32(self.blend) * (denoised - original)

    @torch.inference_mode()
    def _denoise(self, hu: np.ndarray, wanted: range) -> np.ndarray:
        height, width = hu.shape[1:]
        at_once, side = self._plan(height, width)
        denoised = np.empty((len(wanted), height, width), np.float32)
        for start in range(0, len(wanted), at_once):
            seen = neighbours(np.array(wanted[start : start + at_once]), len(hu), self.context)
            images = torch.from_numpy(hu[seen]).to(self.device)
            if side is None:
                result = self._network(images)
            else:
                assert self._reach is not None
                result = in_tiles(self._network, images, side, self._reach)
            denoised[start : start + at_once] = result[:, 0].cpu().numpy()
        return denoised

    def _plan(self, height: int, width: int) -> tuple[int, int | None]:
        """Slices at a time, and the side of tiles or None for whole slices."""
        pixels = self._memory // self._bytes_per_pixel
        at_once = min(self.batch_size, pixels // (height * width))
        if at_once and (self.tile is None or self.tile >= max(height, width)):
            return at_once, None
        if self._reach is None:
            raise InputError(
                f"slices of {width} x {height} pixels don't fit into memory, and this denoiser can't work in tiles: "
                f"{_UNTILEABLE}"
            )
        around = self._reach.before + self._reach.after + 2 * self._reach.alignment
        side = int(pixels**0.5) - around
        if side < 1:
            raise InputError(f"{self.device}: there isn't enough memory for tiles of {around} x {around} pixels")
        return max(1, at_once), min(side, self.tile or side)

    def _network(self, images: Tensor) -> Tensor:
        try:
            with autocast(self.device, self.precision):
                return self._denoiser(images)
        except torch.OutOfMemoryError:
            raise
        except (ValueError, RuntimeError) as error:
            height, width = images.shape[-2:]
            raise InputError(f"the denoiser can't take {width} x {height} pixels: {first_line(error)}") from error
