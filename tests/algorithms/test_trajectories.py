"""ILQL, fitted Q iteration, Monte-Carlo returns, behaviour cloning: against NumPy loops and value iteration."""

import dataclasses
import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.algorithms import ALGORITHMS, sft
from jaxrlhf.algorithms.fqi import FQIConfig
from jaxrlhf.algorithms.ilql import QS, ILQLConfig
from jaxrlhf.algorithms.mc_returns import MCReturnsConfig
from jaxrlhf.models.heads import lm_logits, scalar
from jaxrlhf.models.nets import segments
from jaxrlhf.models.transformer import Runtime, forward
from jaxrlhf.optim import OptimizerConfig
from jaxrlhf.sharding import MeshConfig, make_mesh
from jaxrlhf.step import make_iteration, make_measure
from jaxrlhf.types import Ask, Batch, Sequences, TrainState, Trajectories
from tests.support import tiny
from tests.support.enumerated import LAST, LETTERS, LONGEST

CONFIGS: dict[str, Any] = {
    "ilql": ILQLConfig(gamma=0.9, expectile=0.7, cql_coef=0.1, polyak=0.1),
    "fqi": FQIConfig(gamma=0.9, cql_coef=0.1, polyak=0.1),
    "mc_returns": MCReturnsConfig(gamma=0.9, cql_coef=0.1),
    "bc": ALGORITHMS["bc"].config(),
}

# ---- the losses -----------------------------------------------------------------------------------------------------


def apart(made: tiny.Tiny) -> TrainState:
    """The state, with targets that are not their heads."""
    slow = {role: tiny.parameters(tiny.MODEL, "action", 7 + at) for at, role in enumerate(made.state.slow)}
    return made.state.replace(slow=slow)


class Loop:
    """The losses in float64, a token at a time, from the hidden states of the policy alone."""

    def __init__(self, state: TrainState, rows: Trajectories, cfg: Any):
        responses = rows.responses
        hidden = forward(state.params["policy"], tiny.MODEL, responses.tokens, segments(responses), Runtime())
        wide = lambda tree: np.asarray(lm_logits(tree, tiny.MODEL, hidden), np.float64)
        trees, self.cfg = state.params | state.slow, cfg
        self.logits = {role: wide(tree) for role, tree in trees.items() if role != "value"}
        self.values = np.asarray(scalar(trees["value"], hidden), np.float64) if "value" in trees else np.zeros(())
        self.tokens, self.mask = np.asarray(responses.tokens), np.asarray(responses.response_mask)
        self.rewards, self.truncated = np.asarray(rows.rewards, np.float64), np.asarray(rows.truncated)

    def likelihood(self, row: int, t: int) -> float:
        logits = self.logits["policy"][row, t - 1]
        return lse(logits) - logits[self.tokens[row, t]]

    def follows(self, row: int, t: int) -> int | None:
        """The column whose token the next state comes before; None: there is no next state."""
        more = t + 1 < self.mask.shape[1] and self.mask[row, t + 1]
        return t + 1 if more or self.truncated[row] else None

    def conservative(self, role: str, row: int, t: int, goal: float) -> float:
        q, token = self.logits[role][row, t - 1], self.tokens[row, t]
        return (q[token] - goal) ** 2 + self.cfg.cql_coef * (lse(q) - q[token])

    def ilql(self, row: int, t: int) -> dict[str, float]:
        after, reward = self.follows(row, t), self.rewards[row, t]
        goal = reward + (0.0 if after is None else self.cfg.gamma * self.values[row, after - 1])
        best = min(self.logits[f"target_{role}"][row, t - 1, self.tokens[row, t]] for role in QS)
        error = best - self.values[row, t - 1]
        weight = self.cfg.expectile if error > 0 else 1 - self.cfg.expectile
        return {"value": weight * error**2} | {role: self.conservative(role, row, t, goal) for role in QS}

    def fqi(self, row: int, t: int) -> dict[str, float]:
        after, reward = self.follows(row, t), self.rewards[row, t]
        goal = reward + (0.0 if after is None else self.cfg.gamma * self.logits["target_q"][row, after - 1].max())
        return {"q": self.conservative("q", row, t, goal)}

    def mc_returns(self, row: int, t: int) -> dict[str, float]:
        if self.truncated[row]:
            return {}
        rest = range(t, self.mask.shape[1])
        goal = sum(self.cfg.gamma ** (at - t) * self.rewards[row, at] for at in rest if self.mask[row, at])
        return {"q": self.conservative("q", row, t, goal)}

    def bc(self, row: int, t: int) -> dict[str, float]:
        return {}

    def losses(self, name: str) -> dict[str, float]:
        found: dict[str, list[float]] = {"policy": []}
        for row, t in zip(*np.nonzero(self.mask)):
            for role, term in ({"policy": self.likelihood(row, t)} | getattr(self, name)(row, t)).items():
                found.setdefault(role, []).append(term)
        return {f"loss/{role}": float(np.mean(terms)) for role, terms in found.items()}


def lse(x: np.ndarray) -> float:
    return float(x.max() + np.log(np.exp(x - x.max()).sum()))


