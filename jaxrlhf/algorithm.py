"""What an algorithm is: a record of pure functions, each with its protocol, and what most algorithms do."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol

from jaxrlhf.types import (
    Array,
    Ask,
    AskedHead,
    Batch,
    Experience,
    Mean,
    Metrics,
    Nets,
    Params,
    Prompts,
    Role,
    Sequences,
    TrainState,
    Trees,
)

TARGET = "target_"  # the slow role target_X follows the trained role X
TEACHER: Role = "teacher"  # the slow role from whose distribution a policy learns


class Updates(NamedTuple):
    """How one iteration learns from its experience. With several minibatches, each epoch shuffles all rows first."""

    epochs: int = 1  # passes over the experience
    minibatches: int = 1  # optimizer steps an epoch
    stop: Callable[[Metrics], Array] | None = None  # metrics of a minibatch -> bool[]: skip the rest of the iteration


class Normalization(NamedTuple):
    """After the last iteration: rescale the scalar head of one role, so that its scores of responses of models.policy
    have mean 0 and standard deviation 1."""

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
    def __call__(self, cfg: Any, /) -> tuple[Mapping[Role, AskedHead], Mapping[Role, AskedHead]]:
        """Name the models of the algorithm.

        Args:
            cfg: the algorithm's config.

        Returns:
            (trained, slow): the head of each role. TrainState.params holds trained roles, TrainState.slow the others.
            A slow head of action values is initialised like a trained one: target_X starts equal to X, other heads
            start with other numbers. ``after_update`` may then change it.
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
    def __call__(self, nets: Nets, state: TrainState, batch: Batch, cfg: Any, /) -> tuple[Experience, dict[str, Mean]]:
        """Compute what the updates learn from, once an iteration. No gradient flows through it.

        Args:
            nets: the run's networks.
            state: as it is before the updates.
            batch: B rows, as data give them; ``batch.sequences`` holds the responses if the algorithm is online.
            cfg: the algorithm's config.

        Returns:
            (experience, metrics as Means). Every array of the experience has B rows, except those inside a Rows.
        """
        ...


class Loss(Protocol):
    def __call__(
        self,
        nets: Nets,
        trees: Trees,
        minibatch: Any,
        cfg: Any,
        /,
    ) -> tuple[dict[Role, Mean], dict[str, Mean]]:
        """Compute the loss of each trained role over some rows.

        Args:
            nets: the run's networks.
            trees: the gradient is that of ``trees.params``.
            minibatch: some rows of the Experience that ``prepare`` made: a minibatch, or with gradient accumulation
                one of its micro-batches.
            cfg: the algorithm's config.

        Returns:
            (losses, metrics), both Means. The step differentiates the sum of the totals and divides each role's
            gradient by that role's count over the whole minibatch.
        """
        ...


class Rollout(Protocol):
    def __call__(self, nets: Nets, state: TrainState, prompts: Prompts, /) -> Sequences:
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


class NeedSamples(Protocol):
    def __call__(self, cfg: Any, /) -> int:
        """Say how many responses to a prompt the algorithm needs.

        Args:
            cfg: the algorithm's config.

        Returns:
            1 or more: with fewer responses to a prompt there is nothing to learn.
        """
        ...


class FindInformative(Protocol):
    def __call__(self, nets: Nets, state: TrainState, batch: Batch, cfg: Any, /) -> tuple[Array, Array]:
        """Say which groups of responses there is something to learn from.

        Args:
            nets: the run's networks.
            state: as it is before the updates.
            batch: G prompts and their responses, with scores where the host computes them.
            cfg: the algorithm's config.

        Returns:
            (bool[G], f32[B]: the score of each response; NaN: none).
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


def read_logprobs(nets: Nets, role: Role, trees: Trees, rows: Sequences) -> Array:
    """f32[B, S]: log p of each response token under ``role``."""
    (stats,) = nets.read(trees, rows, Ask(role, "token_stats"))
    return stats.logprobs


def sample_policy(nets: Nets, state: TrainState, prompts: Prompts) -> Sequences:
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


def one_sample(cfg: Any) -> int:
    """Learn from each response by itself."""
    return 1


def two_samples(cfg: Any) -> int:
    """Compare the responses to a prompt with each other."""
    return 2


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
    graders_apart: bool = False  # its advantages follow Nets.apart
    min_samples: NeedSamples = one_sample  # responses to a prompt
    informative: FindInformative | None = None  # what batch.max_rollouts goes by; None: it compares no groups
