"""Safe YAML: small, free of code and of surprises, and written so that other readers see the same text."""

import codecs
import json
import os
import re
from collections.abc import Mapping
from typing import Any

import yaml
from etils import epath

from jaxrlhf.errors import ConfigError, nearest, one_line, show
from jaxrlhf.paths import unreachable

MAX_YAML_BYTES = 64 * 1024
MAX_ALIASES = 16  # with aliases of aliases a few lines can stand for gigabytes


class Loader(yaml.SafeLoader):
    """Safe YAML with the scalars of YAML 1.2: only true and false are booleans ("no" is a word), 1e-4 is a number,
    dates are text. Keys are words, each once in its section."""

    aliases = 0
    inside: tuple[str, ...] = ()  # anchors of what is being read

    def compose_node(self, parent, index):
        anchor = self.peek_event().anchor
        if self.check_event(yaml.AliasEvent):
            if anchor in self.inside:
                problem = f"alias *{anchor} stands inside what it names"
                raise yaml.constructor.ConstructorError(problem=problem, problem_mark=self.peek_event().start_mark)
            self.aliases += 1
            if self.aliases > MAX_ALIASES:
                raise yaml.constructor.ConstructorError(
                    problem=f"more than {MAX_ALIASES} aliases", problem_mark=self.peek_event().start_mark
                )
        outer, self.inside = self.inside, (*self.inside, *([anchor] if anchor else []))
        node = super().compose_node(parent, index)
        self.inside = outer
        return node

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            shown = key.value if isinstance(key, yaml.ScalarNode) else "that is a list or a section"
            if key.value == "<<":
                problem = "a merge key (<<) is no YAML 1.2: expected the keys themselves"
                raise yaml.constructor.ConstructorError(problem=problem, problem_mark=key.start_mark)
            word = key.value if key.tag == "tag:yaml.org,2002:str" else None
            if word is None or word in seen:
                problem = f"key {shown} appears twice" if word else f"key {shown}: expected a word"
                raise yaml.constructor.ConstructorError(problem=problem, problem_mark=key.start_mark)
            seen.add(word)
        return super().construct_mapping(node, deep)


class Dumper(yaml.SafeDumper):
    """Quotes whatever Loader, or a reader of YAML 1.1, would not take for text."""

    def ignore_aliases(self, data):
        return True


NUMBER = r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?$|[-+]?[0-9]+[eE][-+]?[0-9]+$"  # not 010: eight, or ten
FLOAT = re.compile(NUMBER + r"|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$")
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
    if not source.strip():
        raise ConfigError(f"{show(source)}: expected the path of a config, as in configs/tiny/ppo.yaml")
    if why := unreachable(source):
        raise ConfigError(f"{show(source)}: {why}")
    path = epath.Path(source)
    try:
        if path.is_dir():
            inside = sorted(os.fspath(p) for p in path.glob("*.y*ml"))
            raise ConfigError(f"{source}: a folder; expected a YAML file{f', as {inside[0]}' if inside else ''}")
        with path.open("rb") as file:
            data = file.read(MAX_YAML_BYTES + 1)
    except FileNotFoundError:
        beside = sorted(os.fspath(p) for p in path.parent.glob("*.y*ml")) if path.parent.exists() else []
        near = nearest(source, beside, "")
        raise ConfigError(f"{source}: no such file{f'; {near}' if near else ''}") from None
    except OSError as error:
        raise ConfigError(f"{show(source)}: {error.strerror or error}") from None
    if len(data) > MAX_YAML_BYTES:
        raise ConfigError(f"{source}: more than {MAX_YAML_BYTES} bytes, which no config needs")
    return data


MARKS = {  # of what a file is written in; UTF-32's begins like UTF-16's
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def decode(data: bytes, source: str) -> str:
    """The text of a config file: UTF-8, or what its byte order mark says. Raises ConfigError."""
    encoding = next((name for mark, name in MARKS.items() if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{source}: line {line}: no {encoding.upper()}; expected a file saved as UTF-8") from None
    if "\0" in text:
        raise ConfigError(f"{source}: holds NUL characters; expected a text file saved as UTF-8")
    return text


def read_yaml(text: bytes | str, source: str, mapping: bool = True) -> Any:
    """The tree that ``text`` says: dicts, lists, text, numbers, booleans, None, nothing shared. Raises ConfigError."""
    text = decode(text, source) if isinstance(text, bytes) else text
    try:
        tree = json.loads(json.dumps(yaml.load(text, Loader=Loader)))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        said = ", ".join(part for part in (error.context, error.problem) if part)
        if "'\\t'" in said:
            said = "a tab; YAML is indented by spaces"
        raise ConfigError(f"{source}: {where}{one_line(said or error)}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        text = "nested too deeply" if isinstance(error, RecursionError) else one_line(error)
        raise ConfigError(f"{source}: {text}") from None
    if not mapping:
        return tree
    if tree is None:
        raise ConfigError(f"{source}: empty; expected sections and key: value lines")
    if not isinstance(tree, dict):
        raise ConfigError(f"{source}: {show(tree)}: expected sections and key: value lines")
    return tree


def flat(tree: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """{"algorithm.kl_coef": 0.1} of {"algorithm": {"kl_coef": 0.1}}; lists and empty sections stay values."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{path}{key}.") if isinstance(value, dict) and value else {f"{path}{key}": value}
    return found
