"""RAFT: the loss is the likelihood of the best responses alone; it learns what is rewarded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf import step as steps
from jaxrlhf.algorithms import raft
from jaxrlhf.algorithms.raft import RAFTConfig
from jaxrlhf.optim import OptimizerConfig
from jaxrlhf.types import Batch, Trees
from tests.support import tiny
from tests.support.fake import FAKE, make_case, prompts_of


def prepared(cfg: RAFTConfig, **fields):
    case = make_case(5)
    batch = Batch(prompts=prompts_of(2), sequences=case.sequences(**fields))
    return case, *raft.prepare(FAKE, case.state(0.0), batch, cfg)


@pytest.mark.parametrize("keep", [1, 2])
def test_loss_is_a_numpy_loop(keep):
    """Two groups of three, of which row 2 is empty."""
    case, experience, metrics = prepared(RAFTConfig(keep=keep))
    kept = []
    for rows in ((0, 1), (3, 4, 5)):
        kept += sorted(rows, key=lambda row: -case.scores[row])[:keep]
    total = sum(-float(case.policy[row, t]) for row in kept for t in np.nonzero(case.mask[row])[0])
    losses, _ = raft.loss(FAKE, Trees(case.params(), case.slow()), experience, RAFTConfig(keep=keep))
    assert losses["policy"].count == sum(case.mask[row].sum() for row in kept)
    np.testing.assert_allclose(losses["policy"].total, total, rtol=1e-6)
    np.testing.assert_allclose(metrics["score/kept"].value(), np.mean([case.scores[row] for row in kept]), rtol=1e-6)


def test_a_response_without_a_score_is_never_kept():
    scores = jnp.array([jnp.nan, 0.0, jnp.nan, jnp.nan, jnp.nan, jnp.nan])
    _, experience, _ = prepared(RAFTConfig(keep=2), scores=scores)
    assert experience.learned.any(1).tolist() == [False, True, False, False, False, False]


def test_the_penalty_of_a_missing_end_decides_too():
    _, experience, metrics = prepared(RAFTConfig(missing_eos_penalty=100.0))
    assert experience.learned.any(1).tolist()[:2] == [False, True]  # row 0 did not end
    assert metrics["score/kept"].value() > -50  # of the score itself


def test_junk_outside_the_responses_changes_nothing():
    clean, junk = (make_case(5, junk) for junk in (0.0, np.nan))
    batch = lambda case: Batch(prompts=prompts_of(2), sequences=case.sequences())
    loss = lambda params, case, experience: raft.loss(FAKE, Trees(params, case.slow()), experience, RAFTConfig())[0]
    grads = []
    for case in (clean, junk):
        experience, _ = raft.prepare(FAKE, case.state(0.0), batch(case), RAFTConfig())
        grad = jax.grad(lambda params, case=case, experience=experience: loss(params, case, experience)["policy"].total)
        grads.append(np.asarray(grad(case.params())["policy"]["logprobs"]))
    np.testing.assert_array_equal(*grads)


@pytest.mark.nightly  # by day: its loss by a loop, above
def test_it_learns_to_write_what_is_rewarded():
    """Responses of one token out of 64; the host rewards even ones."""
    batch = Batch(prompts=tiny.prompts(rows=8))
    run = tiny.build(
        "raft", RAFTConfig(), batch=batch, samples_per_prompt=4, room=1, optimizer=OptimizerConfig(learning_rate=3e-2)
    )
    rollout, learn = map(tiny.program, (steps.make_rollout(run.recipe), steps.make_learn(run.recipe)))
    state, shares = run.state, []
    for _ in range(12):
        sequences = rollout(state, batch)
        even = (sequences.tokens[:, -1] % 2 == 0).astype(jnp.float32)
        shares.append(float(even.mean()))
        state, metrics = learn(state, batch.replace(sequences=sequences.replace(scores=even)))
    assert np.mean(shares[-2:]) > 0.9 > 0.75 > shares[0]
    assert metrics["score/kept"] >= metrics["score/mean"]
