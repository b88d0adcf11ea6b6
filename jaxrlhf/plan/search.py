"""What to change where a config does not fit: settings of mesh, micro-batch, remat and number formats, tried by count.

Hundreds are estimated (plan/memory_estimate.py, plan/cost.py); the caller compiles the best of them."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from jaxrlhf.config.batch import asked_parts, divisors, minibatch_rows
from jaxrlhf.config.check import SPLIT, check
from jaxrlhf.config.record import Config
from jaxrlhf.config.resolved import resolve_config
from jaxrlhf.errors import ConfigError
from jaxrlhf.models.parameters import padded_vocab
from jaxrlhf.optim import LARGEST_B1_IN_BFLOAT16, OptimizerConfig
from jaxrlhf.plan.calls import Passes, models_of
from jaxrlhf.plan.cost import BYTES, MASTER, Setup, phases
from jaxrlhf.plan.memory_estimate import Memory, estimate
from jaxrlhf.plan.muon import matrices_of
from jaxrlhf.plan.roofline import timed
from jaxrlhf.plan.stored import stored_of
from jaxrlhf.plan.target import Target
from jaxrlhf.plan.weights import table_of
from jaxrlhf.run.build import Blueprint
from jaxrlhf.sharding import AXES, MeshConfig, context_of, is_square, make_mesh, mesh_shape, sums_whole, torus_axes
from jaxrlhf.types import Role

ROOM = 0.9  # of the memory that there is: estimates are no better


class Candidate(NamedTuple):
    """A setting that should fit, by estimate."""

    cfg: Config
    overrides: list[str]
    memory: Memory
    seconds: float


def setup_of(cfg: Config, devices: list, drawn: Blueprint) -> Setup:
    """What the counts read of a config, of models as ``drawn``."""
    sizes: dict[str, int] = dict(zip(AXES, mesh_shape(cfg.mesh, len(devices)), strict=True))
    params = BYTES[cfg.precision.params]
    moments = {role: BYTES[cfg.optimizer_of(role).dtype] + MASTER for role in drawn.recipe.optimizers}
    stored = cfg.attention == "xla"  # on TPUs auto is splash
    sums = torus_axes(np.array(devices)) > 2 and sums_whole(make_mesh(cfg.mesh, devices))
    compute, bases = BYTES[cfg.precision.compute], resolve_config(cfg).bases
    # in steps, which decode groups and context give, gradients are scattered
    square = is_square(np.array(devices)) and sizes["fsdp"] == len(devices)
    more = cfg.generate.int8, sums, square, bases, False, cfg.generate.merge_adapter
    muon = {role: row.newton_schulz_steps for role in moments if (row := cfg.optimizer_of(role)).name == "muon"}
    setup = Setup(sizes, compute, params, moments, muon, cfg.remat, stored, *more)
    second = {role: MASTER * matrix_share(drawn, role, setup) for role in muon}  # what Adam would keep of matrices
    return setup._replace(moments={role: size - second.get(role, 0) for role, size in moments.items()})


def matrix_share(drawn: Blueprint, role: Role, setup: Setup) -> float:
    """The share of Muon's matrices in what a device stores of a role's own weights."""
    table = table_of(drawn.configs[role], drawn.heads[role], setup.bases.get(role))
    one = lambda table: stored_of(table, setup.fsdp, setup.tensor)
    return one(matrices_of(table)) / one(table)


def candidates(drawn: Blueprint, passes: Passes, where: Target, available: float) -> list[Candidate]:
    """Settings that should fit into ``available`` bytes a device: first those that leave number formats as they are,
    and of equals the fastest."""
    found = []
    num_devices, models = len(where.devices), models_of(drawn)
    for price, cfg in settings(drawn, num_devices, where.slices):
        setup = setup_of(cfg, where.devices, drawn)
        mine = with_micro(passes, asked_parts(dataclasses.replace(drawn.resolved, cfg=cfg)))
        memory = estimate(mine, models, setup)
        if memory.peak > ROOM * available:
            continue
        seconds = sum(timed(phase, where.chip, where.devices_per_chip).seconds for phase in phases(mine, models, setup))
        overrides = differences(drawn.cfg, cfg)
        found.append((price, seconds, len(overrides), Candidate(cfg, overrides, memory, seconds)))
    return [candidate for *_, candidate in sorted(found, key=lambda row: row[:3])]


def with_micro(passes: Passes, micros: int) -> Passes:
    """The passes where a minibatch is computed in ``micros`` parts."""
    micro = [one._replace(rows=one.rows * passes.micros // micros) for one in passes.micro]
    return passes._replace(micro=micro, micros=micros)


def settings(drawn: Blueprint, num_devices: int, slices: int = 1) -> Iterator[tuple[int, Config]]:
    """(how much numbers change: 0 not at all, the settings) of everything that passes the checks of a config."""
    cfg = drawn.cfg
    minibatch = minibatch_rows(drawn.resolved)
    for mesh, remat in itertools.product(meshes(drawn, num_devices, slices), ("none", "dots", "full")):
        for micro in [minibatch, *(size for size in divisors(minibatch) if size < minibatch)]:
            batch = dataclasses.replace(cfg.batch, micro_batch_size=None if micro == minibatch else micro)
            one = dataclasses.replace(cfg, mesh=mesh, remat=remat, batch=batch)
            try:
                check(one, num_devices)
            except ConfigError:
                continue
            yield from enumerate(cheaper(one))


def meshes(drawn: Blueprint, num_devices: int, slices: int) -> Iterator[MeshConfig]:
    """Every way to lay the devices that divides all models and keeps slices along data, with the config's expert and
    context."""
    shapes = drawn.configs.values()
    fits = lambda axis, size: all(
        getattr(shape, name) % size == 0 for shape in shapes for name, on in SPLIT.items() if axis in on
    )
    each, expert, context = num_devices // slices, drawn.cfg.mesh.expert, context_of(drawn.mesh)
    for tensor, data, decode in itertools.product(divisors(each), divisors(each), (1, 2, 4, 8, 16)):
        if each % (tensor * data * decode * expert * context) or tensor * decode > 64:
            continue
        fsdp, group = each // tensor // data // expert // context, tensor * decode
        every = group * fsdp * expert * context  # split the embeddings of layers
        vocab = all(padded_vocab(shape) % (every if shape.per_layer_size else group) == 0 for shape in shapes)
        if fits("tensor", group) and fits("fsdp", fsdp * expert * context) and vocab:
            yield MeshConfig(data, fsdp, tensor, slices, decode, expert, context)


def cheaper(cfg: Config) -> Iterator[Config]:
    """The config, then with fewer bytes a number: Adam's first moment in bfloat16, then also the stored weights of
    roles that do not learn."""
    yield cfg
    small = lambda row: row if row.b1 > LARGEST_B1_IN_BFLOAT16 else dataclasses.replace(row, dtype="bfloat16")
    rows = {role: small(row) for role, row in cfg.optimizer.items()}
    rows.setdefault("default", small(OptimizerConfig()))
    yield dataclasses.replace(cfg, optimizer=rows)
    yield dataclasses.replace(
        cfg, optimizer=rows, precision=dataclasses.replace(cfg.precision, params="bfloat16", compute="bfloat16")
    )


def differences(old: Config, new: Config) -> list[str]:
    """What the command line has to say to make ``new`` of ``old``."""
    pairs = [("mesh", old.mesh, new.mesh), ("batch", old.batch, new.batch), ("precision", old.precision, new.precision)]
    pairs += [
        (f"optimizer.{role}", old.optimizer.get(role, OptimizerConfig()), row) for role, row in new.optimizer.items()
    ]
    texts = [] if old.remat == new.remat else [f"remat={new.remat}"]
    for where, ours, theirs in pairs:
        for field in dataclasses.fields(ours):
            before, after = getattr(ours, field.name), getattr(theirs, field.name)
            texts += [] if before == after else [f"{where}.{field.name}={'null' if after is None else after}"]
    return texts
