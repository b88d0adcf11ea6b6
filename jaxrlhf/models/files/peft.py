"""Adapters in PEFT's format: adapter_config.json and adapter_model.safetensors, read and written without PEFT or torch.

PEFT calls A of [inputs, rank] lora_A.weight, [rank, inputs], and B lora_B.weight, [outputs, rank]. What a linear map is
called there is in models/families. A DoRA's magnitudes m, [outputs], are lora_magnitude_vector; what learns here
is m less the norms of the frozen weights, which both ways therefore need. A map that a family keeps in one tensor with
others (Phi-3's query, key and value) has one adapter in PEFT and several here: such adapters are neither read nor
written.
"""

import math
import os
from typing import Any

import numpy as np
from etils import epath

from jaxrlhf.errors import show
from jaxrlhf.models.config import ModelConfig
from jaxrlhf.models.dora import base_norms
from jaxrlhf.models.families import FAMILIES, Module
from jaxrlhf.models.files.hf_folder import read_json, write_json
from jaxrlhf.models.files.hf_headers import FLOATS, open_file, shown
from jaxrlhf.models.files.hf_weights import place, to_numpy, write_weights
from jaxrlhf.models.layer_kinds import layers_with
from jaxrlhf.models.linear import LORA_A, LORA_B, MAGNITUDE
from jaxrlhf.models.lora import TARGETS, LoraConfig, own_table, stacks_with, targets_of
from jaxrlhf.models.parameters import Leaf, inputs, parameter_table
from jaxrlhf.types import Array, Head, Params

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # in front of transformers' names
SCORE = f"{PREFIX}score."
MOST_ALPHA = 1e30  # what a float32 holds with room to spare
SUFFIXES = {LORA_A: "lora_A.weight", LORA_B: "lora_B.weight", MAGNITUDE: "lora_magnitude_vector"}
# fields that would mean another adapter -> what they may be
PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "use_dora": (False, True, None),
    "lora_bias": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layers_to_transform": (None,),
    "layer_replication": (None,),
    "modules_to_save": (None, ["score"]),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "use_rslora": (False, True, None),
    "use_qalora": (False, None),
    "use_bdlora": (None, False),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    # the others (pissa, olora, corda, loftq, lora_ga) change the frozen weights as well
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}


def module_of(cfg: ModelConfig, target: str) -> Module:
    """Where a family's files have the linear map ``target``. Raises ValueError where it shares a tensor with others."""
    module = FAMILIES[cfg.family].hf.modules[f"layers.{TARGETS[target]}.{target}"]  # called alike in all stacks
    if "part" in module.layout:
        raise ValueError(
            f"adapter.targets: {target}: a {cfg.family}'s files have it in one tensor with others "
            f"({module.name.rpartition('.')[2]}), which has one adapter in PEFT's format; expected other targets, or "
            "merged weights (export without --adapter)"
        )
    return module


def is_adapter(folder: epath.PathLike) -> bool:
    """Whether the folder is one of PEFT's."""
    return (epath.Path(folder) / CONFIG).exists()


def need_whole(folder: epath.PathLike, prefix: str = "") -> None:
    """Raises ValueError, after ``prefix``, for an adapter alone where whole weights are expected."""
    if not is_adapter(folder) or (epath.Path(folder) / "config.json").exists():
        return
    raw, found = read_json(folder, CONFIG) or {}, read_shape(folder)
    start, where = raw.get("base_model_name_or_path") or "its base", os.fspath(folder)
    more = "dora: true, " if found.dora else ""
    raise ValueError(
        f"{prefix}{where}: an adapter alone; expected init_from: {start} and adapter: {{rank: {found.rank}, "
        f"alpha: {found.alpha:g}, {more}init_from: {where}}}"
    )


# ---- reading --------------------------------------------------------------------------------------------------------


def read_shape(folder: epath.PathLike) -> LoraConfig:
    """rank, alpha, rslora and dora of a folder's adapter; its targets are known by its tensors (``load``).

    Raises ValueError, in one line, where there is no adapter, or another kind than ours."""
    raw = read_json(folder, CONFIG)
    if raw is None:
        raise ValueError(f"adapter.init_from: {os.fspath(folder)}: there is no {CONFIG}; expected a folder of PEFT's")
    where = f"{epath.Path(folder) / CONFIG}"
    for name, known in PLAIN.items():
        if (value := raw.get(name)) not in known:
            raise ValueError(f"adapter.init_from: {where}: {name}: {show(value)}; expected {show(known[0])}")
    rank, alpha = raw.get("r"), raw.get("lora_alpha")
    if type(rank) is not int or rank < 1:
        raise ValueError(f"adapter.init_from: {where}: r: {show(rank)}; expected a rank of 1 or more")
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not 0 < alpha < MOST_ALPHA:
        raise ValueError(
            f"adapter.init_from: {where}: lora_alpha: {show(alpha)}; expected more than 0, less than {MOST_ALPHA:g}"
        )
    rslora, with_magnitudes = (bool(raw.get(f"use_{name}")) for name in ("rslora", "dora"))
    return LoraConfig(rank, float(alpha), rslora=rslora, dora=with_magnitudes, init_from=os.fspath(folder))


