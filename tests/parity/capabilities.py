"""What runs with each family beside the comparisons of checks.py, by the first case of each. As there, a check fails
with an AssertionError, or returns what it has shown, in a word: where something is refused, by which words."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.models import int8
from jaxrlhf.models.attention.kernels import Hardware, passed_over
from jaxrlhf.models.files import hf_weights, peft
from jaxrlhf.models.files.gguf_families import ARCHITECTURES
from jaxrlhf.models.lora import LoraConfig, assemble, targets_of
from jaxrlhf.models.parameters import Leaf, inputs, parameter_table
from jaxrlhf.models.transformer import Runtime
from jaxrlhf.sharding import MeshConfig, make_mesh
from tests.parity.both import compute, our_greedy, read, reload, their_output, write_by_law
from tests.parity.cases import COLUMNS, VALID, config_of, family_of
from tests.parity.checks import TOLERANCE, close, saved, scratch
from tests.support import chats, ggufs, tiny

TPU = Hardware("tpu")
EIGHT_BITS = 0.02  # nats a token: the mean difference of log-probs that a cache of 8 bits makes


@functools.cache
def by_law(case: str):
    """(folder, its parameters, config, head). No torch."""
    folder = scratch() / "model"
    write_by_law(folder, config_of(case, "lm"))
    return folder, *read(folder)


@functools.cache
def sharded(case: str) -> str:
    """Each device of eight reads its part of the weights; they are those of one device, and written the same."""
    folder, params, cfg, head = by_law(case)
    mesh = MeshConfig(data=1, fsdp=2, tensor=2, expert=2) if cfg.num_experts else MeshConfig(data=2, fsdp=2, tensor=2)
    with jax.set_mesh(make_mesh(mesh, jax.devices()[:8])):
        split, *_ = read(folder)
        hf_weights.save(split, cfg, head, folder.parent / "split")
    assert any(leaf.addressable_shards[0].data.size < leaf.size for leaf in jax.tree.leaves(split))
    assert tiny.equal_trees(split, params)
    hf_weights.save(params, cfg, head, folder.parent / "alone")
    files = [(folder.parent / place / "model.safetensors").read_bytes() for place in ("split", "alone")]
    assert files[0] == files[1]
    return "exact"


@functools.cache
def gguf_file(case: str) -> str:
    """A file's logits are those of transformers, or where that cannot read it, its weights those that it is made of."""
    family, folder = family_of(case), scratch()
    name = ggufs.FILES[family]
    if family == "mixtral":
        file = ggufs.write(name, folder, num_local_experts=4, num_experts_per_tok=2)
        with pytest.raises(ValueError, match="expert_count: 4 is not supported; expected 0"):
            ggufs.unpacked(file, folder)
        return "refused"
    if name not in ARCHITECTURES:
        with pytest.raises(ValueError, match=f"general.architecture: '{name}' is not supported"):
            ggufs.unpacked(ggufs.write_empty(name, folder / "m.gguf"), folder)
        return "refused"
    also = "" if ARCHITECTURES[name].family == family else f", as `{ARCHITECTURES[name].family}`"
    if name in ggufs.READ_THERE:
        ggufs.compare(name, folder)
        return f"{TOLERANCE:g}{also}"
    found, expected = read(ggufs.unpacked(ggufs.write(name, folder), folder)), read(folder / "hf")
    assert found[1:] == expected[1:] and tiny.equal_trees(found[0], expected[0])
    return f"exact{also}"


@functools.cache
def chat(case: str) -> str:
    """A template that is built as those of the family: what a prompt ends with, what is learnt, its system turn."""
    name = chats.CHATS[family_of(case)]
    if name is None:
        return "none published"
    chats.check(chats.SHAPES[name])
    return name


def sayable(cfg, target: str) -> bool:
    """Whether PEFT's format has an adapter of the map alone."""
    try:
        return bool(peft.module_of(cfg, target))
    except ValueError:
        return False


