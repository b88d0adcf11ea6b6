"""What a start reads of saved runs: each record once, however many roles start from the run."""

import collections
import json
import os
from pathlib import Path

import jax
import orbax.checkpoint as ocp
import pytest

from jaxrlhf import train as trainer
from jaxrlhf.config.load import parse
from jaxrlhf.data import tokenizer as tokenizers
from jaxrlhf.models.config import ModelConfig, resolve
from jaxrlhf.run import programs, saved_run, state
from jaxrlhf.run.checkpoint import Checkpoints
from jaxrlhf.sharding import MeshConfig, make_mesh
from jaxrlhf.types import Head
from tests.support import tiny

VOCAB = 280
SHAPE = resolve(ModelConfig("llama", VOCAB, 16, 1, 2, mlp_size=16, max_positions=32))


def save_run(folder: Path, role: str, head: Head) -> str:
    """The directory of a run that trained this one role, with a checkpoint of step 1."""
    tokenizers.save_tokenizer(tokenizers.train_bpe(["the cat sat on the mat"] * 4, VOCAB), str(folder / "tokenizer"))
    (folder / "config.yaml").write_text("{}\n")
    saved = Checkpoints(folder)
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        params = {role: tiny.parameters(SHAPE, head, seed=0)}
        record = saved_run.models_record({role: SHAPE}, {role: head}, {}, {role: "float32"})
        saved.save(1, state.new_state(0, params, {}, {}, {}), {"models": record, "eos_ids": [1], "config": "{}"})
    saved.close()
    return str(folder)


@pytest.fixture
def config(tmp_path):
    """Makes the Config of a PPO run: four roles, three from one saved run and one from another."""
    policy, reward = save_run(tmp_path / "lm", "policy", "lm"), save_run(tmp_path / "scores", "reward", "scalar")
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "the cat"}) + "\n")
    data = {
        "prompts": {"path": f"{tmp_path}/prompts.jsonl"},
        "cache_dir": str(tmp_path / "cache"),
        "prompt_buckets": [8],
    }
    models = {"policy": policy, "value": "policy", "reward": reward}
    tree = {
        "run_dir": str(tmp_path / "run"),
        "algorithm": {"name": "ppo", "num_epochs": 1, "num_minibatches": 1},
        "models": {role: {"init_from": start} for role, start in models.items()},
        "data": data,
        "batch": {"prompts_per_step": 8},
        "generate": {"max_new_tokens": 4},
        "log": {"trackers": []},
    }
    return lambda iterations: parse(tree | {"iterations": iterations}, "test")


@pytest.fixture
def reads(monkeypatch) -> collections.Counter:
    """(what, run) -> how often: "record", the JSON of a checkpoint, and "steps", the listing of them."""
    counted, run_of = collections.Counter(), lambda path, up: Path(os.fspath(path)).parents[up].name
    restore, steps = ocp.JsonCheckpointHandler.restore, ocp.utils.checkpoint_steps

    def counting_restore(self, directory, *args, **options):
        if Path(os.fspath(directory)).name == saved_run.EXTRA:  # and not the metrics, which orbax reads of its own
            counted["record", run_of(directory, 2)] += 1
        return restore(self, directory, *args, **options)

    def counting_steps(directory, *args, **options):
        counted["steps", run_of(directory, 0)] += 1
        return steps(directory, *args, **options)

    monkeypatch.setattr(ocp.JsonCheckpointHandler, "restore", counting_restore)
    monkeypatch.setattr(ocp.utils, "checkpoint_steps", counting_steps)
    return counted


@pytest.mark.nightly  # by day: runs that start from others, in test_train.py
def test_a_start_reads_each_saved_run_once(config, reads, one_device, monkeypatch):
    make = lambda recipe: lambda state, batch: (state.replace(step=state.step + 1), {}, None)
    monkeypatch.setattr(programs, "make_iteration", make)
    assert trainer.run(config(1)) == "done"
    assert {run: n for (what, run), n in reads.items() if what == "record"} == {"lm": 1, "scores": 1}
    others = {run: n for (what, run), n in reads.items() if what == "steps" and run != "run"}
    assert others == {"lm": 1, "scores": 1}  # its own ones it lists to delete old ones, too
    reads.clear()
    assert trainer.run(config(2)) == "done"
    assert {run: n for (what, run), n in reads.items() if what == "record"} == {"run": 1}
    assert {run for _, run in reads} == {"run"}
