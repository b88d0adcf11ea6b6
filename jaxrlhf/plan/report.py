"""A plan as text for people, and as JSON."""

import dataclasses
from typing import Any

from rich.console import Console
from rich.table import Table

from jaxrlhf.plan import Plan
from jaxrlhf.plan.calibration import Compared, calibrate, calibrate_decoding, reached
from jaxrlhf.plan.compiled_memory import Compiled, TooBig
from jaxrlhf.tpu.peaks import GIB


def as_json(plan: Plan) -> dict[str, Any]:
    """All numbers of a plan: bytes and seconds, of one device where not said otherwise."""
    programs = plan.programs
    low, high = reached()
    return {
        "topology": plan.slice.name,
        "slices": plan.slice.slices,
        "chips": plan.slice.chips,
        "devices_per_chip": plan.slice.devices_per_chip,
        "mesh": dict(plan.mesh),
        "shapes": plan.sources,
        "batch": plan.batch,
        "prompt_columns": plan.columns,
        "compiled": programs is not None,
        "fits": plan.fits,
        "hbm": {"available": plan.available, "needed": plan.needed, "estimate": plan.estimate._asdict()},
        "programs": [program_json(one) for one in programs] if isinstance(programs, list) else [],
        "phases": [
            {"name": one.phase.name, **one.phase.work._asdict(), "seconds": one.seconds, "bound": one.bound}
            for one in plan.phases
        ],
        "seconds": plan.seconds,
        "run_seconds": [plan.run_seconds(high), plan.run_seconds(low)],
        "run_chip_hours": [plan.run_chip_hours(high), plan.run_chip_hours(low)],
        "iterations": None if plan.uncounted else plan.cfg.length,
        "mfu": plan.mfu,
        "published_steps_reach": [low, high],
        "advice": plan.advice and plan.advice.candidate.overrides,
        "advice_compiled": bool(plan.advice and plan.advice.programs),
    }


def program_json(program: Compiled) -> dict[str, Any]:
    found = program.collectives
    return program._asdict() | {"collectives": None if found is None else [one._asdict() for one in found]}


def print_plan(plan: Plan) -> None:
    """The plan on the terminal."""
    console = Console()
    say = lambda text: console.print(text, highlight=False, soft_wrap=True, markup=False)
    say(f"{plan.cfg.run_dir} on {plan.slice}")
    say("mesh: " + ", ".join(f"{axis}={size}" for axis, size in plan.mesh.items()))
    say(plan.batch + (f"; prompts of {plan.columns} tokens" if plan.columns else ""))
    for source in plan.sources:
        say(f"shape of {source}")
    if isinstance(plan.programs, list):
        console.print(memory_table(plan, plan.programs))
        if any(one.collectives for one in plan.programs):
            console.print(collective_table(plan.programs))
        for line in unread_lines(plan.programs):
            say(line)
    say(verdict(plan))
    console.print(phase_table(plan))
    say(speed(plan))
    say(whole_run(plan))
    for line in advice_lines(plan):
        say(line)


def gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def memory_table(plan: Plan, programs: list[Compiled]) -> Table:
    """GiB of HBM a chip, program by program."""
    each = plan.slice.devices_per_chip
    table = Table("HBM, GiB a chip", "arguments", "temporaries", "new outputs", "peak", "of")
    for one in programs:
        sizes = (one.arguments, one.temporaries, one.outputs, one.peak, plan.available)
        table.add_row(one.name, *(gib(size * each) for size in sizes))
    return table


def collective_table(programs: list[Compiled]) -> Table:
    """What a device sends, program by program."""
    table = Table("collectives of a device", "kind", "executions", "GB")
    for one in programs:
        for kind in one.collectives or []:
            more = "at least " if kind.lower_bound else ""
            table.add_row(one.name, kind.kind, f"{more}{kind.count:,}", f"{more}{kind.bytes / 1e9:,.3f}")
    return table


def unread_lines(programs: list[Compiled]) -> list[str]:
    """Why a program is not in the table of collectives."""
    unread = [one for one in programs if one.collectives is None]
    return [f"{one.name}: its collectives could not be read from what libtpu made: {one.unread}" for one in unread]


def phase_table(plan: Plan) -> Table:
    """The roofline, phase by phase."""
    table = Table("at best", "TFLOP", "HBM GB", "network GB", "seconds", "bound by", title="one iteration, a device")
    for one in plan.phases:
        flops, hbm, ici, dcn = one.phase.work
        numbers = (f"{flops / 1e12:,.3f}", f"{hbm / 1e9:,.3f}", f"{(ici + dcn) / 1e9:,.3f}", f"{one.seconds:.3g}")
        table.add_row(one.phase.name, *numbers, one.bound)
    return table


