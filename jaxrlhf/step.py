"""The fused step: one iteration of RLHF is one compiled program, if models give the scores.

    sample responses -> score, compare with the reference, estimate advantages -> epochs x minibatches of updates

``make_iteration`` composes it from an algorithm's pure functions. With a reward that only the host can compute, the
same two halves (``make_rollout``, ``make_learn``) are two programs, with the host between them. A third one
(``make_read``) runs the forward passes of the reference and of old values while the host computes rewards.
"""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxrlhf.algorithm import Algorithm
from jaxrlhf.ops.rows import gather_rows, own_rows, reorder, shuffled_parts, split_rows
from jaxrlhf.optim import learning_rate, notice_spike
from jaxrlhf.precomputed_answers import Answered, recording, replaying
from jaxrlhf.response_widths import alike_in_parts, at_least_width, packed_nets
from jaxrlhf.sharding import across, all_finite
from jaxrlhf.types import (
    Acting,
    Array,
    Batch,
    Experience,
    Mean,
    Metrics,
    Nets,
    Noted,
    Params,
    Prompts,
    Role,
    Rows,
    Sequences,
    TrainState,
    Trees,
    given,
)


class Recipe(NamedTuple):
    """All that the step's program depends on, besides its arrays."""

    algorithm: Algorithm
    cfg: Any  # the algorithm's config
    nets: Nets
    optimizers: Mapping[Role, optax.GradientTransformation]
    delays: dict[Role, int]  # iterations before a role starts to learn
    num_micro: int = 1  # micro-batches per minibatch; the result does not depend on it
    pack_widths: int = 1  # compiled widths of packed responses; 1: no packing, all padded columns
    schedules: Mapping[Role, optax.Schedule] = MappingProxyType({})  # whose learning rates are metrics
    spike_sigmas: Mapping[Role, float] = MappingProxyType({})  # whose updates are skipped at a spike: notice_spike
    together: int = 1  # shuffle block: consecutive responses to a prompt that stay in one minibatch
    graders: tuple[str, ...] = ()  # names of several graders on the host: of Sequences.grades
    router_losses: Mapping[Role, Mapping[str, float]] = MappingProxyType({})  # weights of load_balance, router_z


def make_iteration(recipe: Recipe) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics, Sequences | None]]:
    """One iteration: (state, batch) -> (state, metrics, responses with their scores; None offline).

    Jit it and donate the state."""
    update = make_update(recipe)
    if not recipe.algorithm.online:
        return lambda state, batch: (*update(state, batch)[:2], None)
    rollout = make_rollout(recipe)

    def iteration(state: TrainState, batch: Batch):
        state, metrics, experience = update(state, batch.replace(sequences=rollout(state, batch)))
        return state, metrics, experience.responses

    return iteration


def make_rollout(recipe: Recipe) -> Callable[[TrainState, Batch], Sequences]:
    """(state, batch with prompts) -> sampled sequences."""
    assert recipe.algorithm.online, "an offline algorithm samples nothing"
    rollout = recipe.algorithm.rollout
    return lambda state, batch: rollout(recipe.nets, state, given(batch.prompts, "batch.prompts"))


def make_extend(recipe: Recipe) -> Callable[[TrainState, Prompts], Sequences]:
    """(state, rows as far as they are known, as prompts) -> them with the policy's next response, one a row."""
    extend = given(recipe.nets.extend, "nets.extend")
    return lambda state, prompts: extend("policy", state.trees, prompts, state.seed, state.step)


def make_act(recipe: Recipe) -> Callable[[TrainState, Acting], tuple[Array, Array]]:
    """(state, rows of episodes that wait for an action) -> (the policy's actions i32[B], their log-probs f32[B])."""
    act = given(recipe.nets.act, "nets.act")
    return lambda state, acting: act("policy", state.trees, acting, state.seed, state.step)


def make_learn(recipe: Recipe) -> Callable[[TrainState, Batch | Answered], tuple[TrainState, Metrics]]:
    """(state, batch with sequences or other rows) -> (state after epochs x minibatches of updates, metrics)."""
    update = make_update(recipe)

    def learn(state: TrainState, batch: Batch | Answered):
        if isinstance(batch, Answered):
            return update(state, batch.batch, batch.answers)[:2]
        return update(state, batch)[:2]

    return learn


