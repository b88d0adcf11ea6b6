"""Runs that are killed, stopped and started again at random moments, and compared with one that nobody disturbed."""

import os
import random
import resource
import shutil
import signal
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from jaxrlhf.benchmarks import soak_process
from jaxrlhf.benchmarks.soak_equal import differences, seen
from jaxrlhf.benchmarks.soak_process import ENDED, LOOK, PHASES, Process
from jaxrlhf.benchmarks.soak_run import ALGORITHMS, CONFIG, EVERY, RUN, make_data, make_run
from jaxrlhf.config.strict import suggest
from jaxrlhf.errors import ConfigError
from jaxrlhf.hosts.exit_codes import EXIT_BROKEN, EXIT_INTERRUPTED, EXIT_MISTAKE, EXIT_PREEMPTED
from jaxrlhf.hosts.parent_death import LAUNCHER

SIGNALS = ("SIGKILL", "SIGTERM", "SIGINT")
FULL = "full disk"  # in the place of a signal
PATIENCE = 1800.0  # seconds that a run may go on without its moment, and after its signal: machines may be busy
COLD = 3  # moments in compilation before which the cache of compiled programs is emptied
ONCE = ("import", "load", "compile")  # phases that a process is in once: a signal that is late comes in the next one
LATEST = 3 * EVERY  # calls of the reward function after which a signal waits for no phase: one may never come
DISK = 20.0  # seconds that a disk is full at most
# exit codes besides 0 of a run that was done: before Python has handlers a signal ends the process by itself
CODES = {
    "SIGKILL": {-9},
    "SIGTERM": {EXIT_PREEMPTED},
    "SIGINT": {EXIT_INTERRUPTED},
    FULL: {EXIT_BROKEN, EXIT_MISTAKE, EXIT_PREEMPTED},
}
EARLY = {"SIGTERM": {-15}, FULL: {-15}, "SIGINT": {-2}}


class Moment(NamedTuple):
    """When a run is disturbed, and by what."""

    what: str  # one of SIGNALS, or FULL
    phase: str
    share: float  # of the phase's usual length that passes before it
    skip: int  # how often the phase comes before; of those that come again
    process: int  # which one is hit, of several


class Soaked(NamedTuple):
    """What became of a run."""

    name: str
    processes: int
    steps: int
    hits: Counter  # (what, phase in which it came) -> how often
    starts: int
    wrong: list[str]  # what differs, or should not have happened; empty: equal
    seconds: float


def draw_moments(count: int, full_disks: int, processes: int, seed: int) -> list[Moment]:
    """``count`` moments of each signal in random order, spread over the phases, and ``full_disks`` of a full disk."""
    draw, found = random.Random(seed), []
    for what in (*SIGNALS, FULL):
        phases: list[str] = []
        for _ in range(full_disks if what == FULL else count):
            phases = phases or draw.sample(PHASES, len(PHASES))
            phase = phases.pop()
            skip = draw.randint(0, 3) if phase == "loop" else draw.randint(0, 1) if phase == "reward" else 0
            found.append(Moment(what, phase, draw.random(), skip, draw.randrange(processes)))
    draw.shuffle(found)
    return found


