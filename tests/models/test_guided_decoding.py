"""Sampling from policy * exp(beta * Q): against the forward pass, greedily, and through the commands."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.generate.loop import next_logits, sample
from jaxrlhf.generate.sampler import Sampler
from jaxrlhf.models.config import ModelConfig, resolve
from jaxrlhf.models.heads import IMPOSSIBLE, lm_logits
from jaxrlhf.models.nets import segments
from jaxrlhf.models.transformer import Runtime, forward
from jaxrlhf.ops.sampling import Sampling
from jaxrlhf.sharding import MeshConfig, make_mesh
from tests.support import runs, tiny
from tests.support.flops import flops

MODEL = resolve(ModelConfig(vocab_size=50, hidden_size=16, num_layers=2, num_heads=2, mlp_size=32))
ROOM, EOS = 8, (1,)


def parameters(heads: int = 2) -> tuple[Any, tuple[Any, ...]]:
    """A policy, and heads with action values of size 1."""
    wide = lambda tree: jax.tree.map(lambda x: np.asarray(x) * 12, tree)
    return tiny.parameters(MODEL, "lm", 0), tuple(wide(tiny.parameters(MODEL, "action", 5 + n)) for n in range(heads))


def sampled(beta: float, sampling: Sampling, copies: int = 2, **more: Any):
    sampler = Sampler(sampling, ROOM, EOS, 0, samples_per_prompt=copies, beta=beta, **more)
    params, guides = parameters()
    prompts, zero = tiny.prompts(rows=8, vocab=50), jnp.int32(0)
    call = lambda params, guides: sample(params, MODEL, prompts, zero, zero, sampler, Runtime(), guides)
    return tiny.program(call)(params, guides)


@tiny.program
def forward_logits(params, guides, sequences):
    """Those of the policy and of each head, for whole rows."""
    hidden = forward(params, MODEL, sequences.tokens, segments(sequences), Runtime())
    return [lm_logits(tree, MODEL, hidden) for tree in (params, *guides)]


def guided_logits(sequences, beta: float) -> np.ndarray:
    """f64[B, S, 50]: log policy + beta * the lower Q, column t of the token after t, by the whole-row forward pass."""
    policy, *q = (np.asarray(x, np.float64)[..., :50] for x in forward_logits(*parameters(), sequences))
    return policy + beta * np.minimum(*q)


@pytest.mark.parametrize(
    ("beta", "sampling", "more"),
    [
        pytest.param(2.0, Sampling(eos_ids=EOS), {}, id="plain"),
        pytest.param(0.5, Sampling(0.7, eos_ids=EOS), {"halvings": 1}, id="halved", marks=pytest.mark.nightly),
    ],
)
def test_logprobs_are_of_the_guided_distribution(beta, sampling, more):
    found = jax.device_get(sampled(beta, sampling, **more))
    logits = guided_logits(found, beta) / sampling.temperature
    logprobs = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
    logprobs -= logits.max(-1, keepdims=True)
    for row, t in zip(*np.nonzero(found.response_mask)):
        assert float(found.logprobs[row, t]) == pytest.approx(logprobs[row, t - 1, found.tokens[row, t]], abs=2e-4)
    assert np.asarray(found.response_mask).sum() > 60
    plain = sampled(0.0, sampling, **more)
    assert not np.array_equal(plain.tokens, found.tokens)


def test_a_large_beta_is_greedy_by_q():
    found = jax.device_get(sampled(1e6, Sampling(temperature=0.0, eos_ids=EOS), copies=1))
    q = guided_logits(found, 1e6)
    for row, t in zip(*np.nonzero(found.response_mask)):
        assert int(found.tokens[row, t]) == q[row, t - 1].argmax()


@pytest.mark.nightly
def test_a_mesh_changes_nothing():
    alone = sampled(2.0, Sampling(eos_ids=EOS))
    with jax.set_mesh(make_mesh(MeshConfig(2, 2, 2))):
        found = sampled(2.0, Sampling(eos_ids=EOS))
    np.testing.assert_array_equal(found.tokens, alone.tokens)
    np.testing.assert_allclose(found.logprobs, alone.logprobs, atol=1e-5)


def test_padded_rows_of_the_vocabulary_stay_impossible():
    params, guides = parameters()
    logits = next_logits(params, guides, MODEL, jnp.ones((1, 1, 16)), 1e6)
    assert logits.shape[-1] == 64 and (logits[..., 50:] == IMPOSSIBLE).all() and (logits[..., :50] > IMPOSSIBLE).all()


def test_without_guides_nothing_more_is_computed():
    """FLOPs of the traced sampler: each head is a product more, none is none."""
    prompts, zero = tiny.prompts(rows=8, vocab=50), jnp.int32(0)

    def counted(guides, beta):
        sampler = Sampler(Sampling(eos_ids=EOS), ROOM, EOS, 0, samples_per_prompt=2, beta=beta)
        call = lambda params: sample(params, MODEL, prompts, zero, zero, sampler, Runtime(), guides)
        return flops(jax.make_jaxpr(call)(parameters()[0]))

    plain, guides = counted((), 0.0), parameters()[1]
    assert counted((), 2.0) == plain
    one, two = (counted(guides[:n], 2.0) - plain for n in (1, 2))
    assert 2 * 8 * 2 * 16 * 64 <= one == two / 2 < 2 * 8 * 2 * 16 * 64 * ROOM * 1.1


# ---- the commands ---------------------------------------------------------------------------------------------------

RUN = """
run_dir: {folder}/run
iterations: 2
algorithm: {{name: ilql}}
models:
  policy: {{architecture: {{hidden_size: 8, num_layers: 1, num_heads: 2, mlp_size: 16, max_positions: 64}}}}
  reference: {{init_from: policy}}
