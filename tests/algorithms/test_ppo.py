"""PPO against a plain NumPy loop, its gradients, and a policy small enough to enumerate."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrlhf import step as steps
from jaxrlhf.algorithms import ppo
from jaxrlhf.algorithms.ppo import PPOConfig
from jaxrlhf.types import Ask, Batch, Mean, Preferences, Rows, Sequences, Trees
from tests.support import tiny
from tests.support.enumerated import run as enumerated_run
from tests.support.fake import FAKE, LENGTHS, PROMPT, Case, make_case


def prepare(case: Case, cfg: PPOConfig, kl_coef: float | None = None) -> tuple[ppo.PPOExperience, dict[str, float]]:
    """The experience, and metrics as numbers."""
    state = case.state(cfg.kl_coef if kl_coef is None else kl_coef)
    experience, means = ppo.prepare(FAKE, state, Batch(sequences=case.sequences()), cfg)
    return experience, {name: float(mean.value()) for name, mean in means.items()}


# ---- prepare against a loop -----------------------------------------------------------------------------------------


def by_loop(case: Case, cfg: PPOConfig) -> dict[str, np.ndarray]:
    """PPO's bookkeeping in float64, one token at a time, the tokens of a response only."""
    logprobs = case.policy if cfg.old_logprobs == "recompute" else case.sampled
    rewards, advantages = np.zeros(case.mask.shape), np.zeros(case.mask.shape)
    for row in range(len(case.mask)):
        chosen = np.flatnonzero(case.mask[row])
        for t in chosen:
            log_ratio = float(logprobs[row, t]) - float(case.reference[row, t])
            kl = {"k1": log_ratio, "k2": log_ratio**2 / 2, "k3": np.exp(-log_ratio) - 1 + log_ratio}[cfg.kl_estimator]
            rewards[row, t] = -cfg.kl_coef * kl
        if len(chosen):
            rewards[row, chosen[-1]] += case.scores[row] - (0.0 if case.ended[row] else cfg.missing_eos_penalty)
    if cfg.whiten_rewards:
        kept = rewards[case.mask]
        rewards[case.mask] = (kept - kept.mean()) / kept.std(ddof=1) + kept.mean()
    for row in range(len(case.mask)):
        next_value = next_advantage = 0.0
        for t in reversed(np.flatnonzero(case.mask[row])):
            delta = rewards[row, t] + cfg.gamma * next_value - case.values[row, t]
            advantages[row, t] = next_advantage = delta + cfg.gamma * cfg.gae_lambda * next_advantage
            next_value = float(case.values[row, t])
    returns = np.where(case.mask, advantages + case.values, 0.0)
    if cfg.whiten_advantages != "no":
        kept = advantages[case.mask]
        spread = kept.std(ddof=int(cfg.whiten_advantages == "unbiased"))
        advantages[case.mask] = (kept - kept.mean()) / spread
    if cfg.sampler_ratio_cap is not None:
        advantages *= np.minimum(case.sampler_ratio(), cfg.sampler_ratio_cap)
    return {"rewards": rewards, "advantages": advantages, "returns": returns, "logprobs": logprobs}


def metrics_by_loop(case: Case, cfg: PPOConfig, found: dict[str, np.ndarray]) -> dict[str, float]:
    """What ``prepare`` should report; an empty response is no response."""
    rows = case.mask.any(1)
    drift = np.where(case.mask, found["logprobs"] - case.reference, 0).sum(1)[rows]
    lengths = case.mask.sum(1)[rows]
    unexplained = (found["returns"] - case.values)[case.mask].var() / found["returns"][case.mask].var()
    ratio = case.sampler_ratio()[case.mask]
    capped = {"policy/sampler_ratio": ratio.mean(), "policy/sampler_ratio_capped": (ratio > 1.2).mean()}
    return (capped if cfg.sampler_ratio_cap else {}) | {
        "score/mean": case.scores[rows].mean(),
        "score/std": case.scores[rows].std(ddof=1),
        "reward/mean": found["rewards"].sum(1)[rows].mean(),
        "kl/reference": drift.mean(),
        "kl/coef": cfg.kl_coef,
        "kl/sampler_mismatch": np.abs(found["logprobs"] - case.sampled)[case.mask].mean(),
        "response/length_mean": lengths.mean(),
        "response/ended": case.ended[rows].mean(),
        "response/tokens": lengths.sum(),
        "response/count": rows.sum(),
        "value/mean": case.values[case.mask].mean(),
        "value/explained_variance": 1 - unexplained,
    }


