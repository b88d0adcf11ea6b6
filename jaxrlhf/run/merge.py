"""Several models of one shape as one whose weights are their mean (WARM, Rame et al. 2024, arXiv:2401.12187)."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from etils import epath

from jaxrlhf.config.members import members_in
from jaxrlhf.data import tokenizer as tokenizers
from jaxrlhf.errors import counted
from jaxrlhf.log.run_dir import split_step
from jaxrlhf.run.export import dtype_of, write_folder
from jaxrlhf.run.saved_run import describe_step, model_of, read_extra, restore_model
from jaxrlhf.run.verified_steps import reading
from jaxrlhf.sharding import MeshConfig, make_mesh
from jaxrlhf.types import Params, Role


class MergedModel(NamedTuple):
    """One model of those that are merged."""

    name: str  # for messages
    run_dir: str
    step: int
    extra: Mapping[str, Any]  # the JSON of the checkpoint
    role: Role


def merge(names: Sequence[str], role: Role, to) -> tuple[list[str], list[str]]:
    """Write the mean of the weights of ``role`` of several runs (RUN, RUN@best, RUN@40) as a HF folder, tokenizer
    included; of an ensemble's run each member counts. Returns (what was merged, what differs in transformers).

    Only models that start from the same weights can be averaged so: their paths stay in one valley of the loss.

    Raises FileNotFoundError for a run without checkpoints, ValueError, in one line, where there are fewer than two
    models, or their shapes, heads or tokenizers differ."""
    with reading():
        parts = [part for name in names for part in parts_of(name, role)]
        if len(parts) < 2:
            raise ValueError(f"merge: {counted(len(parts), 'model')}: expected two or more")
        for part in parts[1:]:
            check_alike(parts[0], part)
        first, mesh = parts[0], make_mesh(MeshConfig())
        with jax.set_mesh(mesh):
            params = mean_of(parts, mesh)
            notes = write_folder(params, first.run_dir, first.extra, first.role, to)
    return [f"{part.name}, {describe_step(part.run_dir, part.step)}" for part in parts], notes


def parts_of(name: str, role: Role) -> list[MergedModel]:
    """The models of a run that ``role`` stands for."""
    (step, extra), (run_dir, _) = read_extra(name), split_step(name)
    found = []
    for member in members_in(extra["models"], role):
        dtype_of(extra, run_dir, member)
        found.append(MergedModel(name if member == role else f"{member} of {name}", run_dir, step, extra, member))
    return found


def check_alike(first: MergedModel, other: MergedModel) -> None:
    """Raises ValueError where two models can't be averaged."""
    (ours, head), (theirs, other_head) = (model_of(part.extra["models"][part.role]) for part in (first, other))
    if head != other_head:
        raise ValueError(f"{other.name}: a {other_head} head, and {first.name} has a {head} head; expected one kind")
    for field in dataclasses.fields(ours):
        one, two = getattr(ours, field.name), getattr(theirs, field.name)
        if one != two:
            raise ValueError(
                f"{other.name}: {field.name} {two}, and {first.name} has {one}; expected models of one shape"
            )
    folders = [os.fspath(epath.Path(part.run_dir) / "tokenizer") for part in (first, other)]
    one, two = (tokenizers.fingerprint(tokenizers.load_tokenizer(folder)) for folder in folders)
    if one != two:
        raise ValueError(
            f"{other.name}: another tokenizer than {first.name}; expected models trained with the same one"
        )


def mean_of(parts: Sequence[MergedModel], mesh) -> Params:
    """The mean of the parts' parameters, summed in float32, in the number format of the first."""
    read = lambda part: restore_model(part.run_dir, part.step, part.extra["models"], part.role, jnp.float32, mesh)
    total = read(parts[0])
    for part in parts[1:]:
        total = jax.tree.map(jnp.add, total, read(part))
    dtype = jnp.dtype(dtype_of(parts[0].extra, parts[0].run_dir, parts[0].role))
    return jax.tree.map(lambda x: (x / len(parts)).astype(dtype), total)
