"""Which checkpoints of a run are good: each is verified against its manifest before anything is read from it.

A step that isn't what was saved is passed over for the newest good one, which is said in one line. A reader holds the
step that it reads, so that a run in training doesn't delete it meanwhile.
"""

import contextlib
import contextvars
import fcntl
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import orbax.checkpoint as ocp
from etils import epath

from jaxrlhf.errors import one_line
from jaxrlhf.hosts import processes
from jaxrlhf.log.run_dir import is_local, is_locked, lock_run_dir
from jaxrlhf.run import manifest, reader_leases
from jaxrlhf.run.manifest import Damaged

STRICT = contextvars.ContextVar("strict", default=False)  # whether a damaged checkpoint is an error at once
ASIDE = "set_aside"  # the folder of a run directory for steps that were passed over, or left by rewind
BASES = "base"  # the folder of a run directory for frozen weights that its roles share: written once
BESIDE = ("tokenizer", BASES)  # folders of a run directory that belong to each of its checkpoints
UNDER_WAY = "still being written"
YOUNG = 600.0  # seconds after which a step without a manifest is no longer being written, where no lock says more
verdicts: dict[str, tuple[object, str | None]] = {}  # step directory -> its listing, and what is wrong with it
told: set[str] = set()  # lines, each of which is said once by a process


class Reader(NamedTuple):
    """What a block that reads runs has found so far."""

    held: list[Callable[[], None]]  # what gives up the steps that it holds
    own: dict[str, int]  # run directory -> the step from which the run that this process trains goes on, 0: none


reader: contextvars.ContextVar[Reader | None] = contextvars.ContextVar("reader", default=None)


def directory(run_dir) -> epath.Path:
    """Where a run keeps its checkpoints (orbax wants absolute paths; to resolve gs://... would make it a local one)."""
    path = epath.Path(run_dir)
    return (path.resolve() if is_local(path) else path) / "checkpoints"


def base_directory(run_dir, name: str) -> epath.Path:
    """Where a run keeps the frozen weights of this name."""
    return directory(run_dir).parent / BASES / name


def committed(run_dir) -> list[int]:
    """The steps that were written to their end, ascending, whatever became of them since."""
    there = directory(run_dir)
    return sorted(ocp.utils.checkpoint_steps(there)) if there.exists() else []


def last_committed(run_dir) -> int | None:
    """The newest of them; None where there is none."""
    return max(committed(run_dir), default=None)


def problem(run_dir, step: int, share: tuple[int, int] = (0, 1)) -> str | None:
    """What is wrong with a step, in words; None where all of it is as it was saved, or where it is older than the
    run's manifests. Its files are read once in this process, and again only where one was written meanwhile.

    ``share``: (i, n): the checksums of every n-th file from the i-th on, of a run of n processes.
    """
    folder = directory(run_dir) / str(step)
    found = manifest.listing(folder)
    beside = {name: manifest.listing(epath.Path(run_dir) / name) for name in BESIDE}
    key, seen = os.fspath(folder), (found, beside, manifest.exists(folder))
    if key not in verdicts or verdicts[key][0] != seen:
        verdicts[key] = seen, examine(run_dir, step, found, share)
    return verdicts[key][1]


def examine(run_dir, step: int, found: dict[str, manifest.Entry], share: tuple[int, int]) -> str | None:
    """``problem``, read from the disk. Raises Damaged where the step is whole but a file beside it was changed."""
    folder = directory(run_dir) / str(step)
    if not found:
        return "its directory is empty"
    if not manifest.exists(folder):
        if missing := {"_CHECKPOINT_METADATA", "extra/metadata"} - found.keys():
            return f"{min(missing)} is missing"
        before = all(other > step for other in with_manifests(run_dir))
        if before:
            tell(
                f"{run_dir}: step {step} has no manifest (an older version saved it, or its save was "
                "interrupted): it is not verified"
            )
        return None if before else "its save was interrupted: manifest.json is missing"
    try:
        kept = manifest.read_all(folder)
        if wrong := manifest.wrong_sizes(kept["files"], found):
            return wrong
        mine = dict(list(kept["files"].items())[share[0] :: share[1]])
        if wrong := manifest.wrong_content(folder, mine, found):
            return wrong
    except FileNotFoundError as error:
        return f"{error.filename or error} was deleted while it was read"
    except Damaged as error:
        return str(error)
    check_beside(run_dir, step, kept["beside"])
    return None