VARIANTS = {
    "default": PPOConfig(),
    "plain": PPOConfig(whiten_advantages="no", kl_coef=0.3),
    "k2": PPOConfig(kl_estimator="k2", kl_coef=0.4, whiten_advantages="no"),
    "k3": PPOConfig(kl_estimator="k3", kl_coef=0.4, whiten_advantages="no"),
    "biased": PPOConfig(whiten_advantages="biased"),
    "discounted": PPOConfig(gamma=0.9, gae_lambda=0.8, whiten_advantages="no"),
    "monte carlo": PPOConfig(gae_lambda=1.0, whiten_advantages="no"),
    "one step": PPOConfig(gae_lambda=0.0, whiten_advantages="no"),
    "whitened rewards": PPOConfig(whiten_rewards=True, whiten_advantages="no", kl_coef=0.2),
    "missing eos": PPOConfig(missing_eos_penalty=1.5, whiten_advantages="no"),
    "missing eos, whitened rewards": PPOConfig(missing_eos_penalty=1.5, whiten_rewards=True, whiten_advantages="no"),
    "recompute": PPOConfig(old_logprobs="recompute", kl_coef=0.3, whiten_advantages="no"),
    "capped": PPOConfig(old_logprobs="recompute", sampler_ratio_cap=1.2),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_prepare_is_a_numpy_loop(name):
    case, cfg = make_case(), VARIANTS[name]
    experience, metrics = prepare(case, cfg)
    expected = by_loop(case, cfg)
    np.testing.assert_allclose(np.asarray(experience.advantages), expected["advantages"], atol=1e-5)
    np.testing.assert_allclose(np.asarray(experience.returns), expected["returns"], atol=1e-5)
    sequences = experience.responses
    assert sequences is not None and experience.values is not None
    np.testing.assert_array_equal(sequences.logprobs, expected["logprobs"])
    np.testing.assert_array_equal(experience.values, np.where(case.mask, case.values, 0))
    np.testing.assert_array_equal(sequences.scores, case.scores)  # raw: without the penalty
    numbers = metrics_by_loop(case, cfg, expected)
    assert metrics.keys() == numbers.keys()
    for metric, number in numbers.items():
        np.testing.assert_allclose(metrics[metric], number, atol=2e-5, err_msg=metric)


@pytest.mark.parametrize("junk", [np.nan, np.inf, -1e30])
@pytest.mark.parametrize("name", ["default", "recompute", "missing eos, whitened rewards", "k3"])
def test_what_is_outside_the_responses_never_counts(name, junk):
    cfg = replace(VARIANTS[name], entropy_coef=0.1)
    clean, dirty = make_case(), make_case(junk=junk)
    (experience, metrics), (dirtied, dirty_metrics) = prepare(clean, cfg), prepare(dirty, cfg)
    np.testing.assert_array_equal(dirtied.advantages, experience.advantages)
    np.testing.assert_array_equal(dirtied.returns, experience.returns)
    np.testing.assert_array_equal(np.asarray(dirtied.values), np.asarray(experience.values))
    assert dirty_metrics == metrics and all(np.isfinite(list(metrics.values())))
    assert not np.asarray(experience.advantages)[~clean.mask].any()
    clean_grads, dirty_grads = (gradients(case, given, cfg) for case, given in ((clean, experience), (dirty, dirtied)))
    for role in ("policy", "value"):
        assert tiny.equal_trees(clean_grads[role], dirty_grads[role])
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(dirty_grads[role]))


