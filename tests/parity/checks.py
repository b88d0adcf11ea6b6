"""What is compared with transformers. Each check fails with an AssertionError, or returns what it has shown, in a word.

They are run once a case; the tests call them one by one, and table.py collects what they return."""

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.models.families import FAMILIES
from jaxrlhf.models.files import hf_config, hf_layout, hf_weights
from jaxrlhf.models.parameters import Leaf, padded_vocab, parameter_table
from jaxrlhf.models.transformer import Runtime
from tests.parity.both import (
    compute,
    our_greedy,
    read,
    reload,
    same_weights,
    their_greedy,
    their_model,
    their_output,
    write_by_law,
)
from tests.parity.cases import COLUMNS, NEW_TOKENS, TOKENS, VALID, VOCAB, config_of, family_of
from tests.support.learning import dpo_loss

TOLERANCE = 1e-4  # on logits of size 1 to 10, float32
ROUGH = 0.02  # bfloat16: the mean difference of logits, in their standard deviations
# where transformers' own bfloat16 is further from its float32: by 3 to 4% in the cases of gated delta nets
# and by 6 to 26% where routers choose other experts too
# by 4% where a router's input is in bfloat16 too, which is float32 here
ROUGHER = {"qwen3_5_text": 0.04, "qwen3_5_moe_text": 0.06, "gemma4_text: experts": 0.05}
LN_2 = 1e-6  # the first loss of DPO, nats

ROOT = tempfile.TemporaryDirectory()


def scratch() -> Path:
    return Path(tempfile.mkdtemp(dir=ROOT.name))


@functools.cache
def saved(case: str, head: str = "lm"):
    """(their model, the folder that they wrote)."""
    model, folder = their_model(case, head), scratch()
    model.save_pretrained(folder, max_shard_size="20KB")
    return model, folder


def close(ours: np.ndarray, theirs: np.ndarray, at_least: float) -> None:
    """Within TOLERANCE, and large enough for that to say something."""
    assert np.abs(theirs).max() > at_least
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE, rtol=0)


@functools.cache
def logits(case: str) -> str:
    """Next-token logits of left-padded rows."""
    model, folder = saved(case)
    close(compute(*read(folder))[VALID], their_output(model)[VALID], 1)
    return f"{TOLERANCE:g}"


@functools.cache
def greedy(case: str) -> str:
    """The most likely tokens, one after the other, from left-padded prompts."""
    model, folder = saved(case)
    params, cfg, _ = read(folder)
    assert np.asarray(our_greedy(params, cfg).tokens[:, COLUMNS:]).tolist() == their_greedy(model).tolist()
    return f"{NEW_TOKENS} tokens"


@functools.cache
def files(case: str) -> str:
    """Their weights read and written by us, and ours by them, come back to the bit; ours compute the same there."""
    model, folder = saved(case)
    params, cfg, head = read(folder)
    ours = scratch()
    hf_weights.save(params, cfg, head, ours, max_shard_bytes=20_000)
    assert all(len(list(place.glob("*.safetensors"))) > 1 for place in (folder, ours))
    again = reload(model, ours)
    same_weights(model, again)
    # torch rounds grouped products by how tensors lie in memory: a model that it reloads differs from itself by that
    noise = 1e-5 if cfg.num_experts else 0.0
    np.testing.assert_allclose(their_output(again), their_output(model), atol=noise, rtol=0)

    rng = np.random.default_rng(3)
    draw = lambda leaf: jnp.asarray(0.2 * rng.normal(size=leaf.shape), jnp.float32)
    params = jax.tree.map(draw, parameter_table(cfg, head), is_leaf=lambda x: isinstance(x, Leaf))
    first, second = scratch(), scratch()
    hf_weights.save(params, cfg, head, first)
    model = reload(model, first)
    close(compute(params, cfg, head)[VALID], their_output(model)[VALID], 0.5)
    model.save_pretrained(second)
    loaded, *found = read(second)
    assert found == [cfg, head]
    for path, value in jax.tree_util.tree_leaves_with_path(params):
        cut = tuple(slice(VOCAB if size == padded_vocab(cfg) else None) for size in value.shape)  # files do not pad
        np.testing.assert_array_equal(hf_weights.leaf_at(loaded, hf_layout.dotted(path))[cut], value[cut])
    return "exact"


