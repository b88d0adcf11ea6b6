"""Stand-ins for gcloud, kubectl and their like: executables that note how they are called and answer as told."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SCRIPT = """#!{python} -IS
import json, pathlib, sys
folder = pathlib.Path({folder!r})
argv = ["{name}", *sys.argv[1:]]
with open(folder / "calls.jsonl", "a") as file:
    file.write(json.dumps(argv) + "\\n")
answers = json.loads((folder / "answers.json").read_text())
key = next((key for key in answers if key in " ".join(argv)), None)
answer = {{}}
if key is not None and answers[key]:
    answer = answers[key].pop(0) if len(answers[key]) > 1 else answers[key][0]
    (folder / "answers.json").write_text(json.dumps(answers))
sys.stdout.write(answer.get("out", ""))
sys.stderr.write(answer.get("err", ""))
sys.exit(answer.get("code", 0))
"""


class Fake:
    """Executables of these names, first on PATH.

    ``answers``: text that a call holds -> its answers in order, {"code", "out", "err"}; the last one is repeated. The
    first key that fits is taken; a call that fits none succeeds in silence."""

    def __init__(self, folder: Path, names: Sequence[str], monkeypatch):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            path = folder / name
            path.write_text(SCRIPT.format(python=sys.executable, folder=str(folder), name=name))
            path.chmod(0o755)
        self.answer({})
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def answer(self, answers: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        (self.folder / "answers.json").write_text(json.dumps(answers))

    @property
    def calls(self) -> list[list[str]]:
        path = self.folder / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def repository(folder: Path, source: Path) -> Path:
    """A small git repository that has what a launch sends."""
    for name in ("launch/worker.sh", "launch/train.sh", "configs/tiny/sft.yaml", ".gitignore"):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((source / name).read_bytes())
    (folder / "runs").mkdir()
    (folder / "runs" / "private.txt").write_text("not to be sent")
    who = ["-c", "user.name=somebody", "-c", "user.email=somebody@example.com", "-c", "commit.gpgsign=false"]
    for words in (["init", "--quiet"], ["add", "."], [*who, "commit", "--quiet", "-m", "all"]):
        subprocess.run(["git", "-C", str(folder), *words], check=True)
    (folder / "new.txt").write_text("not committed, and sent")
    return folder
