"""The configuration that a run keeps in its folder, read as plain values: the file may be a stranger's."""

from pathlib import Path
from typing import Any

import yaml

from lidnet_fast.errors import InputError


def read_stored(path: Path) -> dict[str, Any]:
    """The content of a run's config.yaml: dictionaries, lists and scalars, nothing that names a class.

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
    return stored


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