@functools.cache
def lora(case: str) -> str:
    """An adapter on all maps that PEFT's format has: its logits there, and what PEFT writes read again."""
    theirs = pytest.importorskip("peft")
    model, folder = saved(case)
    params, cfg, head = read(folder)
    targets = targets_of(cfg, LoraConfig(rank=2))
    found = tuple(target for target in targets if sayable(cfg, target))
    config, places = LoraConfig(rank=2, alpha=2, targets=found), (scratch(), scratch())
    own = tiny.adapter(cfg, head, config, 1)
    peft.save(own, cfg, head, config, places[0], str(folder))
    adapted = theirs.PeftModel.from_pretrained(reload(model, folder), str(places[0]))
    logits = their_output(adapted)[VALID]
    assert np.abs(logits - their_output(model)[VALID]).max() > 0.02
    close(compute(assemble(params, own, config.scale), cfg, head)[VALID], logits, 1)
    adapted.save_pretrained(places[1])
    again = peft.load(cfg, head, dataclasses.replace(config, init_from=str(places[1])))
    assert tiny.equal_trees(again, own)
    refused = [target for target in targets if target not in found]
    return f"{TOLERANCE:g}" + (f"; refused: {', '.join(refused)}" if refused else "")


def rounded(params, cfg, head):
    """(parameters, config) whose kernels are numbers of 8 bits, with a scale an output; a tied head is one too."""

    def one(path, leaf: Leaf, x):
        if path[-1].key != "kernel":
            return x
        layers = leaf.axes[0] == "layers"
        found = int8.quantized(x, tuple(range(layers, layers + inputs(leaf.axes[layers:]))))
        return found.values * found.scale

    table = parameter_table(cfg, head)
    kernels = jax.tree_util.tree_map_with_path(one, table, params, is_leaf=lambda x: isinstance(x, Leaf))
    if not cfg.tie_embeddings:
        return kernels, cfg
    found = int8.quantized(params["embed"]["tokens"]["embedding"], (1,))
    kernel = (found.values * found.scale).T
    return kernels | {"head": {"kernel": kernel}}, dataclasses.replace(cfg, tie_embeddings=False)


@functools.cache
def eight_bits(case: str) -> str:
    """Log-probs of what is sampled in 8 bits, beside a forward pass of the weights rounded to these: what is left is
    the cache's rounding."""
    _, params, cfg, head = by_law(case)
    parts: tuple[int8.Part, ...] = ("weights", "cache")
    read: tuple[int8.Part, ...] = tuple(part for part in parts if int8.refusal([part], cfg) is None)
    made = jax.tree.map(np.asarray, our_greedy(params, cfg, runtime=Runtime(int8=read)))
    near = rounded(params, cfg, head) if "weights" in read else (params, cfg)
    whole = np.asarray(jax.nn.log_softmax(compute(*near, head, made.tokens, made.valid)))
    expected = np.take_along_axis(whole[:, COLUMNS - 1 : -1], made.tokens[:, COLUMNS:, None], axis=-1)[..., 0]
    assert 1e-4 < np.abs(made.logprobs[:, COLUMNS:] - expected).mean() < EIGHT_BITS
    refused = [part for part in parts if part not in read]
    return f"{EIGHT_BITS:g}" + (f"; refused: {', '.join(refused)}" if refused else "")


@functools.cache
def splash(case: str) -> str:
    """Hidden states by the kernel, in Pallas' interpreter, and by XLA."""
    _, params, cfg, head = by_law(case)
    if (problem := passed_over(TPU, cfg, jnp.bfloat16)) is not None:
        return problem
    runtime = Runtime(attention="splash", hardware=TPU, interpret=True)
    close(compute(params, cfg, head, runtime=runtime)[VALID], compute(params, cfg, head)[VALID], 1)
    return f"{TOLERANCE:g}"


CAPABILITIES: dict[str, Callable[[str], str]] = {
    "sharded": sharded,
    "gguf": gguf_file,
    "chat": chat,
    "lora": lora,
    "int8": eight_bits,
    "splash": splash,
}
