"""From an optimizer's config to its optax chain and schedule: one chain a role, clipped by its own norm."""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

# b1 of a first moment in bfloat16: with more, (1 - b1) of a gradient that is not far from the moment is rounded away
LARGEST_B1_IN_BFLOAT16 = 0.95
MATRICES = ("kernel", "embedding", "lora_a", "lora_b")
WINDOW = 128  # updates in which a spike is looked for


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW for one role. Schedules count optimizer steps (epochs x minibatches an iteration), not iterations."""

    learning_rate: float = 1e-5  # its peak; models of 1M parameters need 1e-3, of 100M 2e-5, of 7B 1e-6 to 1e-5
    schedule: Literal["constant", "linear", "cosine"] = "constant"  # of the learning rate after warm-up
    warmup_steps: int = 0  # optimizer steps in which the learning rate rises from 0
    final_fraction: float = 0.0  # of the learning rate, at the end of linear and cosine
    b1: float = 0.9  # decay of Adam's first moment
    b2: float = 0.999  # decay of Adam's second moment
    eps: float = 1e-8  # added to the root of the second moment
    weight_decay: float = 0.0  # on matrices only: norms and biases are left alone
    clip_norm: float | None = 1.0  # of this role's gradient alone; null: never
    delay: int = 0  # iterations before this role starts to learn (on policy: value warm-up)
    spike_sigmas: float | None = (
        None  # an update is left out whose loss or gradient norm is so many standard deviations
    )
    # above the mean of the last 128 updates; 6 is usual; null: never
    dtype: Literal["float32", "bfloat16"] = "float32"  # of Adam's first moment; the second is float32


def make_schedule(cfg: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Linear warm-up over ``warmup_steps``, then the schedule down to ``final_fraction`` at ``total_steps``. Both
    count steps of the role's own optimizer, which begin once its ``delay`` is over."""
    decay_steps = max(total_steps - cfg.warmup_steps, 1)
    peak, last = cfg.learning_rate, cfg.learning_rate * cfg.final_fraction
    if cfg.schedule == "constant":
        body = optax.constant_schedule(peak)
    elif cfg.schedule == "linear":
        body = optax.linear_schedule(peak, last, decay_steps)
    else:
        body = optax.cosine_decay_schedule(peak, decay_steps, alpha=cfg.final_fraction)
    if not cfg.warmup_steps:
        return body
    warmup = optax.linear_schedule(0.0, peak, cfg.warmup_steps)
    return optax.join_schedules([warmup, body], [cfg.warmup_steps])


def make_optimizer(cfg: OptimizerConfig, total_steps: int) -> optax.GradientTransformationExtraArgs:
    """clip by the norm that ``update`` is given -> Adam -> decoupled weight decay -> learning rate."""
    return optax.chain(
        optax.identity() if cfg.clip_norm is None else clip_by_norm(cfg.clip_norm),
        optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps, mu_dtype=jnp.dtype(cfg.dtype)),
        optax.add_decayed_weights(cfg.weight_decay, mask=is_matrix),
        optax.scale_by_learning_rate(make_schedule(cfg, total_steps)),
        *([] if cfg.spike_sigmas is None else [keep_recent()]),
    )


def clip_by_norm(largest: float) -> optax.GradientTransformationExtraArgs:
    """optax.clip_by_global_norm by a ``norm`` (f32[]) that the caller gives: over a mesh it is reduced once."""

    def update(updates, state, params=None, **given):
        norm = given["norm"]
        clip = lambda x: jnp.where(norm < largest, x, (x / norm.astype(x.dtype)) * largest)
        return jax.tree.map(clip, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


class Recent(NamedTuple):
    """What the last updates were like: a part of an optimizer's state."""

    recent: Array  # f32[2, WINDOW]: loss and gradient norm, the newest last; NaN before there were so many


def keep_recent() -> optax.GradientTransformation:
    """Changes no update: holds the state of ``notice_spike``."""
    start = lambda params: Recent(jnp.full((2, WINDOW), jnp.nan))
    return optax.GradientTransformation(start, lambda updates, state, params=None: (updates, state))


def notice_spike(
    opt_state: optax.OptState, loss: Array, norm: Array, sigmas: float, counts: Array
) -> tuple[Array, optax.OptState]:
    """(bool[]: whether ``loss`` or ``norm`` is over mean + sigmas x standard deviation of the last WINDOW updates, of
    which half have to be known; the state, which remembers both, also of a spike: a new level is soon none).

    Args:
        counts: bool[], whether this is an update at all; otherwise it is no spike and is not remembered.

    Source: the step-skipping optimizer of OLMo 2 (arXiv:2501.00656)."""
    recent, new = optax.tree.get(opt_state, "recent"), jnp.stack([loss, norm])
    known = ~jnp.isnan(recent)
    enough = known.sum(axis=1) >= WINDOW // 2
    mean, deviation = recent.mean(axis=1, where=known), recent.std(axis=1, where=known, ddof=1)
    spike = counts & (enough & (new > mean + sigmas * deviation)).any()
    later = jnp.concatenate([recent[:, 1:], new[:, None]], axis=1)
    remembered = jnp.where(counts & jnp.isfinite(new).all(), later, recent)
    return spike, optax.tree.set(opt_state, recent=remembered)


def learning_rate(schedule: optax.Schedule, opt_state: optax.OptState) -> Array:
    """f32[]: the learning rate of the next update by an optimizer in this state; its schedule counts its updates."""
    count = optax.tree.get(opt_state, "count", filtering=of_schedule)
    return jnp.asarray(schedule(count), jnp.float32)


def of_schedule(path: tuple, _: Any) -> bool:
    """Whether a leaf of an optimizer's state is the schedule's, and not Adam's."""
    return getattr(path[-1], "tuple_name", None) == "ScaleByScheduleState"


def is_matrix(params):
    """True for the leaves that weight decay touches: kernels, embeddings and adapters, by name."""
    from jax.tree_util import tree_map_with_path

    return tree_map_with_path(lambda path, _: path[-1].key in MATRICES, params)
