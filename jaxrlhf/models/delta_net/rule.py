"""The gated delta rule (Yang et al. 2024, arXiv:2412.06464): attention with one state S [K, V] a head, in place of keys
and values of all tokens. Of token t, with a decay a_t = exp(g_t) and a rate b_t between 0 and 1:

    S_t = a_t S_(t-1) + b_t k_t (v_t - a_t S_(t-1)^T k_t)^T        o_t = S_t^T q_t

``step`` is this. ``scan_chunks`` computes chunks of columns by matrix products, and carries the state from one to the
next. Within a chunk, with D_t the sum of g from where the chunk (or the document, see below) begins up to t:

    u_t = b_t (v_t - exp(D_t) S^T k_t - sum over s < t of exp(D_t - D_s) (k_t . k_s) u_s)

S is the state before the chunk. So (1 + L) u = b (v - exp(D) k S), where L is strictly lower triangular.

A row may hold several documents. Each begins with a state of its own, and nothing of one enters another.
"""

import jax
import jax.numpy as jnp

from jaxrlhf.models.attention.products import head_axis
from jaxrlhf.sharding import spec, split_columns
from jaxrlhf.types import Array

CHUNK = 64  # columns, a power of 2; at most
TINY = 1e-6  # added to squared lengths that queries and keys are divided by the root of
NEVER = -1e30  # exp of it is 0, and so is its gradient
EXACT = jax.lax.Precision.HIGHEST  # of products whose rounding the triangular system would multiply


