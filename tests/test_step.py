"""The fused step: what an iteration does, in which order, and in how many programs."""

import dataclasses
from collections.abc import Callable, Container, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrlhf import step as steps
from jaxrlhf.algorithm import Algorithm, Updates
from jaxrlhf.algorithms.ppo import PPOConfig, PPOExperience
from jaxrlhf.ops.sampling import Sampling
from jaxrlhf.optim import WINDOW, OptimizerConfig, keep_recent, make_optimizer, make_schedule
from jaxrlhf.run import state as states
from jaxrlhf.sharding import MeshConfig, make_mesh
from jaxrlhf.step import Recipe
from jaxrlhf.types import (
    Ask,
    AskedHead,
    Batch,
    Experience,
    Mean,
    Preferences,
    Role,
    Rows,
    Sequences,
    TrainState,
    Trees,
    given,
)
from tests.support import fake, tiny

NO_NETS = fake.answering()


# ---- epochs x minibatches -------------------------------------------------------------------------------------------

ROWS = 16


@dataclasses.dataclass(frozen=True)
class Plan:
    """How often, and until when."""

    num_epochs: int = 1
    num_minibatches: int = 1
    stop_kl: float | None = None


def plan_updates(cfg: Plan) -> Updates:
    stop = None if cfg.stop_kl is None else lambda metrics: metrics["updates"] > cfg.stop_kl
    return Updates(cfg.num_epochs, cfg.num_minibatches, stop)


def rows_seen(nets, trees: Trees, minibatch: Experience, cfg: Plan):
    """A loss whose gradient says which rows the minibatch holds: 1 in each of their columns."""
    seen = trees.params["policy"]["seen"]
    ids = given(minibatch.responses, "responses").tokens[:, 0]
    total = jnp.where(jnp.arange(ROWS) == ids[:, None], seen[0], 0).sum()
    updates_so_far = (seen > 0).any(1).sum(dtype=jnp.float32)
    means = {"updates": Mean(updates_so_far, jnp.float32(1)), "rows": Mean(jnp.float32(len(ids)), jnp.float32(1))}
    return {"policy": Mean(total, jnp.float32(1))}, means


def write_down(steps: int) -> Any:
    """An optimizer that writes its k-th gradient, once found in row 0, into row k of the parameter."""

    def update(updates, state, params=None, **extra_args):
        row = jnp.arange(steps)[:, None] == state
        return jax.tree.map(lambda g: jnp.where(row, g[0], 0.0), updates), state + 1

    return optax.GradientTransformationExtraArgs(lambda params: jnp.int32(0), update)


def record(cfg: Plan, iterations: int = 1, seed: int = 0, room: int = 16):
    """(which rows each update saw: bool[room, ROWS], metrics of each iteration, optimizer steps)."""
    state, metrics = run_plan(cfg, iterations, seed, room)
    return np.asarray(state.params["policy"]["seen"]) > 0, metrics, int(state.opt_state["policy"])


def offline(roles: Mapping[Role, AskedHead], loss: Callable, **more: Any) -> Algorithm:
    """An algorithm of these trained roles, whose experience is its data. ``more``: other fields."""
    return Algorithm(
        config=Plan,
        online=False,
        updates=plan_updates,
        batch=lambda cfg: ("sequences",),
        roles=lambda cfg: (roles, {}),
        prepare=lambda nets, state, batch, cfg: (Experience(responses=batch.sequences), {}),
        loss=loss,
        **more,
    )


def run_plan(cfg: Plan, iterations: int = 1, seed: int = 0, room: int = 16, **more) -> tuple[TrainState, list[dict]]:
    """The last state and the metrics of each iteration. ``more``: fields of the algorithm."""
    algorithm = offline({"policy": "lm"}, rows_seen, **more)
    recipe = Recipe(algorithm, cfg, NO_NETS, {"policy": write_down(room)}, {})
    params = {"policy": {"seen": jnp.zeros((room, ROWS))}}
    state = TrainState(
        jnp.int32(0), jnp.int32(seed), params, jax.tree.map(jnp.copy, params), {"policy": jnp.int32(0)}, {}
    )
    column = jnp.arange(ROWS, dtype=jnp.int32)[:, None]
    batch = Batch(sequences=Sequences(column, jnp.ones_like(column, bool), jnp.ones_like(column, bool)))
    step, metrics = tiny.program(steps.make_iteration(recipe)), []
    for _ in range(iterations):
        state, numbers, _ = step(state, batch)
        metrics.append(numbers)
    return state, metrics