def start(name: str, **more: Any) -> tuple[tiny.Tiny, TrainState]:
    made = tiny.build(name, CONFIGS[name], batch=Batch(trajectories=tiny.trajectories()), **more)
    return made, apart(made)


@pytest.mark.parametrize("name", CONFIGS)
def test_losses_are_a_numpy_loop(name):
    """Of rows that ended, that were cut, that are empty and that fill up the batch."""
    made, state = start(name)
    rows = made.batch.trajectories
    assert rows is not None and np.asarray(rows.truncated).any() and not np.asarray(rows.responses.valid)[-1].any()
    found = tiny.program(make_measure(made.recipe))(state, made.batch)
    expected = Loop(state, rows, CONFIGS[name]).losses(name)
    for loss, value in expected.items():
        assert float(found[loss].value()) == pytest.approx(value, rel=1e-4), loss
    assert {key for key in found if key.startswith("loss/")} == expected.keys()
    real = np.asarray(rows.responses.response_mask).any(-1)
    assert float(found["return/mean"].value()) == pytest.approx(np.asarray(rows.rewards).sum(-1)[real].mean(), rel=1e-5)


@functools.cache
def alone(name: str):
    made, state = start(name)
    return tiny.program(make_iteration(made.recipe))(state, made.batch)


def is_same(found: Any, name: str) -> None:
    (state, metrics, _), (state_alone, metrics_alone, _) = found, alone(name)
    close = lambda a, b: np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=2e-6)
    jax.tree.map(close, (state.params, state.slow), (state_alone.params, state_alone.slow))
    for key, value in metrics_alone.items():
        np.testing.assert_allclose(metrics[key], value, rtol=1e-4, atol=1e-5, err_msg=key)


SOME = [pytest.param(name, marks=pytest.mark.nightly) for name in CONFIGS]  # by day: test_properties


@pytest.mark.parametrize("name", SOME)
def test_a_mesh_changes_nothing(name):
    with jax.set_mesh(make_mesh(MeshConfig(2, 2, 2))):
        made, state = start(name, num_micro=2)
        found = tiny.program(make_iteration(made.recipe))(state, made.batch)
    is_same(found, name)


@pytest.mark.parametrize("name", SOME)
def test_what_stands_in_padding_changes_nothing(name):
    """Tokens, rewards and masks of rows and columns that are none."""
    made, state = start(name)
    rows = made.batch.trajectories
    assert rows is not None
    pad = ~rows.responses.valid
    junk = rows.replace(
        responses=rows.responses.replace(tokens=jnp.where(pad, 9, rows.responses.tokens)),
        rewards=jnp.where(rows.responses.response_mask, rows.rewards, jnp.nan),
        truncated=rows.truncated | ~rows.responses.valid.any(-1),
    )
    is_same(tiny.program(make_iteration(made.recipe))(state, Batch(trajectories=junk)), name)


def test_behaviour_cloning_is_supervised_fine_tuning():
    made = tiny.build("sft", sft.SFTConfig(), batch=Batch(sequences=tiny.trajectories().responses))
    state, _, _ = tiny.program(make_iteration(made.recipe))(made.state, made.batch)
    close = lambda a, b: np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=1e-6)
    jax.tree.map(close, state.params, alone("bc")[0].params)


def test_targets_follow_at_their_period():
    """Copied in every second iteration; the other iterations leave them."""
    cfg = dataclasses.replace(CONFIGS["fqi"], polyak=1.0, target_period=2)
    made = tiny.build("fqi", cfg, batch=Batch(trajectories=tiny.trajectories()))
    step, states = tiny.program(make_iteration(made.recipe)), [apart(made)]
    for _ in range(3):
        states.append(step(states[-1], made.batch)[0])
    assert tiny.equal_trees(states[1].slow, states[0].slow)
    assert tiny.equal_trees(states[2].slow["target_q"], states[2].params["q"])
    assert tiny.equal_trees(states[3].slow, states[2].slow)


# ---- a decision process small enough for value iteration ------------------------------------------------------------

GAMMA, PROMPT = 0.9, (2, 3)
Prefix = tuple[int, ...]


class Process(NamedTuple):
    """States are what was written so far; token 1, and the third token, end it."""

    rewards: dict[Prefix, float]  # of the last token of each prefix
    q: dict[Prefix, float]  # by value iteration: of the last token in the state before it


@functools.cache
def process() -> Process:
    """Normal rewards, and values from the longest prefixes to the shortest."""
    rng, inner = np.random.default_rng(3), [token for token in range(4) if token != LAST]
    states = [state for size in range(LONGEST) for state in itertools.product(inner, repeat=size)]
    rewards = {(*state, token): float(rng.normal()) for state in states for token in range(4)}
    q: dict[Prefix, float] = {}
    for prefix in sorted(rewards, key=len, reverse=True):
        ended = prefix[-1] == LAST or len(prefix) == LONGEST
        best = 0.0 if ended else max(q[(*prefix, token)] for token in range(4))
        q[prefix] = rewards[prefix] + GAMMA * best
    return Process(rewards, q)