def test_missing_eos_costs_score_and_nothing_else():
    """Returns by hand: no KL, no discount, values 0, lambda 1, so that every token's return is the shaped score."""
    case = make_case()
    case.values[:] = 0.0
    cfg = PPOConfig(missing_eos_penalty=2.0, kl_coef=0.0, gae_lambda=1.0, whiten_advantages="no")
    experience, metrics = prepare(case, cfg)
    shaped = case.scores - np.where(case.ended, 0.0, 2.0)
    np.testing.assert_allclose(np.asarray(experience.returns), np.where(case.mask, shaped[:, None], 0), atol=1e-6)
    np.testing.assert_allclose(metrics["score/mean"], case.scores[case.mask.any(1)].mean(), atol=1e-6)


def test_column_t_is_about_token_t():
    """A nat of KL at token t lowers the returns up to t; a unit of value there lowers the advantage of t alone."""
    base = make_case()
    zero = np.zeros_like(base.values)
    case = replace(
        base, sampled=zero.copy(), reference=zero, values=zero.copy(), scores=np.zeros(len(LENGTHS), np.float32)
    )
    cfg = PPOConfig(kl_coef=1.0, gae_lambda=1.0, whiten_advantages="no")
    case.sampled[4, PROMPT + 1] = 1.0
    experience, _ = prepare(case, cfg)
    np.testing.assert_allclose(np.asarray(experience.returns)[4, PROMPT : PROMPT + 4], [-1, -1, 0, 0])
    case.sampled[:], case.values[4, PROMPT + 1] = 0.0, 1.0
    experience, _ = prepare(case, cfg)
    np.testing.assert_allclose(np.asarray(experience.advantages)[4, PROMPT : PROMPT + 4], [0, -1, 0, 0])


def test_scores_of_the_host_replace_the_reward_model():
    case = make_case()
    given = np.array([1, 0, 1, 1, 0, -1])  # a verifier's: integers
    state = case.state(0.3)
    state = replace(state, slow={"reference": state.slow["reference"]})  # there is no reward model to ask
    cfg = PPOConfig(whiten_advantages="no", kl_coef=0.3)
    batch = Batch(sequences=case.sequences(scores=jnp.array(given)))
    experience, means = ppo.prepare(FAKE, state, batch, cfg)
    case.scores = given.astype(np.float32)
    np.testing.assert_allclose(
        np.asarray(experience.returns), by_loop(case, cfg)["returns"], atol=1e-5
    )  # nats are not rounded off
    assert experience.returns is not None and experience.returns.dtype == jnp.float32
    np.testing.assert_allclose(float(means["score/mean"].value()), 0.2, atol=1e-6)  # of 5 rows: one is empty


def test_the_reward_model_that_learns_is_the_one_that_scores():
    case = make_case()
    state = case.state(0.05)
    learned = replace(state, params=state.params | {"reward": {"scores": state.slow["reward"]["scores"] + 10}})
    for start, shift in ((state, 0), (learned, 10)):
        cfg = PPOConfig(reward_update=shift > 0)
        batch = Batch(sequences=case.sequences(), preferences=tiny.preferences())
        experience, _ = ppo.prepare(FAKE, start, batch, cfg)
        assert experience.responses is not None
        np.testing.assert_allclose(np.asarray(experience.responses.scores), case.scores + shift, rtol=1e-6)


@pytest.mark.parametrize(("controller", "coefficient"), [("adaptive", 0.7), ("fixed", 0.05)])
def test_kl_coef_is_the_state_s_where_it_adapts(controller, coefficient):
    """Elsewhere the config's, also where the run has had a controller before."""
    case, cfg = make_case(), PPOConfig(kl_coef=0.05, kl_controller=controller, whiten_advantages="no")
    experience, metrics = prepare(case, cfg, kl_coef=0.7)
    expected = by_loop(case, replace(cfg, kl_coef=coefficient))
    np.testing.assert_allclose(np.asarray(experience.returns), expected["returns"], atol=1e-5)
    np.testing.assert_allclose(metrics["kl/coef"], coefficient, rtol=1e-6)


