"""Commands on a run whose newest checkpoint was damaged: what is read is good, or one line says why nothing is."""

import shutil
from pathlib import Path

import pytest

from jaxrlhf.run import verified_steps
from tests.run.test_manifest import KINDS, find, flip
from tests.support import runs


@pytest.fixture(scope="module")
def process(root) -> runs.Done:
    (done,) = runs.whole(root)
    return done


@pytest.fixture
def damaged(process, root, tmp_path) -> Path:
    """A copy of a finished run with steps 2 and 4, one bit of whose newest weights has flipped."""
    run = Path(shutil.copytree(root / "whole" / "sft", tmp_path / "sft"))
    path = find(run / "checkpoints" / "4", KINDS["array data"])
    flip(path, path.stat().st_size // 2)
    return run


LINE = "sft: step 4 is damaged (params.policy/ocdbt.process_0/d/"
WRITE = ("--prompt", "the film is", "--temperature", "0", "--max-tokens", "4")


@pytest.mark.parametrize("name", ["train", "init_from", "evaluate", "generate", "export"])
def test_strict_is_exit_code_1_and_one_line(damaged, root, tmp_path, one_device, command, name):
    text = runs.overrides(runs.text(root), tmp_path)
    arguments = {
        "train": runs.train(*text, configs=[runs.tiny_config("sft")]),
        "init_from": runs.train(*text, configs=[runs.tiny_config("dpo")]),  # models.policy.init_from is the run
        "evaluate": ["evaluate", damaged],
        "generate": ["generate", damaged, *WRITE],
        "export": ["export", damaged, "--to", tmp_path / "hf"],
    }[name]
    _, errors = command(*arguments, "--strict", code=1)
    last = errors.splitlines()[-1]
    assert LINE in last and last.endswith("; the newest good one is step 2")
    assert not (tmp_path / "hf").exists()


def test_generate_takes_the_newest_good_step(damaged, one_device, command):
    found, errors = command("generate", damaged, *WRITE)
    assert sum(LINE in line for line in errors.splitlines()) == 1 and "step 2, the newest good one, is taken" in errors
    assert found == command("generate", f"{damaged}@2", *WRITE)[0]


def test_a_run_goes_on_from_the_newest_good_step(damaged, root, tmp_path, one_device, command):
    text = runs.overrides(runs.text(root), tmp_path)
    found, errors = command(*runs.train(*text, configs=[runs.tiny_config("sft")]))
    assert sum(LINE in line for line in errors.splitlines()) == 1
    assert "resumed from step 2" in found and "step 4/4" in found
    assert runs.steps_kept(damaged) == [2, 4] and (damaged / "set_aside" / "4").is_dir()
    assert [row["step"] for row in runs.rows(damaged) if "loss/policy" in row] == [1, 2, 3, 4]
    verified_steps.verdicts.clear()
    assert verified_steps.newest(damaged) == 4


def test_another_tokenizer_or_template_is_one_line(damaged, one_device, command):
    path = damaged / "tokenizer" / "tokenizer.json"
    flip(path, 100)
    _, errors = command("generate", f"{damaged}@2", *WRITE, code=1)
    assert (
        f"{path}" in errors
        and "; expected the file with which step 2 was trained" in errors
        and len(errors.splitlines()) == 1
    )
