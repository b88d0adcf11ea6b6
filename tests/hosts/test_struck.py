"""Two processes of one run, or the launcher of both, are struck by a signal: nothing hangs, each ends with the exit
code that says what became of it, checkpoints stay, and the same command ends with the same bits."""

import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from tests.support import runs
from tests.support.pair import (
    LAST,
    PATIENT,
    START,
    Pair,
    begun,
    command,
    place,
    same_bits,
    state,
    trained,
    under_way,
    wait_for,
    whole,
)
from tests.support.strike import MOMENTS, STEP

BOUND = 60  # seconds from the strike to the end of everything, on a busy machine; heartbeat_timeout is 10
LOST = {1, -signal.SIGABRT}  # a process whose partner is gone: it says so, or JAX aborts it


class Case(NamedTuple):
    """Who is struck by what and when, and the exit codes that each may then have; the launcher is process 0.

    A stopped one gets SIGCONT once the others have ended."""

    kind: str
    who: str  # "0", "1" or "launcher"
    when: str
    codes: dict[int, set[int]]


def cases() -> Iterator[Case]:
    for when in MOMENTS:
        apart = when == "import"  # the processes have not met: the other one waits for init_timeout
        for process, other in ((0, 1), (1, 0)):
            alone, told = ({1}, {1}) if apart else (LOST, {75})
            yield Case("SIGKILL", str(process), when, {process: {-signal.SIGKILL}, other: alone})
            yield Case("SIGTERM", str(process), when, {process: {75}, other: told})
            yield Case("SIGINT", str(process), when, {process: {130}, other: told})
            yield Case("SIGSTOP", str(process), when, {process: alone, other: alone})
        yield Case("SIGKILL", "launcher", when, {0: {-signal.SIGKILL}})
        yield Case("SIGTERM", "launcher", when, {0: {75}})
        yield Case("SIGINT", "launcher", when, {0: {75}})
        yield Case("SIGSTOP", "launcher", when, {0: {0}})


CASES = {"-".join(case[:3]): case for case in cases()}


def outcome(pair: Pair, case: Case) -> dict[int, int]:
    """The exit codes, once all have ended. Fails where that takes longer than BOUND, seen from the strike."""
    victim = pair.started[0 if case.who == "launcher" else int(case.who)]
    if case.kind == "SIGSTOP":
        wait_for(lambda: state(victim.pid) == "T", PATIENT)
        bound = PATIENT if case.who == "launcher" else BOUND  # without its launcher a pair trains to its end
        wait_for(lambda: not any(state(pid) for pid in pair.pids() if pid != victim.pid), bound)
        victim.send_signal(signal.SIGCONT)
    else:
        wait_for(lambda: any(one.poll() is not None for one in pair.started), PATIENT)
    return pair.ended(BOUND)


def strike(root: Path, folder: Path, case: Case) -> None:
    """Goes on with the run in ``folder`` until it is struck."""
    train = command(root, folder, "sft")
    with under_way(folder, train, " ".join(case[:3]), case.who == "launcher") as pair:
        codes = outcome(pair, case)
        said = pair.said()
    assert {number for number, expected in case.codes.items() if codes[number] not in expected} == set(), (codes, said)
    assert "Traceback" not in said, said
    kept = runs.steps_kept(folder / "sft")
    assert kept[0] == START
    if case.when == "loop" and 75 in codes.values():
        assert kept[-1] >= STEP, said  # saved on the way out


@pytest.mark.nightly
@pytest.mark.parametrize("name", CASES)
def test_a_struck_pair_ends_in_time_and_loses_nothing(root, name):
    folder, case = begun(root, name), CASES[name]
    before = files(folder / "sft" / "checkpoints")
    strike(root, folder, case)
    if case.when != "loop" and runs.steps_kept(folder / "sft") == [START]:
        # nothing began: the same command finds what it found before
        assert files(folder / "sft" / "checkpoints") == before
        assert runs.rows(folder / "sft") == runs.rows(whole(root) / "sft")[: len(runs.rows(folder / "sft"))]
        return
    with under_way(folder, command(root, folder, "sft")) as pair:
        assert pair.ended() == {0: 0, 1: 0}, pair.said()
    same_bits(root, folder)


