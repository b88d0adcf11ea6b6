"""Advantages and returns of response tokens, from rewards or from the scores of a group."""

from collections.abc import Mapping
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from jaxrlhf.ops import masked
from jaxrlhf.ops.rows import group_rows, ungroup_rows
from jaxrlhf.types import Array, Mean

GroupBaseline = Literal["mean_std", "mean", "leave_one_out", "none"]


def gae(
    rewards: Array, values: Array, mask: Array, *, gamma: float | Array, gae_lambda: float | Array
) -> tuple[Array, Array]:
    """Generalised advantage estimates, and the returns that the value model should predict.

    With t' the next position under the mask (observation tokens between two turns are stepped over, not discounted):

        delta_t  = r_t + gamma * V_t' - V_t                     V = 0 and A = 0 after the last one
        A_t      = delta_t + gamma * gae_lambda * A_t'
        return_t = A_t + V_t

    Args:
        rewards, values: [B, S]; values[:, t] is V before token t. What they hold outside the mask is ignored.
        mask: bool[B, S], the tokens that the policy chose.
        gamma: discount a token.
        gae_lambda: 1 sums all rewards, 0 is the one-step error; one number, or one a row, f32[B].

    Returns:
        (advantages, returns), both f32[B, S] and 0 outside the mask. The advantages are not whitened.

    Source: Schulman et al. 2016 (arXiv:1506.02438), equation 16.
    """
    assert rewards.shape == values.shape == mask.shape, (rewards.shape, values.shape, mask.shape)
    rewards, values = masked.keep(rewards, mask), masked.keep(values, mask)

    def backward(following, column):
        next_value, next_advantage = following
        reward, value, chosen = column
        delta = reward + gamma * next_value - value
        advantage = delta + gamma * gae_lambda * next_advantage
        # a column outside the mask hands on what it was given, so that the recursion skips it
        carried = jnp.where(chosen, value, next_value), jnp.where(chosen, advantage, next_advantage)
        return carried, jnp.where(chosen, advantage, 0.0)

    nothing = jnp.zeros_like(values[:, 0])
    columns = (rewards.swapaxes(0, 1), values.swapaxes(0, 1), mask.swapaxes(0, 1))
    _, advantages = jax.lax.scan(backward, (nothing, nothing), columns, reverse=True)
    advantages = advantages.swapaxes(0, 1)
    return advantages, advantages + values  # both are 0 outside the mask


def length_lambda(mask: Array, alpha: float) -> Array:
    """f32[B]: a ``gae_lambda`` for each row, nearer to 1 the longer its response is.

        gae_lambda = max(0, 1 - 1 / (alpha * l))        l: tokens under the mask

    The geometric weights of GAE then sum to alpha * l: a fixed share of a response, not a fixed number of its tokens.

    Args:
        mask: bool[B, S], the response tokens.
        alpha: more than 0; 0.05 in the source.

    Source: Yue et al. 2025 (arXiv:2504.05118), section 4.2.
    """
    length = jnp.maximum(jnp.sum(mask, axis=1, dtype=jnp.float32), 1.0)
    return jnp.maximum(1.0 - 1.0 / (alpha * length), 0.0)


def next_values(values: Array, mask: Array, last: Array) -> Array:
    """The value of the state that each token leads to.

    With t' the next position under the mask (observation tokens are stepped over, as in ``gae``):

        next_t = V_t'                  last after the last position

    Args:
        values: [B, S]; values[:, t] is V before token t. What it holds outside the mask is ignored.
        mask: bool[B, S], the tokens that were chosen.
        last: [B]: what follows the last of them: 0 where the sequence ended there.

    Returns:
        f32[B, S], 0 outside the mask.
    """
    assert values.shape == mask.shape, (values.shape, mask.shape)
    assert last.shape == mask.shape[:1], (last.shape, mask.shape)

    def backward(following, column):
        value, chosen = column
        return jnp.where(chosen, value, following), jnp.where(chosen, following, 0.0)

    columns = (masked.keep(values, mask).swapaxes(0, 1), mask.swapaxes(0, 1))
    _, found = jax.lax.scan(backward, last.astype(jnp.float32), columns, reverse=True)
    return found.swapaxes(0, 1)


