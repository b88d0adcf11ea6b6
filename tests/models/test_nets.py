"""What networks answer about responses with gaps: tokens of an environment, which the policy did not choose."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.algorithms import sft
from jaxrlhf.models.heads import lm_logits
from jaxrlhf.models.nets import segments
from jaxrlhf.models.transformer import Runtime, forward
from jaxrlhf.types import Ask, Batch, Experience, Sequences, Trees
from tests.support import tiny


def with_gap() -> Sequences:
    """Rows of which the third and fourth response token are an environment's."""
    rows = tiny.sequences(rows=4)
    inside = jnp.arange(rows.tokens.shape[1])
    gap = (inside >= rows.response_start + 2) & (inside < rows.response_start + 4)
    return rows.replace(response_mask=rows.response_mask & ~gap)


def test_tokens_after_a_gap_are_predicted_from_what_is_in_it_and_a_loss_counts_none_of_it():
    rows, run = with_gap(), tiny.build("sft", None, batch=Batch(sequences=with_gap()))
    mask, everything = np.asarray(rows.response_mask), np.asarray(rows.valid)
    assert (everything & ~mask)[:, rows.response_start + 2 : rows.response_start + 4].any()

    @tiny.program
    def read(params, rows: Sequences):
        trees = Trees(params, {})
        (stats,) = run.recipe.nets.read(trees, rows, Ask("policy", "token_stats"))
        loss = sft.loss(run.recipe.nets, trees, Experience(responses=rows), sft.SFTConfig())[0]["policy"]
        hidden = forward(params["policy"], tiny.MODEL, rows.tokens, segments(rows), Runtime())
        return stats.logprobs, loss, jax.nn.log_softmax(lm_logits(params["policy"], tiny.MODEL, hidden))

    logprobs, loss, wide = read(run.state.params, rows)
    tokens = np.asarray(rows.tokens)
    expected = np.take_along_axis(np.asarray(wide)[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(np.asarray(logprobs)[:, 1:][mask[:, 1:]], expected[mask[:, 1:]], atol=1e-5)
    assert loss.count == mask.sum()
    np.testing.assert_allclose(loss.total, -expected[mask[:, 1:]].sum(), rtol=1e-5)
    # another token in the gap: what follows differs, what is before it does not, and the gap's own is not counted
    column = rows.response_start + 3
    other = rows.replace(tokens=rows.tokens.at[:, column].add(1))
    changed = np.asarray(read(run.state.params, other)[0]) != np.asarray(logprobs)
    assert not changed[:, :column].any()
    longest = int(mask.sum(1).argmax())
    assert changed[longest, column + 1 :][mask[longest, column + 1 :]].all()
    packed = read(run.state.params, rows.replace(width=6))[0]
    np.testing.assert_allclose(np.where(mask, packed, 0), np.where(mask, logprobs, 0), atol=1e-5)