def check_folder(cfg: ModelConfig, lora: LoraConfig) -> None:
    """Raises ValueError, in one line, where the adapter in ``lora.init_from`` is not shaped as ``lora``."""
    folder = lora.init_from or ""
    found = read_shape(folder)
    for name in ("rank", "alpha", "rslora", "dora"):
        if (ours := getattr(lora, name)) != (theirs := getattr(found, name)):
            raise ValueError(f"adapter.{name}: {show(ours)}: {folder} has {show(theirs)}; nearest: {show(theirs)}")
    examine(cfg, lora)


def examine(cfg: ModelConfig, lora: LoraConfig) -> dict[str, Any]:
    """The opened tensors of ``lora.init_from``. Raises ValueError where they are not this model's and adapter's."""
    folder = epath.Path(lora.init_from or "")
    # PEFT reads magnitudes by their module's own name, too
    tensors = {
        name.removesuffix(".weight") if name.endswith(f"{SUFFIXES[MAGNITUDE]}.weight") else name: tensor
        for name, tensor in open_file(folder / WEIGHTS).items()
    }
    wanted = targets_of(cfg, lora)
    places = [(stack, target) for target in wanted for stack in stacks_with(layers_of(cfg), target)]
    kinds = (LORA_A, LORA_B, MAGNITUDE) if lora.dora else (LORA_A, LORA_B)
    expected = {name for place in places for kind in kinds for name in names_of(cfg, *place, kind)}
    if missing := sorted(expected - tensors.keys()):
        raise ValueError(
            f"adapter.targets: {', '.join(wanted)}: {folder} lacks {shown(missing)}; expected those of its "
            f"target_modules: {show((read_json(folder, CONFIG) or {}).get('target_modules'))}"
        )
    if other := sorted(name for name in tensors if name not in expected and not name.startswith(SCORE)):
        raise ValueError(
            f"adapter.targets: {', '.join(wanted)}: {folder} holds {shown(other)} too; expected all of its "
            f"target_modules: {show((read_json(folder, CONFIG) or {}).get('target_modules'))}"
        )
    return tensors


def layers_of(cfg: ModelConfig) -> dict[str, Any]:
    """The Leafs of the layers, a stack each."""
    return parameter_table(cfg, "lm")["layers"]


def names_of(cfg: ModelConfig, stack: str, target: str, kind: str) -> list[str]:
    """The tensors of A, B or magnitudes (``kind``) of one map, of each layer that the stack has it of."""
    name = module_of(cfg, target).name
    return [f"{PREFIX}{name.format(layer=layer)}.{SUFFIXES[kind]}" for layer in layers_with(cfg, stack)]


def has_head(folder: epath.PathLike) -> bool:
    """Whether the folder holds a scalar head."""
    return f"{SCORE}weight" in open_file(epath.Path(folder) / WEIGHTS)


def load(cfg: ModelConfig, head: Head, lora: LoraConfig, base: Params | None = None, dtype: str = "float32") -> Params:
    """What a role has of its own in the folder ``lora.init_from``, on the current mesh: A, B, magnitudes less the norms
    of the frozen weights ``base`` (which are needed with ``lora.dora``), and of a scalar ``head`` the head.

    Raises ValueError, in one line, for tensors that are missing, unused, of another shape, or not finite."""
    tensors, table = examine(cfg, lora), own_table(cfg, head, lora)

    def one(leaf: Leaf, values: list[np.ndarray]) -> Array:
        whole = np.stack(values) if leaf.axes[0] == "layers" else values[0]
        return place(leaf, lambda index: whole.reshape(leaf.shape)[index].astype(np.dtype(dtype)))

    def read(name: str, shape: tuple[int, ...]) -> np.ndarray:
        tensor = tensors[name]
        if tuple(tensor.get_shape()) != shape or tensor.get_dtype() not in FLOATS:
            found = f"{tensor.get_dtype()} {tuple(tensor.get_shape())}"
            raise ValueError(f"{lora.init_from}: {name}: is {found}; expected floating-point numbers {shape}")
        value = np.asarray(tensor[:], np.float32)
        if not np.isfinite(value).all():
            raise ValueError(f"{lora.init_from}: {name}: holds weights that are NaN or infinite")
        return value

    found: dict[str, Any] = {"layers": {}}
    for stack, target in ((stack, target) for stack, maps in table["layers"].items() for target in maps):
        leaves = table["layers"][stack][target]
        own = {}
        for kind, leaf in leaves.items():
            names, norms = names_of(cfg, stack, target, kind), norms_of(base, stack, target, kind, leaves[LORA_A])
            shape = matrix_shape(kind, leaf, lora.rank)
            values = [read(name, shape).T for name in names]
            own[kind] = one(leaf, values if norms is None else [*(np.stack(values) - norms)])
        found["layers"].setdefault(stack, {})[target] = own
    if head != "lm":
        kernel, bias = table["head"]["kernel"], table["head"]["bias"]
        value = read(f"{SCORE}bias", (1,)) if f"{SCORE}bias" in tensors else np.zeros(1, np.float32)
        found["head"] = {
            "kernel": one(kernel, [read(f"{SCORE}weight", kernel.shape[::-1]).T]),
            "bias": one(bias, [value]),
        }
    return found