@functools.cache
def scores(case: str) -> str:
    """A classifier with one label, both ways. Our score's bias, which transformers lacks, comes back here; there it is
    in the last norm, where that has a bias."""
    torch = pytest.importorskip("torch")
    if "scalar" not in FAMILIES[family_of(case)].hf.classes:
        return "no such class"
    model, folder = saved(case, "scalar")
    params, cfg, head = read(folder)
    expected = their_output(model)
    close(compute(params, cfg, head)[:, -1], expected, 0.1)

    params["head"]["bias"] = params["head"]["bias"] + 0.3
    ours = scratch()
    hf_weights.save(params, cfg, head, ours, ids=hf_config.TokenIds(eos=(5, 6), pad=100))
    again, folded = reload(model, ours), 0.3 if "bias" in params["final_norm"] else 0.0
    if not folded:
        same_weights(model, again)
    np.testing.assert_allclose(their_output(again), expected + folded, atol=TOLERANCE, rtol=0)
    assert (again.config.num_labels, again.config.pad_token_id) == (1, 100)
    close(compute(*read(ours))[:, -1], expected + 0.3, 0.1)

    # as a user calls it: the last token that is not padding, padded on the right
    tokens = np.where(np.arange(COLUMNS) < VALID.sum(1)[:, None], np.minimum(TOKENS, 99), 100)
    with torch.no_grad():
        theirs = again(torch.tensor(tokens), attention_mask=torch.tensor((tokens != 100).astype(int))).logits[:, 0]
    mine = compute(params, cfg, head, tokens, tokens != 100)[np.arange(3), VALID.sum(1) - 1] - 0.3 + folded
    np.testing.assert_allclose(mine, theirs.numpy(), atol=TOLERANCE, rtol=0)
    return f"{TOLERANCE:g}"


@functools.cache
def decode(case: str) -> str:
    """Log-probs of tokens as they are generated, through the caches, and of the same rows read whole. No torch."""
    folder = scratch() / "model"
    write_by_law(folder, config_of(case, "lm"))
    params, cfg, head = read(folder)
    made = jax.tree.map(np.asarray, our_greedy(params, cfg))
    whole = np.asarray(jax.nn.log_softmax(compute(params, cfg, head, made.tokens, made.valid)))
    expected = np.take_along_axis(whole[:, COLUMNS - 1 : -1], made.tokens[:, COLUMNS:, None], axis=-1)[..., 0]
    assert expected.std() > 0.1
    np.testing.assert_allclose(made.logprobs[:, COLUMNS:], expected, atol=TOLERANCE, rtol=0)
    return f"{TOLERANCE:g}"


@functools.cache
def dpo(case: str) -> str:
    """The loss of DPO before its first update is ln 2, of a policy that has been moved another. No torch."""
    folder = scratch() / "model"
    write_by_law(folder, config_of(case, "lm"))
    params, cfg, _ = read(folder)
    loss = dpo_loss(cfg, params)
    assert abs(loss(params) - np.log(2)) < LN_2
    assert abs(loss(jax.tree.map(lambda x: 1.2 * x, params)) - np.log(2)) > 1e-3
    return f"ln 2 +- {LN_2:g}"


@functools.cache
def bfloat16(case: str) -> str:
    """Logits computed in bfloat16 by both from the same bfloat16 weights."""
    torch = pytest.importorskip("torch")
    model, folder = saved(case)
    exact = their_output(model)[VALID]
    theirs = their_output(their_model(case).to(torch.bfloat16))[VALID]
    ours = compute(*read(folder, jnp.bfloat16), runtime=Runtime(compute=jnp.bfloat16))[VALID]
    error = np.abs(ours - theirs).mean() / exact.std()
    bound = ROUGHER.get(case, ROUGHER.get(family_of(case), ROUGH))
    assert 1e-3 < error < bound  # 0 would not be bfloat16
    return f"{bound:.0%}"


CHECKS: dict[str, Callable[[str], str]] = {
    "logits": logits,
    "greedy": greedy,
    "files": files,
    "scores": scores,
    "decode": decode,
    "bfloat16": bfloat16,
    "dpo": dpo,
}
