"""Programs with the splash kernel, compiled for TPU slices that are not here; nothing is run."""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxrlhf.hosts.compiler_flags import program_options
from jaxrlhf.models.attention.kernels import Hardware, blocks, hardware_of
from jaxrlhf.models.config import ModelConfig, resolve
from jaxrlhf.models.context import forward_split, split_rows
from jaxrlhf.models.decoding import decode_layout, decode_step, prefill
from jaxrlhf.models.experts import expert_block, has_experts
from jaxrlhf.models.feed_forward import gated_by
from jaxrlhf.models.files.published import published
from jaxrlhf.models.heads import lm_logits
from jaxrlhf.models.parameters import Leaf, parameter_table, weight_axes
from jaxrlhf.models.transformer import Runtime, forward, forward_responses
from jaxrlhf.plan.target import find_target
from jaxrlhf.sharding import MeshConfig, make_mesh, partition
from jaxrlhf.types import given

pytest.importorskip("libtpu", reason="compiles for TPUs")
pytestmark = pytest.mark.plan
NIGHTLY = functools.partial(pytest.param, marks=pytest.mark.nightly)
SIZE = 640  # columns: two blocks
SMALL: dict[str, Any] = {"vocab_size": 512, "hidden_size": 256, "num_layers": 2, "num_kv_heads": 2, "mlp_size": 256}
DEEP: dict[str, Any] = SMALL | {"num_layers": 4}
LLAMA = resolve(ModelConfig(**SMALL, head_dim=128))
MIXED = resolve(ModelConfig(family="gemma2", **SMALL, head_dim=256, sliding_window=200, attention_softcap=50.0))
APART = resolve(  # the last layer reads the keys of the first; heads of 256 and 512 features, as published models have
    ModelConfig(
        "gemma4_text",
        **DEEP,
        layer_types=("local", "global") * 2,
        sliding_window=200,
        head_dim=256,
        global_head_dim=512,
        shared_kv_layers=2,
        per_layer_size=64,
    )
)
WHOLE_HEADS = dataclasses.replace(LLAMA, num_heads=9, num_kv_heads=3, head_dim=64)
ONE_KV_HEAD = dataclasses.replace(LLAMA, num_kv_heads=1, head_dim=64)
SINKS = resolve(ModelConfig(family="gpt_oss", **SMALL, head_dim=64, sliding_window=200, num_experts=4))


@functools.cache
def mesh_of(topology: str):
    return make_mesh(MeshConfig(1, 2, 2), find_target(topology).devices)


def abstract(cfg: ModelConfig, mesh, dtype):
    """The parameters' shapes and layouts."""

    def one(leaf: Leaf):
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=NamedSharding(mesh, partition(weight_axes(leaf))))

    return jax.tree.map(one, parameter_table(cfg, "lm"), is_leaf=lambda x: isinstance(x, Leaf))


def rows(mesh, shape, dtype=jnp.int32):
    layout = NamedSharding(mesh, partition(("batch", *(None,) * (len(shape) - 1))))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=layout)


def kernels_in(text: str) -> int:
    return text.count('custom_call_target="tpu_custom_call"')


def squares(text: str, size: int) -> set[str]:
    """The types of arrays with two dimensions of ``size``, or of the padded rows: masks, products of queries, keys."""
    lengths, arrays = {size, blocks(size)[1]}, set(re.findall(r"(?:f32|bf16|pred|s8|u8)\[[0-9,]+\]", text))
    return {x for x in arrays if sum(int(n) in lengths for n in re.findall(r"[0-9]+", x.partition("[")[2])) >= 2}


def compile_training(cfg: ModelConfig, topology: str, runtime: Runtime) -> str:
    """The HLO of the loss and its gradients."""
    mesh = mesh_of(topology)
    with jax.set_mesh(mesh):

        def loss(params, tokens, ids):
            hidden = forward(params, cfg, tokens, ids, runtime).astype(jnp.float32)
            return jnp.where((ids > 0)[..., None], hidden**2, 0).sum()

        arguments = abstract(cfg, mesh, jnp.float32), rows(mesh, (4, SIZE)), rows(mesh, (4, SIZE))
        return jax.jit(jax.value_and_grad(loss)).lower(*arguments).compile().as_text() or ""


def tpu(**more) -> Runtime:
    return Runtime(**{"compute": jnp.bfloat16, "hardware": Hardware("tpu")} | more)


