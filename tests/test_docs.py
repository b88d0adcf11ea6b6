"""The documentation: its links, commands, configs and snippets are real, and nothing is written in retired words."""

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from jaxrlhf.benchmarks.catalog import FOLDER
from jaxrlhf.cli.app import app
from jaxrlhf.cli.discover import starters
from jaxrlhf.config.load import load
from jaxrlhf.config.yaml_text import read_yaml
from tests.parity.cases import FIRST
from tests.parity.table import BESIDE, PARITY, in_readme

ROOT = Path(__file__).parents[1]
UsageError: type[Exception] = typer.BadParameter.__mro__[1]  # of click, or of the copy of it that typer brings
DOCUMENTS = [
    "README.md",
    *sorted(f"configs/benchmarks/{path.stem}/README.md" for path in FOLDER.glob("[!_]*.py")),
    "configs/README.md",
    "configs/benchmarks/README.md",
    "configs/gsm8k/README.md",
    "configs/quickstart/README.md",
    "configs/smollm2/README.md",
    "jaxrlhf/algorithms/README.md",
    "jaxrlhf/algorithms/migration.md",
    "jaxrlhf/benchmarks/README.md",
    "jaxrlhf/data/README.md",
    "jaxrlhf/evaluate/README.md",
    "jaxrlhf/models/README.md",
    "jaxrlhf/plan/README.md",
    "jaxrlhf/report/README.md",
    "jaxrlhf/rewards/README.md",
    "jaxrlhf/run/README.md",
    "jaxrlhf/serve/README.md",
    "launch/README.md",
    "tests/README.md",
]
WRITTEN = ("README.md", "configs", "jaxrlhf", "launch", "tests")
RETIRED = {  # what is not written here -> what is
    r"hangs? on\b": "depends on",
    r"turn(s|ed|ing)? ([\w']+ ){0,4}round\b": "transpose",
    r"\bby turns\b": "interleaved",
    r"\bso manieth\b": "every n-th",
    r"\bwhat is there\b": "name it",
    r'"""The inverse\."""': "of which function",
    r"\breads? (a|the) prompt\b": "computes the prompt, attends to it",
    r"\bprompt (is|was) read\b": "is computed",
    r"prefers after to before": "win rate",
    r"ended by itself": "ended with EOS or a stop text",
    r"\b1 (epochs|minibatches)\b": "errors.counted",
}


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def written() -> Iterator[Path]:
    """Every file of text that people write: code, docs, configs, scripts."""
    for top in WRITTEN:
        path = ROOT / top
        for file in [path] if path.is_file() else sorted(path.rglob("*")):
            if file.suffix in (".py", ".md", ".yaml", ".sh") and "golden" not in file.parts:
                yield file


def commands(text: str) -> Iterator[list[str]]:
    """The arguments of every line of a bash block that calls jaxrlhf, with the variables that the block sets."""
    for block in blocks(text, "bash"):
        variables: dict[str, str] = {}
        for line in re.split(r"[;\n]", re.sub(r" +#.*", "", block)):
            for name, value in variables.items():
                line = line.replace(f"${name}", value)
            words = shlex.split(line.partition(">")[0], comments=True)
            if len(words) == 1 and re.match(r"[A-Z]+=", words[0]):
                variables[words[0].partition("=")[0]] = words[0].partition("=")[2]
            elif words and words[0] == "jaxrlhf":
                yield words[1:]


def parse(words: list[str]) -> None:
    """Raises UsageError where the command line has no such command or option. Nothing is run."""
    command: Any = typer.main.get_command(app)
    context = command.make_context("jaxrlhf", list(words))
    while hasattr(command, "resolve_command") and (rest := [*context._protected_args, *context.args]):
        _, command, rest = command.resolve_command(context, rest)
        context = command.make_context(command.name, rest, parent=context)


def test_the_front_page_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 260


def test_every_document_is_listed_here():
    found = {str(path.relative_to(ROOT)) for path in written() if path.suffix == ".md"}
    assert found == set(DOCUMENTS)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_to_files(name):
    path = ROOT / name
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith(("http", "#"))]
    assert links
    assert [link for link in links if not (path.parent / link.partition("#")[0]).exists()] == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_files_that_are_named_exist(name):
    """Configs, scripts and modules, wherever the text names them from the root."""
    named = set(
        re.findall(r"\b(?:configs|jaxrlhf|launch|tests)/[\w./]+\.(?:yaml|py|sh|json|svg)", (ROOT / name).read_text())
    )
    assert [file for file in named if not (ROOT / file).exists()] == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_commands_parse(name):
    for words in commands((ROOT / name).read_text()):
        try:
            parse(words)
        except UsageError as error:
            pytest.fail(f"jaxrlhf {' '.join(words)}: {error}")


def test_a_command_that_does_not_exist_is_found():
    assert len([*commands((ROOT / "README.md").read_text())]) >= 7
    parse(["config", "keys", "grpo"])
    with pytest.raises(UsageError):
        parse(["trane", "configs/tiny/sft.yaml"])
    with pytest.raises(UsageError):
        parse(["train", "configs/tiny/sft.yaml", "--chekc"])
    with pytest.raises(UsageError):
        parse(["configs", "list"])


@pytest.mark.parametrize(("name", "columns"), [("parity table", PARITY), ("capability table", BESIDE)])
def test_a_table_of_families_has_a_row_for_each_and_a_column_a_check(name, columns):
    """What is in them is compared by tests/parity, where torch is installed."""
    text = in_readme(name)
    assert re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE) == list(FIRST)
    assert text.startswith(f"| family | {' | '.join(columns.values())} |")


def test_snippets_of_configs_load(tmp_path):
    """A whole config as it is; a part in place of the sections of a starter config."""
    count = 0
    for name in DOCUMENTS:
        for block in blocks((ROOT / name).read_text(), "yaml"):
            tree = read_yaml(block, name)
            if "run_dir" not in tree:
                method = "dpo" if "preferences" in tree.get("data", {}) else "grpo"
                tree = read_yaml(starters()[method].read_text(), method) | tree
            (tmp_path / "snippet.yaml").write_text(json.dumps(tree))
            assert load(tmp_path / "snippet.yaml").run_dir == tree["run_dir"]
            count += 1
    assert count >= 5


@pytest.mark.parametrize("name", ["README.md", "jaxrlhf/rewards/README.md"])
def test_the_reward_function_runs(name):
    """The other snippet of Python is run by tests/test_api.py."""
    (code,) = (block for block in blocks((ROOT / name).read_text(), "python") if "def exact" in block)
    module: dict = {}
    exec(code, module)
    assert module["exact"]([" 4", "5"], [{"answer": "4"}, {"answer": "4"}]) == [1.0, 0.0]


def test_no_retired_words():
    found = []
    for path in written():
        if path == Path(__file__):
            continue
        text = path.read_text()
        for words, instead in RETIRED.items():
            for match in re.finditer(words.replace(" ", r"\s+"), text):
                line = text.count("\n", 0, match.start()) + 1
                found.append(f"{path.relative_to(ROOT)}:{line}: {match[0]!r}: {instead}")
    assert not found, "\n".join(found)


def test_the_tests_that_pages_name_are_there():
    """The fault table, for one: [name](FILE), a test of that file or the file itself."""
    found = 0
    for page in DOCUMENTS:
        text = (ROOT / page).read_text()
        for name, file in re.findall(r"\[(test_\w+)\]\(([^)#]+\.py)\)", text):
            path, found = (ROOT / page).parent / file, found + 1
            assert f"def {name}(" in path.read_text() or path.stem == name, f"{page}: {name} in {file}"
    assert found > 50
