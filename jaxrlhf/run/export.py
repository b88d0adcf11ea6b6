"""A role of a run as a Hugging Face folder."""

import os
import tempfile
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from jaxrlhf.config.yaml_text import read_yaml
from jaxrlhf.data import tokenizer as tokenizers
from jaxrlhf.log.run_dir import split_step
from jaxrlhf.models.config import MLP
from jaxrlhf.models.files import hf_config, hf_weights, peft
from jaxrlhf.run.export_pad_token import with_own_pad
from jaxrlhf.run.original_base import end_of_chain, merged_with_original, stored_format
from jaxrlhf.run.saved_run import (
    based_of,
    describe_step,
    model_of,
    read_extra,
    restore_base,
    restore_model,
    restore_own,
)
from jaxrlhf.run.verified_steps import reading
from jaxrlhf.sharding import MeshConfig, make_mesh
from jaxrlhf.types import Params, Role


def token_ids(tokenizer: Any, generation_config: Mapping[str, Any] | None) -> hf_config.TokenIds:
    """The special tokens of a tokenizer, and those that ``generation_config`` says end a response."""
    eos = tokenizers.eos_ids(tokenizer, generation_config)
    return hf_config.TokenIds(eos, tokenizer.bos_token_id, tokenizer.pad_token_id)


def export(name, role: Role, to, dequantized: bool = False) -> tuple[str, list[str]]:
    """Write one role of a run (RUN, RUN@best, RUN@40) as a HF folder, tokenizer included. A reward model gets a pad
    token of its own. Returns which step it was, in words, and what differs from the run, or in transformers.

    An adapter on a quantised base is merged into the weights that this was made from; ``dequantized``: into what it
    was trained on, the numbers that the quantised ones stand for.

    Raises FileNotFoundError for a run without checkpoints, ValueError for a step or a role that it does not have, and
    where those weights are gone."""
    with reading():
        return export_role(name, role, to, dequantized)


def export_role(name, role: Role, to, dequantized: bool = False) -> tuple[str, list[str]]:
    """``export``, while the run's steps stay where they are."""
    (step, extra), (run_dir, _) = read_extra(name), split_step(name)
    dtype, based = jnp.dtype(dtype_of(extra, run_dir, role)), based_of(extra["models"][role])
    mesh, quantized = make_mesh(MeshConfig()), based is not None and based.quantization is not None
    if dequantized and not quantized:
        raise ValueError(f"--dequantized: {run_dir}: the weights of its {role} are not quantised; leave it out")
    with jax.set_mesh(mesh):
        if quantized and not dequantized:
            params = merged_with_original(run_dir, step, extra, role, dtype, mesh)
        else:
            params = restore_model(run_dir, step, extra["models"], role, dtype, mesh)
        notes = write_folder(params, run_dir, extra, role, to)
    return describe_step(run_dir, step), notes


def export_adapter(name, role: Role, to) -> tuple[str, list[str]]:
    """Write the adapter of one role of a run as a folder that PEFT reads, in float32, without a tokenizer. Returns
    as ``export``.

    Raises FileNotFoundError for a run without checkpoints, ValueError where the role has no adapter, or PEFT's format
    can't hold it."""
    with reading():
        (step, extra), (run_dir, _) = read_extra(name), split_step(name)
        dtype_of(extra, run_dir, role)
        models, tree = extra["models"], read_yaml(extra["config"], "config")
        stored, (_, start) = stored_format(tree), end_of_chain(tree, role)
        based = based_of(models[role])
        if based is None or based.lora is None:
            adapted = [other for other, record in models.items() if record.get("adapter")]
            raise ValueError(f"--adapter: {run_dir}: its {role} has none; adapters: {', '.join(adapted) or 'none'}")
        (cfg, head), mesh = model_of(models[role]), make_mesh(MeshConfig())
        with jax.set_mesh(mesh):
            own = restore_own(run_dir, step, models, role, mesh)
            base = restore_base(run_dir, models, role, stored, mesh) if based.lora.dora else None
            notes = peft.save(own, cfg, head, based.lora, to, start, base)
    return describe_step(run_dir, step), notes


def dtype_of(extra: Mapping[str, Any], run_dir: str, role: Role) -> str:
    """The number format of a role's stored weights; ``extra``: the JSON of the run's checkpoint. Raises ValueError for
    a role that the run does not have, or that no folder can hold."""
    models = extra["models"]
    if role not in models:
        raise ValueError(f"--role {role}: {run_dir} has no such role; it has: {', '.join(sorted(models))}")
    if models[role]["head"] == "action":
        raise ValueError(f"--role {role}: action values, which no Hugging Face class holds; expected policy")
    if model_of(models[role])[0].family == MLP:
        raise ValueError(f"--role {role}: a model of observations, which no Hugging Face class holds")
    return models[role].get("dtype") or extra["dtype"]  # an older run has one for all roles


def write_folder(params: Params, run_dir: str, extra: Mapping[str, Any], role: Role, to) -> list[str]:
    """``params``, shaped as a run's ``role``, as a folder with the run's tokenizer. Returns what differs from them, or
    in transformers."""
    (cfg, head), dtype, notes = model_of(extra["models"][role]), dtype_of(extra, run_dir, role), []
    folder = epath.Path(run_dir) / "tokenizer"
    tokenizer = tokenizers.load_tokenizer(os.fspath(folder))
    ids = hf_config.embedded(token_ids(tokenizer, {"eos_token_id": extra.get("eos_ids")}), cfg.vocab_size)
    with tempfile.TemporaryDirectory() as scratch:
        if head == "scalar":
            tokenizer, params, cfg, ids, notes = with_own_pad(tokenizer, params, cfg, ids)
            tokenizers.save_tokenizer(tokenizer, scratch)
            folder = epath.Path(scratch)
        return notes + hf_weights.save(params, cfg, head, to, dtype, ids=ids, tokenizer_folder=folder)
