"""The record of a folder of results, such as `denoise.json`: with what they were made."""

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from lidnet_fast import __version__
from lidnet_fast.errors import InputError
from lidnet_fast.files import write_text


class Manifest:
    """The record of one folder; it is written when the folder is begun, and whenever `note` has something new.

    Args:
        out: the folder: a new one, or one that is being filled with results of the same settings.
        name: of the record, in the folder.
        holds: what the folder holds, in words; the first of them is part of the record's format.
        settings: what may not change while the folder is filled, JSON-able.
        measured: whether series are held against what the model was trained on, which older model files don't say.

    Attributes:
        created: when the folder was begun.

    Raises:
        InputError: the folder holds something else, or results of other settings.
    """

    created: datetime

    def __init__(self, out: Path, name: str, holds: str, settings: Mapping[str, Any], *, measured: bool) -> None:
        self._out, self._settings, self._measured = out, settings, measured
        self._path, self._holds, self._format = out / name, holds, f"lidnet_fast-{holds.split()[0]}"
        path = self._path
        if path.exists():
            self._read(path)
            return
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise InputError(f"{out}: isn't empty and holds no {holds}; choose another folder")
        self.created = datetime.now().replace(microsecond=0)
        self._outside: dict[str, list[str]] = {}
        self._write()

    def note(self, target: Path, outside: list[str]) -> None:
        """Record where the series that becomes `target` lies outside of what the model was trained on."""
        if self.noted(target) != outside:
            self._outside[self._name(target)] = outside
            self._write()

    def noted(self, target: Path) -> list[str]:
        """What was recorded of a series."""
        return self._outside.get(self._name(target), [])

    def _name(self, target: Path) -> str:
        return target.relative_to(self._out).as_posix()

    def _read(self, path: Path) -> None:
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            theirs = {name: record[name] for name in ("format", *self._settings)}
            self.created = datetime.fromisoformat(record["created"])
            outside = record.get("outside") or {}  # null, or not there in folders of an older version
            self._outside = {name: [str(phrase) for phrase in phrases] for name, phrases in outside.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path}: isn't the record of a folder of {self._holds}") from error
        for name, mine in {"format": self._format, **self._settings}.items():
            if theirs[name] != mine:
                raise InputError(
                    f"{self._out}: holds {self._holds} of {name} {theirs[name]}, not {mine}; choose another folder"
                )

    def _write(self) -> None:
        record = {
            "format": self._format,
            "version": 1,
            "software": __version__,
            "created": self.created.isoformat(),
            **self._settings,
            "outside": self._outside if self._measured else None,
        }
        write_text(self._path, json.dumps(record, indent=2))
