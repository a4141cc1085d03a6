"""Files that are either whole or absent."""

import os
from pathlib import Path

from filelock import FileLock, Timeout

from lidnet_fast.errors import InputError


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text under a temporary name, then rename; parent folders are made."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Write a file under a temporary name (`path` and ".part"), then rename; parent folders are made.

    Raises:
        OSError: the file can't be written; it names `path`, and what was there before is as it was.
    """
    temporary = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # or a power cut could leave the new name with nothing in it
        temporary.replace(path)
    except OSError as error:
        if temporary.is_file():
            temporary.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from error


def lock(path: Path, held: str) -> FileLock:
    """Take a lock, which ends with its `release` or with this process.

    Args:
        path: the lock's file, which is made.
        held: the message where another process has it.

    Raises:
        InputError: another process has it.
    """
    taken = FileLock(path)
    try:
        taken.acquire(timeout=0)
    except Timeout as error:
        raise InputError(held) from error
    return taken
