"""The files of a study, wherever they lie below its folders."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from lidnet_fast.errors import InputError


def files_below(sources: Sequence[Path]) -> Iterator[Path]:
    """Yield every file below some folders (or the files themselves) once, in a stable order; links are followed.

    Raises:
        InputError: a source doesn't exist.
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
        elif not source.is_dir():
            raise InputError(f"{source}: there is no such file or folder")
        for folder, folders, names in os.walk(source, followlinks=True):
            folders[:] = sorted(name for name in folders if new(Path(folder, name)))
            yield from (Path(folder, name) for name in sorted(names) if new(Path(folder, name)))
