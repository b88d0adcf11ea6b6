"""What routers chose while responses were sampled: kept, followed by the trainer, measured; and their losses."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf import step as steps
from jaxrlhf.algorithms.dpo import DPOConfig
from jaxrlhf.generate import loop
from jaxrlhf.generate.sampler import Sampler
from jaxrlhf.models.config import ModelConfig, resolve
from jaxrlhf.models.decoding import decode_layout
from jaxrlhf.models.experts import OWN, Routed, route, router_load, routing_dtype
from jaxrlhf.models.linear import OUT_FIRST
from jaxrlhf.models.nets import make_nets
from jaxrlhf.models.transformer import Runtime
from jaxrlhf.ops.sampling import Sampling
from jaxrlhf.types import Ask, Batch, Sequences, Trees
from tests.support import tiny

SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_heads": 4, "mlp_size": 16}
MODEL = resolve(ModelConfig("qwen3_moe", num_layers=3, num_experts=8, experts_per_token=2, **SIZES))
OSS = resolve(ModelConfig("gpt_oss", num_layers=3, num_experts=8, sliding_window=4, **SIZES))
EOS = (1, 2, 5, 9)
SAMPLING = Sampling(eos_ids=EOS)
ROOM, COPIES = 8, 3


def weights(model: ModelConfig = MODEL):
    """With experts that matter."""
    params = tiny.parameters(model, "lm", 0)
    mlp = params["layers"]["mlp"]
    mlp = mlp | {"experts": jax.tree.map(lambda x: 3 * x, mlp["experts"])}
    return params | {"layers": params["layers"] | {"mlp": mlp}}


@functools.cache
def sampled(compute, keeps: bool = True, halvings: int = 0, model: ModelConfig = MODEL) -> Sequences:
    """Responses to 8 prompts, three each, which end early."""
    sampler = Sampler(SAMPLING, ROOM, EOS, 0, samples_per_prompt=COPIES, keeps_routing=keeps, halvings=halvings)
    made = lambda params: loop.sample(
        params, model, tiny.prompts(8), jnp.int32(0), jnp.int32(0), sampler, Runtime(compute=compute)
    )
    return tiny.program(made)(weights(model))


def trained(sequences: Sequences, compute, replays: bool, model: ModelConfig = MODEL):
    """(the trainer's log-probs of the response tokens less the sampler's, what was measured of the routers)."""
    found = make_nets(
        {"policy": model},
        Runtime(compute=compute),
        SAMPLING,
        sample=None,  # type: ignore[arg-type]
        replays=frozenset({"policy"} if replays else ()),
    )

    def read(params, sequences):
        assert found.noting is not None
        noted = []
        (stats,) = found.noting(noted)(Trees({"policy": params}, {}), sequences, Ask("policy", "token_stats"))
        return stats.logprobs, noted[0][1]

    logprobs, measured = tiny.program(read)(weights(model), sequences)
    mask = np.asarray(sequences.response_mask)
    return np.asarray(logprobs - sequences.logprobs)[mask], {k: float(mean.value()) for k, mean in measured.items()}


def test_the_choice_of_every_token_is_kept():
    """Of prompts and responses, in the smallest integers; the last layer computes no prompt but its last column."""
    found = sampled(jnp.float32)
    routing = np.asarray(found.routing).reshape(*found.tokens.shape, 3, 2)
    assert routing.dtype == np.int8 and routing_dtype(MODEL) == jnp.int8
    assert (routing[~np.asarray(found.valid)] == OWN).all()
    start, valid = found.response_start, np.asarray(found.valid)
    for layer in range(3):
        known = routing[:, start - 1 :, layer] if layer == 2 else routing[:, :, layer]
        there = valid[:, start - 1 :] if layer == 2 else valid
        assert (known[there] >= 0).all() and known.max() == 7
        assert (known[there][:, 0] != known[there][:, 1]).all()
    assert (routing[:, : start - 1, 2] == OWN).all()
    assert sampled(jnp.float32, keeps=False).routing is None


def test_compaction_takes_the_choices_along():
    whole, halved = sampled(jnp.float32), sampled(jnp.float32, halvings=1)
    np.testing.assert_array_equal(halved.tokens, whole.tokens)
    np.testing.assert_array_equal(halved.routing, whole.routing)


@pytest.mark.parametrize(
    ("packed", "model"), [(False, MODEL), (True, MODEL), pytest.param(True, OSS, marks=pytest.mark.nightly)]
)
def test_the_trainer_makes_the_choices_that_were_kept(packed, model):
    """In float32 the ratio is 1 with and without; and what is kept is followed: other choices, other log-probs."""
    rows = sampled(jnp.float32, model=model)
    most = int(np.asarray(rows.response_mask).sum(1).reshape(-1, COPIES).sum(1).max())
    rows = rows.replace(width=most, copies=COPIES) if packed else rows
    difference, measured = trained(rows, jnp.float32, True, model)
    assert np.abs(difference).max() < 1e-5 and measured["routing_replaced"] == 0
    other = rows.replace(routing=jnp.where(rows.routing == OWN, OWN, (rows.routing + 3) % 8).astype(jnp.int8))
    difference, measured = trained(other, jnp.float32, True, model)
    assert np.abs(difference).mean() > 0.05 and measured["routing_replaced"] > 0.5


def test_sampler_and_trainer_agree_in_bfloat16():
    """Rounding changes a choice now and then, and with it the log-prob; with replay what is left is rounding."""
    rows = sampled(jnp.bfloat16)
    free, _ = trained(rows, jnp.bfloat16, False)
    followed, measured = trained(rows, jnp.bfloat16, True)
    assert np.abs(followed).max() < 0.1 and np.abs(followed).mean() <= np.abs(free).mean()
    assert measured["routing_replaced"] < 0.02


@pytest.mark.parametrize("int8", [(), ("weights",)])
def test_the_router_keeps_its_precision_where_tokens_are_decoded(int8):
    """Its matrix is neither cast nor quantised: else close calls would fall otherwise than in training."""
    params = weights()
    laid = decode_layout(params, MODEL, "lm", Runtime(compute=jnp.bfloat16, int8=int8), 4)
    for i, layer in enumerate(laid["layers"]):
        ((name, found),) = layer["mlp"]["router"].items()
        kernel = params["layers"]["mlp"]["router"]["kernel"][i]
        np.testing.assert_array_equal(found, kernel.T if name == OUT_FIRST else kernel)


def test_loads_by_hand():
    """Two tokens that count, of three: k = 2, E = 4."""
    probs = jnp.array([[[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.1, 0.1]]])
    own = jnp.array([[[0, 1], [3, 2], [0, 1]]])
    routed = Routed(jnp.log(probs) + 2.0, probs, own, own, probs[..., :2])
    counted = jnp.array([[True, False, True]])
    found = {name: float(mean.value()) for name, mean in router_load(routed, counted).items()}
    # f = (1, 1, 0, 0), P = (0.55, 0.2, 0.15, 0.1)
    assert found["load_balance"] == pytest.approx(4 * (0.55 + 0.2))
    assert found["router_z"] == pytest.approx(4.0) and found["expert_load_max"] == pytest.approx(2.0)
    assert found["expert_load_entropy"] == pytest.approx(np.log(2))
    kept = jnp.array([[[0, 1], [0, 0], [2, 1]]], jnp.int8)
    assert float(router_load(routed, counted, kept)["routing_replaced"].value()) == pytest.approx(0.25)
    even = routed._replace(probs=jnp.full_like(probs, 0.25), choice=jnp.array([[[0, 1], [0, 1], [2, 3]]]))
    found = {name: float(mean.value()) for name, mean in router_load(even, counted).items()}
    assert found["load_balance"] == pytest.approx(2.0) and found["expert_load_max"] == pytest.approx(1.0)


@pytest.mark.torch
def test_the_load_balance_loss_is_that_of_transformers():
    torch = pytest.importorskip("torch")
    from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 7, 32)), jnp.float32)
    counted = np.random.default_rng(1).random((3, 7)) < 0.7
    router = jax.tree.map(lambda w: 3 * w[0], weights()["layers"]["mlp"]["router"])
    routed = route(router, MODEL, x)
    theirs = load_balancing_loss_func(
        (torch.tensor(np.asarray(routed.logits)).reshape(-1, 8),), 8, 2, torch.tensor(counted.astype(int))
    )
    ours = router_load(routed, jnp.asarray(counted))["load_balance"].value()
    assert float(ours) == pytest.approx(float(theirs), rel=1e-5)


def test_the_first_loss_of_dpo_is_ln_2():
    """Policy and reference route alike; padding and the other rows change no token. The routers' losses come on top of
    the gradient and not of loss/policy, and move the routers."""
    run = tiny.build("dpo", DPOConfig(), batch=Batch(preferences=tiny.preferences().replace(margin=None)), model=MODEL)
    weighed = run.recipe._replace(router_losses={"policy": {"load_balance": 0.5, "router_z": 0.1}})
    found = {}
    for name, recipe in {"plain": run.recipe, "weighed": weighed}.items():
        _, metrics, _ = tiny.program(steps.make_iteration(recipe))(run.state, run.batch)
        found[name] = {key: float(value) for key, value in metrics.items()}
        assert found[name]["loss/policy"] == pytest.approx(np.log(2), abs=1e-6)
        assert found[name]["policy/load_balance"] > 1.9 and 1 <= found[name]["policy/expert_load_max"] <= 4
    assert found["weighed"]["policy/grad_norm"] > found["plain"]["policy/grad_norm"] * 1.01
    assert not any(key.startswith("reference/") for key in found["plain"])
