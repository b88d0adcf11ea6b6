"""Text in, text out: sample continuations from a run, a HF folder or a hub model."""

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf import checkpoint, generate
from jaxrlhf.build import sampler_of, tokenizer_of
from jaxrlhf.config_yaml import read_yaml
from jaxrlhf.data import encode
from jaxrlhf.data import tokenizer as tokenizers
from jaxrlhf.feed import put
from jaxrlhf.log.run_dir import split_step
from jaxrlhf.models import hf, hf_config, hf_folder, hf_tensors
from jaxrlhf.models.config import ModelConfig
from jaxrlhf.models.kernels import hardware_of
from jaxrlhf.models.transformer import Runtime, padded_vocab
from jaxrlhf.sharding import MeshConfig, batch_shards, make_mesh
from jaxrlhf.types import Params, Prompts


class Model(NamedTuple):
    """A language model ready to sample from, under the mesh it was read on."""

    params: Params
    config: ModelConfig
    tokenizer: Any
    ids: hf_config.TokenIds
    chat: bool = False  # whether it was trained on plain-text prompts as turns of a conversation (data.chat)


def read_model(name: str, mesh, dtype=jnp.float32) -> Model:
    """The policy of a run (RUN, RUN@best, RUN@40), or a HF model. ``mesh`` is the current one.

    Raises ValueError, in one line, where there is no language model."""
    found = checkpoint.read_extra(name) if checkpoint.is_run(name) else None
    tokenizer = tokenizers.load_tokenizer(str(tokenizer_of(name)))
    if found:
        step, extra = found
        role = checkpoint.find_role(extra["models"], "policy")
        cfg, head = checkpoint.model_of(extra["models"][role])
        if head != "lm":
            raise ValueError(f"{name}: holds a {role} model with a {head} head, which can't write; expected a policy")
        params = checkpoint.restore_model(split_step(name)[0], step, extra["models"], role, dtype, mesh)
        ids = checkpoint.token_ids(tokenizer, {"eos_token_id": extra.get("eos_ids")})
        trained = read_yaml(extra["config"], "config").get("data") or {}
        return Model(params, cfg, tokenizer, ids, trained.get("chat") is not None)
    folder = hf_folder.locate(name)
    cfg, head = hf_config.read_config(folder)
    if head != "lm":
        raise ValueError(f"{name}: a model with a {head} head can't write; expected a causal language model")
    ids = checkpoint.token_ids(tokenizer, {"eos_token_id": tokenizers.folder_eos(str(folder))})
    if left := hf_tensors.examine(folder, cfg, head).left:
        print(f"{name}: not read: {hf_tensors.kinds(left)}", file=sys.stderr)
    beyond = [id for id in tokenizer.get_vocab().values() if id >= cfg.vocab_size]
    tokenizers.forbid(tokenizer, dict.fromkeys(beyond, f"its vocab_size is {cfg.vocab_size}"))
    return Model(hf.load(folder, cfg, head, dtype), cfg, tokenizer, ids)


def export_model(name: str, to: str) -> None:
    """Write the language model ``name`` (gguf:FILE, say) as a Hugging Face folder in float32, tokenizer included."""
    mesh = make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        model = read_model(name, mesh)
        ids = hf_config.embedded(model.ids, model.config.vocab_size)
        hf.save(model.params, model.config, "lm", to, ids=ids, tokenizer_folder=tokenizer_of(name))


def generate_text(
    name: str, prompts: Sequence[str], cfg: generate.GenerateConfig, seed: int = 0, chat: bool = False
) -> list[str]:
    """A continuation of each prompt. ``chat``: each is a user's message, put into the model's chat template; so it is
    for a run with data.chat too."""
    mesh = make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        model = read_model(name, mesh)
        batch = encode_prompts(model, prompts, chat or model.chat, batch_shards(mesh))
        sampler = sampler_of(cfg, model.tokenizer, model.ids.eos, padded_vocab(model.config))
        runtime = Runtime(hardware=hardware_of(mesh.devices.flat[0]))
        run = lambda params, prompts: generate.sample(
            params, model.config, prompts, jnp.int32(seed), jnp.int32(0), sampler, runtime
        )
        found = jax.device_get(jax.jit(run)(model.params, put(mesh, batch)))
    return tokenizers.decode_rows(model.tokenizer, found.tokens, found.response_mask)[: len(prompts)]


def encode_prompts(model: Model, prompts: Sequence[str], chat: bool, shards: int) -> Prompts:
    """Left-padded prompts; rows that fill up the mesh's shards are empty."""
    records = [{"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text} for text in prompts]
    ids = [encode.encode_prompt(record, model.tokenizer) for record in records]
    for text, piece in zip(prompts, ids):
        if why := tokenizers.why_unreadable(model.tokenizer, piece):
            raise ValueError(f"--prompt {text!r}: {why}")
    rows, width = -(-len(ids) // shards) * shards, max(map(len, ids))
    tokens, valid = np.full((rows, width), tokenizers.pad_id(model.tokenizer), np.int32), np.zeros((rows, width), bool)
    for row, piece in enumerate(ids):
        tokens[row, width - len(piece) :] = piece
        valid[row, width - len(piece) :] = True
    return Prompts(tokens, valid, np.arange(rows, dtype=np.int32))  # type: ignore[arg-type]