def make_read(recipe: Recipe) -> Callable[[TrainState, Batch], tuple]:
    """(state, batch with sequences that have no scores yet) -> Answered.answers, which ``make_learn`` takes.

    Runs the forward passes of ``prepare`` (reference log-probs, old values) while the host computes rewards. Valid only
    if these passes do not depend on the scores: run/recorded_asks.asked_before_scores."""
    nets = preparing_nets(recipe)

    def read(state: TrainState, batch: Batch) -> tuple:
        answers: list[Any] = []
        sequences = given(batch.sequences, "batch.sequences")
        no_scores = jnp.zeros_like(given(sequences.ended, "batch.sequences.ended"), jnp.float32)
        sequences = sequences.replace(scores=no_scores, grades=dict.fromkeys(recipe.graders, no_scores) or None)
        recipe.algorithm.prepare(recording(nets, answers), state, batch.replace(sequences=sequences), recipe.cfg)
        return tuple(answers)

    return read


def preparing_nets(recipe: Recipe) -> Nets:
    """The networks of ``prepare``. With packing, they process the batch in as many micro-batches as the updates do."""
    if recipe.pack_widths == 1:
        return recipe.nets
    parts = recipe.algorithm.updates(recipe.cfg).minibatches * recipe.num_micro
    return packed_nets(recipe.nets, parts, recipe.pack_widths)


def make_update(recipe: Recipe) -> Callable[..., tuple[TrainState, Metrics, Experience]]:
    """(state, batch, precomputed answers or None) -> (state after the updates, metrics, experience)."""
    algorithm, cfg, preparing = recipe.algorithm, recipe.cfg, preparing_nets(recipe)

    def update(state: TrainState, batch: Batch, answers: tuple | None = None):
        nets = preparing if answers is None else replaying(preparing, answers)
        experience, means = algorithm.prepare(nets, state, batch, cfg)
        experience = jax.lax.stop_gradient(experience)
        state, update_means = update_epochs(recipe, state, experience)
        metrics = {name: mean.value() for name, mean in (across(means) | update_means).items()}
        after = algorithm.after(state, metrics, cfg)
        # a skipped update can leave NaN in the metrics: an adapted scalar such as kl_coef then keeps its old value
        keep_finite = lambda new, old: jnp.where(jnp.isfinite(new), new, old)
        controls = jax.tree.map(keep_finite, after.controls, state.controls)
        return after.replace(step=state.step + 1, controls=controls), metrics, experience

    return update


def make_measure(recipe: Recipe) -> Callable[[TrainState, Batch], dict[str, Mean]]:
    """(state, held-out batch) -> metrics as Means. The evaluation of an offline algorithm: no update."""
    algorithm, cfg, nets = recipe.algorithm, recipe.cfg, recipe.nets

    def measure(state: TrainState, batch: Batch):
        experience, means = algorithm.prepare(nets, state, batch, cfg)
        return means | algorithm.loss(nets, state.trees, experience, cfg)[1]

    return measure


# ---- updates --------------------------------------------------------------------------------------------------------


