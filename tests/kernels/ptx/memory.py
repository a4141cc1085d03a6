"""The memory that a kernel may access: the tensors of a launch, and each block's shared memory.

Every access is checked: inside, and of bytes that someone wrote; the caller sees to it that addresses are aligned. A
tensor that was allocated without values is declared by `Uninitialised.add`; all others count as written.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Lanes = NDArray[np.int64]
_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_ALL_WRITTEN = {size: dtype(int("01" * size, 16)) for size, dtype in _BITS.items()}


class MemoryAccessError(IndexError):
    """An access that no kernel may make."""


class Uninitialised:
    """Which tensors were allocated without values, and which of their bytes kernels have written since."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Tensor, int, NDArray[np.uint8]]] = {}

    def add(self, tensor: Tensor) -> None:
        """Keeps the tensor alive, so that nothing else is allocated in its place."""
        if size := tensor.untyped_storage().nbytes():
            written = np.zeros(-(-size // 8) * 8, np.uint8)
            self._known[tensor.untyped_storage().data_ptr()] = (tensor, tensor._version, written)

    def written(self, address: int) -> NDArray[np.uint8] | None:
        """A 1 per written byte of the storage at `address`, or None where all are."""
        known = self._known.get(address)
        if known is None or known[0]._version != known[1]:  # PyTorch has written to it
            return None
        return known[2]


@dataclass
class _Segment:
    start: int
    size: int
    data: NDArray[np.uint8]
    written: NDArray[np.uint8] | None
    storing: NDArray[np.int32] = field(init=False)  # the block that stored to a byte, or -1

    def __post_init__(self) -> None:
        self.storing = np.full(self.size, -1, np.int32)


class GlobalMemory:
    """The storages of a launch's tensors."""

    def __init__(self, tensors: Iterable[Tensor], uninitialised: Uninitialised) -> None:
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
        self._segments = []
        for start, storage in sorted(storages.items()):
            if size := storage.nbytes():
                data = torch.tensor([], dtype=torch.uint8).set_(storage).numpy()
                self._segments.append(_Segment(start, size, data, uninitialised.written(start)))
        self._starts = np.array([segment.start for segment in self._segments], np.uint64)

    def load(self, addresses: NDArray[np.uint64], size: int) -> NDArray[np.unsignedinteger]:
        """One value of `size` bytes per address."""
        values = np.empty(len(addresses), _BITS[size])
        for segment, lanes, offsets in self._places(addresses, size, "load"):
            at = offsets // size
            values[lanes] = segment.data[: segment.size // size * size].view(_BITS[size])[at]
            if segment.written is not None and (segment.written.view(_BITS[size])[at] != _ALL_WRITTEN[size]).any():
                raise MemoryAccessError(f"load from a tensor of {segment.size} bytes, of what nobody wrote")
        return values

    def store(
        self, addresses: NDArray[np.uint64], values: NDArray[np.unsignedinteger], blocks: NDArray[np.int32]
    ) -> None:
        """Stores each lane's value. Raises for an element that lanes of two blocks of a launch store to."""
        size = values.dtype.itemsize
        for segment, lanes, offsets in self._places(addresses, size, "store"):
            at = offsets // size
            segment.data[: segment.size // size * size].view(_BITS[size])[at] = values[lanes]
            if segment.written is not None:
                segment.written.view(_BITS[size])[at] = _ALL_WRITTEN[size]
            before = segment.storing[offsets]
            segment.storing[offsets] = blocks[lanes]
            if (((before >= 0) & (before != blocks[lanes])) | (segment.storing[offsets] != blocks[lanes])).any():
                raise MemoryAccessError("two blocks store the same element")

    def _places(
        self, addresses: NDArray[np.uint64], size: int, kind: str
    ) -> Iterator[tuple[_Segment, Lanes | slice, Lanes]]:
        if len(addresses) == 0:
            return
        found = np.searchsorted(self._starts, addresses, side="right") - 1
        for number in [found[0]] if (found == found[0]).all() else np.unique(found):
            lanes = slice(None) if (found == number).all() else np.flatnonzero(found == number)
            segment = self._segments[max(number, 0)]
            offsets = (addresses[lanes] - np.uint64(segment.start)).astype(np.int64)
            if number < 0 or (offsets + size > segment.size).any():
                raise MemoryAccessError(f"{kind} outside of every tensor")
            yield segment, lanes, offsets


class SharedMemory:
    """As many bytes for each block; nothing is written at first."""

    def __init__(self, blocks: int, size: int) -> None:
        self._size = -(-size // 16) * 16
        self._data = np.full(blocks * self._size, 0xFF, np.uint8)
        self._written = np.zeros_like(self._data)

    def load(self, blocks: NDArray[np.int32], addresses: Lanes, size: int) -> NDArray[np.unsignedinteger]:
        """One value of `size` bytes per lane, from its block's memory."""
        at = self._places(blocks, addresses, size)
        if (self._written.view(_BITS[size])[at] != _ALL_WRITTEN[size]).any():
            raise MemoryAccessError("load from shared memory, of what nobody wrote")
        return self._data.view(_BITS[size])[at]

    def store(self, blocks: NDArray[np.int32], addresses: Lanes, values: NDArray[np.unsignedinteger]) -> None:
        """Stores each lane's value."""
        size = values.dtype.itemsize
        at = self._places(blocks, addresses, size)
        self._data.view(_BITS[size])[at] = values
        self._written.view(_BITS[size])[at] = _ALL_WRITTEN[size]

    def _places(self, blocks: NDArray[np.int32], addresses: Lanes, size: int) -> Lanes:
        if ((addresses < 0) | (addresses + size > self._size)).any():
            raise MemoryAccessError(f"access outside of {self._size} bytes of shared memory")
        return (blocks.astype(np.int64) * self._size + addresses) // size
