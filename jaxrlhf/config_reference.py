"""The reference of all keys in markdown, from the dataclasses and the comments beside their fields."""

import ast
import dataclasses
import inspect
import io
import json
import textwrap
import tokenize

from jaxrlhf.algorithms import ALGORITHMS
from jaxrlhf.config_types import bare, hints, records, type_name
from jaxrlhf.wording import one_line

SECTIONS = ("algorithm", "algorithm_name", "models", "optimizer")  # explained by the tables of what is in them


def reference(run: type) -> str:
    """The reference of all keys below ``run`` (Config), and of those of every algorithm."""
    places: dict[type, list[str]] = {}
    for path, record in records(run):
        places.setdefault(record, []).append(path)
    whole, *sections = [reference_of(paths, record) for record, paths in places.items()]
    algorithms = [reference_of([f"algorithm, name: {name}"], row.config) for name, row in sorted(ALGORITHMS.items())]
    return "\n".join([whole, *algorithms, *sections])


def reference_of(paths: list[str], record: type) -> str:
    """One record as where it stands, its docstring's first paragraph, and a table."""
    intro = one_line(inspect.getdoc(record).split("\n\n")[0])  # type: ignore[union-attr]
    comments = field_comments(record)
    rows = []
    for field in dataclasses.fields(record):
        section = dataclasses.is_dataclass(bare(hints(record)[field.name])) or field.name in SECTIONS
        if section and "" in paths:  # the run itself
            continue
        cells = (f"`{field.name}`", type_name(hints(record)[field.name]), default_of(field), comments[field.name])
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
    return {node.target.id: by_line.get(node.end_lineno or 0, "") for node in fields}  # type: ignore[union-attr]


def default_of(field: dataclasses.Field) -> str:
    """The default as YAML has it."""
    if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
        return "required"
    value = field.default_factory() if field.default is dataclasses.MISSING else field.default  # type: ignore[misc]
    return f"`{json.dumps(value)}`"
