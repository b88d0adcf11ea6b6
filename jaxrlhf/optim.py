"""From an optimizer's config to its optax chain and schedule: one chain a role, clipped by its own norm."""

import dataclasses
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxrlhf.ops.newton_schulz import Matrices, orthogonalized

# b1 of a first moment in bfloat16: with more, (1 - b1) of a gradient that is not far from the moment is rounded away
LARGEST_B1_IN_BFLOAT16 = 0.95
MATRICES = ("kernel", "embedding", "lora_a", "lora_b")
WINDOW = 128  # updates in which a spike is looked for
UPDATE_RMS = 0.2  # root mean square of a matrix's update by Muon, in learning rates: about that of AdamW's


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer of one role. Schedules count optimizer steps (epochs x minibatches an iteration), not
    iterations."""

    learning_rate: float = 1e-5  # its peak; models of 1M parameters need 1e-3, of 100M 2e-5, of 7B 1e-6 to 1e-5
    name: Literal["adamw", "muon"] = "adamw"  # muon: of the layers' matrices; AdamW, at the same rate, of the rest
    momentum: float = 0.95  # of Muon: decay of the sum of gradients (Nesterov's)
    newton_schulz_steps: int = 5  # of Muon: steps in which an update is made nearly orthogonal
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
    dtype: Literal["float32", "bfloat16"] = "float32"  # of Adam's first moment and of Muon's; Adam's second is float32


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


def make_optimizer(
    cfg: OptimizerConfig, total_steps: int, matrices: Matrices = MappingProxyType({})
) -> optax.GradientTransformationExtraArgs:
    """clip by the norm that ``update`` is given -> Adam, or Muon for ``matrices`` -> decoupled weight decay -> learning
    rate."""
    adam = optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps, mu_dtype=jnp.dtype(cfg.dtype))
    return optax.chain(
        optax.identity() if cfg.clip_norm is None else clip_by_norm(cfg.clip_norm),
        adam if cfg.name == "adamw" else by_kind(scale_by_muon(cfg, matrices), adam, matrices),
        optax.add_decayed_weights(cfg.weight_decay, mask=is_matrix),
        optax.scale_by_learning_rate(make_schedule(cfg, total_steps)),
        *([] if cfg.spike_sigmas is None else [keep_recent()]),
    )


def by_kind(
    muon: optax.GradientTransformation, adam: optax.GradientTransformation, matrices: Matrices
) -> optax.GradientTransformationExtraArgs:
    """``muon`` for the leaves in ``matrices``, ``adam`` for the others; each keeps a state of its own leaves alone."""

    def label(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: "muon" if keys(path) in matrices else "adamw", params)

    return optax.partition({"muon": muon, "adamw": adam}, label)


def scale_by_muon(cfg: OptimizerConfig, matrices: Matrices) -> optax.GradientTransformation:
    """Momentum -> its nearest orthogonal matrix x 0.2 sqrt(max(inputs, outputs)): a root mean square of about 0.2,
    which AdamW's updates have, so that learning rate and weight decay mean what they mean there.

    The momentum is laid out as the parameters are. optax.contrib.muon has both in one function, where an explicit mesh
    can't give whole matrices to devices. Sources: Jordan et al. 2024 (kellerjordan.github.io/posts/muon); Liu et al.
    2025 (arXiv:2502.16982), section 2.2."""

    def update(updates, state, params=None):
        def one(path: tuple, x: Array) -> Array:
            axes = matrices[keys(path)]
            size = UPDATE_RMS * max(axes.sizes(x.shape)) ** 0.5
            return size * orthogonalized(x, axes, cfg.newton_schulz_steps)

        return jax.tree_util.tree_map_with_path(one, updates), state

    momentum = optax.trace(cfg.momentum, nesterov=True, accumulator_dtype=jnp.dtype(cfg.dtype))
    return optax.chain(momentum, optax.GradientTransformation(lambda params: optax.EmptyState(), update))


def keys(path: tuple) -> tuple[str, ...]:
    """The path of a leaf in a role's parameters, as names."""
    return tuple(part.key for part in path)


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
    # a weakly typed NaN would come out of an update as another type, and the program be compiled again
    start = lambda params: Recent(jnp.full((2, WINDOW), jnp.nan, jnp.float32))
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