def update_epochs(recipe: Recipe, state: TrainState, experience: Experience) -> tuple[TrainState, dict[str, Mean]]:
    """Epochs x minibatches of updates. With more than one minibatch, each epoch shuffles all rows first.

    The shuffle moves blocks of ``recipe.together`` responses to one prompt, even if micro-batches or devices later
    split a block. So what a minibatch holds does not depend on the micro-batch size or the number of devices."""
    num_epochs, num_minibatches, stop = recipe.algorithm.updates(recipe.cfg)
    if num_epochs * num_minibatches == 1:
        return update_minibatch(recipe, state, experience)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(state.seed), state.step), 1)
    # under pmap every device has some of the rows: a shuffle is of all of them
    everything = gather_rows(experience) if num_minibatches > 1 else experience

    def minibatches(number: Array) -> Experience:
        if num_minibatches == 1:
            return split(everything, 1)
        mix = partial(shuffled_parts, key=jax.random.fold_in(key, number), parts=num_minibatches)
        return own_rows(rearranged(everything, partial(mix, together=recipe.together), mix), axis=1)

    def epoch(carry, number):
        return jax.lax.scan(unless_stopped, carry, minibatches(number))

    def unless_stopped(carry, minibatch):
        state, stopped = carry
        if stop is None:
            state, means = update_minibatch(recipe, state, minibatch)
            return (state, stopped), means

        def updated(stop=stop):
            state_after, means = update_minibatch(recipe, state, minibatch)
            return state_after, means, stop({name: mean.value() for name, mean in means.items()})

        shape = jax.eval_shape(updated)
        nothing = lambda: (state, jax.tree.map(jnp.zeros_like, shape[1]), jnp.array(True))
        state, means, stop_now = jax.lax.cond(stopped, nothing, updated)
        means["policy/updates_skipped"] = Mean(stopped.astype(jnp.float32), jnp.float32(1))
        return (state, stopped | stop_now), means

    (state, _), means = jax.lax.scan(epoch, (state, jnp.array(False)), jnp.arange(num_epochs))
    return state, jax.tree.map(jnp.sum, means)


def split(experience: Experience, parts: int) -> Experience:
    """Rows [B, ...] as ``parts`` parts [parts, B / parts, ...]."""
    together = 1 if experience.responses is None else experience.responses.copies
    divide = partial(split_rows, parts=parts)
    return rearranged(experience, partial(divide, together=together), divide)


def balanced(recipe: Recipe, experience: Experience) -> Experience:
    """With packing, the responses in an order in which the micro-batches have the fewest columns."""
    order = alike_in_parts(experience.responses, recipe.num_micro, recipe.pack_widths)
    if order is None or experience.responses is None:
        return experience
    mix = partial(reorder, order=order, together=experience.responses.copies)
    return rearranged(experience, mix, lambda rows: rows)


def rearranged(experience: Experience, move: Callable[[Any], Any], move_apart: Callable[[Any], Any]) -> Experience:
    """Apply ``move`` to arrays with the rows of the responses, ``move_apart`` to those inside a Rows."""
    one = lambda x: jax.tree.map(move_apart, x) if isinstance(x, Rows) else move(x)
    return jax.tree.map(one, experience, is_leaf=lambda x: isinstance(x, Rows))


def update_minibatch(recipe: Recipe, state: TrainState, minibatch: Experience) -> tuple[TrainState, dict[str, Mean]]:
    """One optimizer step of every role, and what the algorithm does after it: (state, metrics as Means).

    The update of a role is skipped, and its parameters and optimizer state stay bit for bit (but for the statistics of
    spike detection),
        - if no row contributes to its loss (no response of the minibatch has a score, say): Adam would still move the
          parameters by its old moments;
        - until its delay is over;
        - at a spike of its loss or gradient norm, if it has spike_sigmas: <role>/spikes counts it;
        - if a loss, a gradient or a new parameter of any role is not finite: update/not_finite counts it.
    """
    grads, means, losses = gradients(recipe, state, minibatch)
    params, opt_state, one = dict(state.params), dict(state.opt_state), jnp.float32(1)
    finite, learns, updated = [mean.total for mean in losses.values()], {}, {}
    for role, optimizer in recipe.optimizers.items():
        norm = optax.tree.norm(grads[role])
        means[f"{role}/grad_norm"] = Mean(norm, one)
        learns[role] = (losses[role].count > 0) & (state.step >= recipe.delays.get(role, 0))
        if role in recipe.spike_sigmas:
            seen = opt_state[role], losses[role].value(), norm, recipe.spike_sigmas[role], learns[role]
            spike, opt_state[role] = notice_spike(*seen)
            means[f"{role}/spikes"] = Mean(spike.astype(jnp.float32), one)
            learns[role] &= ~spike
        if role in recipe.schedules:
            rate = learning_rate(recipe.schedules[role], opt_state[role])
            means[f"{role}/learning_rate"] = Mean(jnp.where(learns[role], rate, 0.0), one)
        updated[role] = partial(apply_optimizer, optimizer, grads[role], norm, params[role], opt_state[role])
        new = updated[role]()[0]  # only for the check below, never stored: the cond computes it again, in place
        finite += [norm, *(jnp.where(learns[role], x, 0) for x in jax.tree.leaves(new))]
    fine = all_finite(finite)
    means["update/not_finite"] = Mean(1 - fine.astype(jnp.float32), one)
    for role, update in updated.items():
        old = (params[role], opt_state[role])
        # cond, not where: where would hold the old and the new parameters in memory together
        params[role], opt_state[role] = jax.lax.cond(learns[role] & fine, update, lambda old=old: old)
    state, after_update = state.replace(params=params, opt_state=opt_state), recipe.algorithm.after_update
    return (state if after_update is None else after_update(state, recipe.cfg)), means