tokenizer: {{train_vocab_size: 300}}
optimizer: {{default: {{learning_rate: 1e-2}}}}
data:
  demonstrations: {{path: {text}/demonstrations.jsonl}}
  trajectories: {{path: {text}/trajectories.jsonl}}
  eval_trajectories: {{path: {text}/eval_trajectories.jsonl}}
  eval_prompts: {{path: {text}/eval_prompts.jsonl}}
  max_length: 32
  prompt_buckets: [8]
batch: {{trajectories_per_step: 8, prompts_per_step: 8}}
generate: {{max_new_tokens: 8, beta: 1e+6}}
eval: {{every: 2, size: 8}}
checkpoint: {{every: 2}}
"""


@pytest.mark.nightly  # by day: the log-probs of guided rows, above
def test_a_run_is_guided_in_its_evaluations_and_in_what_it_generates(root, tmp_path, command, one_device):
    from jaxrlhf.log.metric_names import find_metric

    config = tmp_path / "ilql.yaml"
    config.write_text(RUN.format(folder=tmp_path, text=runs.text(root)))
    command("train", config)
    written = {key for row in runs.rows(tmp_path / "run") for key in row} - {"step", "time"}
    assert {"loss/q2", "eval/value/above_q", "eval/response/length_mean"} <= written
    assert [key for key in written if find_metric(key) is None] == []
    state = runs.read_state(tmp_path / "run", 2)
    assert not np.allclose(state["params.q1/head/kernel"], state["params.q2/head/kernel"], atol=0.01)  # twins differ
    asked = ("generate", tmp_path / "run", "--prompt", "the film", "-n", 8, "--max-tokens", 8)
    assert command(*asked)[0] != command(*asked, "--beta", 1e6)[0]
    found = json.loads(command("evaluate", tmp_path / "run", "--json", "--beta", 0)[0])
    (*_, last) = (row for row in runs.rows(tmp_path / "run") if "eval/loss/q1" in row)
    assert found["after"]["loss/q1"] == pytest.approx(last["eval/loss/q1"], rel=1e-5)
    assert last["eval/kl/reference"] > 5 > found["after"]["kl/reference"]  # training's evaluation is guided
    assert abs(found["before"]["kl/reference"]) < 1e-4
    _, err = command("export", tmp_path / "run", "--role", "q1", "--to", tmp_path / "hf", code=2)
    assert "--role q1: action values, which no Hugging Face class holds; expected policy" in err
    command("export", tmp_path / "run", "--to", tmp_path / "hf")
    _, err = command("generate", tmp_path / "hf", "--prompt", "the film", "--beta", 4, code=2)
    assert "no action values in it to guide its policy; expected beta 0" in err
    _, err = command("train", config, "algorithm={name: bc}", f"run_dir={tmp_path}/bc", code=2)
    assert "generate.beta: 1000000.0: bc has no action values to guide it; expected 0" in err
