"""What an iteration of each algorithm costs, counted in its programs; nothing is run or timed.

``python -m tests.support.costs`` counts and writes tests/golden/costs.json, which tests/test_costs.py holds all later
programs to: whoever makes one costlier, or cheaper, runs it, and the diff says by how much.
"""

import contextlib
import functools
import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxrlhf.benchmarks.case import Case, Shape, ready, shaped, without_world
from jaxrlhf.benchmarks.rows import random_batch, whole_rows
from jaxrlhf.benchmarks.work import count_work
from jaxrlhf.config.resolved import resolve_config
from jaxrlhf.plan import hlo
from jaxrlhf.plan.shapes import blueprint
from jaxrlhf.precomputed_answers import Answered
from jaxrlhf.run.initial_state import abstract_state
from jaxrlhf.run.programs import compile_programs
from jaxrlhf.sharding import current, make_mesh, row_layout
from jaxrlhf.step import make_iteration, make_learn, make_read, make_rollout
from jaxrlhf.types import Batch, TrainState
from tests.support import compiler, tiny
from tests.support.flops import flops

GOLDEN = Path(__file__).parents[1] / "golden" / "costs.json"
NEW, VOCAB = 7, 512  # tokens
# loops of different things are of different lengths: layers 3, new tokens 7, epochs 4, minibatches and micro-batches 2
SMALL = Shape(layers=3, hidden=64, prompts=8, prompt_tokens=12, new_tokens=NEW)
CASES: dict[str, tuple[Shape, tuple[str, ...]]] = {
    "grpo": (replace(SMALL, samples=8), ("algorithm.num_minibatches=2", "rewards.overlap=true")),
    "ppo": (replace(SMALL, prompts=32), ("algorithm.num_minibatches=2", "batch.micro_batch_size=8")),
    "ppo, shared trunk": (
        replace(SMALL, algorithm="ppo", prompts=32),
        ("algorithm.num_minibatches=2", "batch.micro_batch_size=8", "models.value.share_trunk=true"),
    ),
    "dpo": (SMALL, ()),
    "rm": (SMALL, ()),
    "sft": (replace(SMALL, prompts=16), ("batch.micro_batch_size=8",)),
}
EIGHT = ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2")
LOOPS = "scan_layers=true"  # as where models are deep: what a trip of the loop over layers does is counted
# they are compiled, never run, so what matters is to compile them: a quarter of the time, and the same buffers
QUICK = tiny.FAST | {"xla_llvm_disable_expensive_passes": True} | compiler.WITHOUT_EMITTERS


class Made(NamedTuple):
    """A case, and its programs by name: "iteration", or "rollout", "read" and "learn"."""

    case: Case
    state: TrainState  # shapes with layouts
    programs: dict[str, jax.stages.Compiled]

    @property
    def state_bytes(self) -> int:
        """Of the state, on one device."""
        return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(self.state))


def case_of(name: str, devices: int, vocab: int = VOCAB) -> Case:
    """The case on 1 device, or on 8 as EIGHT lays them."""
    shape, overrides = CASES[name]
    model = f"models.{'reward' if name == 'rm' else 'policy'}.architecture"
    heads = (f"{model}.num_heads=4", f"{model}.num_kv_heads=2", f"{model}.vocab_size={vocab}")
    cfg = without_world(
        shaped(
            replace(shape, algorithm=shape.algorithm or name),
            [*overrides, *heads, LOOPS, *(EIGHT if devices == 8 else ())],
        )
    )
    return ready(*blueprint(resolve_config(cfg), make_mesh(cfg.mesh, jax.devices()[:devices]), {}), "dense")


# ---- traced ---------------------------------------------------------------------------------------------------------


def count_flops(name: str) -> dict[str, int]:
    """FLOPs of each program of an iteration as it is traced, and "necessary": those that it cannot do without."""
    case = case_of(name, 1)
    necessary = int(count_work(case.drawn, answered(case)).flops)
    return {program: flops(jaxpr) for program, jaxpr in traced(case).items()} | {"necessary": necessary}


def ratio(found: dict[str, int]) -> float:
    """What the programs of ``count_flops`` compute, as a multiple of what is necessary."""
    return sum(count for name, count in found.items() if name != "necessary") / found["necessary"]


def traced(case: Case) -> dict[str, Any]:
    """The jaxpr of each program that programs.compile_programs compiles."""
    drawn, batch = case.drawn, case.shapes
    with current(drawn.mesh):
        state = abstract_state(drawn)
        if drawn.cfg.rewards.function is None or not drawn.algorithm.online:
            return {"iteration": jax.make_jaxpr(make_iteration(drawn.recipe))(state, batch)}
        rollout, sequences = jax.make_jaxpr(make_rollout(drawn.recipe), return_shape=True)(state, batch)
        batch = batch.replace(sequences=sequences)
        read, answers = jax.make_jaxpr(make_read(drawn.recipe), return_shape=True)(state, batch)
        scores = jax.ShapeDtypeStruct(sequences.ended.shape, np.float32, sharding=row_layout(drawn.mesh, 1))
        scored = Answered(batch.replace(sequences=sequences.replace(scores=scores)), answers)
        return {"rollout": rollout, "read": read, "learn": jax.make_jaxpr(make_learn(drawn.recipe))(state, scored)}