@pytest.mark.nightly  # by day: a batch of padding alone, in test_properties.py
def test_no_response_token_at_all():
    case = make_case()
    case.mask[:] = False
    for cfg in VARIANTS.values():
        cfg = replace(cfg, entropy_coef=0.1)
        experience, metrics = prepare(case, cfg)
        assert all(np.isfinite(list(metrics.values()))) and not np.asarray(experience.advantages).any()
        grads = gradients(case, experience, cfg)
        assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(grads))


# ---- loss -----------------------------------------------------------------------------------------------------------


def losses_of(params, case: Case, experience: ppo.PPOExperience, cfg: PPOConfig):
    return ppo.loss(FAKE, Trees(params, case.slow()), experience, cfg)


def gradients(case: Case, experience: ppo.PPOExperience, cfg: PPOConfig) -> dict:
    """Of the sum of all roles' totals in all params: what the step differentiates."""
    total = lambda params: sum(mean.total for mean in losses_of(params, case, experience, cfg)[0].values())
    return jax.grad(total)(case.params())


def token_terms(case: Case, experience: ppo.PPOExperience, cfg: PPOConfig, where) -> dict[str, float]:
    """What one response token adds to the metrics of ``loss``, in float64."""
    sequences = experience.responses
    assert sequences is not None
    read = lambda x: float(np.asarray(x)[where])
    advantage, target, old_value, value = map(
        read, (experience.advantages, experience.returns, experience.values, case.values)
    )
    ratio = np.exp(read(case.policy) - read(sequences.logprobs))
    free = -advantage * ratio
    clipped = -advantage * min(max(ratio, 1 - cfg.clip_range), 1 + cfg.clip_range)
    error = near = (value - target) ** 2
    if cfg.value_clip_range is not None:
        room = cfg.value_clip_range
        near = (min(max(value, old_value - room), old_value + room) - target) ** 2
    return {
        "loss/policy": max(free, clipped),
        "loss/value": max(error, near) / 2,
        "policy/entropy": read(case.entropy),
        "policy/clip_fraction": float(clipped > free),
        "policy/ratio": float(ratio),
        "policy/kl_old": float(ratio - 1 - np.log(ratio)),
        "value/clip_fraction": float(near > error),
    }


@pytest.mark.parametrize("value_clip_range", [0.2, None])
@pytest.mark.parametrize("seed", range(3))
def test_loss_is_a_numpy_loop(seed, value_clip_range):
    case = make_case(seed)
    cfg = PPOConfig(entropy_coef=0.3, value_clip_range=value_clip_range)
    experience, _ = prepare(case, cfg)
    later = make_case(seed + 10)  # the networks have moved since
    case.policy, case.values = case.sampled + later.policy - later.reference, later.values
    losses, metrics = losses_of(case.params(), case, experience, cfg)
    terms = [token_terms(case, experience, cfg, where) for where in zip(*np.nonzero(case.mask))]
    expected = {name: np.mean([term[name] for term in terms]) for name in terms[0]}
    assert expected["policy/clip_fraction"] > 0, "a case that nothing clips tests no clip"
    assert (expected["value/clip_fraction"] > 0) == (value_clip_range is not None)
    assert metrics.keys() == expected.keys() and sorted(losses) == ["policy", "value"]
    for name, number in expected.items():
        np.testing.assert_allclose(float(metrics[name].value()), number, atol=1e-5, err_msg=name)
    with_bonus = expected["loss/policy"] - 0.3 * expected["policy/entropy"]
    np.testing.assert_allclose(float(losses["policy"].value()), with_bonus, atol=1e-5)
    np.testing.assert_allclose(float(losses["value"].value()), expected["loss/value"], atol=1e-5)
    assert losses["policy"].count == losses["value"].count == case.mask.sum()


