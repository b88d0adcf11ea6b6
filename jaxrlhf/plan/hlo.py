"""What a compiled program sends between devices: the collectives in its HLO, by kind, with how often they run.

XLA prints a computation once, however often it runs. So counts are multiplied down the call graph: by 1 where a
computation is called, by the trip count where it is a loop. A trip count is what XLA states (known_trip_count), else
what the loop's condition says in so many words (counter < constant); where neither is there, the loop is counted once
and the count is called a lower bound.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
BETWEEN = "between slices"  # what XLA sends through the hosts and the data-center network
KINDS += (BETWEEN,)
SIZES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
SIZES |= {"s64": 8, "u64": 8, "f64": 8, "c64": 8, "f8e4m3fn": 1, "f8e5m2": 1}

HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)$")
SHAPE = re.compile(r"\b([a-z]+\d*(?:e\dm\d\w*)?)\[([\d,]*)\]")
CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
STATED = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
CHANNEL = re.compile(r"channel_id=(\d+)")


class Collective(NamedTuple):
    """All collectives of one kind in a program, of one device."""

    kind: str
    count: int  # executions
    bytes: int  # of their larger side: gathered, or before it is scattered
    wire: int  # that a device has to receive over the network, at least
    lower_bound: bool  # some of them are in loops of unknown length

    def __add__(self, other: "Collective") -> "Collective":
        count, size, wire = (ours + theirs for ours, theirs in zip(self[1:4], other[1:4]))
        return Collective(self.kind, count, size, wire, self.lower_bound or other.lower_bound)


class Instruction(NamedTuple):
    """One line of HLO."""

    name: str
    shape: str
    opcode: str
    rest: str  # operands and attributes


def collectives(hlo: str) -> list[Collective]:
    """The collectives of a program, by kind in the order of KINDS; ``hlo`` is ``compiled.as_text()``."""
    entry, program = parse(hlo)
    runs, unknown = executions(entry, program)
    found: dict[str, Collective] = {}
    for one in each_once(program, runs, unknown):
        found[one.kind] = found[one.kind] + one if one.kind in found else one
    return [found[kind] for kind in KINDS if kind in found]


def parse(hlo: str) -> tuple[str, dict[str, list[Instruction]]]:
    """(name of the entry computation, computation -> its instructions). Raises ValueError where there is no entry."""
    entry, program, here = "", defaultdict(list), ""
    for line in hlo.splitlines():
        if header := HEADER.match(line):
            here = header.group(2)
            entry = here if header.group(1) else entry
            program[here] = []
        elif here and (found := INSTRUCTION.match(line)):
            program[here].append(Instruction(*found.groups()))
    if not entry:
        raise ValueError("no ENTRY computation: this is no HLO module")
    return entry, dict(program)


def executions(entry: str, program: dict[str, list[Instruction]]) -> tuple[dict[str, int], set[str]]:
    """(computation -> how often it runs, those in loops of unknown length)."""
    callers: dict[str, list[tuple[str, int, bool]]] = defaultdict(list)
    for name, lines in program.items():
        for line in lines:
            trips = trip_count(line, program) if line.opcode == "while" else 1
            for target in called(line):
                callers[target].append((name, trips or 1, trips is None))
    runs: dict[str, int] = {entry: 1}
    unknown: set[str] = set()

    def count(name: str) -> int:
        if name not in runs:
            runs[name] = sum(count(caller) * trips for caller, trips, _ in callers[name])
            if any(open_ended or caller in unknown for caller, _, open_ended in callers[name]):
                unknown.add(name)
        return runs[name]

    for name in program:
        count(name)
    return runs, unknown


def called(line: Instruction) -> Iterator[str]:
    """The computations that an instruction runs."""
    yield from CALLED.findall(line.rest)
    for names in BRANCHES.findall(line.rest):
        yield from (name.strip().lstrip("%") for name in names.split(","))


def trip_count(loop: Instruction, program: dict[str, list[Instruction]]) -> int | None:
    """How often the loop runs at most; None where neither XLA nor its condition says so.

    JAX's loops count up from 0: a scan while counter < length, the decode loop while also some row goes on."""
    if stated := STATED.search(loop.rest):
        return int(stated.group(1))
    condition = re.search(r"condition=%?([\w.-]+)", loop.rest)
    lines = list(with_fused(condition.group(1), program)) if condition else []
    constants = {line.name: int(line.rest.split(")")[0]) for line in lines if is_count(line)}
    bounds = []
    for line in lines:
        if line.opcode == "compare" and "direction=LT" in line.rest:
            right = re.findall(r"%?([\w.-]+)", line.rest.split(")")[0])[-1]
            bounds += [constants[right]] if right in constants else []
    return bounds[0] if len(bounds) == 1 else None


