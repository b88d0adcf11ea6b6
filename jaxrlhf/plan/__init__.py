"""Does a config fit a TPU slice, and how fast can it be? Answered on a machine that has none.

The real programs of the config are compiled ahead of time for the slice (plan/compiled_memory.py), and the work of an
iteration is counted (plan/cost.py) and held against the chip's peaks (tpu/peaks.py). Nothing is executed, and no
weights are read.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from jaxrlhf.config.batch import describe_batch
from jaxrlhf.config.check import check
from jaxrlhf.config.record import Config
from jaxrlhf.config.resolved import resolve_config
from jaxrlhf.errors import ConfigError
from jaxrlhf.plan.calls import models_of, passes_of
from jaxrlhf.plan.compiled_memory import Compiled, TooBig, compile_for
from jaxrlhf.plan.cost import phases
from jaxrlhf.plan.length import with_length
from jaxrlhf.plan.memory_estimate import Memory, estimate
from jaxrlhf.plan.roofline import TimedPhase, timed
from jaxrlhf.plan.search import Candidate, candidates, setup_of
from jaxrlhf.plan.shapes import blueprint, configs_by_run
from jaxrlhf.plan.target import Target, find_target
from jaxrlhf.run.batch_shapes import batch_shapes
from jaxrlhf.run.build import Blueprint, draw
from jaxrlhf.sharding import make_mesh
from jaxrlhf.types import Batch

TRIES = 3  # settings that are compiled in search of one that fits


class Advice(NamedTuple):
    """Settings that fit: by what XLA says, or, where none was compiled, by estimate."""

    candidate: Candidate
    programs: list[Compiled] | None


class Plan(NamedTuple):
    """All that is known of a config on a slice. Bytes and times are of one device, of one iteration."""

    cfg: Config
    slice: Target
    mesh: Mapping[str, int]
    sources: list[str]  # where the shape of each role was found
    batch: str
    columns: int  # of the prompts that were planned with, the longest bucket; 0: there are none
    estimate: Memory
    programs: list[Compiled] | TooBig | None  # None: not compiled
    phases: list[TimedPhase]
    advice: Advice | None  # where it does not fit
    uncounted: str = ""  # why the length of the run is not known

    @property
    def available(self) -> float:
        """HBM of a device."""
        if isinstance(self.programs, TooBig):
            return self.programs.available
        return self.slice.chip.hbm / self.slice.devices_per_chip

    @property
    def needed(self) -> float:
        if isinstance(self.programs, TooBig):
            return self.programs.needed
        return max(one.peak for one in self.programs) if self.programs else self.estimate.peak

    @property
    def fits(self) -> bool:
        return not isinstance(self.programs, TooBig) and self.needed <= self.available

    @property
    def seconds(self) -> float:
        return sum(phase.seconds for phase in self.phases)

    def run_seconds(self, reached: float) -> float | None:
        """Of all iterations, where they reach this share of their bound; evaluation, saving and compiling left out.
        None where the run's length is not known."""
        return None if self.uncounted else self.cfg.length * self.seconds / reached

    def run_chip_hours(self, reached: float) -> float | None:
        seconds = self.run_seconds(reached)
        return None if seconds is None else seconds / 3600 * self.slice.chips

    @property
    def mfu(self) -> float:
        """The share of the peak that an iteration reaches at best, recomputation left out."""
        useful = sum(one.phase.useful for one in self.phases)
        return useful / self.seconds / (self.slice.chip.flops / self.slice.devices_per_chip)


def plan(
    cfg: Config, topology: str, slices: int = 1, others: Iterable[Config] = (), compiling: bool = True, source="config"
) -> Plan:
    """Plan ``cfg`` for ``slices`` slices of ``topology``. ``others``: configs of runs that it may start from.

    Raises ConfigError, in one line, for a wrong topology, mesh or batch, and where a model's shape is not known."""
    where = find_target(topology, slices)
    place = "in the slice" if slices == 1 else f"in the {slices} slices"
    if cfg.acts:
        raise ConfigError(f"{source}: environment.id: {cfg.environment.id}: plans are of text alone; expected null")
    if cfg.converses:
        shown = f"{source}: environment.function: {cfg.environment.function}"
        raise ConfigError(f"{shown}: plans are of single responses; expected null")
    resolved, uncounted = with_length(check(cfg, len(where.devices), source, place))
    cfg = resolved.cfg
    drawn, sources = blueprint(resolved, make_mesh(cfg.mesh, where.devices), configs_by_run(others))
    batch = largest_batch(drawn)
    passes = passes_of(drawn, batch)
    models = models_of(drawn)
    setup = setup_of(cfg, where.devices, drawn)
    counted = [timed(phase, where.chip, where.devices_per_chip) for phase in phases(passes, models, setup)]
    made = Plan(
        cfg=cfg,
        slice=where,
        mesh=dict(drawn.mesh.shape),
        sources=sources,
        batch=describe_batch(resolved, drawn.recipe.num_micro),
        columns=0 if batch.prompts is None else batch.prompts.tokens.shape[1],
        estimate=estimate(passes, models, setup),
        programs=compile_largest(drawn) if compiling else None,
        phases=counted,
        advice=None,
        uncounted=uncounted,
    )
    if made.fits:
        return made
    found = candidates(drawn, passes, where, made.available)
    return made._replace(advice=confirm(found, drawn, where, compiling))


def confirm(found: list[Candidate], drawn: Blueprint, where: Target, compiling: bool) -> Advice | None:
    """The first of the settings that XLA agrees fits; the first of all where nothing is compiled, None where none does.

    After one that XLA refuses come those that are estimated to need a quarter less."""
    tried = 0
    while found and tried < TRIES:
        best = found[0]
        if not compiling:
            return Advice(best, None)
        again = draw(resolve_config(best.cfg), make_mesh(best.cfg.mesh, where.devices), drawn.weights, drawn.sampler)
        programs = compile_largest(again)
        if not isinstance(programs, TooBig):
            return Advice(best, programs)
        tried += 1
        found = [one for one in found if one.memory.peak < 0.75 * best.memory.peak]
    return None


def compile_largest(drawn: Blueprint) -> list[Compiled] | TooBig:
    """The programs for the longest prompts that can come."""
    return compile_for(drawn, largest_batch(drawn))


def largest_batch(drawn: Blueprint) -> Batch:
    return list(batch_shapes(drawn.resolved, drawn.mesh))[-1]
