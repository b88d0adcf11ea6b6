"""Experts against a loop over all of them: both ways of computing, gradients, what is chosen, what is refused."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.generate import loop
from jaxrlhf.generate.sampler import Sampler
from jaxrlhf.models.attention.kernels import Hardware
from jaxrlhf.models.config import ModelConfig, resolve
from jaxrlhf.models.cpu import experts_in_blocks
from jaxrlhf.models.experts import OWN, expert_block, route
from jaxrlhf.models.feed_forward import feed_forward, gated_by
from jaxrlhf.models.files.hf_config import describe
from jaxrlhf.models.grouped import LARGEST_BLOCK, block_size, make_groups
from jaxrlhf.models.lora import LoraConfig, assemble, merged, targets_of
from jaxrlhf.models.transformer import Runtime, forward
from jaxrlhf.ops.sampling import Sampling
from jaxrlhf.plan import hlo
from jaxrlhf.run import state as states
from jaxrlhf.sharding import MeshConfig, current, make_mesh
from tests.support import tiny

SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 16, "num_layers": 1, "num_heads": 2, "mlp_size": 12}
MODEL = resolve(ModelConfig("qwen3_moe", num_experts=5, experts_per_token=2, **SIZES))
OSS = resolve(ModelConfig("gpt_oss", num_experts=5, experts_per_token=2, **SIZES))
CPU, TPU = Hardware("cpu"), Hardware("tpu")


def layer(cfg: ModelConfig = MODEL, seed: int = 0):
    """Parameters of one layer's experts, and 3 x 7 tokens; biases are no zeros, and some units of gpt_oss clamped."""
    params, rng = tiny.parameters(cfg, "lm", seed)["layers"]["mlp"], np.random.default_rng(seed)
    params = {
        name: jax.tree.map(lambda x: x[0] * 3, params[name])
        for name in ("router", "experts", "shared")
        if name in params
    }
    draw = lambda path, x: jnp.asarray(rng.normal(size=x.shape), jnp.float32) if path[-1].key == "bias" else x
    params = jax.tree_util.tree_map_with_path(draw, params)
    if cfg.family == "gpt_oss":
        own = params["experts"]
        wide = {name: own[name] | {"kernel": 2 * own[name]["kernel"]} for name in ("gate", "up")}
        params["experts"] = wide | {"down": jax.tree.map(lambda x: x / 20, own["down"])}
    return params, jnp.asarray(rng.normal(size=(3, 7, cfg.hidden_size)), jnp.float32)


def swiglu(gate, up):
    return jax.nn.silu(gate) * up


def clamped(gate, up):
    """As the reference implementation of gpt-oss has it."""
    gate, up = jnp.where(gate > 7, 7, gate), jnp.where(up > 7, 7, jnp.where(up < -7, -7, up))
    return gate / (1 + jnp.exp(-1.702 * gate)) * (up + 1)


def by_loop(params, cfg: ModelConfig, x) -> Any:
    """Every expert computes every token; each token weighs what it chose."""
    applied = lambda part, x: x @ part["kernel"] + part.get("bias", 0.0)
    logits, gated = applied(params["router"], x), clamped if cfg.family == "gpt_oss" else swiglu
    order = jnp.argsort(-logits, axis=-1)[..., : cfg.experts_per_token]
    among = jnp.take_along_axis(logits, order, -1) if cfg.normalize_routing else logits  # of whom weights sum to 1
    y = 0.0
    for number in range(cfg.num_experts):
        part = jax.tree.map(lambda x, number=number: x[number], params["experts"])
        hidden = gated(applied(part["gate"], x), applied(part["up"], x))
        weight = jnp.exp(logits[..., number] - jax.nn.logsumexp(among, axis=-1))
        y += jnp.where((order == number).any(-1), weight, 0)[..., None] * applied(part["down"], hidden)
    return y


@pytest.mark.parametrize("hardware", [CPU, TPU], ids=["blocks", "ragged_dot"])
def test_a_shared_expert_computes_every_token(hardware):
    """Beside those that a router chose, weighed by the sigmoid of a map of the token; here of other features."""
    cfg = resolve(ModelConfig("qwen3_5_moe_text", num_experts=5, shared_expert_size=20, **SIZES))
    params, x = layer(cfg)
    own = jax.tree.map(lambda x: np.asarray(x, np.float64), params["shared"])
    given = np.asarray(x, np.float64)
    gate, up, share = (given @ own[name]["kernel"] for name in ("gate", "up", "share"))
    expected = gate / (1 + np.exp(-gate)) * up @ own["down"]["kernel"] / (1 + np.exp(-share))
    assert own["up"]["kernel"].shape == (16, 20) and np.abs(expected).max() > 0.1
    found = feed_forward(cfg, hardware)(params, x, x)
    np.testing.assert_allclose(found, expected + by_loop(params, cfg, x), atol=2e-5)


PLAIN, NORMALIZED = (dataclasses.replace(MODEL, normalize_routing=normalize) for normalize in (False, True))


