"""The real programs of a config, compiled for a slice that is not here: what memory they take, and what they send."""

import re
from typing import NamedTuple

import jax

from jaxrlhf.plan.hlo import Collective, collectives
from jaxrlhf.run.build import Blueprint
from jaxrlhf.run.initial_state import abstract_state
from jaxrlhf.run.programs import compile_programs
from jaxrlhf.sharding import current
from jaxrlhf.tpu.peaks import GIB
from jaxrlhf.types import Batch

TOO_BIG = re.compile(r"\(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)")
UNITS = {"K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}


class Compiled(NamedTuple):
    """One program as XLA made it; bytes of one device."""

    name: str
    arguments: int
    outputs: int  # those that do not take the place of arguments
    temporaries: int
    peak: int
    collectives: list[Collective] | None  # None: could not be read
    unread: str  # then why, in one line


class TooBig(NamedTuple):
    """A program that XLA refused to make, as it does not fit."""

    needed: float  # bytes of one device
    available: float


def compile_for(drawn: Blueprint, batch: Batch) -> list[Compiled] | TooBig:
    """The programs that an iteration which is given ``batch`` runs, in order. Nothing is executed."""
    with current(drawn.mesh):
        try:
            made = compile_programs(drawn, abstract_state(drawn), batch)
        except jax.errors.JaxRuntimeError as error:
            if (found := TOO_BIG.search(str(error))) is None:
                raise
            needed, unit, available, other = found.groups()
            return TooBig(float(needed) * UNITS[unit], float(available) * UNITS[other])
    return [describe(name, program.compiled) for name, program in made.items()]


def describe(name: str, program: jax.stages.Compiled) -> Compiled:
    """What XLA says of a program."""
    memory = program.memory_analysis()
    assert memory is not None, "this backend does not say what memory a program takes"
    return Compiled(
        name,
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes - memory.alias_size_in_bytes,
        memory.temp_size_in_bytes,
        max(memory.peak_memory_in_bytes, memory.argument_size_in_bytes + memory.temp_size_in_bytes),
        *read_collectives(program),
    )


def read_collectives(program: jax.stages.Compiled) -> tuple[list[Collective] | None, str]:
    """The program's collectives; None, and why, where its text can't be had: what took minutes to compile still tells
    its memory. jaxlib 0.10.2 does not print some of what libtpu 0.0.52 makes for v5p."""
    try:
        text = program.as_text()
    except jax.errors.JaxRuntimeError as error:
        return None, str(error).partition("\n")[0]
    return (collectives(text), "") if text else (None, "it has no text")