def group_advantages(
    scores: Array, rows: Array, size: int, how: GroupBaseline, eps: float = 1e-6
) -> tuple[Array, Mean]:
    """Each response's score against those of the other responses to its prompt.

        mean_std       (score - mean of the group) / (standard deviation of the group + eps)   over n - 1
        mean           score - mean of the group
        leave_one_out  score - mean of the group's others
        none           score

    ``mean`` is (n - 1) / n times ``leave_one_out``, whose baseline does not depend on the response itself, so that the
    policy gradient stays unbiased. But for ``none``, a group whose scores are all equal tells nothing: its advantages
    are exactly 0, also where its mean is rounded. So are those of a response that is alone: there is nothing to compare
    it with (verl keeps its score as it is).

    Args:
        scores: [B], the ``size`` responses to a prompt contiguous.
        rows: bool[B], the real ones; what ``scores`` hold elsewhere is ignored, and n counts without it.
        eps: in units of score (mean_std).

    Returns:
        (advantages f32[B], 0 outside ``rows``; the share of groups that are told apart by nothing, of those that have
        a row).

    Raises:
        ValueError: for another ``how``.

    Source: mean_std: Shao et al. 2024 (arXiv:2402.03300), section 4.1.2; mean: Liu et al. 2025 (arXiv:2503.20783);
    leave_one_out: Kool et al. 2019; Ahmadian et al. 2024 (arXiv:2402.14740).
    """
    assert scores.shape == rows.shape, (scores.shape, rows.shape)
    assert len(scores) % size == 0, (scores.shape, size)
    if how not in get_args(GroupBaseline):
        raise ValueError(f"group baseline {how!r}: expected one of {', '.join(get_args(GroupBaseline))}")
    real = group_rows(rows, size)
    values = masked.keep(group_rows(scores, size), real)
    count = jnp.sum(real, axis=1, keepdims=True, dtype=jnp.float32)
    highest = jnp.max(jnp.where(real, values, -jnp.inf), axis=1, keepdims=True)
    lowest = jnp.min(jnp.where(real, values, jnp.inf), axis=1, keepdims=True)
    differ = highest > lowest
    equal = masked.sums(~differ[:, 0], count[:, 0] > 0)
    if how == "none":
        return ungroup_rows(values), equal
    centered = masked.keep(values - jnp.sum(values, axis=1, keepdims=True) / jnp.maximum(count, 1.0), real & differ)
    others = jnp.maximum(count - 1.0, 1.0)
    if how == "mean_std":
        variance = jnp.sum(jnp.square(centered), axis=1, keepdims=True) / others
        centered = centered / (jnp.sqrt(variance) + eps)
    elif how == "leave_one_out":
        centered = centered * count / others
    return ungroup_rows(centered), equal


def decoupled_advantages(
    grades: Mapping[str, Array],
    weights: Mapping[str, float],
    rows: Array,
    size: int,
    how: GroupBaseline,
    eps: float = 1e-6,
) -> tuple[Array, Mean]:
    """Each response's grades against those of the other responses to its prompt, each grader by itself.

        A_k = grades_k against the group, as ``group_advantages``         over the rows to which grader k gave a number
        A   = sum of weight_k * A_k
        A / (standard deviation of A over the batch + eps)                over n - 1

    A sum of grades of other scales than one would follow the widest alone; here each counts by its weight. The
    paper also subtracts the mean over the batch. That mean is 0, as is the mean of every A_k over its group, so nothing
    is subtracted here: the advantages of a group that no grader tells apart stay exactly 0.

    Args:
        grades: f32[B] by name of a grader, the ``size`` responses to a prompt contiguous; NaN: it gave no number.
        weights: of the graders that count.
        rows: bool[B], the real ones.
        how, eps: of group_advantages; not "none", which compares no group.

    Returns:
        (advantages f32[B], 0 outside ``rows``; the share of groups whose advantages are all 0, of those that have a
        row).

    Source: GDPO, Liu et al. 2026 (arXiv:2601.05242), equations 4 to 7.
    """
    total = jnp.zeros(rows.shape, jnp.float32)
    for name, weight in weights.items():
        found, _ = group_advantages(grades[name], rows & ~jnp.isnan(grades[name]), size, how, eps)
        total += weight * found
    advantages = total / (jnp.sqrt(masked.variance(total, rows, True)) + eps)
    apart = jnp.any(group_rows(total, size) != 0, axis=1)
    return advantages, masked.sums(~apart, jnp.any(group_rows(rows, size), axis=1))
