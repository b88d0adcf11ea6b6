"""Safe YAML: small, free of code and of surprises, and written so that other readers see the same text."""

import json
import os
import re
from typing import Any

import yaml
from etils import epath

from jaxrlhf.config_errors import ConfigError, show, suggest
from jaxrlhf.wording import one_line

MAX_YAML_BYTES = 64 * 1024
MAX_ALIASES = 16  # with aliases of aliases a few lines can stand for gigabytes


class Loader(yaml.SafeLoader):
    """Safe YAML with the scalars of YAML 1.2: only true and false are booleans ("no" is a word), 1e-4 is a number,
    dates are text. Keys are words, each once in its section."""

    aliases = 0

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            self.aliases += 1
            if self.aliases > MAX_ALIASES:
                raise yaml.constructor.ConstructorError(
                    problem=f"more than {MAX_ALIASES} aliases", problem_mark=self.peek_event().start_mark
                )
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            word = key.value if key.tag == "tag:yaml.org,2002:str" else None
            if word is None or word in seen:
                problem = f"key {key.value} appears twice" if word else f"key {key.value}: expected a word"
                raise yaml.constructor.ConstructorError(problem=problem, problem_mark=key.start_mark)
            seen.add(word)
        return super().construct_mapping(node, deep)


class Dumper(yaml.SafeDumper):
    """Quotes whatever Loader, or a reader of YAML 1.1, would not take for text."""

    def ignore_aliases(self, data):
        return True


FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$")
Loader.yaml_implicit_resolvers = {}
Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"(~|null|Null|NULL)?$"), ["~", "n", "N", ""])
Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"(true|True|TRUE|false|False|FALSE)$"), [*"tTfF"])
Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9][0-9]*)$"), [*"-+0123456789"])
Loader.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, [*"-+.0123456789"])
Dumper.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, [*"-+.0123456789"])
Loader.yaml_constructors = {
    tag: make
    for tag, make in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag.rpartition(":")[2] in ("null", "bool", "int", "float", "str", "seq", "map")
}


def read_file(source: str) -> bytes:
    """The bytes of a config file, at most MAX_YAML_BYTES of them."""
    path = epath.Path(source)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_YAML_BYTES + 1)
    except FileNotFoundError:
        beside = sorted(os.fspath(p) for p in path.parent.glob("*.y*ml")) if path.parent.exists() else []
        raise ConfigError(f"{source}: no such file{'; ' + suggest(source, beside) if beside else ''}") from None
    except OSError as error:
        raise ConfigError(f"{source}: {error.strerror or error}") from None
    if len(data) > MAX_YAML_BYTES:
        raise ConfigError(f"{source}: more than {MAX_YAML_BYTES} bytes, which no config needs")
    return data


def read_yaml(text: bytes | str, source: str, mapping: bool = True) -> Any:
    """The tree that ``text`` says: dicts, lists, text, numbers, booleans, None, nothing shared. Raises ConfigError."""
    try:
        tree = json.loads(json.dumps(yaml.load(text, Loader=Loader)))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        said = ", ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(f"{source}: {where}{one_line(said or error)}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        text = "nested too deeply" if isinstance(error, RecursionError) else one_line(error)
        raise ConfigError(f"{source}: {text}") from None
    if not mapping:
        return tree
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise ConfigError(f"{source}: {show(tree)}: expected sections and key: value lines")
    return tree