class Soak:
    """One algorithm's runs in ``folder``: undisturbed twice, then disturbed.

    ``say`` is told what happens, a line each."""

    def __init__(self, folder: Path, algorithm: str, processes: int, seed: int, say: Callable[[str], None]):
        self.folder, self.algorithm, self.processes, self.seed, self.say = folder, algorithm, processes, seed, say
        self.cache = folder / "xla"
        self.environment = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": str(self.cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            LAUNCHER: str(os.getpid()),  # a soak that is killed leaves no run behind
        }
        self.lengths: dict[str, float] = {}  # phase -> seconds that it usually lasts
        self.heard: dict[str, list[str]] = {}  # folder of a run -> what its reward function said

    def run(self, moments: Sequence[Moment]) -> Soaked:
        """Raises RuntimeError where a run fails that nobody disturbed."""
        began, steps = time.monotonic(), LATEST * len(moments) + 2 * EVERY
        names = ["undisturbed", "again", "disturbed"]
        for name in names:
            make_run(self.folder / name, self.algorithm, steps, self.seed)
        self.undisturbed("undisturbed")
        self.undisturbed("again")  # with the compiled programs of the first, as the disturbed one
        if wrong := self.compare("again", steps):
            raise RuntimeError(f"{self.algorithm}: two undisturbed runs differ: {wrong[0]}")
        hits, starts, wrong = self.disturbed(list(moments), steps)
        wrong += self.compare("disturbed", steps) if not wrong else []
        return Soaked(self.algorithm, self.processes, steps, hits, starts, wrong, time.monotonic() - began)

    def start(self, name: str) -> list[Process]:
        return soak_process.start(self.folder / name, CONFIG, RUN, self.environment, self.processes)

    def undisturbed(self, name: str) -> None:
        """A run from its beginning to its end, whose phases are timed."""
        processes, spent, visits, last = self.start(name), defaultdict(float), Counter(), ""
        try:
            while (phase := processes[0].phase()) != ENDED:
                began = time.monotonic()
                visits[phase] += phase != last
                last = phase
                time.sleep(LOOK)
                spent[phase] += time.monotonic() - began
        finally:
            codes = soak_process.finish(processes, PATIENCE)
        self.keep(name, processes)
        if any(codes):
            raise RuntimeError(f"{self.algorithm}: an undisturbed run ended with {codes}: {last_words(processes)}")
        self.lengths = {phase: spent[phase] / visits[phase] for phase in visits}

    def disturbed(self, moments: list[Moment], steps: int) -> tuple[Counter, int, list[str]]:
        """(hits, starts, what went wrong) of a run that is started until it is done."""
        hits, starts, cold = Counter(), 0, COLD
        while True:
            moment = moments.pop() if moments else None
            if moment and moment.phase == "compile" and cold:
                cold -= 1
                shutil.rmtree(self.cache, ignore_errors=True)
            processes = self.start("disturbed")
            starts += 1
            try:
                phase = disturb(processes, moment, self.lengths) if moment else None
            finally:
                codes = soak_process.finish(processes, PATIENCE)
            self.keep("disturbed", processes)
            if phase:
                assert moment
                hits[moment.what, phase] += 1
                self.say(f"{self.algorithm}: {moment.what} in {phase}: {codes}; {len(moments)} left")
            if wrong := complaint(moment if phase else None, phase, codes, processes):
                return hits, starts, [wrong]
            if not any(codes):
                left = len(moments) + (moment is not None and phase is None)
                return hits, starts, [f"{steps} steps were done with {left} moments left"] if left else []

    def keep(self, name: str, processes: Sequence[Process]) -> None:
        self.heard.setdefault(name, []).extend(line for process in processes for line in process.seen)

    def compare(self, name: str, steps: int) -> list[str]:
        """What the run ``name`` has not in common with the undisturbed one."""
        wrong = differences(self.folder / "undisturbed" / RUN, self.folder / name / RUN, steps)
        one, other = seen(self.heard["undisturbed"]), seen(self.heard[name])
        if one != other:
            wrong.append(f"scored: {len(one - other)} responses less, {len(other - one)} more than undisturbed")
        return wrong


def disturb(processes: Sequence[Process], moment: Moment, lengths: Mapping[str, float]) -> str | None:
    """Waits for the moment and makes it so: the phase in which it came; None where the run ended before."""
    first, share, skip = processes[0], moment.share, moment.skip  # the first alone says what it does
    limit = time.monotonic() + PATIENCE
    while time.monotonic() < limit:
        late = lambda: len(first.seen) >= LATEST
        while not reached(phase := first.phase(), moment.phase) and not late() and time.monotonic() < limit:
            time.sleep(LOOK)
        wait = time.monotonic() + share * lengths.get(moment.phase, 0.0)
        while (phase := first.phase()) == moment.phase and not late() and (skip or time.monotonic() < wait):
            time.sleep(LOOK)
        if phase == ENDED:
            return None
        if phase != moment.phase and moment.phase not in ONCE and not late():
            skip, share = max(skip - 1, 0), share if skip else share / 2  # it was shorter this time
            continue
        if moment.what == FULL:
            fill(processes)
            processes[moment.process].send(signal.SIGTERM)  # which saves what was held back; else the run went on
        else:
            processes[moment.process].send(signal.Signals[moment.what])
        return phase
    return None


