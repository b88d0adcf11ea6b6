"""Divergences of next-token distributions: hand-worked numbers, a loop in float64, published formulas, gradients, and
what a compiled program stores of two models' logits."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.models.heads import lm_logits
from jaxrlhf.ops.divergence import divergence_stats
from jaxrlhf.ops.logprobs import in_chunks
from jaxrlhf.types import Divergence
from tests.support import tiny

KINDS = ("reverse_kl", "forward_kl", "jsd")
VOCAB = 40
EVERY = [
    *(Divergence(kind, beta=0.3) for kind in KINDS),
    *(Divergence(kind, 0.3, top_k=5, tail=tail) for kind in KINDS for tail in ("bucket", "drop")),
    Divergence("jsd", 0.8, temperature=2.0),
]
# by day: an unequal weight of both sides, and a tail
OFTEN = (Divergence("forward_kl", 0.3), Divergence("jsd", 0.3, top_k=5))
SOME = [
    pytest.param(how, id="-".join(map(str, how)), marks=[] if how in OFTEN else pytest.mark.nightly) for how in EVERY
]


def draw(shape=(3, 4), seed: int = 0, scale: float = 2.0) -> tuple[jax.Array, jax.Array]:
    """Logits of a student and of a teacher, [*shape, VOCAB]."""
    rng = np.random.default_rng(seed)
    ours, theirs = rng.normal(0, scale, (2, *shape, VOCAB)).astype(np.float32)
    return jnp.array(ours), jnp.array(theirs)


# ---- oracles --------------------------------------------------------------------------------------------------------


def kl(p: np.ndarray, q: np.ndarray) -> float:
    return float(sum(a * math.log(a / b) for a, b in zip(p, q) if a > 0))


def by_loop(ours: np.ndarray, theirs: np.ndarray, how: Divergence) -> float:
    """Of one token, in float64, from the definition: Q the student, P the teacher."""
    q, p = (np.exp(x.astype(np.float64) / how.temperature) for x in (ours, theirs))
    q, p = q / q.sum(), p / p.sum()
    if how.top_k:
        kept = np.argsort(-p)[: how.top_k]
        rest = [[1 - x[kept].sum()] if how.tail == "bucket" else [] for x in (q, p)]
        q, p = (np.concatenate([x[kept], more]) for x, more in zip((q, p), rest))
        q, p = q / q.sum(), p / p.sum()
    if how.kind == "reverse_kl":
        return kl(q, p)
    if how.kind == "forward_kl":
        return kl(p, q)
    mixture = how.beta * p + (1 - how.beta) * q
    return how.beta * kl(p, mixture) + (1 - how.beta) * kl(q, mixture)


def test_two_tokens_by_hand():
    """Q = (3/4, 1/4), P = (1/2, 1/2)."""
    logits = jnp.log(jnp.array([3 / 4, 1 / 4])), jnp.log(jnp.array([1 / 2, 1 / 2]))
    found = {kind: divergence_stats(*logits, Divergence(kind)) for kind in KINDS}
    np.testing.assert_allclose(found["reverse_kl"].divergence, 0.75 * math.log(1.5) + 0.25 * math.log(0.5), rtol=1e-6)
    np.testing.assert_allclose(found["forward_kl"].divergence, 0.5 * math.log(2 / 3) + 0.5 * math.log(2), rtol=1e-6)
    # M = (5/8, 3/8): half of KL(P || M) and half of KL(Q || M)
    of_p = 0.5 * math.log(0.8) + 0.5 * math.log(4 / 3)
    of_q = 0.75 * math.log(1.2) + 0.25 * math.log(2 / 3)
    np.testing.assert_allclose(found["jsd"].divergence, (of_p + of_q) / 2, rtol=1e-5)
    np.testing.assert_allclose(found["jsd"].against_entropy, math.log(2), rtol=1e-6)
    np.testing.assert_allclose(found["jsd"].entropy, -0.75 * math.log(0.75) - 0.25 * math.log(0.25), rtol=1e-6)


@pytest.mark.parametrize("how", EVERY, ids=lambda how: "-".join(map(str, how)))
def test_it_is_a_loop_over_the_definition(how):
    ours, theirs = draw()
    found = np.asarray(divergence_stats(ours, theirs, how).divergence)
    for where in np.ndindex(found.shape):
        expected = by_loop(np.asarray(ours[where]), np.asarray(theirs[where]), how)
        np.testing.assert_allclose(found[where], expected, rtol=2e-5, atol=1e-7)
    assert found.min() > 1e-3


@pytest.mark.torch
@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_the_jsd_is_that_of_gkd_as_torch_computes_it(beta):
    """TRL's GKDTrainer: torch's kl_div of the mixture's log-probs; its beta of 0 and 1 are forward and reverse KL."""
    torch = pytest.importorskip("torch")
    ours, theirs = draw()
    student, teacher = (torch.log_softmax(torch.tensor(np.asarray(x)), -1) for x in (ours, theirs))
    div = lambda log_q, log_p: torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    mixture = torch.logaddexp(student + math.log1p(-beta), teacher + math.log(beta))
    expected = {
        Divergence("jsd", beta): beta * div(mixture, teacher) + (1 - beta) * div(mixture, student),
        Divergence("forward_kl"): div(student, teacher),
        Divergence("reverse_kl"): div(teacher, student),
    }
    for how, value in expected.items():
        np.testing.assert_allclose(divergence_stats(ours, theirs, how).divergence, value.numpy(), rtol=2e-5, atol=1e-6)