@pytest.mark.parametrize("cfg", [PLAIN, NORMALIZED, OSS], ids=["plain", "normalized", "gpt_oss"])
@pytest.mark.parametrize("hardware", [CPU, TPU], ids=["blocks", "ragged_dot"])
def test_experts_are_a_loop_over_all_of_them(hardware, cfg):
    """Output, and the gradient of every parameter and of the tokens."""
    params, x = layer(cfg)
    ours: Any = lambda params, x: expert_block(params, cfg, x, gated_by(cfg), hardware)[0]
    loop: Any = lambda params, x: by_loop(params, cfg, x)
    np.testing.assert_allclose(ours(params, x), loop(params, x), atol=2e-5)
    square = lambda f: jax.jit(jax.grad(lambda *given: (f(*given) ** 2).sum(), argnums=(0, 1)))
    found, expected = square(ours)(params, x), square(loop)(params, x)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.abs(other).max() > 0.1
        np.testing.assert_allclose(one, other, atol=2e-4 * np.abs(other).max())


def test_the_platform_chooses_once():
    assert experts_in_blocks(CPU) and not experts_in_blocks(TPU) and not experts_in_blocks(Hardware("gpu"))


@pytest.mark.parametrize("blocks", [True, False])
@pytest.mark.parametrize("spread", ["all to one", "random", "elsewhere"])
def test_no_token_is_dropped(blocks, spread):
    """Every choice of a group here has a place of its own in the part of its group, however many chose it."""
    groups, rng = 4, np.random.default_rng(1)
    choice = {"all to one": np.full((50, 2), 3), "random": rng.integers(0, 4, (50, 2))}.get(
        spread, rng.integers(-3, 9, (50, 2))
    )
    found = make_groups(jnp.asarray(choice), groups, groups, blocks)
    places, flat = len(found.source), choice.reshape(-1)
    here = (flat >= 0) & (flat < groups)
    place, ends = np.asarray(found.place), np.cumsum(found.sizes)
    assert (place[~here] == places).all() and len(set(place[here])) == here.sum()
    assert (np.searchsorted(ends, place[here], side="right") == flat[here]).all()
    assert (np.asarray(found.source)[place[here]] == np.flatnonzero(here)).all()
    assert (np.asarray(found.source) < len(flat)).sum() == here.sum()
    if blocks:
        assert found.owner is not None and found.used is not None
        size = places // len(found.owner)
        assert (np.asarray(found.owner)[place[here] // size] == flat[here]).all()
        assert (place[here] < found.used * size).all()


def test_blocks_are_as_large_as_groups_are():
    assert [block_size(choices, 8) for choices in (1, 64, 65, 200, 10**6)] == [8, 8, 16, 32, LARGEST_BLOCK]


def test_router_is_float32_whatever_the_tokens_are():
    """Two logits that bfloat16 rounds to one number."""
    params = {"kernel": jnp.zeros((16, 5)).at[0].set(jnp.array([1.0, 1.0, 1.001, 0, 0]))}
    routed = route(params, MODEL, jnp.ones((1, 1, 16), jnp.bfloat16))
    assert routed.logits.dtype == jnp.float32 and routed.own[0, 0, 0] == 2
    np.testing.assert_allclose(routed.weight[0, 0], jax.nn.softmax(jnp.array([1.0, 1, 1.001, 0, 0]))[jnp.array([2, 0])])


@pytest.mark.parametrize("hardware", [CPU, TPU], ids=["blocks", "ragged_dot"])
def test_a_kept_choice_is_followed(hardware):
    """Where it is given; the weights are the router's own of those experts."""
    params, x = layer()
    own = route(params["router"], MODEL, x).own
    kept = jnp.asarray(np.random.default_rng(2).permuted(np.tile(np.arange(5), (3, 7, 1)), axis=-1)[..., :2], jnp.int8)
    kept = kept.at[0].set(OWN)
    y, routed = expert_block(params, MODEL, x, swiglu, hardware, kept)
    np.testing.assert_array_equal(routed.choice[1:], kept[1:])
    np.testing.assert_array_equal(routed.choice[0], own[0])
    probs = jax.nn.softmax(x @ params["router"]["kernel"])
    np.testing.assert_allclose(routed.weight, jnp.take_along_axis(probs, routed.choice, -1), rtol=1e-5)
    np.testing.assert_allclose(y[0], by_loop(params, MODEL, x)[0], atol=2e-5)
    assert np.abs(y[1:] - by_loop(params, MODEL, x)[1:]).max() > 0.05


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"family": "qwen3_moe"}, "num_experts: 0: qwen3_moe has experts; expected 2 or more; nearest: 2"),
        (
            {"family": "mixtral", "num_experts": 2, "experts_per_token": 3},
            "experts_per_token: 3: expected at most num_experts; nearest: 2",
        ),
        (
            {"num_experts": 4},
            "num_experts: 4: llama has no experts; expected family gemma4_text or mixtral or qwen3_moe",
        ),
        ({"normalize_routing": True}, "normalize_routing: True: llama has no experts; expected family"),
        (
            {"family": "qwen3_moe", "num_experts": 4, "shared_expert_size": 8},
            "shared_expert_size: 8: a qwen3_moe has no such expert; nearest: 0",
        ),
        (
            {"family": "qwen3_moe", "num_experts": 4, "expert_size": 8},
            "expert_size: 8: of the experts of a qwen3_moe; expected 0, and mlp_size",
        ),
        (
            {"family": "gemma4_text", "shared_expert_size": 8},
            "shared_expert_size: 8: gemma4_text has no experts; expected num_experts of 1 or more",
        ),
        (
            {"family": "gemma4_text", "num_experts": 4, "mlp_size": 24},
            "expert_size: 0: of the experts of a gemma4_text; expected 1 or more; nearest: 24",
        ),
    ],
)
def test_what_does_not_fit_together(fields, line):
    with pytest.raises(ValueError, match="^" + line) as error:
        resolve(ModelConfig(**fields))
    assert "\n" not in str(error.value)


