"""GRPO against a plain NumPy loop: groups, losses, gradients, padding; and one iteration of a real model."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf import step as steps
from jaxrlhf.algorithms import grpo
from jaxrlhf.algorithms.grpo import GRPOConfig
from jaxrlhf.types import Ask, Batch, Mean, Trees
from tests.support import tiny
from tests.support.fake import FAKE, LENGTHS, PROMPT, Case, make_case, prompts_of

SIZE = 3  # of a group: rows 0 to 2, of which the last has no response, and rows 3 to 5


def prepare(case: Case, cfg: GRPOConfig, size: int = SIZE) -> tuple[grpo.GRPOExperience, dict[str, float]]:
    """The experience, and metrics as numbers."""
    batch = Batch(prompts=prompts_of(len(case.mask) // size), sequences=case.sequences())
    experience, means = grpo.prepare(FAKE, case.state(0.0), batch, cfg)
    return experience, {name: float(mean.value()) for name, mean in means.items()}


# ---- prepare against a loop -----------------------------------------------------------------------------------------


def advantages_by_loop(case: Case, cfg: GRPOConfig) -> np.ndarray:
    """[B, S], in float64, a group at a time."""
    found = np.zeros(case.mask.shape)
    marks = case.scores.astype(np.float64) - np.where(case.ended, 0.0, cfg.missing_eos_penalty)
    for start in range(0, len(marks), SIZE):
        rows = [row for row in range(start, start + SIZE) if case.mask[row].any()]
        for row in rows:
            others = [marks[other] for other in rows if other != row]
            value = marks[row] - np.mean(others if cfg.advantages == "leave_one_out" else marks[rows])
            if cfg.advantages == "mean_std":
                value /= marks[rows].std(ddof=1) + 1e-6
            found[row, case.mask[row]] = value
    return found if cfg.sampler_ratio_cap is None else found * np.minimum(case.sampler_ratio(), cfg.sampler_ratio_cap)


VARIANTS = {
    "default": GRPOConfig(),
    "mean": GRPOConfig(advantages="mean"),
    "leave one out": GRPOConfig(advantages="leave_one_out"),
    "missing eos": GRPOConfig(advantages="mean", missing_eos_penalty=1.5),
    "recompute": GRPOConfig(old_logprobs="recompute"),
    "capped": GRPOConfig(old_logprobs="recompute", sampler_ratio_cap=1.2),
    "no reference": GRPOConfig(kl_coef=0.0),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_prepare_is_a_numpy_loop(name):
    case, cfg = make_case(), VARIANTS[name]
    experience, metrics = prepare(case, cfg)
    np.testing.assert_allclose(np.asarray(experience.advantages), advantages_by_loop(case, cfg), atol=1e-5)
    sequences, rows = experience.responses, case.mask.any(1)
    old = case.policy if cfg.old_logprobs == "recompute" else case.sampled
    assert sequences is not None
    np.testing.assert_array_equal(sequences.logprobs, old)
    np.testing.assert_array_equal(sequences.scores, case.scores)  # raw: without the penalty
    expected = {
        "score/mean": case.scores[rows].mean(),
        "score/std": case.scores[rows].std(ddof=1),
        "kl/reference": np.where(case.mask, old - case.reference, 0).sum(1)[rows].mean(),
        "kl/sampler_mismatch": np.abs(old - case.sampled)[case.mask].mean(),
        "response/length_mean": case.mask.sum(1)[rows].mean(),
        "response/ended": case.ended[rows].mean(),
        "response/tokens": case.mask.sum(),
        "response/count": rows.sum(),
        "group/zero_variance": 0.0,
    }
    if name == "capped":
        ratio = case.sampler_ratio()[case.mask]
        expected |= {"policy/sampler_ratio": ratio.mean(), "policy/sampler_ratio_capped": (ratio > 1.2).mean()}
    if name == "no reference":
        del expected["kl/reference"]
    assert (experience.ref_logprobs is None) == (name == "no reference")
    assert metrics.keys() == expected.keys()
    for metric, number in expected.items():
        np.testing.assert_allclose(metrics[metric], number, atol=2e-5, err_msg=metric)


def test_groups_without_a_difference_are_counted():
    case = make_case()
    case.scores[:3] = 1000.1  # whose mean is rounded; what stands in the empty row is no score
    case.scores[2] = 3.0
    experience, metrics = prepare(case, GRPOConfig())
    assert metrics["group/zero_variance"] == 0.5
    assert not np.asarray(experience.advantages)[:3].any() and np.asarray(experience.advantages)[3:].any()
    case.scores[:] = 1.0
    assert prepare(case, GRPOConfig())[1]["group/zero_variance"] == 1
    differs = prepare(case, GRPOConfig(missing_eos_penalty=0.5))  # by how they ended
    assert differs[1]["group/zero_variance"] == 0 and np.asarray(differs[0].advantages).any()


def test_scores_of_the_host_replace_the_reward_model():
    case = make_case()
    given = np.array([1, 0, 1, 1, 0, -1])  # a verifier's: integers
    state = case.state(0.0)
    state = replace(state, slow={"reference": state.slow["reference"]})  # there is no reward model to ask
    batch = Batch(prompts=prompts_of(2), sequences=case.sequences(scores=jnp.array(given)))
    experience, means = grpo.prepare(FAKE, state, batch, GRPOConfig(advantages="mean"))
    case.scores = given.astype(np.float32)
    expected = advantages_by_loop(case, GRPOConfig(advantages="mean"))
    np.testing.assert_allclose(np.asarray(experience.advantages), expected, atol=1e-6)
    np.testing.assert_allclose(float(means["score/mean"].value()), 0.2, atol=1e-6)  # of 5 rows: one is empty


def test_graders_that_are_normalised_apart():
    """Each within its group, over the rows that have a number of it, then the sum by the batch's deviation."""
    case = make_case()
    grades = {"right": np.array([1, 0, 1, 0, 0, 1.0]), "short": np.array([-9, -5, -9, np.nan, -30, -10.0])}
    weights = {"right": 1.0, "short": 0.5}
    total = np.zeros(6)
    for name, grade in grades.items():
        for rows in ([0, 1], [3, 4, 5]):  # row 2 is empty
            kept = [row for row in rows if not np.isnan(grade[row])]
            total[kept] += weights[name] * (grade[kept] - grade[kept].mean()) / (grade[kept].std(ddof=1) + 1e-6)
    total /= np.delete(total, 2).std(ddof=1)
    named = {name: jnp.array(grade, jnp.float32) for name, grade in grades.items()}
    batch = Batch(prompts=prompts_of(2), sequences=case.sequences(scores=jnp.ones(6), grades=named))
    experience, means = grpo.prepare(FAKE._replace(apart=weights), case.state(0.0), batch, GRPOConfig())
    np.testing.assert_allclose(experience.advantages, np.where(case.mask, total[:, None], 0), atol=1e-5)
    assert float(means["group/zero_variance"].value()) == 0  # though all scores are equal
    np.testing.assert_allclose(float(means["score/short"].value()), -13.5)


