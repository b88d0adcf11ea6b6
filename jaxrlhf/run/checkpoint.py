"""Checkpoints through orbax: the whole state of a run, asynchronously, a directory a step.

Each role is an item of its own, so that another run can take one role and read nothing else.
"""

import contextlib
import dataclasses
import json
import math
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import yaml
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy

from jaxrlhf.data import tokenizer as tokenizers
from jaxrlhf.errors import one_line
from jaxrlhf.log.run_dir import split_step
from jaxrlhf.models.config import ModelConfig, resolve
from jaxrlhf.models.files import hf, hf_config
from jaxrlhf.models.rope import RopeScaling
from jaxrlhf.run.own_pad import with_own_pad
from jaxrlhf.run.state import abstract_params
from jaxrlhf.sharding import MeshConfig, make_mesh
from jaxrlhf.types import Head, Params, Role, TrainState

STATE, EXTRA = "state", "extra"  # items beside the roles'


class Checkpoints:
    """The checkpoints of one run directory: the last ``keep``, and the best by ``best`` (a name in save's metrics).

    ``read_only``: for other processes than the one that trains, whose unfinished checkpoints are then left alone.
    ``background``: a save goes on after it was called, from a copy of the state in host memory."""

    def __init__(
        self,
        run_dir,
        keep: int = 2,
        best: str | None = None,
        mode: str = "max",
        read_only: bool = False,
        background: bool = True,
    ):
        policies: list = [preservation_policy.LatestN(keep)]
        # a checkpoint that an earlier config measured otherwise is no candidate
        of = lambda metrics: metrics.get(best, math.inf if mode == "min" else -math.inf)
        if best:
            rules = {"get_metric_fn": of, "reverse": mode == "min", "keep_checkpoints_without_metrics": False}
            policies.append(preservation_policy.BestN(n=1, **rules))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
            best_fn=of if best else None,  # without it orbax writes no metrics, and a resumed run forgets its best
            best_mode=mode,
            cleanup_tmp_directories=not read_only,  # what a crash left half-written
            read_only=read_only,
            enable_async_checkpointing=background,
        )
        self.best, self.mode = best, mode
        self.manager = ocp.CheckpointManager(directory(run_dir), options=options)

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Raises OSError, in one line, where the block, or what it waits for, can't write: a full disk, say."""
        try:
            yield
        except Exception as error:  # tensorstore has ValueErrors of many lines
            run_dir = epath.Path(self.manager.directory).parent
            system = re.findall(r": ([^:\[]+) \[os_error_code", str(error))
            why = system[-1] if system else getattr(error, "strerror", None) or one_line(error)[:200]
            kept = latest_step(run_dir)
            then = "the same command starts again" if kept is None else f"the same command goes on from step {kept}"
            raise OSError(f"{run_dir}: a checkpoint could not be written: {why}; once it can be, {then}") from error

    def save(self, step: int, state: TrainState, extra: dict, metrics: dict[str, float] | None = None) -> None:
        """Start to write; returns once the arrays may be donated. ``extra`` is JSON: config, models, data iterators.

        A step that is there already, saved before it was measured, is written anew only for what makes it the best."""
        items: dict[str, Any] = {item: ocp.args.StandardSave(tree) for item, tree in parts(state).items()}
        items[EXTRA] = ocp.args.JsonSave(extra)
        value = (metrics or {}).get(self.best, math.nan) if self.best else math.nan
        known = None if math.isnan(value) else {self.best: value}
        with self.writing():
            if step == self.manager.latest_step():
                if known is None:
                    return
                self.manager.wait_until_finished()
                self.manager.delete(step)
            self.manager.save(step, args=ocp.args.Composite(**items), metrics=known, force=True)

    def latest(self) -> int | None:
        """The newest step that is whole, or None."""
        return self.manager.latest_step()

    def best_step(self) -> int | None:
        """The step that is best by ``best``; None where nothing is, or none was measured."""
        with self.writing():
            self.manager.wait_until_finished()
        return self.manager.best_step() if self.best else None

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """The state of ``step``, laid out as ``abstract`` says: on another mesh than it was saved from, if need be.

        Raises ValueError, in one line, where other roles learned, or other ones did not."""
        items = {item: ocp.args.StandardRestore(tree) for item, tree in parts(abstract).items()}
        there = {path.name for path in (epath.Path(self.manager.directory) / str(step)).iterdir()}
        if missing := sorted(items.keys() - there):
            held = ", ".join(sorted(name for name in there if name.startswith(("params.", "slow."))))
            raise ValueError(
                f"{self.manager.directory}: step {step} has no {missing[0]}, as the config wants; it has {held}"
            )
        found = self.manager.restore(step, args=ocp.args.Composite(**items))
        return assemble(abstract, found)

    def extra(self, step: int) -> dict:
        """The JSON saved with ``step``."""
        return self.manager.restore(step, args=ocp.args.Composite(**{EXTRA: ocp.args.JsonRestore()}))[EXTRA]

    def close(self) -> None:
        """Wait until everything is on disk."""
        with self.writing():
            self.manager.wait_until_finished()
        self.manager.close()


