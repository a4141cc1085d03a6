"""What becomes of results that are there already: only a call that has all of theirs may replace them."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lidnet_fast.errors import InputError
from lidnet_fast.urls import is_url


def refuse_to_lose(
    out: Path,
    files: Sequence[str],
    asked: Mapping[str, Any],
    said: Callable[[Any], Mapping[str, Any]],
    remedy: str = "To fix: choose another --out, or move what is there",
) -> None:
    """Refuse a folder whose results this call would replace by others; to be called before anything is computed.

    The same call again replaces its results, and one that only adds to what was asked may, too.

    Args:
        out: the folder that results go to.
        files: the names of their files. The first is JSON and says what was asked.
        asked: what decides the results of this call; a mapping's entries count one by one.
        said: the same of results that are there, from the JSON. What they hadn't is left out, or false. A KeyError,
            TypeError or AttributeError says that it isn't known.
        remedy: what the user can do.

    Raises:
        InputError: names the file, what differs, and the remedy.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is a file, and results go to a folder. {remedy}")
    record, *others = (out / name for name in files)
    if not record.exists():
        for file in filter(Path.exists, others):
            raise InputError(f"{file}: would be replaced, and nothing says what it is. {remedy}")
        return
    try:
        earlier = _flat(said(json.loads(record.read_text(encoding="utf-8"))))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{record}: would be replaced, and doesn't say what it is of. {remedy}") from error
    now = _flat(json.loads(json.dumps(asked)))
    lost = []
    for key, value in earlier.items():
        if value is not False and value != now.get(key):
            mine = f"this call's have {now[key]}" if now.get(key, False) is not False else "this call's don't"
            lost.append(f"{key} {'' if value is True else f'{value} '}and {mine}")
    if lost:
        raise InputError(f"{record}: its results have {'; '.join(lost)}. {remedy}")


def place(location: str | Path) -> str:
    """A folder's or file's name from wherever it is named; a URL as it is."""
    text = str(location)
    return text if is_url(text) else str(Path(text).resolve())


def _flat(asked: Mapping[str, Any]) -> dict[str, Any]:
    """{"images": {"mine": 1}, "samples": 2} as {"images mine": 1, "samples": 2}."""
    flat: dict[str, Any] = {}
    for key, value in asked.items():
        flat |= {f"{key} {name}": one for name, one in value.items()} if isinstance(value, Mapping) else {key: value}
    return flat
