"""The files of a study, wherever they lie below its folders."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from lidnet_fast.errors import InputError


def files_below(sources: Sequence[Path]) -> Iterator[Path]:
    """Yield every file below some folders (or the files themselves) once, in a stable order; links are followed.

    Raises:
        InputError: a source doesn't exist, or a folder can't be listed.
    """
    seen: set[str] = set()

    def new(path: str | Path) -> bool:
        real = os.path.realpath(path)
        known = real in seen
        seen.add(real)
        return not known

    for source in sources:
        if source.is_file():
            if new(source):
                yield source
            continue
        if not source.is_dir():
            raise InputError(f"{source}: there is no such file or folder")
        for folder, folders, names in os.walk(source, onerror=_refuse, followlinks=True):
            folders[:] = sorted(name for name in folders if new(Path(folder, name)))
            yield from (Path(folder, name) for name in sorted(names) if new(Path(folder, name)))


def _refuse(error: OSError) -> None:
    raise InputError(f"{error.filename}: can't be listed: {error.strerror}") from error