def directory(run_dir) -> epath.Path:
    """Where a run keeps its checkpoints (orbax wants absolute paths; to resolve gs://... would make it a local one)."""
    path = epath.Path(run_dir)
    return (path if "://" in os.fspath(path) else path.resolve()) / "checkpoints"


def parts(state: TrainState) -> dict[str, Any]:
    """The state as items: one a role, and the rest."""
    rest = {"step": state.step, "seed": state.seed, "opt_state": state.opt_state, "controls": state.controls}
    if not state.controls:
        del rest["controls"]
    roles = {f"{kind}.{role}": tree for kind in ("params", "slow") for role, tree in getattr(state, kind).items()}
    return roles | {STATE: rest}


def assemble(abstract: TrainState, items) -> TrainState:
    """The inverse of ``parts``, with the roles of ``abstract``."""
    rest = items[STATE]
    return TrainState(
        step=rest["step"],
        seed=rest["seed"],
        params={role: items[f"params.{role}"] for role in abstract.params},
        slow={role: items[f"slow.{role}"] for role in abstract.slow},
        opt_state=rest["opt_state"],
        controls=rest.get("controls", {}),
    )


# ---- what other runs take from a run ------------------------------------------------------------------------------


def is_run(name) -> bool:
    """Whether ``name`` (RUN, RUN@best, RUN@40) is a run directory with at least one checkpoint."""
    run_dir, _ = split_step(name)
    return (epath.Path(run_dir) / "config.yaml").exists() and directory(run_dir).exists()


def models_record(
    configs: dict[Role, ModelConfig], heads: dict[Role, Head], trunks: dict[Role, Role], dtypes: Mapping[Role, Any] = {}
) -> dict:
    """The shapes of a run's models as JSON, saved with every checkpoint; ``trunks``: on whose a bare head stands;
    ``dtypes``: of their stored weights."""
    record = {role: {"head": heads[role], "config": dataclasses.asdict(cfg)} for role, cfg in configs.items()}
    for role, trunk in trunks.items():
        record[role]["trunk"] = trunk
    for role, dtype in dtypes.items():
        record[role]["dtype"] = jnp.dtype(dtype).name
    return record


def model_of(record: dict) -> tuple[ModelConfig, Head]:
    """One role's (config, head) from models_record, of this version or an older one that lacked some fields. A bare
    head is restored with its trunk, as a model of its own."""
    fields = with_tuples(record["config"])
    if fields.get("rope_scaling"):
        fields["rope_scaling"] = RopeScaling(**with_tuples(fields["rope_scaling"]))
    return resolve(ModelConfig(**fields)), "scalar" if "trunk" in record else record["head"]


def with_tuples(fields: dict[str, Any]) -> dict[str, Any]:
    """JSON has lists only."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}


def steps_of(run_dir) -> list[int]:
    """The steps of a run's whole checkpoints, ascending."""
    there = directory(run_dir)
    return sorted(ocp.utils.checkpoint_steps(there)) if there.exists() else []


def latest_step(run_dir) -> int | None:
    """The newest whole checkpoint of a run, or None."""
    return max(steps_of(run_dir), default=None)