def with_fused(name: str, program: dict[str, list[Instruction]]) -> Iterator[Instruction]:
    """The instructions of a computation, and of those that its fusions compute."""
    for line in program.get(name, []):
        yield line
        if line.opcode == "fusion":
            for part in called(line):
                yield from with_fused(part, program)


def is_count(line: Instruction) -> bool:
    return line.opcode == "constant" and line.shape.startswith(("s32[]", "u32[]", "s64[]")) and line.rest[:1].isdigit()


def each_once(program: dict[str, list[Instruction]], runs: dict[str, int], unknown: set[str]) -> Iterable[Collective]:
    """Each collective once. XLA:TPU prints one that is fused with computation several times, as its start, steps and
    end: it runs as often as its start, around whose loop the steps may lie. Fusions of other names are pieces of one
    where they have one channel; that runs as often as the least of them. Elsewhere a channel says nothing: what is
    written by hand (shard_map) has the same everywhere."""
    callers = {target: line.name for lines in program.values() for line in lines for target in fused(line)}
    found: dict[tuple[str, str], Collective] = {}
    for name, lines in program.items():
        caller = callers.get(name, "")
        if caller.startswith("async-collective-done") or name.startswith("async_collective_fusion"):
            continue
        alone = not caller or caller.startswith("async-collective-start") or name.startswith("all-reduce-scatter")
        for line in lines:
            if kind_of(line) is None:
                continue
            one = counted(line, name, runs[name], name in unknown)
            channel = CHANNEL.search(line.rest)
            key = (one.kind, line.name if alone or channel is None else channel.group(1))
            if key not in found or 0 < one.count < found[key].count or not found[key].count:
                found[key] = one
    return found.values()


def fused(line: Instruction) -> Iterator[str]:
    """The computation of a fusion."""
    if line.opcode == "fusion":
        yield from called(line)


def counted(line: Instruction, computation: str, times: int, unknown: bool) -> Collective:
    """A line that starts or is a collective, which runs so often."""
    kind, size, group = kind_of(line) or "", transferred(line), group_size(line.rest)
    if kind == "reduce-scatter":
        size *= group
    if computation.startswith("all-reduce-scatter"):  # a fusion of XLA:TPU, which keeps a part of the sum only
        kind = "reduce-scatter"
    steps = {"all-reduce": 2 * (group - 1) / group, "collective-permute": 1.0, BETWEEN: 1.0}
    return Collective(kind, times, size * times, int(size * steps.get(kind, (group - 1) / group)) * times, unknown)


def kind_of(line: Instruction) -> str | None:
    """Which of KINDS an instruction starts or is; None where it sends nothing."""
    if line.opcode == "send":
        return BETWEEN if "megascale" in line.rest else None
    kind = line.opcode.removesuffix("-start")
    return kind if kind in KINDS else None


def transferred(line: Instruction) -> int:
    """Bytes of what a collective gives; of the start of one, whose shape names what it is given too."""
    parts = list(sizes(line.shape))
    if line.opcode == "all-gather-start":
        parts = parts[len(parts) // 2 :]
    elif line.opcode in ("collective-permute-start", "send"):
        parts = parts[:1]
    return sum(parts)


def sizes(shape: str) -> Iterator[int]:
    """Bytes of each array in a printed shape, "bf16[4,8]{1,0}" or a tuple of such."""
    for dtype, dims in SHAPE.findall(shape):
        if dtype in SIZES:
            yield SIZES[dtype] * math.prod(int(dim) for dim in dims.split(",") if dim)


def group_size(attributes: str) -> int:
    """Devices that take part together: of "{{0,1},{2,3}}", "[2,4]<=[8]", or "mesh['x'=2,'y'=4] {'y'}"."""
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return len(listed.group(1).split(","))
    if iota := re.search(r"replica_groups=\[[\d,]*?(\d+)\]<=", attributes):
        return int(iota.group(1))
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\].*? \{([^}]*)\}", attributes):
        axes = dict(re.findall(r"'(\w+)'=(\d+)", mesh.group(1)))
        return math.prod(int(axes[name]) for name in re.findall(r"'(\w+)'", mesh.group(2)))
    return 2  # of a permutation: each device receives from one other
