"""What holds for every algorithm: its gradient depends on the rows that count, and not on how they come."""

import functools
from typing import Any

import jax
import numpy as np
import pytest

from jaxrlhf import step as steps
from jaxrlhf.algorithms import ALGORITHMS
from jaxrlhf.algorithms.cm import CMConfig
from jaxrlhf.algorithms.distill import DistillConfig
from jaxrlhf.algorithms.grpo import GRPOConfig
from jaxrlhf.algorithms.ppo import PPOConfig
from jaxrlhf.algorithms.ppo_lagrangian import PPOLagrangianConfig
from jaxrlhf.algorithms.rm import RMConfig
from jaxrlhf.algorithms.rm_ratings import RMRatingsConfig
from jaxrlhf.run.checkpoint import Checkpoints, restore
from jaxrlhf.sharding import MeshConfig, make_mesh
from jaxrlhf.types import Batch, TrainState
from tests.support import tiny

ROWS = 8
CONFIGS: dict[str, Any] = {
    # the unbiased variance is that of more rows where rows come twice
    "ppo": PPOConfig(reward_update=True, whiten_advantages="biased", entropy_coef=0.1),
    "ppo_lagrangian": PPOLagrangianConfig(whiten_advantages="biased"),
    "cm": CMConfig(pairs=True),
    "grpo": GRPOConfig(kl_coef=0.0),  # so that a constant reward leaves nothing to learn
    "distill": DistillConfig("jsd", on_policy_share=0.7, reward_coef=0.5, top_k=9, advantages="mean"),
    "rm": RMConfig(centering=0.1),
    "rm_ratings": RMRatingsConfig("steps"),
}
NAMES = sorted(ALGORITHMS)
# of two that share most of their code one stands for both by day
ALIKE = {"ppo_lagrangian": "ppo", "cm": "rm", "rm_ties": "rm", "bc": "sft", "mc_returns": "ilql"}
ALIKE |= {"simpo": "dpo", "orpo": "dpo", "online_dpo": "grpo", "distill_data": "distill"}
EACH = [pytest.param(name, marks=pytest.mark.nightly if name in ALIKE else []) for name in NAMES]


def config(name: str) -> Any:
    return CONFIGS.get(name) or ALGORITHMS[name].config()


