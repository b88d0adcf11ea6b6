"""What a run directory's checkpoints hold: its steps, its record, its models; what other runs take from it."""

import contextlib
import dataclasses
import functools
import json
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import orbax.checkpoint as ocp
import yaml
from etils import epath

from jaxrlhf.algorithm import TEACHER
from jaxrlhf.config.members import grader_of, members_in
from jaxrlhf.log.run_dir import split_step
from jaxrlhf.models.config import ModelConfig, resolve
from jaxrlhf.models.lora import Based, LoraConfig, base_table, merged_at_once, own_table
from jaxrlhf.models.rope import RopeScaling
from jaxrlhf.run.state import abstract_base, abstract_params, abstract_table
from jaxrlhf.run.verified_steps import base_directory, committed, directory, newest, require
from jaxrlhf.types import Head, Params, Role

EXTRA = "extra"  # the item of what is not an array: JSON


def is_run(name) -> bool:
    """Whether ``name`` (RUN, RUN@best, RUN@40) is a run directory with at least one checkpoint."""
    run_dir, _ = split_step(name)
    return (epath.Path(run_dir) / "config.yaml").exists() and directory(run_dir).exists()


def models_record(
    configs: dict[Role, ModelConfig],
    heads: dict[Role, Head],
    trunks: dict[Role, Role],
    dtypes: Mapping[Role, Any] = {},
    bases: Mapping[Role, Based] = {},
) -> dict:
    """The shapes of a run's models as JSON, saved with every checkpoint; ``trunks``: on whose a bare head stands;
    ``dtypes``: of their own stored weights; ``bases``: of the roles that share frozen weights."""
    record = {role: {"head": heads[role], "config": dataclasses.asdict(cfg)} for role, cfg in configs.items()}
    for role, trunk in trunks.items():
        record[role]["trunk"] = trunk
    for role, dtype in dtypes.items():
        record[role]["dtype"] = jnp.dtype(dtype).name
    for role, (base, lora, kind) in bases.items():
        adapter = None if lora is None else dataclasses.asdict(lora)
        record[role] |= {"base": base, "adapter": adapter, "base_quantization": kind}
    return record


def model_of(record: dict) -> tuple[ModelConfig, Head]:
    """One role's (config, head) from models_record, of this version or an older one that lacked some fields. A bare
    head is restored with its trunk, as a model of its own."""
    fields = with_tuples(record["config"])
    if fields.get("rope_scaling"):
        fields["rope_scaling"] = RopeScaling(**with_tuples(fields["rope_scaling"]))
    return resolve(ModelConfig(**fields)), "scalar" if record["head"] == "bare" else record["head"]


def based_of(record: dict) -> Based | None:
    """The base of one role from models_record; None where it has whole weights."""
    if "base" not in record:
        return None
    adapter = record["adapter"]
    lora = None if adapter is None else LoraConfig(**with_tuples(adapter))
    return Based(record["base"], lora, record.get("base_quantization"))


def with_tuples(fields: dict[str, Any]) -> dict[str, Any]:
    """JSON has lists only."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}


def measured(run_dir, metric: str) -> dict[int, float]:
    """Step -> what it was measured as by ``metric``, where that is a number."""
    found = {}
    for step in committed(run_dir):
        file = directory(run_dir) / str(step) / "metrics" / "metrics"
        with contextlib.suppress(ValueError, AttributeError, FileNotFoundError):  # damaged, or never measured
            value = json.loads(file.read_bytes()).get(metric)
            if isinstance(value, (int, float)) and math.isfinite(value):
                found[step] = value
    return found


def best_of(values: Mapping[int, float], mode: str) -> int | None:
    """The step whose value is the best one, the later of equal ones; None where nothing was measured."""
    return max(values, key=lambda step: (-values[step] if mode == "min" else values[step], step), default=None)


def best_step(run_dir) -> tuple[int, str] | None:
    """(step, metric) of the best checkpoint by checkpoint.best of the run's config; None where none was measured."""
    config = epath.Path(run_dir) / "config.yaml"
    tree = yaml.safe_load(config.read_text()) if config.exists() else None
    wanted = tree.get("checkpoint") or {} if isinstance(tree, dict) else {}
    if not (metric := wanted.get("best")):
        return None
    best = best_of(measured(run_dir, metric), wanted.get("mode", "max"))
    return None if best is None else (best, metric)


def find_step(name) -> int:
    """The step that ``name`` says: of RUN the newest good one, of RUN@best and RUN@40 that one.

    Raises FileNotFoundError where the run has no checkpoint, ValueError, with the steps there are, where it has not
    this one, and Damaged where it isn't what was saved."""
    run_dir, wanted = split_step(name)
    if not wanted:
        step = newest(run_dir)
        if step is None:
            raise FileNotFoundError(
                f"{run_dir}: no checkpoint in it; a run saves one every checkpoint.every iterations"
            )
        return step
    steps, best = committed(run_dir), best_step(run_dir)
    step = best[0] if wanted == "best" and best else int(wanted) if wanted.isdecimal() else None
    if step in steps:
        require(run_dir, step, name)
        return step
    there = f"{run_dir} has: {', '.join(map(str, steps))}" + (f"; best: {best[0]} by {best[1]}" if best else "")
    if wanted == "best":
        raise ValueError(f"{name}: no step of it was measured by checkpoint.best of its config; {there}")
    raise ValueError(f"{name}: no step {wanted}; {there}")


