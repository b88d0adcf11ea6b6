"""Number formats of what is stored: what learns adds up updates that bfloat16 would round away."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrlhf.config.batch import describe_learning, describe_precision
from jaxrlhf.config.check import check
from jaxrlhf.config.load import parse
from jaxrlhf.config.record import PrecisionConfig
from jaxrlhf.config.resolved import resolve_config
from jaxrlhf.config.yaml_text import read_yaml
from jaxrlhf.errors import ConfigError
from jaxrlhf.optim import OptimizerConfig
from jaxrlhf.plan.shapes import blueprint
from jaxrlhf.run import state as states
from jaxrlhf.run.checkpoint import Checkpoints, restore
from jaxrlhf.run.initial_state import abstract_state
from jaxrlhf.sharding import MeshConfig, current, make_mesh
from jaxrlhf.types import TrainState

PPO = """
run_dir: nowhere
iterations: 10
algorithm: {name: ppo, num_epochs: 2, num_minibatches: 2}
models:
  policy: {architecture: {vocab_size: 300, hidden_size: 8, num_layers: 1, num_heads: 2, max_positions: 128}}
  reward: {init_from: policy}
tokenizer: {init_from: somewhere}
data: {prompts: {path: p.jsonl}, prompt_buckets: [16]}
"""


def config(**changes):
    return replace(parse(read_yaml(PPO, "test"), "test"), **changes)


def drawn_for(cfg):
    return blueprint(resolve_config(cfg), make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1]), {})[0]


def formats(tree: Any) -> set[str]:
    return {leaf.dtype.name for leaf in jax.tree.leaves(tree)}


def start(params: Any, **optimizer) -> tuple[Any, TrainState]:
    """(recipe, shapes of the state) of a run whose precision.params is ``params``."""
    cfg = config(precision=PrecisionConfig(params=params), optimizer={"default": OptimizerConfig(**optimizer)})
    drawn = drawn_for(cfg)
    with current(drawn.mesh):
        return drawn.recipe, abstract_state(drawn)


@pytest.mark.parametrize("moment", ["float32", "bfloat16"])
def test_what_learns_is_float32(moment):
    """optimizer.dtype is that of the first moment, and of nothing else."""
    _, state = start("bfloat16", dtype=moment)
    assert formats(state.params) == {"float32"} and formats(state.slow) == {"bfloat16"}
    for role in state.params:
        assert formats(optax.tree.get(state.opt_state[role], "mu")) == {moment}
        assert formats(optax.tree.get(state.opt_state[role], "nu")) == {"float32"}


@pytest.mark.parametrize("params", ["float32", "bfloat16"])
def test_small_learning_rates_move_weights(params):
    """Under a constant gradient Adam moves by the learning rate a step: 1e-6, where bfloat16 has steps of 1.2e-4."""
    recipe, state = start(params, learning_rate=1e-6, clip_norm=None)
    optimizer, kernel = recipe.optimizers["policy"], state.params["policy"]["layers"]["mlp"]["up"]["kernel"]
    weights = {"kernel": jnp.full(kernel.shape, 0.02, kernel.dtype)}
    opt_state, first = optimizer.init(weights), np.asarray(weights["kernel"], np.float64)
    for _ in range(50):
        updates, opt_state = optimizer.update(jax.tree.map(jnp.ones_like, weights), opt_state, weights)
        weights: Any = optax.apply_updates(weights, updates)
    np.testing.assert_allclose(first - np.asarray(weights["kernel"], np.float64), 50e-6, rtol=2e-3)
    second = np.asarray(optax.tree.get(opt_state, "nu")["kernel"], np.float64)
    np.testing.assert_allclose(second, 1 - 0.999**50, rtol=1e-4)


def test_a_coarse_first_moment_is_refused_where_it_would_stick():
    cfg = config(optimizer={"default": OptimizerConfig(dtype="bfloat16", b1=0.99)}, models=config().models)
    with pytest.raises(ConfigError) as error:
        check(cfg, 1)
    (line,) = (line for line in str(error.value).splitlines() if "optimizer" in line)
    assert line.startswith("config: optimizer.default.b1: 0.99: dtype bfloat16") and line.endswith("nearest: 0.95")


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ({"momentum": 0.9}, "momentum: 0.9: a key of muon, and name is adamw; expected 0.95"),
        ({"newton_schulz_steps": 3}, "newton_schulz_steps: 3: a key of muon, and name is adamw; expected 5"),
        ({"name": "muon", "dtype": "bfloat16", "momentum": 0.99}, "momentum: 0.99: dtype bfloat16 is too coarse for"),
        ({"name": "muon", "momentum": 0.9, "newton_schulz_steps": 3}, None),
    ],
    ids=lambda value: "" if value is None or isinstance(value, str) else "-".join(value),
)
def test_keys_of_muon_are_refused_where_they_do_nothing(row, line):
    cfg = config(optimizer={"default": OptimizerConfig(**row)})
    try:
        check(cfg, 1)
        found = []
    except ConfigError as error:
        found = [text for text in str(error).splitlines() if "optimizer" in text]
    assert len(found) == (line is not None) and all(
        text.startswith(f"config: optimizer.default.{line}") for text in found
    )


def test_muon_is_refused_where_a_role_has_no_matrix():
    """The value model's is a head on the policy's trunk; a default that also serves others goes through."""
    text = PPO.replace(
        "reward: {init_from: policy}", "reward: {init_from: policy}\n  value: {init_from: policy, share_trunk: true}"
    )
    muon = OptimizerConfig(name="muon")
    cfg = replace(parse(read_yaml(text, "test"), "test"), optimizer={"default": muon})
    with current((drawn := drawn_for(cfg)).mesh):
        state = abstract_state(drawn)
    label = lambda role: sorted(optax.tree.get(state.opt_state[role], "inner_states"))
    assert label("policy") == label("value") == ["adamw", "muon"]
    shape = state.params["policy"]["layers"]["mlp"]["up"]["kernel"].shape
    count = lambda tree: [x.shape for x in jax.tree.leaves(tree)].count(shape)
    assert count(state.opt_state["policy"]) == count(state.params["policy"]) > 0, "one moment"
    with pytest.raises(ConfigError) as error:
        drawn_for(replace(cfg, optimizer={"value": muon}))
    assert str(error.value).startswith("optimizer.value.name: muon: value learns no matrix inside a layer")
    assert str(error.value).endswith("expected adamw")


def test_what_is_said_of_it():
    assert describe_precision(resolve_config(config())) == []
    (line,) = describe_precision(resolve_config(config(precision=PrecisionConfig(params="bfloat16"))))
    assert line.startswith("precision.params: bfloat16 for reference, reward; float32 for policy, value: ")


def test_a_checkpoint_whose_weights_were_bfloat16_is_read_as_float32(tmp_path):
    """As runs with precision.params bfloat16 were saved once: the same numbers, and the second moment too."""
    adam, weights = optax.adam(1e-3), {"kernel": jnp.arange(8.0).reshape(4, 2) / 7}
    old = states.new_state(
        7, {"policy": jax.tree.map(lambda x: x.astype("bfloat16"), weights)}, {}, {"policy": adam}, {}
    )
    saved = Checkpoints(tmp_path)
    saved.save(3, old, {})
    saved.close()
    new = states.new_state(7, {"policy": weights}, {}, {"policy": adam}, {})
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), new)
    found = restore(tmp_path, 3, shapes)
    assert formats((found.params, optax.tree.get(found.opt_state["policy"], "nu"))) == {"float32"}
    np.testing.assert_array_equal(found.params["policy"]["kernel"], old.params["policy"]["kernel"].astype("float32"))


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("delay", [0, 4])
def test_schedules_of_delayed_roles_finish(schedule, delay):
    """10 iterations of 4 updates: those before the delay is over are none of the role's own."""
    rows = {"value": OptimizerConfig(schedule=schedule, final_fraction=0.1), "policy": OptimizerConfig()}
    rows["value"] = replace(rows["value"], learning_rate=1e-2, delay=delay, clip_norm=None)
    optimizer, weights = drawn_for(config(optimizer=rows)).recipe.optimizers["value"], {"kernel": jnp.zeros(1)}
    opt_state, rates = optimizer.init(weights), []
    for _ in range((10 - delay) * 4 + 1):
        updates: Any
        updates, opt_state = optimizer.update({"kernel": jnp.ones(1)}, opt_state, weights)
        rates.append(-float(updates["kernel"][0]))  # Adam of a constant gradient: the rate
    np.testing.assert_allclose(rates[0], 1e-2, rtol=1e-4)
    np.testing.assert_allclose(rates[-1], 1e-3, rtol=1e-4)
    assert rates[-2] > 1.0001 * rates[-1], "and not before the end"


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ({"delay": 9}, None),
        ({"delay": 10}, "delay: 10: the run has 10 iterations, so that the value model never learns; nearest: 9"),
        ({"delay": 50, "warmup_steps": 5}, "delay: 50: the run has 10 iterations, so that the value model never lear"),
        ({"warmup_steps": 39}, None),
        ({"warmup_steps": 40}, "warmup_steps: 40: the value model makes 40 updates in the run, so that its learning"),
        ({"warmup_steps": 8, "delay": 8}, "warmup_steps: 8: the value model makes 8 updates in the run, so that its"),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["value", "default"])
def test_a_role_that_never_learns_is_told(row, line, name):
    """10 iterations of 4 updates."""
    cfg = config(optimizer={name: OptimizerConfig(**row), "policy": OptimizerConfig()})
    lines = describe_learning(resolve_config(cfg))
    assert len(lines) == (line is not None) and all(found.startswith(f"optimizer.{name}.{line}") for found in lines)
