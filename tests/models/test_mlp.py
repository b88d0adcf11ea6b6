"""The model of observations: its numbers by NumPy, and which column is about which observation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.generate.actions import choose_action
from jaxrlhf.models import nets
from jaxrlhf.models.config import ModelConfig, resolve, row_limit
from jaxrlhf.models.mlp import observed_states
from jaxrlhf.models.parameters import init
from jaxrlhf.models.transformer import Runtime
from jaxrlhf.ops.sampling import Sampling
from jaxrlhf.types import Acting, Ask, Sequences, Trees

CFG = resolve(ModelConfig(family="mlp", vocab_size=3, observation_size=4, hidden_size=8, num_layers=3))
SAMPLING = Sampling(min_new_tokens=5, eos_ids=(2,))


def rows() -> Sequences:
    rng = np.random.default_rng(0)
    mask = np.arange(6) > 0
    return Sequences(
        tokens=jnp.array(np.c_[np.full(4, 2), rng.integers(0, 2, (4, 5))], jnp.int32),
        valid=jnp.ones((4, 6), bool),
        response_mask=jnp.broadcast_to(mask, (4, 6)),
        observations=jnp.array(rng.normal(size=(4, 6, 4)), jnp.float32),
    )


def by_numpy(params, observations: np.ndarray) -> np.ndarray:
    x = np.tanh(observations @ params["observations"]["kernel"] + params["observations"]["bias"])
    for at in range(2):
        x = np.tanh(x @ params["layers"]["kernel"][at] + params["layers"]["bias"][at])
    return x


def read(head, *asks: Ask):
    params = jax.jit(init, static_argnums=(0, 1))(CFG, head, jax.random.key(1))
    found = nets.make_nets({"role": CFG}, Runtime(), SAMPLING, lambda *_: None)  # type: ignore[arg-type]
    return jax.device_get(params), jax.jit(lambda params: found.read(Trees({"role": params}, {}), rows(), *asks))(
        params
    )


def test_layers_of_tanh():
    params = jax.device_get(jax.jit(init, static_argnums=(0, 1))(CFG, "scalar", jax.random.key(0)))
    observations = np.asarray(rows().observations)
    found = jax.jit(lambda params, x: observed_states(params, CFG, x, Runtime()))(params, observations)
    np.testing.assert_allclose(found, by_numpy(params, observations), atol=1e-6)
    with pytest.raises(ValueError, match="observations of 3 numbers: the model reads 4"):
        observed_states(params, CFG, jnp.zeros((1, 1, 3)), Runtime())


def test_a_value_is_of_the_state_before_and_a_reward_of_the_state_after_an_action():
    asks = (Ask("role", "values"), Ask("role", "rewards"), Ask("role", "scores"))
    params, (values, rewards, scores) = read("scalar", *asks)
    every = (by_numpy(params, np.asarray(rows().observations)) @ params["head"]["kernel"])[..., 0] + params["head"][
        "bias"
    ]
    np.testing.assert_allclose(values[:, 1:], every[:, :-1], atol=1e-6)
    np.testing.assert_allclose(rewards[:, 1:], every[:, 1:], atol=1e-6)
    assert not np.asarray(rewards[:, 0]).any()
    np.testing.assert_allclose(scores, every[:, 1:].sum(1), atol=1e-5)


def test_actions_are_chosen_under_the_distribution_that_is_learned():
    params, (stats,) = read("lm", Ask("role", "token_stats"))
    given, found = rows(), []
    seen = jnp.asarray(given.observations)
    act = jax.jit(lambda acting: choose_action(params, CFG, acting, jnp.int32(7), jnp.int32(3), SAMPLING, Runtime()))
    for at in range(5):
        token, logprob = act(Acting(seen[:, at], jnp.arange(4), jnp.full(4, at)))
        other = jnp.log1p(-jnp.exp(logprob))  # two actions, and EOS is none
        found.append(jnp.where(token == given.tokens[:, 1 + at], logprob, other))
        assert set(np.asarray(token).tolist()) <= {0, 1}
    np.testing.assert_allclose(jnp.stack(found, 1), stats.logprobs[:, 1:], atol=1e-5)


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"num_kv_heads": 2}, "num_kv_heads: 2: family mlp has no such thing; nearest: 0"),
        ({"mlp_size": 5}, "mlp_size: 5: family mlp has layers of hidden_size; nearest: 128"),
        ({"family": "llama", "observation_size": 4}, "observation_size: 4: llama reads tokens; expected 0"),
    ],
)
def test_fields_that_do_not_fit_the_family(fields, said):
    with pytest.raises(ValueError, match=said):
        resolve(ModelConfig(**({"family": "mlp"} | fields)))


def test_rows_may_be_of_any_length():
    assert row_limit(CFG) is None