def matrix_shape(kind: str, leaf: Leaf | Array, rank: int) -> tuple[int, ...]:
    """Of one layer's A, B or magnitudes in PEFT's format."""
    size = math.prod(leaf.shape[1:])
    return {LORA_A: (rank, size // rank), LORA_B: (size // rank, rank), MAGNITUDE: (size,)}[kind]


def norms_of(base: Params | None, stack: str, target: str, kind: str, a: Any) -> np.ndarray | None:
    """f32[layers, outputs]: the norms of a map's frozen weights, where ``kind`` is the magnitudes; ``a``: its A."""
    if kind != MAGNITUDE:
        return None
    assert base is not None, "PEFT's magnitudes are those of the frozen weights and what was learned"
    norms = to_numpy(base_norms(base["layers"][stack][target]["kernel"], len(a.shape) - 2))
    return norms.reshape(len(norms), -1)


# ---- writing --------------------------------------------------------------------------------------------------------


def save(
    own: Params,
    cfg: ModelConfig,
    head: Head,
    lora: LoraConfig,
    folder: epath.PathLike,
    start: str,
    base: Params | None = None,
) -> list[str]:
    """Write what a role has of its own as a folder that PEFT (and ``load``) reads; adapter_config.json comes last.

    Args:
        own: A, B, magnitudes and a scalar head, as lora.own_table has them.
        start: the weights that they belong to, as transformers' from_pretrained takes them.
        base: those weights as the role was trained on them, needed with ``lora.dora``.

    Returns:
        What PEFT computes otherwise: its scores have no bias.

    Raises:
        ValueError: in one line, for a map that shares a tensor with others.
    """
    folder, values, notes = epath.Path(folder), {}, []
    for stack, target in ((stack, target) for stack, maps in own["layers"].items() for target in maps):
        leaves = own["layers"][stack][target]
        for kind, leaf in leaves.items():
            matrix = matrix_shape(kind, leaf, lora.rank)[::-1]
            names, norms = names_of(cfg, stack, target, kind), norms_of(base, stack, target, kind, leaves[LORA_A])
            layers = [layer.astype(np.float32).reshape(matrix) for layer in to_numpy(leaf)]
            layers = layers if norms is None else [*(np.stack(layers) + norms)]
            values |= {name: layer.T for name, layer in zip(names, layers, strict=True)}
    if head != "lm":
        values[f"{SCORE}weight"] = to_numpy(own["head"]["kernel"]).astype(np.float32).T
        if bias := float(to_numpy(own["head"]["bias"])[0]):
            values[f"{SCORE}bias"] = np.full(1, bias, np.float32)
            notes = [f"{SCORE}bias: {bias:.6g}: PEFT's scores have no bias: they are ours less {bias:.6g}"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).unlink(missing_ok=True)
    write_weights(folder / WEIGHTS, values)
    write_json(folder / CONFIG, describe(cfg, head, lora, start))
    return notes


def describe(cfg: ModelConfig, head: Head, lora: LoraConfig, start: str) -> dict[str, Any]:
    """adapter_config.json."""
    targets = targets_of(cfg, lora)
    layers = layers_of(cfg)
    kernel = layers[stacks_with(layers, targets[0])[0]][targets[0]]["kernel"]
    first, ins = module_of(cfg, targets[0]).layout.split()[0], kernel.axes[1:][: inputs(kernel.axes[1:])]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if head == "lm" else "SEQ_CLS",
        "base_model_name_or_path": start,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha,
        "lora_dropout": 0.0,
        "use_rslora": lora.rslora,
        "use_dora": lora.dora,
        "bias": "none",
        "fan_in_fan_out": first == ".".join(ins),  # GPT-2's kernels
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None if head == "lm" else ["score"],
        "target_modules": module_names(cfg, targets),
    }


def module_names(cfg: ModelConfig, targets: tuple[str, ...]) -> list[str]:
    """What PEFT calls the maps: by the last part of their names, or by two where another map ends as well."""
    layers, parts = layers_of(cfg), {}
    for target, part in TARGETS.items():
        if stacks_with(layers, target):
            parts[target] = FAMILIES[cfg.family].hf.modules[f"layers.{part}.{target}"].name.split(".")
    others = [parts[target][-1] for target in parts if target not in targets]
    return sorted(
        {parts[target][-1] if parts[target][-1] not in others else ".".join(parts[target][-2:]) for target in targets}
    )
