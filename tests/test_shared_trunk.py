"""A value model that is a head on the policy: the same numbers as two models with equal trunks, in one pass."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrlhf import step as steps
from jaxrlhf.algorithms.ppo import PPOConfig
from jaxrlhf.models.files import hf_config, hf_weights
from jaxrlhf.models.nets import Trunk, make_nets
from jaxrlhf.models.transformer import Runtime
from jaxrlhf.ops.sampling import Sampling
from jaxrlhf.sharding import MeshConfig, make_mesh
from jaxrlhf.types import Ask, Nets, Role, Sequences, TrainState, Trees
from tests.support import runs, tiny
from tests.support.flops import flops
from tests.test_step import experience_of

SHARE = 0.25
CFG = PPOConfig(entropy_coef=0.1, clip_range=0.3)


def nets_of(share: float | None) -> Nets:
    """Of two models, or of a policy with a head on it."""
    trunks = {} if share is None else {"value": Trunk("policy", share)}
    configs: dict[Role, Any] = dict.fromkeys(("policy", "value", "reward", "reference"), tiny.MODEL)
    return make_nets(configs, Runtime(), Sampling(1.0), lambda *_: pytest.fail("nothing is sampled"), trunks)


def trees() -> tuple[dict, dict]:
    """(with a bare head, the same as two whole models)."""
    policy, head = tiny.parameters(tiny.MODEL, "lm", 0), tiny.parameters(tiny.MODEL, "bare", 1)
    trunk = {name: part for name, part in policy.items() if name != "head"}
    return {"policy": policy, "value": head}, {"policy": policy, "value": trunk | head}


def kinds() -> dict[str, Sequences]:
    """Rows one by one; with a prompt in common; packed."""
    rows = tiny.sequences()
    grouped = rows.replace(
        tokens=rows.tokens.at[:, :4].set(jnp.repeat(rows.tokens[::2, :4], 2, 0)),
        valid=rows.valid.at[:, :4].set(jnp.repeat(rows.valid[::2, :4], 2, 0)),
        copies=2,
    )
    return {"rows": rows, "groups": grouped, "packed": grouped.replace(width=12)}


def close(found, expected, atol=1e-6):
    """Raises AssertionError where two pytrees differ."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=atol)


@pytest.mark.parametrize(
    "kind", [*(pytest.param(kind, marks=pytest.mark.nightly) for kind in ("rows", "groups")), "packed"]
)
def test_log_probs_and_values_are_those_of_two_models(kind):
    sequences, (bare, whole) = kinds()[kind], trees()
    mask = sequences.response_mask
    asks = Ask("policy", "token_stats"), Ask("value", "values")

    @tiny.program
    def read(bare, whole):
        both = lambda share, params: nets_of(share).read(Trees(params, {}), sequences, *asks)
        alone = [nets_of(SHARE).read(Trees(bare, {}), sequences, ask)[0] for ask in reversed(asks)]
        return both(SHARE, bare), both(None, whole), alone

    (stats, values), (stats_apart, values_apart), alone = read(bare, whole)
    assert float(jnp.abs(jnp.where(mask, values, 0)).max()) > 0.1
    for found in (values, alone[0]):
        np.testing.assert_allclose(jnp.where(mask, found - values_apart, 0), 0, atol=1e-6)
    for found in (stats, alone[1]):
        np.testing.assert_allclose(jnp.where(mask, found.logprobs - stats_apart.logprobs, 0), 0, atol=1e-6)
        np.testing.assert_allclose(jnp.where(mask, found.entropy - stats_apart.entropy, 0), 0, atol=1e-6)


def recipe_of(share: float | None, num_micro: int = 1) -> steps.Recipe:
    run = tiny.build("ppo", CFG, num_micro=num_micro, trunk_gradient=share)
    return run.recipe._replace(nets=nets_of(share))


def gradients(share: float | None, params: dict, num_micro: int = 1) -> dict:
    recipe = recipe_of(share, num_micro)
    state = TrainState(jnp.int32(0), jnp.int32(0), params, {}, {}, {})
    experience = experience_of(tiny.sequences(), None)
    return tiny.program(partial(steps.gradients, recipe))(state, experience)[0]


@pytest.mark.nightly  # by day: numbers of both models, above
@pytest.mark.parametrize("share", [SHARE, *(pytest.param(one, marks=pytest.mark.nightly) for one in (0.0, 1.0))])
def test_the_trunk_learns_from_both_losses_and_the_head_from_its_own(share):
    """With two equal trunks, autodiff gives each loss's gradient by itself; the shared one's is their weighted sum."""
    bare, whole = trees()
    apart, found = gradients(None, whole), gradients(share, bare)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(apart["value"]["layers"])) > 0.01
    close(found["value"], {"head": apart["value"]["head"]})
    add = lambda ours, theirs: ours + share * theirs
    trunk = {name: part for name, part in apart["value"].items() if name != "head"}
    own = {name: part for name, part in apart["policy"].items() if name not in trunk}  # an lm head of its own
    close(found["policy"], jax.tree.map(add, {name: apart["policy"][name] for name in trunk}, trunk) | own)


