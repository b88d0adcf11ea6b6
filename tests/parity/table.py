"""The tables of families in jaxrlhf/models/README.md: ``python -m tests.parity.table`` runs all checks, writes both."""

from collections.abc import Callable, Iterable
from pathlib import Path

import jax

from tests.parity.capabilities import CAPABILITIES
from tests.parity.cases import CASES, FIRST, family_of
from tests.parity.checks import CHECKS
from tests.support.compiler import use_cheap_compiler

README = Path(__file__).parents[2] / "jaxrlhf" / "models" / "README.md"
PARITY = {
    "logits": "logits, float32",
    "greedy": "greedy text",
    "files": "files, both ways",
    "scores": "scores, both ways",
    "decode": "decode = forward log-probs",
    "bfloat16": "logits, bfloat16",
    "dpo": "first DPO loss",
}
BESIDE = {
    "sharded": "files over 8 devices",
    "gguf": "GGUF",
    "lora": "LoRA, PEFT both ways",
    "int8": "int8 decoding, nats",
    "splash": "splash",
    "chat": "chat template",
}


def outcome(check: Callable[[str], str], cases: Iterable[str]) -> str:
    """What the check has shown for all of these cases; where it fails or they differ, that."""

    def one(case: str) -> str:
        try:
            return check(case)
        except AssertionError:
            return "**no**"

    return ", ".join(sorted(set(map(one, cases))))


def markdown(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def parity_table() -> str:
    rows = [["family", *PARITY.values(), "also"]]
    for family in FIRST:
        cases = [case for case in CASES if family_of(case) == family]
        also = [case.partition(": ")[2] for case in cases if ": " in case]
        rows.append([f"`{family}`", *(outcome(CHECKS[check], cases) for check in PARITY), ", ".join(also)])
    return markdown(rows)


def capability_table() -> str:
    rows = [["family", *BESIDE.values()]]
    rows += [
        [f"`{family}`", *(outcome(CAPABILITIES[check], [case]) for check in BESIDE)] for family, case in FIRST.items()
    ]
    return markdown(rows)


# name in the README's markers -> what makes it: all checks are run, each once in a process
TABLES: dict[str, Callable[[], str]] = {"parity table": parity_table, "capability table": capability_table}


def around(name: str) -> tuple[str, str, str]:
    """The README before, between and behind the markers. Raises ValueError where they are missing."""
    text, begin, end = README.read_text(), f"<!-- {name} -->", f"<!-- /{name} -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"{README}: expected {begin} and {end} once")
    before, _, rest = text.partition(begin)
    inside, _, behind = rest.partition(end)
    return before + begin, inside.strip(), end + behind


def in_readme(name: str) -> str:
    """The table that the README has."""
    return around(name)[1]


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    use_cheap_compiler()
    for name, make in TABLES.items():
        made = make()
        before, _, behind = around(name)
        README.write_text(f"{before}\n{made}\n{behind}")
