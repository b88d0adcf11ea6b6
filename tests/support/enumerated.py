"""A policy small enough to sum over all that it may say, and a reward: what is expected, and what would be best."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxrlhf.benchmarks import enumerated
from jaxrlhf.models.config import ModelConfig, resolve
from jaxrlhf.optim import OptimizerConfig
from jaxrlhf.types import Ask, Batch, Nets, Prompts, Sequences, Trees
from tests.support import tiny

LETTERS = resolve(ModelConfig(vocab_size=4, hidden_size=16, num_layers=1, num_heads=2, mlp_size=32))
LAST, LONGEST = 1, 3  # token 1 ends a response; at most 3 tokens


def every_response() -> Sequences:
    """All 40 responses to the prompt (2, 3): 13 that end with token 1, 27 of three other tokens."""
    rows = enumerated.every_response(range(4), LAST, LONGEST)
    tokens = np.array([[2, 3, *row, *[0] * (LONGEST - len(row))] for row in rows], np.int32)
    columns = np.arange(2 + LONGEST)
    valid = columns < 2 + np.array([len(row) for row in rows])[:, None]
    return Sequences(jnp.array(tokens), jnp.array(valid), jnp.array(valid & (columns >= 2)), response_start=2)


def reward_of(sequences: Sequences):
    """+1 a token 3, -1 a token 2, +1.5 for ending."""
    count = lambda token: ((sequences.tokens == token) & sequences.response_mask).sum(-1)
    return 1.0 * count(3) - 1.0 * count(2) + 1.5 * count(LAST)


def cost_of(sequences: Sequences):
    """+1 a token 3: what is rewarded is what costs."""
    return 1.0 * ((sequences.tokens == 3) & sequences.response_mask).sum(-1)


GRADERS = {"reward": reward_of, "cost": cost_of}


class Exact:
    """Expected rewards and KL, summed over all responses."""

    def __init__(self, nets: Nets):
        self.responses = every_response()
        self.rewards, self.costs = (np.asarray(grade(self.responses), np.float64) for grade in (reward_of, cost_of))
        self.log_p = tiny.program(lambda params: self.logprobs(nets, params))

    def logprobs(self, nets: Nets, params, role: str = "policy"):
        (stats,) = nets.read(Trees({role: params}, {}), self.responses, Ask(role, "token_stats"))
        return jnp.where(self.responses.response_mask, stats.logprobs, 0).sum(-1)

    def __call__(self, params, reference) -> tuple[float, float]:
        """(expected reward, KL(policy || reference) in nats)."""
        log_p, log_ref = (np.asarray(self.log_p(tree), np.float64) for tree in (params, reference))
        kl, reward = enumerated.expected(log_p[None], log_ref[None], self.rewards[None])
        return reward, kl

    def log_p_of(self, nets: Nets, role: str, params) -> np.ndarray:
        """f64[responses]: log-probs under another role."""
        return np.asarray(tiny.program(lambda params: self.logprobs(nets, params, role))(params), np.float64)

    def kl(self, params, log_other: np.ndarray) -> float:
        """KL(policy || another), nats, of the other's log-probs."""
        log_p = np.asarray(self.log_p(params), np.float64)
        return enumerated.expected(log_p[None], log_other[None], self.rewards[None]).kl

    def best(self, reference, kl_coef: float) -> float:
        """The largest E[reward] - kl_coef * KL of any policy: kl_coef * log E_reference[exp(reward / kl_coef)]."""
        log_ref = np.asarray(self.log_p(reference), np.float64)
        return kl_coef * float(np.log(np.exp(log_ref + self.rewards / kl_coef).sum()))


def run(
    name: str, cfg: Any, rows: int = 64, samples_per_prompt: int = 1, teacher: ModelConfig | None = None
) -> tuple[tiny.Tiny, Exact]:
    """The algorithm on ``rows`` responses to the prompt, scored by ``reward_of``; ``cost_of`` is the cost model.
    ``teacher``: the shape of one."""
    prompts = rows // samples_per_prompt
    tokens = jnp.tile(jnp.array([[2, 3]], jnp.int32), (prompts, 1))
    batch = Batch(prompts=Prompts(tokens, jnp.ones((prompts, 2), bool), jnp.arange(prompts)))
    made = tiny.build(
        name,
        cfg,
        model=LETTERS,
        batch=batch,
        optimizer=OptimizerConfig(learning_rate=1e-2),
        room=LONGEST,
        samples_per_prompt=samples_per_prompt,
        eos_ids=(LAST,),
        teacher=teacher,
    )
    nets = made.recipe.nets

    def read(trees: Trees, rows: Sequences, /, *asks: Ask) -> tuple[Any, ...]:
        found = iter(nets.read(trees, rows, *(ask for ask in asks if ask.what != "scores")))
        return tuple(GRADERS[ask.role](rows) if ask.what == "scores" else next(found) for ask in asks)

    return made._replace(recipe=made.recipe._replace(nets=nets._replace(read=read))), Exact(nets)