def best_step(run_dir) -> tuple[int, str] | None:
    """(step, metric) of the best checkpoint by checkpoint.best of the run's config; None where none was measured."""
    config = epath.Path(run_dir) / "config.yaml"
    tree = yaml.safe_load(config.read_text()) if config.exists() else None
    wanted = tree.get("checkpoint") or {} if isinstance(tree, dict) else {}
    found = []
    for step in steps_of(run_dir) if wanted.get("best") else []:
        file = directory(run_dir) / str(step) / "metrics" / "metrics"
        value = json.loads(file.read_text()).get(wanted["best"]) if file.exists() else None
        if value is not None and math.isfinite(value):
            found.append((-value if wanted.get("mode") == "min" else value, step))
    return (max(found)[1], wanted["best"]) if found else None


def find_step(name) -> int:
    """The step that ``name`` says: of RUN the latest, of RUN@best and RUN@40 that one.

    Raises FileNotFoundError where the run has no checkpoint, ValueError, with the steps there are, where it has not
    this one."""
    run_dir, wanted = split_step(name)
    steps = steps_of(run_dir)
    if not steps:
        raise FileNotFoundError(f"{run_dir}: no checkpoint in it; a run saves one every checkpoint.every iterations")
    if not wanted:
        return steps[-1]
    best = best_step(run_dir)
    if wanted == "best" and best:
        return best[0]
    if wanted.isdecimal() and int(wanted) in steps:
        return int(wanted)
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


def find_role(record: dict, role: Role) -> Role:
    """The role of a run's ``models`` that another run's ``role`` starts from: its namesake, the policy, or any."""
    for name in (role, "policy", *record):
        if name in record:
            return name
    raise ValueError(f"a run without models has nothing to start {role} from")


def restore_role(run_dir, step: int, role: Role, abstract: Params) -> Params:
    """One role's parameters of a run, laid out as ``abstract`` says."""
    there = directory(run_dir) / str(step)
    item = next(there / f"{kind}.{role}" for kind in ("params", "slow") if (there / f"{kind}.{role}").exists())
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(item, abstract)


def restore_model(run_dir, step: int, models: dict, role: Role, dtype, mesh) -> Params:
    """One role's model of a run that recorded ``models``, on ``mesh``; a bare head gets a copy of its trunk."""
    record = models[role]
    params = restore_role(run_dir, step, role, abstract_params(model_of(record)[0], record["head"], dtype, mesh))
    if "trunk" not in record:
        return params
    return restore_model(run_dir, step, models, record["trunk"], dtype, mesh) | params


def token_ids(tokenizer: Any, generation_config: Mapping[str, Any] | None) -> hf_config.TokenIds:
    """The special tokens of a tokenizer, and those that ``generation_config`` says end a response."""
    eos = tokenizers.eos_ids(tokenizer, generation_config)
    return hf_config.TokenIds(eos, tokenizer.bos_token_id, tokenizer.pad_token_id)


def export(name, role: Role, to) -> tuple[str, list[str]]:
    """Write one role of a run (RUN, RUN@best, RUN@40) as a HF folder, tokenizer included. A reward model gets a pad
    token of its own. Returns which step it was, in words, and what differs from the run, or in transformers.

    Raises FileNotFoundError for a run without checkpoints, ValueError for a step or a role that it does not have."""
    (step, extra), (run_dir, _) = read_extra(name), split_step(name)
    if role not in extra["models"]:
        raise ValueError(f"--role {role}: {run_dir} has no such role; it has: {', '.join(sorted(extra['models']))}")
    cfg, head = model_of(extra["models"][role])
    dtype = extra["models"][role].get("dtype") or extra["dtype"]  # an older run has one for all roles
    folder = epath.Path(run_dir) / "tokenizer"
    tokenizer = tokenizers.load_tokenizer(os.fspath(folder))
    ids = hf_config.embedded(token_ids(tokenizer, {"eos_token_id": extra.get("eos_ids")}), cfg.vocab_size)
    mesh = make_mesh(MeshConfig())
    with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as scratch:
        params, notes = restore_model(run_dir, step, extra["models"], role, jnp.dtype(dtype), mesh), []
        if head == "scalar":
            tokenizer, params, cfg, ids, notes = with_own_pad(tokenizer, params, cfg, ids)
            tokenizers.save_tokenizer(tokenizer, scratch)
            folder = epath.Path(scratch)
        notes += hf.save(params, cfg, head, to, dtype, ids=ids, tokenizer_folder=folder)
    return describe_step(run_dir, step), notes