@pytest.mark.parametrize("junk", [np.nan, np.inf, -1e30])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_what_is_outside_the_responses_never_counts(ratio, junk):
    cfg = GRPOConfig(ratio=ratio, entropy_coef=0.1, missing_eos_penalty=0.3)
    clean, dirty = make_case(), make_case(junk=junk)
    dirty.scores[2] = junk  # of the row without a response
    (experience, metrics), (dirtied, dirty_metrics) = prepare(clean, cfg), prepare(dirty, cfg)
    np.testing.assert_array_equal(np.asarray(dirtied.advantages), np.asarray(experience.advantages))
    assert dirty_metrics == metrics and all(np.isfinite(list(metrics.values())))
    grads, dirty_grads = (gradients(case, given, cfg) for case, given in ((clean, experience), (dirty, dirtied)))
    assert tiny.equal_trees(grads, dirty_grads)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(dirty_grads))


@pytest.mark.nightly  # by day: all algorithms, in test_properties
@pytest.mark.parametrize("cfg", [GRPOConfig(entropy_coef=0.1), GRPOConfig(ratio="sequence", kl_coef=0.0)], ids=str)
def test_padding_rows_count_for_nothing(cfg):
    """A whole group of them, and one more in each group: same metrics, losses and gradients of the others."""
    case = make_case()
    places = [0, 1, 2, None, 3, 4, 5, None, None, None, None, None]
    source = np.array([0 if place is None else place for place in places])
    padded = Case(*(np.asarray(array)[source] for array in vars(case).values()))
    real = np.array([place is not None for place in places])
    padded.mask[~real] = False
    padded.scores[~real] = 50.0
    (experience, metrics), (wide, wide_metrics) = prepare(case, cfg), prepare(padded, cfg, size=4)
    assert wide_metrics == pytest.approx(metrics, rel=1e-6)
    np.testing.assert_allclose(np.asarray(wide.advantages)[real], np.asarray(experience.advantages), rtol=1e-6)
    losses, means = losses_of(case.params(), case, experience, cfg)
    wide_losses, wide_means = losses_of(padded.params(), padded, wide, cfg)
    for found, expected in ((wide_losses, losses), (wide_means, means)):
        for name, mean in expected.items():
            np.testing.assert_allclose(found[name].value(), mean.value(), rtol=1e-5, err_msg=name)
            assert found[name].count == mean.count
    grads, wide_grads = gradients(case, experience, cfg)["policy"], gradients(padded, wide, cfg)["policy"]
    for name in grads:
        np.testing.assert_allclose(wide_grads[name][real], grads[name], rtol=1e-5, atol=1e-7)
        assert not wide_grads[name][~real].any()