def pairs() -> Preferences:
    """Two pairs; the fake reward model's ``scores`` are of (chosen, rejected, chosen, rejected)."""
    side = Sequences(jnp.zeros((2, 3), jnp.int32), jnp.ones((2, 3), bool), jnp.ones((2, 3), bool))
    return Preferences(side, side)


def test_a_role_s_loss_moves_no_other_role():
    case, cfg = make_case(), PPOConfig(entropy_coef=0.1, reward_update=True)
    params = case.params() | {"reward": {"scores": jnp.array([0.3, -0.2, 0.1, 0.5])}}
    experience = replace(prepare(case, PPOConfig())[0], pairs=Rows(pairs()))
    assert sorted(losses_of(params, case, experience, cfg)[0]) == sorted(params)
    for role in params:
        total = lambda params: losses_of(params, case, experience, cfg)[0][role].total  # noqa: B023
        for other, grads in jax.grad(total)(params).items():
            moved = any(np.asarray(leaf).any() for leaf in jax.tree.leaves(grads))
            assert moved == (other == role), (role, other)


def test_every_response_token_gets_gradient_and_no_other():
    """The ending token too: without it a policy never learns to stop. Prompt, padding and tool tokens: none."""
    case = make_case()
    cfg = PPOConfig(entropy_coef=0.1, old_logprobs="recompute")
    experience, _ = prepare(case, cfg)
    moved = replace(case, values=(case.values + 0.05 * case.mask).astype(np.float32))
    grads = gradients(moved, experience, cfg)
    for array in (grads["policy"]["logprobs"], grads["policy"]["entropy"], grads["value"]["values"]):
        np.testing.assert_array_equal(np.asarray(array) != 0, case.mask)
    assert case.ended[3] and grads["policy"]["logprobs"][3, PROMPT + LENGTHS[3] - 1] != 0
    expected = np.where(case.mask, -np.asarray(experience.advantages), 0)  # at ratio 1
    np.testing.assert_allclose(grads["policy"]["logprobs"], expected, atol=1e-6)


def test_the_entropy_bonus_raises_entropy():
    case = make_case()
    for coef in (0.0, 0.25):
        cfg = PPOConfig(entropy_coef=coef)
        grads = gradients(case, prepare(case, cfg)[0], cfg)
        np.testing.assert_allclose(grads["policy"]["entropy"], np.where(case.mask, -coef, 0))  # descent goes up


# ---- roles, stopping, the controller --------------------------------------------------------------------------------


def test_roles():
    trained, slow = ppo.roles(PPOConfig())
    assert trained == {"policy": "lm", "value": "scalar"} and slow == {"reference": "lm", "reward": "scalar"}
    trained, slow = ppo.roles(PPOConfig(reward_update=True))
    assert trained == {"policy": "lm", "value": "scalar", "reward": "scalar"} and slow == {"reference": "lm"}
    assert ppo.ALGORITHM.batch(PPOConfig()) == ("prompts",)
    assert ppo.ALGORITHM.batch(PPOConfig(reward_update=True)) == ("prompts", "preferences")


@pytest.mark.parametrize(("measured", "stops"), [(0.09, False), (0.11, True)])
def test_stop(measured, stops):
    stop = ppo.ALGORITHM.updates(PPOConfig(stop_kl=0.1)).stop
    assert stop is not None and bool(stop({"policy/kl_old": jnp.float32(measured)})) is stops


def test_nothing_stops_unless_it_is_asked_for():
    assert ppo.ALGORITHM.updates(PPOConfig(num_epochs=3, num_minibatches=2)) == (3, 2, None)


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        (9.0, 0.1 * (1 + 0.2 * 64 / 10000)),  # 50% over: held at 20%
        (6.6, 0.1 * (1 + 0.1 * 64 / 10000)),
        (6.0, 0.1),
        (5.4, 0.1 * (1 - 0.1 * 64 / 10000)),
        (-1.0, 0.1 * (1 - 0.2 * 64 / 10000)),
    ],
)
def test_the_adaptive_controller(measured, expected):
    state = make_case().state(0.1)
    metrics = {"kl/reference": jnp.float32(measured), "response/count": jnp.float32(64)}
    adapted = ppo.after(state, metrics, PPOConfig(kl_controller="adaptive", kl_target=6.0, kl_horizon=10000))
    np.testing.assert_allclose(float(adapted.controls["kl_coef"]), expected, rtol=1e-6)
    assert ppo.after(state, metrics, PPOConfig(kl_controller="fixed")) is state