def with_routers(
    recipe: Recipe, losses: dict[Role, Mean], means: dict[str, Mean], noted: Noted
) -> tuple[dict[Role, Mean], dict[str, Mean]]:
    """The losses with those of the routers of roles that learn, and the metrics with what was measured of them.

    A router's loss is that of the rows that are computed together, a micro-batch, as in other libraries: it is no mean
    over tokens. It has the weight of as many tokens (rows, pairs) as the role's own loss counts."""
    found: dict[Role, dict[str, Mean]] = {}
    for role, measured in noted:
        before = found.get(role)
        found[role] = measured if before is None else jax.tree.map(jnp.add, before, measured)
    for role, measured in found.items():
        if role not in losses:
            continue
        means = means | {f"{role}/{name}": mean for name, mean in measured.items()}
        own = losses[role]
        more = sum(weight * measured[name].value() for name, weight in recipe.router_losses.get(role, {}).items())
        losses = losses | {role: Mean(own.total + more * own.count, own.count)}
    return losses, means


def apply_optimizer(
    optimizer: optax.GradientTransformation, grads: Params, norm: Array, params: Params, opt_state: Any
) -> tuple[Params, Any]:
    """(parameters, optimizer state) after one step along ``grads``, whose norm is ``norm``."""
    updates, opt_state = optax.with_extra_args_support(optimizer).update(grads, opt_state, params, norm=norm)
    return optax.apply_updates(params, updates), opt_state


def gradients(
    recipe: Recipe, state: TrainState, minibatch: Experience
) -> tuple[dict[Role, Any], dict[str, Mean], dict[Role, Mean]]:
    """Differentiate the sum of all roles' loss totals over the minibatch, and divide the gradient of each role's
    parameters by that role's count: (gradients, metrics as Means, losses as Means).

    Micro-batches and devices add totals and counts, so their number changes rounding only."""

    def total(params, part):
        nets, noted = recipe.nets, []
        if nets.noting is not None:
            nets = nets._replace(read=nets.noting(noted))
        losses, means = recipe.algorithm.loss(nets, Trees(params, state.slow), part, recipe.cfg)
        losses, means = with_routers(recipe, losses, means, noted)
        return sum(mean.total for mean in losses.values()), (losses, means)

    def gradient(part):
        one = lambda rows: jax.grad(total, has_aux=True)(state.params, part.replace(responses=rows))
        return at_least_width(part.responses, recipe.pack_widths, one)

    if recipe.num_micro == 1:
        grads, (losses, means) = gradient(minibatch)
    else:
        parts = split(balanced(recipe, minibatch), recipe.num_micro)
        means_shape = jax.eval_shape(total, state.params, jax.tree.map(lambda x: x[0], parts))[1]
        nothing = jax.tree.map(jnp.zeros_like, (state.params, means_shape))
        add = lambda sums, part: (jax.tree.map(jnp.add, sums, gradient(part)), None)
        (grads, (losses, means)), _ = jax.lax.scan(add, nothing, parts)
    grads, losses, means = across((grads, losses, means))
    divide = lambda role: jax.tree.map(lambda g: g / jnp.maximum(losses[role].count, 1e-8), grads[role])
    return {role: divide(role) for role in recipe.optimizers}, means, losses
