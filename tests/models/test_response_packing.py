"""Packed responses say what rows of their own say."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.models import response_packing
from jaxrlhf.models.attention.kernels import Hardware
from jaxrlhf.models.nets import make_nets
from jaxrlhf.models.transformer import Runtime
from jaxrlhf.ops.sampling import Sampling
from jaxrlhf.types import Ask, Sequences, Trees
from tests.models.test_transformer import GEMMA3, LLAMA, NET, NOPE, OSS, UNEVEN, weights
from tests.support import tiny

LENGTHS = [[2, 0, 3], [4, 1, 2]]  # of three responses to two prompts, of 4 tokens at most


def test_places():
    valid = np.arange(4) < np.array(LENGTHS)[..., None]
    where = response_packing.places(jnp.array(valid), 8)
    assert where.owner.tolist() == [[0, 0, 2, 2, 2, 3, 3, 3], [0, 0, 0, 0, 1, 2, 2, 3]]
    assert where.index.tolist() == [[0, 1, 0, 1, 2, 0, 0, 0], [0, 1, 2, 3, 0, 0, 1, 0]]
    tokens = jnp.arange(24).reshape(6, 4)
    together = response_packing.side_by_side(tokens, where)
    assert together[0, :5].tolist() == [0, 1, 8, 9, 10]
    assert together[1, :7].tolist() == [12, 13, 14, 15, 16, 20, 21]
    np.testing.assert_array_equal(
        response_packing.apart(together, where)[valid.reshape(6, 4)], tokens[valid.reshape(6, 4)]
    )


def test_a_full_row_has_no_column_left():
    where = response_packing.places(jnp.ones((1, 2, 3), bool), 6)
    assert where.owner.tolist() == [[0, 0, 0, 1, 1, 1]] and where.column.tolist() == [[[0, 1, 2], [3, 4, 5]]]


def rows_of(copies: int, start: int = 6, room: int = 5):
    """Two prompts with ``copies`` responses each, one of them empty and one full: (Sequences, their longest sum)."""
    rng = np.random.default_rng(3)
    lengths = rng.integers(1, room + 1, (2, copies))
    lengths[0, 0], lengths[1, -1] = 0, room
    columns = np.arange(start + room)
    mask = (columns >= start) & (columns < start + lengths.reshape(-1, 1))
    valid = mask | ((columns < start) & (columns >= np.repeat([4, 0], copies)[:, None]))
    tokens = rng.integers(3, 100, valid.shape).astype(np.int32)
    for group in range(2):
        tokens[group * copies : (group + 1) * copies, :start] = tokens[group * copies, :start]
    sequences = Sequences(jnp.array(tokens), jnp.array(valid), jnp.array(mask), response_start=start, copies=copies)
    return sequences, int(lengths.sum(1).max())


@pytest.mark.parametrize(
    ("cfg", "copies"),
    [(LLAMA, 1), *(pytest.param(cfg, 3, marks=pytest.mark.nightly) for cfg in (GEMMA3, NET, NOPE, OSS, UNEVEN))],
)
def test_packed_responses_say_what_their_rows_do(cfg, copies):
    """Log-probs, entropies, values and scores, and the gradients of them all; EOS is out of reach of first tokens, and
    a filter keeps the tokens that were sampled."""
    sequences, needed = rows_of(copies)
    sampling = Sampling(temperature=0.7, top_k=20, min_new_tokens=2, eos_ids=(1, 2))
    nets = make_nets({"policy": cfg, "value": cfg}, Runtime(), sampling, lambda *_: None)  # type: ignore[arg-type]
    params = weights(cfg)
    head = {"kernel": np.linspace(-1, 1, cfg.hidden_size, dtype=np.float32)[:, None], "bias": np.ones(1, np.float32)}
    trees = {"policy": params, "value": params | {"head": head}}
    mask, rng = sequences.response_mask, np.random.default_rng(5)
    size = 32 if cfg is UNEVEN else 1  # its gradients would be up to 31, of which float32 rounding takes 2.5e-4
    weigh = [rng.normal(size=mask.shape) / size for _ in range(3)] + [rng.normal(size=len(mask)) / size]

    def asked(trees, sequences):
        asks = Ask("policy", "token_stats"), Ask("value", "values"), Ask("value", "scores")
        stats, values, scores = nets.read(Trees(trees, {}), sequences, *asks)
        return [*(jnp.where(mask, x, 0) for x in (stats.logprobs, stats.entropy, values)), scores]

    def total(trees, sequences):
        found = asked(trees, sequences)
        return sum((x * weight).sum() for x, weight in zip(found, weigh, strict=True)), found

    found = []
    for width in (None, needed + 1):
        rows = dataclasses.replace(sequences, width=width)
        found.append(tiny.program(jax.grad(total, has_aux=True))(trees, rows))
    compare = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=2e-5)
    jax.tree.map(compare, *found)
    assert all(float(jnp.abs(x).max()) > 0.1 for x in found[0][1])


def test_splash_says_that_it_can_not():
    sequences, needed = rows_of(3)
    runtime = Runtime(hardware=Hardware("tpu"))
    nets = make_nets({"policy": LLAMA}, runtime, Sampling(), lambda *_: None)  # type: ignore[arg-type]
    rows, ask = dataclasses.replace(sequences, width=needed), Ask("policy", "token_stats")
    with pytest.raises(ValueError, match=r"^batch.pack_widths: splash attention can't compute packed .*: 1\n"):
        jax.eval_shape(lambda trees: nets.read(trees, rows, ask), Trees({"policy": weights(LLAMA)}, {}))