def of_length_one(x: Array) -> Array:
    """f32[..., K] of x, divided by its length."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt((x * x).sum(-1, keepdims=True) + TINY)


def step(state: Array, query: Array, key: Array, value: Array, decay: Array, rate: Array) -> tuple[Array, Array]:
    """One token of each row. All f32: state [..., N, K, V], query and key [..., N, K], value [..., N, V], decay (g) and
    rate (b) [..., N] -> (outputs [..., N, V], the new state)."""
    state = state * jnp.exp(decay)[..., None, None]
    known = jnp.einsum("...nkv,...nk->...nv", state, key)
    state = state + key[..., None] * ((value - known) * rate[..., None])[..., None, :]
    return jnp.einsum("...nkv,...nk->...nv", state, query), state


def scan_chunks(
    query: Array, key: Array, value: Array, decay: Array, rate: Array, index: Array, start: Array | None = None
) -> tuple[Array, Array]:
    """The rule over whole rows.

    Args:
        query, key: f32[B, S, N, K].
        value: f32[B, S, N, V].
        decay: f32[B, S, N], g: at most 0.
        rate: f32[B, S, N], b. With g = b = 0 a token leaves the state as it is.
        index: i32[B, S]: how many tokens of its document precede a token in its row; a document begins at each 0.
        start: f32[B, N, K, V]: the state that every document begins with; None: zeros.

    Returns:
        (outputs f32[B, S, N, V], the states behind the last column f32[B, N, K, V]).
    """
    rows, columns, heads, _ = key.shape
    size = min(CHUNK, 1 << (columns - 1).bit_length())
    count = -(-columns // size)

    def chunked(x: Array, fill: int = 0) -> Array:
        """[B, S, ...] -> [chunks, B, ..., C]; heads before columns, whose features stay last."""
        widen = ((0, 0), (0, count * size - columns), *((0, 0),) * (x.ndim - 2))
        x = split_columns(jnp.pad(x, widen, constant_values=fill), count, size)
        return jnp.moveaxis(jnp.moveaxis(x, 1, 0), 2, 3) if x.ndim > 3 else jnp.moveaxis(x, 1, 0)

    # columns behind the last go on with its document, and leave the state as it is
    parts = (*(chunked(x) for x in (query, key, value, decay, rate)), chunked(index, 1) == 0)
    layout = spec("batch", head_axis("heads", heads), "head_dim", "head_dim")
    zeros = jnp.zeros((rows, heads, key.shape[-1], value.shape[-1]), jnp.float32, out_sharding=layout)
    state = zeros if start is None else start
    one = jax.checkpoint(lambda state, part: chunk(state, start, *part), prevent_cse=False)
    state, out = jax.lax.scan(one, state, parts)
    out = jnp.moveaxis(jnp.moveaxis(out, 3, 2), 0, 1)  # [B, chunks, C, N, V]
    layout = spec("batch", "seq", head_axis("heads", heads), "head_dim")
    out = jax.lax.reshape(out, (rows, count * size, *out.shape[3:]), out_sharding=layout)
    return out[:, :columns], state


def chunk(
    state: Array,
    start: Array | None,
    query: Array,
    key: Array,
    value: Array,
    decay: Array,
    rate: Array,
    first: Array,
) -> tuple[Array, Array]:
    """One chunk: (the state behind it, outputs [B, N, C, V]). ``first`` bool[B, C]: where documents begin; the others
    are as in scan_chunks, with heads before the C columns."""
    document = jnp.cumsum(first.astype(jnp.int32), axis=1)  # 0: the one that goes on from the chunk before
    size = document.shape[1]
    causal = jnp.tril(jnp.ones((size, size), bool))
    within = (document[:, :, None] == document[:, None, :]) & causal
    total = jnp.einsum("bts,bns->bnt", within.astype(jnp.float32), decay, precision=EXACT)  # D
    between = jnp.exp(jnp.where(within[:, None], total[..., :, None] - total[..., None, :], NEVER))
    strict = jnp.where(~jnp.eye(size, dtype=bool), between, 0.0)
    products = jnp.einsum("bntk,bnsk->bnts", key, key, precision=EXACT)
    solve = inverse(strict * products * rate[..., None])
    goes_on = (document == 0)[:, None, :, None]
    decayed = jnp.exp(total)[..., None]

    def of_state(x: Array) -> Array:
        """What rows x [B, N, C, K] find in the state that their document had before this chunk, or begins with."""
        other = 0.0 if start is None else jnp.einsum("bnck,bnkv->bncv", x, start)
        return jnp.where(goes_on, jnp.einsum("bnck,bnkv->bncv", x, state), other)

    written = jnp.einsum("bnts,bnsv->bntv", solve, rate[..., None] * (value - of_state(decayed * key)), precision=EXACT)
    seen = jnp.einsum("bntk,bnsk->bnts", query, key) * between
    out = of_state(decayed * query) + jnp.einsum("bnts,bnsv->bntv", seen, written)

    last = document[:, -1:]
    left = jnp.exp(jnp.where((document == last)[:, None], total[..., -1:] - total, NEVER))  # of each token, at the end
    other = 0.0 if start is None else start
    before = jnp.where((last == 0)[:, :, None, None], state, other) * decayed[..., -1:, :]
    return before + jnp.einsum("bnck,bncv->bnkv", key * left[..., None], written), out


def inverse(lower: Array) -> Array:
    """(1 + L)^-1 of strictly lower triangular L [..., C, C], C a power of 2.

    Blocks of the diagonal are inverted, then pairs of them: [[A, 0], [B, D]] becomes [[A', 0], [-D' B A', D']]. That is
    as accurate as substitution, where the series of powers of L is not; it is products alone, on every device."""
    size = lower.shape[-1]
    places = jnp.arange(size)
    below = lambda width: (  # the B of all pairs of blocks so wide
        (places[:, None] // (2 * width) == places // (2 * width)) & (places[:, None] // width > places // width)
    )
    found = jnp.eye(size, dtype=lower.dtype) - jnp.where(below(1), lower, 0.0)
    width = 2
    while width < size:
        middle = jnp.einsum("...ij,...jk->...ik", jnp.where(below(width), lower, 0.0), found, precision=EXACT)
        found = found - jnp.einsum("...ij,...jk->...ik", found, middle, precision=EXACT)
        width *= 2
    return found
