"""The state that a run starts from: its weights read or drawn, or its shapes alone."""

import zlib

import jax

from jaxrlhf.algorithm import TARGET
from jaxrlhf.config.members import grader_of
from jaxrlhf.models.files import hf_weights
from jaxrlhf.run import saved_run, state
from jaxrlhf.run.build import Blueprint, Run
from jaxrlhf.run.origins import base_role
from jaxrlhf.sharding import for_programs
from jaxrlhf.types import Params, Role, TrainState


def initial_state(run: Run) -> TrainState:
    """Read or draw every role's weights. A role that starts from another is a copy of it: nothing is aliased."""
    trees: dict[Role, Params] = {role: read_weights(run, role) for role in run.heads}
    trained, slow, _ = run.resolved.roles
    controls = run.algorithm.controls(run.cfg.algorithm)
    params, still = {role: trees[role] for role in trained}, {role: trees[role] for role in slow}
    return state.new_state(run.cfg.seed, params, still, run.recipe.optimizers, controls)


def read_weights(run: Run, role: Role) -> Params:
    """One role's parameters on the mesh, under the head it needs. Random weights depend on the seed and on where the
    role starts, so that roles that start from the same random weights do."""
    found, head, zero = run.weights[role], run.heads[role], role in ("value", "cost_value")
    shares = grader_of(role) != role and run.cfg.models[role].share_trunk  # each such head is drawn by itself
    number = sorted(run.cfg.models).index(role if shares else base_role(run.cfg, role))
    key, dtype = jax.random.fold_in(jax.random.key(run.cfg.seed), number), run.dtype_of(role)
    if head == "action":  # the heads of one trunk differ, but for a target and what it follows
        key = jax.random.fold_in(key, zlib.crc32(role.removeprefix(TARGET).encode()))
    if found.kind == "new":
        return state.draw(found.config, head, key, dtype)
    if (head == "bare" and found.head in ("lm", None)) or (head == "action" and found.head != "action"):
        return state.new_head(found.config, head, key, dtype, zero)  # there is nothing to read
    if found.kind == "run":
        models = found.record["models"]
        params = saved_run.restore_model(found.path, found.step, models, found.role, dtype, run.mesh)
    else:
        params = hf_weights.load(found.path or "", found.config, found.head or "scalar", dtype)
        if found.head is None:
            del params["head"]  # drawn; that of change_head knows of ``zero``
    return for_programs(state.change_head(params, found.config, found.head or "lm", head, key, zero), run.mesh)


def abstract_state(drawn: Blueprint) -> TrainState:
    """The state's shapes and layouts, nothing allocated: what a checkpoint is restored into."""
    trained, slow, _ = drawn.resolved.roles

    def describe(role: Role) -> Params:
        return state.abstract_params(drawn.configs[role], drawn.heads[role], drawn.dtype_of(role), drawn.mesh)

    params, still = {role: describe(role) for role in trained}, {role: describe(role) for role in slow}
    controls = lambda: drawn.algorithm.controls(drawn.cfg.algorithm)
    return state.describe_state(params, still, drawn.recipe.optimizers, controls, drawn.mesh)
