"""The configuration that a run keeps in its folder, read as plain values: the file may be a stranger's."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lidnet_fast.errors import InputError


def read_stored(path: Path) -> dict[str, Any]:
    """The content of a run's config.yaml, flat and under today's names: lists and scalars, nothing that names a class.

    Raises:
        InputError: the file is missing or isn't such a configuration.
    """
    if not path.is_file():
        raise InputError(f"there is no {path}: {path.parent} is not the folder of a run")
    try:
        stored = yaml.load(path.read_text(encoding="utf-8"), Loader=_PlainLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, a month of 13
        raise InputError(f"{path} is not the configuration of a run: {error}") from error
    if not isinstance(stored, dict):
        raise InputError(f"{path} is not the configuration of a run")
    _refuse_classes(stored, path)
    return {**_ADDED, **flattened(stored)}


class _PlainLoader(yaml.SafeLoader):
    """YAML without aliases: runs write none, and a few nested ones stand for more values than memory holds."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.constructor.ConstructorError(None, None, "it has an alias", event.start_mark)
        return super().compose_node(parent, index)


def _refuse_classes(value: Any, path: Path) -> None:
    """Refuse jsonargparse's way to name a class: it would be imported while the configuration is parsed."""
    if isinstance(value, dict):
        if "class_path" in value:
            raise InputError(f"{path}: a run's configuration has no class_path, got {value['class_path']!r}")
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            _refuse_classes(inner, path)


# Keys, and values by key, of earlier versions with today's names.
_RENAMED = {
    "accelerator": "device",
    "detector_phase": "detector",
    "denoiser_phase": "denoiser",
    "collaborate.cache_mb": "collaborate.cache_mib",
    "data.noise_map_cache_mb": "data.noise_map_cache_mib",
}
_RENAMED_VALUES = {
    "device": {"gpu": "cuda"},
    "precision": {"32-true": "float32", "32": "float32", "bf16-mixed": "bfloat16", "bf16": "bfloat16"},
}

# Keys that earlier versions hadn't, with values that mean what these did.
_ADDED = {"data.context": 0, "data.denoiser_context": False}


def flattened(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys as one level, "data.crop", under today's names where an earlier version stored them."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        key = _RENAMED.get(f"{prefix}{name}", f"{prefix}{name}")
        if isinstance(value, Mapping) and value:
            flat.update(flattened(value, f"{key}."))
        else:
            flat[key] = _RENAMED_VALUES.get(key, {}).get(str(value), value)
    return flat


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flattened`."""
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *groups, name = key.split(".")
        place = tree
        for group in groups:
            place = place.setdefault(group, {})
        place[name] = value
    return tree


def renaming(message: str) -> str:
    """What to add to a parser's message about a name or value of an earlier version: today's; else nothing."""
    for old, new in _RENAMED.items():
        if re.search(rf"\b{old.rpartition('.')[2]}\b", message):
            return f"; {old} is now {new}"
    for key, values in _RENAMED_VALUES.items():
        for old, new in values.items():
            if key in message and re.search(rf"(?<![\w-]){old}(?![\w-])", message):
                return f"; {key} {old} is now {new}"
    return ""