def verdict(plan: Plan) -> str:
    """Whether it fits, and by how much."""
    each = plan.slice.devices_per_chip
    needed, there = gib(plan.needed * each), gib(plan.available * each)
    how = "estimated, not compiled: " if plan.programs is None else ""
    if plan.fits:
        return f"{how}fits: {needed} of {there} GiB a chip, {gib((plan.available - plan.needed) * each)} to spare"
    which = "temporaries alone need" if isinstance(plan.programs, TooBig) else "needs"
    return f"{how}DOES NOT FIT: {which} {needed} GiB a chip, has {there}"


def speed(plan: Plan) -> str:
    low, high = reached()
    between = "; traffic between slices is counted as if within one" if plan.slice.slices > 1 else ""
    return (
        f"an iteration takes {plan.seconds:.3g} s at best, {plan.mfu:.1%} of the peak; published training steps reach "
        f"{low:.2f} to {high:.2f} of such a bound (jaxrlhf plan --calibration): "
        f"expect {plan.seconds / high:.3g} to {plan.seconds / low:.3g} s{between}"
    )


def whole_run(plan: Plan) -> str:
    """How long the run takes, and what it costs in chip-hours."""
    if plan.uncounted:
        return f"the run: {plan.uncounted}; iterations=N (and epochs=null) says how long it takes"
    low, high = reached()
    length, chips = plan.cfg.length, plan.slice.chips
    seconds = [length * plan.seconds / share for share in (high, low)]
    hours = span([duration(one) for one in seconds])
    cost = span([f"{one * chips / 3600:,.3g}" for one in seconds])
    count = f"{length:,} iteration{'s' if length > 1 else ''}"
    return f"the run, {count} on {chips} chips: {hours}, {cost} chip-hours, without evaluation, saving and compiling"


def span(texts: list[str]) -> str:
    return texts[0] if texts[0] == texts[1] else " to ".join(texts)


def duration(seconds: float) -> str:
    """ "45 s", "12 min", "3.2 h": in the largest unit that it holds two of."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.3g} {unit}"
    return f"{seconds:.3g} s"


def advice_lines(plan: Plan) -> list[str]:
    """What to change, as overrides to paste."""
    if plan.fits:
        return []
    if plan.advice is None:
        return ["no setting of mesh, micro-batch, remat and number formats was found that fits: more chips are needed"]
    best, each = plan.advice.candidate, plan.slice.devices_per_chip
    if plan.advice.programs is None:
        found = f"estimated at {gib(best.memory.peak * each)} GiB a chip, not compiled"
    else:
        found = f"compiled: {gib(max(one.peak for one in plan.advice.programs) * each)} GiB a chip"
    return [f"this fits ({found}), an iteration then takes {best.seconds:.3g} s at best:", " ".join(best.overrides)]


def print_calibration() -> None:
    """Published training steps and decoding beside what is predicted of them."""
    table = Table("training step", "slice", "rows/chip", "published", "predicted", "ratio", title="share of the peak")
    for row in calibrate():
        table.add_row(*calibration_row(row))
    decoding = Table("decoding", "slice", "rows", "published", "predicted", "ratio", title="milliseconds a token")
    for row in calibrate_decoding():
        of, times = row.decode, [f"{seconds * 1e3:.2f}" for seconds in (row.published, row.predicted)]
        decoding.add_row(of.name, of.topology, f"{of.rows} x ({of.prompt} + {of.new})", *times, f"{row.ratio:.2f}")
    Console().print(table, decoding)


def calibration_row(row: Compared) -> list[str]:
    step = row.step
    rows = f"{step.rows} x {step.columns}"
    return [step.name, step.topology, rows, f"{row.published:.1%}", f"{row.predicted:.1%}", f"{row.ratio:.2f}"]


def calibration_json() -> dict[str, list[dict[str, Any]]]:
    """{"training": shares of the peak, "decoding": seconds a token}; ratio: of published speed to predicted."""
    training = [
        {"name": row.step.name, "slice": row.step.topology, "model": dataclasses.asdict(row.step.model)}
        | {"published": row.published, "predicted": row.predicted, "ratio": row.ratio}
        for row in calibrate()
    ]
    decoding = [
        {"name": row.decode.name, "slice": row.decode.topology, "model": dataclasses.asdict(row.decode.model)}
        | {"published": row.published, "predicted": row.predicted, "ratio": row.ratio}
        for row in calibrate_decoding()
    ]
    return {"training": training, "decoding": decoding}
