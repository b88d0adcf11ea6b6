"""The nouns of the house: every pytree and record that passes between the parts.

Alignment, said once: every per-token array is [B, S] and column t is about token t. ``logprobs[:, t]`` is
log p(token t | tokens before t) and ``values[:, t]`` is V(state before token t); column 0 is masked.
Prompts are left-padded to P columns, so every sampled response starts at column P.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

Array = jax.Array
Params = Any  # a pytree of arrays
Maybe = Any  # an array or record, or None where it is not known: an algorithm knows what it is given
Role = str  # "policy" | "value" | "reward" | "reference" | ...
Head = Literal["lm", "scalar", "bare"]  # next-token logits; one number a token; the same, on another role's trunk
Metrics = dict[str, Array]  # flat: "loss/policy", "kl/reference", "score/mean", ...; each f32[]


class Mean(struct.PyTreeNode):
    """A mean carried as its two sums, so that micro-batches and devices can be added before dividing."""

    total: Array  # f32[]
    count: Array  # f32[]

    def __add__(self, other: "Mean") -> "Mean":
        return Mean(self.total + other.total, self.count + other.count)

    def value(self) -> Array:
        """total / count; 0 where nothing was counted."""
        return self.total / jnp.maximum(self.count, 1e-8)


class Prompts(struct.PyTreeNode):
    """Left-padded prompts."""

    tokens: Array  # i32[B, P]
    valid: Array  # bool[B, P]
    # i32[B]: what keys the row's sampling noise, with seed, step and position: the row of the global batch in training,
    # of all held-out rows in an evaluation
    sample_id: Array


class Sequences(struct.PyTreeNode):
    """Prompt and response in one row. The EOS token that ends a response is inside ``response_mask``."""

    tokens: Array  # i32[B, S]
    valid: Array  # bool[B, S]
    response_mask: Array  # bool[B, S]: tokens that the policy chose (or should learn to choose)
    segment_ids: Maybe = None  # i32[B, S] of packed rows: 1, 2, ... a document, 0 padding; None: one a row
    logprobs: Maybe = None  # f32[B, S] under the distribution that they were sampled from
    scores: Maybe = None  # f32[B]: one number a sequence; NaN: graders on the host could not score it
    grades: Maybe = None  # {name: f32[B]}: what each of several graders on the host gave; NaN: it could not
    ended: Maybe = None  # bool[B]: the response ended by itself (EOS or a stop sequence), not by its length
    response_start: int = struct.field(pytree_node=False, default=1)  # no response token is in a column before it
    copies: int = struct.field(pytree_node=False, default=1)  # every so many rows have the same prompt: it is read once
    width: Maybe = struct.field(
        pytree_node=False, default=None
    )  # columns that their responses are packed into; or None


class Preferences(struct.PyTreeNode):
    """Pairs with the same prompt: ``chosen`` is preferred to ``rejected``."""

    chosen: Sequences
    rejected: Sequences
    margin: Maybe = None  # f32[B]: by how much, where the data says


class Unpaired(struct.PyTreeNode):
    """Responses that are each good or bad by themselves."""

    responses: Sequences
    desirable: Array  # bool[B]
    mismatched: Maybe = None  # Sequences: each prompt with the response of another row of the batch


class Batch(struct.PyTreeNode):
    """What one iteration is given; an algorithm names in ``Algorithm.batch`` the fields that it reads."""

    prompts: Maybe = None  # Prompts
    sequences: Maybe = None  # Sequences
    preferences: Maybe = None  # Preferences
    unpaired: Maybe = None  # Unpaired
    answers: Maybe = None  # what prepare asks of networks, where they were asked ahead of the scores (ahead.py)


class Experience(struct.PyTreeNode):
    """What the epochs of one iteration learn from. Rows are shuffled and split into minibatches."""

    sequences: Maybe = None  # Sequences
    advantages: Maybe = None  # f32[B, S]
    returns: Maybe = None  # f32[B, S]
    values: Maybe = None  # f32[B, S] when the responses were sampled
    ref_logprobs: Maybe = (
        None  # f32[B, S]; of whole responses: f32[B] beside unpaired, a pair of them beside preferences
    )
    preferences: Maybe = None  # Preferences
    unpaired: Maybe = None  # Unpaired
    baseline: Maybe = None  # f32[B]: nats, the same in all rows (kto)


class TokenStats(struct.PyTreeNode):
    """One chunked pass over the vocabulary."""

    logprobs: Array  # f32[B, S]
    entropy: Array  # f32[B, S]


class TrainState(struct.PyTreeNode):
    """All that a run needs to go on: saved whole, restored bitwise, donated to every iteration."""

    step: Array  # i32[]: iterations done
    seed: Array  # i32[]: every key of the run is derived from (seed, step, ...)
    params: dict[Role, Params]  # learned by gradient
    slow: dict[Role, Params]  # read, not differentiated: reference, frozen reward model, targets
    opt_state: dict[Role, Any]
    controls: dict[str, Array]  # f32[] scalars that an algorithm adapts: kl_coef


class Nets(NamedTuple):
    """All that an algorithm may ask of a network. ``trees`` is ``params`` or ``slow``; the role picks one of them."""

    token_stats: Callable[[Role, dict[Role, Params], Sequences], TokenStats]
    values: Callable[[Role, dict[Role, Params], Sequences], Array]  # f32[B, S], column t: before token t
    policy_and_value: Callable[[dict[Role, Params], Sequences], tuple[TokenStats, Array]]  # both; a shared trunk once
    scores: Callable[[Role, dict[Role, Params], Sequences], Array]  # f32[B], read at the last valid token
    sample: Callable[[Role, dict[Role, Params], Prompts, Array, Array], Sequences]  # ..., seed i32[], step i32[]


READING = ("token_stats", "values", "policy_and_value", "scores")  # of Nets: those that read sequences


def sample_policy(nets: Nets, state: TrainState, prompts: Prompts) -> Sequences:
    """The default rollout: sample responses from the policy as it is."""
    return nets.sample("policy", state.params, prompts, state.seed, state.step)


def no_controls(cfg: Any) -> dict[str, Array]:
    """An algorithm that adapts no scalar."""
    return {}


def keep_state(state: TrainState, metrics: Metrics, cfg: Any) -> TrainState:
    """An algorithm with nothing to do after its updates."""
    return state


class Algorithm(NamedTuple):
    """A record of pure functions, as optax.GradientTransformation is one: no base class.

    ``loss`` returns, for each trained role, the Mean whose total is differentiated in that role's own params only
    (the step divides the gradient by the count of the whole minibatch), and the metrics as Means.
    """

    config: type  # frozen dataclass; its YAML section is ``algorithm``
    batch: Callable[[Any], tuple[str, ...]]  # cfg -> the fields of Batch that it reads from data
    roles: Callable[[Any], tuple[dict[Role, Head], dict[Role, Head]]]  # cfg -> (trained, slow)
    prepare: Callable[[Nets, TrainState, Batch, Any], tuple[Experience, dict[str, Mean]]]  # no gradient
    loss: Callable[
        [Nets, dict[Role, Params], dict[Role, Params], Experience, Any], tuple[dict[Role, Mean], dict[str, Mean]]
    ]
    rollout: Callable[[Nets, TrainState, Prompts], Sequences] | None = None  # None: offline
    controls: Callable[[Any], dict[str, Array]] = no_controls
    stop: Callable[[Metrics, Any], Array] | None = None  # metrics of one minibatch -> bool[]: skip the rest
    after: Callable[[TrainState, Metrics, Any], TrainState] = keep_state
    min_samples_per_prompt: int = 1  # fewer responses to a prompt teach it nothing
