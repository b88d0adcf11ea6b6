"""The weights that a quantised base was made from, for an adapter to be merged into: as a run's config names them."""

import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.config.yaml_text import read_yaml
from jaxrlhf.log.run_dir import split_step
from jaxrlhf.models.config import ModelConfig
from jaxrlhf.models.dora import moved
from jaxrlhf.models.files import hf_folder, hf_weights
from jaxrlhf.models.lora import merged_at_once
from jaxrlhf.models.parameters import Leaf, parameter_table
from jaxrlhf.models.quantized import Quantization, is_quantized, pack
from jaxrlhf.run import saved_run
from jaxrlhf.run.weights import in_folder
from jaxrlhf.types import Head, Params, Role


def merged_with_original(run_dir: str, step: int, extra: Mapping[str, Any], role: Role, dtype, mesh) -> Params:
    """One role's model with its adapter added to the weights that its base was quantised from. Magnitudes stay what
    they were learned as.

    Raises ValueError, in one line, where these can't be read, or are others by now."""
    models, record = extra["models"], extra["models"][role]
    based, tree = saved_run.based_of(record), read_yaml(extra["config"], "config")
    assert based is not None and based.quantization is not None, "whole weights, or a base as it was read"
    end, start = end_of_chain(tree, role)
    instead = "expected the weights that the run started from, or --dequantized"
    try:
        wide = read_wide(start, end, saved_run.model_of(record)[1], mesh)
    except (ValueError, OSError) as error:
        raise ValueError(f"{run_dir}: models.{end}.init_from: {start}: {error}; {instead}") from error
    stored = stored_format(tree)
    base, cfg = saved_run.restore_base(run_dir, models, role, stored, mesh), saved_run.model_of(record)[0]
    if (changed := first_difference(base, wide, cfg, based.quantization, stored)) is not None:
        raise ValueError(f"{run_dir}: models.{end}.init_from: {start}: other weights by now ({changed}); {instead}")
    scale = 1.0 if based.lora is None else based.lora.scale
    own = moved(saved_run.restore_own(run_dir, step, models, role, mesh), base, wide)
    return merged_at_once(wide, own, scale, jnp.dtype(dtype))


def stored_format(tree: Mapping[str, Any]):
    """The number format of a run's base, by a saved config."""
    return jnp.dtype(tree.get("precision", {}).get("params", "float32"))


def end_of_chain(tree: Mapping[str, Any], role: Role) -> tuple[Role, str]:
    """(the role at the end of the chain of init_from, where its weights come from), by a saved config."""
    models = tree["models"]
    while (start := models[role].get("init_from")) in models:
        role = start
    return role, start or ""


def read_wide(start: str, role: Role, head: Head, mesh) -> Params:
    """The weights that ``start`` names, in float32."""
    if saved_run.is_run(start):
        step, extra = saved_run.read_extra(start)
        found = saved_run.find_role(extra["models"], role)
        return saved_run.restore_model(split_step(start)[0], step, extra["models"], found, jnp.float32, mesh)
    found = in_folder(os.fspath(hf_folder.locate(start)), head)
    return hf_weights.load(found.path or "", found.config, found.head or "scalar", jnp.float32)


def first_difference(base: Params, wide: Params, cfg: ModelConfig, kind: Quantization, stored) -> str | None:
    """The first kernel of ``wide`` that isn't quantised as ``base`` is; None where all are."""
    layers = parameter_table(cfg, "lm")["layers"]
    for branch, maps in layers.items():
        for name, table in maps.items():
            leaf = table.get("kernel")
            if leaf is None or not is_quantized("kernel", leaf):
                continue
            ours, theirs = (tree["layers"][branch][name]["kernel"] for tree in (base, wide))
            if not same(ours, theirs, leaf, kind, stored):
                return f"layers.{branch}.{name}"
    return None


def same(packed: Any, wide: Any, leaf: Leaf, kind: Quantization, stored) -> bool:
    """Whether ``wide`` is quantised to ``packed``."""
    again = jax.jit(lambda x: pack(x.astype(stored), leaf, kind))(wide)
    return all(np.array_equal(hf_weights.to_numpy(one), hf_weights.to_numpy(two)) for one, two in zip(packed, again))