def test_every_epoch_sees_every_row_once_in_a_fresh_order():
    seen, metrics, count = record(Plan(num_epochs=3, num_minibatches=4), iterations=2, room=24)
    assert count == 24 and metrics[0]["rows"] == ROWS / 4
    epochs = seen.reshape(6, 4, ROWS)  # two iterations of three
    assert (epochs.sum(1) == 1).all() and (epochs.sum(2) == 4).all()
    orders = {epoch.argmax(0).tobytes() for epoch in epochs}
    assert len(orders) == 6, "an epoch or an iteration repeats a shuffle"


def test_the_shuffle_is_the_seed_s():
    plan = Plan(num_epochs=2, num_minibatches=2)
    first, again, other = record(plan), record(plan), record(plan, seed=1)
    np.testing.assert_array_equal(first[0], again[0])
    assert (first[0] != other[0]).any()


def test_one_minibatch_is_all_rows():
    seen, _, count = record(Plan(num_epochs=2))
    assert count == 2 and seen[:2].all() and not seen[2:].any()


def test_early_stop_skips_the_rest_of_the_iteration_only():
    """It stops once an update starts from 2 others: the third is still made, the last 5 are not; nor their moments."""
    seen, metrics, count = record(Plan(num_epochs=2, num_minibatches=4, stop_kl=1.5), iterations=2)
    assert count == 3 + 1 and seen[:4].any(1).all() and not seen[4:].any()  # the next iteration starts afresh
    np.testing.assert_allclose(metrics[0]["policy/updates_skipped"], 5 / 8)
    np.testing.assert_allclose(metrics[1]["policy/updates_skipped"], 7 / 8)
    np.testing.assert_allclose(metrics[0]["updates"], (0 + 1 + 2) / 3)  # what was skipped is in no mean
    _, metrics, count = record(Plan(num_epochs=2, num_minibatches=4, stop_kl=100.0))
    assert count == 8 and metrics[0]["policy/updates_skipped"] == 0


# ---- one optimizer a role -------------------------------------------------------------------------------------------

SLOPES = {"policy": 1.0, "value": 1000.0}


def pull(nets, trees: Trees, minibatch, cfg):
    """A loss with a constant gradient, the role's slope in each of 4 parameters. The policy's counts the rows that
    have a response."""
    rows = {"policy": minibatch.responses.response_mask.sum(dtype=jnp.float32), "value": jnp.float32(ROWS)}
    return {
        role: Mean(rows[role] * slope * trees.params[role]["kernel"].sum(), rows[role])
        for role, slope in SLOPES.items()
    }, {}


def pulled(
    cfg: Plan, optimizer: OptimizerConfig, delays, iterations: int, empty: Container[int] = ()
) -> tuple[list[TrainState], list[dict]]:
    """The states, from the first on, and the metrics of each iteration. ``empty``: iterations without a response."""
    algorithm = offline(dict.fromkeys(SLOPES, "lm"), pull)
    optimizers = {role: make_optimizer(optimizer, 8) for role in SLOPES}
    params = {role: {"kernel": jnp.zeros(4)} for role in SLOPES}
    found, metrics = [states.new_state(0, params, {}, optimizers, {})], []
    schedules = dict.fromkeys(SLOPES, make_schedule(optimizer, 8))
    step = tiny.program(steps.make_iteration(Recipe(algorithm, cfg, NO_NETS, optimizers, delays, schedules=schedules)))
    ones = jnp.ones((ROWS, 1), jnp.int32)
    for iteration in range(iterations):
        responses = Sequences(ones, ones > 0, ones > (1 if iteration in empty else 0))
        state, numbers, _ = step(found[-1], Batch(sequences=responses))
        found.append(state)
        metrics.append(numbers)
    return found, metrics


