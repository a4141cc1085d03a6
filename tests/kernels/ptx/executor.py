"""Runs a kernel's PTX on the CPU, without a GPU or its driver: many blocks of threads at once, as numpy arrays.

Threads that a branch divides wait for each other where their ways meet: of all places at which lanes stand, the first
in the program runs. A block's barrier waits for all of its threads that haven't returned. Warps run in lockstep, so
races in shared memory aren't seen.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
from numpy.typing import NDArray

from .arithmetic import OPERATIONS, ROUNDED, TYPES, Array, as_type, bits_of, compare, convert
from .memory import GlobalMemory, MemoryAccessError, SharedMemory
from .program import Instruction, Program

Mask = NDArray[np.bool_]
_LANES = 1 << 14  # that run together
WARP = 32
_REDUCTIONS = {"add": np.add, "max": np.maximum, "min": np.minimum}
_SECTOR = 32  # bytes


class ExecutionError(RuntimeError):
    """The kernel did what no kernel may, or something that isn't modelled."""


class DeviceAssertionError(AssertionError):
    """An assertion of the kernel's failed; the message is the kernel's."""


@dataclass
class Executed:
    """What a launch did."""

    instructions: Counter[str] = field(default_factory=Counter)  # issued by warps, per opcode
    warps: int = 0
    loaded: int = 0  # bytes of global memory; what several threads of a block load at once counts once
    stored: int = 0
    sectors_loaded: int = 0  # of 32 bytes, which the warps ask the memory for
    sectors_stored: int = 0

    def add(self, other: "Executed") -> None:
        """Adds what another launch did."""
        self.instructions.update(other.instructions)
        for name in ("warps", "loaded", "stored", "sectors_loaded", "sectors_stored"):
            setattr(self, name, getattr(self, name) + getattr(other, name))