def answered(case: Case) -> Batch:
    """Rows (NumPy) as an iteration leaves them: every response fills its room."""
    cfg, columns = case.drawn.cfg, case.prompt + case.room
    batch = random_batch(case.shapes, VOCAB, case.prompt, case.lengths, cfg.seed, 0)
    if not case.drawn.algorithm.online:
        return batch
    prompts = np.repeat(batch.prompts.tokens, cfg.batch.samples_per_prompt, 0)
    count = len(prompts)
    sequences = whole_rows(prompts, columns, VOCAB, np.full(count, case.room), np.random.default_rng(cfg.seed))
    blank = {"logprobs": np.zeros((count, columns), np.float32), "scores": np.zeros(count, np.float32)}
    ended = np.ones(count, bool)
    return batch.replace(sequences=sequences.replace(**blank, ended=ended, response_start=case.prompt))  # type: ignore[arg-type]


# ---- compiled -------------------------------------------------------------------------------------------------------


@functools.cache
def compiled(name: str, devices: int, vocab: int = VOCAB) -> Made:
    """The case with its programs, as training compiles them but for QUICK."""
    case = case_of(name, devices, vocab)
    with current(case.drawn.mesh), quick():
        state = abstract_state(case.drawn)
        programs = compile_programs(case.drawn, state, case.shapes)
    return Made(case, state, {name: program.compiled for name, program in programs.items()})


@contextlib.contextmanager
def quick() -> Iterator[None]:
    """What is compiled while it is open is compiled with the options of QUICK."""
    compile_it = jax.stages.Lowered.compile
    jax.stages.Lowered.compile = lambda self, _=None: compile_it(self, QUICK)  # type: ignore[method-assign]
    try:
        yield
    finally:
        jax.stages.Lowered.compile = compile_it  # type: ignore[method-assign]


def count_memory(program: jax.stages.Compiled) -> dict[str, int]:
    """Bytes of a device: temporaries, and arguments whose place results take (aliased: donated, and made use of)."""
    memory = program.memory_analysis()
    assert memory is not None, "this backend does not say what memory a program takes"
    return {"temporaries": memory.temp_size_in_bytes, "aliased": memory.alias_size_in_bytes}


class Sent(NamedTuple):
    """A collective in a compiled program."""

    loop: str  # the lengths of the loops that it is in, from the outermost: "4 x 2"; "once"
    kind: str
    gives: list[tuple[int, ...]]  # shapes


def collectives(text: str) -> list[Sent]:
    """Every collective of a program, as often as it is written; ``text`` is its HLO."""
    entry, program = hlo.parse(text)
    found: list[Sent] = []

    def read(computation: str, loop: tuple[str, ...]) -> None:
        for line in program.get(computation, ()):
            if kind := hlo.kind_of(line):
                found.append(Sent(" x ".join(loop) or "once", kind, arrays(line)))
            inside = (*loop, str(hlo.trip_count(line, program) or "?")) if line.opcode == "while" else loop
            for name in hlo.called(line):
                read(name, inside)

    read(entry, ())
    return found


def arrays(line: hlo.Instruction) -> list[tuple[int, ...]]:
    """The shapes of what an instruction gives."""
    return [tuple(int(size) for size in sizes.split(",") if size) for _, sizes in hlo.SHAPE.findall(line.shape)]


def count_collectives(program: jax.stages.Compiled) -> dict[str, dict[str, int]]:
    """Loop -> kind -> how many collectives of that kind one trip makes."""
    found: dict[str, Counter[str]] = {}
    for sent in collectives(program.as_text() or ""):
        found.setdefault(sent.loop, Counter())[sent.kind] += 1
    return {loop: dict(sorted(kinds.items())) for loop, kinds in sorted(found.items())}


# ---- the golden file ------------------------------------------------------------------------------------------------


def golden() -> dict[str, Any]:
    """What tests/golden/costs.json is to say."""
    made = {name: [compiled(name, devices).programs for devices in (1, 8)] for name in CASES}
    counted = {name: count_flops(name) for name in CASES}
    each = lambda count, programs: {name: count(program) for name, program in programs.items()}
    return {
        "about": "Counted and written by python -m tests.support.costs, which says of what.",
        "jaxlib": version("jaxlib"),
        "flops": {name: found | {"ratio": round(ratio(found), 3)} for name, found in counted.items()},
        "memory": {name: each(count_memory, one) for name, (one, _) in made.items()},
        "collectives": {name: each(count_collectives, eight) for name, (_, eight) in made.items()},
    }


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    text = json.dumps(golden(), indent=2)
    GOLDEN.write_text(re.sub(r"\{[^{}]*\}", lambda inner: " ".join(inner[0].split()), text) + "\n")


if __name__ == "__main__":
    main()
