"""``a.b.c=value`` of the command line."""

from typing import Any, NamedTuple

from jaxrlhf.config.yaml_text import read_yaml
from jaxrlhf.errors import ConfigError, dotted, show


class Override(NamedTuple):
    """One ``[target:]a.b.c=value`` of the command line."""

    target: str | None
    path: tuple[str, ...]
    value: Any


def split_override(text: str) -> Override:
    """Reads an override; its value is YAML."""
    left, equals, value = text.partition("=")
    target, colon, keys = left.rpartition(":")
    path = tuple(keys.split("."))
    if not equals or not all(path) or (colon and not target):
        raise ConfigError(f"command line: {text}: expected key=value, as in optimizer.default.learning_rate=1e-4")
    value = read_yaml(value, f"command line: {left}", mapping=False)
    return Override(target or None, path, value)


def apply_override(tree: dict, edit: Override) -> None:
    """Puts the value into ``tree``, making the sections on the way; a number names an item of a list."""
    here: Any = tree
    for depth, key in enumerate(edit.path[:-1]):
        place = place_in(here, key)
        if isinstance(here, dict) and here.get(place) is None:
            here[place] = {}
        here = here[place]
        item = isinstance(here, list) and edit.path[depth + 1].isdecimal() and int(edit.path[depth + 1]) < len(here)
        if not isinstance(here, dict) and not item:
            where = dotted(edit.path[: depth + 1])
            raise ConfigError(f"command line: {dotted(edit.path)}: {where} holds {show(here)}, which is not a section")
    here[place_in(here, edit.path[-1])] = edit.value


def place_in(section: Any, key: str) -> Any:
    """``key``, as a number where the section is a list."""
    return int(key) if isinstance(section, list) else key
