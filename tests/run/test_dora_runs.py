"""Runs whose adapters have magnitudes (DoRA): what learns, resume, files out and in, with wide and quantised bases."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf import train as trainer
from jaxrlhf.config.record import Config
from jaxrlhf.models import dora, lora
from jaxrlhf.models.files import hf_weights
from jaxrlhf.models.linear import MAGNITUDE
from jaxrlhf.models.lora import LoraConfig
from jaxrlhf.run import saved_run
from jaxrlhf.run.export import export, export_adapter
from tests.run.test_adapters import config, learner, started
from tests.support import learning, runs, tiny

ADAPTER = {"rank": 2, "alpha": 4, "dora": True}
SCALE = LoraConfig(rank=2, alpha=4).scale
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
pytestmark = pytest.mark.usefixtures("built_on_one_device")


def models_of(folder: Path, **more) -> dict:
    return {"policy": {"init_from": str(folder / "lm"), "adapter": ADAPTER | more}}


def ended(cfg: Config):
    """(the run, its base, what its policy learned) of the second step."""
    run, state = started(dataclasses.replace(cfg, run_dir=f"{cfg.run_dir}-new"))
    _, extra = saved_run.read_extra(cfg.run_dir)
    with jax.set_mesh(run.mesh):
        return (
            run,
            state.slow["base_policy"],
            saved_run.restore_own(cfg.run_dir, 2, extra["models"], "policy", run.mesh),
        )


@pytest.mark.nightly  # by day: runs of adapters in test_adapters.py; what magnitudes compute in models/test_dora.py
def test_a_run_learns_magnitudes_resumes_and_is_exported(folder, root, tmp_path):
    """Two iterations are one and one more, bitwise; the merged folder holds what was trained; the adapter's folder
    starts another run as this one ended, and one that learns whole weights."""
    whole, parts = (config("grpo", root, tmp_path / name, models_of(folder)) for name in ("whole", "parts"))
    assert trainer.run(whole) == "done"
    assert trainer.run(dataclasses.replace(parts, iterations=1)) == "done" and trainer.run(parts) == "done"
    one, two = (runs.read_state(tmp_path / name, 2) for name in ("whole", "parts"))
    assert one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one)
    learned = [x for name, x in one.items() if name.startswith("params") and name.endswith(MAGNITUDE)]
    assert len(learned) == 7 and all(0 < np.abs(x).max() < 0.1 for x in learned)

    run, base, own = ended(whole)
    with jax.set_mesh(run.mesh):
        merged = lora.merged_at_once(base, own, SCALE, jnp.float32)
    assert export(whole.run_dir, "policy", tmp_path / "merged")[1] == []
    export_adapter(whole.run_dir, "policy", tmp_path / "peft")
    with jax.set_mesh(run.mesh):
        jax.tree.map(close, hf_weights.load(tmp_path / "merged", run.configs["policy"], "lm"), merged)
    again = models_of(folder, init_from=str(tmp_path / "peft"))
    _, adapted = started(config("grpo", root, tmp_path / "next", again))
    jax.tree.map(close, adapted.params["policy"], own)
    full = {"policy": {"init_from": "reference"}, "reference": again["policy"]}
    _, beside = started(config("grpo", root, tmp_path / "full", full))
    jax.tree.map(close, beside.params["policy"], merged)


@pytest.mark.nightly  # by day: models/test_dora, and the run above
@pytest.mark.parametrize("merge", [True, False])
def test_a_quantised_run_keeps_its_magnitudes(merge, folder, root, tmp_path):
    """Its folder holds the weights of init_from in the trained directions and magnitudes; PEFT's has these, too."""
    models = models_of(folder)
    models["policy"] |= {"base_quantization": "nf4"}
    generate = {"max_new_tokens": 4, "merge_adapter": merge}
    cfg = config("grpo", root, tmp_path / "run", models, generate=generate)
    assert trainer.run(cfg) == "done"
    run, base, own = ended(cfg)
    with jax.set_mesh(run.mesh):
        wide = hf_weights.load(folder / "lm", run.configs["policy"], "lm")
        merged = lora.merged_at_once(wide, dora.moved(own, base, wide), SCALE, jnp.float32)
        trained = lora.merged_at_once(base, own, SCALE, jnp.float32)
    for name, more, whole in (("merged", {}, merged), ("as trained", {"dequantized": True}, trained)):
        export(cfg.run_dir, "policy", tmp_path / name, **more)
        with jax.set_mesh(run.mesh):
            found = hf_weights.load(tmp_path / name, run.configs["policy"], "lm")
        jax.tree.map(close, found, whole)
        norms = dora.base_norms(base["layers"]["mlp"]["up"]["kernel"], 1) + own["layers"]["mlp"]["up"][MAGNITUDE]
        close(np.linalg.norm(found["layers"]["mlp"]["up"]["kernel"], axis=1), np.abs(norms))
    export_adapter(cfg.run_dir, "policy", tmp_path / "peft")
    models["policy"]["adapter"] = ADAPTER | {"init_from": str(tmp_path / "peft")}
    jax.tree.map(close, started(config("grpo", root, tmp_path / "next", models))[1].params["policy"], own)


@pytest.mark.nightly  # by day: grpo, above
@pytest.mark.parametrize("name", ["ppo", "sft", "rm", "dpo", "distill"])
def test_every_algorithm_trains_one(name, folder, root, tmp_path):
    role, models, more = learner(name, models_of(folder)["policy"], folder)
    if name == "distill":
        models |= {"teacher": {"init_from": str(folder / "lm")}}
    assert trainer.run(config(name, root, tmp_path / "run", models, **more)) == "done"
    state = runs.read_state(tmp_path / "run", 2)
    moved = [np.abs(x).max() for item, x in state.items() if item.startswith("params") and item.endswith(MAGNITUDE)]
    assert len(moved) == 7 and all(x > 0 for x in moved)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(row[f"loss/{role}"]) for row in rows if f"loss/{role}" in row)


@pytest.mark.nightly  # by day: two iterations of a run, above
def test_grpo_learns():
    """As whole weights do in tests of families; log-probs of what was sampled are the trainer's."""
    assert learning.gain_by_grpo(tiny.MODEL, LoraConfig(rank=4, alpha=8.0, dora=True)) > 0.1
