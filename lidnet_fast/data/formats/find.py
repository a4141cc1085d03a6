"""The one gate for input files: what lies below a user's folders.

Only regular files pass. A link below a folder is followed where it leads to somewhere inside the folders given, since
it could otherwise bring in whatever its author can name; further only where the user says so. What is skipped is
counted by its reason.
"""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

from lidnet_fast.data.formats.account import Account
from lidnet_fast.errors import InputError

_LARGE = 64 << 20


@dataclasses.dataclass
class Files(Account):
    """Files to read; those that were found and may not be read are the account.

    Attributes:
        paths: regular files, each once, in a stable order.
    """

    paths: list[Path] = dataclasses.field(default_factory=list)


def files_below(sources: Sequence[Path], without: Path | None = None, *, follow_links: bool = False) -> Files:
    """List every file below some folders (or the files themselves) once, in a stable order.

    Args:
        sources: folders or files; a source that is itself a link is followed.
        without: a folder to leave out, wherever it lies.
        follow_links: follow links to wherever they lead.

    Raises:
        InputError: a source doesn't exist, or a folder can't be listed.
    """
    roots = [source.resolve() for source in sources]
    left_out = [] if without is None else [without.resolve()]
    seen = {root for root in roots if root.is_dir()}
    files = Files()

    def passes(path: Path, *, given: bool = False) -> bool:
        """Whether a file or folder is new and may be read; counts what may not."""
        real = Path(os.path.realpath(path))  # a loop of links leads to nothing, where Path.resolve raises
        if real in seen or any(real.is_relative_to(folder) for folder in left_out):
            return False
        if not given and path.is_symlink():
            if not real.exists():
                files.skipped["that are links to nothing"] += 1
                return False
            if not follow_links and not any(real.is_relative_to(root) for root in roots):
                files.skipped["that are links to outside of the folder"] += 1
                return False
        seen.add(real)
        return True

    def add(path: Path, *, given: bool = False) -> None:
        if passes(path, given=given):
            if not path.is_file():
                files.skipped["that aren't regular files"] += 1
            elif _is_mostly_holes(path.stat()):
                files.skipped["that are mostly holes"] += 1
            else:
                files.paths.append(path)

    for source in sources:
        if source.is_dir():
            for folder, folders, names in os.walk(source, onerror=_refuse, followlinks=True):
                folders[:] = [name for name in sorted(folders) if passes(Path(folder, name))]
                for name in sorted(names):
                    add(Path(folder, name))
        elif source.exists():
            add(source, given=True)
        else:
            raise InputError(f"{source}: there is no such file or folder")
    files.found = files.skipped.total()
    return files


def _is_mostly_holes(state: os.stat_result) -> bool:
    """Whether a large file hardly takes any room on the disk: parsers would read zeros for hours, or for ever."""
    blocks = getattr(state, "st_blocks", 0)  # 0 where a file system doesn't say
    return blocks > 0 and state.st_size > max(_LARGE, 64 * 512 * blocks)


def _refuse(error: OSError) -> None:
    raise InputError(f"{error.filename}: can't be listed: {error.strerror}") from error