# ---- one iteration of a real model ----------------------------------------------------------------------------------


def watched(nets, trees: Trees, minibatch, cfg):
    """ppo.loss, which also says how far any response token's ratio is from 1."""
    losses, metrics = ppo.loss(nets, trees, minibatch, cfg)
    mask = minibatch.responses.response_mask
    stats = nets.read(trees, minibatch.responses, Ask("policy", "token_stats"))[0]
    distance = jnp.abs(jnp.exp(jnp.where(mask, stats.logprobs - minibatch.responses.logprobs, 0)) - 1).max()
    return losses, metrics | {"distance": Mean(distance, jnp.float32(1))}


@pytest.fixture(scope="module")
def iteration():
    """One iteration with everything on: (state before, state after, metrics, sequences)."""
    cfg = PPOConfig(
        num_epochs=1,
        old_logprobs="recompute",
        sampler_ratio_cap=1.5,
        reward_update=True,
        kl_controller="adaptive",
        missing_eos_penalty=1.0,
    )
    run = tiny.build("ppo", cfg)
    recipe = run.recipe._replace(algorithm=run.recipe.algorithm._replace(loss=watched))
    return run.state, *tiny.program(steps.make_iteration(recipe))(run.state, run.batch)


def test_the_first_ratio_is_exactly_1_with_recompute(iteration):
    metrics = iteration[2]
    assert metrics["distance"] == 0 and metrics["policy/ratio"] == 1
    # XLA may round a log-prob's last bit (4.8e-7) otherwise where it is differentiated: its square, over 40 tokens
    assert 0 <= metrics["policy/kl_old"] < 1e-14
    assert 0 < metrics["kl/sampler_mismatch"] < 1e-5  # the sampler's own are equal to rounding only
    assert abs(metrics["policy/sampler_ratio"] - 1) < 1e-5 and metrics["policy/sampler_ratio_capped"] == 0


def test_one_iteration_moves_what_learns_and_nothing_else(iteration):
    before, after, metrics, sequences = iteration
    assert sorted(after.params) == ["policy", "reward", "value"]
    for role in after.params:
        assert not tiny.equal_trees(before.params[role], after.params[role]), role
    assert tiny.equal_trees(before.slow, after.slow) and sorted(after.slow) == ["reference"]
    assert after.step == 1 and all(np.isfinite(float(value)) for value in metrics.values())
    shrunk = before.controls["kl_coef"] * (1 - 0.2 * 16 / 10000)  # no KL yet: down
    np.testing.assert_allclose(after.controls["kl_coef"], shrunk, rtol=1e-6)
    assert abs(float(metrics["kl/reference"])) < 1e-5  # reference and policy start equal
    assert 0 < metrics["response/ended"] < 1
    np.testing.assert_allclose(sequences.scores.mean(), metrics["score/mean"], rtol=1e-5)


@pytest.mark.parametrize("column", [5, 8])
def test_a_real_model_s_column_t_is_about_token_t(column):
    """Another token t: its own log-prob and what comes later differ, its value is as before."""
    run = tiny.build("ppo", PPOConfig())
    nets, trees = run.recipe.nets, run.state.trees

    @tiny.program
    def read(rows: Sequences):
        stats, values = nets.read(trees, rows, Ask("policy", "token_stats"), Ask("value", "values"))
        return stats.logprobs, values

    sequences = tiny.sequences(rows=2)  # of which row 1 is full
    other = replace(sequences, tokens=sequences.tokens.at[1, column].add(1))
    for array, changed, first in zip(read(sequences), read(other), (column, column + 1)):
        differs = np.asarray(array != changed)[1, 4:]
        np.testing.assert_array_equal(differs, np.arange(4, 10) >= first)