def test_after_update_runs_after_every_optimizer_step_that_is_not_skipped():
    """A Polyak average of the parameters, as a NumPy loop has it; a skipped minibatch leaves it."""
    rate, plan = 0.25, Plan(num_epochs=2, num_minibatches=4, stop_kl=1.5)

    def follow(state: TrainState, cfg: Plan) -> TrainState:
        move = lambda new, old: rate * new + (1 - rate) * old
        return state.replace(slow={"policy": jax.tree.map(move, state.params["policy"], state.slow["policy"])})

    state, _ = run_plan(plan, after_update=follow)
    updates, count = np.asarray(state.params["policy"]["seen"]), int(state.opt_state["policy"])
    expected, shown = np.zeros_like(updates), np.zeros_like(updates)
    for row in range(count):
        shown[row] = updates[row]
        expected = rate * shown + (1 - rate) * expected
    assert count == 3 and expected.any()
    np.testing.assert_allclose(state.slow["policy"]["seen"], expected, rtol=1e-6)


def counts(state: TrainState, role: str) -> list[int]:
    """Every step counter in the role's optimizer state: Adam's and the schedule's."""
    return [int(count) for _, count in optax.tree.get_all_with_path(state.opt_state[role], "count")]


def test_schedules_count_optimizer_steps():
    """Adam under a constant gradient moves by the learning rate, so the parameter is the sum of the schedule."""
    optimizer = OptimizerConfig(learning_rate=0.1, schedule="linear", warmup_steps=3)
    found, metrics = pulled(Plan(num_epochs=2, num_minibatches=2), optimizer, {}, iterations=2)
    schedule: Any = make_schedule(optimizer, 8)
    for iterations, state in enumerate(found):
        expected = -sum(float(schedule(count)) for count in range(4 * iterations))
        np.testing.assert_allclose(state.params["policy"]["kernel"], expected, rtol=1e-5, atol=1e-7)
        assert set(counts(state, "policy")) == {4 * iterations} and state.step == iterations
    for before, after, numbers in zip(found, found[1:], metrics):  # what is reported is what the parameters moved by
        moved = before.params["policy"]["kernel"][0] - after.params["policy"]["kernel"][0]
        np.testing.assert_allclose(numbers["policy/learning_rate"], moved / 4, rtol=1e-5)
    assert np.isclose(
        sum(float(schedule(count)) for count in range(8)), 0.1 * (0 + 1 / 3 + 2 / 3 + 1 + 0.8 + 0.6 + 0.4 + 0.2)
    )


def test_a_delayed_role_waits_that_many_iterations():
    """Value warm-up: policy and its moments stay bitwise, and its schedule starts only then."""
    found, metrics = pulled(Plan(num_epochs=2), OptimizerConfig(learning_rate=0.1), {"policy": 2}, iterations=3)
    for role, expected in (("policy", [0, 0, 0.1]), ("value", [0.1] * 3)):
        np.testing.assert_allclose([numbers[f"{role}/learning_rate"] for numbers in metrics], expected, rtol=1e-6)
    for iterations, state in enumerate(found):
        np.testing.assert_allclose(state.params["value"]["kernel"], -0.1 * 2 * iterations, rtol=1e-5)
        np.testing.assert_allclose(state.params["policy"]["kernel"], -0.1 * 2 * max(iterations - 2, 0), rtol=1e-5)
        assert set(counts(state, "policy")) == {2 * max(iterations - 2, 0)}
    assert tiny.equal_trees(found[0].params["policy"], found[2].params["policy"])
    assert tiny.equal_trees(found[0].opt_state["policy"], found[2].opt_state["policy"])


def test_a_role_without_a_row_to_learn_from_is_left_as_it_is():
    """Adam's old moments and weight decay would move it: parameters, moments and counts stay, bit for bit."""
    optimizer = OptimizerConfig(learning_rate=0.1, schedule="linear", weight_decay=0.1)
    found, metrics = pulled(Plan(num_epochs=2, num_minibatches=2), optimizer, {}, iterations=3, empty=[1])
    for role, expected in (("policy", [4, 4, 8]), ("value", [4, 8, 12])):
        assert [set(counts(state, role)) for state in found[1:]] == [{count} for count in expected]
    before, after, last = found[1:]
    for record in ("params", "opt_state"):
        first, second, third = (getattr(state, record)["policy"] for state in (before, after, last))
        assert tiny.equal_trees(first, second) and not tiny.equal_trees(second, third)
    assert metrics[1]["policy/learning_rate"] == 0 < metrics[1]["value/learning_rate"]
    assert after.step == 2


