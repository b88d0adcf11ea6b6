"""The nouns of the house: every pytree and record that passes between the parts.

Alignment, said once: every per-token array is [B, S] and column t is about token t. ``logprobs[:, t]`` is
log p(token t | tokens before t) and ``values[:, t]`` is V(state before token t); column 0 is masked.
Prompts are left-padded to P columns, so every sampled response starts at column P.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
from flax import struct

Array = jax.Array
Params = Any  # a pytree of arrays
Role = str  # "policy" | "value" | "reward" | "reference" | ...
# what a role's parameters end with: next-token logits; one number a token; the same, and action values of every next
# token, on another role's trunk
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
    # i32[B]: what keys the row's sampling noise, with seed, step and position: the row of the global batch in training,
    # of all held-out rows in an evaluation
    sample_id: Array


class Sequences(struct.PyTreeNode):
    """Prompt and response in one row. The EOS token that ends a response is inside ``response_mask``."""

    tokens: Array  # i32[B, S]
    valid: Array  # bool[B, S]
    response_mask: Array  # bool[B, S]: tokens that the policy chose (or should learn to choose)
    segment_ids: Array | None = None  # i32[B, S] of packed rows: 1, 2, ... a document, 0 padding; None: one a row
    logprobs: Array | None = None  # f32[B, S] under the distribution that they were sampled from
    scores: Array | None = None  # f32[B]: one number a sequence; NaN: graders on the host could not score it
    grades: dict[str, Array] | None = None  # f32[B] by name of several graders on the host; NaN: it could not
    ended: Array | None = None  # bool[B]: the response ended with EOS or a stop text, not by its length
    response_start: int = struct.field(pytree_node=False, default=1)  # no response token is in a column before it
    copies: int = struct.field(pytree_node=False, default=1)  # every so many rows have one prompt: it is computed once
    # response tokens to one prompt at most, where a bound below copies * response columns is known: networks pack the
    # responses into so many columns; None: it is not known
    width: int | None = struct.field(pytree_node=False, default=None)


class Preferences(struct.PyTreeNode):
    """Pairs with the same prompt: ``chosen`` is preferred to ``rejected``."""

    chosen: Sequences
    rejected: Sequences
    margin: Array | None = None  # f32[B]: by how much, where the data says


class Unpaired(struct.PyTreeNode):
    """Responses that are each good or bad by themselves."""

    responses: Sequences
    desirable: Array  # bool[B]
    mismatched: Sequences | None = None  # each prompt with the response of another row of the batch


class Batch(struct.PyTreeNode):
    """What one iteration is given; an algorithm names in ``Algorithm.batch`` the fields that it reads."""

    prompts: Prompts | None = None
    sequences: Sequences | None = None
    preferences: Preferences | None = None
    unpaired: Unpaired | None = None


class Rows(struct.PyTreeNode):
    """Rows of an experience that are not those of its responses: they are shuffled and split by themselves."""

    data: Any  # arrays of the same number of rows


class Experience(struct.PyTreeNode, kw_only=True):
    """What the epochs of one iteration learn from. An algorithm adds its fields in a class of its own::

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
    gradient: float = 1.0  # share of the head's gradient that reaches the trunk