def test_no_response_token_at_all():
    case = make_case()
    case.mask[:] = False
    for cfg in VARIANTS.values():
        experience, metrics = prepare(case, cfg)
        assert all(np.isfinite(list(metrics.values()))) and not np.asarray(experience.advantages).any()
        assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradients(case, experience, cfg)))


# ---- loss -----------------------------------------------------------------------------------------------------------


def losses_of(params, case: Case, experience: grpo.GRPOExperience, cfg: GRPOConfig):
    return grpo.loss(FAKE, Trees(params, case.slow()), experience, cfg)


def gradients(case: Case, experience: grpo.GRPOExperience, cfg: GRPOConfig) -> dict:
    """Of the policy's total: what the step differentiates."""
    return jax.grad(lambda params: losses_of(params, case, experience, cfg)[0]["policy"].total)(case.params())


def token_terms(case: Case, experience: grpo.GRPOExperience, cfg: GRPOConfig, row: int) -> list[dict[str, float]]:
    """What each token of a response adds, in float64."""
    columns, terms = np.flatnonzero(case.mask[row]), []
    assert experience.responses is not None
    log_ratios = (case.policy.astype(np.float64) - np.asarray(experience.responses.logprobs))[row, columns]
    for column, log_ratio in zip(columns, log_ratios):
        advantage = float(np.asarray(experience.advantages)[row, column])
        ratio = np.exp(log_ratio if cfg.ratio == "token" else log_ratios.mean())
        free = -advantage * ratio
        bounded = -advantage * min(max(ratio, 1 - cfg.clip_range_low), 1 + cfg.clip_range_high)
        policy = max(free, bounded)
        if cfg.dual_clip is not None and advantage < 0:
            policy = min(policy, -advantage * cfg.dual_clip)
        nats = float(case.policy[row, column]) - float(case.reference[row, column])
        term = {
            "loss/policy": policy,
            "policy/entropy": float(case.entropy[row, column]),
            "policy/clip_fraction": float(bounded > free),
            "policy/ratio": ratio,
            "policy/kl_old": np.exp(log_ratio) - 1 - log_ratio,
        }
        if cfg.kl_coef:
            term["loss/kl"] = nats**2 / 2 if cfg.kl_estimator == "k2" else np.exp(-nats) - 1 + nats
        term["total"] = policy + cfg.kl_coef * term.get("loss/kl", 0.0) - cfg.entropy_coef * term["policy/entropy"]
        terms.append(term)
    return terms


def aggregated(rows: list[list[dict[str, float]]], name: str, how: str) -> float:
    numbers = [[term[name] for term in row] for row in rows]
    if how == "token-mean":
        return float(np.mean(np.concatenate(numbers)))
    return float(np.mean([np.sum(row) if how == "seq-mean-token-sum" else np.mean(row) for row in numbers]))