# ---- a policy that can be enumerated --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def enumerated():
    """(exact, train): train(kl_coef) runs 30 iterations and returns the policy before and after."""
    still = {"kl_controller": "adaptive", "kl_horizon": 10**9}  # one program for every coefficient, which stays
    run, exact = enumerated_run("ppo", PPOConfig(num_epochs=2, value_clip_range=None, **still))
    step = tiny.program(steps.make_iteration(run.recipe))

    def train(kl_coef: float):
        state = replace(run.state, controls={"kl_coef": jnp.float32(kl_coef)})
        for _ in range(30):
            state, *_ = step(state, run.batch)
        return run.state.params["policy"], state.params["policy"]

    return exact, train


@pytest.mark.nightly  # by day: that of grpo, in test_grpo_exact
def test_expected_reward_rises(enumerated):
    exact, train = enumerated
    start, end = train(0.0)
    (before, nothing), (after, moved) = exact(start, start), exact(end, start)
    highest = exact.rewards.max()  # 3.5: two tokens 3, then the end
    print(f"\nkl_coef 0: expected reward {before:.3f} -> {after:.3f} of {highest}, KL {moved:.3f}")
    assert nothing == 0 and after > before + 0.8 * (highest - before) and moved > 1


@pytest.mark.nightly
def test_a_large_kl_coef_holds_the_policy_at_the_reference(enumerated):
    exact, train = enumerated
    start, end = train(10.0)
    _, moved = exact(end, start)
    print(f"\nkl_coef 10: KL {moved:.4f}")
    assert 0 < moved < 0.1


@pytest.mark.nightly  # by day: the optimum of grpo, in test_grpo_exact
def test_the_kl_regularised_optimum_is_approached(enumerated):
    """At kl_coef 1 the best policy is known: reference * exp(reward), normalised."""
    exact, train = enumerated
    start, end = train(1.0)
    (before, _), (after, moved) = exact(start, start), exact(end, start)
    best = exact.best(start, 1.0)
    print(f"\nkl_coef 1: reward - KL {before:.3f} -> {after - moved:.3f} of {best:.3f}, KL {moved:.3f}")
    assert best > before + 0.5 and after - moved > before + 0.8 * (best - before)
    assert after - moved <= best + 1e-4  # or the enumeration is wrong


@pytest.mark.nightly  # by day: that of grpo, in test_properties.py
def test_a_constant_reward_moves_the_policy_nowhere_in_expectation():
    """The gradient of the first update, summed over all responses by their probability: with gae_lambda 1 and no KL an
    advantage is the constant less the value of the state, a baseline. With another sign in every other row the same
    sum is no zero."""
    cfg = PPOConfig(whiten_advantages="no", gae_lambda=1.0, kl_coef=0.0, old_logprobs="recompute")
    run, exact = enumerated_run("ppo", cfg)
    count, nets = len(exact.rewards), run.recipe.nets
    given = {"scores": jnp.full(count, 2.0), "ended": jnp.ones(count, bool)}
    rows = replace(exact.responses, logprobs=jnp.zeros(exact.responses.tokens.shape), **given)
    probability = jnp.exp(exact.log_p(run.state.params["policy"]))

    @tiny.program
    def expected(state, rows, weights):
        experience, _ = ppo.prepare(nets, state, Batch(sequences=rows), cfg)
        advantages = jax.lax.stop_gradient(experience.advantages * weights[:, None])

        def total(params):
            trees = Trees(state.params | {"policy": params}, state.slow)
            return ppo.loss(nets, trees, replace(experience, advantages=advantages), cfg)[0]["policy"].total

        return optax.tree.norm(jax.grad(total)(state.params["policy"]))

    found = expected(run.state, rows, probability)
    scale = expected(run.state, rows, probability * (-1.0) ** jnp.arange(count))
    assert scale > 0.1, "no gradient, no test"
    assert found < 1e-5 * scale