def test_the_devices_of_a_topology_are_tpus():
    assert hardware_of(mesh_of("v5e:2x2").devices.flat[0]) == Hardware("tpu")


@pytest.mark.parametrize(
    "cfg, topology, runtime, kernels",
    [
        (LLAMA, "v5e:2x2", tpu(), 3),  # forward, and dq and dkv backward, of one layer in a scan
        NIGHTLY(LLAMA, "v5p:2x2x1", tpu(remat="full"), 4),  # and the forward pass once more
        NIGHTLY(LLAMA, "v5e:2x2", tpu(remat="dots"), 3),  # whose results are kept
        (MIXED, "v5p:2x2x1", tpu(remat="dots"), 6),  # a local and a global layer
        NIGHTLY(SINKS, "v5e:2x2", tpu(remat="full"), 8),
        NIGHTLY(MIXED, "v5e:2x2", tpu(compute=jnp.float32), 6),  # the most memory that a kernel takes
        NIGHTLY(APART, "v5e:2x2", tpu(), 12),
        NIGHTLY(APART, "v5e:2x2", tpu(compute=jnp.float32), 12),
        NIGHTLY(WHOLE_HEADS, "v5e:2x2", tpu(), 3),
        NIGHTLY(ONE_KV_HEAD, "v5e:2x2", tpu(), 3),
    ],
)
def test_training_by_splash_compiles(cfg, topology, runtime, kernels):
    text = compile_training(cfg, topology, runtime)
    assert kernels_in(text) == kernels
    assert squares(text, SIZE) == set()


@pytest.mark.parametrize("remat", ["none", NIGHTLY("full")])
def test_split_columns_by_splash_compile(remat):
    """Keys and values are gathered forward and again backward, and their gradients scattered, not summed whole."""
    mesh, runtime, columns = (
        make_mesh(MeshConfig(1, context=4), find_target("v5e:2x2").devices),
        tpu(remat=remat),
        2040,
    )
    with jax.set_mesh(mesh):

        def loss(params, tokens, ids):
            split = given(split_rows(columns), "split")
            return (forward_split(params, LLAMA, tokens, ids, split, runtime).astype(jnp.float32) ** 2).sum()

        arguments = abstract(LLAMA, mesh, jnp.float32), rows(mesh, (2, columns)), rows(mesh, (2, columns))
        text = jax.jit(jax.grad(loss)).lower(*arguments).compile().as_text() or ""
    sent = re.findall(r"= \S+ (all-gather|reduce-scatter|all-reduce)(?:-start)?\(.*shard_map", text)
    assert kernels_in(text) == (3 if remat == "none" else 4)
    assert squares(text, columns) == set() and set(sent) == {"all-gather", "reduce-scatter"}, sent


def test_squares_are_found():
    """Without the kernel they are there."""
    text = compile_training(LLAMA, "v5e:2x2", tpu(attention="xla"))
    assert kernels_in(text) == 0 and squares(text, SIZE)


@pytest.mark.parametrize(("differentiated", "kernels"), [NIGHTLY(False, 1), (True, 3)])
def test_groups_by_splash_compile(differentiated, kernels):
    """Two prompts a device, 4 responses to each: one kernel a layer, two more backward; no mask of a row's columns."""
    mesh, (start, room, copies) = mesh_of("v5e:2x2"), (300, 85, 4)

    def loss(params, tokens, valid):
        hidden = forward_responses(params, MIXED, tokens, valid, start, copies, tpu())
        return (hidden.astype(jnp.float32) ** 2).sum()

    with jax.set_mesh(mesh):
        shape = 4 * copies, start + room
        arguments = abstract(MIXED, mesh, jnp.float32), rows(mesh, shape), rows(mesh, shape, jnp.bool_)
        text = jax.jit(jax.grad(loss) if differentiated else loss).lower(*arguments).compile().as_text() or ""
    assert kernels_in(text) == kernels * MIXED.num_layers
    assert squares(text, start + copies * room) == set()


