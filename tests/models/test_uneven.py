"""Layers of different heads, layers that read keys and values of others, and layers with embeddings of their own.

tests/parity has the numbers of transformers, test_transformer and test_generate_parity padding, packing and caches."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxrlhf import sharding
from jaxrlhf.models.decoding import decode_layout, prefill
from jaxrlhf.models.layer_kinds import kinds_of, layers_with, stacks_of
from jaxrlhf.models.layer_scan import through_layers
from jaxrlhf.models.parameters import parameter_table
from jaxrlhf.models.per_layer import look_up
from jaxrlhf.models.slot_decoding import blank_caches
from jaxrlhf.models.transformer import Runtime, forward
from jaxrlhf.sharding import MeshConfig
from tests.models.test_transformer import UNEVEN, rows, weights
from tests.parity.both import read, write_by_law
from tests.parity.cases import config_of
from tests.support import tiny


def test_stacks_hold_the_layers_of_one_shape():
    """Local and global attention, each with and without keys; mlps of one and of double width."""
    assert stacks_of(UNEVEN) == [
        *("attention", "global_attention", "reader_attention", "reader_global_attention"),
        *("mlp", "reader_mlp", "per_layer", "reader_per_layer", "output", "reader_output"),
    ]
    held = {"attention": [0, 2], "global_attention": [1, 3], "reader_global_attention": [5], "reader_mlp": [4, 5]}
    assert {stack: layers_with(UNEVEN, stack) for stack in held} == held
    table = parameter_table(UNEVEN, "lm")["layers"]
    assert table["attention"]["key"]["kernel"].shape == (2, 32, 2, 8)
    assert table["global_attention"]["key"]["kernel"].shape == (2, 32, 1, 12)
    assert "value" in table["attention"] and "value" not in table["global_attention"]
    assert table["reader_global_attention"].keys() == {"query", "query_norm", "out", "norm", "post_norm"}
    assert table["reader_mlp"]["up"]["kernel"].shape == (2, 32, 96)
    assert table["per_layer"]["per_layer_tokens"]["embedding"].shape == (4, 128, 8)


def test_layers_that_read_keys_have_no_cache():
    tokens = jnp.asarray(rows(2), jnp.int32)
    params = jax.tree.map(jnp.asarray, weights(UNEVEN))
    laid = decode_layout(params, UNEVEN, "lm", Runtime(), 2)
    _, caches = jax.eval_shape(lambda: prefill(laid, UNEVEN, tokens, tokens >= 0, 3, 5, Runtime()))
    assert [cache.key.shape for cache in caches] == [(2, 2, 3, 5, 8), (2, 1, 3, 5, 12)] * 2
    slots: Any = blank_caches(UNEVEN, 1, 2, 9, jnp.float32)
    assert [slot.key.shape for slot in slots] == [(1, 2, 2, 9, 8), (1, 1, 2, 9, 12)] * 2


def test_what_layers_read_is_of_the_last_of_their_type_and_no_carry():
    """Of keys that are 10 times a layer's number; the readers' scan carries x alone."""
    kinds = kinds_of(dataclasses.replace(UNEVEN, num_layers=8, layer_types=("local", "global") * 4, shared_kv_layers=4))
    stacked = {kind.stack(part): {} for kind in kinds for part in kind.parts}
    number = {
        "attention": [0, 2],
        "global_attention": [1, 3],
        "reader_attention": [4, 6],
        "reader_global_attention": [5, 7],
    }
    stacked |= {stack: {"number": jnp.array(layers, jnp.float32)} for stack, layers in number.items()}
    memory: Any = {"local": (jnp.zeros(()), jnp.zeros(())), "global": (jnp.zeros(()), jnp.zeros(()))}

    def layer_of(kind, scanned, since):
        def layer(given, x, memory):
            number = given[0][kind.stack("attention")]["number"]
            read = memory[kind.type][0] if kind.reads else 10 * number
            return x + read[None, None], memory if kind.reads else memory | {kind.type: (read, read)}, {}

        return layer

    for scanned in (True, False):
        run = lambda x, scanned=scanned: through_layers(layer_of, stacked, None, kinds, x, memory, 0, scanned)[0]
        assert float(run(jnp.zeros((1, 1)))[0, 0]) == 10 * (0 + 1 + 2 + 3) + 2 * 20 + 2 * 30
        scans = [eqn for eqn in jax.make_jaxpr(run)(jnp.zeros((1, 1))).eqns if eqn.primitive.name == "scan"]
        assert [eqn.params["num_carry"] for eqn in scans] == ([5, 1] if scanned else [])


def test_the_number_that_a_layer_is_multiplied_by_is_not_learned():
    """transformers keeps it as a buffer; all other leaves have gradients."""
    tokens = jnp.asarray(rows(2), jnp.int32)
    total = lambda params: (forward(params, UNEVEN, tokens, jnp.ones_like(tokens), Runtime()) ** 3).sum()
    found = tiny.program(jax.grad(total))(weights(UNEVEN))
    for path, x in jax.tree_util.tree_leaves_with_path(found):
        assert (np.abs(x).max() > 1e-3) == (path[-1].key != "layer_scalar"), path


def test_embeddings_of_layers_are_not_gathered_in_training():
    """Devices that share a table look up their part of it for each other's rows; gradients are those of one table."""
    size, table = 16, np.random.default_rng(0).normal(size=(64, 16)).astype(np.float32)
    tokens = np.random.default_rng(1).integers(0, 64, (8, 6)).astype(np.int32)
    weight = np.random.default_rng(2).normal(size=(8, 6, size)).astype(np.float32)
    total = lambda table, tokens, weight: (look_up(table, tokens) * weight).sum()
    expected = jax.grad(total)(table, tokens, weight)
    with jax.set_mesh(sharding.make_mesh(MeshConfig(2, 2, 2), jax.devices()[:8])):
        put = lambda x, *axes: jax.device_put(x, sharding.spec(*axes))
        given = put(table, "vocab_of_layer", None), put(tokens, "batch", "seq"), put(weight, "batch", "seq", None)
        np.testing.assert_array_equal(jax.jit(look_up)(*given[:2]), table[tokens])
        program = jax.jit(jax.grad(total)).lower(*given).compile()
        found = program(*given)
        assert found.sharding.spec == sharding.spec("vocab_of_layer", None)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    gathered = [line for line in program.as_text().splitlines() if " all-gather(" in line and "f32[32,16]" in line]
    assert not gathered, "rows of the table, with all features"


def test_keys_that_published_files_have_and_nothing_reads(tmp_path):
    """Of layers that read those of others; the same names in an earlier layer are asked for."""
    write_by_law(tmp_path / "model", config_of("gemma4_text", "lm"))
    file, expected = tmp_path / "model" / "model.safetensors", read(tmp_path / "model")[0]
    tensors = load_file(file)
    extra = {
        name.replace("layers.2.", "layers.5."): x for name, x in tensors.items() if "layers.2.self_attn.k_" in name
    }
    assert len(extra) == 2 and not extra.keys() & tensors.keys()
    save_file(tensors | extra, file)
    assert tiny.equal_trees(read(tmp_path / "model")[0], expected)
    save_file(tensors | {"model.layers.6.self_attn.k_proj.weight": tensors["model.norm.weight"]}, file)
    with pytest.raises(ValueError, match=r"has no place for: model\.layers\.6\.self_attn\.k_proj\.weight$"):
        read(tmp_path / "model")
    raw = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(
        json.dumps(raw | {"num_kv_shared_layers": 0, "use_double_wide_mlp": False})
    )
    with pytest.raises(ValueError, match=r"lacks tensors: model\.layers\.3\.self_attn\.k_"):
        read(tmp_path / "model")
