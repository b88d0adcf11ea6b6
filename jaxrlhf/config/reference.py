"""All keys of a config, from the dataclasses and the comments beside their fields: as rows, and as markdown, which
``python -m jaxrlhf.config.reference`` prints."""

import ast
import dataclasses
import inspect
import io
import json
import textwrap
import tokenize
from collections.abc import Iterator
from typing import NamedTuple

from jaxrlhf.algorithms import ALGORITHMS
from jaxrlhf.config.field_types import bare, hints, records, type_name
from jaxrlhf.errors import ConfigError, nearest, one_line
from jaxrlhf.log.metric_names import metric_table

SECTIONS = ("algorithm", "algorithm_name", "models", "optimizer")  # explained by the tables of what is in them


class Key(NamedTuple):
    """One key that a config may hold."""

    path: str  # dotted; <role> stands for the name of one
    type: str
    default: str  # as YAML has it, or "required"
    meaning: str
    algorithm: str = ""  # whose config it is in; "": any run's


def keys_of(run: type) -> list[Key]:
    """Every key below ``run`` (Config), those of each algorithm included."""
    name = Key("algorithm.name", "text", "required", f"{', '.join(sorted(ALGORITHMS))}, or package.module:NAME")
    algorithms = [
        key for name, row in sorted(ALGORITHMS.items()) for key in keys_in(row.config, "algorithm", algorithm=name)
    ]
    own = [key for path, record in records(run) for key in keys_in(record, path, whole=not path)]
    first = [key for key in own if "." not in key.path]
    return [*first, name, *algorithms, *(key for key in own if "." in key.path)]


def keys_in(record: type, path: str, algorithm: str = "", whole: bool = False) -> Iterator[Key]:
    """The keys of the record that stands at ``path``; ``whole``: it is the run, whose sections speak for themselves."""
    comments, types = field_comments(record), hints(record)
    for field in dataclasses.fields(record):
        if whole and (field.name in SECTIONS or dataclasses.is_dataclass(bare(types[field.name]))):
            continue
        where = f"{path}.{field.name}".lstrip(".")
        yield Key(where, type_name(types[field.name]), default_of(field), comments[field.name], algorithm)


def select(keys: list[Key], words: str) -> list[Key]:
    """The keys of the algorithm ``words``, or those at or below this dotted path, or those whose last part it is. A
    role's name (models.policy, optimizer.default) stands for <role>.

    Raises ConfigError where there are none."""
    if words in ALGORITHMS:
        return [key for key in keys if key.algorithm == words]
    chosen = [key for key in keys if below(key.path, words)] or [key for key in keys if key.path.endswith(f".{words}")]
    if chosen:
        return chosen
    sections = sorted({key.path.split(".")[0] for key in keys})
    choices = [*sections, *ALGORITHMS, *(key.path for key in keys), *(key.path.split(".")[-1] for key in keys)]
    near = nearest(words, choices, f"choices: {', '.join([*sections, *sorted(ALGORITHMS)])}")
    raise ConfigError(f"config keys: {words}: no key, section or algorithm; {near}")


def below(path: str, words: str) -> bool:
    """Whether the key ``path`` is ``words`` or stands below it."""
    ours, wanted = path.split("."), words.split(".") if words else []
    same = lambda one, other: one == other or one.startswith("<")
    return len(wanted) <= len(ours) and all(map(same, ours, wanted))


# ---- markdown -------------------------------------------------------------------------------------------------------


def reference(run: type) -> str:
    """The reference of all keys below ``run`` (Config), of those of every algorithm, and of all metrics."""
    places: dict[type, list[str]] = {}
    for path, record in records(run):
        places.setdefault(record, []).append(path)
    whole, *sections = [reference_of(paths, record) for record, paths in places.items()]
    algorithms = [reference_of([f"algorithm, name: {name}"], row.config) for name, row in sorted(ALGORITHMS.items())]
    return "\n".join([whole, *algorithms, *sections, metric_table()])


def reference_of(paths: list[str], record: type) -> str:
    """One record as where it stands, its docstring's first paragraph, and a table."""
    intro = one_line(inspect.getdoc(record).split("\n\n")[0])  # type: ignore[union-attr]
    rows = []
    for key in keys_in(record, "", whole="" in paths):
        default = key.default if key.default == "required" else f"`{key.default}`"
        cells = (f"`{key.path}`", key.type, default, key.meaning)
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    table = ["| key | type | default | |", "|---|---|---|---|", *rows] if rows else ["No keys."]
    where = ", ".join(f"`{path}`" for path in paths if path) or "The run"
    return "\n".join([f"**{where}**: {intro}", "", *table, ""])


def field_comments(record: type) -> dict[str, str]:
    """The comment that ends each field's lines in the source; "" where there is none."""
    source = textwrap.dedent(inspect.getsource(record))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    by_line = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    body = ast.parse(source).body[0]
    assert isinstance(body, ast.ClassDef)
    fields = [node for node in body.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)]
    own = {node.target.id: comment_in(node, by_line) for node in fields}  # type: ignore[union-attr]
    return {name: text for parent in record.__mro__[1:-1] for name, text in field_comments(parent).items()} | own


def comment_in(node: ast.AnnAssign, by_line: dict[int, str]) -> str:
    """The last comment on the lines of a field."""
    lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
    return next((by_line[line] for line in reversed(lines) if line in by_line), "")


def default_of(field: dataclasses.Field) -> str:
    """The default as YAML has it."""
    if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
        return "required"
    value = field.default_factory() if field.default is dataclasses.MISSING else field.default  # type: ignore[misc]
    return json.dumps(value)


if __name__ == "__main__":
    from jaxrlhf.config.record import Config

    print(reference(Config))