def describe_step(run_dir, step: int) -> str:
    """Which step it is, in words, and whether it is the best one."""
    best = best_step(run_dir)
    return f"step {step}, the best by {best[1]}" if best and best[0] == step else f"step {step}"


def read_extra(name, step: int | None = None) -> tuple[int, dict]:
    """(step, its JSON) of a run: the step that ``name`` says, or this one. Raises as ``find_step``."""
    step = find_step(name) if step is None else step
    path = directory(split_step(name)[0]) / str(step) / EXTRA
    return step, ocp.Checkpointer(ocp.JsonCheckpointHandler()).restore(path)


class SavedRuns:
    """What a start learns of saved runs, of the one that it resumes and of those that it starts from: each is read
    once, however many roles ask. Whoever starts makes one and passes it down.

    A checkpoint that is written afterwards is not seen: ``verified_steps.newest`` and this module's ``read_extra`` look
    anew."""

    def __init__(self):
        self.newest, self.find_step = functools.cache(newest), functools.cache(find_step)
        self.read_step = functools.cache(read_extra)

    def read_extra(self, name) -> tuple[int, dict]:
        """(step, its JSON) of the step that ``name`` says. Raises as ``find_step``."""
        return self.read_step(split_step(name)[0], self.find_step(name))

    def own_extra(self, run_dir) -> tuple[int, dict] | None:
        """(step, its JSON) of the checkpoint that a run goes on from; None where it has none."""
        step = self.newest(run_dir)
        return None if step is None else self.read_step(run_dir, step)


def find_role(record: dict, role: Role) -> Role:
    """The role of a run's ``models`` that another run's ``role`` starts from: its namesake, of a member its grader, the
    policy, or any; a teacher is another run's policy, whoever taught that.

    Raises ValueError for one reward model of an ensemble's run."""
    members = members_in(record, role)
    if members != (role,):
        raise ValueError(
            f"{role}: an ensemble there; expected one of {', '.join(members)}, or a list of {len(members)}"
        )
    namesakes = () if role == TEACHER else (role, grader_of(role))
    for name in (*namesakes, "policy", *record):
        if name in record:
            return name
    raise ValueError(f"a run without models has nothing to start {role} from")


def restore_role(run_dir, step: int, role: Role, abstract: Params) -> Params:
    """One role's parameters of a run, laid out as ``abstract`` says."""
    there = directory(run_dir) / str(step)
    item = next(there / f"{kind}.{role}" for kind in ("params", "slow") if (there / f"{kind}.{role}").exists())
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(item, abstract)


def restore_guides(run_dir, step: int, models: dict, dtype, mesh) -> tuple[Params, ...]:
    """The trained heads of action values on the policy's trunk, of a run that recorded ``models``."""
    learned = lambda role: (directory(run_dir) / str(step) / f"params.{role}").exists()
    on_policy = lambda record: record["head"] == "action" and record.get("trunk") == "policy"
    roles = [role for role, record in models.items() if on_policy(record) and learned(role)]
    shape = lambda role: abstract_params(model_of(models[role])[0], "action", dtype, mesh)
    return tuple(restore_role(run_dir, step, role, shape(role)) for role in roles)


def restore_own(run_dir, step: int, models: dict, role: Role, mesh) -> Params:
    """The leaves that a role on a base has of its own, in float32."""
    (cfg, head), based = model_of(models[role]), based_of(models[role])
    table = own_table(cfg, head, based.lora if based else None)
    return restore_role(run_dir, step, role, abstract_table(table, jnp.float32, mesh)) if table else {}


def restore_base(run_dir, models: dict, role: Role, dtype, mesh) -> Params:
    """The frozen weights that a role is on, as they are stored: packed where they are quantised."""
    based = based_of(models[role])
    assert based is not None, f"{role} is on no base"
    heads = {record["head"] for record in models.values() if record.get("base") == based.base}
    shape = abstract_base(base_table(model_of(models[role])[0], heads), based.quantization, dtype, mesh)
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(base_directory(run_dir, based.base), shape)


def restore_model(run_dir, step: int, models: dict, role: Role, dtype, mesh) -> Params:
    """One role's model of a run that recorded ``models``, on ``mesh``; a bare head gets a copy of its trunk, and a base
    has the role's adapter added: a quantised one is taken for what it was trained as."""
    record = models[role]
    if (based := based_of(record)) is not None:
        base = restore_base(run_dir, models, role, dtype, mesh)
        scale = 1.0 if based.lora is None else based.lora.scale
        own = restore_own(run_dir, step, models, role, mesh)
        return merged_at_once(base, own, scale, jnp.dtype(dtype))
    params = restore_role(run_dir, step, role, abstract_params(model_of(record)[0], record["head"], dtype, mesh))
    if "trunk" not in record:
        return params
    return restore_model(run_dir, step, models, record["trunk"], dtype, mesh) | params
