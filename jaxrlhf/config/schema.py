"""The JSON schema of a config, for editors: types and defaults from pydantic, meanings and ranges from where we keep
them."""

import math
from typing import Any

from pydantic import ConfigDict, TypeAdapter

from jaxrlhf.algorithms import ALGORITHMS
from jaxrlhf.config.field_types import records
from jaxrlhf.config.members import GRADERS
from jaxrlhf.config.presets import PRESETS
from jaxrlhf.config.ranges import interval_of
from jaxrlhf.config.record import Config
from jaxrlhf.config.reference import field_comments

RULES = ConfigDict(extra="forbid", strict=True)
BOTH_LENGTHS = {
    "required": ["iterations", "epochs"],
    "properties": {"iterations": {"type": "integer"}, "epochs": {"type": "number"}},
}
DIALECT = "https://json-schema.org/draft/2020-12/schema"


def schema() -> dict[str, Any]:
    """What `jaxrlhf train` takes, as JSON schema of draft 2020-12."""
    raw = TypeAdapter(dict[str, Config], config=RULES).json_schema()
    defs = raw["$defs"]
    classes = {record.__name__: record for _, record in records(Config)}
    for name, row in sorted(ALGORITHMS.items()):
        defs |= algorithm_schema(name, row.config)
        classes[row.config.__name__] = row.config
    for name, record in classes.items():
        explain_fields(record, defs[name])
    for name, row in ALGORITHMS.items():  # after the classes' own fields
        section = defs[row.config.__name__]
        section["properties"] = {"name": {"const": name, "description": "The algorithm."}} | section.get(
            "properties", {}
        )
        section["required"] = ["name"]
    whole = defs.pop("Config")
    del whole["properties"]["algorithm_name"]
    whole["properties"]["algorithm"] = {"type": "object"}
    whole["properties"]["preset"] |= {"anyOf": [{"enum": sorted(PRESETS)}, {"type": "null"}]}
    one = whole["properties"]["models"]["additionalProperties"]
    ensemble = {"type": "array", "items": one, "minItems": 1, "description": "The members of an ensemble."}
    whole["properties"]["models"]["properties"] = {grader: {"anyOf": [one, ensemble]} for grader in GRADERS}
    whole["required"] = [key for key in whole["required"] if key not in ("algorithm_name", "algorithm")]
    preset = {"required": ["preset"], "properties": {"preset": {"type": "string"}}}
    alone = {"required": ["algorithm"], "properties": {"algorithm": choice_of_algorithm()}}
    whole |= {"if": preset, "else": alone}  # a preset names the algorithm
    whole |= {"anyOf": [{"required": ["iterations"]}, {"required": ["epochs"]}], "not": BOTH_LENGTHS}
    return {"$schema": DIALECT} | whole | {"title": "A run of jaxrlhf", "$defs": defs}


def algorithm_schema(name: str, record: type) -> dict[str, Any]:
    """The definitions that an algorithm's config needs, its own among them."""
    made = TypeAdapter(dict[str, record], config=RULES).json_schema()  # type: ignore[valid-type]
    return made.get("$defs", {})


def choice_of_algorithm() -> dict[str, Any]:
    """The section of the algorithm that ``name`` names; of one from outside the package anything may be given.

    An if for each name: an editor then tells of the keys of that algorithm alone."""
    names = sorted(ALGORITHMS)
    chosen = [
        {
            "if": {"properties": {"name": {"const": name}}},
            "then": {"$ref": f"#/$defs/{ALGORITHMS[name].config.__name__}"},
        }
        for name in names
    ]
    given: dict[str, Any] = {"anyOf": [{"enum": names}, {"type": "string", "pattern": "^[\\w.]+:\\w+$"}]}
    given["description"] = "One of these, or package.module:NAME of an Algorithm."
    return {"type": "object", "required": ["name"], "properties": {"name": given}, "allOf": chosen}


def explain_fields(record: type, made: dict[str, Any]) -> None:
    """Puts the comment and the range of each field into its schema; sections can be null only where their type is."""
    comments = field_comments(record)
    for name, field in made.get("properties", {}).items():
        field.pop("title", None)
        if comments.get(name):
            field["description"] = comments[name]
        if interval := interval_of(record, name):
            for part in number_parts(field):
                part |= bounds(interval)


def number_parts(field: dict[str, Any]) -> list[dict[str, Any]]:
    """The schemas of numbers in a field: its own, those of a list's items, of the choices beside null."""
    parts = [field, *field.get("anyOf", []), *([field["items"]] if "items" in field else [])]
    return [part for part in parts if part.get("type") in ("integer", "number")]


def bounds(interval: str) -> dict[str, float]:
    """``interval`` ("[0, 1)") in the words of JSON schema."""
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    found = {"minimum" if interval[0] == "[" else "exclusiveMinimum": low}
    if math.isfinite(high):
        found["maximum" if interval[-1] == "]" else "exclusiveMaximum"] = high
    return found
