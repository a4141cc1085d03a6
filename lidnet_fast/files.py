"""The one way to write files: each appears whole under its name, or not at all.

Everything is written under an unguessable temporary name in the folder that it belongs to, and renamed when it is
complete. A temporary file is always new: what somebody else put under its name, be it a link, is never written to.
Permissions are those that the umask leaves, within `as_private_as` no more than sources have. A killed process can
leave a temporary file behind, which the command that owns the folder removes with `remove_temporary`.
"""

import contextlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

from lidnet_fast.errors import InputError

_TEMPORARY = re.compile(r"\.[0-9a-f]{16}\.part")


def make_folder(path: Path) -> Path:
    """Make a folder and its parents where they are missing; returns the path.

    Raises:
        InputError: a file has this name.
        OSError: the folder can't be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise InputError(f"{path}: is a file, and a folder is needed. To fix: choose another name") from None
    return path


def own_folder(path: Path, mode: int = 0o777) -> Path:
    """As `make_folder`, for unfinished work under a name that others can know: what they put there isn't written to.

    Raises:
        InputError: it is a link, a file, or another user's.
    """
    make_folder(path.parent)
    try:
        path.mkdir(mode)
    except FileExistsError:
        there = path.lstat()
        theirs = hasattr(os, "geteuid") and there.st_uid != os.geteuid()
        if theirs or not stat.S_ISDIR(there.st_mode):
            raise InputError(
                f"{path}: unfinished results belong here, but it's a link, a file or another user's. "
                "To fix: remove it, or choose another place"
            ) from None
    return path


@contextlib.contextmanager
def whole(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that becomes `path` when the block ends well; parent folders are made.

    Args:
        path: the file's final name; a file or link of this name is replaced.

    Yields:
        The file, open for binary writing.

    Raises:
        OSError: the file can't be written; the error names `path`, and what was there before is as it was.
    """
    with _temporary(path) as temporary:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
        with os.fdopen(os.open(temporary, flags, 0o666), "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # or a power cut could leave the new name with nothing in it
        temporary.replace(path)


@contextlib.contextmanager
def whole_path(path: Path) -> Iterator[Path]:
    """As `whole`, for what is written by name: by a library, or as a folder of files.

    Args:
        path: the final name. A file of this name is replaced; a folder isn't.

    Yields:
        A path of the same name in a new, empty folder. What is made there is moved next to `path`: first any companions
        (a header's file of voxels), then `path` itself.

    Raises:
        OSError: as `whole`.
    """
    with _temporary(path) as folder:
        folder.mkdir()
        yield folder / path.name
        for made in sorted(folder.iterdir(), key=lambda made: made.name == path.name):
            move_whole(made, path.with_name(made.name))


@contextlib.contextmanager
def as_private_as(sources: Iterable[Path]) -> Iterator[None]:
    """Within the block, nothing that this process makes is more readable than any of the sources.

    Whom a source's permissions keep out, or those of a folder on the way to it, gets none, whatever the umask allows:
    the block's umask is the stricter one of both. It holds for all threads, and for what libraries write.

    Args:
        sources: files and folders; those that don't exist count for nothing.
    """
    usual = os.umask(0o077)
    try:
        os.umask(usual | _kept_out(sources))
        yield
    finally:
        os.umask(usual)


def _kept_out(sources: Iterable[Path]) -> int:
    """The bits of a umask for those, of group and others, who can't read all of some files and folders."""
    readable, folders = stat.S_IRGRP | stat.S_IROTH, set()
    for source in sources:
        with contextlib.suppress(FileNotFoundError):
            readable &= source.stat().st_mode
            folders.add((source.resolve() if source.is_symlink() else source.absolute()).parent)
    real = {folder.resolve() for folder in folders}
    for folder in real.union(*(folder.parents for folder in real)):
        readable &= (folder.stat().st_mode & (stat.S_IXGRP | stat.S_IXOTH)) << 2
    return sum(who for who, bit in ((stat.S_IRWXG, stat.S_IRGRP), (stat.S_IRWXO, stat.S_IROTH)) if not readable & bit)


def move_whole(made: Path, path: Path) -> None:
    """Give a finished file or folder its final name, once its content is on the disk.

    Raises:
        OSError: it can't be renamed, or `path` is a folder that isn't empty.
    """
    for file in (path for path in made.rglob("*") if path.is_file()) if made.is_dir() else [made]:
        with file.open("rb") as content:
            os.fsync(content.fileno())
    made.replace(path)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text; see `whole`."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Write a file's content; see `whole`."""
    with whole(path) as file:
        file.write(content)


def is_temporary(path: Path) -> bool:
    """Whether this is the name of something unfinished: being written now, or left by a killed process."""
    return bool(_TEMPORARY.fullmatch(path.name))


def remove_temporary(folder: Path) -> None:
    """Remove what killed processes left unfinished anywhere below a folder that no other process writes to."""
    for path in filter(is_temporary, list(folder.rglob(".*"))):
        remove(path)


def remove(path: Path) -> None:
    """Remove a file, a link, or a folder with everything in it, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


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


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A name next to `path` that nobody can know; what has it is removed at the end. Errors about it name `path`."""
    temporary = path.with_name(f".{secrets.token_hex(8)}.part")
    ours = (None, str(path.parent))
    try:
        make_folder(path.parent)
        yield temporary
    except OSError as error:
        if error.filename in ours or str(error.filename).startswith(str(temporary)):
            raise OSError(error.errno, error.strerror or str(error), str(path)) from error
        raise
    finally:
        with contextlib.suppress(OSError):
            remove(temporary)