def whole_rows() -> list[tuple[Prefix, Prefix, bool]]:
    """(prompt, response, whether it was cut) of every trajectory from beginning to end."""
    ended = [prefix for prefix in process().q if prefix[-1] == LAST or len(prefix) == LONGEST]
    return [(PROMPT, prefix, False) for prefix in ended]


def fragments() -> list[tuple[Prefix, Prefix, bool]]:
    """Every step alone, behind all that came before it: what did not end it was cut."""
    cut = lambda prefix: prefix[-1] != LAST and len(prefix) < LONGEST
    return [((*PROMPT, *prefix[:-1]), prefix[-1:], cut(prefix)) for prefix in process().q]


def batch_of(rows: list[tuple[Prefix, Prefix, bool]]) -> tuple[Batch, np.ndarray]:
    """(the rows as data have them, Q by value iteration f64[B, S] at their response tokens, NaN elsewhere)."""
    size = len(PROMPT) + LONGEST + 1
    tokens, valid, mask = np.zeros((len(rows), size), np.int32), *(np.zeros((2, len(rows), size), bool))
    rewards, q = np.zeros((len(rows), size), np.float32), np.full((len(rows), size), np.nan)
    for row, (prompt, response, cut) in enumerate(rows):
        text, begin = prompt + response + ((LAST,) if cut else ()), len(prompt)
        tokens[row, : len(text)], valid[row, : len(text)] = text, True
        for t in range(begin, begin + len(response)):
            prefix = (prompt + response)[len(PROMPT) : t + 1]
            mask[row, t], rewards[row, t], q[row, t] = True, process().rewards[prefix], process().q[prefix]
    truncated = np.array([cut for *_, cut in rows])
    sequences = Sequences(jnp.array(tokens), jnp.array(valid), jnp.array(mask))
    return Batch(trajectories=Trajectories(sequences, jnp.array(rewards), jnp.array(truncated))), q


def train(made: tiny.Tiny, steps: int, **numbers: Any) -> TrainState:
    """The state after as many iterations; ``numbers`` of the config may be traced."""
    recipe = made.recipe._replace(cfg=dataclasses.replace(made.recipe.cfg, **numbers))
    iteration = make_iteration(recipe)
    return jax.lax.scan(lambda state, _: (iteration(state, made.batch)[0], None), made.state, None, steps)[0]


STEPS = 1500
RATE = OptimizerConfig(learning_rate=1e-2, schedule="cosine")


def learner(name: str, cfg: Any, rows: list[tuple[Prefix, Prefix, bool]]) -> tuple[tiny.Tiny, np.ndarray]:
    batch, q = batch_of(rows)
    made = tiny.build(name, cfg, model=LETTERS, batch=batch, optimizer=RATE, eos_ids=(LAST,), iterations=STEPS)
    return made, q


@pytest.mark.nightly  # by day: the short twin of the benchmark bellman
@pytest.mark.parametrize("rows", [whole_rows, fragments])
def test_fitted_q_is_value_iteration(rows):
    """Also where each row is one step that a limit cut, so that all values but the last come by bootstrap."""
    made, q = learner("fqi", FQIConfig(gamma=GAMMA, polyak=0.1), rows())
    read = lambda state: made.recipe.nets.read(state.trees, made.batch.trajectories.responses, Ask("q", "q"))[0]
    found = tiny.program(lambda: read(train(made, STEPS)))()
    real = np.isfinite(q)
    np.testing.assert_allclose(np.asarray(found.chosen)[real], q[real], atol=1e-3)


@pytest.mark.nightly
def test_ilql_values_rise_with_the_expectile_and_stay_below_the_best_action():
    """From those of the data's own mix of actions to those of the best one; in the process above data hold all."""
    made, q = learner("ilql", ILQLConfig(gamma=GAMMA, cql_coef=0.0, polyak=0.1), whole_rows())
    rows, mask = made.batch.trajectories, np.isfinite(q)
    assert rows is not None

    def values(expectile):
        state = train(made, STEPS, expectile=expectile)
        v, *twins = made.recipe.nets.read(
            state.trees, rows.responses, Ask("value", "values"), *(Ask(n, "q") for n in QS)
        )
        return v, jnp.minimum(twins[0].largest, twins[1].largest)

    found, highest = (np.asarray(x)[:, mask] for x in tiny.program(jax.vmap(values))(jnp.array([0.5, 0.8, 0.98])))
    best = np.array([max(process().q[(*state, token)] for token in range(4)) for state in states_of(mask)])
    assert (found <= highest + 0.02).all()
    assert (found[0] < found[1] + 0.02).all() and (found[1] < found[2] + 0.02).all()
    assert found[0].mean() + 0.2 < found[2].mean() < best.mean() + 0.02
    assert np.abs(found[2] - best).mean() < 0.25 * np.abs(found[0] - best).mean()


def states_of(mask: np.ndarray) -> list[Prefix]:
    """The state before each response token of ``whole_rows``, as ``mask`` picks them."""
    texts = [prompt + response for prompt, response, _ in whole_rows()]
    return [texts[row][len(PROMPT) : t] for row, t in zip(*np.nonzero(mask))]
