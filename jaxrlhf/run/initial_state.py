"""The state that a run starts from: its weights read or drawn, or its shapes alone."""

import zlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxrlhf.algorithm import TARGET
from jaxrlhf.config.adapters import starting_adapter
from jaxrlhf.config.members import grader_of
from jaxrlhf.models.files import hf_weights, peft
from jaxrlhf.models.lora import Based, base_table, merged_at_once, own_table
from jaxrlhf.models.parameters import Leaf, parameter_table
from jaxrlhf.models.quantized import Quantization
from jaxrlhf.run import saved_run, state
from jaxrlhf.run.build import Blueprint, Run
from jaxrlhf.run.origins import base_role, located
from jaxrlhf.sharding import for_programs
from jaxrlhf.types import Array, Head, Params, Role, TrainState

ZERO = ("value", "cost_value")  # new heads that start at 0


def initial_state(run: Run) -> TrainState:
    """Read or draw every role's weights. A role that starts from another is a copy of it: nothing is aliased. Roles
    that share a base have their own leaves alone, and the base is one of the slow trees."""
    (trained, slow, _), bases = run.resolved.roles, run.resolved.bases
    frozen = {name: read_base(run, name, bases) for name in sorted({one.base for one in bases.values()})}
    trees: dict[Role, Params] = {}
    for role in run.heads:
        based = bases.get(role)
        trees[role] = read_weights(run, role) if based is None else read_own(run, role, based, frozen[based.base])
    controls = run.algorithm.controls(run.cfg.algorithm)
    params, still = {role: trees[role] for role in trained}, {role: trees[role] for role in slow} | frozen
    return state.new_state(run.cfg.seed, params, still, run.recipe.optimizers, controls)


def read_base(run: Run, name: Role, bases: Mapping[Role, Based]) -> Params:
    """The frozen weights that roles share, in precision.params: a language model, or a trunk where none of them is.
    Where they are quantised, each leaf of a folder is as it comes."""
    members = [role for role, based in bases.items() if based.base == name]
    first = next((role for role in members if run.heads[role] == "lm"), members[0])
    params = read_plain(run, first, jnp.dtype(run.cfg.precision.params), bases[first].quantization)
    return params if run.heads[first] == "lm" else {part: x for part, x in params.items() if part != "head"}


def read_own(run: Run, role: Role, based: Based, base: Params) -> Params:
    """The leaves that a role has beside its ``base``: its adapter, new or from a folder, and its head."""
    found, head, lora, dtype, own = run.weights[role], run.heads[role], based.lora, run.dtype_of(role), {}
    if lora is not None and lora.init_from is not None:
        with_head: Head = "scalar" if head == "scalar" and peft.has_head(lora.init_from) else "lm"
        own = located(lambda _: peft.load(found.config, with_head, lora, base), lora.init_from, f"models.{role}")
    elif lora is not None:
        own = state.draw_adapter(found.config, lora, jax.random.fold_in(own_key(run, role), zlib.crc32(b"adapter")))
    if head == "scalar" and "head" not in own:
        fresh, zero = found.head == "lm", role in ZERO
        key = key_of(run, role)
        own |= (
            state.new_head(found.config, "bare", key, dtype, zero) if fresh else {"head": read_plain(run, role)["head"]}
        )
    return for_programs(own, run.mesh)


def own_key(run: Run, role: Role) -> Array:
    """The key of what no other role draws alike."""
    return jax.random.fold_in(jax.random.key(run.cfg.seed), sorted(run.cfg.models).index(role))


def key_of(run: Run, role: Role) -> Array:
    """The key of a role's random weights: it depends on the seed and on where the role starts, so that roles that start
    from the same random weights do."""
    shares = grader_of(role) != role and run.cfg.models[role].share_trunk  # each such head is drawn by itself
    return own_key(run, role if shares else base_role(run.cfg, role))


def read_weights(run: Run, role: Role) -> Params:
    """One role's whole parameters on the mesh, under the head it needs, an adapter that it starts with added."""
    params, start = read_plain(run, role), starting_adapter(run.cfg, role)
    if start is None or "embed" not in params or run.weights[role].path == run.cfg.run_dir:
        return params
    shape, head = run.weights[role].config, run.heads[role]
    folder = start.init_from or ""
    kept: Head = "scalar" if head == "scalar" and peft.has_head(folder) else "lm"
    own = located(lambda _: peft.load(shape, kept, start, params), folder, f"models.{role}")
    dtype = params["embed"]["tokens"]["embedding"].dtype
    return for_programs(merged_at_once(params, own, start.scale, dtype), run.mesh)


def read_plain(run: Run, role: Role, dtype=None, kind: Quantization | None = None) -> Params:
    """``read_weights`` without the adapter; ``dtype``: by default that of the role; ``kind``: how layers are
    quantised."""
    found, head, zero = run.weights[role], run.heads[role], role in ZERO
    key, dtype = key_of(run, role), run.dtype_of(role) if dtype is None else dtype
    if head == "action":  # the heads of one trunk differ, but for a target and what it follows
        key = jax.random.fold_in(key, zlib.crc32(role.removeprefix(TARGET).encode()))
    if found.kind == "new":
        return state.draw(found.config, head, key, dtype)
    if (head == "bare" and found.head in ("lm", None)) or (head == "action" and found.head != "action"):
        return state.new_head(found.config, head, key, dtype, zero)  # there is nothing to read
    if found.kind == "run":
        models = found.record["models"]
        params = saved_run.restore_model(found.path, found.step, models, found.role, dtype, run.mesh)
        table = parameter_table(found.config, saved_run.model_of(models[found.role])[1])
        params = jax.tree_util.tree_map_with_path(
            lambda path, leaf, x: state.pack_leaf(path[-1].key, leaf, x, kind),
            {name: table[name] for name in params},
            params,
            is_leaf=lambda x: isinstance(x, Leaf),
        )
    else:
        change = lambda name, leaf, x: state.pack_leaf(name, leaf, x, kind)
        params = hf_weights.load(found.path or "", found.config, found.head or "scalar", dtype, change=change)
        if found.head is None:
            del params["head"]  # drawn; that of change_head knows of ``zero``
    return for_programs(state.change_head(params, found.config, found.head or "lm", head, key, zero), run.mesh)


def abstract_state(drawn: Blueprint) -> TrainState:
    """The state's shapes and layouts, nothing allocated: what a checkpoint is restored into."""
    (trained, slow, _), bases = drawn.resolved.roles, drawn.resolved.bases

    def describe(role: Role) -> Params:
        if role in bases:
            table = own_table(drawn.configs[role], drawn.heads[role], bases[role].lora)
            return state.abstract_table(table, drawn.dtype_of(role), drawn.mesh)
        return state.abstract_params(drawn.configs[role], drawn.heads[role], drawn.dtype_of(role), drawn.mesh)

    params, still = {role: describe(role) for role in trained}, {role: describe(role) for role in slow}
    for name in sorted({based.base for based in bases.values()}):
        members = [role for role, based in bases.items() if based.base == name]
        table = base_table(drawn.configs[members[0]], {drawn.heads[role] for role in members})
        kind, dtype = bases[members[0]].quantization, jnp.dtype(drawn.cfg.precision.params)
        still[name] = state.abstract_base(table, kind, dtype, drawn.mesh)
    controls = lambda: drawn.algorithm.controls(drawn.cfg.algorithm)
    return state.describe_state(params, still, drawn.recipe.optimizers, controls, drawn.mesh)