def every_row() -> Batch:
    """ROWS rows of every kind of data, as NumPy arrays; two responses to each prompt, of which row 1 has all tokens."""
    rng = np.random.default_rng(0)
    sequences = tiny.sequences(rows=ROWS)
    mask = np.asarray(sequences.response_mask)
    logprobs = np.where(mask, rng.normal(-np.log(64), 0.3, mask.shape), 0).astype(np.float32)
    sequences = sequences.replace(logprobs=logprobs, scores=rng.normal(size=ROWS).astype(np.float32))
    pairs = tiny.preferences(rows=ROWS + 1)
    cut = functools.partial(jax.tree.map, lambda x: np.asarray(x)[:ROWS])  # the last row behind them is padding
    return jax.tree.map(
        np.asarray,
        Batch(
            prompts=tiny.prompts(rows=ROWS // 2),
            sequences=sequences,
            demonstrations=tiny.sequences(rows=ROWS, seed=40),
            preferences=cut(pairs),
            unpaired=cut(tiny.unpaired(rows=ROWS + 1)),
            trajectories=cut(tiny.trajectories(rows=ROWS + 1)),
            comparisons=cut(tiny.comparisons(rows=ROWS + 1)),
        ),
    )


def rows_of(name: str) -> Batch:
    """Rows of all kinds that the algorithm reads; its responses are given, not sampled."""
    algorithm = ALGORITHMS[name]
    fields = {*algorithm.batch(config(name)), *(("sequences",) if algorithm.online else ())}
    return Batch(**{field: getattr(every_row(), field) for field in fields})


def built(name: str, batch: Batch, num_micro: int = 1) -> tiny.Tiny:
    """The algorithm on these rows, on the current mesh. The policy has left the reference: what is equal is compared by
    rounding."""
    run = tiny.build(name, config(name), batch=batch, share_prompts=False, num_micro=num_micro, samples_per_prompt=2)
    elsewhere = lambda role, tree: jax.tree.map(lambda x: 0.9 * x, tree) if role == "reference" else tree
    slow = {role: elsewhere(role, tree) for role, tree in run.state.slow.items()}
    return run._replace(state=run.state.replace(slow=slow))


@functools.cache
def gradient_of(name: str, num_micro: int = 1):
    """(batch -> (each role's gradient, losses and metrics), compiled once; the algorithm's own rows)."""
    run = built(name, rows_of(name), num_micro)
    return functools.partial(gradient_program(run), run.state), run.batch


def gradient_program(run: tiny.Tiny):
    """(state, batch) -> (each role's gradient, losses and metrics)."""
    algorithm, cfg = run.recipe.algorithm, run.recipe.cfg

    @tiny.program
    def gradient(state, batch):
        experience, _ = algorithm.prepare(run.recipe.nets, state, batch, cfg)
        grads, means, losses = steps.gradients(run.recipe, state, jax.lax.stop_gradient(experience))
        return grads, {name: mean.value() for name, mean in (means | losses).items()}

    return gradient


def moved(batch: Batch, order: np.ndarray) -> Batch:
    """The rows in another ``order`` of pairs of rows: what belongs together stays together."""
    pairs = np.repeat(order, 2) * 2 + np.tile([0, 1], len(order))
    return jax.tree.map(lambda x: x[order] if len(x) == ROWS // 2 else x[pairs], batch)


def blanked(batch: Batch, first: int) -> Batch:
    """The rows from ``first`` on as padding: nothing in them is valid, and no response is in them."""
    blank = lambda x: np.where(np.arange(len(x)).reshape(-1, *(1,) * (x.ndim - 1)) * (ROWS // len(x)) < first, x, 0)
    return jax.tree.map(lambda x: blank(x).astype(x.dtype), batch)


def close(found, expected, atol=2e-6) -> None:
    (grads, numbers), (others, other_numbers) = found, expected
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=atol), grads, others)
    for name, number in numbers.items():
        np.testing.assert_allclose(number, other_numbers[name], rtol=1e-5, atol=2e-6, err_msg=name)


def largest(grads) -> float:
    return max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize("name", EACH)
def test_the_order_of_rows_changes_nothing(name):
    gradient, batch = gradient_of(name)
    found = gradient(batch)
    assert largest(found[0]) > 1e-3, "no gradient, no test"
    close(gradient(moved(batch, np.array([2, 0, 3, 1]))), found)


@pytest.mark.parametrize("name", EACH)
def test_rows_that_are_all_padding_change_nothing(name):
    """The mean over four rows is the mean over these twice, and over these with four rows of padding."""
    gradient, batch = gradient_of(name)
    padded = gradient(blanked(batch, ROWS // 2))
    close(padded, gradient(moved(batch, np.array([0, 1, 0, 1]))))
    assert largest(padded[0]) > 1e-3, "no gradient, no test"


@pytest.mark.parametrize("name", EACH)
def test_a_batch_of_padding_alone_has_no_gradient(name):
    gradient, batch = gradient_of(name)
    assert largest(gradient(blanked(batch, 0))[0]) == 0.0


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name == "grpo" else pytest.mark.nightly) for name in NAMES],  # PPO: in test_step.py
)
def test_micro_batches_change_nothing(name):
    close(gradient_of(name, num_micro=2)[0](gradient_of(name)[1]), gradient_of(name)[0](gradient_of(name)[1]))


@pytest.mark.nightly  # by day: GRPO in test_mesh.py
@pytest.mark.parametrize("name", NAMES)
def test_eight_devices_change_nothing(name):
    """Rows are split over four of them, and weights over all."""
    gradient, batch = gradient_of(name)
    with jax.set_mesh(make_mesh(MeshConfig(2, 2, 2), jax.devices()[:8])):
        run = built(name, tiny.put(batch))
        found = jax.device_get(gradient_program(run)(run.state, run.batch))
    close(found, gradient(batch), atol=1e-5)


@pytest.mark.nightly  # by day: SFT and PPO in run/test_resume.py
@pytest.mark.parametrize("name", NAMES)
def test_a_restored_state_goes_on_with_the_same_bits(name, tmp_path):
    """Four iterations, and two and two with a checkpoint between them: weights, moments, targets, controls, metrics."""
    run = built(name, rows_of(name))
    learn, batch = tiny.program(steps.make_learn(run.recipe)), run.batch

    def go_on(state: TrainState) -> tuple[TrainState, dict]:
        for _ in range(2):
            state, metrics = learn(state, batch)
        return state, metrics

    half, _ = go_on(run.state)
    saved = Checkpoints(tmp_path, background=False)
    saved.save(2, half, {})
    saved.close()
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), half)
    whole, restored = go_on(half), go_on(restore(tmp_path, 2, abstract))
    assert tiny.equal_trees(whole, restored)
    changed = [not tiny.equal_trees(half.params[role], whole[0].params[role]) for role in half.params]
    assert all(changed), "nothing was learned, nothing is compared"


def test_a_constant_reward_leaves_a_group_nothing_to_learn():
    gradient, batch = gradient_of("grpo")
    assert batch.sequences is not None
    constant = batch.replace(sequences=batch.sequences.replace(scores=np.full(ROWS, 3.0, np.float32)))
    assert largest(gradient(constant)[0]) == 0.0