def compile_decoding(cfg: ModelConfig, prompt: int, room: int, runtime: Runtime) -> str:
    """The HLO of reading 4 prompts, and of ``room`` tokens of 2 responses to each."""
    mesh = mesh_of("v5e:2x2")
    with jax.set_mesh(mesh):

        def read(params, tokens, valid):
            params = decode_layout(params, cfg, "lm", runtime, 8)
            last, caches = prefill(params, cfg, tokens, valid, 2, room, runtime)
            last = jnp.broadcast_to(last, (last.shape[0], 2, last.shape[2]))

            def step(carry, index):
                hidden, caches = carry
                token = lm_logits(params, cfg, hidden).argmax(-1).astype(jnp.int32)
                return decode_step(params, cfg, token, index, valid[:, None], caches, runtime), None

            (hidden, _), _ = jax.lax.scan(step, (last, caches), jnp.arange(room))
            return last, hidden

        arguments = abstract(cfg, mesh, jnp.float32), rows(mesh, (4, prompt)), rows(mesh, (4, prompt), jnp.bool_)
        return jax.jit(read).lower(*arguments).compile().as_text() or ""


@pytest.mark.parametrize("cfg", [NIGHTLY(LLAMA), MIXED, NIGHTLY(SINKS)])
def test_prefill_and_decoding_compile(cfg):
    """Prefill by the kernel; a decoded token reads the cache as it lies, its kv heads not repeated."""
    room = 128
    prompt = SIZE - room
    text = compile_decoding(cfg, prompt, room, tpu())
    assert kernels_in(text) == cfg.num_layers
    assert squares(text, prompt) == set()
    kv_heads, group = cfg.num_kv_heads // 2, cfg.num_heads // cfg.num_kv_heads  # of a device, as are two rows
    assert (
        f"bf16[2,{kv_heads},{prompt},{cfg.head_dim}]" in text and f"bf16[2,{kv_heads},2,{room},{cfg.head_dim}]" in text
    )
    for repeated in (  # a prompt's queries, which are of all heads, have the shape of its keys repeated
        f"[2,{kv_heads},{group},{prompt},{cfg.head_dim}]",
        f"[2,{kv_heads},2,{group},{room},{cfg.head_dim}]",
        f"[2,{kv_heads * group},2,{room},{cfg.head_dim}]",
    ):
        assert repeated not in text


def test_a_decoded_token_reads_int8_and_widens_none_of_it_in_memory():
    """Kernels, head and caches come into the loop's fusions as 8 bits; none of them leaves a fusion wide."""
    room = 128
    prompt = SIZE - room
    text = compile_decoding(LLAMA, prompt, room, tpu(int8=("weights", "cache")))
    body = loop_with(text, f"s8[2,1,2,{room},128]")
    read = {"s8[256,128]", "s8[128,256]", "s8[256,256]", f"s8[2,1,{prompt},128]", f"s8[2,1,2,{room},128]"}
    shapes = {re.sub(r"\{.*", "", x) for x in re.findall(r"s8\[[0-9,]+\]", body)}
    assert len(read & shapes) >= 4, shapes
    made = re.findall(r"= ((?:bf16|f32)\[[0-9,]+\])\S* (?:fusion|copy|convert)\(", body)
    assert made and not {x.partition("[")[2] for x in made} & {x.partition("[")[2] for x in read}


def loop_with(text: str, array: str) -> str:
    """The longest computation of the HLO that is the body of a loop and speaks of ``array``."""
    bodies = set(re.findall(r"body=%?([\w.\-]+)", text))
    found = [part for part in re.split(r"\n(?=%|ENTRY)", text) if part.lstrip("%").split(" ")[0] in bodies]
    return max((part for part in found if array in part), key=len)


@pytest.mark.nightly
def test_products_of_wide_experts_compile():
    """By default XLA:TPU has too little fast memory for the gradient of gpt-oss-20b's experts, of 2,880 features."""
    cfg = given(published("openai/gpt-oss-20b"), "the model")
    mesh = make_mesh(MeshConfig(1, -1, expert=8), find_target("v6e:4x4").devices)
    with jax.set_mesh(mesh):
        layer = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=without_layers(x.sharding)),
            {name: abstract(cfg, mesh, jnp.bfloat16)["layers"]["mlp"][name] for name in ("router", "experts")},
        )

        def loss(params, x):
            return (expert_block(params, cfg, x, gated_by(cfg), Hardware("tpu"))[0].astype(jnp.float32) ** 2).sum()

        lowered = jax.jit(jax.grad(loss, (0, 1))).lower(layer, rows(mesh, (16, 8576, 2880), jnp.bfloat16))
        lowered.compile(program_options(mesh.devices.flat[0].device_kind, has_experts(layer), {}))


def without_layers(where: NamedSharding) -> NamedSharding:
    """The layout of one layer of a stack."""
    return NamedSharding(where.mesh, PartitionSpec(*where.spec[1:]))