class QStats(struct.PyTreeNode):
    """Of the action values at each response token; one chunked pass over the vocabulary."""

    chosen: Array  # f32[B, S]: Q(s_t, token t)
    largest: Array  # f32[B, S]: max over tokens
    logsumexp: Array  # f32[B, S]: log of the sum over tokens of exp Q


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
    scores: f32[B], at the last valid token.
    q: QStats of the action values at each response token; of an "lm" head, its logits are the action values.
    """

    role: Role
    what: Literal["token_stats", "values", "scores", "q"]


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


class Nets(NamedTuple):
    """All that an algorithm may ask of networks."""

    read: Read
    sample: Sample


T = TypeVar("T")


def given(value: T | None, what: str) -> T:
    """``value``, which must be there.

    Raises:
        ValueError: "``what`` is None", where an algorithm reads what its data do not have.
    """
    if value is None:
        raise ValueError(f"{what} is None: expected a field that the algorithm's batch names, or that is computed")
    return value


class Updates(NamedTuple):
    """How one iteration learns from its experience. Every epoch shuffles all rows and splits them into minibatches."""

    epochs: int = 1  # passes over the experience
    minibatches: int = 1  # optimizer steps an epoch
    stop: Callable[[Metrics], Array] | None = None  # metrics of a minibatch -> bool[]: skip the rest of the iteration


class Normalization(NamedTuple):
    """Once, after the last iteration: give one role's scores of the policy's responses mean 0 and deviation 1."""

    role: Role  # a trained role with a scalar head
    samples: int  # responses of models.policy that it scores; at least 2
    fold: Callable[[Params, float, float], Params]  # (its head, mean, deviation) -> the head of normalised scores


# ---- the callables of an algorithm ----------------------------------------------------------------------------------


class ReadBatch(Protocol):
    def __call__(self, cfg: Any, /) -> tuple[str, ...]:
        """Name the fields of Batch that the algorithm reads from data.

        Args:
            cfg: the algorithm's config.

        Returns:
            Names of fields, the one whose rows are learned from first; "prompts" is one of them if it is online.
        """
        ...


class NeedRoles(Protocol):
    def __call__(self, cfg: Any, /) -> tuple[Mapping[Role, Head | HeadSpec], Mapping[Role, Head | HeadSpec]]:
        """Name the models of the algorithm.

        Args:
            cfg: the algorithm's config.

        Returns:
            (trained, slow): the head of each role. TrainState.params holds trained roles, TrainState.slow the others.
            A slow head of action values starts as a trained one does, for ``after_update`` to move it.
        """
        ...


class PlanUpdates(Protocol):
    def __call__(self, cfg: Any, /) -> Updates:
        """Say how often the algorithm learns from one iteration's experience.

        Args:
            cfg: the algorithm's config.

        Returns:
            Updates; the product of its epochs and minibatches is the number of optimizer steps.
        """
        ...


class Prepare(Protocol):
    def __call__(
        self, nets: "Nets", state: TrainState, batch: Batch, cfg: Any, /
    ) -> tuple[Experience, dict[str, Mean]]:
        """Compute what the updates learn from, once an iteration. No gradient flows through it.

        Args:
            nets: the run's networks.
            state: as it is before the updates.
            batch: B rows, as data give them; ``batch.sequences`` holds the responses if the algorithm is online.
            cfg: the algorithm's config.

        Returns:
            (experience, metrics as Means). Every array of the experience has B rows.
        """
        ...


class Loss(Protocol):
    def __call__(
        self,
        nets: "Nets",
        trees: Trees,
        minibatch: Any,
        cfg: Any,
        /,
    ) -> tuple[dict[Role, Mean], dict[str, Mean]]:
        """Compute the loss of each trained role over some rows.

        Args:
            nets: the run's networks.
            trees: the gradient is that of ``trees.params``.
            minibatch: the Experience that ``prepare`` made, of some rows; of a micro-batch where gradients are
                accumulated.
            cfg: the algorithm's config.

        Returns:
            (losses, metrics), both Means. The step differentiates the sum of the totals and divides each role's
            gradient by that role's count over the whole minibatch.
        """
        ...


class Rollout(Protocol):
    def __call__(self, nets: "Nets", state: TrainState, prompts: Prompts, /) -> Sequences:
        """Sample the responses of one iteration.

        Args:
            nets: the run's networks.
            state: as it is before the updates.
            prompts: [B, P].

        Returns:
            Sequences [B * samples_per_prompt, P + max_new_tokens]; the responses to a prompt are contiguous.
        """
        ...


class MakeControls(Protocol):
    def __call__(self, cfg: Any, /) -> dict[str, Array]:
        """Give the first values of the scalars that the algorithm adapts.

        Args:
            cfg: the algorithm's config.

        Returns:
            f32[] by name: TrainState.controls.
        """
        ...


class AfterUpdate(Protocol):
    def __call__(self, state: TrainState, cfg: Any, /) -> TrainState:
        """Change the state after every optimizer step: a Polyak average of a slow role, for instance.

        Args:
            state: after the optimizer step of one minibatch; ``state.step`` counts iterations.
            cfg: the algorithm's config.

        Returns:
            The state, with the same shapes, dtypes and layouts. Skipped minibatches (Updates.stop) change nothing.
        """
        ...


class After(Protocol):
    def __call__(self, state: TrainState, metrics: Metrics, cfg: Any, /) -> TrainState:
        """Change the state once an iteration, after its updates: an adaptive KL coefficient, for instance.

        Args:
            state: after the last update; ``state.step`` is not yet increased.
            metrics: of the whole iteration, f32[] by name.
            cfg: the algorithm's config.

        Returns:
            The state, with the same shapes, dtypes and layouts.
        """
        ...


class Finish(Protocol):
    def __call__(self, cfg: Any, /) -> Normalization | None:
        """Say how the run ends.

        Args:
            cfg: the algorithm's config.

        Returns:
            The normalisation of a role's scores after the last iteration; None: the state stays as it is.
        """
        ...


class FindProblems(Protocol):
    def __call__(self, cfg: Any, /) -> Iterable[str]:
        """Check values of the config against each other.

        Args:
            cfg: the algorithm's config, whose fields are each in range.

        Returns:
            A line a problem, "key: value: reason; expected ...", without the section's name.
        """
        ...


# ---- what most algorithms do ----------------------------------------------------------------------------------------


def sample_policy(nets: "Nets", state: TrainState, prompts: Prompts) -> Sequences:
    """Sample responses from the policy as it is."""
    return nets.sample("policy", state.trees, prompts, state.seed, state.step)


def update_once(cfg: Any) -> Updates:
    """One optimizer step an iteration, on all of its rows."""
    return Updates()


def no_controls(cfg: Any) -> dict[str, Array]:
    """Adapt no scalar."""
    return {}


def keep_state(state: TrainState, metrics: Metrics, cfg: Any) -> TrainState:
    """Change nothing after the updates."""
    return state


def finish_at_once(cfg: Any) -> None:
    """Normalise nothing after the last iteration."""
    return None


def no_problems(cfg: Any) -> tuple[str, ...]:
    """Accept all values that are in range."""
    return ()


class Algorithm(NamedTuple):
    """An algorithm as a record of pure functions, like optax.GradientTransformation. The first seven are required."""

    config: type  # frozen dataclass; its YAML section is ``algorithm``
    online: bool  # it learns from responses that the run samples; else from data alone, and ``rollout`` is not called
    batch: ReadBatch
    roles: NeedRoles
    updates: PlanUpdates
    prepare: Prepare
    loss: Loss
    rollout: Rollout = sample_policy
    controls: MakeControls = no_controls
    after_update: AfterUpdate | None = None  # None: nothing is done between the optimizer steps of an iteration
    after: After = keep_state
    finish: Finish = finish_at_once
    problems: FindProblems = no_problems
    min_samples_per_prompt: int = 1  # with fewer responses to a prompt there is nothing to learn