LOSSES = [
    GRPOConfig(entropy_coef=0.3, kl_coef=0.5),
    GRPOConfig(aggregation="seq-mean-token-mean", kl_estimator="k2", clip_range_high=0.4),
    GRPOConfig(aggregation="seq-mean-token-sum", advantages="mean", dual_clip=1.1, kl_coef=0.0),
    GRPOConfig(ratio="sequence", aggregation="seq-mean-token-mean", clip_range_low=0.01, clip_range_high=0.02),
    GRPOConfig(ratio="sequence", advantages="leave_one_out", clip_range_low=0.01, clip_range_high=0.02),
]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("cfg", LOSSES, ids=str)
def test_loss_is_a_numpy_loop(cfg, seed):
    case = make_case(seed)
    experience, _ = prepare(case, cfg)
    later = make_case(seed + 10)  # the policy has moved since
    case.policy = case.sampled + later.policy - later.reference
    losses, metrics = losses_of(case.params(), case, experience, cfg)
    rows = [token_terms(case, experience, cfg, row) for row in range(len(LENGTHS)) if case.mask[row].any()]
    assert metrics.keys() | {"total"} == rows[0][0].keys() and losses.keys() == {"policy"}
    for name in metrics:
        how = cfg.aggregation if name.startswith("loss/") else "token-mean"
        np.testing.assert_allclose(float(metrics[name].value()), aggregated(rows, name, how), atol=1e-5, err_msg=name)
    expected = aggregated(rows, "total", cfg.aggregation)
    np.testing.assert_allclose(float(losses["policy"].value()), expected, rtol=1e-5, atol=1e-6)
    assert 0 < metrics["policy/clip_fraction"].value() < 1, "a case that nothing clips tests no clip"


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"])
def test_every_response_token_gets_gradient_and_no_other(aggregation, ratio):
    """At ratio 1, -advantage each, shared out as the aggregation says. The ending token too, but no tool's token."""
    case, cfg = make_case(), GRPOConfig(old_logprobs="recompute", kl_coef=0.0, aggregation=aggregation, ratio=ratio)
    experience, _ = prepare(case, cfg)
    grads = np.asarray(gradients(case, experience, cfg)["policy"]["logprobs"])
    np.testing.assert_array_equal(grads != 0, case.mask)
    assert case.ended[3] and grads[3, PROMPT + LENGTHS[3] - 1] != 0
    lengths = case.mask.sum(1, keepdims=True) if aggregation == "seq-mean-token-mean" else 1
    expected = np.where(case.mask, -np.asarray(experience.advantages), 0) / np.maximum(lengths, 1)
    np.testing.assert_allclose(grads, expected, atol=1e-6)


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("advantages", ["mean_std", "mean", "leave_one_out"])
def test_a_group_without_a_difference_has_no_gradient(advantages, ratio):
    """Exactly none, wherever the policy is by then; the other group has some."""
    case, cfg = make_case(), GRPOConfig(advantages=advantages, kl_coef=0.0, ratio=ratio)
    case.scores[3:] = 0.1 + 0.2
    experience, metrics = prepare(case, cfg)
    grads = np.asarray(gradients(case, experience, cfg)["policy"]["logprobs"])
    assert not grads[3:].any() and grads[:2].any() and metrics["group/zero_variance"] == 0.5


# ---- the record -----------------------------------------------------------------------------------------------------


def test_the_record():
    assert grpo.roles(GRPOConfig()) == ({"policy": "lm"}, {"reference": "lm", "reward": "scalar"})
    assert grpo.roles(GRPOConfig(kl_coef=0.0)) == ({"policy": "lm"}, {"reward": "scalar"})
    record = grpo.ALGORITHM
    assert record.batch(GRPOConfig()) == ("prompts",) and record.min_samples(GRPOConfig()) == 2
    assert record.min_samples(GRPOConfig(advantages="none")) == 1
    assert record.online and record.updates(GRPOConfig(num_epochs=3, num_minibatches=5)) == (3, 5, None)
    for stop_kl, stops in ((0.1, True), (0.2, False)):
        stop = record.updates(GRPOConfig(stop_kl=stop_kl)).stop
        assert stop is not None and bool(stop({"policy/kl_old": jnp.float32(0.15)})) is stops


# ---- a real model ---------------------------------------------------------------------------------------------------


def watched(nets, trees: Trees, minibatch, cfg):
    """grpo.loss, which also says how far any response token's ratio is from 1."""
    losses, metrics = grpo.loss(nets, trees, minibatch, cfg)
    mask = minibatch.responses.response_mask
    stats = nets.read(trees, minibatch.responses, Ask("policy", "token_stats"))[0]
    distance = jnp.abs(jnp.exp(jnp.where(mask, stats.logprobs - minibatch.responses.logprobs, 0)) - 1).max()
    return losses, metrics | {"distance": Mean(distance, jnp.float32(1))}