def test_each_role_is_clipped_by_its_own_norm():
    """Norms 2 and 2000, clipped at 1: a clip over both would leave 0.001 of the policy's gradient."""
    found, metrics = pulled(Plan(), OptimizerConfig(clip_norm=1.0, b1=0.9), {}, iterations=1)
    np.testing.assert_allclose(metrics[0]["policy/grad_norm"], 2.0, rtol=1e-6)  # before the clip
    np.testing.assert_allclose(metrics[0]["value/grad_norm"], 2000.0, rtol=1e-6)
    for role in SLOPES:
        moment = optax.tree.get(found[1].opt_state[role], "mu")["kernel"]
        np.testing.assert_allclose(moment, 0.1 * 0.5, rtol=1e-5)  # 0.5 each: norm 1


# ---- what is not finite ---------------------------------------------------------------------------------------------


def poisoned(row: int | None):
    """A loss whose gradient is 1 in every parameter, but NaN in the minibatch that holds ``row``."""

    def loss(nets, trees: Trees, minibatch: Experience, cfg: Plan):
        ids = given(minibatch.responses, "responses").tokens[:, 0]
        bad = jnp.bool_(False) if row is None else (ids == row).any()
        total = trees.params["policy"]["kernel"].sum() * jnp.where(bad, jnp.nan, 1.0)
        return {"policy": Mean(total, jnp.float32(1))}, {"loss/policy": Mean(total, jnp.float32(1))}

    return loss


@pytest.mark.parametrize(
    ("row", "rate", "updates"),
    [(None, 0.5, 4), (3, 0.5, 3), (None, 1e20, 0)],
    ids=["all finite", "a loss that is NaN", "parameters that overflow"],
)
def test_an_update_that_is_not_finite_is_left_out(row, rate, updates):
    """The other minibatches count, bit for bit; so do the steps of the optimizer, which has a count of its own."""
    note = lambda state, metrics, cfg: state.replace(controls={"measured": metrics["loss/policy"]})
    algorithm = offline({"policy": "lm"}, poisoned(row), after=note)
    more = 1.0 if rate < 1 else rate
    optimizer = optax.chain(optax.sgd(rate), optax.scale_by_schedule(lambda count: more))
    recipe = Recipe(algorithm, Plan(num_minibatches=4), NO_NETS, {"policy": optimizer}, {})
    params = {"policy": {"kernel": jnp.arange(3.0)}}
    state = TrainState(jnp.int32(0), jnp.int32(0), params, {}, {"policy": optimizer.init(params["policy"])}, {})
    state = state.replace(controls={"measured": jnp.float32(7)})
    column = jnp.arange(ROWS, dtype=jnp.int32)[:, None]
    batch = Batch(sequences=Sequences(column, jnp.ones_like(column, bool), jnp.ones_like(column, bool)))
    after, metrics, _ = tiny.program(steps.make_iteration(recipe))(state, batch)
    np.testing.assert_array_equal(after.params["policy"]["kernel"], np.arange(3.0) - 0.5 * updates)
    assert metrics["update/not_finite"] == (4 - updates) / 4
    assert optax.tree.get(after.opt_state["policy"], "count") == updates
    assert bool(jnp.isfinite(metrics["loss/policy"])) == (row is None)
    assert after.controls["measured"] == (metrics["loss/policy"] if row is None else 7)


