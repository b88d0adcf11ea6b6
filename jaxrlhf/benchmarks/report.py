"""What a benchmark measured, for people."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Column, Table

from jaxrlhf.benchmarks.soak import FULL, SIGNALS, Soaked
from jaxrlhf.benchmarks.soak_process import PHASES
from jaxrlhf.benchmarks.throughput import Report


def print_report(report: Report) -> None:
    """The report on the terminal."""
    console = Console()
    say = lambda text: console.print(text, highlight=False, soft_wrap=True, markup=False)
    for line in heading(report):
        say(line)
    console.print(seconds_table(report))
    console.print(numbers_table(report))
    if "growth" in report:
        console.print(growth_table(report))


def heading(report: Report) -> list[str]:
    """What was run, and where."""
    run, here = report["run"], report["machine"]
    sizes = ", ".join(f"{role} {size / 1e6:,.1f}M" for role, size in run["parameters"].items())
    reward = f", reward: {run['reward']}" if run["reward"] else ""
    return [
        f"{run['algorithm']}{reward}; {run['compute']}; parameters: {sizes}",
        f"{run['batch']}; prompts of {run['prompt_tokens']} tokens, responses of at most {run['new_tokens']}",
        f"{run['lengths']}: {run['lengths_are']}",
        f"on {here['cpu']}, {here['cores']} cores; {here['devices']} x {here['device']}; jax {here['jax']}; "
        f"commit {here['commit'] or 'unknown'}; {here['date']}",
    ]


def seconds_table(report: Report) -> Table:
    """Phase by phase, and what share of the machine's matmuls each reaches."""
    run, shares = report["run"], report["limits"]["share_of_matmul_peak"]
    title = f"seconds of {run['steps']} iterations after {run['warm_up']} to warm up"
    table = Table("phase", "median", "min", "max", "of the matmul peak", title=title)
    labels = {"iteration": "whole iteration", "score": "score (host)"}
    for name, found in report["seconds"].items():
        share = f"{shares[name]:.1%}" if name in shares else ""
        table.add_row(labels.get(name, name), *(f"{found[key]:.4f}" for key in ("median", "min", "max")), share)
    return table


def numbers_table(report: Report) -> Table:
    """Everything else, a line each."""
    tokens, limits, memory = report["tokens"], report["limits"], report["memory"]
    rows = []
    if "response" in tokens:
        rows += [
            ("response tokens", f"{tokens['response']:,}; {tokens['response_per_second']:,.0f} a second"),
            ("rollout: row-steps with a token", f"{tokens['rollout_valid_share']:.1%}"),
        ]
    rows += [
        ("update tokens", f"{tokens['update']:,}; {tokens['update_per_second']:,.0f} a second"),
        ("update: columns with a token", f"{tokens['update_valid_share']:.1%}"),
        ("update: columns with a new token", f"{tokens['update_distinct_share']:.1%}"),
        ("arithmetic, each token once", f"{report['flops']['total'] / 1e9:,.2f} GFLOP"),
        (f"matmul peak here, {limits['matmul_dtype']}", f"{limits['matmul_flops_per_second'] / 1e9:,.1f} GFLOP/s"),
        ("an iteration at that peak", f"{limits['seconds_at_matmul_peak']:.4f} s"),
        ("memory bandwidth here", f"{limits['memory_bytes_per_second'] / 1e9:,.1f} GB/s"),
    ]
    if (decode := limits.get("decode")) is not None:
        least, really = decode["seconds_a_step_at_bandwidth"], decode["seconds_a_step"]
        rows += [
            ("decode: weights and keys a step", f"{decode['bytes_a_step'] / 1e6:,.1f} MB"),
            ("decode: ms a step at bandwidth", f"{least * 1e3:.3f}; rollout takes {really * 1e3:.3f}"),
        ]
    compiled = report["compile"]
    rows += [
        ("compilation", f"{compiled['seconds']:.1f} s; {compiled['recompilations']} recompilations afterwards"),
        ("peak memory of the process", f"{memory['peak_rss'] / 2**20:,.0f} MiB"),
    ]
    if memory["device_peak"] is not None:
        rows.append(("peak memory of a device", f"{memory['device_peak'] / 2**20:,.0f} MiB"))
    table = Table(Column(no_wrap=True), "", show_header=False)
    for row in rows:
        table.add_row(*row)
    return table


def growth_table(report: Report) -> Table:
    """How an iteration grows with what is doubled."""
    table = Table("twice the", "seconds", "time ratio", "FLOP ratio")
    for name, found in report["growth"].items():
        ratios = (f"{found['time_ratio']:.2f}", f"{found['flop_ratio']:.2f}")
        table.add_row(name, f"{found['seconds']['median']:.4f}", *ratios)
    return table


# ---- soak -----------------------------------------------------------------------------------------------------------


def print_soaks(found: Sequence[Soaked]) -> None:
    """What disturbed each run in which phase, and what became of it."""
    console = Console()
    table = Table("run", "disturbed by", *PHASES, "in all", title="interruptions, by the phase in which they came")
    for one in found:
        for what in (*SIGNALS, FULL):
            counts = [one.hits[what, phase] for phase in PHASES]
            if any(counts):
                table.add_row(one.name, what, *(str(count) for count in counts), str(sum(counts)))
    console.print(table)
    for one in found:
        count = f", {one.processes} processes" if one.processes > 1 else ""
        equal = "no: " + "; ".join(one.wrong) if one.wrong else "yes"
        line = f"{one.name}{count}: {one.steps} steps, {one.hits.total()} interruptions, {one.starts} starts, "
        line += f"{one.seconds:.0f} s; equal to the undisturbed run: {equal}"
        console.print(line, highlight=False, soft_wrap=True, markup=False)