def test_the_jsd_goes_to_the_kl_at_both_ends():
    ours, theirs = draw(scale=1.0)
    of = lambda *how: np.asarray(divergence_stats(ours, theirs, Divergence(*how)).divergence)
    small = 1e-3
    np.testing.assert_allclose(of("jsd", small) / small, of("forward_kl"), rtol=0.02)
    np.testing.assert_allclose(of("jsd", 1 - small) / small, of("reverse_kl"), rtol=0.02)
    swapped = divergence_stats(theirs, ours, Divergence("jsd", 0.7)).divergence
    np.testing.assert_allclose(of("jsd", 0.3), swapped, rtol=1e-4)


# ---- the vocabulary -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_bucket_never_adds_and_all_tokens_are_the_whole(kind):
    """Merging outcomes loses information: data processing."""
    ours, theirs = draw()
    of = lambda **how: np.asarray(divergence_stats(ours, theirs, Divergence(kind, **how)).divergence)
    whole = of()
    rising = [of(top_k=k) for k in (1, 3, 10, VOCAB - 1)]
    assert all((low <= high + 1e-6).all() for low, high in zip(rising, [*rising[1:], whole]))
    assert (rising[0] < whole - 1e-3).any()
    for tail in ("bucket", "drop"):
        np.testing.assert_allclose(of(top_k=VOCAB, tail=tail), whole, rtol=1e-5)
        np.testing.assert_allclose(of(top_k=10 * VOCAB, tail=tail), whole, rtol=1e-5)
    assert np.abs(of(top_k=1, tail="drop")).max() < 1e-6, "one outcome is certain"


def test_the_mass_is_what_the_teacher_gives_to_its_tokens():
    ours, theirs = draw()
    p = np.sort(np.asarray(jax.nn.softmax(theirs)), -1)[..., ::-1]
    found = divergence_stats(ours, theirs, Divergence(top_k=3)).against_mass
    np.testing.assert_allclose(found, p[..., :3].sum(-1), rtol=1e-5)
    assert (divergence_stats(ours, theirs, Divergence()).against_mass == 1).all()


@pytest.mark.parametrize("how", SOME)
def test_padded_tokens_and_a_shift_change_nothing(how):
    """Rows that pad the vocabulary have logits of -1e30."""
    ours, theirs = draw()
    pad = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, 7)), constant_values=-1e30)

    def of(ours, theirs):
        loss = lambda x: divergence_stats(x, theirs, how).divergence.sum()
        return divergence_stats(ours, theirs, how), jax.grad(loss)(ours)

    (plain, slope), (padded, padded_slope) = of(ours, theirs), of(pad(ours), pad(theirs))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), plain, padded)
    np.testing.assert_allclose(padded_slope, jnp.pad(slope, ((0, 0), (0, 0), (0, 7))), atol=1e-6)
    shifted, _ = of(ours + 3.0, theirs - 5.0)
    np.testing.assert_allclose(shifted.divergence, plain.divergence, rtol=1e-4, atol=1e-5)