def test_an_update_at_a_spike_is_left_out_and_remembered():
    """Of the role that it is of; the other one learns."""

    def loss(nets, trees: Trees, minibatch: Experience, cfg: Plan):
        ids = given(minibatch.responses, "responses").tokens[:, 0]
        size = {"policy": jnp.where((ids == 3).any(), 100.0, 1.0), "value": 1.0}
        return {role: Mean(trees.params[role]["kernel"].sum() * size[role], jnp.float32(1)) for role in size}, {}

    algorithm = offline(dict.fromkeys(("policy", "value"), "scalar"), loss)
    roles = ("policy", "value")
    optimizer = optax.chain(optax.sgd(0.5), keep_recent())
    recipe = Recipe(
        algorithm,
        Plan(num_minibatches=4),
        NO_NETS,
        dict.fromkeys(roles, optimizer),
        {},
        spike_sigmas=dict.fromkeys(roles, 6.0),
    )
    params = {role: {"kernel": jnp.zeros(4)} for role in roles}
    usual = np.random.default_rng(0).normal([[0], [2]], [[4], [0.1]], (2, WINDOW))
    opt_state = {role: optax.tree.set(optimizer.init(params[role]), recent=jnp.float32(usual)) for role in roles}
    state = TrainState(jnp.int32(0), jnp.int32(0), params, {}, opt_state, {})
    column = jnp.arange(ROWS, dtype=jnp.int32)[:, None]
    batch = Batch(sequences=Sequences(column, jnp.ones_like(column, bool), jnp.ones_like(column, bool)))
    after, metrics, _ = tiny.program(steps.make_iteration(recipe))(state, batch)
    np.testing.assert_array_equal(after.params["policy"]["kernel"], np.full(4, -0.5 * 3))
    np.testing.assert_array_equal(after.params["value"]["kernel"], np.full(4, -0.5 * 4))
    assert metrics["policy/spikes"] == 1 / 4 and metrics["value/spikes"] == 0 == metrics["update/not_finite"]
    norms = optax.tree.get(after.opt_state["policy"], "recent")[1]
    np.testing.assert_array_equal(norms[:-4], jnp.float32(usual[1, 4:]))
    assert sorted(norms[-4:].tolist()) == [2, 2, 2, 200]


# ---- micro-batches --------------------------------------------------------------------------------------------------


def experience_of(sequences: Sequences, preferences: Preferences | None) -> PPOExperience:
    """Random advantages, returns and old values, and log-probs near those of an untrained policy."""
    rng = np.random.default_rng(0)
    mask = np.asarray(sequences.response_mask)
    draw = lambda shift, scale: jnp.array(np.where(mask, rng.normal(shift, scale, mask.shape), 0), jnp.float32)
    sequences = replace(sequences, logprobs=draw(-np.log(64), 0.3))
    advantages, returns, values = draw(0, 1), draw(0.5, 1), draw(0, 0.5)
    pairs = None if preferences is None else Rows(preferences)
    return PPOExperience(responses=sequences, advantages=advantages, returns=returns, values=values, pairs=pairs)


@pytest.fixture(scope="module")
def updated():
    """The same minibatch of ragged rows whole (1), and packed in 4 parts (-4): {parts: (state, means)}, by plain
    gradient descent."""
    run = tiny.build("ppo", PPOConfig(reward_update=True, entropy_coef=0.1, reward_centering=0.1))
    experience = experience_of(tiny.sequences(), tiny.preferences())
    optimizers = {role: optax.sgd(1.0) for role in run.recipe.optimizers}
    state = replace(run.state, opt_state={role: sgd.init(run.state.params[role]) for role, sgd in optimizers.items()})
    found = {}
    for parts in (1, -4):
        widths = 3 if parts < 0 else 1
        recipe = run.recipe._replace(num_micro=abs(parts), optimizers=optimizers, pack_widths=widths)
        found[parts] = tiny.program(partial(steps.update_minibatch, recipe))(state, experience)[:2]
    return state, found


@pytest.mark.nightly  # by day: rows that are not packed, in algorithms/test_properties
@pytest.mark.parametrize("parts", [-4], ids=["4 packed"])  # others, of all algorithms: algorithms/test_properties
def test_the_number_of_micro_batches_changes_nothing(updated, parts):
    start, found = updated
    whole, means = found[1]
    split, split_means = found[parts]
    lengths = np.asarray(tiny.sequences().response_mask).sum(1)
    tokens = [lengths[part :: abs(parts)].sum() for part in range(abs(parts))]
    assert max(tokens) > 1.1 * min(tokens), "parts of equal size would not tell a mean of means from the mean"
    for role in ("policy", "value", "reward"):
        largest = max(float(jnp.abs(a - b).max()) for a, b in pairs(start.params[role], whole.params[role]))
        assert largest > 0.01, "no gradient, no test"
        for a, b in pairs(whole.params[role], split.params[role]):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)
    assert means.keys() == split_means.keys()
    for name, mean in means.items():
        np.testing.assert_allclose(split_means[name].value(), mean.value(), rtol=1e-5, atol=1e-6, err_msg=name)
        np.testing.assert_allclose(split_means[name].count, mean.count, err_msg=name)