def execute(
    program: Program,
    arguments: Sequence[int | bytes],
    blocks: Sequence[int],
    memory: GlobalMemory,
    shared: int,
    counts: Executed,
    grid: int,
) -> None:
    """Runs blocks of a launch on a grid of one dimension.

    Args:
        program: the kernel.
        arguments: per parameter a number, the bits of a pointer or an integer, or the bytes of a struct.
        blocks: their numbers in the grid.
        memory: what pointers may point to.
        shared: bytes of shared memory of a block.
        counts: what the launch did is added to it.
        grid: how many blocks the whole launch has.

    Raises:
        DeviceAssertionError: for an assertion of the kernel's that fails.
        ExecutionError: for threads that part at a barrier or a shuffle, and for what isn't modelled.
        MemoryAccessError: for an access outside, misaligned, of uninitialised memory, or to what another block stores.
    """
    at_once = max(_LANES // program.threads, 1)
    for first in range(0, len(blocks), at_once):
        _Lanes(program, arguments, blocks[first : first + at_once], memory, shared, counts, grid).run()
    counts.warps += len(blocks) * program.threads // WARP


@cache
def _immediate(text: str, dtype: np.dtype) -> np.generic:
    """A constant operand."""
    if text.startswith(("0f", "0F")):
        return np.uint32(int(text[2:], 16)).view(dtype)
    if text.startswith(("0d", "0D")):
        return np.uint64(int(text[2:], 16)).view(dtype)
    bits = np.dtype(f"u{dtype.itemsize}").type(int(text, 0) & ((1 << 8 * dtype.itemsize) - 1))
    return bits.view(dtype)


@cache
def _address(operand: str) -> tuple[str, int]:
    """Base and offset of "[%rd1 + 16]"."""
    found = re.fullmatch(r"\[\s*([%\w]+)\s*(?:\+\s*(-?\w+))?\s*\]", operand)
    if found is None:
        raise ExecutionError(f"an address that isn't understood: {operand}")
    return found[1], int(found[2] or "0", 0)


@cache
def _variable(operand: str) -> str:
    """The variable of a call in "[param0+0]", which holds one number."""
    name, offset = _address(operand)
    if offset:
        raise ExecutionError(f"not modelled: a call with more than a number in {operand}")
    return name


@cache
def _parts(operand: str) -> tuple[str, ...]:
    """The registers of "{%r1, %r2}", or the one of "%r1"."""
    return tuple(part.strip() for part in operand.strip("{} ").split(","))


class _Lanes:
    """The threads of some blocks, in lanes; warp w is lanes 32 w to 32 w + 31."""

    def __init__(
        self,
        program: Program,
        arguments: Sequence[int | bytes],
        blocks: Sequence[int],
        memory: GlobalMemory,
        shared: int,
        counts: Executed,
        grid: int,
    ) -> None:
        count = program.threads * len(blocks)
        self._program, self._count = program, count
        self._memory, self._shared, self._counts = memory, SharedMemory(len(blocks), shared), counts
        given = zip(arguments, program.parameters.values(), strict=True)
        self._parameters = np.zeros(max((place.stop for place in program.parameters.values()), default=0), np.uint8)
        for argument, place in given:
            held = (
                argument
                if isinstance(argument, bytes)
                else argument.to_bytes(len(place), "little", signed=argument < 0)
            )
            self._parameters[place.start : place.stop] = np.frombuffer(held, np.uint8)
        lane = np.arange(count, dtype=np.uint32)
        self._block = (lane // program.threads).astype(np.int32)  # of these
        self._block_number = np.asarray(blocks, np.int32)[self._block]
        self._registers: dict[str, Array] = {
            "%tid.x": lane % np.uint32(program.threads),
            "%laneid": lane % np.uint32(WARP),
            "%ctaid.x": self._block_number.astype(np.uint32),
            "%nctaid.x": np.full(count, grid, np.uint32),
        }
        self._waiting: dict[int, Mask] = {0: np.ones(count, np.bool_)}  # by the place where they stand
        self._at_barrier: dict[int, Mask] = {}
        self._returned = np.zeros(count, np.bool_)

    def run(self) -> None:
        with np.errstate(all="ignore"):
            while self._waiting:
                place = min(self._waiting)
                active = self._waiting.pop(place)
                self._warps, self._whole = int(active.reshape(-1, WARP).any(axis=1).sum()), bool(active.all())
                # Straight on, until these lanes branch or come to where others stand.
                self._step(place, active)
                while self._goes_on(place, active):
                    place += 1
                    self._step(place, active)

    def _step(self, place: int, active: Mask) -> None:
        """Sets what the instruction does to its lanes: `_running`, those for which its predicate holds."""
        self._now = self._program.instructions[place]
        self._counts.instructions[".".join(self._now.opcode)] += self._warps
        self._running, self._all = active, self._whole
        if self._now.predicate is not None:
            holds = self._registers[self._now.predicate]
            self._running = active & (~holds if self._now.negated else holds)
            self._all = False
        if self._now.opcode[0] not in ("bra", "ret", "bar") and self._running.any():
            self._do(self._now)

    def _goes_on(self, place: int, active: Mask) -> bool:
        """Whether the lanes go on to the next instruction now; otherwise notes where they stand."""
        kind, running = self._now.opcode[0], self._running
        if kind == "bra":
            self._stand(self._program.labels[self._now.operands[0]], running)
            self._stand(place + 1, active & ~running)
            return False
        if kind == "ret":
            self._returned |= running
            self._stand(place + 1, active & ~running)
            self._release()
            return False
        if kind == "bar":
            if not np.array_equal(running, active):
                raise ExecutionError(f"a barrier under a predicate that divides threads: {self._now.text}")
            self._at_barrier[place] = self._at_barrier.get(place, np.zeros_like(active)) | active
            self._release()
            return False
        if place + 1 in self._waiting:
            self._stand(place + 1, active)
            return False
        return True

    def _stand(self, place: int, lanes: Mask) -> None:
        if lanes.any():
            others = self._waiting.get(place)
            self._waiting[place] = lanes if others is None else others | lanes

    def _release(self) -> None:
        """Lets blocks pass a barrier that all of their threads have come to, or have returned."""
        for place, there in list(self._at_barrier.items()):
            complete = (there | self._returned).reshape(-1, self._program.threads).all(axis=1)
            passing = there & np.repeat(complete, self._program.threads)
            if (there & ~passing).any():
                self._at_barrier[place] = there & ~passing
            else:
                del self._at_barrier[place]
            self._stand(place + 1, passing)
        if not self._waiting and self._at_barrier:
            raise ExecutionError("a barrier that some threads of a block never come to")

    def _read(self, operand: str, dtype: np.dtype) -> Array:
        if operand.startswith("%"):
            return as_type(self._registers[operand], dtype)
        for variables in (self._program.parameters, self._program.shared):
            if operand in variables:  # its address in their memory
                return np.full(self._count, variables[operand].start, dtype)
        if operand in self._program.texts:  # its place among them, in place of an address
            return np.full(self._count, list(self._program.texts).index(operand), dtype)
        return np.full(self._count, 0 if operand == "global_smem" else _immediate(operand, dtype), dtype)

    def _write(self, register: str, values: Array) -> None:
        if register == "_":
            return
        values = bits_of(values)
        if not self._all:
            before = self._registers.get(register)
            if before is None or before.dtype != values.dtype:  # what nobody wrote is all ones: NaN, -1
                before = np.full(self._count, -1, np.int64).astype(values.dtype)
            values = np.where(self._running, values, before)
        self._registers[register] = values

    def _do(self, now: Instruction) -> None:
        opcode, operands = now.opcode, now.operands
        kind = opcode[0]
        if kind == "ld" and opcode[1] == "param":
            self._load_parameter(now)
        elif kind == "st" and opcode[1] == "param":
            self._write(_variable(operands[0]), self._read(operands[1], TYPES[opcode[-1]]))
        elif kind == "call":
            self._fail(now)
        elif kind in ("ld", "st"):
            self._access(now)
        elif kind in ("ldmatrix", "stmatrix"):
            self._access_matrices(now)
        elif kind in ("shfl", "redux", "elect"):
            self._exchange(now)
        elif kind == "setp":
            dtype = TYPES[opcode[-1]]
            if len(operands) != 3:
                raise ExecutionError(f"not modelled: {now.text}")
            values = [self._read(operand, dtype) for operand in operands[1:]]
            if opcode[-1] == "bf16":  # whose bits numpy can't compare
                values = [convert(x, "bf16", "f32", set()) for x in values]
            self._write(operands[0], compare(opcode[1], *values))
        elif kind == "selp":
            dtype = TYPES[opcode[-1]]
            chosen = np.where(self._registers[operands[3]], *(self._read(x, dtype) for x in operands[1:3]))
            self._write(operands[0], chosen)
        elif kind == "cvt":
            self._convert(now)
        elif kind == "mov" and "{" in now.text:
            self._pack(now)
        else:
            self._compute(now)

    def _fail(self, now: Instruction) -> None:
        """The one call of what isn't in the PTX that is modelled: __assertfail(message, ...)."""
        if not now.text.startswith("call.uni __assertfail, (param0"):
            raise ExecutionError(f"not modelled: {now.text}")
        message = int(self._registers["param0"][self._running][0])
        raise DeviceAssertionError(list(self._program.texts.values())[message])

    def _load_parameter(self, now: Instruction) -> None:
        """Of the memory of parameters, in which each has its place; compilers choose among parameters by address.

        A call's variables are registers instead.
        """
        size = TYPES[now.opcode[-1]].itemsize
        base, offset = _address(now.operands[1])
        if not base.startswith("%") and base not in self._program.parameters:
            self._write(now.operands[0], self._registers[_variable(now.operands[1])])
            return
        lanes = np.flatnonzero(self._running)
        start = self._read(base, np.dtype(np.uint64))[lanes].astype(np.int64) + offset
        for number, register in enumerate(_parts(now.operands[0])):
            at = start + number * size
            if ((at < 0) | (at + size > len(self._parameters))).any():
                raise MemoryAccessError(f"outside of all parameters: {now.text}")
            values = np.full(self._count, -1, np.int64).astype(f"u{size}")
            values[lanes] = self._parameters[at[:, None] + np.arange(size)].copy().view(f"u{size}")[:, 0]
            self._write(register, values)

    def _access(self, now: Instruction) -> None:
        """ld and st of global and shared memory, of one value or a vector of them."""
        size = TYPES[now.opcode[-1]].itemsize
        loads = now.opcode[0] == "ld"
        address, registers = now.operands if not loads else now.operands[::-1]
        parts = _parts(registers)
        lanes = np.flatnonzero(self._running)
        base, offset = _address(address)
        shared = now.opcode[1] == "shared"
        if not shared and now.opcode[1] != "global":
            raise ExecutionError(f"not modelled: {now.text}")
        start = self._read(base, np.dtype(np.uint32 if shared else np.uint64))[lanes].astype(np.int64) + offset
        if (start % (size * len(parts))).any():
            raise MemoryAccessError(f"an address that isn't aligned: {now.text}")
        blocks = self._block[lanes]
        if not shared:
            self._count_access(now.text, loads, lanes, start, size * len(parts))
        for number, register in enumerate(parts):
            at = start + number * size
            if loads:
                values = np.full(self._count, -1, np.int64).astype(f"u{size}")
                values[lanes] = (
                    self._shared.load(blocks, at, size) if shared else self._memory.load(at.astype(np.uint64), size)
                )
                self._write(register, values)
            else:
                values = self._read(register, np.dtype(f"u{size}"))[lanes]
                if shared:
                    self._shared.store(blocks, at, values)
                else:
                    self._memory.store(at.astype(np.uint64), values, self._block_number[lanes])

    def _count_access(self, text: str, loads: bool, lanes: Array, start: Array, size: int) -> None:
        """Adds to the counts. Raises where several threads of a block store to one place, of which one would win."""
        size_of_all = size * self._distinct(lanes, start, self._program.threads)
        sectors = self._distinct(lanes, start // _SECTOR, WARP)
        if loads:
            self._counts.loaded += size_of_all
            self._counts.sectors_loaded += sectors
        else:
            self._counts.stored += size_of_all
            self._counts.sectors_stored += sectors
            if size_of_all != size * len(lanes):
                raise ExecutionError(f"several threads store the same element: {text}")

    def _distinct(self, lanes: Array, values: Array, group: int) -> int:
        """How many different values the lanes of each group of so many have, over all groups."""
        rows = np.full(self._count, -1, np.int64)
        rows[lanes] = values
        rows = np.sort(rows.reshape(-1, group), axis=1)
        return int((rows[:, 1:] != rows[:, :-1]).sum() + (rows[:, 0] >= 0).sum())

    def _access_matrices(self, now: Instruction) -> None:
        """ldmatrix, stmatrix: matrices of 8 x 8 halves.

        Lane 8 m + r has the address of row r of matrix m. Each lane has two neighbours of every matrix: lane 4 r + c
        those of row r, columns 2 c and 2 c + 1.
        """
        self._check_whole_warps(now)
        if "trans" in now.opcode:
            raise ExecutionError(f"not modelled: {now.text}")
        loads = now.opcode[0] == "ldmatrix"
        address, registers = now.operands if not loads else now.operands[::-1]
        base, offset = _address(address)
        rows = self._read(base, np.dtype(np.uint32)).astype(np.int64).reshape(-1, WARP) + offset
        lane = np.arange(WARP)
        running = np.flatnonzero(self._running)
        for number, register in enumerate(_parts(registers)):
            at = (rows[:, 8 * number + lane // 4] + 4 * (lane % 4)).reshape(-1)[running]
            if loads:
                values = np.zeros(self._count, np.uint32)
                values[running] = self._shared.load(self._block[running], at, 4)
                self._write(register, values)
            else:
                self._shared.store(self._block[running], at, self._read(register, np.dtype(np.uint32))[running])

    def _exchange(self, now: Instruction) -> None:
        """Between the lanes of a warp."""
        self._check_whole_warps(now)
        operands, lane = now.operands, np.arange(self._count)
        within = lane % WARP
        if now.opcode[0] == "elect":
            self._write(_parts(operands[0].replace("|", ","))[1], within == 0)
        elif now.opcode[0] == "redux":
            if now.opcode[2] not in _REDUCTIONS or now.opcode[3] != "s32":
                raise ExecutionError(f"not modelled: {now.text}")
            warps = self._read(operands[1], np.dtype(np.int32)).reshape(-1, WARP)
            self._write(operands[0], np.repeat(_REDUCTIONS[now.opcode[2]].reduce(warps, axis=1, dtype=np.int32), WARP))
        else:
            by = self._read(operands[2], np.dtype(np.int32)).astype(np.int64)
            other = {"bfly": within ^ by, "up": within - by, "down": within + by, "idx": by % WARP}[now.opcode[2]]
            inside = (other >= 0) & (other < WARP)
            source = lane - within + np.where(inside, other, within)
            destination, *exists = operands[0].split("|")
            self._write(destination.strip(), self._read(operands[1], np.dtype(np.uint32))[source])
            if exists:
                self._write(exists[0].strip(), inside)

    def _check_whole_warps(self, now: Instruction) -> None:
        warps = self._running.reshape(-1, WARP)
        if (warps.any(axis=1) != warps.all(axis=1)).any():
            raise ExecutionError(f"only some threads of a warp come to {now.text}")

    def _convert(self, now: Instruction) -> None:
        target, source = now.opcode[-2:]
        modifiers = set(now.opcode[1:-2])
        if modifiers - {"rn", "rzi", "rni", "rmi", "rpi", "ftz"}:
            raise ExecutionError(f"not modelled: {now.text}")
        values = [self._read(operand, TYPES[source]) for operand in now.operands[1:]]
        if target.endswith("x2"):
            upper, lower = (bits_of(convert(x, source, target[:-2], modifiers)).astype(np.uint32) for x in values)
            self._write(now.operands[0], upper << np.uint32(16) | lower)
        else:
            self._write(now.operands[0], convert(values[0], source, target, modifiers))

    def _pack(self, now: Instruction) -> None:
        """mov between a register and the parts of it, the lowest first."""
        to, source = now.operands
        size = TYPES[now.opcode[-1]].itemsize
        parts = _parts(to if to.startswith("{") else source)
        part = np.dtype(f"u{size // len(parts)}")
        if to.startswith("{"):
            whole = self._read(source, np.dtype(f"u{size}"))
            for number, register in enumerate(parts):
                self._write(register, (whole >> whole.dtype.type(8 * part.itemsize * number)).astype(part))
        else:
            whole = np.zeros(self._count, f"u{size}")
            for number, register in enumerate(parts):
                whole |= self._read(register, part).astype(whole.dtype) << whole.dtype.type(8 * part.itemsize * number)
            self._write(to, whole)

    def _compute(self, now: Instruction) -> None:
        kind, *modifiers, type_name = now.opcode
        operation = OPERATIONS.get((kind, *(m for m in modifiers if m not in ROUNDED)))
        if operation is None:
            raise ExecutionError(f"not modelled: {now.text}")
        if type_name == "pred":
            operands = [self._predicate(operand) for operand in now.operands[1:]]
        else:
            dtype = TYPES[type_name]
            dtypes = [dtype] * 3
            if kind in ("shl", "shr"):
                dtypes[1] = np.dtype(np.uint32)
            elif now.opcode[:2] == ("mad", "wide"):
                dtypes[2] = np.dtype(f"{dtype.kind}{2 * dtype.itemsize}")
            elif kind == "bfe":
                dtypes[1:] = [np.dtype(np.uint32)] * 2
            operands = [self._read(x, t) for x, t in zip(now.operands[1:], dtypes, strict=False)]
        self._write(now.operands[0], operation(*operands))

    def _predicate(self, operand: str) -> Array:
        if operand.startswith("%"):
            return self._registers[operand]
        return np.full(self._count, int(operand, 0) != 0)
