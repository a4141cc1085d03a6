"""What the fuzzing tests share: damaged bytes and texts, and limits of time and memory that name what exceeds them."""

import contextlib
import faulthandler
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from hypothesis import strategies as st

from lidnet_fast.errors import InputError

SECONDS = 30
"""Far above what any example takes, so that only a hang reaches it."""
BYTES = 5 << 30
"""Address space that an example may add: little more than an element of DICOM can claim, which pydicom reserves."""

NUMBERS = [
    *("", "0", "-0", "-1", "1e-320", "1e-9", "0.5", "1.5", "2", "3", "65535", "65536", "1e30", "1e39", "1e200"),
    *("1e308", "1e999", "-1e308", "nan", "inf", "-inf", "9" * 30, "9" * 400, "9" * 5000),
    *("0x10", "1_0", "²", "٣", "x", "1;2", "\0"),
]  # fmt: skip
"""Texts where a number is expected."""


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """Fail on a hang, also of native code, and on memory out of proportion, even where it is taken for bad input."""
    usual = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()

    def stop(*_: object) -> None:
        raise TimeoutError(f"takes more than {SECONDS} seconds")

    handler = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    faulthandler.dump_traceback_later(2 * SECONDS, exit=True, file=sys.__stderr__)
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, usual[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, usual)
        faulthandler.cancel_dump_traceback_later()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)


@contextlib.contextmanager
def input_errors() -> Iterator[None]:
    """Pass over the one exception that bad input may cause."""
    try:
        yield
    except InputError as error:
        assert str(error)
        cause: BaseException | None = error
        while cause is not None:
            assert not isinstance(cause, MemoryError | TimeoutError | RecursionError), f"{error} hides {cause!r}"
            cause = cause.__cause__ or cause.__context__


@st.composite
def damaged(draw: st.DrawFn, content: bytes, places: int | None = None) -> bytes:
    """Flip, overwrite, cut out, insert or repeat some bytes, among the first `places`, or cut the end off."""
    result = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, min(len(result), places or len(result))))
        length = draw(st.integers(1, 16))
        kind = draw(st.sampled_from(["flip", "overwrite", "cut", "insert", "repeat", "end"]))
        if kind == "flip" and start < len(result):
            result[start] ^= 1 << draw(st.integers(0, 7))
        elif kind == "overwrite":
            result[start : start + length] = draw(st.binary(min_size=length, max_size=length))
        elif kind == "cut":
            del result[start : start + length]
        elif kind == "insert":
            result[start:start] = draw(st.binary(min_size=1, max_size=16))
        elif kind == "repeat":
            result[start:start] = result[start : start + length]
        elif kind == "end":
            del result[start:]
    return bytes(result)


@st.composite
def changed_table(draw: st.DrawFn, text: str) -> bytes:
    """A CSV text with some cells replaced; sometimes its bytes are damaged too."""
    rows = [line.split(",") for line in text.splitlines()]
    for _ in range(draw(st.integers(1, 3))):
        row = draw(st.sampled_from(rows[draw(st.integers(0, 1)) :]))
        row[draw(st.integers(0, len(row) - 1))] = draw(st.sampled_from(NUMBERS) | st.text(max_size=5))
    content = "\n".join(",".join(row) for row in rows).encode("utf-8", "surrogatepass")
    return draw(st.just(content) | damaged(content))