def pairs(first, second):
    return zip(jax.tree.leaves(first), jax.tree.leaves(second))


# ---- a whole iteration ----------------------------------------------------------------------------------------------

PPO = PPOConfig(num_epochs=2, num_minibatches=2)


class Running:
    """A PPO run with a model reward on one device, its program compiled, and its first iteration."""

    def __init__(self):
        self.mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
        with jax.set_mesh(self.mesh):
            self.run = tiny.build("ppo", PPO)
        self.step = tiny.program(steps.make_iteration(self.run.recipe), donate=0)
        self.reference = jax.tree.map(np.asarray, self.run.state.slow)
        self.state, self.responses = self.run.state, []
        self.go_on()

    def go_on(self):
        self.state, metrics, sequences = self(self.state)
        self.responses.append(sequences)
        return metrics

    def __call__(self, state: TrainState):
        with jax.set_mesh(self.mesh):
            return self.step(state, self.run.batch)


@pytest.fixture(scope="module")
def running():
    return Running()


@pytest.fixture
def compiled():
    """The compile events since the test began."""
    found: list[str] = []

    def listen(event: str, duration_secs: float, **_):
        if event.endswith("backend_compile_duration"):
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


def test_an_iteration_is_never_compiled_again(running, compiled):
    """After the first. That it is one dispatch is counted in a process of its own, in test_train: the profiler looks at
    all programs of a process, and has ended workers that had hundreds."""
    jax.jit(lambda x: x + 1)(jnp.zeros(3)).block_until_ready()
    assert compiled, "a compilation goes unnoticed"
    compiled.clear()
    for _ in range(3):
        jax.block_until_ready(running.go_on())
    assert not compiled


def test_every_iteration_samples_with_fresh_noise(running):
    while len(running.responses) < 3:
        running.go_on()
    first, second, third = (np.asarray(found.tokens) for found in running.responses[:3])
    rows_alike = [(a == b).all(1).mean() for a, b in ((first, second), (second, third), (first, third))]
    assert max(rows_alike) < 0.5 and running.state.step == len(running.responses)


def test_a_copied_reference_survives_the_donation_of_the_policy(running):
    """And an alias would not: donating one buffer twice is an error."""
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(running.run.state.params)), "nothing was donated"
    assert tiny.equal_trees(running.state.slow, running.reference)
    assert not tiny.equal_trees(running.state.params["policy"], running.reference["reference"])
    state = running.state
    copied = states.copy(state.params["policy"])
    assert tiny.equal_trees(copied, state.params["policy"])
    for a, b in pairs(copied, state.params["policy"]):
        assert a.unsafe_buffer_pointer() != b.unsafe_buffer_pointer()
    fork = states.copy(state)
    alias = fork.replace(slow=fork.slow | {"reference": fork.params["policy"]})
    with pytest.raises(ValueError, match="donate"):
        running(alias)
    fork = states.copy(state)
    fine = fork.replace(slow=fork.slow | {"reference": states.copy(fork.params["policy"])})
    running(fine)


def test_integer_scores_of_the_host_meet_fractions_of_nats():
    """The second half of the step alone, scores 0 and 1 coming in as integers, no reward model there."""
    run = tiny.build("ppo", replace(PPO, num_epochs=1, num_minibatches=1, kl_coef=0.3))
    sequences = experience_of(tiny.sequences(), tiny.preferences()).responses
    assert sequences is not None
    scores = jnp.arange(16, dtype=jnp.int32) % 2
    state = replace(run.state, slow={"reference": run.state.slow["reference"]})
    _, metrics = tiny.program(steps.make_learn(run.recipe))(state, Batch(sequences=replace(sequences, scores=scores)))
    assert all(number.dtype == jnp.float32 for number in metrics.values())
    rows = np.asarray(sequences.response_mask).any(1)
    charged = 0.3 * float(metrics["kl/reference"])
    assert abs(charged) > 0.01
    np.testing.assert_allclose(metrics["reward/mean"], np.asarray(scores)[rows].mean() - charged, rtol=1e-5)