def test_families_weigh_as_they_do():
    make = lambda family, **more: resolve(ModelConfig(family, num_experts=4, **more))
    assert make("mixtral").normalize_routing is True and make("qwen3_moe").normalize_routing is False
    assert make("qwen3_moe", normalize_routing=True).normalize_routing is True
    assert make("mixtral").experts_per_token == 2 and resolve(make("mixtral")) == make("mixtral")


def test_adapters_are_on_attention_alone():
    for model in (MODEL, OSS):
        assert targets_of(model, LoraConfig()) == ("query", "key", "value", "out")
    with pytest.raises(ValueError, match=r"^adapter.targets: gate: a qwen3_moe has no such map; choices: all-linear, "):
        targets_of(MODEL, LoraConfig(targets=("gate",)))


@pytest.mark.parametrize("model", [MODEL, pytest.param(OSS, marks=pytest.mark.nightly)], ids=lambda x: x.family)
def test_an_adapter_beside_experts(model):
    """What it adds to attention is in the merged kernels, and the experts are those of the base."""
    base, lora = tiny.parameters(model, "lm", 0), LoraConfig(rank=2, alpha=8.0)
    params = assemble(base, tiny.adapter(model, "lm", lora, 1), lora.scale)
    tokens = jnp.asarray(np.random.default_rng(3).integers(0, 64, (2, 6)), jnp.int32)
    run = tiny.program(lambda params: forward(params, model, tokens, jnp.ones_like(tokens), Runtime()))
    adapted, whole = run(params), merged(params)
    np.testing.assert_allclose(adapted, run(whole), atol=1e-5)
    assert np.abs(adapted - run(base)).max() > 0.01
    assert tiny.equal_trees(whole["layers"]["mlp"], base["layers"]["mlp"])


def test_a_score_that_transformers_has_no_class_for_is_not_exported():
    cfg = resolve(ModelConfig("olmoe", num_experts=4, **SIZES))
    with pytest.raises(
        ValueError, match=r"^export: transformers has no class of olmoe with a scalar head; expected lm$"
    ):
        describe(cfg, "scalar")
    assert describe(cfg, "lm")["num_experts"] == 4


def test_on_a_mesh_the_decode_loop_gathers_tokens_and_no_experts():
    """8 experts over 4 devices, each split over 2: their maps are gathered before the loop, in it only what is smaller
    than one of them."""
    wider: dict[str, Any] = SIZES | {"hidden_size": 64, "mlp_size": 64}
    cfg = resolve(ModelConfig("qwen3_moe", num_experts=8, **wider))
    mesh, rows, new = make_mesh(MeshConfig(1, 2, expert=4), jax.devices()[:8]), 16, 5
    sampler = Sampler(Sampling(eos_ids=()), new, (), 0, keeps_routing=True)

    def rollout(params, prompts):
        return loop.sample(params, cfg, prompts, jnp.int32(0), jnp.int32(0), sampler, Runtime())

    with current(mesh):
        params = states.abstract_params(cfg, "lm", jnp.float32, mesh)
        text = tiny.program(rollout).lower(params, tiny.prompts(rows)).compile().as_text()
    entry, computations = hlo.parse(text or "")
    runs, _ = hlo.executions(entry, computations)
    sent: dict[bool, dict[str, int]] = {True: {}, False: {}}  # kind -> bytes of the largest, in the loop and before it
    for name, lines in computations.items():
        for line in lines:
            if kind := hlo.kind_of(line):
                largest = sent[runs[name] >= new - 1]
                largest[kind] = max(largest.get(kind, 0), hlo.transferred(line))
    one_map = cfg.hidden_size * cfg.mlp_size * 4
    assert sent[True]["all-gather"] >= rows // 2 * cfg.hidden_size * 4
    assert max(sent[True].values()) < one_map <= sent[False]["all-gather"]
