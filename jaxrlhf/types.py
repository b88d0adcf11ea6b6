"""The pytrees and records that pass between the parts.

Alignment, said once: every per-token array is [B, S] and column t is about token t. ``logprobs[:, t]`` is
log p(token t | tokens before t) and ``values[:, t]`` is V(state before token t); column 0 is masked.
Prompts are left-padded to P columns, so every sampled response starts at column P.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
from flax import struct

Array = jax.Array
Params = Any  # a pytree of arrays
Role = str  # "policy" | "value" | "reward" | "reference" | ...
# the output head of a role: "lm" gives next-token logits, "scalar" one number per token; "bare" is a scalar head on
# another role's trunk, "action" a head there that gives the action value of every next token
Head = Literal["lm", "scalar", "bare", "action"]
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
    # i32[B]: keys the sampling noise of the row, together with seed, step and position: its index in the global batch
    # (training) or among all held-out rows (evaluation)
    sample_id: Array


class Sequences(struct.PyTreeNode):
    """Prompt and response in one row. The EOS token that ends a response is inside ``response_mask``."""

    tokens: Array  # i32[B, S]
    valid: Array  # bool[B, S]
    response_mask: Array  # bool[B, S]: tokens that the policy chose (or should learn to choose)
    segment_ids: Array | None = None  # i32[B, S] of packed rows: 1, 2, ... a document, 0 padding; None: one a row
    logprobs: Array | None = None  # f32[B, S] under the distribution that they were sampled from
    scores: Array | None = None  # f32[B]: one number per sequence; NaN: graders on the host could not score it
    grades: dict[str, Array] | None = None  # f32[B] by name of several graders on the host; NaN: it could not
    ended: Array | None = None  # bool[B]: the response ended with EOS or a stop text, not by its length
    # of control, where tokens are actions: f32[B, S, D], column t is what the environment showed after token t, from
    # which networks are computed
    observations: Array | None = None
    rewards: Array | None = None  # f32[B, S]: what each token earned by an environment, of control or of text
    # of a mixture of experts: int8 or int16 [B, S, layers * k], which experts computed each token when it was sampled;
    # -1: not known
    routing: Array | None = None
    response_start: int = struct.field(pytree_node=False, default=1)  # no response token is in a column before it
    # consecutive rows that share a prompt, which is computed once
    copies: int = struct.field(pytree_node=False, default=1)
    # upper bound on the response tokens of one prompt, if one below copies * response columns is known: networks pack
    # the responses into this many columns; None: not known
    width: int | None = struct.field(pytree_node=False, default=None)


class Preferences(struct.PyTreeNode):
    """Pairs with the same prompt: ``chosen`` is preferred to ``rejected``."""

    chosen: Sequences
    rejected: Sequences
    margin: Array | None = None  # f32[B]: by how much, where the data says


class Comparisons(struct.PyTreeNode):
    """Pairs of which some are ties: neither side is preferred."""

    pairs: Preferences
    tie: Array  # bool[B]


class Unpaired(struct.PyTreeNode):
    """Responses that are each good or bad by themselves."""

    responses: Sequences
    desirable: Array  # bool[B]
    mismatched: Sequences | None = None  # each prompt with the response of another row of the batch


class Trajectories(struct.PyTreeNode):
    """Responses whose tokens each earned a reward.

    A truncated trajectory is followed by one token that is not a response token. The value of the state before that
    token is the bootstrap value. A trajectory that ended has no bootstrap value."""

    responses: Sequences
    rewards: Array  # f32[B, S]; 0 outside the response mask
    truncated: Array  # bool[B]: cut by a limit, not ended


class Acting(struct.PyTreeNode):
    """Rows of episodes that wait for an action."""

    observations: Array  # f32[B, D]
    sample_id: Array  # i32[B]: as that of Prompts
    position: Array  # i32[B]: actions before this one


class Batch(struct.PyTreeNode):
    """What one iteration is given; an algorithm names in ``Algorithm.batch`` the fields that it reads."""

    prompts: Prompts | None = None
    sequences: Sequences | None = None
    preferences: Preferences | None = None
    unpaired: Unpaired | None = None
    trajectories: Trajectories | None = None
    comparisons: Comparisons | None = None
    demonstrations: Sequences | None = None  # responses of data beside those that are sampled, which are ``sequences``


class Rows(struct.PyTreeNode):
    """Rows of an experience that are not those of its responses: they are shuffled and split by themselves."""

    data: Any  # arrays of the same number of rows


class Experience(struct.PyTreeNode, kw_only=True):
    """What the updates of one iteration learn from. An algorithm adds its fields in a class of its own::

        class MyExperience(Experience, kw_only=True):
            advantages: Array  # f32[B, S]

    Every array has B rows, which are shuffled and split into minibatches together; those inside a ``Rows`` have a
    number of rows of their own.
    """

    responses: Sequences | None = None  # packed where batch.pack_widths asks for it; returned by an online iteration


class TokenStats(struct.PyTreeNode):
    """Of the next-token distribution at each response token; one chunked pass over the vocabulary."""

    logprobs: Array  # f32[B, S]: of the token
    entropy: Array  # f32[B, S]: nats


class Trees(NamedTuple):
    """The parameters that networks are computed from."""

    params: dict[Role, Params]  # learned by gradient
    slow: dict[Role, Params]  # read, not differentiated: reference, frozen reward model, targets

    def of(self, role: Role) -> Params:
        """The parameters of one role."""
        return self.params[role] if role in self.params else self.slow[role]


class HeadSpec(NamedTuple):
    """A head as an algorithm asks for it; "lm" and "scalar" alone are short for HeadSpec("lm"), HeadSpec("scalar")."""

    outputs: Literal["lm", "scalar", "action"]  # action: f32[V] a token, read as Q(s, a) of every next token a
    trunk: Role | None = None  # None: a model of its own; else a head on that role's trunk, whose pass serves both
    gradient: float = 1.0  # factor on the gradient from this head into the trunk; 0: none


AskedHead = Literal["lm", "scalar"] | HeadSpec  # what an algorithm may declare as the head of a role


class QStats(struct.PyTreeNode):
    """Of the action values at each response token; one chunked pass over the vocabulary."""

    chosen: Array  # f32[B, S]: Q(s_t, token t)
    largest: Array  # f32[B, S]: max over tokens
    logsumexp: Array  # f32[B, S]: log of the sum over tokens of exp Q


class Divergence(NamedTuple):
    """How far a next-token distribution is from another: see ops/divergence.py."""

    kind: Literal["reverse_kl", "forward_kl", "jsd"] = "reverse_kl"
    beta: float = 0.5  # jsd: weight of the other distribution in the mixture, more than 0 and less than 1
    top_k: int = 0  # only so many tokens, those that the other holds likeliest; 0: the whole vocabulary
    tail: Literal["bucket", "drop"] = "bucket"  # top_k: the rest is one outcome, or is left out
    temperature: float = 1.0  # both distributions' logits are divided by it


class DivergenceStats(struct.PyTreeNode):
    """Of two next-token distributions at each response token; one chunked pass over the vocabulary."""

    divergence: Array  # f32[B, S]: nats
    entropy: Array  # f32[B, S]: nats; no gradient
    against_entropy: Array  # f32[B, S]: of the other distribution
    against_mass: Array  # f32[B, S]: probability that the other gives to the tokens compared; 1 of the whole vocabulary


class TrainState(struct.PyTreeNode):
    """All that a run needs to go on: saved whole, restored bitwise, donated to every iteration."""

    step: Array  # i32[]: iterations done
    seed: Array  # i32[]: every key of the run is derived from (seed, step, ...)
    params: dict[Role, Params]  # learned by gradient
    slow: dict[Role, Params]  # read, not differentiated: reference, frozen reward model, targets
    opt_state: dict[Role, Any]
    controls: dict[str, Array]  # f32[] scalars that an algorithm adapts: kl_coef

    @property
    def trees(self) -> Trees:
        """The parameters of all roles."""
        return Trees(self.params, self.slow)


class Ask(NamedTuple):
    """One question to one network about given rows [B, S].

    token_stats: TokenStats of the response tokens, under the distribution that responses are sampled from.
    values: f32[B, S], column t of the state before token t.
    scores: f32[B], at the last valid token; of rows with observations the sum of their rewards.
    rewards: f32[B, S], column t of the state that token t led to.
    q: QStats of the action values at each response token; of an "lm" head, its logits are the action values.
    divergence: DivergenceStats of the role's and the ``against`` role's distributions at each response token, as
        ``how`` says; of the networks' own logits, whatever shapes the distribution that responses are sampled from.
    """

    role: Role
    what: Literal["token_stats", "values", "scores", "rewards", "q", "divergence"]
    against: Role | None = None  # divergence: from whose distribution; no gradient reaches it
    how: Divergence = Divergence()

    @property
    def roles(self) -> tuple[Role, ...]:
        """Those whose networks are computed: one, or with ``against`` two."""
        return (self.role,) if self.against is None else (self.role, self.against)


class Read(Protocol):
    def __call__(self, trees: Trees, sequences: Sequences, /, *asks: Ask) -> tuple[Any, ...]:
        """Compute networks over rows.

        Args:
            trees: the parameters of the roles asked.
            sequences: [B, S].
            asks: those of heads on one trunk share its pass.

        Returns:
            One answer an ask, in their order.
        """
        ...


class Sample(Protocol):
    def __call__(self, role: Role, trees: Trees, prompts: Prompts, seed: Array, step: Array, /) -> Sequences:
        """Sample responses from a network.

        Args:
            role: whose next-token distribution.
            trees: its parameters are among them.
            prompts: [B, P].
            seed: i32[]; with step, sample id and position it keys the noise.
            step: i32[].

        Returns:
            Sequences [B * samples_per_prompt, P + max_new_tokens]; the responses to a prompt are contiguous.
        """
        ...


class Act(Protocol):
    def __call__(self, role: Role, trees: Trees, acting: Acting, seed: Array, step: Array, /) -> tuple[Array, Array]:
        """Choose the next action of every row.

        Args:
            role: whose distribution.
            trees: its parameters are among them.
            acting: B rows.
            seed: i32[]; with step, sample id and position it keys the noise.
            step: i32[].

        Returns:
            (tokens i32[B], their log-probs f32[B]).
        """
        ...


Combine = Literal["mean", "median", "min", "mean_minus_variance"]


class Grader(NamedTuple):
    """Several models that give one score: an ensemble."""

    members: tuple[Role, ...]
    combine: Combine = "mean"
    variance_coef: float = 0.0  # of mean_minus_variance


Noted = list[tuple[Role, dict[str, Mean]]]  # what was measured of the routers of each role's passes, in their order


class Nets(NamedTuple):
    """All that an algorithm may ask of networks."""

    read: Read
    sample: Sample
    graders: Mapping[Role, Grader] = MappingProxyType({})  # ensembles, by the role whose scores they give
    act: Act | None = None  # of networks that are computed from observations
    extend: Sample | None = None  # as sample, but one response a row, of a turn's length: prompts are what came before
    # weights of the graders on the host that an advantage normalises each by itself; empty: it normalises the score
    apart: Mapping[str, float] = MappingProxyType({})
    # of mixtures of experts: ``read`` that appends to a list what it measures of routers, for who differentiates it
    noting: Callable[[Noted], Read] | None = None


T = TypeVar("T")


def given(value: T | None, what: str) -> T:
    """``value``, which must be there.

    Raises:
        ValueError: "``what`` is None", where an algorithm reads what its data do not have.
    """
    if value is None:
        raise ValueError(f"{what} is None: expected a field that the algorithm's batch names, or that is computed")
    return value