# ---- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", EVERY, ids=lambda how: "-".join(map(str, how)))
def test_it_is_nothing_at_the_teacher_and_so_is_its_gradient(how):
    _, theirs = draw()
    value, slope = jax.value_and_grad(lambda x: divergence_stats(x, theirs, how).divergence.sum())(theirs)
    assert abs(float(value)) < 1e-5 and float(jnp.abs(slope).max()) < 1e-6


def test_gradients_of_both_kl_by_hand():
    """d KL(P || Q) / d logits = Q - P;  d KL(Q || P) / d logits = Q (log(Q / P) - KL)."""
    ours, theirs = draw()
    q, p = jax.nn.softmax(ours), jax.nn.softmax(theirs)
    slope = lambda kind: jax.grad(lambda x: divergence_stats(x, theirs, Divergence(kind)).divergence.sum())(ours)
    ratio = jnp.log(q / p)
    np.testing.assert_allclose(slope("forward_kl"), q - p, atol=1e-6)
    np.testing.assert_allclose(slope("reverse_kl"), q * (ratio - (q * ratio).sum(-1, keepdims=True)), atol=1e-6)


def test_no_gradient_reaches_the_teacher_or_comes_from_an_entropy():
    ours, theirs = draw()
    for how in EVERY:
        slope = jax.grad(lambda x, how=how: divergence_stats(ours, x, how).divergence.sum())(theirs)
        assert (slope == 0).all()
    every = lambda x: divergence_stats(x, theirs, Divergence())
    assert (jax.grad(lambda x: (every(x).entropy + every(x).against_entropy).sum())(ours) == 0).all()


# ---- two models, in chunks ------------------------------------------------------------------------------------------

ROWS, COLUMNS, WIDE, NARROW, TOKENS = 4, 64, 24, 16, 2048
PAIR = (
    dataclasses.replace(tiny.MODEL, hidden_size=NARROW, vocab_size=TOKENS),
    dataclasses.replace(tiny.MODEL, hidden_size=WIDE, vocab_size=TOKENS),
)


def read_pair(stored: int, how: Divergence):
    """(hidden states of both models, heads) -> (the mean divergence, its gradient with respect to the student's)."""
    tokens = jnp.zeros((ROWS, COLUMNS), jnp.int32)

    def mean(states, head, their_states, their_head):
        def logits_of(hidden, columns):
            heads = ({"head": {"kernel": one}} for one in (head, their_head))
            return [lm_logits(one, cfg, x) for one, cfg, x in zip(heads, PAIR, hidden)]

        reduce = lambda logits, tokens: divergence_stats(logits[0], logits[1], how)
        return in_chunks(reduce, [states, their_states], tokens, logits_of, 2 * TOKENS, stored).divergence.mean()

    return jax.value_and_grad(mean, argnums=(0, 1))


def pair_of_states() -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(0)
    shapes = (ROWS, COLUMNS, NARROW), (NARROW, TOKENS), (ROWS, COLUMNS, WIDE), (WIDE, TOKENS)
    return tuple(jnp.array(rng.normal(0, 0.5, shape), jnp.float32) for shape in shapes)


@pytest.mark.parametrize("how", [Divergence("jsd", 0.3), Divergence(top_k=5)], ids=str)
def test_chunks_change_neither_the_divergence_nor_its_gradient(how):
    given = pair_of_states()
    whole, chunked = (tiny.program(read_pair(stored, how))(*given) for stored in (10**9, 2 * TOKENS * ROWS * 9))
    np.testing.assert_allclose(chunked[0], whole[0], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-5), chunked[1], whole[1])
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(whole[1])) > 1e-5


def test_the_compiled_program_stores_no_logits_of_a_whole_batch():
    """Its temporaries with chunks are a fraction of one [B, S, V]; without them more than two."""
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in pair_of_states()]

    def temporaries(stored: int) -> int:
        memory = jax.jit(read_pair(stored, Divergence())).lower(*shapes).compile().memory_analysis()
        return memory.temp_size_in_bytes

    one = ROWS * COLUMNS * TOKENS * 4
    chunked, whole = temporaries(2 * TOKENS * ROWS * 4), temporaries(10**9)
    print(f"\ntemporaries: {chunked / one:.2f} of [B, S, V] in chunks, {whole / one:.2f} without")
    assert chunked < 0.6 * one and whole > 2 * one