@pytest.mark.nightly
def test_the_number_of_micro_batches_changes_nothing():
    bare, _ = trees()
    close(gradients(SHARE, bare, num_micro=4), gradients(SHARE, bare))


@pytest.mark.nightly  # by day: its gradients, above
def test_a_trunk_that_is_not_to_learn_values_learns_as_beside_another_model():
    """trunk_gradient 0: after an update the policy is what its own loss makes of it."""
    bare, whole = trees()
    experience = experience_of(tiny.sequences(), None)
    found = []
    for share, params in ((0.0, bare), (None, whole)):
        recipe = recipe_of(share)._replace(optimizers={"policy": optax.sgd(1.0), "value": optax.sgd(1.0)})
        opt_state = {role: optax.sgd(1.0).init(params[role]) for role in params}
        state = TrainState(jnp.int32(0), jnp.int32(0), params, {}, opt_state, {})
        found.append(tiny.program(partial(steps.update_minibatch, recipe))(state, experience)[0].params)
    close(found[0]["policy"], found[1]["policy"])
    close(found[0]["value"]["head"], found[1]["value"]["head"])


def test_an_update_is_one_pass_forward_and_one_back():
    """FLOPs of the traced gradient: those of two models less a whole value model's, three times its forward pass."""
    bare, whole = trees()
    rows = tiny.sequences()
    experience = experience_of(rows, None)

    def traced(share: float | None, params: dict) -> int:
        state = TrainState(jnp.int32(0), jnp.int32(0), params, {}, {}, {})
        return flops(jax.make_jaxpr(partial(steps.gradients, recipe_of(share)))(state, experience))

    read = lambda share, role: lambda params: nets_of(share).read(Trees(params, {}), rows, Ask(role, "values"))
    forward = lambda share, params, role: flops(jax.make_jaxpr(read(share, role))(params))
    one = forward(None, whole, "value")
    saved = traced(None, whole) - traced(SHARE, bare)
    head = 2 * rows.tokens.shape[0] * 6 * tiny.MODEL.hidden_size
    assert 2.6 * (one - head) < saved <= 3 * (one - head)  # nothing is passed back to the embeddings' input


# ---- a run ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(root) -> Path:
    """root/trunk/ppo: 2 iterations; again: 1 and then the other; next: starts its value model, a whole one, from ppo;
    value-hf: the value model of ppo."""
    runs.whole(root)
    folder = root / "trunk"

    def train(name: str, iterations: int, *more: str) -> list[str]:
        arguments = [*runs.overrides(runs.text(root), folder, root / "whole"), f"ppo:run_dir={folder / name}"]
        short = [f"iterations={iterations}", "checkpoint.every=1", "eval.every=0", "ppo:algorithm.reward_update=false"]
        return runs.train(*arguments, *short, *more, configs=[runs.tiny_config("ppo")])

    shared = "models.value={share_trunk: true}"
    commands = [
        train("ppo", 2, shared),
        train("again", 1, shared),
        train("again", 2, shared),
        train("next", 1, f"models.value.init_from={folder}/ppo", "optimizer.default.learning_rate=0"),
        ["export", f"{folder}/ppo", "--role", "value", "--to", f"{folder}/value-hf"],
        ["evaluate", f"{folder}/ppo", "--json"],
    ]
    (done,) = runs.once(root, "trunk", lambda: [runs.process(root / "process-trunk", commands)])
    assert done.code == 0, done.errors
    return folder


@pytest.mark.nightly
def test_a_run_that_stops_and_goes_on_has_the_same_bits(trained):
    whole, again = (runs.read_state(trained / name, 2) for name in ("ppo", "again"))
    assert whole.keys() == again.keys()
    assert {path for path in whole if path.startswith("params.value/")} == {
        "params.value/head/kernel",
        "params.value/head/bias",
    }
    assert all(leaf.tobytes() == again[path].tobytes() for path, leaf in whole.items())
    before = runs.read_state(trained / "ppo", 1)
    assert all(not np.array_equal(before[path], whole[path]) for path in whole if path.startswith("params.value/"))


@pytest.mark.nightly
def test_another_run_s_value_model_starts_from_head_and_trunk(trained):
    origin, found = runs.read_state(trained / "ppo", 2), runs.read_state(trained / "next", 1)
    values = {path: leaf for path, leaf in found.items() if path.startswith("params.value/")}
    assert len(values) > 2
    for path, leaf in values.items():
        role = "value" if "/head/" in path else "policy"
        np.testing.assert_array_equal(leaf, origin[path.replace("params.value/", f"params.{role}/")])


@pytest.mark.nightly
def test_an_exported_value_model_is_whole(trained):
    cfg, head = hf_config.read_config(trained / "value-hf")
    assert head == "scalar"
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        found = hf_weights.load(trained / "value-hf", cfg, head, jnp.float32)
    origin = runs.read_state(trained / "ppo", 2)
    np.testing.assert_array_equal(found["head"]["kernel"], origin["params.value/head/kernel"])
    np.testing.assert_array_equal(found["final_norm"]["scale"], origin["params.policy/final_norm/scale"])
