"""The sampler against the whole-row forward pass, NumPy oracles of the distribution, and the law of its noise."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxrlhf import sharding
from jaxrlhf.benchmarks.rows import countdown
from jaxrlhf.generate.loop import sample
from jaxrlhf.generate.sampler import Sampler
from jaxrlhf.generate.stop_texts import stop_automaton
from jaxrlhf.models import cpu
from jaxrlhf.models.attention.kernels import Hardware
from jaxrlhf.models.config import ModelConfig, resolve
from jaxrlhf.models.cpu import prompts_abreast
from jaxrlhf.models.heads import lm_logits
from jaxrlhf.models.int8 import quantized
from jaxrlhf.models.nets import make_nets
from jaxrlhf.models.parameters import Leaf, inputs, parameter_table, weight_spec
from jaxrlhf.models.transformer import Runtime, forward
from jaxrlhf.ops.sampling import IMPOSSIBLE, Sampling, choose, support, uniform_noise
from jaxrlhf.sharding import MeshConfig
from jaxrlhf.types import Ask, Prompts, Trees
from tests.support.tiny import wide

CONFIGS = {
    "llama": resolve(
        ModelConfig(vocab_size=101, hidden_size=32, num_kv_heads=2, head_dim=16, mlp_size=48, max_positions=64)
    ),
    # local and global layers, soft-caps, norms on all sides; most responses are longer than the window
    "gemma3_text": resolve(
        ModelConfig(
            family="gemma3_text",
            vocab_size=101,
            hidden_size=32,
            num_kv_heads=2,
            mlp_size=48,
            sliding_window=4,
            layer_types=("local", "global"),
            local_rope_theta=50.0,
            attention_softcap=2.0,
            logit_softcap=5.0,
        )
    ),
    "qwen3_5_text": resolve(
        ModelConfig(
            family="qwen3_5_text",
            vocab_size=101,
            hidden_size=32,
            num_kv_heads=2,
            mlp_size=48,
            layer_types=("linear", "global"),
            linear_key_heads=2,
            linear_value_heads=4,
            norm_eps=1e-2,
        )
    ),
    # the last two of four layers read keys and values of the first two, whose heads differ
    "gemma4_text": resolve(
        ModelConfig(
            family="gemma4_text",
            vocab_size=101,
            hidden_size=32,
            num_layers=4,
            num_kv_heads=2,
            mlp_size=48,
            head_dim=8,
            global_head_dim=16,
            global_kv_heads=1,
            keys_are_values=True,
            shared_kv_layers=2,
            per_layer_size=8,
            sliding_window=4,
            layer_types=("local", "global") * 2,
            logit_softcap=5.0,
            norm_eps=1e-2,
        )
    ),
    "gpt2": resolve(ModelConfig(family="gpt2", vocab_size=101, hidden_size=32, mlp_size=48, max_positions=64)),
    "gpt_oss": resolve(
        ModelConfig(
            family="gpt_oss",
            vocab_size=101,
            hidden_size=32,
            num_kv_heads=2,
            mlp_size=48,
            sliding_window=4,
            num_experts=4,
        )
    ),
}
PROMPT, NEW = 6, 16  # columns
LENGTHS = np.array([6, 3, 5, 1, 6, 2, 4, 6])  # of the eight prompts
EOS = (3, 17, 40, 58)
PIECES = [bytes([97 + i % 5]) + b"-" * (i % 3) for i in range(101)]  # texts of the tokens: a, b-, c--, d, ...
STOPS = ("aa", "b--")  # one is two tokens; the other is one, or the beginning of none
SHAPED = Sampling(temperature=0.7, top_k=30, top_p=0.9, min_new_tokens=3, eos_ids=EOS)
SAMPLERS = {
    "plain": Sampler(Sampling(eos_ids=EOS), NEW, EOS, pad_id=0),
    "shaped": Sampler(SHAPED, NEW, EOS, 0, tuple(stop_automaton(text, PIECES, 128) for text in STOPS), 2),
}
SAMPLERS["pad is eos"] = SAMPLERS["shaped"]._replace(samples_per_prompt=1, pad_id=EOS[0])
LIMITS = np.array([4, 16, 1, 7, 99, 2, 16, 3], np.int32)  # of the responses to the eight prompts
SAMPLERS["limited"] = SAMPLERS["plain"]._replace(stops=(countdown(LIMITS),))
FEW_LAST = np.stack([np.roll([16, 9, 4, 2, 1, 12], shift) for shift in range(8)]).reshape(-1).astype(np.int32)
SAMPLERS["six"] = SAMPLERS["shaped"]._replace(samples_per_prompt=6)
SAMPLERS["six"] = SAMPLERS["six"]._replace(stops=(*SAMPLERS["six"].stops, countdown(FEW_LAST)))
SAMPLERS["halved"] = SAMPLERS["six"]._replace(halvings=4)  # 6, 3, 1; 4 and 2 of the eight prompts
SAMPLERS["limited, halved"] = SAMPLERS["limited"]._replace(halvings=9)  # 8, 4, 2, 1 and, there being no half of it, 1
FLOAT32, BFLOAT16 = Runtime(), Runtime(compute=jnp.bfloat16)
NIGHTLY = functools.partial(pytest.param, marks=pytest.mark.nightly)


@functools.cache
def weights(model):
    """Random, with logits of size 1, and norms, biases and positions that do something."""
    rng = np.random.default_rng(3)

    def one(path, leaf):
        deviation = {"embedding": 0.25, "kernel": leaf.init, "taps": leaf.init}.get(path[-1].key, 0.1)
        return ((leaf.init == "ones") + deviation * rng.normal(size=leaf.shape)).astype(np.float32)

    table = parameter_table(CONFIGS[model], "lm")
    return jax.tree_util.tree_map_with_path(one, table, is_leaf=lambda x: isinstance(x, Leaf))


def make_prompts(columns=PROMPT, filler=0) -> Prompts:
    """The eight prompts, left-padded to ``columns`` with ``filler``."""
    rng = np.random.default_rng(1)
    tokens, valid = np.full((8, columns), filler), np.zeros((8, columns), bool)
    for row, length in enumerate(LENGTHS):
        tokens[row, columns - length :], valid[row, columns - length :] = rng.integers(0, 101, length), True
    return Prompts(tokens.astype(np.int32), valid, np.arange(8, dtype=np.int32) + 100)  # pyright: ignore[reportArgumentType]


def one_a_prompt(prompts) -> Prompts:
    """Sixteen prompts, each to be sampled once, in place of eight that are sampled twice."""
    rows = np.repeat(np.arange(8), 2)
    tokens, valid, ids = (np.asarray(x)[rows] for x in (prompts.tokens, prompts.valid, prompts.sample_id))
    return Prompts(tokens, valid, 2 * ids + np.arange(16, dtype=np.int32) % 2)  # pyright: ignore[reportArgumentType]


@functools.cache
def sampling_program(model, name, runtime=FLOAT32):
    """jit of sample(params, prompts, seed, step)."""
    cfg, sampler = CONFIGS[model], SAMPLERS[name]
    return jax.jit(lambda params, prompts, seed, step: sample(params, cfg, prompts, seed, step, sampler, runtime))


@functools.cache
def forward_program(model, name, runtime=FLOAT32):
    """jit of the whole-row TokenStats under the same shaping, as the trainer computes them."""
    nets = make_nets({"policy": CONFIGS[model]}, runtime, SAMPLERS[name].sampling, lambda *_: None)  # pyright: ignore[reportArgumentType]
    ask = Ask("policy", "token_stats")
    return jax.jit(lambda params, sequences: nets.read(Trees({"policy": params}, {}), sequences, ask)[0])


def draw(model, name, prompts=None, seed=5, step=2, runtime=FLOAT32) -> Any:
    """Sequences of NumPy arrays."""
    program = sampling_program(model, name, runtime)
    prompts = make_prompts() if prompts is None else prompts
    return jax.tree.map(np.asarray, program(weights(model), prompts, jnp.int32(seed), jnp.int32(step)))


def responses(sequences):
    """The tokens of every response, as lists."""
    return [row[mask].tolist() for row, mask in zip(sequences.tokens, sequences.response_mask)]


def same_samples(one, other):
    """Equal tokens and masks after the prompt, log-probs to rounding."""
    assert responses(one) == responses(other)
    np.testing.assert_array_equal(one.ended, other.ended)
    np.testing.assert_array_equal(one.response_mask[:, -NEW:], other.response_mask[:, -NEW:])
    np.testing.assert_allclose(one.logprobs[:, -NEW:], other.logprobs[:, -NEW:], atol=1e-5)


MODELS = [
    ("llama", "plain"),
    ("llama", "shaped"),
    ("gpt2", "shaped"),
    ("gemma3_text", "shaped"),
    ("qwen3_5_text", "shaped"),
    ("gpt_oss", "shaped"),
    ("gemma4_text", "shaped"),
]

# ---- the sampler and the trainer agree ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model, name",
    [pytest.param(*case, marks=pytest.mark.nightly if case[0] == "gpt2" else []) for case in MODELS],
)
def test_decode_logprobs_equal_full_forward_logprobs(model, name):
    """Left padding, temperature, top-k, top-p, min_new_tokens, stop texts, four EOS ids, two samples a prompt."""
    sequences = draw(model, name)
    whole = np.asarray(forward_program(model, name)(weights(model), sequences).logprobs)
    mask = sequences.response_mask
    assert mask.sum() > 60 and sequences.logprobs[mask].std() > 0.3
    np.testing.assert_allclose(sequences.logprobs[mask], whole[mask], atol=1e-4)


def test_bfloat16_decode_is_near_full_forward():
    """In bfloat16 the two orders of summation differ: by 0.01 nats per token on average, and 0.1 at most."""
    sequences = draw("llama", "plain", runtime=BFLOAT16)
    mask = sequences.response_mask
    whole = np.asarray(forward_program("llama", "plain", BFLOAT16)(weights("llama"), sequences).logprobs)
    exact = np.asarray(forward_program("llama", "plain")(weights("llama"), sequences).logprobs)
    assert np.abs(sequences.logprobs - whole)[mask].mean() < 0.01
    assert np.abs(sequences.logprobs - whole)[mask].max() < 0.1
    assert 1e-4 < np.abs(sequences.logprobs - exact)[mask].mean() < 0.03


def dequantized(params):
    """``params`` of tied embeddings as decoding reads them where weights are int8: the same numbers, wide."""

    def one(path, leaf, x):
        if path[-1].key != "kernel":
            return x
        layers = int(leaf.axes[0] == "layers")
        return wide(quantized(x, tuple(range(layers, layers + inputs(leaf.axes[layers:])))))

    table = parameter_table(CONFIGS["llama"], "lm")
    found = jax.tree_util.tree_map_with_path(one, table, params, is_leaf=lambda x: isinstance(x, Leaf))
    return found | {"head": {"kernel": wide(quantized(params["embed"]["tokens"]["embedding"], (1,))).T}}


@pytest.mark.nightly  # by day: a linear map in 8 bits, in test_int8
def test_int8_weights_are_what_their_scales_make_of_them():
    """Log-probs are those of a full pass over the weights that 8 bits stand for, and near those of the real ones."""
    runtime = FLOAT32._replace(int8=("weights",))
    sequences = draw("llama", "shaped", runtime=runtime)
    mask = sequences.response_mask
    exact = np.asarray(forward_program("llama", "shaped")(weights("llama"), sequences).logprobs)
    same = forward_program("llama", "shaped")(dequantized(weights("llama")), sequences).logprobs
    np.testing.assert_allclose(sequences.logprobs[mask], np.asarray(same)[mask], atol=1e-4)
    assert 1e-3 < np.abs(sequences.logprobs - exact)[mask].mean() < 0.05


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("llama", "plain"),
        ("llama", "shaped"),
        *(NIGHTLY(*case) for case in (("llama", "halved"), ("gpt_oss", "shaped"))),
    ],
)
def test_an_int8_cache_is_near_full_forward(model, name):
    """Of one response to a prompt (on CPUs two prompts stand abreast), of two, and of fewer and fewer; with a
    scale for each token and head the log-probs differ by 0.02 nats per token on average, and 0.3 at most."""
    sequences = draw(model, name, runtime=FLOAT32._replace(int8=("cache",)))
    mask = sequences.response_mask
    exact = np.asarray(forward_program(model, name)(weights(model), sequences).logprobs)
    error = np.abs(sequences.logprobs - exact)[mask]
    assert 1e-4 < error.mean() < 0.02 and error.max() < 0.3


@pytest.mark.nightly
def test_int8_on_a_mesh_equals_one_device():
    runtime = FLOAT32._replace(int8=("weights", "cache"))
    for name in ("plain", "shaped"):
        alone, many = draw("llama", name, runtime=runtime), draw_on_mesh(name, MeshConfig(2, 2, 2), runtime)
        # a number at the middle between two steps may be rounded to either side
        same = [one == other for one, other in zip(responses(alone), responses(many))]
        assert np.mean(same) > 0.8
        rows = np.flatnonzero(same)
        np.testing.assert_allclose(alone.logprobs[rows], many.logprobs[rows], atol=0.02)


def kept_by_sorting(logits, top_k, top_p):
    """bool[V]: top-k, then the fewest most likely tokens of what is left with top_p of its mass."""
    order = np.argsort(-logits, kind="stable")
    kept = np.ones(len(logits), bool)
    if top_k:
        kept = logits >= logits[order[min(top_k, len(order)) - 1]]
    if top_p < 1:
        mass = np.where(kept, np.exp(logits - logits.max()), 0)
        before = np.cumsum(mass[order]) - mass[order]
        last = order[np.flatnonzero(before < top_p * mass.sum())[-1]]
        kept &= logits >= logits[last]
    return kept


def test_logprobs_are_of_the_distribution_sampled_from():
    """A NumPy loop over tokens: EOS banned at first, temperature, top-k, top-p, renormalised."""
    cfg, sequences = CONFIGS["llama"], draw("llama", "shaped")

    @jax.jit
    def whole(params, tokens, valid):
        return lm_logits(params, cfg, forward(params, cfg, tokens, valid.astype(jnp.int32), FLOAT32))

    logits = np.asarray(whole(weights("llama"), sequences.tokens, sequences.valid), np.float64)
    for row, column in zip(*np.nonzero(sequences.response_mask)):
        shaped = logits[row, column - 1, :101] / SHAPED.temperature
        if column - PROMPT < SHAPED.min_new_tokens:
            shaped[list(EOS)] = IMPOSSIBLE
        kept = kept_by_sorting(shaped, SHAPED.top_k, SHAPED.top_p)
        token = sequences.tokens[row, column]
        assert kept[token]
        expected = shaped[token] - np.log(np.exp(shaped[kept]).sum())
        assert abs(sequences.logprobs[row, column] - expected) < 1e-4


# ---- when a response ends -------------------------------------------------------------------------------------------


def test_endings():
    """At the first EOS or completed stop text, which belong to the response; nothing after it, and no EOS too early."""
    ends = []
    for seed in range(4):
        sequences = draw("llama", "shaped", seed=seed)
        np.testing.assert_array_equal(sequences.tokens[:, :PROMPT], np.repeat(make_prompts().tokens, 2, axis=0))
        np.testing.assert_array_equal(sequences.valid[:, :PROMPT], np.repeat(make_prompts().valid, 2, axis=0))
        np.testing.assert_array_equal(sequences.valid[:, PROMPT:], sequences.response_mask[:, PROMPT:])
        for row in range(16):
            length = int(sequences.response_mask[row].sum())
            assert sequences.response_mask[row, PROMPT : PROMPT + length].all()
            tokens = sequences.tokens[row, PROMPT : PROMPT + length].tolist()
            texts = [b"".join(PIECES[token] for token in tokens[: i + 1]) for i in range(length)]
            stopped = [any(stop.encode() in text for stop in STOPS) for text in texts]
            at_eos = [token in EOS for token in tokens]
            assert not any(at_eos[:3])
            assert not any(at_eos[:-1]) and not any(stopped[:-1])
            assert sequences.ended[row] == (at_eos[-1] or stopped[-1]) and (sequences.ended[row] or length == NEW)
            assert (sequences.tokens[row, PROMPT + length :] == 0).all()
            assert (sequences.logprobs[row, PROMPT + length :] == 0).all()
            ends.append("eos" if at_eos[-1] else "stop" if stopped[-1] else "length")
    assert min(ends.count(kind) for kind in ("eos", "stop", "length")) >= 3


def test_a_pad_token_that_is_an_eos():
    """Neither padding of that id nor its own meaning is confused: masks come from lengths."""
    prompts = make_prompts()
    tokens = np.array(prompts.tokens)
    tokens[:4, -1] = EOS[0]  # prompts may end in it too
    once = one_a_prompt(prompts.replace(tokens=tokens))  # pyright: ignore[reportAttributeAccessIssue]
    padded = once.replace(tokens=np.where(once.valid, once.tokens, EOS[0]))  # pyright: ignore[reportAttributeAccessIssue]
    made = draw("llama", "pad is eos", padded)
    same_samples(made, draw("llama", "shaped", prompts.replace(tokens=tokens)))  # pyright: ignore[reportAttributeAccessIssue]
    after = made.tokens[:, PROMPT:][~made.response_mask[:, PROMPT:]]
    assert len(after) > 20 and (after == EOS[0]).all()


# ---- what a sample depends on ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("model, name", [("llama", "plain"), ("gpt2", "shaped")])
def test_the_bucket_never_changes_samples(model, name):
    same_samples(draw(model, name, make_prompts(PROMPT)), draw(model, name, make_prompts(PROMPT + 4, filler=9)))


def test_a_sample_depends_on_its_id_and_not_on_its_neighbours():
    order = np.random.default_rng(0).permutation(8)
    straight, mixed = draw("llama", "plain"), draw("llama", "plain", jax.tree.map(lambda x: x[order], make_prompts()))
    assert [responses(straight)[row] for row in order] == responses(mixed)
    assert responses(straight) == responses(draw("llama", "plain"))
    assert responses(straight) != responses(draw("llama", "plain", seed=6))
    assert responses(straight) != responses(draw("llama", "plain", step=3))


def test_samples_of_a_prompt_are_contiguous_and_have_their_own_ids():
    """Sample n of prompt i is the one sample of a prompt whose id is 2 i + n."""
    twice = draw("llama", "shaped")
    same_samples(twice, draw("llama", "pad is eos", one_a_prompt(make_prompts())))
    pairs = responses(twice)
    assert sum(pairs[2 * i] != pairs[2 * i + 1] for i in range(8)) >= 7


@pytest.mark.parametrize(
    ("all_along", "fewer"),
    [pytest.param("six", "halved", marks=pytest.mark.nightly), ("limited", "limited, halved")],
)
@pytest.mark.parametrize(
    "runtime",
    [
        pytest.param(FLOAT32, id="float32"),
        pytest.param(Runtime(int8=("cache",)), id="int8 cache", marks=pytest.mark.nightly),
    ],
)
def test_decoding_goes_on_with_the_samples_that_have_not_ended(all_along, fewer, runtime):
    """Fewer and fewer rows are computed, of every prompt and then of the prompts, and nothing else changes."""
    whole, halved = (draw("llama", name, runtime=runtime) for name in (all_along, fewer))
    assert len(set(whole.response_mask.sum(1))) > 4
    same_samples(halved, whole)
    np.testing.assert_array_equal(halved.tokens, whole.tokens)


@pytest.mark.nightly
def test_half_of_the_prompts_go_on_one_by_one_and_by_twos():
    """As CPUs decode prompts with one response each, abreast, and as others do; local layers too."""
    for runtime in (FLOAT32, FLOAT32._replace(hardware=Hardware("gpu"), attention="xla")):
        whole, halved = (draw("gemma3_text", name, runtime=runtime) for name in ("limited", "limited, halved"))
        same_samples(halved, whole)


def test_prompts_with_one_response_stand_abreast_in_twos():
    """Where they can, on CPUs: eight do and seven do not, and their responses are the same."""
    tpu = FLOAT32._replace(hardware=Hardware("tpu"))
    asked = [(8, 1, FLOAT32), (7, 1, FLOAT32), (8, 2, FLOAT32), (8, 1, tpu)]
    assert [prompts_abreast(prompts, copies, runtime.hardware) for prompts, copies, runtime in asked] == [2, 1, 1, 1]
    eight, seven = draw("llama", "plain"), draw("llama", "plain", jax.tree.map(lambda x: x[:7], make_prompts()))
    assert responses(eight)[:7] == responses(seven)


@pytest.mark.parametrize("model", [pytest.param("llama", marks=pytest.mark.nightly), "gpt2"])
def test_kernels_of_either_order(model, monkeypatch):
    """Few rows read kernels that begin with what they make, many those of training; tied heads and biases too."""
    few = draw(model, "shaped")
    monkeypatch.setattr(cpu, "FEW_ROWS", 0)
    sampling_program.cache_clear()
    same_samples(few, draw(model, "shaped"))
    if model == "llama":
        same_samples(few, draw_on_mesh("shaped", MeshConfig(2, 2, 2)))
    sampling_program.cache_clear()


def test_a_row_ends_at_its_limit():
    """And is the beginning of what it is without one."""
    free, limited = draw("llama", "plain"), draw("llama", "limited")
    assert responses(limited) == [row[:limit] for row, limit in zip(responses(free), LIMITS)]
    lengths = np.array([len(row) for row in responses(free)])
    assert (lengths < LIMITS).any() and (lengths > LIMITS).any(), "some end by themselves before it, some are cut"
    np.testing.assert_array_equal(limited.ended, free.ended | (lengths >= LIMITS))


def draw_on_mesh(name: str, mesh: MeshConfig, runtime: Runtime = FLOAT32, model: str = "llama") -> Any:
    """``draw`` on eight devices."""
    table, spec = parameter_table(CONFIGS[model], "lm"), sharding.spec
    with jax.set_mesh(sharding.make_mesh(mesh, jax.devices()[:8])):
        put = lambda leaf, x: jax.device_put(x, weight_spec(leaf))
        params = jax.tree.map(put, table, weights(model), is_leaf=lambda x: isinstance(x, Leaf))
        prompts = jax.tree.map(lambda x: jax.device_put(x, spec("batch", *[None] * (x.ndim - 1))), make_prompts())
        many = sampling_program(model, name, runtime)(params, prompts, jnp.int32(5), jnp.int32(2))
    return jax.tree.map(np.asarray, many)


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        ("shaped", MeshConfig(2, 2, 2)),
        NIGHTLY("plain", MeshConfig(2, 2, 2)),
        NIGHTLY("halved", MeshConfig(2, 2, 2)),
        NIGHTLY("limited, halved", MeshConfig(2, 2, 2)),
        NIGHTLY("limited", MeshConfig(data=2, fsdp=4, decode=2)),
    ],
    ids=str,
)
def test_mesh_equals_one_device(name, mesh):
    same_samples(draw_on_mesh(name, mesh), draw("llama", name))


@pytest.mark.parametrize("name", ["shaped", NIGHTLY("halved"), NIGHTLY("limited, halved")])
def test_states_of_linear_layers_on_a_mesh(name):
    """Heads over tensor and decode groups, rows over the rest; samples that have ended leave, and prompts do."""
    mesh = MeshConfig(data=2, fsdp=2, tensor=2, decode=2)
    same_samples(draw_on_mesh(name, mesh, model="qwen3_5_text"), draw("qwen3_5_text", name))


@pytest.mark.nightly  # by day: a forward pass over a mesh, and one prompt's samples on one device
@pytest.mark.parametrize("name", ["shaped", "halved"])
def test_sinks_and_experts_on_a_mesh(name):
    for mesh in (MeshConfig(data=2, fsdp=2, tensor=2, decode=2), MeshConfig(data=1, fsdp=2, tensor=2, expert=2)):
        same_samples(draw_on_mesh(name, mesh, model="gpt_oss"), draw("gpt_oss", name))


@pytest.mark.nightly
def test_linear_layers_of_samples_that_have_not_ended():
    """Their states leave with them, as keys and values do."""
    for all_along, fewer in (("six", "halved"), ("limited", "limited, halved")):
        same_samples(draw("qwen3_5_text", fewer), draw("qwen3_5_text", all_along))


def test_int8_of_linear_layers():
    """Weights and keys are 8 bits; states stay float32. Log-probs differ by 0.02 nats per token on average."""
    sequences = draw("qwen3_5_text", "shaped", runtime=FLOAT32._replace(int8=("weights", "cache")))
    mask = sequences.response_mask
    exact = np.asarray(forward_program("qwen3_5_text", "shaped")(weights("qwen3_5_text"), sequences).logprobs)
    error = np.abs(sequences.logprobs - exact)[mask]
    assert 1e-4 < error.mean() < 0.05


# ---- the law of choice ----------------------------------------------------------------------------------------------

choose_program = jax.jit(choose, static_argnums=2)
noise_program = jax.jit(uniform_noise)


@pytest.mark.parametrize("vocab", [7, 64, 150])
def test_choice_follows_softmax(vocab):
    """Chi-square over 40,000 draws at the noise law's own uniforms; tokens that are impossible are never drawn."""
    count = 40_000
    logits = np.random.default_rng(vocab).normal(size=vocab).astype(np.float32)
    logits[[2, vocab - 1]] = IMPOSSIBLE
    uniform = noise_program(0, 1, jnp.arange(400), jnp.tile(jnp.arange(count // 400), (400, 1)))
    token, logprob = choose_program(jnp.tile(logits, (count, 1)), uniform.reshape(-1))
    exact = np.exp(logits.astype(np.float64) - logits.max())
    exact /= exact.sum()
    seen = np.bincount(token, minlength=vocab)
    possible = exact > 0
    assert seen[~possible].sum() == 0
    assert stats.chisquare(seen[possible], exact[possible] * count).pvalue > 1e-3
    np.testing.assert_allclose(logprob, np.log(exact[np.asarray(token)]), atol=1e-5)


def test_choice_is_the_inverse_of_the_cumulative_distribution():
    rng = np.random.default_rng(0)
    logits, uniform = rng.normal(size=(4000, 150)).astype(np.float32), rng.random(4000).astype(np.float32)
    share = np.exp(logits.astype(np.float64))
    edges = np.cumsum(share / share.sum(1, keepdims=True), axis=1)
    clear = np.abs(edges - uniform[:, None]).min(1) > 1e-6  # rounding may decide nearer to an edge
    expected = (edges <= uniform[:, None]).sum(1)
    token, _ = choose_program(logits, uniform)
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(np.asarray(token)[clear], expected[clear])
    ends = np.tile(logits[:1], (2, 1))
    ends[:, [0, 149]] = IMPOSSIBLE
    first_last, _ = choose_program(
        ends, np.array([0.0, 1.0], np.float32)
    )  # uniforms are below 1, but their product may round
    assert first_last.tolist() == [1, 148]


def test_choice_in_a_batch_of_one_row():
    """On a mesh too, where an axis of size 1 is still split over the devices."""
    logits, uniform = np.random.default_rng(0).normal(size=(3, 150)).astype(np.float32), np.array([0.2, 0.5, 0.9])
    together, _ = choose_program(logits, uniform)
    with jax.set_mesh(sharding.make_mesh(MeshConfig(), jax.devices()[:1])):
        layouts = sharding.spec("batch", None), sharding.spec("batch")
        for row in range(3):
            parts = (logits[row : row + 1], uniform[row : row + 1].astype(np.float32))
            token, _ = choose_program(*(jax.device_put(x, where) for x, where in zip(parts, layouts)))
            assert token.tolist() == [together[row]]


def test_greedy_choice():
    logits = np.random.default_rng(0).normal(size=(20, 101)).astype(np.float32)
    token, logprob = choose_program(logits, np.zeros(20, np.float32), True)
    np.testing.assert_array_equal(token, logits.argmax(1))
    np.testing.assert_allclose(logprob, logits.max(1) - np.log(np.exp(logits).sum(1)), atol=1e-5)


@pytest.mark.parametrize("top_k, top_p", [(1, 1.0), (5, 1.0), (200, 1.0), (0, 0.9), (0, 0.01), (5, 0.6), (40, 0.95)])
def test_support_against_sorting(top_k, top_p):
    logits = 3 * np.random.default_rng(top_k).normal(size=(30, 101)).astype(np.float32)
    kept = np.asarray(jax.jit(support, static_argnums=(1, 2))(logits, top_k, top_p))
    np.testing.assert_array_equal(kept, [kept_by_sorting(row.astype(np.float64), top_k, top_p) for row in logits])
    assert kept.any(1).all()


def test_support_keeps_ties_and_excludes_the_impossible():
    kept = lambda logits, *filters: support(jnp.array(logits), *filters).tolist()
    assert kept([1.0, 2.0, 1.0, 0.0], 2, 1.0) == [True, True, True, False]
    assert kept([0.0, 0.0, -0.0, IMPOSSIBLE], 0, 0.5)[3] is False
    assert kept([5.0, IMPOSSIBLE, IMPOSSIBLE], 0, 0.9) == [True, False, False]


def test_noise_is_keyed_by_seed_step_id_and_position():
    ids, positions = jnp.arange(50), jnp.tile(jnp.arange(40), (50, 1))
    noise = lambda seed, step: np.asarray(noise_program(seed, step, ids, positions))
    base = noise(1, 2)
    assert base.min() >= 0 and base.max() < 1 and len(np.unique(base)) > 1990
    assert stats.kstest(base.ravel(), "uniform").pvalue > 1e-3
    assert (noise(2, 2) != base).mean() > 0.99 and (noise(1, 3) != base).mean() > 0.99
    shifted = noise_program(1, 2, ids[10:12], positions[:2, 5:9])
    np.testing.assert_array_equal(shifted, base[10:12, 5:9])