@pytest.mark.nightly  # by day: that of ppo, in test_ppo
def test_the_first_ratio_is_exactly_1_with_recompute():
    run = tiny.build("grpo", GRPOConfig(old_logprobs="recompute"), samples_per_prompt=4)
    recipe = run.recipe._replace(algorithm=run.recipe.algorithm._replace(loss=watched))
    state, metrics, sequences = tiny.program(steps.make_iteration(recipe))(run.state, run.batch)
    assert sequences is not None and len(sequences.tokens) == 64
    assert metrics["distance"] == 0 and metrics["policy/ratio"] == 1
    # all log-probs have the same bits, but XLA may compute some again where it sums up this metric, an ulp away
    ulp = 2.0**-21  # of 4 to 8 nats
    assert metrics["policy/kl_old"] <= ulp**2 / 2
    assert 0 < metrics["kl/sampler_mismatch"] < 1e-5  # the sampler's own are equal to rounding only
    assert sorted(state.params) == ["policy"] and tiny.equal_trees(state.slow, run.state.slow)
    assert not tiny.equal_trees(state.params, run.state.params)


@pytest.mark.nightly  # by day: other means, in test_properties
def test_the_number_of_micro_batches_changes_no_mean_of_sequences():
    run = tiny.build("grpo", GRPOConfig(ratio="sequence", aggregation="seq-mean-token-mean", entropy_coef=0.1))
    sequences, rng = tiny.sequences(), np.random.default_rng(0)
    mask = np.asarray(sequences.response_mask)
    draw = lambda shift, scale: jnp.array(np.where(mask, rng.normal(shift, scale, mask.shape), 0), jnp.float32)
    sequences = sequences.replace(logprobs=draw(-np.log(64), 0.3))
    experience = grpo.GRPOExperience(responses=sequences, advantages=draw(0, 1), ref_logprobs=draw(-np.log(64), 0.3))
    found = {}
    for parts in (1, 4):
        recipe = run.recipe._replace(num_micro=parts)
        found[parts] = tiny.program(partial(steps.gradients, recipe))(run.state, experience)
    (whole, means, counts), (split, split_means, split_counts) = found[1], found[4]
    assert counts["policy"].count == split_counts["policy"].count
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(whole)) > 0.01, "no gradient, no test"
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), split, whole)
    for name, mean in means.items():
        np.testing.assert_allclose(split_means[name].value(), mean.value(), rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.nightly
def test_a_prompt_read_once_or_for_each_response():
    """One iteration: the same responses, and to rounding the same update."""
    once, each = (iteration_of(share_prompts=share) for share in (True, False))
    assert (once[2].copies, each[2].copies) == (4, 1)
    compare_iterations(once, each)


@pytest.mark.nightly
@pytest.mark.parametrize(("num_micro", "widths"), [(1, 3), (4, 5)])
def test_responses_packed_or_in_columns_of_their_own(num_micro, widths):
    kind = {"eos_ids": tuple(range(1, 16)), "num_micro": num_micro}  # many responses end early
    apart, packed = (iteration_of(pack_widths=number, **kind) for number in (1, widths))
    lengths = np.asarray(apart[2].response_mask).sum(1).reshape(4, 4).sum(1)
    assert lengths.max() < 24 and len(set(lengths)) > 1, "nothing to pack"
    compare_iterations(packed, apart)


def iteration_of(**kind):
    """(state, metrics, sequences) of one iteration with four samples of each of four prompts."""
    cfg = GRPOConfig(old_logprobs="recompute", kl_estimator="k2")
    run = tiny.build("grpo", cfg, samples_per_prompt=4, batch=Batch(tiny.prompts(rows=4)), **kind)
    return tiny.program(steps.make_iteration(run.recipe))(run.state, run.batch)


def compare_iterations(first, second):
    """The same responses, and to rounding the same metrics and moments of the optimizer."""
    (mine, metrics, rows), (other, other_metrics, other_rows) = first, second
    np.testing.assert_array_equal(rows.tokens, other_rows.tokens)
    for name, value in metrics.items():
        np.testing.assert_allclose(value, other_metrics[name], rtol=1e-4, atol=1e-5, err_msg=name)
    for one, another in zip(*(jax.tree.leaves(state.opt_state) for state in (mine, other)), strict=True):
        np.testing.assert_allclose(one, another, rtol=1e-3, atol=1e-6)
