"""The table of parity with transformers in jaxrlhf/models/README.md: ``python -m tests.parity.table`` prints it."""

import sys
from pathlib import Path

from tests.parity.cases import CASES, family_of
from tests.parity.checks import CHECKS

BEGIN, END = "<!-- parity table -->", "<!-- /parity table -->"
README = Path(__file__).parents[2] / "jaxrlhf" / "models" / "README.md"
COLUMNS = {
    "logits": "logits, float32",
    "greedy": "greedy text",
    "files": "files, both ways",
    "scores": "scores, both ways",
    "decode": "decode = forward log-probs",
    "bfloat16": "logits, bfloat16",
    "dpo": "first DPO loss",
}


def cell(family: str, check: str) -> str:
    """What the check has shown for all cases of a family; where it fails or they differ, that."""
    shown = {outcome(case, check) for case in CASES if family_of(case) == family}
    return ", ".join(sorted(shown))


def outcome(case: str, check: str) -> str:
    try:
        return CHECKS[check](case)
    except AssertionError:
        return "**no**"


def table() -> str:
    """Markdown. All checks are run."""
    families = list(dict.fromkeys(map(family_of, CASES)))
    rows = [["family", *COLUMNS.values(), "also"]]
    for family in families:
        also = [case.partition(": ")[2] for case in CASES if family_of(case) == family and ": " in case]
        rows.append([f"`{family}`", *(cell(family, check) for check in COLUMNS), ", ".join(also)])
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def table_in_readme() -> str:
    """What is between the markers. Raises ValueError where they are missing."""
    text = README.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{README}: expected {BEGIN} and {END} once")
    return text.partition(BEGIN)[2].partition(END)[0].strip()


if __name__ == "__main__":
    sys.stdout.write(table() + "\n")