def reached(phase: str, wanted: str) -> bool:
    """Whether a process in ``phase`` is in the phase ``wanted``, or past it: one that comes once may be over before it
    is seen."""
    late = wanted in ONCE and phase not in ONCE[: ONCE.index(wanted)]
    return phase in (wanted, ENDED) or late


def fill(processes: Sequence[Process]) -> None:
    """The disk is full until something could not be written, or DISK seconds have passed."""
    for process in processes:
        process.refused = False
        process.limit_disk(True)
    limit = time.monotonic() + DISK
    while time.monotonic() < limit and not any(one.refused or one.phase() == ENDED for one in processes):
        time.sleep(LOOK)
    for process in processes:
        process.limit_disk(False)


def complaint(moment: Moment | None, phase: str | None, codes: list[int | None], processes: Sequence[Process]) -> str:
    """What is wrong about how the processes ended; "" where nothing is."""
    what = f"{moment.what} in {phase}" if moment else "undisturbed"
    if None in codes:
        return f"{what}: still there after {PATIENCE:.0f} s: {last_words(processes)}"
    code = codes[moment.process] if moment else next(filter(None, codes), 0)
    allowed = {0} | (CODES[moment.what] if moment else set())
    if moment and phase == "import":
        allowed |= EARLY.get(moment.what, set())
    if code not in allowed:
        return f"{what}: exit code {code}, expected one of {sorted(allowed)}: {last_words(processes)}"
    traces = [line for process in processes for line in process.errors if line.startswith("Traceback")]
    if traces and len(processes) == 1 and code not in EARLY.get(moment.what if moment else "", ()):
        return f"{what}: a traceback: {last_words(processes)}"
    return ""


def last_words(processes: Sequence[Process]) -> str:
    """The last lines that the processes wrote."""
    found = [line for process in processes for line in (process.errors or process.lines)[-3:]]
    return " | ".join(found)[-600:] or "nothing was said"


def soaked_in(
    folder: str | None,
    algorithms: Sequence[str],
    moments: int,
    full_disks: int,
    processes: int,
    seed: int,
    say: Callable[[str], None],
) -> list[Soaked]:
    """A run of each algorithm, hit ``moments`` times by each signal, in ``folder``, which is new. Without it the runs
    are deleted where all are equal. Raises ConfigError before anything is started."""
    import jax

    if wrong := [name for name in algorithms if name not in ALGORITHMS]:
        raise ConfigError(f"--algorithm: {wrong[0]}: {suggest(wrong[0], [*ALGORITHMS])}")
    if full_disks and not hasattr(resource, "prlimit"):
        raise ConfigError(f"--full-disks: {full_disks}: needs Linux (prlimit); nearest: 0")
    if folder and os.path.exists(folder):
        raise ConfigError(f"--folder: {folder}: is there; expected a new folder")
    home = Path(folder or tempfile.mkdtemp(prefix="jaxrlhf-soak-")).resolve()
    say(f"runs in {home}")
    jax.config.update("jax_platforms", "cpu")  # of this process, which only compares: the devices are the runs'
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a background job's: the runs would ignore it, too
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    found = []
    for number, algorithm in enumerate(dict.fromkeys(algorithms)):
        (home / algorithm).mkdir(parents=True)
        make_data(home / algorithm, seed)
        drawn = draw_moments(moments, full_disks, processes, seed + number)
        found.append(Soak(home / algorithm, algorithm, processes, seed, say).run(drawn))
    if folder is None and not any(each.wrong for each in found):
        shutil.rmtree(home)
    return found
