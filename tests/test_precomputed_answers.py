"""What networks are asked before the scores are known: when that can be, in which order, and that nothing changes."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf import step as steps
from jaxrlhf.algorithm import Algorithm
from jaxrlhf.algorithms import ALGORITHMS
from jaxrlhf.algorithms.grpo import GRPOConfig
from jaxrlhf.algorithms.ppo import PPOConfig
from jaxrlhf.algorithms.ppo_lagrangian import PPOLagrangianConfig
from jaxrlhf.precomputed_answers import Answered
from jaxrlhf.rewards.functions import RewardsConfig
from jaxrlhf.run import scoring
from jaxrlhf.run.programs import overlaps
from jaxrlhf.run.recorded_asks import asked_before_scores
from jaxrlhf.types import Ask, Batch, Experience, Nets, Sequences, TrainState
from tests.support import tiny
from tests.support.fake import no_sample


def drawn(algorithm: Algorithm, cfg: Any) -> Any:
    """What of a Blueprint is looked at."""
    run = SimpleNamespace(algorithm=cfg, models={})
    recipe = SimpleNamespace(nets=Nets(no_sample, no_sample), graders=("help", "cost"))
    return SimpleNamespace(algorithm=algorithm, cfg=run, recipe=recipe)


def shapes() -> Batch:
    """Two prompts with 8 responses each."""
    batch = Batch(prompts=tiny.prompts(rows=2), sequences=sampled())
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)


def sampled() -> Sequences:
    sequences = tiny.sequences()
    logprobs = jnp.where(sequences.response_mask, -4.0, 0.0)
    return dataclasses.replace(sequences, logprobs=logprobs)


def logprobs_of(nets: Nets, state: TrainState, rows: Sequences) -> jax.Array:
    (stats,) = nets.read(state.trees, rows, Ask("policy", "token_stats"))
    return stats.logprobs


def only_the_good(nets, state, batch: Batch, cfg):
    """It reads what scored more than 0."""
    sequences = batch.sequences
    assert sequences is not None
    kept = sequences.replace(valid=sequences.valid & (sequences.scores > 0)[:, None])
    return Experience(responses=kept.replace(logprobs=logprobs_of(nets, state, kept))), {}


def in_another_order(nets, state, batch: Batch, cfg):
    """It sorts its rows by their scores, in a function of its own."""
    sequences = batch.sequences
    assert sequences is not None
    order = jax.jit(jnp.argsort)(sequences.scores)
    rows = jax.tree.map(lambda x: x[order], sequences)
    return Experience(responses=rows.replace(logprobs=logprobs_of(nets, state, rows))), {}


def one_by_one(nets, state, batch: Batch, cfg):
    """It asks in a loop of its own."""
    sequences = batch.sequences
    assert sequences is not None
    one = lambda row: logprobs_of(nets, state, jax.tree.map(lambda x: x[None], row))[0]
    return Experience(responses=sequences.replace(logprobs=jax.lax.map(one, sequences))), {}


def with_its_own_look_at_the_weights(nets, state, batch: Batch, cfg):
    """It reads parameters without a network."""
    sequences = batch.sequences
    assert sequences is not None
    logprobs = logprobs_of(nets, state, sequences)
    return Experience(responses=sequences.replace(logprobs=logprobs + state.params["policy"]["bias"].sum())), {}


GRPO, PPO, PPO_LAGRANGIAN = (ALGORITHMS[name] for name in ("grpo", "ppo", "ppo_lagrangian"))


@pytest.mark.parametrize(
    ("algorithm", "cfg", "expected"),
    [
        (GRPO, GRPOConfig(), True),
        (GRPO, GRPOConfig(kl_coef=0.0), False),  # nothing is asked
        (GRPO, GRPOConfig(kl_coef=0.0, old_logprobs="recompute"), True),
        (PPO, PPOConfig(), True),
        (PPO_LAGRANGIAN, PPOLagrangianConfig(), True),
        (GRPO._replace(prepare=only_the_good), GRPOConfig(), False),
        (GRPO._replace(prepare=in_another_order), GRPOConfig(), False),
        (GRPO._replace(prepare=one_by_one), GRPOConfig(), False),
        (GRPO._replace(prepare=with_its_own_look_at_the_weights), GRPOConfig(), True),
    ],
    ids=["grpo", "no kl", "recompute", "ppo", "cost", "filtered by score", "sorted by score", "in a loop", "weights"],
)
def test_what_can_be_asked_before_the_scores(algorithm, cfg, expected):
    roles = ("policy", "value", "cost_value", "reference")
    trees = {role: {"bias": jax.ShapeDtypeStruct((3,), jnp.float32)} for role in roles}
    controls = {"kl_coef": jnp.float32(0.1), "multiplier": jnp.float32(1)}
    state = TrainState(jnp.int32(0), jnp.int32(0), trees, trees, {}, controls)
    assert asked_before_scores(drawn(algorithm, cfg), state, shapes()) is expected


@pytest.mark.parametrize(
    ("asked", "platform", "expected"),
    [(None, "cpu", False), (None, "tpu", True), (None, "gpu", True), (True, "cpu", True), (False, "tpu", False)],
)
def test_where_networks_are_read_while_the_host_scores(asked, platform, expected):
    devices = np.array([SimpleNamespace(platform=platform)], object)
    run: Any = SimpleNamespace(
        cfg=SimpleNamespace(rewards=RewardsConfig("my:f", overlap=asked)), mesh=SimpleNamespace(devices=devices)
    )
    assert overlaps(run) is expected


@pytest.mark.nightly  # by day: the reward model as a function, in run/test_scoring
@pytest.mark.parametrize(
    ("how", "widths"),
    [
        ("sampler", 3),
        *(
            pytest.param(*case, marks=pytest.mark.nightly)
            for case in (("recompute", 3), ("sampler", 1), ("recompute", 1))
        ),
    ],
)
def test_learning_from_answers_is_learning(how, widths):
    """GRPO and its two passes, packed or not: the same metrics and parameters, to rounding."""
    cfg = GRPOConfig(num_minibatches=2, old_logprobs=how, sampler_ratio_cap=2.0 if how == "recompute" else None)
    run = tiny.build("grpo", cfg, pack_widths=widths, samples_per_prompt=8)
    scores = jnp.array(np.random.default_rng(0).normal(size=16), jnp.float32)
    batch = Batch(prompts=tiny.prompts(rows=2), sequences=sampled().replace(copies=1))
    scored = batch.replace(sequences=batch.sequences.replace(scores=scores))
    read, learn = (tiny.program(make(run.recipe)) for make in (steps.make_read, steps.make_learn))
    answers = read(run.state, batch)
    assert len(answers) == (1 if how == "sampler" else 2)
    (expected, metrics), (found, numbers) = (learn(run.state, one) for one in (scored, Answered(scored, answers)))
    assert numbers.keys() == metrics.keys()
    for name, value in metrics.items():
        np.testing.assert_allclose(numbers[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)
    # and the answers are what is learned from: the last is the reference's
    other = (*answers[:-1], jax.tree.map(lambda x: x - 1.0, answers[-1]))
    assert abs(learn(run.state, Answered(scored, other))[1]["kl/reference"] - metrics["kl/reference"]) > 0.1


def test_the_function_works_while_networks_are_read(monkeypatch):
    """The program is dispatched before the function is called, and nothing waits for it."""
    said: list[str] = []

    class Unfinished:
        def __getattribute__(self, name):
            raise AssertionError("somebody waits")

    answers = Unfinished()
    programs: Any = {
        "rollout": SimpleNamespace(run=lambda state, batch: said.append("rollout") or "responses"),
        "read": SimpleNamespace(run=lambda state, batch: said.append(f"read {batch.sequences}") or answers),
        "learn": SimpleNamespace(run=lambda state, batch: said.append(f"learn {batch.batch.sequences}") or (state, {})),
    }
    score = lambda ready, sequences, records: said.append("score") or scoring.Scored("scored", {"time/rewards": 0.5})  # type: ignore[arg-type]
    monkeypatch.setattr(scoring, "score", score)
    ready: Any = SimpleNamespace(cfg=SimpleNamespace(converses=False))
    _, metrics, sequences = scoring.joined(ready, programs)(None, Batch(), [])  # type: ignore[arg-type]
    assert said == ["rollout", "read responses", "score", "learn scored"]
    assert metrics == {"time/rewards": 0.5} and sequences == "scored"