def files(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.nightly  # by day: pairs that train, in test_processes
def test_a_pair_that_is_struck_goes_on_in_one_process_with_the_same_bits(root):
    """Stopped by Ctrl-C while it compiles; then one process of two devices is the same mesh."""
    folder = begun(root, "goes-on")
    strike(root, folder, CASES["SIGINT-1-compile"])
    assert START < runs.steps_kept(folder / "sft")[-1] < LAST
    one = runs.process(folder / "one", [command(root, folder, "sft")], devices=2)
    assert one.code == 0, one.errors
    same_bits(root, folder)


@pytest.mark.nightly
@pytest.mark.parametrize("who", [0, 1])
def test_a_save_that_one_process_can_not_write_fails_on_both_which_train_on(root, who):
    folder = begun(root, f"full-{who}")
    with under_way(folder, command(root, folder, "sft"), f"FULL {who} loop") as pair:
        assert pair.ended() == {0: 0, 1: 0}, pair.said()
        said = pair.output(0)
    why = "File too large" if who == 0 else "process 1 could not write its part"
    assert re.search(f"a checkpoint could not be written: {why}; once it can be.*; training goes on", said), pair.said()
    kept = runs.steps_kept(folder / "sft")  # 6 too, where it was still being written as the disk had room again
    assert kept[0] == START and 4 not in kept and kept[-1] == LAST
    same_bits(root, folder)


@pytest.mark.nightly
def test_a_pair_that_runs_out_of_time_stops_together(root):
    folder = begun(root, "time")
    with under_way(folder, command(root, folder, "sft", more=["max_run_duration=1"])) as pair:
        assert pair.ended() == {0: 0, 1: 0}, pair.said()
    assert f"max_run_duration: stopped at step {START}; the same command resumes" in pair.output(0)


# ---- rewards --------------------------------------------------------------------------------------------------------


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("does", "codes", "says"),
    [
        (
            "raises",
            {0: 1, 1: 1},
            "raised RuntimeError: the judge is gone",
        ),
        ("hangs", {0: 1, 1: 1}, "no answer within 5 s to "),
        ("is stopped", {0: 75, 1: 75}, "no answer within 10 s after SIGTERM to "),
    ],
)
def test_a_reward_function_that_fails_in_one_process_saves_on_both(root, does, codes, says):
    """In the fourth iteration, after two calls before the first and one in the third."""
    folder = begun(root, does, "grpo")
    more = ["grpo:rewards.function=tests.support.pair:refuse", *["grpo:rewards.timeout=5"] * (does == "hangs")]
    train = command(root, folder, "grpo", more=more)
    with under_way(folder, train, more={"JAXRLHF_TEST_JUDGE": does}) as pair:
        assert pair.ended() == codes, pair.said()
    says = f"process 1: rewards.function: tests.support.pair:refuse: {says}"
    assert says in pair.said() and "Traceback" not in pair.said(), pair.said()
    assert runs.steps_kept(folder / "grpo") == [START, 3]
    with under_way(folder, command(root, folder, "grpo")) as pair:
        assert pair.ended() == {0: 0, 1: 0}, pair.said()
    assert "resumed from step 3" in pair.output(0)
    same_bits(root, folder, "grpo")


# ---- other numbers of processes -------------------------------------------------------------------------------------


@pytest.mark.nightly
def test_one_process_goes_on_for_two_and_two_for_it(root):
    """On a mesh of the same shape: the same bits."""
    folder = begun(root, "one-and-two")
    one = runs.process(folder / "one", [command(root, folder, "sft", more=["sft:iterations=4"])], devices=2)
    assert one.code == 0, one.errors
    with under_way(folder, command(root, folder, "sft")) as pair:
        assert pair.ended() == {0: 0, 1: 0}, pair.said()
    assert "resumed from step 4" in pair.output(0)
    same_bits(root, folder)


@pytest.mark.nightly
@pytest.mark.parametrize("run", ["sft", "grpo"])
def test_one_device_goes_on_for_two_processes(root, run):
    """On a smaller mesh: the same rows of data, and the same numbers but for rounding."""
    folder = begun(root, f"one-device-{run}", run)
    one = runs.process(folder / "one", [command(root, folder, run, more=[f"{run}:mesh.fsdp=1"])])
    assert one.code == 0, one.errors
    last = runs.steps_kept(whole(root) / run)[-1]
    assert place(folder / run, last) == place(whole(root) / run, last)
    for found, expected in zip(trained(folder / run), trained(whole(root) / run), strict=True):
        assert found.keys() == expected.keys()
        for key in expected:
            np.testing.assert_allclose(
                found[key], expected[key], rtol=0, atol=1e-5, err_msg=f"{expected['step']}: {key}"
            )
