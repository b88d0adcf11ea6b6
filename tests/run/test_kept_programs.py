"""Runs of one process that share their programs, where that is asked for."""

import dataclasses
import json
from typing import Any

import jax
import numpy as np
import pytest

from jaxrlhf import train as trainer
from jaxrlhf.config.load import parse
from jaxrlhf.config.record import Config
from jaxrlhf.config.resolved import resolve_config
from jaxrlhf.plan.shapes import blueprint
from jaxrlhf.run import kept_programs
from jaxrlhf.sharding import MeshConfig, make_mesh
from tests.support import runs

SHAPE = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "max_positions": 32, "vocab_size": 300}
# what differs between runs that share programs
FREE = {
    "preset",
    "run_dir",
    "seed",
    "iterations",  # while learning rates are constant
    "epochs",
    "max_run_duration",
    "tokenizer",
    "data",
    "distributed",
    "checkpoint",
    "eval",
    "log",
    "alarms",
    "bars",
    "on_nonfinite",
    "max_nonfinite",
    "profile",
}


def sft(run_dir="runs/x", **more) -> Config:
    tree = {
        "run_dir": str(run_dir),
        "iterations": 2,
        "algorithm": {"name": "sft"},
        "models": {"policy": {"architecture": SHAPE}},
        "batch": {"sequences_per_step": 8},
    }
    return parse(tree | more, "test")


def key(cfg: Config):
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    return kept_programs.key_of(blueprint(resolve_config(cfg), mesh, {})[0])


OTHER = {
    "precision": {"compute": "bfloat16"},
    "remat": "full",
    "scan_layers": True,
    "attention": "xla",
    "deterministic": True,
    "optimizer": {"default": {"learning_rate": 1e-3}},
    "mesh": {"data": 1},
    "batch": {"sequences_per_step": 4},
    "generate": {"temperature": 0.5},
    "rewards": {"function": "my:f"},
    "environment": {"id": "CartPole-v1"},
    "models": {"policy": {"architecture": SHAPE | {"hidden_size": 32}}},
    "algorithm": {"name": "dpo"},
}


def test_every_key_is_free_or_part_of_what_programs_are_found_by():
    """A new key of Config is in one of the two, or this fails."""
    fields = {field.name for field in dataclasses.fields(Config)} - {"algorithm_name"}
    assert fields == FREE | OTHER.keys()


@pytest.mark.parametrize("name", [name for name in OTHER if name != "algorithm"])
def test_runs_that_differ_in_what_programs_depend_on_share_none(name):
    assert key(sft(**{name: OTHER[name]})) != key(sft())


def test_runs_that_differ_in_nothing_else_share_them():
    free = {
        "seed": 5,
        "iterations": 9,
        "log": {"trackers": []},
        "eval": {"every": 3},
        "alarms": {"kl": 1.0},
        "bars": {"ours": {"metric": "eval/score/mean", "at_least": 1, "source": "us"}},
        "on_nonfinite": "skip",
    }
    assert key(sft(run_dir="runs/y", **free)) == key(sft())
    linear: dict[str, Any] = {"optimizer": {"default": {"schedule": "linear"}}}
    assert key(sft(iterations=9, **linear)) != key(sft(**linear)), "its learning rates are others"


@pytest.mark.nightly  # by day: the short twins of benchmarks, which share programs
def test_another_seed_compiles_nothing_and_computes_what_it_would_alone(tmp_path, one_device):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": "the film is " + "x" * (n % 7)}) + "\n" for n in range(40)))
    data = {"demonstrations": {"path": str(text)}, "max_length": 16, "cache_dir": str(tmp_path / "cache")}
    model = {"policy": {"architecture": {name: value for name, value in SHAPE.items() if name != "vocab_size"}}}
    more = {"data": data, "models": model, "tokenizer": {"train_vocab_size": 300}}
    compiled = []
    real = trainer.compile_programs

    def counted(*arguments):
        compiled.append(1)
        return real(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "compile_programs", counted)
        patch.setattr(kept_programs, "KEPT", kept_programs.ContextVar("KEPT", default=None))
        assert trainer.run(sft(tmp_path / "alone", seed=1, **more)) == "done" and len(compiled) == 1
        with kept_programs.share_programs():
            for seed in (0, 1):
                assert trainer.run(sft(tmp_path / str(seed), seed=seed, **more)) == "done"
        assert len(compiled) == 2
    expected, found, other = (runs.read_state(tmp_path / name, 2) for name in ("alone", "1", "0"))
    assert all(np.array_equal(found[path], leaf) for path, leaf in expected.items())
    assert any(not np.array_equal(other[path], leaf) for path, leaf in expected.items() if "params" in path)
