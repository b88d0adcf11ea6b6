"""``jaxrlhf benchmark throughput``: an iteration timed, and held against what the machine can do."""

import statistics
from typing import Any

from jaxrlhf.benchmarks import machine
from jaxrlhf.benchmarks.case import DOUBLED, Case
from jaxrlhf.benchmarks.rows import DESCRIBED
from jaxrlhf.benchmarks.timed import WARM_UP, Iterations, TimedRun, run, trace
from jaxrlhf.benchmarks.work import IterationWork, count_work, decode_bytes, decode_steps
from jaxrlhf.config.batch import describe_batch
from jaxrlhf.plan.weights import held
from jaxrlhf.types import given

Report = dict[str, Any]
# score: by a function on the host; update: with all that prepares it, reward model, reference and values; where one
# program does everything it is that program less the rollout, which is timed in a program of its own
PHASES = ("iteration", "rollout", "score", "update", "idle")


def measure(cases: list[Case], steps: int, profile: str | None = None) -> Report:
    """All that is reported of the first case; of the others how time and FLOPs grow. Numbers are in seconds, bytes,
    tokens and FLOPs, and shares are of 1."""
    case, *others = cases
    iterations = Iterations(case)
    (timed,) = run([iterations], steps)
    if profile is not None:
        trace(iterations, profile)
    rss, device = machine.peak_rss(), machine.device_peak()
    work = count_work(case.drawn, timed.batch)
    report = {
        "machine": machine.describe(),
        "run": describe(case, steps),
        "seconds": {name: spread(timed.seconds[name]) for name in PHASES if name in timed.seconds},
        "tokens": tokens(work, timed),
        "flops": {"total": work.flops, "rollout": work.rollout, "prepare": work.prepare, "update": work.update},
        "compile": {"seconds": timed.compile_seconds, "recompilations": timed.recompilations},
        "memory": {"peak_rss": rss, "device_peak": device},
        "limits": limits(case, timed, work),
    }
    if others:
        report["growth"] = {
            name: growth(work, other, *run([iterations, Iterations(other)], steps))
            for name, other in zip(DOUBLED, others, strict=True)
        }
    return report


def describe(case: Case, steps: int) -> Report:
    """What was run."""
    drawn, cfg = case.drawn, case.drawn.cfg
    sampling = drawn.algorithm.online
    reward = "host" if cfg.rewards.on_host else "model"
    return {
        "algorithm": cfg.algorithm_name,
        "parameters": {role: held(drawn.configs[role], head, 1) for role, head in drawn.heads.items()},
        "shapes": case.sources,
        "compute": cfg.precision.compute,
        "mesh": dict(drawn.mesh.shape),
        "batch": describe_batch(drawn.resolved, drawn.recipe.num_micro),
        "prompt_tokens": case.prompt,
        "new_tokens": case.room,
        "lengths": case.lengths,
        "lengths_are": DESCRIBED[case.lengths],
        "reward": reward if sampling else None,
        "steps": steps,
        "warm_up": WARM_UP,
    }


def spread(found: list[float]) -> dict[str, float]:
    return {"median": statistics.median(found), "min": min(found), "max": max(found)}


def median(timed: TimedRun, name: str) -> float:
    return statistics.median(timed.seconds[name])


def tokens(work: IterationWork, timed: TimedRun) -> Report:
    """Tokens of an iteration, a second, and how many of those that are computed hold something."""
    found: Report = {
        "update": work.update_tokens,
        "update_per_second": work.update_tokens / median(timed, "update"),
        "update_valid_share": work.update_share,
        "update_distinct_share": work.distinct_share,
    }
    if "rollout" in timed.seconds:
        found |= {
            "response": work.response_tokens,
            "response_per_second": work.response_tokens / median(timed, "iteration"),
            "response_per_second_of_rollout": work.response_tokens / median(timed, "rollout"),
            "rollout_valid_share": work.sampled_share,
        }
    return found


def limits(case: Case, timed: TimedRun, work: IterationWork) -> Report:
    """The iteration beside what this machine reaches, measured now, in this process."""
    mesh, dtype = case.drawn.mesh, case.drawn.cfg.precision.compute
    devices = 1 if mesh.devices.flat[0].platform == "cpu" else mesh.size  # devices of a CPU share its cores
    peak, bandwidth = devices * machine.matmul_peak(dtype), devices * machine.memory_bandwidth()
    parts = {"iteration": work.flops, "rollout": work.rollout, "update": work.prepare + work.update}
    found: Report = {
        "matmul_dtype": dtype,
        "matmul_flops_per_second": peak,
        "share_of_matmul_peak": {
            name: flops / median(timed, name) / peak for name, flops in parts.items() if name in timed.seconds
        },
        "seconds_at_matmul_peak": work.flops / peak,
        "memory_bytes_per_second": bandwidth,
    }
    if "rollout" in timed.seconds:
        sequences = given(timed.batch.sequences, "batch.sequences")
        steps = decode_steps(sequences)
        size = decode_bytes(case.drawn, sequences)
        found["decode"] = {
            "steps": steps,
            "bytes_a_step": size,
            "seconds_a_step_at_bandwidth": size / bandwidth,
            "seconds_a_step": median(timed, "rollout") / steps,
        }
    return found


def growth(work: IterationWork, other: Case, timed: TimedRun, again: TimedRun) -> Report:
    """How much longer an iteration of ``other`` takes (the median over pairs that were timed one after the other),
    beside how many more FLOPs it has."""
    pairs = zip(again.seconds["iteration"], timed.seconds["iteration"], strict=True)
    return {
        "seconds": spread(again.seconds["iteration"]),
        "time_ratio": statistics.median(longer / once for longer, once in pairs),
        "flop_ratio": count_work(other.drawn, again.batch).flops / work.flops,
    }