# ---- what is sampled ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def policy():
    return Trees({"policy": tiny.parameters(tiny.MODEL, "lm", 0)}, {})


def sampler(samples_per_prompt: int = 1, pad_id: int = 0):
    sample = tiny.sampler_of(tiny.MODEL, Sampling(eos_ids=tiny.EOS_IDS), 8, samples_per_prompt, pad_id)
    return tiny.program(partial(sample, "policy"))


@pytest.fixture(scope="module")
def plain():
    return sampler()


def test_samples_of_a_prompt_are_contiguous_and_differ(policy, plain):
    prompts = tiny.prompts(rows=4)
    found = sampler(samples_per_prompt=4)(policy, prompts, 0, 0)
    np.testing.assert_array_equal(found.tokens[:, :4], np.repeat(prompts.tokens, 4, axis=0))
    np.testing.assert_array_equal(found.valid[:, :4], np.repeat(prompts.valid, 4, axis=0))
    responses = np.asarray(found.tokens)[:, 4:].reshape(4, 4, -1)
    for group in responses:
        assert len({row.tobytes() for row in group}) == 4
    ids = jnp.arange(16, dtype=jnp.int32)  # sample k of prompt i has the noise of the global sample 4 i + k
    repeated = jax.tree.map(lambda x: jnp.repeat(x, 4, axis=0), prompts).replace(sample_id=ids)
    np.testing.assert_array_equal(plain(policy, repeated, 0, 0).tokens, found.tokens)


def test_noise_hangs_on_the_sample_id_not_on_the_row(policy, plain):
    prompts = tiny.prompts()
    found = plain(policy, prompts, 0, 0)
    order = np.random.default_rng(0).permutation(16)
    moved = plain(policy, jax.tree.map(lambda x: x[order], prompts), 0, 0)
    for name in ("tokens", "valid", "response_mask", "ended"):
        np.testing.assert_array_equal(getattr(moved, name), np.asarray(getattr(found, name))[order])
    np.testing.assert_allclose(moved.logprobs, np.asarray(found.logprobs)[order], atol=1e-6)
    renamed = plain(policy, replace(prompts, sample_id=prompts.sample_id[order]), 0, 0)
    assert (np.asarray(renamed.tokens) != np.asarray(found.tokens)).any(1).mean() > 0.5


def test_noise_hangs_on_step_and_seed(policy, plain):
    prompts = tiny.prompts()
    tokens = [np.asarray(plain(policy, prompts, seed, step).tokens) for seed, step in ((0, 0), (0, 1), (1, 0), (0, 0))]
    np.testing.assert_array_equal(tokens[0], tokens[3])
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (tokens[a] != tokens[b]).any(1).mean() > 0.5


def test_a_pad_token_that_is_eos_is_no_problem(policy, plain):
    """Masks come from lengths: the EOS that was sampled is in the response, the ones that pad it are not."""
    prompts = tiny.prompts()
    found, same = plain(policy, prompts, 0, 0), sampler(pad_id=tiny.EOS_IDS[0])(policy, prompts, 0, 0)
    for name in ("valid", "response_mask", "logprobs", "ended"):
        np.testing.assert_array_equal(getattr(same, name), getattr(found, name))
    mask, tokens, ended = (np.asarray(x) for x in (same.response_mask, same.tokens, same.ended))
    assert 0 < ended.mean() < 1
    for row in range(16):
        response = tokens[row, mask[row]]
        assert np.isin(response[:-1], tiny.EOS_IDS).sum() == 0  # several EOS ids: the first of any kind ends it
        assert ended[row] == (response[-1] in tiny.EOS_IDS) and (ended[row] or len(response) == 8)
        assert (tokens[row, 4:][~mask[row, 4:]] == tiny.EOS_IDS[0]).all()
    nets = tiny.build("sft", None).recipe.nets
    stats = tiny.program(lambda rows: nets.read(policy, rows, Ask("policy", "token_stats"))[0].logprobs)
    first, second = (np.asarray(stats(sequences)) for sequences in (found, same))
    np.testing.assert_array_equal(first[mask], second[mask])  # the trainer reads no pad token either
    np.testing.assert_allclose(first[mask], np.asarray(found.logprobs)[mask], atol=1e-5)