def check_beside(run_dir, step: int, expected: dict) -> None:
    """Raises Damaged where the run's tokenizer, chat template or base isn't the one that the step was saved with."""
    found = {
        f"{name}/{file}": entry
        for name in BESIDE
        for file, entry in manifest.listing(epath.Path(run_dir) / name).items()
    }
    wrong = manifest.wrong_sizes(expected, found) or manifest.wrong_content(epath.Path(run_dir), expected, found)
    if wrong:
        raise Damaged(
            f"{run_dir}/{wrong}; expected the file with which step {step} was trained, or a run of its own for another"
        )


def with_manifests(run_dir) -> list[int]:
    """The steps that have a manifest, ascending."""
    return [step for step in committed(run_dir) if manifest.exists(directory(run_dir) / str(step))]


def newest(run_dir, ours: bool = False) -> int | None:
    """The newest good step, None where none was ever saved. What is passed over is said in one line.

    ``ours``: this process is about to write to the run. Of the run that it trains it is the step from which that goes
    on. Raises Damaged where no step is good, or under STRICT where one isn't."""
    this = reader.get()
    if this and os.fspath(run_dir) in this.own:
        return this.own[os.fspath(run_dir)] or None
    passed: dict[int, str] = {}
    for step in reversed(committed(run_dir)):
        if not hold(run_dir, step):
            continue
        wrong = UNDER_WAY if not ours and is_under_way(run_dir, step) else problem(run_dir, step)
        if wrong is None:
            tell_passed(run_dir, step, passed)
            return step
        if (directory(run_dir) / str(step)).exists():  # else the run deleted it meanwhile
            passed[step] = wrong
    if passed:
        step, wrong = next(iter(passed.items()))
        if wrong == UNDER_WAY:
            raise Damaged(
                f"{run_dir}: {described(step, wrong)}, and no other one is good; try again once it is written"
            )
        raise Damaged(f"{run_dir}: no checkpoint is good; step {step}: {wrong}; nothing to go on from")
    return None


def is_under_way(run_dir, step: int) -> bool:
    """Whether the run that trains goes on writing this step: the newest one, which has not all of its manifests yet."""
    folder = directory(run_dir) / str(step)
    if not manifest.is_missing(folder):
        return False
    finished = with_manifests(run_dir)
    if any(other > step for other in finished):
        return False
    if is_local(run_dir):
        if not is_locked(run_dir):
            return False
        if finished:
            return True
    with contextlib.suppress(FileNotFoundError):  # an older version writes none at all; an object store has no locks
        file = folder if is_local(run_dir) else folder / "commit_success.txt"
        return time.time() - file.stat().mtime < YOUNG
    return False


def described(step: int, wrong: str) -> str:
    """A step that is not taken, and why."""
    return f"step {step} is {wrong}" if wrong == UNDER_WAY else f"step {step} is damaged ({wrong})"


def tell_passed(run_dir, step: int, passed: dict[int, str]) -> None:
    """Says which steps were passed over for ``step``, and why. Raises Damaged under STRICT."""
    if not passed:
        return
    which = ", ".join(described(*other) for other in passed.items())
    if STRICT.get() and {*passed.values()} != {UNDER_WAY}:
        raise Damaged(f"{run_dir}: {which}; the newest good one is step {step}")
    tell(f"{run_dir}: {which}: step {step}, the newest good one, is taken")


def tell(line: str) -> None:
    """Says a line on stderr, once, by the first process."""
    if line not in told and processes.is_main():
        told.add(line)
        print(line, file=sys.stderr)


def require(run_dir, step: int, name: str, ours: bool = False) -> None:
    """Raises Damaged where this step, which ``name`` asks for, isn't good. ``ours``: this process holds the run's lock,
    so that nobody is writing it."""
    if not hold(run_dir, step):
        raise Damaged(f"{name}: step {step} is being deleted by the run that trains")
    if wrong := UNDER_WAY if not ours and is_under_way(run_dir, step) else problem(run_dir, step):
        good = [other for other in committed(run_dir) if other != step and problem(run_dir, other) is None]
        there = f"the newest good one is step {good[-1]}" if good else "no other one is good"
        raise Damaged(f"{name}: {described(step, wrong)}; {there}")


# ---- a run that goes on ---------------------------------------------------------------------------------------------


def settle(run_dir) -> int:
    """The step that a run goes on from, 0 for none: ``newest``, and the same on all processes, each of which reads its
    share of the files. What is newer is set aside, so that its number is free."""
    if processes.several():
        examine_together(run_dir)
    this = reader.set(None)  # its own steps are not held: it may delete them
    try:
        start = newest(run_dir, ours=True) or 0
    finally:
        reader.reset(this)
    if now := reader.get():
        now.own[os.fspath(run_dir)] = start
    processes.on_main(lambda: clear(run_dir, start))
    return start


def clear(run_dir, start: int) -> None:
    """Free the numbers of the steps after ``start``: damaged ones are set aside, half-written ones deleted."""
    if newer := [step for step in committed(run_dir) if step > start]:
        set_aside(run_dir, newer)
    there = directory(run_dir)
    for path in list(there.glob("*.orbax-checkpoint-tmp*")) if there.exists() and is_local(run_dir) else ():
        step = path.name.partition(".")[0]
        if step.isdecimal() and int(step) > start:
            then = f"the run goes on from step {start}" if start else "the run starts again"
            tell(f"{run_dir}: step {step} was not saved to its end: {then}")
        path.rmtree()


def examine_together(run_dir) -> None:
    """``problem`` of the steps down to the newest good one: what one process finds damaged is damaged to all."""
    import jax

    share = jax.process_index(), jax.process_count()
    for step in reversed(committed(run_dir)):
        wrong = problem(run_dir, step, share)
        first = processes.first_told(wrong or "") or None
        key = os.fspath(directory(run_dir) / str(step))
        verdicts[key] = verdicts[key][0], first
        if first is None:
            return


def set_aside(run_dir, steps: list[int]) -> None:
    """Move steps out of the checkpoints; those that were moved before are deleted."""
    aside = epath.Path(run_dir) / ASIDE
    if aside.exists():
        aside.rmtree()
    aside.mkdir(parents=True)
    for step in steps:
        (directory(run_dir) / str(step)).rename(aside / str(step))


def rewind(run_dir, step: int) -> list[int]:
    """Set the steps after ``step`` aside, so that the run goes on from there: those steps, ascending.

    Raises Damaged where ``step`` isn't good, ValueError where there is none, RunDirBusy while the run is trained."""
    lock = lock_run_dir(run_dir)
    try:
        there = committed(run_dir)
        if step not in there:
            held = ", ".join(map(str, there)) or "none"
            raise ValueError(f"{run_dir}: has no step {step}; its steps: {held}")
        require(run_dir, step, os.fspath(run_dir), ours=True)
        if newer := [other for other in there if other > step]:
            set_aside(run_dir, newer)
        return newer
    finally:
        if lock:
            lock.close()


# ---- readers beside the run that writes -----------------------------------------------------------------------------


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """In this block the steps that are found stay: the run that trains deletes none of them."""
    this = Reader([], {})
    token = reader.set(this)
    try:
        yield
    finally:
        reader.reset(token)
        for give_up in this.held:
            give_up()


def hold(run_dir, step: int) -> bool:
    """Whether a step is there and, in a block that reads, stays until its end."""
    this, folder = reader.get(), directory(run_dir) / str(step)
    if this is None:
        return folder.exists()
    if not is_local(run_dir):
        try:
            this.held.append(reader_leases.Hold(run_dir, step).close)
        except OSError as error:
            tell(f"{one_line(error)}: can't be written to: step {step} may be deleted while it is read")
        return folder.exists()
    try:
        file = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return False
    this.held.append(functools.partial(os.close, file))
    return lock(file, fcntl.LOCK_SH)


def lock(file: int, kind: int) -> bool:
    """Lock an open directory; whether nobody holds the other kind. A file system without such locks (NFS) has none."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def delete(run_dir, step: int) -> bool:
    """Delete a step, unless somebody reads it; whether it is gone. Under another name first, which orbax sweeps at the
    next start: what is deleted in part is no checkpoint."""
    folder = directory(run_dir) / str(step)
    if not is_local(run_dir):
        if reader_leases.is_held(run_dir, step):
            return False
        (folder / "commit_success.txt").unlink(missing_ok=True)
        folder.rmtree()
        return True
    try:
        file = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return True
    try:
        if not lock(file, fcntl.LOCK_EX):
            return False
        folder.rename(folder.with_name(f"{step}.orbax-checkpoint-tmp")).rmtree()
        return True
    finally:
        os.close(file)
